"""What the loader hands to the training."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """This rank's rows of one global batch, micro-batch after micro-batch."""

    images: Tensor
    """(n, 3, H, W) uint8, channels last in memory."""
    labels: Tensor
    """(n,) int64; -1 in a set without classes."""
    sample_ids: Tensor
    """(n,) int64, rows of the index."""
    flip: Tensor
    """(n,) bool: images to mirror left to right, which is left to the device."""
    number: int
    """Global batch number, counted over all epochs."""
