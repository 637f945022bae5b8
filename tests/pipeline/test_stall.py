"""A process that stands still, wherever it is, prints its stacks and ends."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline import checkpoint, loader, sampling, stall, trainer
from pipeline.config import load_config
from pipeline.stall import StallWatch
from pipeline.tracking import RunTracker

YAML = """
run: {{name: tiny, dir: {directory}}}
data: {{shards: {shards}, num_workers: 0}}
model: {{resolution: 16, num_classes: 3, attention_resolution: 8, g_channels: 2, d_channels: 4, z_dim: 8}}
train: {{steps: 2, global_batch_size: 12, log_every_steps: 1, checkpoint_every_steps: 2, sample_every_steps: 2}}
health: {{stall_seconds: 2}}
tracking: {{enabled: false}}
"""


def test_a_stall_prints_the_stack_and_ends_the_process(run_stalled):
    result = run_stalled("with StallWatch(0.5): waits_for_ever()")
    assert result.returncode == 1
    assert "[rank 0] error: no step for 0.5 s (health.stall_seconds)" in result.stderr
    assert "in waits_for_ever" in result.stderr


def test_a_stall_inside_a_call_that_keeps_all_threads_from_running_ends_too(run_stalled):
    """A C function called with the global lock held."""
    result = run_stalled(
        "import ctypes, pipeline.stall; pipeline.stall._FALLBACK_SECONDS = 0.5\n"
        "with StallWatch(0.5): ctypes.PyDLL(None).sleep(60)"
    )
    assert result.returncode == 1
    assert "Timeout" in result.stderr and "<module>" in result.stderr


@pytest.fixture
def run_stalled():
    def run(program: str) -> subprocess.CompletedProcess:
        preamble = "import time; from pipeline.stall import StallWatch\ndef waits_for_ever(): time.sleep(60)\n"
        command = [sys.executable, "-c", preamble + program]
        return subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=Path(__file__).parents[2])

    return run


def test_signs_of_life_and_the_end_of_the_block_end_the_watch(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(stall, "_give_up", lambda seconds: ended.set())
    with StallWatch(2.0) as watch:
        for _ in range(8):
            assert not ended.wait(0.4)
            watch.alive()
    assert not ended.wait(2.5)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (trainer, "open_shard_set"),
        (checkpoint, "newest"),
        (loader._Batches, "__getitem__"),
        (trainer.Trainer, "_one_step"),
        (sampling, "sample_grid"),
        (checkpoint, "save"),
        (RunTracker, "close"),
    ],
)
def test_the_watch_covers_all_of_a_training(owner, name, tmp_path, tiny_shards, monkeypatch):
    """Each function stands still once, until the watch would end the process."""
    ended, stands = threading.Event(), iter([True])
    real = getattr(owner, name)

    def stalled(*args, **options):
        if next(stands, False):
            assert ended.wait(30), "nobody noticed"
        return real(*args, **options)

    (tmp_path / "config.yaml").write_text(YAML.format(directory=tmp_path, shards=tiny_shards))
    monkeypatch.setattr(owner, name, stalled)
    monkeypatch.setattr(stall, "_give_up", lambda seconds: ended.set())
    trainer.train(load_config(tmp_path / "config.yaml"))
    assert ended.is_set()
