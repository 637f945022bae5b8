"""Verified bytes of samples: every block is hashed before the first of its samples is used in an epoch.

Samples of a local set are read where they lie. Blocks of a remote set are fetched whole, once per node, and kept in a
cache on the local disk.
"""

import hashlib
import os
from io import FileIO

import numpy as np
import torch

from pipeline import object_store
from pipeline.block_cache import BlockCache
from pipeline.manifest import ShardSet, ShardSetError
from pipeline.order import Int64
from pipeline.read_counts import ReadCounts

MAX_FETCHES = 4  # of a block whose bytes are wrong


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
        # In shared memory. Two workers that verify a block at once only do it twice.
        self._verified_in_epoch = torch.full((self._index.num_blocks,), -1)
        self._verified_in_epoch.share_memory_()  # type: ignore[no-untyped-call]

    def read(self, sample_ids: Int64, epoch: int, share: float = 0.0) -> tuple[list[bytes], ReadCounts]:
        """Reads the encoded images of some samples.

        Args:
            sample_ids: (n,) in any order.
            epoch: A block is verified once in each epoch.
            share: Where in its list of blocks to begin, in [0, 1): workers that begin apart do not verify the same.

        Returns:
            The n images in the order of `sample_ids`, and what reading them cost.

        Raises:
            ShardSetError: A missing, cut or damaged shard; names shard, block, what was expected and what was found.
        """
        index, counts = self._index, ReadCounts()
        images = [b""] * len(sample_ids)
        block_of = np.searchsorted(index.block_first_sample, sample_ids, side="right") - 1
        blocks = np.unique(block_of)
        for block in np.roll(blocks, -int(share * len(blocks))).tolist():
            rows = np.flatnonzero(block_of == block)
            starts = index.sample_offset[sample_ids[rows]]
            stops = starts + index.sample_size[sample_ids[rows]]
            ranges = list(zip(starts.tolist(), stops.tolist(), strict=True))
            is_verified = bool(self._verified_in_epoch[block] >= epoch)
            if self._cache:
                found = self._read_cached(self._cache, block, ranges, is_verified, counts)
            else:
                found = self._read_local(block, ranges, is_verified, counts)
            if not is_verified:
                self._verified_in_epoch[block] = epoch
            for row, image in zip(rows, found, strict=True):
                images[row] = image
        return images, counts

    def where(self, sample_id: int) -> str:
        """Shard and byte range of one sample, for messages."""
        index = self._index
        start, size = int(index.sample_offset[sample_id]), int(index.sample_size[sample_id])
        address = object_store.join(self._location, self._shard_names[index.sample_shard[sample_id]])
        return f"{address}: sample {sample_id} (bytes {start} to {start + size})"

    def _read_local(
        self, block: int, ranges: list[tuple[int, int]], is_verified: bool, counts: ReadCounts
    ) -> list[bytes]:
        if not is_verified:
            fault = self._fault(block, self._load(block, counts), counts)
            if fault:
                raise self._error(block, fault)
        try:
            return object_store.read_ranges(self._location, self._shard_name(block), ranges, counts)
        except OSError as error:
            raise self._error(block, f"cannot be read: {error}") from error

    def _read_cached(
        self, cache: BlockCache, block: int, ranges: list[tuple[int, int]], is_verified: bool, counts: ReadCounts
    ) -> list[bytes]:
        start = int(self._index.block_start[block])
        ranges = [(first - start, last - start) for first, last in ranges]
        try:
            found = self._from_cache(cache, block, ranges, is_verified, counts)
            if found is None:
                with cache.fetching(self._sha256(block)):
                    # Another process may have fetched it while this one waited.
                    found = self._from_cache(cache, block, ranges, False, counts)
                    if found is None:
                        data = self._fetch(block, counts)
                        cache.add(self._sha256(block), data)
                        counts.cache_misses += 1
                        return [data[first:last] for first, last in ranges]
        except OSError as error:
            raise self._error(block, f"cannot be read: {error}") from error
        counts.cache_hits += 1
        return found

    def _from_cache(
        self, cache: BlockCache, block: int, ranges: list[tuple[int, int]], is_verified: bool, counts: ReadCounts
    ) -> list[bytes] | None:
        """Ranges of a block in the cache; None if it is not there, or was damaged there and thrown away."""
        with cache.open(self._sha256(block)) as file:
            if file is None:
                return None
            if is_verified:
                found = [os.pread(file.fileno(), last - first, first) for first, last in ranges]
                counts.bytes_read += sum(map(len, found))
                if all(len(data) == last - first for data, (first, last) in zip(found, ranges, strict=True)):
                    return found
                fault: str | None = "was cut short"
            else:
                data = _whole(file)
                counts.bytes_read += len(data)
                fault = self._fault(block, data, counts)
            if not fault:
                return [data[first:last] for first, last in ranges]
        counts.bad_blocks += 1
        cache.discard(self._sha256(block))
        return None

    def _fetch(self, block: int, counts: ReadCounts) -> bytes:
        """The right bytes of a block from the store, which sends them anew if they are wrong."""
        for _ in range(MAX_FETCHES):
            data = self._load(block, counts)
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
        return None if got == self._sha256(block) else f"is damaged: expected sha256 {self._sha256(block)}, got {got}"

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
