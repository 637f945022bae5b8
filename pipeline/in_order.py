"""From a shard set to given samples in given batches, each once: what statistics over a whole set are made of."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.block_cache import BlockCache
from pipeline.blocks import Blocks
from pipeline.loader import _as_it_is, _decode, _start_fork_server, _start_worker
from pipeline.manifest import ShardSet, ShardSetError


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
    if num_workers:
        _start_fork_server()
    prepared = DataLoader(
        _Batches(shard_set, image_size, batches, cache),
        batch_size=None,  # an item is a batch
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=_start_worker if num_workers else None,
        multiprocessing_context="forkserver" if num_workers else None,
        generator=torch.Generator(),  # else it draws from the global one
    )
    for item in prepared:
        if isinstance(item, ShardSetError):
            raise item
        yield item


class _Batches(Dataset["Tensor | ShardSetError"]):
    """Item k is batch k; or why it cannot be had, as a value: raised in a worker it would lose its message."""

    def __init__(
        self, shard_set: ShardSet, image_size: int, batches: Sequence[range], cache: BlockCache | None
    ) -> None:
        self._blocks = Blocks(shard_set, cache)
        self._encoding = shard_set.manifest.encoding
        self._image_size, self._batches = image_size, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> "Tensor | ShardSetError":
        sample_ids = np.array(self._batches[number])
        pixels = torch.empty((len(sample_ids), 3, self._image_size, self._image_size), dtype=torch.uint8)
        try:
            encoded, _ = self._blocks.read(sample_ids, epoch=0)
            for sample_id, data, into in zip(sample_ids.tolist(), encoded, pixels.numpy(), strict=True):
                into[:] = self._decode(sample_id, data).transpose(2, 0, 1)
        except ShardSetError as error:
            return error
        return pixels

    def _decode(self, sample_id: int, data: bytes) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
        try:
            return _decode(data, self._encoding, self._image_size)
        except ValueError as error:
            raise ShardSetError(f"{self._blocks.where(sample_id)}: {error}; build or index the set again") from error
