"""What is scored: the generator of a snapshot or a checkpoint, chosen, verified and read; nothing is changed."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
from torch import Tensor

from pipeline import checkpoint, results, snapshots
from pipeline.config import Config, ConfigError, changed_hyperparameters
from pipeline.features import EvaluationError
from pipeline.manifest import ShardSet

_FILES = {"ema": "ema.safetensors", "raw": "generator.safetensors"}


class UnreadableSubjectError(EvaluationError):
    """A snapshot or checkpoint that is damaged, or was pruned since it was chosen."""


@dataclass(frozen=True)
class Subject:
    """A generator of a step, on the CPU."""

    path: Path  # of the snapshot or checkpoint
    step: int
    dataset_id: str  # that it was trained on
    manifest_sha256: str  # of its manifest, which holds the hashes of all its files
    weights: Literal["ema", "raw"]
    weights_sha256: str  # of its file
    tensors: dict[str, Tensor]


def candidates(run_dir: Path) -> list[Path]:
    """Lists what can be scored, oldest first: each step's snapshot, else its checkpoint, which may soon be pruned."""
    by_step = {checkpoint.step_of(path): path for path in checkpoint.published(run_dir)}
    by_step |= {checkpoint.step_of(path): path for path in snapshots.published(run_dir)}
    return [by_step[step] for step in sorted(by_step)]


def of_the_run(run_dir: Path, step: int, weights_sha256: str) -> bool | None:
    """Returns whether the snapshot and checkpoint of a step hold weights; None when there is neither any more."""
    of_step = [path for path in candidates(run_dir) if checkpoint.step_of(path) == step]
    return any(weights_sha256 in checkpoint.hashes_of(path).values() for path in of_step) if of_step else None


def is_given_up(run_dir: Path, chosen: Subject) -> bool:
    """Returns whether the run has gone back since these weights were read, and left them or made others instead."""
    is_snapshot = chosen.path.parent == snapshots.snapshots_dir(run_dir)  # these are never pruned
    held = of_the_run(run_dir, chosen.step, chosen.weights_sha256)
    return is_snapshot if held is None else not held


def choose(run_dir: Path, which: str, config: Config) -> list[Path]:
    """Returns what `--checkpoint` asks for, oldest first.

    Args:
        run_dir: the run.
        which: `newest` that is whole, `best` by FID so far, `all`, or a step.
        config: of the run.

    Raises:
        EvaluationError: there is nothing such.
    """
    found = candidates(run_dir)
    if not found:
        raise EvaluationError(f"{checkpoint.checkpoints_dir(run_dir)} holds no checkpoint yet. {_when(config)}")
    match which:
        case "all":
            return found
        case "newest":
            return [_newest_whole(found, config)]
        case "best":
            step = results.best_step(run_dir, found)
            if step is None:
                raise EvaluationError(
                    f"which checkpoint is the best is not known: {results.directory(run_dir)} holds no FID yet of the "
                    "snapshots and checkpoints there are. Score all first: --checkpoint all"
                )
        case _:
            step = int(which)
    of_step = [path for path in found if checkpoint.step_of(path) == step]
    if not of_step:
        steps = ", ".join(str(checkpoint.step_of(path)) for path in found)
        raise EvaluationError(f"{run_dir} holds no snapshot or checkpoint of step {step}; the steps there are {steps}")
    return of_step


def _newest_whole(found: list[Path], config: Config) -> Path:
    damaged = []
    for path in reversed(found):
        if (fault := checkpoint.find_fault(path)) is None:
            return path
        damaged.append(f"checkpoint {path} is damaged ({fault})")
        print(f"{damaged[-1]}; the one before it is evaluated", file=sys.stderr)
    raise EvaluationError(f"{'; '.join(damaged)}. {_when(config)}")


def _when(config: Config) -> str:
    return (
        f"Training saves one every {config.train.checkpoint_every_steps} steps (train.checkpoint_every_steps), at its "
        f"end, and when it is stopped by SIGTERM; and a snapshot every {config.evaluation.every_steps} steps "
        "(evaluation.every_steps)"
    )


def read(path: Path, config: Config, shard_set: ShardSet) -> Subject:
    """Reads a generator and checks that it is the run's and was trained on the set.

    Raises:
        UnreadableSubjectError: it is damaged or gone.
        ConfigError: it was made with another configuration or data set than the one given.
    """
    name = _FILES[config.evaluation.weights]
    try:
        manifest, data = (path / "manifest.json").read_bytes(), (path / name).read_bytes()
        state = json.loads((path / "trainer.json").read_text())
        expected = json.loads(manifest)["sha256"][name]
        weights_sha256 = hashlib.sha256(data).hexdigest()
        if weights_sha256 != expected:
            raise UnreadableSubjectError(
                f"{path} is damaged: {name} ({len(data):,} bytes) has sha256 {weights_sha256[:12]}, its manifest says "
                f"{expected[:12]}; score another step"
            )
    except FileNotFoundError as error:
        raise UnreadableSubjectError(f"{path} was removed before it could be scored ({error.filename})") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise UnreadableSubjectError(f"{path} is damaged ({error}); score another step") from error
    # What else was changed on the way (run.accept_changes) says nothing of how samples are made.
    if changed := [line for line in changed_hyperparameters(state["config"], config) if line.startswith("model.")]:
        lines = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(f"{path} holds another network than the run's config.yaml says:\n{lines}")
    if shard_set.dataset_id != state["dataset_id"]:
        raise ConfigError(
            f"data.shards={config.data.shards} is data set {shard_set.dataset_id[:12]}, but {path} was trained on "
            f"{state['dataset_id'][:12]}; the reference of FID is the training set: say where it is with "
            "data.shards=DIR"
        )
    tensors, digest = safetensors.torch.load(data), hashlib.sha256(manifest).hexdigest()
    return Subject(path, state["step"], state["dataset_id"], digest, config.evaluation.weights, weights_sha256, tensors)
