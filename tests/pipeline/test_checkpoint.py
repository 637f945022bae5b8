import json
import os

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import CheckpointError, TrainerState


def state_at(step: int) -> TrainerState:
    return TrainerState(
        step=step, images_seen=8 * step, next_batch_number=step, plan_version=1, dataset_id="d" * 64,
        world_size=1, config={"run": {"name": "x"}}, versions={"torch": "0"},
    )  # fmt: skip


def save_at(run_dir, step: int):
    torch.manual_seed(step)
    networks = {name: {"weight": torch.randn(3, 4)} for name in ("generator", "discriminator", "ema")}
    parameter = torch.nn.Parameter(torch.randn(3))
    adam = torch.optim.Adam([parameter])
    parameter.sum().backward()
    adam.step()
    optimizers = {"generator": adam.state_dict(), "discriminator": adam.state_dict()}
    return checkpoint.save(run_dir, state_at(step), networks, optimizers), networks, optimizers


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    path, networks, optimizers = save_at(tmp_path, 3)
    assert path == tmp_path / "checkpoints" / "step-00000003"
    found = checkpoint.load(path)
    assert found.state == state_at(3)
    for name, tensors in networks.items():
        assert torch.equal(found.networks[name]["weight"], tensors["weight"])
    for name, optimizer in optimizers.items():
        assert torch.equal(found.optimizers[name]["state"][0]["exp_avg"], optimizer["state"][0]["exp_avg"])


@pytest.mark.parametrize("damage", ["half", "bit", "missing", "manifest", "no manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, damage):
    before, _, _ = save_at(tmp_path, 5)
    newest, _, _ = save_at(tmp_path, 10)
    victim = newest / "discriminator.safetensors"
    content = victim.read_bytes()
    if damage == "half":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        victim.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text('{"format": 1, ')
    else:
        (newest / "manifest.json").unlink()
    path, problems = checkpoint.newest(tmp_path)
    assert path == before
    assert len(problems) == 1
    assert "step-00000010 is damaged" in problems[0]
    assert ("manifest.json" if "manifest" in damage else "discriminator.safetensors") in problems[0]
    assert (tmp_path / "checkpoints" / "step-00000010.damaged").is_dir(), "the damaged one is kept for a look"
    assert save_at(tmp_path, 10)[0].is_dir(), "its step can be saved again"


def test_a_kill_while_saving_leaves_nothing_that_counts(tmp_path, monkeypatch):
    """Every moment before the rename is tried: the process dies there and the checkpoint before is still the newest."""
    before, _, _ = save_at(tmp_path, 1)

    class Killed(BaseException):
        pass

    def dies_at(call_number: int):
        calls = 0
        real = os.fsync

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == call_number:
                raise Killed
            real(descriptor)

        return fsync

    for moment in range(1, 8):
        monkeypatch.setattr(os, "fsync", dies_at(moment))
        with pytest.raises(Killed):
            save_at(tmp_path, 2)
        monkeypatch.undo()
        assert checkpoint.newest(tmp_path) == (before, [])
    assert save_at(tmp_path, 2)[0].is_dir()
    checkpoint.prune(tmp_path, keep=5)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001", "step-00000002"]


def test_a_full_disk_is_said_and_costs_no_checkpoint(tmp_path, monkeypatch):
    """The files lead to /dev/full, which fails every write as a full disk does."""
    before, _, _ = save_at(tmp_path, 1)
    partial = tmp_path / "checkpoints" / "step-00000002.partial"
    mkdir = type(partial).mkdir

    def mkdir_on_a_full_disk(self, *args, **kwargs):
        mkdir(self, *args, **kwargs)
        if self == partial:
            for name in ("generator.safetensors", "trainer.json"):
                (self / name).symlink_to("/dev/full")

    monkeypatch.setattr(type(partial), "mkdir", mkdir_on_a_full_disk)
    with pytest.raises(CheckpointError, match=r"the disk is full.*already published are untouched; free space on"):
        save_at(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == (before, [])
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"], "the unfinished files are removed"


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 9):
        save_at(tmp_path, step)
    removed = checkpoint.prune(tmp_path, keep=2)
    assert [path.name for path in removed] == ["step-00000001", "step-00000002"]
    assert [checkpoint.step_of(path) for path in checkpoint.published(tmp_path)] == [9, 10]


def test_a_checkpoint_of_another_format_is_not_guessed_at(tmp_path):
    path, _, _ = save_at(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    assert checkpoint.find_fault(path) == "format 99, this code reads 1"


def test_digests_tell_replicas_apart():
    here = {"generator": {"a": torch.zeros(3), "b": torch.ones(2)}}
    there = {"generator": {"a": torch.zeros(3), "b": torch.tensor([1.0, 1.0 + 1e-7])}}
    first, second = checkpoint.digests(here), checkpoint.digests(there)
    assert first["generator.a"] == second["generator.a"]
    assert first["generator.b"] != second["generator.b"]


def test_pruning_keeps_the_best_by_fid_too(tmp_path):
    for step in (1, 2, 3, 4):
        save_at(tmp_path, step)
    checkpoint.prune(tmp_path, keep=1, best_step=2)
    assert [checkpoint.step_of(path) for path in checkpoint.published(tmp_path)] == [2, 4]
