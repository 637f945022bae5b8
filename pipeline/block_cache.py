"""Blocks of remote sets on the local disk, shared by all processes of a node.

A block's file is named by the sha256 of its bytes, so blocks of different sets cannot be mistaken for each other, and
equal ones are kept once. All locks are flock(2) on open files: the kernel gives them back when a process dies, however
it dies, and their files mean nothing by being there.

- `fetch-00` ... `fetch-ff`: held while a block whose sha256 begins so is fetched, so that a node fetches it once.
- `total`: held while files come or go. Holds an upper bound of the bytes of all blocks: it is raised before a file
  comes and lowered after one has gone, so a kill in between makes it too high, which the next clearing mends.
- `new.part`: a block being written, under the lock of `total`; one that a kill left is overwritten by the next.
- A block's own file is locked (shared) while it is read, and what is locked is not evicted.

No block is trusted for being here: readers hash what they read.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

_HEX_SHA256 = 64


@dataclass(frozen=True)
class BlockCache:
    """Where blocks are kept and how many bytes of them; all processes with the same directory share it."""

    directory: str | None = None  # None: sagan-blocks-UID in the directory for temporary files
    max_bytes: int = 50_000_000_000

    @property
    def path(self) -> Path:
        """The directory."""
        if self.directory is None:
            return Path(tempfile.gettempdir()) / f"sagan-blocks-{os.getuid()}"
        return Path(self.directory).expanduser()

    @contextlib.contextmanager
    def open(self, sha256: str) -> Iterator[FileIO | None]:
        """The file of a block, not to be evicted until it is closed; None if it is not here."""
        try:
            file = FileIO(self.path / sha256)
        except FileNotFoundError:
            yield None
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(file.fileno())  # used now: the least recently used go first
            yield file

    def holds(self, sha256: str) -> bool:
        """Whether a block is here now."""
        return (self.path / sha256).exists()

    @contextlib.contextmanager
    def fetching(self, sha256: str) -> Iterator[None]:
        """Waits until no other process fetches this block, and keeps them from it."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.path / f"fetch-{sha256[:2]}", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def add(self, sha256: str, data: bytes) -> None:
        """Keeps a verified block, unless it is larger than the cache or all that is here is being read.

        Raises:
            OSError: The disk is full before `max_bytes` are reached.
        """
        if len(data) > self.max_bytes:
            return
        with self._total() as total_file:
            total = self._read_total(total_file)
            if total + len(data) > self.max_bytes:
                total = self._clear(self.max_bytes - len(data))
                _write_total(total_file, total)
            if total + len(data) > self.max_bytes:
                return
            _write_total(total_file, total + len(data))
            part = self.path / "new.part"
            try:
                part.write_bytes(data)
                os.replace(part, self.path / sha256)
            except OSError as error:
                part.unlink(missing_ok=True)
                raise OSError(
                    f"block cache {self.path}: {error.strerror} at {total:,} of data.cache_bytes={self.max_bytes} "
                    "bytes; give it less (data.cache_bytes) or another disk (data.cache_dir)"
                ) from error

    def discard(self, sha256: str) -> None:
        """Throws a block away."""
        with self._total() as total_file, contextlib.suppress(FileNotFoundError):
            path = self.path / sha256
            size = path.stat().st_size
            path.unlink()
            _write_total(total_file, max(self._read_total(total_file) - size, 0))

    @contextlib.contextmanager
    def _total(self) -> Iterator[FileIO]:
        with FileIO(os.open(self.path / "total", os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _read_total(self, file: FileIO) -> int:
        text = os.pread(file.fileno(), 32, 0)
        return int(text) if text.strip().isdigit() else sum(size for _, size, _ in self._blocks())

    def _clear(self, target: int) -> int:
        """Evicts blocks until at most 7/8 of `target` bytes are left, so that this comes seldom; returns the bytes."""
        blocks = sorted(self._blocks())
        total = sum(size for _, size, _ in blocks)
        for _, size, path in blocks:
            if total <= target * 7 // 8:
                break
            with FileIO(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # being read
                    continue
                path.unlink()
                total -= size
        return total

    def _blocks(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every block; nothing comes or goes under the lock of `total`."""
        for entry in os.scandir(self.path):
            if len(entry.name) == _HEX_SHA256:
                stat = entry.stat()
                yield stat.st_mtime_ns, stat.st_size, Path(entry.path)


def _write_total(file: FileIO, total: int) -> None:
    os.pwrite(file.fileno(), f"{total:<20}\n".encode(), 0)
