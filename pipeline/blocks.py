"""Verified bytes of samples: every block is hashed before the first of its samples is used in an epoch."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import object_store
from pipeline.manifest import ShardSet, ShardSetError
from pipeline.order import Int64


@dataclass
class ReadCounts:
    """What reading cost: bytes read, those for verifying included, and blocks hashed."""

    bytes_read: int = 0
    blocks_verified: int = 0

    def __add__(self, other: "ReadCounts") -> "ReadCounts":
        return ReadCounts(self.bytes_read + other.bytes_read, self.blocks_verified + other.blocks_verified)


class Blocks:
    """Reads encoded images of a set; hand one object to all worker processes, so that they share what is verified."""

    def __init__(self, shard_set: ShardSet) -> None:
        self._location = shard_set.location
        self._index = shard_set.index
        self._shard_names = [shard.name for shard in shard_set.manifest.shards]
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
            if self._verified_in_epoch[block] < epoch:
                counts += self._verify(block)
                self._verified_in_epoch[block] = epoch
            rows = np.flatnonzero(block_of == block)
            starts = index.sample_offset[sample_ids[rows]]
            stops = starts + index.sample_size[sample_ids[rows]]
            for row, image in zip(rows, self._ranges(block, starts, stops), strict=True):
                images[row] = image
                counts.bytes_read += len(image)
        return images, counts

    def where(self, sample_id: int) -> str:
        """Shard and byte range of one sample, for messages."""
        index = self._index
        start, size = int(index.sample_offset[sample_id]), int(index.sample_size[sample_id])
        address = object_store.join(self._location, self._shard_names[index.sample_shard[sample_id]])
        return f"{address}: sample {sample_id} (bytes {start} to {start + size})"

    def _verify(self, block: int) -> ReadCounts:
        index = self._index
        data = self._ranges(block, index.block_start[block : block + 1], index.block_stop[block : block + 1])[0]
        found, expected = hashlib.sha256(data).hexdigest(), index.block_sha256[block].tobytes().hex()
        if found != expected:
            raise self._error(block, f"is damaged: expected sha256 {expected}, got {found}")
        return ReadCounts(len(data), 1)

    def _ranges(self, block: int, starts: Int64, stops: Int64) -> list[bytes]:
        name, ranges = (
            self._shard_names[self._index.block_shard[block]],
            zip(starts.tolist(), stops.tolist(), strict=True),
        )
        try:
            return object_store.read_ranges(self._location, name, ranges)
        except OSError as error:
            raise self._error(block, f"cannot be read: {error}") from error

    def _error(self, block: int, fault: str) -> ShardSetError:
        index = self._index
        return ShardSetError(
            f"{object_store.join(self._location, self._shard_names[index.block_shard[block]])}: block {block} "
            f"(bytes {index.block_start[block]} to {index.block_stop[block]}, samples "
            f"{index.block_first_sample[block]} to {index.block_first_sample[block + 1] - 1}) {fault}; "
            f"`python launch/shards.py verify {self._location}` lists all that is wrong with the set"
        )
