"""From a shard set to batches of uint8 images in the order of `pipeline.order`: read, verify, decode, ahead of use."""

import io
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline import images
from pipeline.block_cache import BlockCache
from pipeline.blocks import Blocks
from pipeline.manifest import Encoding, ShardSet, ShardSetError
from pipeline.order import Int64, Plan, flips, rank_rows
from pipeline.read_counts import ReadCounts


class Batch(NamedTuple):
    """This rank's rows of one global batch, micro-batch after micro-batch."""

    images: Tensor
    """(n, 3, H, W) uint8."""
    labels: Tensor
    """(n,) int64; -1 in a set without classes."""
    sample_ids: Tensor
    """(n,) int64, rows of the index."""
    flip: Tensor
    """(n,) bool: images to mirror left to right, which is left to the device."""
    number: int
    """Global batch number, counted over all epochs."""


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
        ValueError: The set holds images of another size, or too few; or the ranks do not share the batch evenly.
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
        self.counts = ReadCounts()
        rows = rank_rows(global_batch_size, accumulation_steps, rank, world_size)
        self._batches = _Batches(shard_set, self.plan, rows, image_size, horizontal_flip, cache)
        self._num_workers = num_workers
        self._prefetch_batches = prefetch_batches
        self._pin_memory = pin_memory
        if num_workers:
            _start_fork_server()

    def batches(self, first_batch_number: int = 0) -> Iterator[Batch]:
        """Yields the batches from a number on, for ever; closing or dropping the iterator ends its workers.

        Raises:
            ShardSetError: When the turn of a batch comes whose data is missing or damaged.
        """
        prepared = iter(
            DataLoader(
                self._batches,
                batch_size=None,  # an item is a batch
                sampler=itertools.count(first_batch_number),
                collate_fn=_as_it_is,
                num_workers=self._num_workers,
                prefetch_factor=self._prefetch_batches if self._num_workers else None,
                worker_init_fn=_start_worker if self._num_workers else None,
                multiprocessing_context="forkserver" if self._num_workers else None,
                pin_memory=self._pin_memory,
                generator=torch.Generator(),  # else it draws from the global one
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
        self._blocks = Blocks(shard_set, cache)
        self._labels = shard_set.index.sample_label
        self._encoding = shard_set.manifest.encoding
        self._plan, self._rows = plan, rows
        self._image_size, self._horizontal_flip = image_size, horizontal_flip

    def __getitem__(self, number: int) -> _Item | ShardSetError:
        epoch = number // self._plan.batches_per_epoch
        sample_ids = self._plan.batch_sample_ids(number, self._rows)
        worker = get_worker_info()
        share = worker.id / worker.num_workers if worker else 0.0
        flip = flips(self._plan.seed, epoch, sample_ids) & self._horizontal_flip
        pixels = _empty((len(sample_ids), 3, self._image_size, self._image_size), shared=worker is not None)
        try:
            encoded, counts = self._blocks.read(sample_ids, epoch, share)
            for sample_id, data, into in zip(sample_ids.tolist(), encoded, pixels.numpy(), strict=True):
                into[:] = self._decode(sample_id, data).transpose(2, 0, 1)
        except ShardSetError as error:
            return error
        return _Item(pixels, self._labels[sample_ids].astype(np.int64), sample_ids, flip, counts)

    def _decode(self, sample_id: int, data: bytes) -> npt.NDArray[np.uint8]:
        try:
            return _decode(data, self._encoding, self._image_size)
        except ValueError as error:
            raise ShardSetError(f"{self._blocks.where(sample_id)}: {error}; build or index the set again") from error


def _decode(data: bytes, encoding: Encoding, size: int) -> npt.NDArray[np.uint8]:
    """Returns (size, size, 3) uint8, or raises ValueError with the reason."""
    if encoding == "raw":
        if len(data) != size * size * 3:
            raise ValueError(f"expected {size * size * 3} bytes ({size} x {size} x 3), got {len(data)}")
        return np.frombuffer(data, np.uint8).reshape(size, size, 3)
    if encoding == "original":
        return images.to_square(images.decode(data), size)
    try:  # a named format spares Pillow's search for it: 15 % of the time
        image = Image.open(io.BytesIO(data), formats=[_PILLOW_FORMATS[encoding]])
        pixels = np.asarray(image)
    except Exception as error:  # Pillow's parsers raise every kind
        raise ValueError(f"expected a readable {encoding} image, got {type(error).__name__}: {error}") from error
    if pixels.shape != (size, size, 3):
        raise ValueError(f"expected {size} x {size} RGB, got {image.width} x {image.height} {image.mode}")
    return pixels


_PILLOW_FORMATS = {"webp": "WEBP", "png": "PNG", "jpeg444": "JPEG"}


def _empty(shape: tuple[int, ...], shared: bool) -> Tensor:
    """uint8 tensor to be filled.

    In shared memory it leaves a worker without a copy, as in torch's default_collate; large buffers from malloc instead
    fragmented a worker's heap without bound (50 MB -> 500 MB in 240 batches).
    """
    if not shared:
        return torch.empty(shape, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _as_it_is(item: object) -> object:
    return item


# Workers are forked from a server process of one thread, which has imported this module: a fork of the trainer would
# copy locks that its threads (gloo, nccl, MLflow) hold at that moment; a fresh interpreter each would cost seconds
# and hundreds of megabytes.

_JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def _start_fork_server() -> None:
    """Starts it with the signals blocked that a scheduler sends to all processes of a job.

    They ask the trainer to save and stop, which may take more batches; server and workers inherit the block, and
    `_end_with_trainer` ends them. CPython starts its resource tracker in the same way.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(worker_id: int) -> None:
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """Ends this process, whatever it is waiting for, once the trainer says so (`Process.terminate`) or is gone."""
    trainer = multiprocessing.parent_process()
    assert trainer
    while trainer.is_alive():
        heard = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if heard and heard.si_pid == trainer.pid:
            break
    os._exit(1)
