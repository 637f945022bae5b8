"""Evaluators as processes of their own: beside a training, killed at any moment, two at once."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from pipeline import results, snapshots
from pipeline.checkpoint import TrainerState
from pipeline.config import load_config, to_dict, to_yaml
from pipeline.journal import read_records
from pipeline.manifest import open_shard_set
from pipeline.networks import build_generator

TWO_PROCESSES = (
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_two_processes.yaml",
)  # fmt: skip
SMOKE = ["evaluation.features=random", "evaluation.num_images=60", "evaluation.kid_subset_size=20"]


@pytest.fixture
def config_file(tiny_shards, tmp_path) -> Path:
    values = {
        "run": {"name": "tiny", "dir": str(tmp_path / "runs"), "device": "cpu"},
        "data": {"shards": str(tiny_shards), "num_workers": 0},
        "model": {"resolution": 16, "num_classes": 3, "z_dim": 8, "g_channels": 4, "d_channels": 4,
                  "attention_resolution": 8},
        "train": {"steps": 40, "global_batch_size": 6, "log_every_steps": 10, "checkpoint_every_steps": 20},
        "evaluation": {"every_steps": 10, "reference_dir": str(tmp_path / "reference")},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def run_of_snapshots(config_file) -> Path:
    """A run that never was, with snapshots at 10, 20, 30 and 40."""
    config = load_config(config_file, ["tracking.enabled=false"])
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    dataset_id = open_shard_set(config.data.shards).dataset_id
    for step in (10, 20, 30, 40):
        torch.manual_seed(step)
        networks = {name: build_generator(config).state_dict() for name in ("ema", "generator")}
        state = TrainerState(step, 6 * step, step, 1, dataset_id, 1, to_dict(config), {})
        snapshots.save(config.run_dir, state, networks)
    return config.run_dir


def environment_of(repo_root: Path) -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return environment


def evaluator(run_dir: Path, repo_root: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*(launcher or (sys.executable,)), "launch/evaluate.py", str(run_dir), *SMOKE, *arguments]
    return subprocess.Popen(
        command,
        cwd=repo_root,
        env=environment_of(repo_root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(is_so: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def assert_each_step_once(run_dir: Path, steps: list[int]) -> None:
    assert [results.read(path)["step"] for path in results.published(run_dir)] == steps
    for step in steps:
        [path] = (run_dir / "journals").glob(f"evaluation-{step:08d}-*.jsonl")
        records, _ = read_records(path)
        names = [name for record in records for name in record["metrics"]]
        assert len(names) == len(set(names)) == 8
        assert {record["step"] for record in records} == {step}


@pytest.mark.slow  # a training and an evaluator of two processes each
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")  # of what MLflow imports
def test_two_processes_watch_a_training_of_two(config_file, tiny_shards, tmp_path, repo_root):
    """Every snapshot once, at its step in the training's MLflow run; what training imports knows of no evaluation."""
    run_dir, log = tmp_path / "runs" / "tiny", tmp_path / "imports.txt"
    train = [*TWO_PROCESSES, "launch/train.py", str(config_file)]
    environment = environment_of(repo_root) | {"PYTHONPROFILEIMPORTTIME": "1"}
    with log.open("w") as errors:
        training = subprocess.Popen(train, cwd=repo_root, env=environment, stderr=errors)
    while not (run_dir / "config.yaml").exists():
        assert training.poll() is None
        time.sleep(0.2)
    watcher = evaluator(run_dir, repo_root, "--watch", launcher=TWO_PROCESSES)
    # So small a training would be over before the evaluator has imported PyTorch: it stands still for a while.
    children = psutil.Process(training.pid).children(recursive=True)
    ranks = [child for child in children if "launch/train.py" in child.cmdline()]
    assert len(ranks) == 2
    wait_until(lambda: snapshots.published(run_dir))
    for rank in ranks:
        rank.suspend()
    assert not (run_dir / "DONE").exists()
    wait_until(lambda: results.published(run_dir))
    for rank in ranks:
        rank.resume()
    assert training.wait(400) == 0
    _, errors = watcher.communicate(timeout=400)
    assert watcher.returncode == 0, errors
    assert_each_step_once(run_dir, [10, 20, 30, 40])
    assert {results.read(path)["provenance"]["world_size"] for path in results.published(run_dir)} == {2}
    sync = evaluator(run_dir, repo_root, "--sync")  # what a busy machine did not send within its minute
    _, errors = sync.communicate(timeout=300)
    assert sync.returncode == 0, errors
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    [run] = [run for item in client.search_experiments() for run in client.search_runs([item.experiment_id])]
    history = client.get_metric_history(run.info.run_id, "eval/fid_random_features")
    assert sorted(point.step for point in history) == [10, 20, 30, 40]
    assert client.get_metric_history(run.info.run_id, "train/d_loss")

    imported = {
        line.rpartition("|")[2].strip() for line in log.read_text().splitlines() if line.startswith("import time")
    }
    assert "pipeline.trainer" in imported
    stages = {
        "evaluation",
        "watch",
        "feature_pass",
        "features",
        "generated",
        "scores",
        "comparison",
        "report",
        "reference",
    }
    assert not imported & {"torch_fidelity", *(f"pipeline.{name}" for name in stages)}

    arguments = ("--real", f"evaluation.validation_shards={tiny_shards}", "evaluation.num_images=90")
    real = evaluator(run_dir, repo_root, *arguments, launcher=TWO_PROCESSES)
    _, errors = real.communicate(timeout=400)
    assert real.returncode == 0, errors
    [path] = (run_dir / "evaluations" / "real").glob("*.json")
    result = results.read(path)
    assert result["provenance"]["world_size"] == 2
    assert result["scores"]["real_fid_random_features"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow  # starts an evaluator half a dozen times
@pytest.mark.timeout(900)
def test_killed_at_random_moments_no_result_is_lost_doubled_or_half_written(run_of_snapshots, repo_root):
    """Moments between the first sign of work and some seconds later, however long the start takes on this machine."""
    moments, seconds_of_start = random.Random(0), 0.0
    for _ in range(6):
        started = time.monotonic()
        process = evaluator(run_of_snapshots, repo_root, "--checkpoint", "all")
        while not (run_of_snapshots / "evaluations").exists() and process.poll() is None:
            time.sleep(0.02)
        seconds_of_start = seconds_of_start or time.monotonic() - started
        time.sleep(max(0.0, seconds_of_start - (time.monotonic() - started)) + moments.uniform(0, 4))
        process.kill()
        process.communicate()
        for path in results.published(run_of_snapshots):
            assert json.loads(path.read_text())["scores"]
    last = evaluator(run_of_snapshots, repo_root, "--checkpoint", "all")
    _, errors = last.communicate(timeout=400)
    assert last.returncode == 0, errors
    assert_each_step_once(run_of_snapshots, [10, 20, 30, 40])


@pytest.mark.slow  # two evaluators at once
def test_two_evaluators_of_one_run_do_each_other_no_harm(run_of_snapshots, repo_root):
    pair = [evaluator(run_of_snapshots, repo_root, "--checkpoint", "all") for _ in range(2)]
    for process in pair:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert_each_step_once(run_of_snapshots, [10, 20, 30, 40])
    assert not list((run_of_snapshots / "evaluations").rglob("*.part*"))
