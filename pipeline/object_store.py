"""The one door to the bytes of a shard set: a set lives at a *location* and its files go by name.

A location is a directory, or s3://bucket/prefix (`pipeline.s3_store` tells how to say which store).
Failures are the built-in `OSError` kinds (`FileNotFoundError`, `PermissionError`, ...); each message names the file.
A location that cannot be one is a `LocationError`. What is given `counts` adds its cost to them.
"""

import hashlib
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from pipeline import s3, s3_store
from pipeline.read_counts import ReadCounts
from pipeline.s3_store import LocationError as LocationError

_PIECE_BYTES = 262_144


def is_remote(location: str) -> bool:
    """Whether a location is in object storage."""
    return location.startswith(s3_store.SCHEME)


def join(location: str, name: str) -> str:
    """Full address of the file `name` of a set, for messages."""
    if is_remote(location):
        return s3_store.parse(location).address(name)
    return str(_directory(location) / name)


def read_bytes(location: str, name: str) -> bytes:
    """Whole content of one file."""
    if is_remote(location):
        return s3.read(location, name, 0, None, ReadCounts())
    with _open(location, name) as file:
        return file.read()


def read_range(location: str, name: str, start: int, stop: int, counts: ReadCounts | None = None) -> bytes:
    """Bytes [start, stop) of one file; fewer than asked for is an `OSError`, never a short answer."""
    return read_ranges(location, name, [(start, stop)], counts)[0]


def read_ranges(
    location: str, name: str, ranges: Iterable[tuple[int, int]], counts: ReadCounts | None = None
) -> list[bytes]:
    """Several byte ranges [start, stop) of one file, each as `read_range`; one opening of a local file."""
    counts = counts or ReadCounts()
    if is_remote(location):
        return [s3.read(location, name, start, stop, counts) for start, stop in ranges]
    with _open(location, name) as file:
        found = [_read_exactly(file, start, stop) for start, stop in ranges]
    counts.bytes_read += sum(map(len, found))
    return found


def read_ranges_into(
    location: str, name: str, ranges: Iterable[tuple[int, int]], buffers: Iterable[memoryview], counts: ReadCounts
) -> None:
    """Several byte ranges of one file of a local set, each into a buffer of its length."""
    with _open(location, name) as file:
        for (start, stop), buffer in zip(ranges, buffers, strict=True):
            position = start
            while position < stop:
                length = os.preadv(file.fileno(), [buffer[position - start :]], position)
                if not length:
                    raise _ends_early(file, start, stop, position - start)
                position += length
            counts.bytes_read += stop - start


def sha256_of_range(location: str, name: str, start: int, stop: int, counts: ReadCounts | None = None) -> str:
    """sha256 of bytes [start, stop) of one file, hexadecimal; fewer bytes than that are an error as in `read_range`."""
    if is_remote(location):
        return hashlib.sha256(read_range(location, name, start, stop, counts)).hexdigest()
    # In pieces that stay in the processor's cache, in memory that is not new each time: half of the time of one read.
    found, piece = hashlib.sha256(), memoryview(bytearray(min(_PIECE_BYTES, stop - start)))
    position = start
    with _open(location, name) as file:
        while position < stop:
            length = os.preadv(file.fileno(), [piece[: stop - position]], position)
            if not length:
                raise _ends_early(file, start, stop, position - start)
            found.update(piece[:length])
            position += length
    if counts:
        counts.bytes_read += stop - start
    return found.hexdigest()


def exists(location: str, name: str) -> bool:
    """Whether the set has a file of this name; a bucket that is missing or closed to us is an error."""
    if is_remote(location):
        return s3.find(location, name, ReadCounts()) is not None
    return (_directory(location) / name).is_file()


def size(location: str, name: str) -> int:
    """Length of one file in bytes."""
    return size_and_version(location, name)[0]


def size_and_version(location: str, name: str) -> tuple[int, str]:
    """Length of one file in bytes, and a text that is another once the file was replaced."""
    if is_remote(location):
        found = s3.find(location, name, ReadCounts())
        if found is None:
            raise FileNotFoundError(f"{join(location, name)}: not found; check the prefix, or upload the set again")
        return found.size, found.etag
    with _open(location, name) as file:
        stat = os.fstat(file.fileno())
        return stat.st_size, str(stat.st_mtime_ns)


def list_names(location: str) -> list[str]:
    """Names of the files directly at `location`, sorted."""
    if is_remote(location):
        return s3.list_names(location, ReadCounts())
    try:
        return sorted(path.name for path in _directory(location).iterdir() if path.is_file())
    except OSError as error:
        raise _readable(error, location) from error


def _directory(location: str) -> Path:
    if "://" in location:
        raise LocationError(f"{location}: expected a directory or s3://bucket/prefix; copy the set to one of them")
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
            raise _ends_early(file, start, stop, len(data))
        data += more
    return data


def _ends_early(file: FileIO, start: int, stop: int, got: int) -> OSError:
    return OSError(
        f"{file.name}: expected {stop - start} bytes at [{start}, {stop}), got {got}: "
        f"the file ends at byte {os.fstat(file.fileno()).st_size}"
    )


def _readable(error: OSError, address: str) -> OSError:
    """The same kind of error with address and way out in its message."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{address}: not found; check the location, or build or copy the set again")
    return type(error)(f"{address}: {error.strerror}")
