"""Copies a local shard set to object storage; the manifest goes last, so that a half copied set is none."""

import hashlib
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from pipeline import object_store, s3
from pipeline.bar import Bar
from pipeline.manifest import INDEX_NAME, MANIFEST_NAME, ShardSet, ShardSetError, open_shard_set
from pipeline.read_counts import ReadCounts


@dataclass(frozen=True)
class UploadReport:
    """What an upload did."""

    shard_set: ShardSet
    sent_files: int
    sent_bytes: int
    kept_files: int  # were there and equal
    seconds: float


def upload(source: Path, location: str, workers: int = 8) -> UploadReport:
    """Copies a set; what is there and equal (size, and sha256 in its metadata) is kept.

    Args:
        source: Directory of a finished set.
        location: s3://bucket/prefix, empty or with a part or the whole of this set.
        workers: Files sent at once.

    Raises:
        ShardSetError: The source is no finished set or damaged, or another set is at `location`.
        OSError: The store does not take it.
    """
    if not object_store.is_remote(location):
        raise ShardSetError(f"{location} is not in object storage; expected s3://bucket/prefix")
    shard_set = open_shard_set(str(source))
    if shard_set.shards_location != shard_set.location:
        raise ShardSetError(
            f"the shards of {source} lie in {shard_set.shards_location}; copy them to {location} with any tool, then "
            f"run `python launch/shards.py index {location}`"
        )
    manifest = shard_set.manifest
    _check_destination(shard_set, location)
    files = [_File(shard.name, shard.bytes, shard.sha256) for shard in manifest.shards]
    index_bytes = (source / INDEX_NAME).stat().st_size
    files.append(_File(INDEX_NAME, index_bytes, manifest.index_sha256))
    last = _File(MANIFEST_NAME, (source / MANIFEST_NAME).stat().st_size, shard_set.dataset_id)

    begin = time.monotonic()
    with Bar(sum(file.size for file in [*files, last]), "uploading", "B", in_bytes=True) as bar:
        copy = _Copy(source, location, bar)
        pool = ThreadPoolExecutor(workers)
        try:
            sending = [pool.submit(copy.bring, file) for file in files]
            wait(sending, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)  # finishes the files under way: a restart finds them
        sent = [future.result() for future in sending if not future.cancelled()]
        sent.append(copy.bring(last))
    sizes = [file.size for file, was_sent in zip([*files, last], sent, strict=True) if was_sent]
    return UploadReport(shard_set, len(sizes), sum(sizes), len(sent) - len(sizes), time.monotonic() - begin)


@dataclass(frozen=True)
class _File:
    name: str
    size: int
    sha256: str


class _Copy:
    """One copy under way, by several threads."""

    def __init__(self, source: Path, location: str, bar: Bar) -> None:
        self._source, self._location, self._bar = source, location, bar
        self._bar_lock = threading.Lock()

    def bring(self, file: _File) -> bool:
        """Sends one file unless it is there; returns whether it was sent."""
        if self._is_there(file):
            self._advance(file.size)
            return False
        path = self._source / file.name
        with open(path, "rb") as content:
            got = hashlib.file_digest(content, "sha256").hexdigest()
        if got != file.sha256:
            raise ShardSetError(
                f"{path} is damaged: expected sha256 {file.sha256}, got {got}; "
                f"`python launch/shards.py verify {self._source}` lists all that is wrong with the set"
            )
        s3.upload(self._location, file.name, path, file.sha256, self._advance)
        if not self._is_there(file):
            raise OSError(f"{object_store.join(self._location, file.name)}: was sent, but is not there; send it again")
        return True

    def _is_there(self, file: _File) -> bool:
        found = s3.find(self._location, file.name, ReadCounts())
        return found is not None and (found.size, found.metadata.get("sha256")) == (file.size, file.sha256)

    def _advance(self, num_bytes: int) -> None:
        with self._bar_lock:
            self._bar.update(num_bytes)


def _check_destination(shard_set: ShardSet, location: str) -> None:
    """Refuses to write over another set: a reader that has it open would find its blocks replaced."""
    if not object_store.exists(location, MANIFEST_NAME):
        return
    there = hashlib.sha256(object_store.read_bytes(location, MANIFEST_NAME)).hexdigest()
    if there != shard_set.dataset_id:
        raise ShardSetError(
            f"{location} holds another set (dataset id {there[:12]}, that of {shard_set.location} is "
            f"{shard_set.dataset_id[:12]}); choose another prefix, or remove what is there"
        )
