"""What generated images are compared with: mean and covariance of a whole shard set's features, made once and kept.

A file holds `mu` and `sigma` (float64), `n`, `protocol_json` and a part of the features, so that other FID programs
read it too. Its name tells its protocol: another set, extractor or image size is another file.
"""

import hashlib
import io
import json
import secrets
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline import images
from pipeline.block_cache import BlockCache
from pipeline.config import Config
from pipeline.feature_pass import Sink, Statistics, on_rank_0, see, spread
from pipeline.features import EvaluationError, Extractor
from pipeline.loader import read_in_order
from pipeline.manifest import ShardSet
from pipeline.shard_file import write_file
from pipeline.world import World

FORMAT = 2


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
    found = on_rank_0(world, lambda: look_up(path, protocol))
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


def look_up(path: Path, protocol: dict[str, Any]) -> Statistics | None:
    """Reads the statistics if they are there; else makes sure that hours of work will have a place to go to.

    Raises:
        EvaluationError: the file is damaged, or its directory cannot be written.
    """
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
        EvaluationError: the file is damaged or of another protocol than its name says.
    """
    way_out = f"remove {path}, and it will be computed again"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = Statistics(int(file["n"]), file["mu"], file["sigma"], file["features"])
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
    assert statistics.kept is not None
    file = io.BytesIO()
    n, text = np.array(statistics.n), np.array(json.dumps(protocol))
    np.savez(file, mu=statistics.mu, sigma=statistics.sigma, n=n, protocol_json=text, features=statistics.kept)
    write_file(path, file.getvalue())


def compute(
    shard_set: ShardSet, extractor: Extractor, config: Config, world: World, sink: Sink | None = None
) -> Statistics:
    """Passes each sample of the set through the extractor once, over all ranks.

    Args:
        shard_set: the set.
        extractor: the same on every rank.
        config: of the run.
        world: the ranks.
        sink: takes the number of a batch's first sample and its features.

    Raises:
        ShardSetError: damaged data.
        EvaluationError: not every sample was seen exactly once.
    """
    num_samples, size = shard_set.index.num_samples, config.evaluation.batch_size
    # Fixed batches, so that features do not depend on the world size; contiguous shares, so that ranks share no block.
    starts = range(0, num_samples, size)
    mine = starts[len(starts) * world.rank // world.size : len(starts) * (world.rank + 1) // world.size]
    blocks = read_blocks(shard_set, [range(start, min(start + size, num_samples)) for start in mine], config)
    what = "reference statistics"
    return see(blocks, spread(num_samples), extractor, world, what, with_logits=False, sink=sink).statistics


def read_blocks(shard_set: ShardSet, batches: list[range], config: Config) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of the first image and the images, (n, 3, R, R) uint8, of each batch of a set."""
    cache = BlockCache(config.data.cache_dir, config.data.cache_bytes)
    found = read_in_order(shard_set, config.model.resolution, batches, config.data.num_workers, cache)
    for batch, pixels in zip(batches, found, strict=True):
        yield batch.start, pixels


def obtain_features(shard_set: ShardSet, extractor: Extractor, config: Config, world: World) -> npt.NDArray[np.float32]:
    """Returns the features of every sample of a set, (N, D), mapped from a file beside its statistics.

    Computes them if they are not there yet: 8 KB per sample with Inception. Every rank must see the directory.

    Raises:
        EvaluationError: another node does not see the file.
        ShardSetError: damaged data.
    """
    protocol = protocol_of(shard_set, extractor, config.model.resolution)
    path = path_of(protocol, shard_set.location, config.evaluation.reference_dir).with_suffix(".features.npy")
    shape = shard_set.index.num_samples, extractor.num_features
    if not world.broadcast(path.exists()):
        partial = world.broadcast(path.with_suffix(f".{secrets.token_hex(4)}.partial"))
        on_rank_0(world, lambda: _allocate(partial, shape))
        _check_seen_by_all(partial, world)
        rows = np.load(partial, mmap_mode="r+")

        def keep(start: int, features: Tensor) -> None:
            rows[start : start + len(features)] = features.cpu().numpy()

        try:
            compute(shard_set, extractor, config, world, keep)
            rows.flush()
            world.barrier()
            on_rank_0(world, lambda: partial.rename(path))
        finally:
            partial.unlink(missing_ok=True)
    _check_seen_by_all(path, world)
    found: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
    if found.shape != shape:
        raise EvaluationError(f"{path} holds features of shape {found.shape}, expected {shape}; remove it")
    return found


def _allocate(path: Path, shape: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape).flush()


def _check_seen_by_all(path: Path, world: World) -> None:
    if blind := [rank for rank, seen in enumerate(world.gather(path.exists())) if not seen]:
        raise EvaluationError(
            f"{path} is not seen by the processes {blind}; name a directory that every node sees with "
            "evaluation.reference_dir=DIR"
        )


@dataclass(frozen=True)
class Foreign:
    """Statistics that another program made, or this one for another purpose."""

    statistics: Statistics
    sha256: str  # of the file
    warning: str | None  # why a score against it may mean nothing


def read_foreign(path: Path, extractor: Extractor, expected: dict[str, Any]) -> Foreign:
    """Reads an npz file with `mu` and `sigma`, as pytorch-fid, StudioGAN, BigGAN-PyTorch and ADM write them.

    Args:
        path: the file.
        extractor: that the samples pass through.
        expected: protocol of the training set's statistics.

    Raises:
        EvaluationError: the file cannot be read, is of another number of features, or says that its images or features
            were made differently: such numbers must not be compared.
    """
    try:
        data = path.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
            n = int(file["n"]) if "n" in file else 0
            protocol = json.loads(str(file["protocol_json"])) if "protocol_json" in file else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"evaluation.reference_file={path} cannot be read ({error}); it must be an npz file with mu and sigma"
        ) from error
    size = extractor.num_features
    if mu.shape != (size,) or sigma.shape != (size, size):
        raise EvaluationError(
            f"evaluation.reference_file={path} holds mu {mu.shape} and sigma {sigma.shape}, but {extractor.name} makes "
            f"{size} features; give statistics of the same extractor"
        )
    warning = None
    if protocol is None:
        warning = f"{path} does not say how it was made: a score against it may compare with nothing"
    elif different := [
        f"  {key}: {protocol.get(key)} in the file, {expected[key]} here"
        for key in ("image_size", "crop", "interpolation", "extractor", "extractor_sha256")
        if protocol.get(key) != expected[key]
    ]:
        lines = "\n".join(different)
        raise EvaluationError(
            f"evaluation.reference_file={path} was made by another protocol, so its numbers must not be compared:\n"
            f"{lines}\nleave it out, or give statistics made the same way"
        )
    return Foreign(Statistics(n, mu, sigma), hashlib.sha256(data).hexdigest(), warning)
