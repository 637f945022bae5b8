"""Tries everything cheap that an evaluation needs, before a GPU is reserved for it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from pipeline import comparison, intra_class, reference, results, scores, subject, tracking
from pipeline.config import Config
from pipeline.feature_pass import MAX_KEPT
from pipeline.features import EvaluationError, Extractor, read_weights
from pipeline.manifest import ShardSet, open_shard_set
from pipeline.provenance import compute_exactly
from pipeline.world import World

_LOGITS = 1008  # of Inception
_SMALLEST_DISK_BYTES = 100_000_000

T = TypeVar("T")


class _WarningOnly(Exception):
    """What may be otherwise where and when the evaluation runs, or does it no harm."""


def check(run_dir: Path, config: Config, which: str) -> int:
    """Prints one line for each thing that was tried; changes nothing but a download of Inception's weights.

    Args:
        run_dir: the run.
        config: of the run, with the overrides of the evaluation.
        which: as in `evaluation.evaluate`; nothing to score yet is no fault, `--watch` may be meant.

    Returns:
        Exit status: 1 if an evaluation would fail. On other ranks than 0 always 0.
    """
    # A login node need not have the GPU that the evaluation will.
    world = World("auto" if config.run.device == "cuda" else config.run.device, config.run.expected_world_size)
    compute_exactly(world.device)
    num_faults = _check(run_dir, config, which, world) if world.is_main else 0
    world.shutdown()
    return int(num_faults > 0)


def _check(run_dir: Path, config: Config, which: str, world: World) -> int:
    found: dict[str, object] = {}

    def shards() -> str:
        shard_set = open_shard_set(config.data.shards)
        comparison.check_reference_set(config, shard_set)
        scores.check_counts(config.evaluation, config.evaluation.num_images, shard_set.index.num_samples)
        found["shards"] = shard_set
        complete = "complete" if shard_set.manifest.complete else "not complete, so nothing is called fid"
        return (
            f"{shard_set.manifest.name} {shard_set.manifest.split}, {shard_set.index.num_samples:,} images, {complete}"
        )

    def validation() -> str:
        shard_set = comparison.open_validation_set(config, _need(found, "shards", ShardSet))
        return f"{shard_set.location}, {shard_set.index.num_samples:,} images"

    def extractor() -> str:
        weights = read_weights(config.evaluation) if config.evaluation.features == "inception" else None
        opened = comparison.build_extractor(config, weights, world.device)
        found["extractor"] = opened
        return f"{opened.name}, {opened.kind}, sha256 {opened.sha256[:12]}"

    def statistics() -> str:
        shard_set, opened = _need(found, "shards", ShardSet), _need(found, "extractor", Extractor)
        protocol = reference.protocol_of(shard_set, opened, config.model.resolution)
        path = reference.path_of(protocol, shard_set.location, config.evaluation.reference_dir)
        if reference.look_up(path, protocol) is not None:
            return f"{path}, {shard_set.index.num_samples:,} images"
        return f"{path} is not there yet: {shard_set.index.num_samples:,} images will pass through the extractor first"

    def foreign() -> str:
        shard_set, opened = _need(found, "shards", ShardSet), _need(found, "extractor", Extractor)
        protocol = reference.protocol_of(shard_set, opened, config.model.resolution)
        path = Path(config.evaluation.reference_file or "")
        return reference.read_foreign(path, opened, protocol).warning or f"{path}, the same protocol"

    def generator() -> str:
        if not subject.candidates(run_dir):
            return "there is nothing to score yet; --watch waits for it"
        paths = subject.choose(run_dir, which, config)
        chosen = subject.read(paths[-1], config, _need(found, "shards", ShardSet))
        return f"{len(paths)} to score, the newest {chosen.path}, {chosen.weights} sha256 {chosen.weights_sha256[:12]}"

    def classes() -> str:
        shard_set = _need(found, "shards", ShardSet)
        intra_class.check_classes(config, shard_set)
        return f"{config.evaluation.intra_class_images:,} samples of each of {config.model.num_classes:,}"

    evaluated = config.evaluation
    checks: list[tuple[str, Callable[[], str], bool]] = [
        ("shards", shards, True),
        ("validation", validation, evaluated.validation_shards is not None),
        ("extractor", extractor, True),
        ("reference", statistics, True),
        ("reference file", foreign, evaluated.reference_file is not None),
        ("generator", generator, True),
        ("classes", classes, evaluated.intra_class_images > 0),
        ("memory", lambda: _memory(config, found), True),
        ("disk", lambda: _disk(run_dir), True),
        ("device", lambda: _device(world, config), True),
        ("tracking", lambda: _tracking(config, run_dir), config.tracking.enabled),
    ]
    num_faults = 0
    for name, work, is_wanted in checks:
        if not is_wanted:
            continue
        try:
            text, verdict = work(), "ok"
        except _WarningOnly as warning:
            text, verdict = str(warning), "warn"
        except (ValueError, OSError) as error:
            text, verdict = str(error), "FAIL"
            num_faults += 1
        print(f"{verdict:<4} {name}: {text}", flush=True)
    print(f"{num_faults} fault(s)" if num_faults else "ready", flush=True)
    return num_faults


def _need(found: dict[str, object], name: str, kind: type[T]) -> T:
    """Returns what an earlier check has opened."""
    if not isinstance(value := found.get(name), kind):
        raise EvaluationError(f"not tried, because the check of {name} failed")
    return value


def _memory(config: Config, found: dict[str, object]) -> str:
    """Rank 0 holds logits of all samples, some features and two covariances with their product."""
    extractor = _need(found, "extractor", Extractor)
    rows = 4 * config.evaluation.num_images * _LOGITS + 8 * MAX_KEPT * extractor.num_features
    # Gathered objects exist twice for a while; the square root of the product takes a few more matrices.
    needed = 2 * rows + 8 * 8 * extractor.num_features**2
    free = psutil.virtual_memory().available
    if needed > free:
        raise _WarningOnly(f"rank 0 needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free here")
    return f"rank 0 needs about {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free here"


def _tracking(config: Config, run_dir: Path) -> str:
    try:
        return tracking.check_store(config, run_dir)
    except OSError as error:
        raise _WarningOnly(str(error)) from error


def _disk(run_dir: Path) -> str:
    free = shutil.disk_usage(run_dir).free
    if free < _SMALLEST_DISK_BYTES:
        raise EvaluationError(f"{free / 1e6:.0f} MB are free for {results.directory(run_dir)}; make room")
    return f"{free / 1e9:.1f} GB free for {results.directory(run_dir)}"


def _device(world: World, config: Config) -> str:
    if config.run.device == "cuda" and world.device.type == "cpu":
        raise _WarningOnly("run.device is cuda, but torch sees no CUDA device here: all was tried on the CPU")
    if world.device.type == "cuda":
        return f"{torch.cuda.get_device_name(world.device)}, {world.size} process(es), TF32 off"
    return f"cpu, {world.size} process(es), {torch.get_num_threads()} thread(s) each; Inception: 4 to 6 images/s a core"
