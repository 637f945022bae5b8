"""DeepSpeed's ZeRO-1 and ZeRO-2 do what one process does, resume bit for bit, and refuse what they cannot keep.

Real `accelerate launch` processes with the configs of configs/accelerate, over gloo.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import checkpoint
from pipeline.config import Config, ConfigError, load_config
from pipeline.trainer import train
from pipeline.zero import Zero, zero_stage

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs pip install 'sagan-at-scale[deepspeed]'", allow_module_level=True)

REPO = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("deepspeed_worker.py")
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
# Adam with beta1 = 0 nearly takes the sign of a gradient, so that one within rounding of 0 may move its weight either
# way: after ten updates DDP, ZeRO-1 and ZeRO-2 alike are 1e-5 to 1e-4 off one process. This eps takes that away.
YAML = """
run: {{name: whole, dir: {directory}}}
data: {{shards: {shards}, num_workers: 0, horizontal_flip: true}}
model: {{resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 2, d_channels: 4, z_dim: 8}}
train: {{steps: 4, global_batch_size: 24, accumulation_steps: 2, num_d_steps: 2, checkpoint_every_steps: 2,
         sample_every_steps: 100}}
optimizer: {{eps: 1.0e-3}}
ema: {{decay: 0.9, start_step: 2}}
tracking: {{enabled: false}}
"""


def write_config(directory: Path, shards: Path) -> Path:
    path = directory / "config.yaml"
    path.write_text(YAML.format(directory=directory, shards=shards))
    return path


def launch(backend: str, processes: int, *command: str) -> None:
    """Runs a program with `accelerate launch` and one of our configs, or by itself."""
    launcher = [ACCELERATE, "launch", "--config_file", f"configs/accelerate/{backend}.yaml",
                "--num_processes", str(processes)]  # fmt: skip
    start = launcher if processes > 1 else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*start, *command], cwd=REPO, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, tiny_shards) -> Path:
    return write_config(tmp_path_factory.mktemp("zero"), tiny_shards)


@pytest.fixture(scope="module")
def alone(config_path, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("alone") / "seen.pt"
    launch("one_process", 1, str(WORKER), str(config_path), str(out))
    return torch.load(out, weights_only=False)


def differences(one: dict, other: dict) -> dict[str, float]:
    """Largest differences after five updates: of losses, parameters and buffers, Adam's first and second moments."""
    assert len(one["losses"]) == len(other["losses"]) == 15, "2 discriminator updates and 1 generator update, 5 times"
    found = {"losses": max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))}
    for network, tensors in one["networks"].items():
        pairs = ((tensor.double(), other["networks"][network][key].double()) for key, tensor in tensors.items())
        found[network] = max(float((a - b).abs().max()) for a, b in pairs)
    for network, optimizer in one["optimizers"].items():
        for index, entry in optimizer["state"].items():
            for key, value in entry.items():
                difference = float((value - other["optimizers"][network]["state"][index][key]).abs().max())
                found[key] = max(found.get(key, 0.0), difference)
    return found


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("deepspeed_zero1", marks=pytest.mark.slow),
        "deepspeed_zero2",
        pytest.param("cpu_two_processes", marks=pytest.mark.slow),
    ],
)
def test_five_float32_updates_are_those_of_one_process(backend, config_path, alone, tmp_path):
    """With two discriminator steps, two micro-batches, EMA; and a NaN on one rank alone is skipped by both."""
    launch(backend, 2, str(WORKER), str(config_path), str(tmp_path / "seen.pt"), f"run.name={backend}")
    seen = torch.load(tmp_path / "seen.pt", weights_only=False)
    assert seen["backend"] == {"cpu_two_processes": "ddp"}.get(backend, backend.removeprefix("deepspeed_"))
    found = differences(alone, seen)
    assert max(found[name] for name in ("losses", "generator", "discriminator", "ema")) < 1e-5, found
    assert found["step"] == 0
    assert seen["rolled_back"] == [True, True], "the same bits again after a rollback"
    poisoned = seen["poisoned"]
    assert poisoned["unchanged"] == [True, True], "neither parameters nor moments"
    assert poisoned["reports"] == ["discriminator went non-finite at step 6: gradient of embedding.weight"] * 2
    assert poisoned["goes_on"]
    assert poisoned["finite"]
    assert seen["dtypes"] == [torch.bfloat16, torch.float32], "our autocast reaches through the engine"


def train_by_launch(backend: str, processes: int, config_path: Path, *overrides: str) -> None:
    launch(backend, processes, "launch/train.py", str(config_path), "run.device=cpu", *overrides)


def load(config: Config, step: int) -> checkpoint.Checkpoint:
    path = config.run_dir / "checkpoints" / f"step-{step:08d}"
    assert checkpoint.find_fault(path) is None
    return checkpoint.load(path)


def copy_run_up_to_step_2(source: Config, target: Config) -> None:
    """As if the run had been killed after its first checkpoint."""
    shutil.copytree(source.run_dir, target.run_dir)
    shutil.rmtree(target.run_dir / "checkpoints" / "step-00000004")
    (target.run_dir / "DONE").unlink()


