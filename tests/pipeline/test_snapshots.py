import pytest
import torch

from pipeline import checkpoint, snapshots
from pipeline.checkpoint import TrainerState


def state(step: int, world_size: int = 1) -> TrainerState:
    return TrainerState(step, step, step, 1, "d" * 64, world_size, {}, {})


def networks(value: float) -> dict:
    return {name: {"weight": torch.full((3,), value)} for name in ("ema", "generator")}


def test_a_snapshot_holds_both_generators_and_is_whole(tmp_path):
    path = snapshots.save(tmp_path, state(7), networks(1))
    assert snapshots.published(tmp_path) == [path]
    assert checkpoint.find_fault(path) is None
    assert {file.name for file in path.iterdir()} == {
        "ema.safetensors", "generator.safetensors", "trainer.json", "manifest.json",
    }  # fmt: skip


def test_pruning_checkpoints_touches_no_snapshot(tmp_path):
    for step in (1, 2, 3):
        snapshots.save(tmp_path, state(step), networks(step))
        checkpoint.save(tmp_path, state(step), networks(step), {})
    checkpoint.prune(tmp_path, keep=1)
    assert len(snapshots.published(tmp_path)) == 3
    assert len(checkpoint.published(tmp_path)) == 1


def test_the_same_weights_again_leave_the_first_snapshot(tmp_path):
    path = snapshots.save(tmp_path, state(7), networks(1))
    before = (path / "manifest.json").stat().st_mtime_ns
    snapshots.save(tmp_path, state(7, world_size=2), networks(1))
    assert (path / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("damaged", [False, True])
def test_other_weights_of_the_same_step_replace_it(tmp_path, damaged):
    """As after a rollback."""
    path = snapshots.save(tmp_path, state(7), networks(1))
    if damaged:
        (path / "ema.safetensors").write_bytes(b"half")
    snapshots.save(tmp_path, state(7), networks(2))
    assert checkpoint.find_fault(path) is None
    assert [item.name for item in path.parent.iterdir()] == ["step-00000007"]
