"""Append-only JSON lines in the run directory: what happened, each thing once through all restarts.

A journal has one writer at a time and any number of readers. Each line is one record with `time_seconds` (Unix time)
and any of `step`, `metrics`, `files`, `images`, `models`, `tags`, `params`, `dataset`, `config`, `run_key`, `status`.
NaN and Infinity are written as Python's json writes them.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Record = dict[str, Any]

PATHS = ("files", "images", "models")  # parts of a record that map paths to what becomes of them


class JournalError(ValueError):
    """A journal that cannot be read; the message names the file and the way out."""


class Journal:
    """Appends records; a (metric, step) or (file, step) that a resumed run repeats is not written again.

    A line that a kill cut short is removed. Every record is on the disk when its call returns.

    Args:
        path: the journal file; made when absent.

    Raises:
        JournalError: the file holds a line that is no record.
    """

    def __init__(self, path: Path):
        self.path = path
        self.starts: list[Record] = []  # one record for each time a training began or went on
        self._last_steps: dict[str, int] = {}  # by metric or file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        records, end = read_records(path)
        for record in records:
            self._remember(record)
        self._file = path.open("ab")
        self._file.truncate(end)

    def log(
        self,
        step: int,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        images: Mapping[str, str] | None = None,
        models: Mapping[str, str] | None = None,
    ) -> None:
        """Appends what is new at this step; nothing when nothing is.

        Args:
            step: generator updates done.
            metrics: by name, such as `train/d_loss`.
            files: path of a file, relative to the run directory or absolute -> folder among the run's artifacts.
            tags: set on the run; always appended.
            images: path of a PNG, as in `files` -> name of the series of pictures that it continues.
            models: path of an exported generator's folder, as in `files` -> the name it is registered by.
        """
        new_metrics = {name: float(value) for name, value in (metrics or {}).items() if self._is_new(name, step)}
        parts: dict[str, dict[str, Any]] = {"metrics": new_metrics, "tags": dict(tags or {})}
        for part, paths in zip(PATHS, (files, images, models), strict=True):
            parts[part] = {path: value for path, value in (paths or {}).items() if self._is_new(path, step)}
        if any(parts.values()):
            self.append({"step": step} | {key: part for key, part in parts.items() if part})

    def append(self, record: Record) -> None:
        """Appends one record, with the time."""
        stamped = {"time_seconds": round(time.time(), 3)} | record
        self._file.write(json.dumps(stamped).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._remember(stamped)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def next_step(self, name: str) -> int:
        """Returns the step after the last one recorded under `name`, 0 when there is none."""
        return self._last_steps.get(name, -1) + 1

    def _is_new(self, name: str, step: int) -> bool:
        return step >= self.next_step(name)

    def _remember(self, record: Record) -> None:
        for name in [name for part in ("metrics", *PATHS) for name in record.get(part, ())]:
            self._last_steps[name] = max(record["step"], self._last_steps.get(name, -1))
        if "config" in record:
            self.starts.append(record)


def read_records(path: Path, start: int = 0, max_bytes: int | None = None) -> tuple[list[Record], int]:
    """Reads whole records; what a writer has only half written is left for the next call.

    Args:
        path: the journal file.
        start: byte to begin at, the beginning of a line.
        max_bytes: about how much to read; None reads to the end.

    Returns:
        The records and the byte after the last of them.

    Raises:
        JournalError: a line is no record.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(-1 if max_bytes is None else max_bytes)
        if max_bytes is not None and len(data) == max_bytes:
            data += file.readline()
    whole = data[: data.rfind(b"\n") + 1]
    return _parse(whole, path), start + len(whole)


def _parse(data: bytes, path: Path) -> list[Record]:
    records = []
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            shown = line[:60].decode(errors="replace")
            raise JournalError(f"{path} holds a damaged line that begins {shown!r}; take it out and start again")
        records.append(record)
    return records
