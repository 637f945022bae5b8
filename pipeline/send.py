"""Sends one file of a set to object storage, once."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline import object_store, s3
from pipeline.manifest import ShardSetError
from pipeline.read_counts import ReadCounts


@dataclass(frozen=True)
class File:
    """A file of a set."""

    name: str
    size: int  # bytes
    sha256: str


def send(file: File, directory: Path, location: str, advance: Callable[[int], None]) -> bool:
    """Sends one file of a set unless it is there and equal; returns whether it was sent.

    Args:
        file: What the file should be.
        directory: Where it lies.
        location: s3://bucket/prefix, where it goes to.
        advance: Is called with the bytes just sent or found there, also in other threads.

    Raises:
        ShardSetError: The file is not what it should be.
        OSError: The store does not take it.
    """
    if is_there(location, file):
        advance(file.size)
        return False
    path = directory / file.name
    with open(path, "rb") as content:
        got = hashlib.file_digest(content, "sha256").hexdigest()
    if got != file.sha256:
        raise ShardSetError(
            f"{path} is damaged: expected sha256 {file.sha256}, got {got}; "
            f"`python launch/shards.py verify {directory}` lists all that is wrong with the set"
        )
    s3.upload(location, file.name, path, file.sha256, advance)
    if not is_there(location, file):
        raise OSError(f"{object_store.join(location, file.name)}: was sent, but is not there; send it again")
    return True


def is_there(location: str, file: File) -> bool:
    """Whether object storage holds this very file: its size, and its sha256 in the metadata."""
    found = s3.find(location, file.name, ReadCounts())
    return found is not None and (found.size, found.metadata.get("sha256")) == (file.size, file.sha256)
