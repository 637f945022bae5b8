"""The one door to the bytes of a shard set: a set lives at a *location* (a directory) and its files go by name.

Failures are the built-in `OSError` kinds (`FileNotFoundError`, `PermissionError`, ...); each message names the file.
"""

import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path


def join(location: str, name: str) -> str:
    """Full address of the file `name` of a set, for messages and for tools that take one address."""
    return str(_directory(location) / name)


def read_bytes(location: str, name: str) -> bytes:
    """Whole content of one file."""
    with _open(location, name) as file:
        return file.read()


def read_range(location: str, name: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of one file; fewer than asked for is an `OSError`, never a short answer."""
    return read_ranges(location, name, [(start, stop)])[0]


def read_ranges(location: str, name: str, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
    """Several byte ranges [start, stop) of one file, each as `read_range`, for one opening of the file."""
    with _open(location, name) as file:
        return [_read_exactly(file, start, stop) for start, stop in ranges]


def exists(location: str, name: str) -> bool:
    """Whether the set has a file of this name."""
    return (_directory(location) / name).is_file()


def size(location: str, name: str) -> int:
    """Length of one file in bytes."""
    with _open(location, name) as file:
        return os.fstat(file.fileno()).st_size


def list_names(location: str) -> list[str]:
    """Names of the files directly at `location`, sorted."""
    try:
        return sorted(path.name for path in _directory(location).iterdir() if path.is_file())
    except OSError as error:
        raise _readable(error, location) from error


def _directory(location: str) -> Path:
    if "://" in location:
        raise ValueError(f"{location}: only local directories can be read so far; copy the set to one")
    return Path(location)


def _open(location: str, name: str) -> FileIO:
    try:
        return FileIO(_directory(location) / name)
    except OSError as error:
        raise _readable(error, join(location, name)) from error


def _read_exactly(file: FileIO, start: int, stop: int) -> bytes:
    assert 0 <= start <= stop, (start, stop)
    data = os.pread(file.fileno(), stop - start, start)
    while len(data) < stop - start:  # a read may be short without being the last one
        more = os.pread(file.fileno(), stop - start - len(data), start + len(data))
        if not more:
            raise OSError(
                f"{file.name}: expected {stop - start} bytes at [{start}, {stop}), got {len(data)}: "
                f"the file ends at byte {os.fstat(file.fileno()).st_size}"
            )
        data += more
    return data


def _readable(error: OSError, address: str) -> OSError:
    """The same kind of error with address and way out in its message."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{address}: not found; check the location, or build or copy the set again")
    return type(error)(f"{address}: {error.strerror}")
