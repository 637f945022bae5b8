"""Training jobs of real processes in which faults are planted, for the tests of what a job survives."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).resolve().parents[2]
WORKER = str(Path(__file__).with_name("fault_worker.py"))
LAUNCHERS = {
    "accelerate": [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
                   "configs/accelerate/cpu_two_processes.yaml"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "none": [sys.executable],
}  # fmt: skip
YAML = """
run: {{name: run, dir: {directory}, device: cpu}}
data: {{shards: {shards}, num_workers: 0}}
model: {{resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 2, d_channels: 4, z_dim: 8}}
train:
  {{steps: 100000, global_batch_size: 8, log_every_steps: 1, checkpoint_every_steps: 100000,
  sample_every_steps: 100000}}
ema: {{decay: 0.9, start_step: 2}}
tracking: {{enabled: false}}
"""


class Job:
    """A launcher and its ranks."""

    def __init__(self, command: list[str], directory: Path):
        directory.mkdir()
        self.directory = directory
        environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE")}
        environment["PYTHONPATH"] = str(REPO)
        with open(directory / "log", "w") as log:
            self.launcher = subprocess.Popen(command, cwd=REPO, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.processes: list[psutil.Process] = [psutil.Process(self.launcher.pid)]

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def notes(self, rank: int) -> list:
        path = self.directory / f"rank-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, text: str, seconds: float = 150) -> None:
        """Waits until the log holds a text, and takes note of the processes there are then."""
        deadline = time.monotonic() + seconds
        while text not in self.log():
            assert self.launcher.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        self.processes = [self.processes[0], *self.processes[0].children(recursive=True)]

    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        started = [process for process in self.processes if WORKER in process.cmdline()[:3]]
        return sorted(started, key=lambda process: int(process.environ().get("RANK", "0")))

    def wait(self, seconds: float = 240) -> int:
        """Waits for the launcher, and for every rank; returns the launcher's status."""
        status = self.launcher.wait(seconds)
        _, alive = psutil.wait_procs(self.processes, seconds)
        assert not alive, alive
        return status

    def kill(self) -> None:
        if self.launcher.poll() is None:
            self.processes += self.processes[0].children(recursive=True)
        for process in self.processes:
            if process.is_running():
                process.kill()
        self.launcher.wait()


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def start_job(tmp_path, tiny_shards):
    """Function (faults, override, ..., launcher=) that starts tiny training processes with faults planted in them."""
    jobs: list[Job] = []
    (tmp_path / "config.yaml").write_text(YAML.format(directory=tmp_path, shards=tiny_shards))

    def start(faults: list[dict], *overrides: str, launcher: str = "accelerate", before: tuple[str, ...] = ()) -> Job:
        directory = tmp_path / f"job-{len(jobs)}"
        program = [WORKER, str(directory), json.dumps(faults), str(tmp_path / "config.yaml")]
        jobs.append(Job([*before, *LAUNCHERS[launcher], *program, *overrides], directory))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.fixture(scope="session")
def untrained_run(tiny_shards, tmp_path_factory) -> Path:
    """A run with a whole checkpoint at step 3, its networks untrained but for a gain of attention that shows."""
    import torch

    from pipeline import checkpoint
    from pipeline.checkpoint import TrainerState
    from pipeline.config import config_from_dict, to_dict, to_yaml
    from pipeline.manifest import open_shard_set
    from pipeline.networks import build_discriminator, build_generator

    run_dir = tmp_path_factory.mktemp("untrained") / "tiny"
    config = config_from_dict(
        {
            "run": {"name": run_dir.name, "dir": str(run_dir.parent), "device": "cpu"},
            "data": {"shards": str(tiny_shards), "num_workers": 0},
            "model": {"resolution": 16, "num_classes": 3, "z_dim": 8, "g_channels": 4, "d_channels": 8,
                      "attention_resolution": 8},
            "train": {"steps": 9, "global_batch_size": 6, "checkpoint_every_steps": 3},
            "tracking": {"enabled": False},
        },
        "test",
    )  # fmt: skip
    torch.manual_seed(0)
    generator, discriminator = build_generator(config), build_discriminator(config)
    for network in (generator, discriminator):
        network.attention.gain.data.fill_(0.7)
        for parameter in network.parameters():
            if parameter.ndim == 1:  # biases, which start at 0 and would hide a mistake
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    networks = {"generator": generator, "discriminator": discriminator, "ema": generator}
    state = TrainerState(3, 18, 3, 1, open_shard_set(str(tiny_shards)).dataset_id, 1, to_dict(config), {})
    states = {name: network.state_dict() for name, network in networks.items()}
    checkpoint.save(run_dir, state, states, {"generator": {}, "discriminator": {}})
    return run_dir
