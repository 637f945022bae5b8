"""Every launch either makes one world or is refused: none starts separate trainings in silence.

The modes are those that were found to do so, run as a user types them, without a GPU; two more are in
tests/launch/test_train.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.world import WorldSizeError, _refuse_ignored_settings, _refuse_separate_trainings

REPO = Path(__file__).resolve().parents[2]
PROBE = str(Path(__file__).with_name("world_probe.py"))
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch"]
OTHER_MACHINE = ["--main_process_ip", "127.0.0.1", "--main_process_port", "29512"]


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE")}
    environment = clean | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def multi_cpu_yaml(tmp_path) -> str:
    path = tmp_path / "multi_cpu.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 1\n"
        'num_processes: 2\nmain_process_port: 29513\nmixed_precision: "no"\n'
    )
    return str(path)


def test_multi_cpu_in_the_yaml_is_refused(multi_cpu_yaml):
    result = start([*ACCELERATE, "--config_file", multi_cpu_yaml, PROBE])
    assert result.returncode != 0
    assert "MASTER_ADDR is set but WORLD_SIZE is not" in result.stderr


def test_two_machines_with_cpu_are_refused():
    """Two independent trainings, each of which would write the same checkpoints."""
    two = ["--cpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", "1", *OTHER_MACHINE]
    result = start([*ACCELERATE, *two, PROBE])
    assert result.returncode != 0
    assert "MASTER_ADDR is set but WORLD_SIZE is not" in result.stderr


def test_cpu_beside_a_deepspeed_yaml_is_refused():
    """--cpu switches DeepSpeed off without a word."""
    yaml = ["--config_file", "configs/accelerate/deepspeed_zero1.yaml", "--cpu", "--num_processes", "2"]
    result = start([*ACCELERATE, *yaml, PROBE])
    assert result.returncode != 0
    assert "MASTER_ADDR is set but WORLD_SIZE is not" in result.stderr


def test_multi_gpu_without_a_gpu_is_one_world():
    """Where Accelerate left to itself makes two worlds of one process."""
    result = start([*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", PROBE])
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("one world of ranks [0, 1]") == 1


def test_srun_without_a_rendezvous_is_refused():
    """`srun -n 2 python launch/train.py`: what Slurm gives each task."""
    result = start([sys.executable, PROBE], SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1", SLURM_NTASKS="2")
    assert result.returncode != 0
    assert "srun started SLURM_STEP_NUM_TASKS=2 tasks, but the world of this one is WORLD_SIZE=1" in result.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},  # a launcher per node, each alone
    ],
)
def test_tasks_of_srun_that_do_not_know_each_other_are_refused(environment):
    with pytest.raises(WorldSizeError, match="each task would train by itself"):
        _refuse_separate_trainings(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8"},  # one process in a batch script
        {"SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
        {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
        {"SLURM_STEP_NUM_TASKS": "16", "WORLD_SIZE": "16"},  # ranks taken from Slurm's variables
    ],
)
def test_worlds_under_slurm_that_are_one_pass(environment):
    _refuse_separate_trainings(environment)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision: bf16, which would have no effect: train.precision"),
        ("ACCELERATE_USE_FSDP", "true", "distributed_type: FSDP, which this training does not use"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "distributed_type: MEGATRON_LM"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_refused(name, value, reason):
    _refuse_ignored_settings({"ACCELERATE_MIXED_PRECISION": "no"})
    with pytest.raises(WorldSizeError, match=reason):
        _refuse_ignored_settings({name: value})
