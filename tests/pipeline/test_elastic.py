"""A run that is resumed on other numbers of processes is the run that one process never left."""

import collections
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import checkpoint

REPO = Path(__file__).resolve().parents[2]
WORKER = str(Path(__file__).with_name("elastic_worker.py"))

YAML = """
run: {{name: whole, dir: {directory}, device: cpu}}
data: {{shards: {shards}, num_workers: 0, horizontal_flip: true}}
model: {{resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 2, d_channels: 4, z_dim: 8}}
train:
  {{steps: 5, global_batch_size: 16, accumulation_steps: 2, num_d_steps: 2, precision: float64, log_every_steps: 1,
  checkpoint_every_steps: 5, sample_every_steps: 5}}
ema: {{decay: 0.9, start_step: 2}}
tracking: {{enabled: false}}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_then_one_then_four_processes_train_as_one_does(tmp_path, tiny_shards):
    """Steps 1 and 2 in two processes, 3 in one, 4 and 5 in four, each from the checkpoint of those before."""
    config = tmp_path / "config.yaml"
    config.write_text(YAML.format(directory=tmp_path, shards=tiny_shards))
    whole, _ = train(config, tmp_path / "notes-whole", 1)
    # 5 times 2 discriminator updates and 1 generator update with their noise, and 2 batches of real images.
    assert collections.Counter(kind for kind, *_ in whole) == {"loss": 15, "noise": 15, "real": 10}

    parts, logs = {}, []
    for processes, last_step in ((2, 2), (1, 3), (4, 5)):
        notes = tmp_path / f"notes-{processes}"
        found, log = train(config, notes, processes, "run.name=parts", f"train.steps={last_step}")
        assert not parts.keys() & found.keys(), "no step is done twice"
        parts |= found
        logs.append(log)
    assert "resuming on 1 process(es) what ran on 2" in logs[1] and "resuming on 4 process(es) what ran on 1" in logs[2]
    assert parts.keys() == whole.keys()
    for fact, value in whole.items():
        assert parts[fact] == (pytest.approx(value, rel=0, abs=1e-9) if fact[0] == "loss" else value), fact

    one, other = (checkpoint.load(checkpoint.published(tmp_path / name)[-1]).networks for name in ("whole", "parts"))
    for network, tensors in one.items():
        for name, tensor in tensors.items():
            assert (tensor.double() - other[network][name].double()).abs().max() < 1e-8, (network, name)


def train(config: Path, notes: Path, processes: int, *overrides: str) -> tuple[dict, str]:
    """Returns what was given and lost as {(kind, ...): global micro-batches, or the mean loss}, and the log."""
    notes.mkdir()
    command = [sys.executable, WORKER, str(config), str(notes), *overrides]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    ranks = [
        [json.loads(line) for line in (notes / f"rank-{rank}.jsonl").read_text().splitlines()]
        for rank in range(processes)
    ]
    facts = {}
    for lines in zip(*ranks, strict=True):
        keys = {tuple(line[:-1]) for line in lines}
        assert len(keys) == 1, f"ranks do different things: {keys}"
        key, values = keys.pop(), [line[-1] for line in lines]
        # The number in the order of training tells the discriminator updates of one step apart.
        number = sum(known[: len(key)] == key for known in facts)
        facts[*key, number] = sum(values) / processes if key[0] == "loss" else micro_batches(values)
    return facts, result.stderr


def micro_batches(values: list) -> list:
    """Global micro-batches, from each rank's part of each."""
    return [list(itertools.chain(*parts)) for parts in zip(*values, strict=True)]
