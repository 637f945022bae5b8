"""From a shard set to batches of uint8 images in the order of `pipeline.order`: read, verify, decode, ahead of use."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from pipeline.ahead import prepare_ahead, start_fork_server
from pipeline.batch import Batch
from pipeline.block_cache import BlockCache
from pipeline.manifest import ShardSet, ShardSetError
from pipeline.object_store import is_remote
from pipeline.order import Int64, Plan, flips, rank_rows
from pipeline.read_counts import ReadCounts
from pipeline.samples import SampleReader

AHEAD_BLOCKS = 4
"""So many blocks of each partition are fetched before they are needed."""


class Loader:
    """Reads the batches of one rank.

    Attributes:
        plan: Order of the samples.
        counts: What reading the batches handed out so far has cost.

    Args:
        shard_set: The opened set.
        image_size: Side in pixels that batches must have; images of original size are cropped and resized to it.
        seed: The run's seed.
        global_batch_size: Samples per batch over all ranks.
        accumulation_steps: Micro-batches per batch.
        rank: This process.
        world_size: Number of processes.
        num_workers: Decoding processes; 0 decodes in the calling process.
        prefetch_batches: Batches that each worker prepares ahead.
        horizontal_flip: Whether `Batch.flip` marks half of the images, others in each epoch, or none.
        pin_memory: Whether images come in page-locked memory, for copies to a CUDA device.
        cache: Where blocks of a remote set are kept on this node.

    Raises:
        ValueError: The set holds images of another size, or too few; the ranks do not share the batch evenly; or the
            cache cannot hold the blocks in use.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        *,
        image_size: int,
        seed: int,
        global_batch_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch_batches: int = 2,
        horizontal_flip: bool = False,
        pin_memory: bool = False,
        cache: BlockCache | None = None,
    ) -> None:
        manifest = shard_set.manifest
        if manifest.image_size not in (None, image_size):
            raise ValueError(
                f"{shard_set.location} holds images of {manifest.image_size} px, image_size={image_size} is wanted; "
                f"build the set with --size {image_size}, or train at {manifest.image_size} px"
            )
        self.plan = Plan(shard_set.index.block_first_sample, seed, global_batch_size, accumulation_steps)
        if cache and is_remote(shard_set.shards_location):
            _check_room(shard_set, self.plan, cache)
        self.counts = ReadCounts()
        rows = rank_rows(global_batch_size, accumulation_steps, rank, world_size)
        self._batches = _Batches(shard_set, self.plan, rows, image_size, horizontal_flip, cache)
        self._num_workers = num_workers
        self._prefetch_batches = prefetch_batches
        self._pin_memory = pin_memory
        if num_workers:
            start_fork_server()

    def batches(self, first_batch_number: int = 0) -> Iterator[Batch]:
        """Yields the batches from a number on, for ever; closing or dropping the iterator ends its workers.

        Raises:
            ShardSetError: When the turn of a batch comes whose data is missing or damaged.
        """
        prepared = iter(
            prepare_ahead(
                self._batches,
                itertools.count(first_batch_number),
                num_workers=self._num_workers,
                prefetch=self._prefetch_batches,
                pin_memory=self._pin_memory,
            )
        )
        try:
            for number in itertools.count(first_batch_number):
                item = next(prepared)
                if isinstance(item, ShardSetError):
                    raise item
                self.counts += item.counts
                labels, sample_ids, flip = map(torch.from_numpy, (item.labels, item.sample_ids, item.flip))
                yield Batch(item.images, labels, sample_ids, flip, number)
        finally:
            del prepared  # ends the workers, whoever holds on to a traceback


