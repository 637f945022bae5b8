"""Scores a run's snapshots while its training leaves them."""

import hashlib
import time
from pathlib import Path

from pipeline import checkpoint, snapshots
from pipeline.config import Config, ConfigError, load_config
from pipeline.evaluation import Evaluator
from pipeline.feature_pass import on_rank_0

POLL_SECONDS = 10.0  # between looks for a new snapshot


def watch(run_dir: Path, config: Config, until_step: int | None = None) -> int:
    """Scores each snapshot as training leaves it, oldest first; called on every rank.

    Ends when the training is done and all its snapshots are scored, or after one of `until_step` or later.

    Returns:
        Exit status: 1 if some could not be scored.
    """
    evaluator = Evaluator(run_dir, config)
    evaluator.prepare()
    seen: set[str] = set()
    num_failed = 0
    while True:
        path, is_over = on_rank_0(evaluator.world, lambda: _next_snapshot(run_dir, seen, until_step))
        if path is not None:
            num_failed += not evaluator.try_to_score(path)
        elif is_over:
            break
        else:
            time.sleep(POLL_SECONDS)
    evaluator.world.shutdown()
    return int(num_failed > 0)


def _next_snapshot(run_dir: Path, seen: set[str], until_step: int | None) -> tuple[Path | None, bool]:
    """Returns the oldest snapshot that was not seen yet, and whether no more will come or is wanted."""
    is_over = _is_done(run_dir)  # asked first: a snapshot that comes in between is found below
    found = [
        path for path in snapshots.published(run_dir) if until_step is None or checkpoint.step_of(path) <= until_step
    ]
    for path in found:
        try:
            # By content: after a rollback other weights may take a step's place.
            key = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
        except FileNotFoundError:
            continue  # being replaced just now
        if key not in seen:
            seen.add(key)
            return path, False
    last = max((checkpoint.step_of(path) for path in snapshots.published(run_dir)), default=-1)
    return None, is_over or (until_step is not None and last >= until_step)


def _is_done(run_dir: Path) -> bool:
    """Returns whether training has done all the steps of its configuration, which may have been raised since."""
    try:
        done = int((run_dir / "DONE").read_text())
        return done >= load_config(run_dir / "config.yaml").train.steps
    except (FileNotFoundError, ValueError, ConfigError):  # one of them is being written
        return False
