"""Result files of evaluations: where they lie, what is in them, which step is the best.

`RUN/evaluations/step-00010000/KEY.json`, the key a hash of the weights and of all that determines their scores, so that
a result that is there need not be made again. Written whole or not at all; a result is never changed.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.shard_file import create_file

Result = dict[str, Any]


class ResultError(ValueError):
    """A result file that is damaged; the message names it and the way out."""


def directory(run_dir: Path) -> Path:
    """Where a run's results lie."""
    return run_dir / "evaluations"


def path_of(run_dir: Path, folder: str, weights_sha256: str, protocol: dict[str, Any]) -> Path:
    """Returns the one place of the result of some weights by a protocol.

    Args:
        run_dir: the run.
        folder: `step-00010000`, or `real`.
        weights_sha256: of what is scored.
        protocol: all else that determines the scores, plain values.
    """
    return directory(run_dir) / folder / f"{digest([weights_sha256, protocol])[:16]}.json"


def digest(value: Any) -> str:
    """Returns the sha256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(path: Path, result: Result) -> None:
    """Publishes a result; of two evaluators that finish together, the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    create_file(path, (json.dumps(result, indent=1) + "\n").encode())


def read(path: Path) -> Result:
    """Reads a result.

    Raises:
        ResultError: the file is damaged.
    """
    try:
        result = json.loads(path.read_text())
        if not isinstance(result["step"], int) or not ("scores" in result or "error" in result):
            raise ValueError("it has neither step nor scores")
    except (ValueError, KeyError, TypeError) as error:
        raise ResultError(f"{path} is no result file ({error}); remove it, and the evaluation is made again") from None
    return dict(result)


def published(run_dir: Path) -> list[Path]:
    """Lists the result files of a run's steps."""
    return sorted(directory(run_dir).glob("step-*/*.json"))


def fid_of(result: Result) -> float | None:
    """Returns the FID of a result by whatever name it goes; None when it has none."""
    return next((score for name, score in result.get("scores", {}).items() if name.startswith("fid")), None)


def is_of(result: Result, path: Path) -> bool:
    """Returns whether a result is of weights that a snapshot or checkpoint holds.

    It is not when the run went back after it was scored, and made other weights of the same step.
    """
    weights = result.get("provenance", {}).get("weights_sha256")
    return bool(result["step"] == checkpoint.step_of(path) and weights in checkpoint.hashes_of(path).values())


def best_step(run_dir: Path, paths: Iterable[Path]) -> int | None:
    """Returns the step of the lowest FID among those scored by one protocol, the one that scored the most steps.

    Of protocols that scored as many, the one of the most images counts.

    Args:
        run_dir: the run.
        paths: snapshots or checkpoints; only results of their weights count.

    Returns:
        The step; None without results.

    Raises:
        ResultError: a result file is damaged.
    """
    found, groups = list(paths), defaultdict[str, dict[int, tuple[float, int]]](dict)
    for result in map(read, published(run_dir)):
        fid = fid_of(result)
        if fid is not None and any(is_of(result, path) for path in found):
            groups[digest(result["protocol"])][result["step"]] = (fid, result["protocol"]["num_images"])
    if not groups:
        return None
    scored = max(groups.values(), key=lambda group: (len(group), max(entry[1] for entry in group.values())))
    return min(scored, key=lambda step: (scored[step], -step))