def moments(found: checkpoint.Checkpoint) -> dict[tuple, torch.Tensor]:
    return {
        (network, index, key): value
        for network, optimizer in found.optimizers.items()
        for index, entry in optimizer["state"].items()
        for key, value in entry.items()
    }


def assert_same(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> None:
    """Every parameter, buffer and moment, bit for bit."""
    assert checkpoint.digests(one.networks) == checkpoint.digests(other.networks)
    ours, theirs = moments(one), moments(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.fixture(scope="module")
def run_of_zero1(config_path) -> Config:
    """Four steps with checkpoints after two and four."""
    train_by_launch("deepspeed_zero1", 2, config_path)
    return load_config(config_path)


def test_zero1_resumed_in_a_new_process_is_the_uninterrupted_run_bit_for_bit(run_of_zero1, config_path):
    resumed = load_config(config_path, ["run.name=resumed"])
    copy_run_up_to_step_2(run_of_zero1, resumed)
    train_by_launch("deepspeed_zero1", 2, config_path, "run.name=resumed")
    assert load(resumed, 4).state.backend == "zero1"
    assert load(resumed, 4).state.world_size == 2
    assert_same(load(resumed, 4), load(run_of_zero1, 4))


@pytest.mark.slow
def test_zero2_resumed_in_a_new_process_is_the_uninterrupted_run_bit_for_bit(config_path):
    whole, resumed = (load_config(config_path, [f"run.name={name}"]) for name in ("whole2", "resumed2"))
    train_by_launch("deepspeed_zero2", 2, config_path, "run.name=whole2")
    copy_run_up_to_step_2(whole, resumed)
    train_by_launch("deepspeed_zero2", 2, config_path, "run.name=resumed2")
    assert load(resumed, 4).state.backend == "zero2"
    assert_same(load(resumed, 4), load(whole, 4))


def test_a_checkpoint_of_deepspeed_is_refused_by_ddp_unless_accepted_and_then_all_of_it_is_taken(
    run_of_zero1, config_path, capsys
):
    other = load_config(config_path, ["run.name=other", "run.device=cpu"])
    copy_run_up_to_step_2(run_of_zero1, other)
    with pytest.raises(ConfigError) as refusal:
        train(other)
    for words in ("was trained with zero1, this launch is ddp", "deepspeed_zero1.yaml", "run.accept_changes=[backend]"):
        assert words in str(refusal.value)
    train(load_config(config_path, ["run.name=other", "run.device=cpu", "run.accept_changes=[backend]"]))
    assert "resuming with ddp what ran with zero1" in capsys.readouterr().err
    assert_close(load(other, 4), load(run_of_zero1, 4))


@pytest.mark.slow
def test_a_checkpoint_of_one_process_goes_on_under_zero2_on_three(config_path):
    """The moments are cut in other parts than those of two processes, with padding."""
    whole, moved = (load_config(config_path, [f"run.name={name}", "run.device=cpu"]) for name in ("single", "moved"))
    train(whole)
    copy_run_up_to_step_2(whole, moved)
    train_by_launch("deepspeed_zero2", 3, config_path, "run.name=moved", "run.accept_changes=[backend]")
    assert load(moved, 4).state.backend == "zero2"
    assert_close(load(moved, 4), load(whole, 4))


def assert_close(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint) -> None:
    """Weights that no rounding noise moves, and the second moments, which remember all steps."""
    for name in ("blocks.0.conv1.weight", "embedding.weight", "linear.weight"):
        a, b = one.networks["discriminator"][name], other.networks["discriminator"][name]
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    theirs = moments(other)
    for key, value in moments(one).items():
        if key[0] == "discriminator" and key[2] != "exp_avg":
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def launched(**settings: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"} | settings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, r"zero_stage: 3 leaves parameters of shape \(0,\) outside"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage: 0 shares nothing out"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device: cpu needs"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device: nvme needs"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping: 1.0 is no part of the SAGAN recipe"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "train.accumulation_steps=4"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file: ds.json is not read"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused_with_the_reason(settings, reason):
    assert zero_stage(launched()) == 2
    assert zero_stage({}) == 0
    with pytest.raises(ConfigError, match=reason):
        zero_stage(launched(**settings))


def test_zero3_is_refused_as_it_is_launched(config_path):
    launcher = [ACCELERATE, "launch", "--config_file", "configs/accelerate/deepspeed_zero2.yaml"]
    command = [*launcher, "--num_processes", "2", "--zero_stage", "3", "launch/train.py", str(config_path)]
    result = subprocess.run([*command, "run.device=cpu"], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "zero_stage: 3 leaves parameters of shape (0,)" in result.stderr


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [
        (1, torch.float32, "but one process started; give accelerate launch --num_processes N"),
        (2, torch.float64, "train.precision=float64 does not go with DeepSpeed"),
    ],
)
def test_a_single_process_and_float64_are_refused_before_deepspeed_is_imported(size, dtype, reason):
    module = torch.nn.Linear(2, 2, dtype=dtype)
    world = SimpleNamespace(size=size, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=reason):
        Zero(module, torch.optim.Adam(module.parameters()), world, 1)
