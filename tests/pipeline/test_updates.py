"""An update is a function of the global batch, not of the processes that share it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("update_worker.py")


def five_updates(config: Path, out: Path, processes: int, *arguments: str) -> dict:
    command = [sys.executable, str(WORKER), str(config), str(out), *arguments]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_shards) -> Path:
    path = tmp_path_factory.mktemp("updates") / "config.yaml"
    path.write_text(f"""
run: {{name: parity, dir: {path.parent}}}
data: {{shards: {tiny_shards}, num_workers: 0, horizontal_flip: true}}
model: {{resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 2, d_channels: 4, z_dim: 8}}
train: {{steps: 5, global_batch_size: 16, accumulation_steps: 2, num_d_steps: 2, precision: float64}}
ema: {{decay: 0.9, start_step: 2}}
""")
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> dict:
    return five_updates(config, tmp_path_factory.mktemp("alone") / "seen.pt", 1)


@pytest.fixture(scope="module")
def pair(config, tmp_path_factory) -> dict:
    return five_updates(config, tmp_path_factory.mktemp("pair") / "seen.pt", 2)


def largest_difference(one: dict, other: dict) -> float:
    return max(
        float((a[name] - b[name]).abs().max())
        for a, b in zip(one["gradients"], other["gradients"], strict=True)
        for name in a
    )


def test_two_processes_do_what_one_does(alone, pair):
    """Gradients of 15 updates to 1e-10, losses to 1e-9; parameters, buffers and EMA after them to 1e-8."""
    assert len(alone["gradients"]) == 15, "2 discriminator updates and 1 generator update, 5 times"
    for one, other in zip(alone["sample_ids"] + alone["z"], pair["sample_ids"] + pair["z"], strict=True):
        assert torch.equal(one, other)
    assert largest_difference(alone, pair) < 1e-10
    assert alone["losses"] == pytest.approx(pair["losses"], rel=0, abs=1e-9)
    for network, tensors in alone["networks"].items():
        for name, tensor in tensors.items():
            assert torch.allclose(tensor.double(), pair["networks"][network][name].double(), rtol=0, atol=1e-8), name


def test_a_rank_whose_buffer_was_changed_by_hand_is_named_and_nothing_is_saved(config, pair):
    """One bit of one running variance on rank 1; both ranks say the same and stop."""
    message = pair["replica_errors"][0]
    assert pair["replica_errors"] == [message, message]
    assert "rank 1 holds other values than rank 0 at step 5 in 1 tensor(s)" in message
    assert "generator.blocks.0.norm1.norm.running_var" in message
    assert not list((config.parent / "parity").glob("checkpoints/step-*"))


@pytest.mark.parametrize(
    "fault", ["model.sync_batch_norm=false", pytest.param("--noise-by-rank", marks=pytest.mark.slow)]
)
def test_the_comparison_notices_a_fault(config, alone, tmp_path, fault):
    """Without synchronised batch norm, or with noise seeded by rank, the same measure is off by far."""
    pair = five_updates(config, tmp_path / "seen.pt", 2, fault)
    assert largest_difference(alone, pair) > 1e-4
