"""What training leaves for the evaluation: the averaged and the raw generator, apart from resumable checkpoints.

`RUN/snapshots/step-00010000/` holds ema.safetensors, generator.safetensors, trainer.json and, written last,
manifest.json. Published and verified as checkpoints are; pruning never touches them.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from pipeline import checkpoint
from pipeline.checkpoint import TrainerState


def snapshots_dir(run_dir: Path) -> Path:
    """Directory that holds a run's snapshots."""
    return run_dir / "snapshots"


def save(run_dir: Path, state: TrainerState, networks: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Publishes a snapshot, whole or not at all.

    A run that repeats steps makes the same one again, which leaves the first in its place; other weights replace it.

    Args:
        run_dir: the run.
        state: as in a checkpoint.
        networks: `ema` and `generator`, state dicts.

    Returns:
        The published directory.

    Raises:
        CheckpointError: when the disk is full or not writable.
    """
    target = snapshots_dir(run_dir) / f"step-{state.step:08d}"
    if target.exists():
        if checkpoint.find_fault(target) is None and _holds(target, networks["ema"]):
            return target
        checkpoint.remove(target)
    checkpoint.publish(target, state, networks, {})
    return target


def published(run_dir: Path) -> list[Path]:
    """Lists the published snapshots, oldest first, unverified."""
    return checkpoint.steps_in(snapshots_dir(run_dir))


def remove_after(run_dir: Path, step: int) -> None:
    """Removes the snapshots of later steps: training goes on from `step`, maybe by another way than it went before."""
    for path in published(run_dir):
        if checkpoint.step_of(path) > step:
            checkpoint.remove(path)


def _holds(path: Path, ema: Mapping[str, Tensor]) -> bool:
    before = safetensors.torch.load_file(path / "ema.safetensors")
    return before.keys() == ema.keys() and all(torch.equal(before[key], ema[key].cpu()) for key in before)
