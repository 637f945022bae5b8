"""Which sample is where in the epoch: pure functions of (seed, epoch, batch number), the same for any world size.

An epoch is one stream of all samples: the blocks of the set in a seeded order, the samples of each block in a seeded
order. The stream is cut into equal *partitions*, and every global batch takes equally many samples from each of them.
Ranks take contiguous rows, hence whole partitions: nodes read disjoint blocks, and a batch mixes many blocks.

Seeded order means sorted by a counter-based hash (splitmix64), so it depends on no library's random generator.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PLAN_VERSION = 1
"""Raised whenever the same (set, seed, batch) would give other samples; a checkpoint keeps it."""

MAX_PARTITIONS = 64

_BLOCKS, _SAMPLES, _FLIPS = range(3)  # what a draw is for, part of its key

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Plan:
    """Order of the samples of one set, for every epoch.

    Attributes:
        block_first_sample: (K + 1,) number of the first sample of each block; the last entry is N, the size of the set.
        seed: The run's seed.
        global_batch_size: B, samples per global batch.
        accumulation_steps: A, micro-batches per global batch.

    Raises:
        ValueError: A does not divide B, or the set has fewer than B samples.
    """

    block_first_sample: Int64
    seed: int
    global_batch_size: int
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        if (
            self.global_batch_size < 1
            or self.accumulation_steps < 1
            or self.global_batch_size % self.accumulation_steps
        ):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of "
                f"accumulation_steps={self.accumulation_steps}: change one of them"
            )
        if self.num_samples < self.global_batch_size:
            raise ValueError(
                f"the set has {self.num_samples} samples, fewer than global_batch_size={self.global_batch_size}, "
                "so not one batch can be made: take a smaller batch or a larger set"
            )

    @property
    def num_samples(self) -> int:
        """N, samples in the set."""
        return int(self.block_first_sample[-1])

    @property
    def num_partitions(self) -> int:
        """C: fixed by the batch alone, so that the order does not depend on the number of processes."""
        return math.gcd(MAX_PARTITIONS, self.global_batch_size // self.accumulation_steps)

    @property
    def batches_per_epoch(self) -> int:
        """N // B; the N % B samples left over are others in each epoch."""
        return self.num_samples // self.global_batch_size

    def batch_sample_ids(self, number: int, rows: Int64 | None = None) -> Int64:
        """Samples of one global batch.

        Args:
            number: Global batch number, counted from 0 over all epochs.
            rows: Rows of the batch wanted, for example `rank_rows(...)`; None means all B.

        Returns:
            (rows,) sample numbers in [0, N); micro-batch after micro-batch, in each partition after partition.
        """
        epoch, batch = divmod(number, self.batches_per_epoch)
        rows = np.arange(self.global_batch_size) if rows is None else rows
        return self._samples_at(epoch, self._positions(epoch, np.array(batch), rows))

    def batch_blocks(self, number: int, rows: Int64) -> Int64:
        """Blocks, ascending, that hold the samples of the given rows of one global batch."""
        epoch, batch = divmod(number, self.batches_per_epoch)
        blocks, starts = _block_stream(self, epoch)
        positions = self._positions(epoch, np.array(batch), rows)
        return np.unique(blocks[np.searchsorted(starts, positions, side="right") - 1])

    @property
    def batches_per_block(self) -> int:
        """Batches that a block of mean size feeds: each takes global_batch_size / num_partitions of its samples."""
        samples_per_block = self.num_samples / (len(self.block_first_sample) - 1)
        return math.ceil(samples_per_block * self.num_partitions / self.global_batch_size)

    def epoch_sample_ids(self, epoch: int) -> Int64:
        """(N // B, B) sample numbers: every batch of one epoch."""
        batches, rows = np.arange(self.batches_per_epoch), np.arange(self.global_batch_size)
        return self._samples_at(epoch, self._positions(epoch, batches[:, None], rows))

    def left_over_sample_ids(self, epoch: int) -> Int64:
        """(N % B,) sample numbers, ascending, that this epoch does not show."""
        return np.sort(
            self._samples_at(epoch, np.arange(self.batches_per_epoch * self.global_batch_size, self.num_samples))
        )

    def _positions(self, epoch: int, batches: Int64, rows: Int64) -> Int64:
        """Places in the epoch's stream of the given rows of the given batches."""
        per_batch = self.global_batch_size // self.num_partitions
        per_micro_batch = per_batch // self.accumulation_steps
        micro_batch, row = np.divmod(rows, self.global_batch_size // self.accumulation_steps)
        partition, row = np.divmod(row, per_micro_batch)
        length = self.batches_per_epoch * per_batch
        place = batches * per_batch + micro_batch * per_micro_batch + row
        positions: Int64 = partition * length + (place + self._head_starts(epoch)[partition]) % length
        return positions

    def _head_starts(self, epoch: int) -> Int64:
        """(C,) samples at the head of each partition that are shown last instead of first.

        A partition may begin with the last few samples of a block; when they would not fill its part of a batch, they
        go to its end, so that the first batch of an epoch waits for one block per partition and no more.
        """
        per_batch = self.global_batch_size // self.num_partitions
        begins = np.arange(self.num_partitions) * (self.batches_per_epoch * per_batch)
        starts = _block_stream(self, epoch)[1]
        head = starts[np.searchsorted(starts, begins)] - begins
        return np.where(head < per_batch, head, 0)

    def _samples_at(self, epoch: int, positions: Int64) -> Int64:
        """Sample numbers at places of the epoch's stream; orders the samples of the blocks touched and of no other."""
        blocks, starts = _block_stream(self, epoch)
        place = np.searchsorted(starts, positions, side="right") - 1
        touched, which = np.unique(place, return_inverse=True)
        first = self.block_first_sample[blocks[touched]]
        counts = starts[touched + 1] - starts[touched]
        offsets = np.cumsum(counts) - counts
        owner = np.repeat(np.arange(len(touched)), counts)
        inside = np.arange(counts.sum()) - offsets[owner]
        # One sort of (block, hash, place in block) packed in 24 + 24 + 16 bits: unique, so any sort gives the same.
        assert len(touched) <= 2**24 and counts.max(initial=0) <= 2**16
        hashes = _hash(self.seed, _SAMPLES, epoch, first[owner] + inside) >> np.uint64(40)
        keys: UInt64 = np.sort(
            (owner.astype(np.uint64) << np.uint64(40)) | (hashes << np.uint64(16)) | inside.astype(np.uint64)
        )
        shuffled = first[owner] + (keys & np.uint64(0xFFFF)).astype(np.int64)
        result: Int64 = shuffled[offsets[which.reshape(positions.shape)] + positions - starts[place]]
        return result


@lru_cache(maxsize=2)
def _block_stream(plan: Plan, epoch: int) -> tuple[Int64, Int64]:
    """(K,) blocks in the order of the epoch, and (K + 1,) place in the stream where each begins."""
    counts = np.diff(plan.block_first_sample)
    blocks = np.argsort(_hash(plan.seed, _BLOCKS, epoch, np.arange(len(counts))), kind="stable")
    return blocks, np.concatenate(([0], np.cumsum(counts[blocks])))


def rank_rows(global_batch_size: int, accumulation_steps: int, rank: int, world_size: int) -> Int64:
    """Rows of the global batch that one rank trains on: in every micro-batch its contiguous share.

    Returns:
        (B // W,) row numbers, micro-batch after micro-batch.

    Raises:
        ValueError: The processes do not share a micro-batch evenly.
    """
    micro_batch_size = global_batch_size // accumulation_steps
    if micro_batch_size % world_size:
        divisors = [n for n in range(1, micro_batch_size + 1) if micro_batch_size % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - world_size))[:3])
        raise ValueError(
            f"{world_size} processes cannot share a micro-batch of global_batch_size / accumulation_steps = "
            f"{global_batch_size} / {accumulation_steps} = {micro_batch_size} samples evenly: "
            f"start {' or '.join(map(str, near))} processes, or change the batch"
        )
    per_rank = micro_batch_size // world_size
    rows = np.arange(global_batch_size).reshape(accumulation_steps, micro_batch_size)
    return rows[:, rank * per_rank : (rank + 1) * per_rank].reshape(-1)


def flips(seed: int, epoch: int, sample_ids: Int64) -> NDArray[np.bool_]:
    """Which samples are mirrored in this epoch: a fair coin per (seed, epoch, sample), same shape as `sample_ids`."""
    return (_hash(seed, _FLIPS, epoch, sample_ids) >> np.uint64(63)).astype(np.bool_)


def _hash(seed: int, purpose: int, epoch: int, counters: Int64) -> UInt64:
    """Element i is output number i of the splitmix64 generator whose state is made of (seed, purpose, epoch)."""
    state = np.zeros(1, np.uint64)
    for word in (seed, purpose, epoch):
        state = _splitmix64(state ^ np.uint64(word % 2**64))
    return _splitmix64(state + counters.astype(np.uint64) * _GAMMA)


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(state: UInt64) -> UInt64:
    """Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (2014), as in Vigna's splitmix64.c."""
    mixed = state + _GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
