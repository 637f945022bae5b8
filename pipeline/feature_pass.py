"""One pass of images through an extractor, shared by the ranks: what each metric needs of them, brought together.

Every image is seen once, by one rank. Mean and covariance are sums; logits and a part of the features are put back in
the order of the images, so that nothing depends on the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.bar import Bar
from pipeline.features import EvaluationError, Extractor, Float64
from pipeline.world import World

MAX_KEPT = 10_000  # features kept of a set of images, for KID and precision and recall; ADM compares as many

T = TypeVar("T")
Sink = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Statistics:
    """Features in summary: how many, their mean, their covariance, and some of them as they are."""

    n: int
    mu: Float64  # (D,)
    sigma: Float64  # (D, D), divided by n - 1
    kept: npt.NDArray[np.float32] | None = None  # (k, D) in the order of the images; None in files that others made


@dataclass(frozen=True)
class Seen:
    """What the scores need to know of the images of all ranks."""

    statistics: Statistics
    logits: Tensor | None  # (n, classes) on the CPU, in the order of the images; None if the extractor has none
    num_constant: int  # images of a single colour


class Moments:
    """Sums of features and of their products, in float64, from which mean and covariance follow.

    Args:
        num_features: D.
        device: where the features come from.
    """

    def __init__(self, num_features: int, device: torch.device):
        self._n = 0
        self._sums = torch.zeros(num_features + 1, num_features, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Adds features (N, D)."""
        rows = features.double()
        self._n += len(rows)
        self._sums[0] += rows.sum(0)
        self._sums[1:] += rows.T @ rows

    def reduce(self, world: World) -> tuple[int, Float64, Float64]:
        """Returns count, mean and covariance of what all ranks have added."""
        n = sum(world.gather(self._n))
        sums = (world.mean(self._sums.clone()) * world.size).cpu().numpy()
        mu = sums[0] / n
        with np.errstate(invalid="ignore"):  # who calls looks for non-finite features
            return n, mu, (sums[1:] - n * np.outer(mu, mu)) / (n - 1)


def first(num_images: int) -> npt.NDArray[np.bool_]:
    """Returns which features of generated images are kept, (num_images,): they are drawn alike, so the first ones."""
    return np.arange(num_images) < MAX_KEPT


def spread(num_images: int) -> npt.NDArray[np.bool_]:
    """Returns which features of a set are kept, (num_images,): a fixed random part, as sets may be sorted by class."""
    is_kept = np.zeros(num_images, bool)
    is_kept[np.random.RandomState(2020).permutation(num_images)[:MAX_KEPT]] = True
    return is_kept


def see(
    blocks: Iterable[tuple[int, Tensor]],
    is_kept: npt.NDArray[np.bool_],
    extractor: Extractor,
    world: World,
    what: str,
    *,
    with_logits: bool = True,
    sink: Sink | None = None,
) -> Seen:
    """Passes this rank's images through the extractor and brings together what all ranks found; called on every rank.

    Args:
        blocks: this rank's share: the number of the first image, and images, (n, 3, H, W) uint8, that follow it.
        is_kept: (N,) of all images together: whose features are kept.
        extractor: the same on every rank.
        world: the ranks.
        what: the images, for the progress bar.
        with_logits: whether logits are wanted.
        sink: takes the number of a block's first image and its features, (n, D) on the device.

    Raises:
        ValueError: what went wrong with the images or features of any rank, on every rank.
    """
    moments = Moments(extractor.num_features, world.device)
    logits: list[tuple[int, Tensor]] = []
    kept: list[tuple[int, Tensor]] = []
    num_constant, error = 0, None
    with progress(world, len(is_kept), what) as advance:
        try:
            for start, images in blocks:
                images = images.to(world.device)
                num_constant += int(constant(images).sum())
                features, block_logits = extractor(images)
                moments.add(features)
                if with_logits and block_logits is not None:
                    logits.append((start, block_logits.cpu()))
                if (rows := np.flatnonzero(is_kept[start : start + len(images)])).size:
                    kept.append((start, features[torch.from_numpy(rows).to(features.device)].cpu()))
                if sink is not None:
                    sink(start, features)
                advance(len(images))
        except ValueError as failure:  # one rank's fault is told to all, or the others would wait for it for ever
            error = failure
    if failures := [failure for failure in world.gather(error) if failure is not None]:
        raise failures[0]
    n, mu, sigma = moments.reduce(world)
    if n != len(is_kept):
        raise EvaluationError(f"{n:,} of {len(is_kept):,} {what} were seen; one of the processes lost some")
    if not np.isfinite(mu).all():
        raise EvaluationError(
            f"{extractor.name} makes non-finite features of {what}: it is broken, or not meant for them"
        )
    all_kept, all_logits = _in_order(kept, world), _in_order(logits, world)
    assert all_kept is not None, "no features were kept"
    return Seen(Statistics(n, mu, sigma, all_kept.numpy()), all_logits, sum(world.gather(num_constant)))


def constant(images: Tensor) -> Tensor:
    """Returns which of the images (N, 3, H, W) are of a single colour, (N,) bool."""
    pixels = images.flatten(2)
    return (pixels == pixels[:, :, :1]).flatten(1).all(1)


def _in_order(parts: list[tuple[int, Tensor]], world: World) -> Tensor | None:
    found = sorted((part for of_rank in world.gather(parts) for part in of_rank), key=lambda part: part[0])
    return torch.cat([rows for _, rows in found]) if found else None


def on_rank_0(world: World, work: Callable[[], T]) -> T:
    """Does work on rank 0 alone; its result, or its error, is every rank's."""
    result: T | Exception | None = None
    if world.is_main:
        try:
            result = work()
        except Exception as error:  # raised again below, on all ranks
            result = error
    result = world.broadcast(result)
    if isinstance(result, Exception):
        raise result
    return result  # type: ignore[return-value]  # None only if that is the result


@contextmanager
def progress(world: World, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Yields what each rank calls with the number of images it has just done; rank 0 shows a bar of all ranks' work."""
    with Bar(total, what, "images") if world.is_main else nullcontext() as bar:

        def advance(count: int) -> None:
            if bar is not None:
                bar.update(min(count * world.size, total - bar.n))

        yield advance
