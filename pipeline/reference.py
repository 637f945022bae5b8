"""What generated images are compared with: mean and covariance of a whole shard set's features, made once and kept.

A file holds `mu` and `sigma` (float64), `n` and `protocol_json`, so that other FID programs read it too. Its name tells
its protocol: another set, extractor or image size is another file.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline import images
from pipeline.bar import Bar
from pipeline.block_cache import BlockCache
from pipeline.config import Config
from pipeline.features import EvaluationError, Extractor, Float64
from pipeline.loader import read_in_order
from pipeline.manifest import ShardSet
from pipeline.shard_file import write_file
from pipeline.world import World

FORMAT = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Statistics:
    """Features in summary: how many, their mean, their covariance."""

    n: int
    mu: Float64  # (D,)
    sigma: Float64  # (D, D), divided by n - 1


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

    def reduce(self, world: World) -> Statistics:
        """Returns the statistics of what all ranks have added."""
        n = sum(world.gather(self._n))
        sums = (world.mean(self._sums.clone()) * world.size).cpu().numpy()
        mu = sums[0] / n
        return Statistics(n, mu, (sums[1:] - n * np.outer(mu, mu)) / (n - 1))


def protocol_of(shard_set: ShardSet, extractor: Extractor, image_size: int) -> dict[str, Any]:
    """Returns all that determines the statistics of a set, as plain values."""
    manifest = shard_set.manifest
    as_stored = manifest.image_size is not None
    return {
        "format": FORMAT,
        "dataset": manifest.name,
        "dataset_id": shard_set.dataset_id,
        "split": manifest.split,
        "complete": manifest.complete,
        "num_images": manifest.num_samples,
        "image_size": image_size,
        "crop": manifest.crop if as_stored else images.CROP,
        "interpolation": manifest.interpolation if as_stored else images.INTERPOLATION,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
    }


def obtain(shard_set: ShardSet, extractor: Extractor, config: Config, world: World) -> tuple[Statistics, Path]:
    """Returns the statistics of a set and the file they are kept in; computes them if that is not there yet.

    Raises:
        EvaluationError: the file is damaged, or its directory cannot be written.
        ShardSetError: damaged data.
    """
    protocol = protocol_of(shard_set, extractor, config.model.resolution)
    path = path_of(protocol, shard_set.location, config.evaluation.reference_dir)
    found = on_rank_0(world, lambda: _look_up(path, protocol))
    if found is None:
        found = compute(shard_set, extractor, config, world)
        if world.is_main:
            write(path, found, protocol)
    return found, path


def path_of(protocol: dict[str, Any], location: str, reference_dir: str | None) -> Path:
    """Returns where the statistics of a protocol are kept: beside a local set unless another directory is named."""
    if reference_dir is not None:
        directory = Path(reference_dir)
    elif "://" in location:
        directory = Path.home() / ".cache" / "sagan-at-scale" / "reference"
    else:
        directory = Path(location) / "reference"
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
    return directory / f"{protocol['extractor']}-{protocol['image_size']}px-{key[:16]}.npz"


def _look_up(path: Path, protocol: dict[str, Any]) -> Statistics | None:
    """Reads the statistics if they are there; else makes sure that hours of work will have a place to go to."""
    if path.exists():
        return read(path, protocol)
    probe = path.with_suffix(".probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise EvaluationError(
            f"the statistics of the training set cannot be kept in {path.parent} ({error.strerror}); name a directory "
            "that can be written with evaluation.reference_dir=DIR"
        ) from error
    return None


def read(path: Path, protocol: dict[str, Any]) -> Statistics:
    """Reads statistics.

    Raises:
        EvaluationError: the file is damaged, or was made by another protocol than its name says.
    """
    way_out = f"remove {path}, and it will be computed again"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = Statistics(int(file["n"]), file["mu"], file["sigma"])
            made_by = json.loads(str(file["protocol_json"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"reference statistics {path} cannot be read ({error}); {way_out}") from error
    if made_by != protocol or found.n != protocol["num_images"]:
        raise EvaluationError(
            f"reference statistics {path} are of {found.n} images by {made_by}, expected {protocol}; {way_out}"
        )
    return found


def write(path: Path, statistics: Statistics, protocol: dict[str, Any]) -> None:
    """Writes statistics, whole or not at all."""
    file = io.BytesIO()
    n, text = np.array(statistics.n), np.array(json.dumps(protocol))
    np.savez(file, mu=statistics.mu, sigma=statistics.sigma, n=n, protocol_json=text)
    write_file(path, file.getvalue())


def compute(shard_set: ShardSet, extractor: Extractor, config: Config, world: World) -> Statistics:
    """Passes each sample of the set through the extractor once, over all ranks.

    Raises:
        ShardSetError: damaged data.
        EvaluationError: not every sample was seen exactly once.
    """
    num_samples, size = shard_set.index.num_samples, config.evaluation.batch_size
    # Fixed batches, so that features do not depend on the world size; contiguous shares, so that ranks share no block.
    starts = range(0, num_samples, size)
    mine = starts[len(starts) * world.rank // world.size : len(starts) * (world.rank + 1) // world.size]
    batches = [range(start, min(start + size, num_samples)) for start in mine]
    moments = Moments(extractor.num_features, world.device)
    with progress(world, num_samples, "reference statistics") as advance:
        cache = BlockCache(config.data.cache_dir, config.data.cache_bytes)
        for pixels in read_in_order(shard_set, config.model.resolution, batches, config.data.num_workers, cache):
            moments.add(extractor(pixels.to(world.device))[0])
            advance(len(pixels))
    statistics = moments.reduce(world)
    if statistics.n != num_samples:
        raise EvaluationError(
            f"{statistics.n:,} of the {num_samples:,} images of {shard_set.location} were read; "
            f"`python launch/shards.py verify {shard_set.location}` lists what is wrong with the set"
        )
    return statistics


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
