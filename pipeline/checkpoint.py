"""Checkpoints: saved aside, published by a rename, verified before use, pruned only after.

`RUN/checkpoints/step-00001000/` holds generator, discriminator and ema (safetensors), both optimizers, trainer.json
and, written last, manifest.json with the sha256 of each file.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})$")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says what was kept and what to do."""


@dataclass(frozen=True)
class TrainerState:
    """Everything a resume needs beside the tensors. No RNG state: all draws are functions of seed and step."""

    step: int  # generator updates done
    images_seen: int  # real images the discriminator was shown
    next_batch_number: int  # position in the data order
    plan_version: int  # version of the data order
    dataset_id: str
    world_size: int
    config: dict[str, Any]
    versions: dict[str, str]
    backend: str = "ddp"  # or zero1, zero2; checkpoints from before it was noted are ddp
    redrawn: tuple[tuple[int, int], ...] = ()  # (first, last) steps that were gone back on and drew other noise then


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, in memory on the CPU."""

    path: Path
    state: TrainerState
    networks: dict[str, dict[str, Tensor]]  # generator, discriminator, ema: state dicts
    optimizers: dict[str, dict[str, Any]]  # generator, discriminator: Adam's state dicts, whole under ZeRO too


def checkpoints_dir(run_dir: Path) -> Path:
    """Directory that holds a run's checkpoints."""
    return run_dir / "checkpoints"


def save(
    run_dir: Path,
    state: TrainerState,
    networks: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Writes a checkpoint beside its place, syncs it to disk and renames it; a kill at any moment harms no other.

    Args:
        run_dir: the run.
        state: goes to trainer.json.
        networks: state dicts by name.
        optimizers: state dicts by network.

    Returns:
        The published directory.

    Raises:
        CheckpointError: when the disk is full or not writable; the unfinished files are removed.
    """
    target = checkpoints_dir(run_dir) / f"step-{state.step:08d}"
    publish(target, state, networks, optimizers)
    return target


def publish(
    target: Path,
    state: TrainerState,
    networks: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes the files of a step beside `target` and renames them there; see `save`."""
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in networks.items():
            plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            safetensors.torch.save_file(plain, partial / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            torch.save(dict(optimizer), partial / f"optimizer_{name[0]}.pt")
        (partial / "trainer.json").write_text(json.dumps(asdict(state), indent=1))
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": state.step, "sha256": files}))
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        partial.rename(target)
        _sync(target.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(_explain_failed_save(error, target)) from error


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint that is whole.

    A damaged one is moved aside to NAME.damaged and the one before is taken.

    Returns:
        Its path, or None, and one line for each damaged one that was passed over.
    """
    problems: list[str] = []
    for path in reversed(published(run_dir)):
        fault = find_fault(path)
        if fault is None:
            return path, problems
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        problems.append(f"checkpoint {path} is damaged ({fault}); moved to {aside.name}, the one before it is taken")
    return None, problems


def published(run_dir: Path) -> list[Path]:
    """Lists the published checkpoints, oldest first, unverified."""
    return steps_in(checkpoints_dir(run_dir))


def steps_in(directory: Path) -> list[Path]:
    """Lists what is published in a directory of steps, oldest first, unverified."""
    found = [path for path in directory.glob("step-*") if _NAME.search(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Returns the step in a checkpoint's name."""
    match = _NAME.search(path.name)
    assert match is not None, f"{path} is no checkpoint"
    return int(match.group(1))


def find_fault(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint (a missing file, a file of another hash), or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this code reads {FORMAT}"
        hashes: dict[str, str] = manifest["sha256"]
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read: {error}"
    for name, expected in hashes.items():
        if not (path / name).exists():
            return f"{name} is missing"
        if (actual := _sha256(path / name)) != expected:
            size = (path / name).stat().st_size
            return f"{name} ({size:,} bytes) has sha256 {actual[:12]}, the manifest says {expected[:12]}"
    return None


def hashes_of(path: Path) -> dict[str, str]:
    """Returns the sha256 of each file by name, as the manifest says; nothing when that cannot be read."""
    try:
        hashes = json.loads((path / "manifest.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(hashes)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; `newest` or `find_fault` has verified it."""
    entries = json.loads((path / "trainer.json").read_text())
    state = TrainerState(**entries | {"redrawn": tuple(map(tuple, entries.get("redrawn", ())))})
    networks = {
        name: safetensors.torch.load_file(path / f"{name}.safetensors")
        for name in ("generator", "discriminator", "ema")
    }
    optimizers = {
        name: torch.load(path / f"optimizer_{name[0]}.pt", map_location="cpu", weights_only=True)
        for name in ("generator", "discriminator")
    }
    return Checkpoint(path, state, networks, optimizers)


def prune(run_dir: Path, keep: int, best_step: int | None = None) -> list[Path]:
    """Removes all but the newest `keep` checkpoints, and what killed saves left behind; returns what was removed.

    Args:
        run_dir: the run.
        keep: how many stay.
        best_step: of the checkpoint that stays beside them, the best by FID.
    """
    removed = [path for path in published(run_dir)[:-keep] if step_of(path) != best_step]
    removed += [path for path in checkpoints_dir(run_dir).glob("step-*.partial")]
    for path in removed:
        remove(path)
    return removed


def remove(path: Path) -> None:
    """Removes a published or partial directory, so that a kill in between leaves no half under a published name."""
    doomed = path.with_name(path.name.removesuffix(".partial") + ".partial")
    if doomed != path:
        path.rename(doomed)
    shutil.rmtree(doomed)


def digests(networks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Returns the sha256 of every tensor as {"network.tensor": hex}, to compare replicas."""
    return {
        f"{network}.{key}": hashlib.sha256(_bytes(value)).hexdigest()
        for network, tensors in networks.items()
        for key, value in tensors.items()
    }


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _explain_failed_save(error: Exception, target: Path) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    why = "the disk is full" if full else str(error)
    mend = f"free space on {target.parent}" if full else f"check {target.parent}"
    return (
        f"checkpoint {target} could not be saved: {why}. Checkpoints already published are untouched; "
        f"{mend} and run the same command again to go on from the newest"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
