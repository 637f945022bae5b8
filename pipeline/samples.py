"""From sample ids to verified, decoded images."""

import io
import os

import imagecodecs
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from pipeline import images
from pipeline.block_cache import BlockCache
from pipeline.blocks import Blocks
from pipeline.manifest import Encoding, ShardSet, ShardSetError
from pipeline.order import Int64
from pipeline.read_counts import ReadCounts


class SampleReader:
    """Reads images of a set; hand one object to all worker processes, so that they share what is verified.

    Args:
        shard_set: The opened set.
        image_size: Side in pixels; images of original size are cropped and resized to it.
        cache: Where blocks of a remote set are kept on this node.
    """

    def __init__(self, shard_set: ShardSet, image_size: int, cache: BlockCache | None = None) -> None:
        self._blocks = Blocks(shard_set, cache)
        self._encoding = shard_set.manifest.encoding
        self._image_size = image_size
        self._scratch: npt.NDArray[np.uint8] = np.empty((0, 0, 0, 0), np.uint8)  # a worker's, used again for each batch

    def read(self, sample_ids: Int64, epoch: int = 0) -> tuple[Tensor, ReadCounts]:
        """Reads and decodes some samples.

        Args:
            sample_ids: (n,) in any order.
            epoch: A block is verified once in each epoch.

        Returns:
            (n, 3, image_size, image_size) uint8 in the order of `sample_ids`, with the channels last in memory, as
            decoders write them; and what reading them cost.

        Raises:
            ShardSetError: A missing, cut or damaged shard, or an image that is not what the manifest says.
        """
        worker = get_worker_info()
        shape = (len(sample_ids), self._image_size, self._image_size, 3)
        if self._scratch.shape != shape or not worker:
            self._scratch = np.empty(shape, np.uint8)
        share = worker.id / worker.num_workers if worker else 0.0
        rows = self._scratch.reshape(len(sample_ids), -1) if self._encoding == "raw" else None
        encoded, counts = self._blocks.read(sample_ids, epoch, share, rows)
        for sample_id, data, into in zip(sample_ids.tolist(), encoded, self._scratch, strict=True):
            if data is not None:
                into[:] = self._decode(sample_id, data)
        pixels = _in_shared_memory(self._scratch) if worker else torch.from_numpy(self._scratch)
        return pixels.permute(0, 3, 1, 2), counts

    def fetch_ahead(self, blocks: frozenset[int]) -> None:
        """Begins to bring blocks of a remote set to this node, as they will be read soon."""
        self._blocks.fetch_ahead(blocks)

    def _decode(self, sample_id: int, data: bytes) -> npt.NDArray[np.uint8]:
        try:
            return decode(data, self._encoding, self._image_size)
        except ValueError as error:
            raise ShardSetError(f"{self._blocks.where(sample_id)}: {error}; build or index the set again") from error


def decode(data: bytes, encoding: Encoding, size: int) -> npt.NDArray[np.uint8]:
    """Decodes one image of a set.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ValueError: Not what the encoding says; the message is the reason.
    """
    if encoding == "raw":
        if len(data) != size * size * 3:
            raise ValueError(f"expected {size * size * 3} bytes ({size} x {size} x 3), got {len(data)}")
        return np.frombuffer(data, np.uint8).reshape(size, size, 3)
    if encoding == "original":
        return images.to_square(images.decode(data), size)
    try:
        if encoding == "webp":  # Pillow takes a quarter longer
            pixels: npt.NDArray[np.uint8] = imagecodecs.webp_decode(data)
        else:  # a named format spares Pillow's search for it: 15 % of the time
            pixels = np.asarray(Image.open(io.BytesIO(data), formats=[_PILLOW_FORMATS[encoding]]))
    except Exception as error:  # the parsers raise every kind
        raise ValueError(f"expected a readable {encoding} image, got {type(error).__name__}: {error}") from error
    if pixels.shape != (size, size, 3):
        found = " x ".join(map(str, pixels.shape))
        raise ValueError(f"expected {size} x {size} x 3 (height, width, RGB), got {found}")
    return pixels


_PILLOW_FORMATS = {"png": "PNG", "jpeg444": "JPEG"}


def _in_shared_memory(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """A copy that leaves a worker without another one, as in torch's default_collate.

    Written as a file, at half the cost of filling the mapped memory: its pages are neither faulted in nor zeroed.
    """
    file = os.memfd_create("batch")
    try:
        rest = memoryview(pixels.data).cast("B")
        while rest:
            rest = rest[os.write(file, rest) :]
        storage = torch.UntypedStorage._new_shared_fd_cpu(file, pixels.nbytes)  # type: ignore[attr-defined]  # torch leaves it untyped
    finally:
        os.close(file)
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(pixels.shape)
