"""Where a run's numbers go: a journal of JSON lines in the run directory, written by rank 0."""

import json
import time
from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    """What the trainer tells; a tracker that does nothing stands in on the other ranks."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Records numbers of one step."""

    def close(self) -> None:
        """Ends the record."""


class NullTracker:
    """Tells nobody."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Journal:
    """Appends metrics to RUN/journal.jsonl, each (step) once through all restarts.

    A step that a resumed run repeats is already there and is not written again; a line that a kill cut short is
    removed.

    Args:
        path: the journal file; made when absent.
    """

    def __init__(self, path: Path):
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        steps = [json.loads(line)["step"] for line in whole.splitlines()]
        self._last_step = max(steps, default=-1)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line unless this step was recorded before."""
        if step <= self._last_step:
            return
        self._last_step = step
        line = json.dumps({"step": step, "time_seconds": time.time(), "metrics": metrics})
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
