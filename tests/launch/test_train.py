"""The command as a user types it: real `accelerate launch` processes, real signals, real images."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline import checkpoint

REPO = Path(__file__).resolve().parents[2]
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
TWO_PROCESSES = [ACCELERATE, "launch", "--config_file", "configs/accelerate/cpu_two_processes.yaml", "launch/train.py"]
TINY = ["model.resolution=16", "model.num_classes=3", "model.attention_resolution=8", "model.g_channels=2",
        "model.d_channels=4", "train.global_batch_size=8", "data.num_workers=0", "tracking.enabled=false",
        "run.device=cpu"]  # fmt: skip


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE")}
    options = {"capture_output": True, "text": True, "cwd": REPO, "env": environment, "timeout": 280} | options
    return subprocess.run(command, **options)


def test_help_teaches():
    result = run([sys.executable, "launch/train.py", "--help"])
    assert result.returncode == 0
    for word in ("section.name=value", "--dry-run", "accelerate launch", "resumes", "SIGTERM"):
        assert word in result.stdout


def test_a_mistyped_key_answers_with_the_right_one_and_no_traceback():
    result = run([sys.executable, "launch/train.py", "configs/cifar10.yaml", "optimizer.lr_gg=1"])
    assert result.returncode == 1
    assert "optimizer.lr_gg: unknown key; did you mean optimizer.lr_g?" in result.stderr
    assert "Traceback" not in result.stderr


def test_dry_run_prints_the_resolved_configuration_and_the_arithmetic(tiny_shards, tmp_path):
    arguments = [f"data.shards={tiny_shards}", f"run.dir={tmp_path / 'runs'}", *TINY]
    result = run([sys.executable, "launch/train.py", "configs/cifar10.yaml", *arguments, "--dry-run"])
    assert result.returncode == 0, result.stderr
    assert "lr_g: 0.0002" in result.stdout
    assert "11.0 to the epoch" not in result.stdout, "5 discriminator steps take 5 batches of 8 from 90 images"
    assert "100,000 steps, 2.2 to the epoch" in result.stdout
    assert "checkpoint" in result.stdout and "all-reduced per step" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_a_world_that_is_not_here_can_be_reckoned_with(tiny_shards, tmp_path):
    arguments = [f"data.shards={tiny_shards}", f"run.dir={tmp_path / 'runs'}", *TINY, "--dry-run"]
    command = [sys.executable, "launch/train.py", "configs/cifar10.yaml", *arguments, "--assume-world-size"]
    result = run([*command, "4"])
    assert result.returncode == 0, result.stderr
    assert "x 4 process(es) x 2;" in result.stdout
    assert "88 of 90 images, 22 per process; the other 2 are left over" in result.stdout
    result = run([*command, "512"])
    assert result.returncode == 1 and "8 images cannot be dealt to 512 processes" in result.stderr


@pytest.mark.parametrize("mode", [["--cpu", "--num_processes", "2"], ["--num_processes", "2"]])
def test_a_launch_that_would_silently_start_one_process_is_refused(mode, tiny_shards, tmp_path):
    command = [ACCELERATE, "launch", *mode, "launch/train.py", "configs/cifar10.yaml"]
    result = run([*command, f"data.shards={tiny_shards}", f"run.dir={tmp_path}", *TINY])
    assert result.returncode != 0
    assert "MASTER_ADDR is set but WORLD_SIZE is not" in result.stderr
    assert "configs/accelerate/cpu_two_processes.yaml" in result.stderr


def test_another_number_of_processes_than_expected_is_refused(tiny_shards, tmp_path):
    arguments = [f"data.shards={tiny_shards}", f"run.dir={tmp_path}", "run.expected_world_size=2", *TINY]
    result = run([sys.executable, "launch/train.py", "configs/cifar10.yaml", *arguments])
    assert result.returncode == 1
    assert "run.expected_world_size is 2, but 1 process(es) started" in result.stderr


def test_a_signal_to_one_rank_of_two_ends_both_with_one_checkpoint(tiny_shards, tmp_path):
    arguments = [f"data.shards={tiny_shards}", f"run.dir={tmp_path}", "run.name=pair", "train.steps=100000",
                 "train.log_every_steps=5", *TINY]  # fmt: skip
    command = [*TWO_PROCESSES, "configs/cifar10.yaml", *arguments]
    job = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        lines = []
        for line in job.stderr:
            lines.append(line)
            if line.startswith("first step after"):
                start_up, cpu_seconds = line, [sum(rank.cpu_times()[:2]) for rank in ranks(job)]
            if line.startswith("step 10/"):
                ranks(job)[-1].send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 0, "".join(lines)
    finally:
        job.kill()
        job.stderr.close()
    published = checkpoint.published(tmp_path / "pair")
    assert len(published) == 1
    assert any(f"stopped by SIGUSR1 at step {checkpoint.step_of(published[0])}, checkpoint" in line for line in lines)
    total, *laps = (float(number) for number in re.findall(r"\d+\.\d", start_up))
    assert re.findall(r"(\w+) [\d.]+[,\n]", start_up)[1:] == ["processes", "set", "networks", "directory", "step"]
    assert sum(laps) == pytest.approx(total, abs=0.4)
    assert len(cpu_seconds) == 2 and max(cpu_seconds) < 15


def ranks(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The training processes that a launcher started."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if "launch/train.py" in child.cmdline()]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_imagenet_killed_and_resumed_is_the_run_that_was_never_killed(shared_data, tmp_path):
    """30 steps of imagenet128.yaml on real images in two processes; SIGKILL after step 17, resumed from 15, evaluated.

    One MLflow run holds it all, each point once.
    """
    shards = tmp_path / "shards"
    source = shared_data / "ILSVRC2012_img_train.tar"
    build = [sys.executable, "launch/shards.py", "build", "--source", str(source), "--destination", str(shards)]
    result = run([*build, "--size", "128", "--samples-per-shard", "128", "--workers", "2"], timeout=600)
    assert result.returncode == 0, result.stderr
    narrow = [f"data.shards={shards}", f"run.dir={tmp_path}", "model.num_classes=500", "model.g_channels=8",
              "model.d_channels=8", "train.global_batch_size=8", "train.steps=30", "train.checkpoint_every_steps=5",
              "train.log_every_steps=1", "train.keep_checkpoints=99", "ema.start_step=10", "data.num_workers=1",
              "train.channels_last=false",
              "run.device=cpu"]  # fmt: skip

    def command(name: str) -> list[str]:
        return [*TWO_PROCESSES, "configs/imagenet128.yaml", f"run.name={name}", *narrow]

    result = run(command("whole"), timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]

    job = subprocess.Popen(command("killed"), cwd=REPO, stderr=subprocess.PIPE, text=True)
    for line in job.stderr:
        if line.startswith("step 17/"):
            victims = [*ranks(job), psutil.Process(job.pid)]
            for victim in victims:
                victim.kill()
            break
    psutil.wait_procs(victims, timeout=30)
    job.wait()
    job.stderr.close()
    newest, problems = checkpoint.newest(tmp_path / "killed")
    assert (checkpoint.step_of(newest), problems) == (15, [])

    result = run(command("killed"), timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "step-00000015" in result.stderr
    whole = checkpoint.load(tmp_path / "whole" / "checkpoints" / "step-00000030")
    resumed = checkpoint.load(tmp_path / "killed" / "checkpoints" / "step-00000030")
    assert checkpoint.digests(whole.networks) == checkpoint.digests(resumed.networks)
    for name in ("optimizer_g.pt", "optimizer_d.pt"):
        assert (whole.path / name).read_bytes() == (resumed.path / name).read_bytes()

    evaluate = [*TWO_PROCESSES[:-1], "launch/evaluate.py", str(tmp_path / "killed"), "run.device=cpu"]
    result = run([*evaluate, "evaluation.features=random", "evaluation.num_images=64",
                  "evaluation.kid_subset_size=32"], timeout=600)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    points = stored_points(tmp_path / "mlflow.db", "killed")
    assert sorted(step for key, step in points if key == "train/d_loss") == list(range(1, 31))
    assert [step for key, step in points if key.startswith("eval/fid")] == [30]
    assert len(points) == len(set(points))


def stored_points(database: Path, run_name: str) -> list[tuple[str, int]]:
    """Every (metric, step) in the one MLflow run of that name, read from the database itself; system metrics apart."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        ids = connection.execute("SELECT run_uuid FROM runs WHERE name = ?", (run_name,)).fetchall()
        assert len(ids) == 1, "one run through all restarts"
        query = "SELECT key, step FROM metrics WHERE run_uuid = ? AND key NOT LIKE 'system/%'"
        return connection.execute(query, ids[0]).fetchall()
