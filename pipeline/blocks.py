"""Verified bytes of samples: every block is hashed before the first of its samples is used in an epoch.

Samples of a local set are read where they lie. Blocks of a remote set are fetched whole, once per node, and kept in a
cache on the local disk.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from io import FileIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline import object_store
from pipeline.block_cache import BlockCache
from pipeline.fetcher import Fetcher
from pipeline.manifest import ShardSet, ShardSetError
from pipeline.order import Int64
from pipeline.read_counts import ReadCounts

MAX_FETCHES = 4  # of a block whose bytes are wrong


class _Piece(NamedTuple):
    """What is wanted of one block."""

    block: int
    rows: Int64  # of the request
    ranges: list[tuple[int, int]]  # bytes of the shard that hold their images
    is_verified: bool  # in this epoch


class Blocks:
    """Reads encoded images of a set; hand one object to all worker processes, so that they share what is verified.

    Args:
        shard_set: The opened set.
        cache: Where blocks of a remote set are kept; None: the directory and size that `BlockCache` has by itself.
    """

    def __init__(self, shard_set: ShardSet, cache: BlockCache | None = None) -> None:
        self._set_location = shard_set.location
        self._location = shard_set.shards_location
        self._index = shard_set.index
        self._shard_names = [shard.name for shard in shard_set.manifest.shards]
        self._cache = (cache or BlockCache()) if object_store.is_remote(self._location) else None
        self._ahead: frozenset[int] = frozenset()
        # In shared memory. Two workers that verify a block at once only do it twice.
        self._verified_in_epoch = torch.full((self._index.num_blocks,), -1)
        self._verified_in_epoch.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def read(
        self, sample_ids: Int64, epoch: int, share: float = 0.0, into: npt.NDArray[np.uint8] | None = None
    ) -> tuple[list[bytes | None], ReadCounts]:
        """Reads the encoded images of some samples.

        Args:
            sample_ids: (n,) in any order.
            epoch: A block is verified once in each epoch.
            share: Where in its list of blocks to begin, in [0, 1): workers that begin apart do not verify the same.
            into: (n, bytes) rows for images that need no decoding; those of local sets that fit are read into them.

        Returns:
            The n images in the order of `sample_ids`, None for those in `into`; and what reading them cost.

        Raises:
            ShardSetError: A missing, cut or damaged shard; names shard, block, what was expected and what was found.
        """
        counts = ReadCounts() if self._cache is None else self._fetcher.finished()
        images: list[bytes | None] = [None] * len(sample_ids)

        def keep(piece: _Piece, found: Sequence[bytes | None]) -> None:
            self._verified_in_epoch[piece.block] = epoch
            for row, image in zip(piece.rows, found, strict=True):
                images[row] = image

        pieces = self._pieces(sample_ids, epoch)
        first, missing = int(share * len(pieces)), []
        for piece in pieces[first:] + pieces[:first]:
            found = self._read_local(piece, counts, into) if self._cache is None else self._read_cached(piece, counts)
            if found is None:
                self._fetcher.start(piece.block)  # all that are missing come at once
                missing.append(piece)
            else:
                counts.cache_hits += self._cache is not None
                keep(piece, found)
        for piece in missing:
            counts += self._fetcher.wait(piece.block)
            counts.cache_misses += 1
            keep(piece, self._read_missing(piece, counts))
        return images, counts

    def fetch_ahead(self, blocks: frozenset[int]) -> None:
        """Begins to bring blocks of a remote set into the cache, in threads, as they will be read soon.

        What goes wrong is raised by the `read` that needs the block.
        """
        if self._cache is None:
            return
        for block in sorted(blocks - self._ahead):
            self._fetcher.start(block)
        self._ahead = blocks

    def where(self, sample_id: int) -> str:
        """Shard and byte range of one sample, for messages."""
        index = self._index
        start, size = int(index.sample_offset[sample_id]), int(index.sample_size[sample_id])
        address = object_store.join(self._location, self._shard_names[index.sample_shard[sample_id]])
        return f"{address}: sample {sample_id} (bytes {start} to {start + size})"

    def _pieces(self, sample_ids: Int64, epoch: int) -> list[_Piece]:
        index, pieces = self._index, []
        block_of = np.searchsorted(index.block_first_sample, sample_ids, side="right") - 1
        for block in np.unique(block_of).tolist():
            rows = np.flatnonzero(block_of == block)
            starts = index.sample_offset[sample_ids[rows]]
            stops = starts + index.sample_size[sample_ids[rows]]
            ranges = list(zip(starts.tolist(), stops.tolist(), strict=True))
            pieces.append(_Piece(block, rows, ranges, bool(self._verified_in_epoch[block] >= epoch)))
        return pieces

    def _read_local(
        self, piece: _Piece, counts: ReadCounts, into: npt.NDArray[np.uint8] | None
    ) -> Sequence[bytes | None]:
        name = self._shard_name(piece.block)
        try:
            if not piece.is_verified:
                start, stop = int(self._index.block_start[piece.block]), int(self._index.block_stop[piece.block])
                got = object_store.sha256_of_range(self._location, name, start, stop, counts)
                counts.blocks_verified += 1
                if got != self._sha256(piece.block):
                    raise self._error(piece.block, self._damage(piece.block, got))
            if into is not None and all(stop - start == into.shape[1] for start, stop in piece.ranges):
                rows = [into[row].data for row in piece.rows]
                object_store.read_ranges_into(self._location, name, piece.ranges, rows, counts)
                return [None] * len(rows)
            return object_store.read_ranges(self._location, name, piece.ranges, counts)
        except OSError as error:
            raise self._error(piece.block, f"cannot be read: {error}") from error

    def _read_cached(self, piece: _Piece, counts: ReadCounts) -> list[bytes] | None:
        """Images of a block in the cache; None if it is not there, or was damaged there and thrown away."""
        assert self._cache is not None
        block, sha256, begin = piece.block, self._sha256(piece.block), int(self._index.block_start[piece.block])
        with self._cache.open(sha256) as file:
            if file is None:
                return None
            if piece.is_verified:
                found = [os.pread(file.fileno(), stop - start, start - begin) for start, stop in piece.ranges]
                counts.bytes_read += sum(map(len, found))
                if all(len(data) == stop - start for data, (start, stop) in zip(found, piece.ranges, strict=True)):
                    return found
                fault: str | None = "was cut short"
            else:
                data = _whole(file)
                counts.bytes_read += len(data)
                fault = self._fault(block, data, counts)
            if not fault:
                return _cut(data, piece.ranges, begin)
        counts.bad_blocks += 1
        self._cache.discard(sha256)
        return None

    def _read_missing(self, piece: _Piece, counts: ReadCounts) -> list[bytes]:
        """Images of a block that was just brought into the cache."""
        found = self._read_cached(piece, counts)
        if found is None:  # the cache is too small to keep it for so long
            data = self._fetch(piece.block, counts)
            found = _cut(data, piece.ranges, int(self._index.block_start[piece.block]))
        return found

    @cached_property
    def _fetcher(self) -> Fetcher:
        """Made in the process that uses it: threads do not survive a fork."""
        return Fetcher(self._bring)

    def _bring(self, block: int, counts: ReadCounts) -> None:
        """Fetches a block into the cache unless it is there; one process of the node does, the others wait for it."""
        assert self._cache is not None
        sha256 = self._sha256(block)
        try:
            if self._cache.holds(sha256):
                return
            with self._cache.fetching(sha256):
                if not self._cache.holds(sha256):
                    self._cache.add(sha256, self._fetch(block, counts))
        except OSError as error:
            raise self._error(block, f"cannot be read: {error}") from error

    def _fetch(self, block: int, counts: ReadCounts) -> bytes:
        """The right bytes of a block from the store, which sends them anew if they are wrong."""
        for _ in range(MAX_FETCHES):
            data = self._load(block, counts)
            counts.blocks_fetched += 1
            fault = self._fault(block, data, counts)
            if not fault:
                return data
            counts.bad_blocks += 1
        raise self._error(block, f"{fault}, {MAX_FETCHES} times in a row")

    def _load(self, block: int, counts: ReadCounts) -> bytes:
        start, stop = int(self._index.block_start[block]), int(self._index.block_stop[block])
        try:
            return object_store.read_range(self._location, self._shard_name(block), start, stop, counts)
        except OSError as error:
            raise self._error(block, f"cannot be read: {error}") from error

    def _fault(self, block: int, data: bytes, counts: ReadCounts) -> str | None:
        counts.blocks_verified += 1
        got = hashlib.sha256(data).hexdigest()
        return None if got == self._sha256(block) else self._damage(block, got)

    def _damage(self, block: int, got: str) -> str:
        return f"is damaged: expected sha256 {self._sha256(block)}, got {got}"

    def _sha256(self, block: int) -> str:
        sha256: bytes = self._index.block_sha256[block].tobytes()
        return sha256.hex()

    def _shard_name(self, block: int) -> str:
        return self._shard_names[int(self._index.block_shard[block])]

    def _error(self, block: int, fault: str) -> ShardSetError:
        index = self._index
        return ShardSetError(
            f"{object_store.join(self._location, self._shard_name(block))}: block {block} "
            f"(bytes {index.block_start[block]} to {index.block_stop[block]}, samples "
            f"{index.block_first_sample[block]} to {index.block_first_sample[block + 1] - 1}) {fault}; "
            f"`python launch/shards.py verify {self._set_location}` lists all that is wrong with the set"
        )


def _whole(file: FileIO) -> bytes:
    with open(file.fileno(), "rb", closefd=False) as buffered:
        return buffered.read()


def _cut(block_bytes: bytes, ranges: list[tuple[int, int]], begin: int) -> list[bytes]:
    return [block_bytes[start - begin : stop - begin] for start, stop in ranges]