def _check_room(shard_set: ShardSet, plan: Plan, cache: BlockCache) -> None:
    """Refuses a cache that would throw blocks away before they are used up, so that each is fetched many times."""
    sizes = shard_set.index.block_stop - shard_set.index.block_start
    in_use = min(int(sizes.sum()), plan.num_partitions * (1 + AHEAD_BLOCKS + 1) * int(sizes.max()))
    if cache.max_bytes < in_use:
        raise ValueError(
            f"data.cache_bytes={cache.max_bytes} is too small for {shard_set.location}: the set is read at "
            f"{plan.num_partitions} places at once, and {AHEAD_BLOCKS} blocks of up to {int(sizes.max())} bytes ahead "
            f"of each; set data.cache_bytes to {in_use} or more"
        )


class _Item(NamedTuple):
    """What a worker sends: one tensor, as each costs a shared file, and small arrays."""

    images: Tensor
    labels: Int64
    sample_ids: Int64
    flip: npt.NDArray[np.bool_]
    counts: ReadCounts


class _Batches(Dataset["_Item | ShardSetError"]):
    """Item k is batch k, decoded; or why it cannot be had, as a value: raised in a worker it would lose its message."""

    def __init__(
        self,
        shard_set: ShardSet,
        plan: Plan,
        rows: Int64,
        image_size: int,
        horizontal_flip: bool,
        cache: BlockCache | None,
    ) -> None:
        self._samples = SampleReader(shard_set, image_size, cache)
        self._labels = shard_set.index.sample_label
        self._plan, self._rows, self._horizontal_flip = plan, rows, horizontal_flip
        self._ahead_until = -1  # batches of this worker whose blocks were asked for

    def __getitem__(self, number: int) -> _Item | ShardSetError:
        epoch = number // self._plan.batches_per_epoch
        sample_ids = self._plan.batch_sample_ids(number, self._rows)
        flip = flips(self._plan.seed, epoch, sample_ids) & self._horizontal_flip
        try:
            pixels, counts = self._samples.read(sample_ids, epoch)
        except ShardSetError as error:
            return error
        self._fetch_ahead(number)
        return _Item(pixels, self._labels[sample_ids].astype(np.int64), sample_ids, flip, counts)

    def _fetch_ahead(self, number: int) -> None:
        """Asks for the blocks of the batches that this worker will be given next, as far as AHEAD_BLOCKS reach."""
        worker = get_worker_info()
        stride = worker.num_workers if worker else 1
        until = number + stride * math.ceil(AHEAD_BLOCKS * self._plan.batches_per_block / stride)
        first = self._ahead_until if number < self._ahead_until <= until else number
        for later in range(first + stride, until + 1, stride):
            self._samples.fetch_ahead(frozenset(self._plan.batch_blocks(later, self._rows).tolist()))
        self._ahead_until = until


def read_in_order(
    shard_set: ShardSet,
    image_size: int,
    batches: Sequence[range],
    num_workers: int = 0,
    cache: BlockCache | None = None,
) -> Iterator[Tensor]:
    """Yields the images of each batch, (n, 3, image_size, image_size) uint8, verified and decoded ahead of use.

    Args:
        shard_set: The opened set.
        image_size: Side in pixels; images of original size are cropped and resized to it.
        batches: Sample ids of each batch.
        num_workers: Decoding processes; 0 decodes in the calling process.
        cache: Where blocks of a remote set are kept on this node.

    Raises:
        ShardSetError: When the turn of a batch comes whose data is missing or damaged.
    """
    for item in prepare_ahead(_Ranges(shard_set, image_size, batches, cache), num_workers=num_workers):
        if isinstance(item, ShardSetError):
            raise item
        yield item


class _Ranges(Dataset["Tensor | ShardSetError"]):
    """Item k is the images of range k; or why they cannot be had."""

    def __init__(self, shard_set: ShardSet, image_size: int, ranges: Sequence[range], cache: BlockCache | None):
        self._samples, self._ranges = SampleReader(shard_set, image_size, cache), ranges

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, number: int) -> "Tensor | ShardSetError":
        try:
            return self._samples.read(np.array(self._ranges[number]))[0]
        except ShardSetError as error:
            return error
