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
