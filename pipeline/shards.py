"""Builds shard sets, in a directory or in object storage.

A build is three steps: `plan` (what goes where), `shard_file.build_shard` for each shard (any order, any process, any
node), and publishing (index, then manifest). Between them the destination holds the plan (`build.json`, a manifest
without results) and a record beside each finished shard; with both, a build that was killed goes on where it was, and
parts that were built apart are merged.
"""

import contextlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import images, object_store
from pipeline.bar import Bar
from pipeline.build_files import (
    BuildError as BuildError,
)
from pipeline.build_files import (
    claim,
    clean,
    differences,
    missing_shards,
    num_shards,
    remove,
    shard_name,
    write,
)
from pipeline.manifest import FORMAT_VERSION, MANIFEST_NAME, Encoding, Manifest, ShardSet, open_shard_set
from pipeline.publish import check_skipped, publish
from pipeline.remote_build import build_and_send, scratch_directory
from pipeline.shard_file import PART, ShardRecord, ShardTask, build_shard
from pipeline.sources import Source, printable
from pipeline.workers import run


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a set."""

    manifest: Manifest  # still without results; num_samples counts the images to build
    source: Source
    order: npt.NDArray[np.int64]  # (places,) row of the source for each place in the set
    crop: int | None = None  # side of the square cut out of each image, in its pixels; None: its shorter side

    def tasks(self, location: str, directory: Path, numbers: Iterable[int]) -> Iterator[ShardTask]:
        """Yields the shards of these numbers to build, in order."""
        image_size, encoding = self.manifest.image_size, self.manifest.encoding
        assert image_size is not None
        for number in numbers:
            first, rows = self._rows(number)
            source = self.source.select(rows)
            yield ShardTask(location, directory, shard_name(number), first, source, image_size, self.crop, encoding)

    def num_images(self, numbers: Iterable[int]) -> int:
        """How many images the shards of these numbers are made of."""
        return sum(len(self._rows(number)[1]) for number in numbers)

    def _rows(self, number: int) -> tuple[int, npt.NDArray[np.int64]]:
        size = self.manifest.samples_per_shard
        assert size is not None
        return number * size, self.order[number * size : (number + 1) * size]


@dataclass(frozen=True)
class BuildReport:
    """What a build did, for people."""

    shard_set: ShardSet
    was_there: bool  # finished before, so nothing was done
    built_images: int
    built_shards: int
    kept_shards: int  # finished by an earlier, interrupted run, or by a part
    seconds: float


@dataclass(frozen=True)
class PartReport:
    """What the build of a part did, for people."""

    was_there: bool  # the whole set was finished before, so nothing was done
    built_images: int
    built_shards: int
    kept_shards: int  # of this part; finished by an earlier, interrupted run
    num_shards: int  # of the set
    missing: tuple[int, ...]  # numbers of the set's shards that no part has finished yet
    seconds: float


def plan(
    source: Source,
    *,
    image_size: int,
    encoding: Encoding = "webp",
    samples_per_shard: int = 2048,
    seed: int = 0,
    limit_per_class: int | None = None,
    split: str | None = None,
    crop: int | None = None,
) -> Plan:
    """Decides which image of the source goes where: one seeded permutation, so that every shard is a fair sample.

    Args:
        source: what `sources.list_source` found.
        image_size: side of the square images in pixels.
        encoding: how their pixels are stored; all but jpeg444 are lossless.
        samples_per_shard: images per shard; the last shard may hold fewer.
        seed: of the permutation.
        limit_per_class: take at most so many images of each class, the first in the permutation.
        split: name of the part of the data set; None: train, val or test where the source's name says so, else all.
        crop: side of the square cut out of the middle of each image, in its pixels; None: its shorter side.
    """
    assert min(image_size, samples_per_shard) > 0
    assert limit_per_class is None or limit_per_class > 0
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(source))
    if limit_per_class is not None:
        order = order[_rank_in_class(source.labels[order]) < limit_per_class]
    name, found_split = name_and_split(source.location)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        split=split or found_split,
        complete=False,
        image_size=image_size,
        num_samples=len(order),
        class_names=source.class_names,
        class_titles=source.class_titles,
        class_counts=(),
        encoding=encoding,
        interpolation=images.INTERPOLATION,
        crop=images.describe_crop(crop),
        exif_orientation=images.EXIF_ORIENTATION,
        num_enlarged=0,
        pixel_mean=None,
        pixel_std=None,
        samples_per_shard=samples_per_shard,
        seed=seed,
        limit_per_class=limit_per_class,
        source=printable(os.path.basename(os.path.abspath(source.location))),
        source_layout=source.layout,
        source_images=len(source),
        source_sha256=source.sha256(),
        skipped=(),
        library_versions=images.library_versions(),
        shards=(),
        index_sha256="",
    )
    return Plan(manifest, source, order, crop)


def _rank_in_class(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """How many earlier elements have the same label."""
    by_label = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_label], labels[by_label])
    ranks = np.empty(len(labels), np.int64)
    ranks[by_label] = np.arange(len(labels)) - first
    return ranks


def name_and_split(location: Path) -> tuple[str, str]:
    """(ILSVRC2012_img_train, train) of ILSVRC2012_img_train.tar; (imagenet, train) of imagenet/train/."""
    location = Path(os.path.abspath(location))
    name = printable(location.name.removesuffix(".tar"))
    found = re.search(r"(?<![a-z])(train|val|test)(?![a-z])", name.lower())
    split = found[1] if found else "all"
    return (printable(location.parent.name) if name.lower() == split else name), split


def check_destination(destination: str, source: Path, scratch: Path | None = None) -> None:
    """Finds out before the source is listed, which may take minutes, that nothing could be written.

    Raises:
        BuildError: neither a directory nor s3://bucket/prefix, not writable, or inside the source.
        OSError: the store does not take it.
    """
    if object_store.is_remote(destination):
        probe = f"probe.{secrets.token_hex(8)}{PART}"
        write(destination, probe, b"can this be written and removed?")
        remove(destination, probe)
        if scratch is not None:
            _check_directory("--scratch", scratch, source)
    elif "://" in destination:
        raise BuildError(f"--destination {destination} is neither a directory nor s3://bucket/prefix")
    elif scratch is not None:
        raise BuildError(f"--scratch {scratch} is for builds into s3://; a directory is written in place: leave it out")
    else:
        _check_directory("--destination", Path(destination), source)


def _check_directory(option: str, path: Path, source: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BuildError(f"{option} {path} cannot be written ({error.strerror}); choose another") from error
    if path.resolve().is_relative_to(source.resolve()):
        raise BuildError(f"{option} {path} lies inside --source {source}; choose a directory outside of it")


def check_part(part: int | None, parts: int | None) -> None:
    """Refuses a part that is none of 0 ... parts - 1."""
    if (part is None) != (parts is None):
        given, other = ("--part", "--parts") if parts is None else ("--parts", "--part")
        raise BuildError(f"{given} needs {other}: --part I --parts N builds part I of N, I from 0 to N - 1")
    if part is not None and parts is not None and not 0 <= part < parts:
        raise BuildError(
            f"--part must be from 0 to {parts - 1} with --parts {parts}, got {part}; "
            f"a job array counts so with --array=0-{parts - 1}"
        )


def build(
    plan: Plan, destination: str | Path, *, workers: int = 1, max_skipped: int = 0, scratch: Path | None = None
) -> BuildReport:
    """Builds a set, or finishes the build of it that was interrupted; does nothing if it is there already.

    Args:
        plan: what to build.
        destination: directory or s3://bucket/prefix that is empty or holds this very build.
        workers: processes; the bytes of the set do not depend on it.
        max_skipped: so many images may be unreadable; the manifest lists them.
        scratch: for a build into object storage: shards lie in a directory in this one until they are sent; None: that
            for temporary files. The same again goes on with those that were not.

    Raises:
        BuildError: the destination holds something else, or too many images cannot be read.
        OSError: reading or writing failed. What is finished stays, and the same command goes on from there.
    """
    started, location = time.perf_counter(), str(destination)
    was_there, made = _is_published(plan, location), _Made()
    if not was_there:
        claim(plan.manifest, location)
        numbers = range(num_shards(plan.manifest))
        made = _build_shards(plan, location, numbers, workers, max_skipped, scratch)
        publish(plan.manifest, made.records, location)
    shard_set = open_shard_set(location)
    clean(location)
    seconds = time.perf_counter() - started
    return BuildReport(shard_set, was_there, made.built_images, made.built_shards, made.kept_shards, seconds)


def build_part(
    plan: Plan,
    destination: str | Path,
    part: int,
    parts: int,
    *,
    workers: int = 1,
    max_skipped: int = 0,
    scratch: Path | None = None,
) -> PartReport:
    """Builds the shards whose number modulo `parts` is `part`; `publish.merge` makes the set once all are there.

    Other parts may be built at the same time, on other nodes. Arguments and errors are those of `build`; `max_skipped`
    counts the images of this part only, as it knows of no others.
    """
    check_part(part, parts)
    started, location, total = time.perf_counter(), str(destination), num_shards(plan.manifest)
    was_there, made = _is_published(plan, location), _Made()
    missing: list[int] = []
    if not was_there:
        claim(plan.manifest, location)
        made = _build_shards(plan, location, range(part, total, parts), workers, max_skipped, scratch)
        missing = missing_shards(plan.manifest, location)
    seconds = time.perf_counter() - started
    return PartReport(was_there, made.built_images, made.built_shards, made.kept_shards, total, tuple(missing), seconds)


def _is_published(plan: Plan, location: str) -> bool:
    """Whether the destination holds the finished set of this plan; another finished set is an error."""
    if not object_store.exists(location, MANIFEST_NAME):
        return False
    found = open_shard_set(location).manifest
    # A finished set stays what it is when libraries are updated.
    changes = differences(replace(found, library_versions=plan.manifest.library_versions), plan.manifest)
    if changes:
        raise BuildError(
            f"{location} holds another set ({'; '.join(changes)}); choose another --destination, or remove that set"
        )
    return True


@dataclass
class _Made:
    """What became of some shards."""

    records: list[ShardRecord] = field(default_factory=list)
    built_images: int = 0
    built_shards: int = 0
    kept_shards: int = 0


def _build_shards(
    plan: Plan, location: str, numbers: range, workers: int, max_skipped: int, scratch: Path | None
) -> _Made:
    remote = object_store.is_remote(location)
    directory = scratch_directory(plan.manifest, location, scratch) if remote else Path(location)
    directory.mkdir(parents=True, exist_ok=True)
    work = build_and_send if remote else build_shard
    made, total = _Made(), plan.num_images(numbers)
    with (
        Bar(total, f"building {plan.manifest.name}", "images") as bar,
        closing(run(work, plan.tasks(location, directory, numbers), workers, bar)) as results,
    ):
        for record, was_kept in results:
            made.records.append(record)
            made.built_images += 0 if was_kept else record.shard.samples
            made.built_shards += not was_kept
            made.kept_shards += was_kept
            check_skipped(made.records, total, max_skipped)
    made.records.sort(key=lambda record: record.shard.name)
    if remote:
        with contextlib.suppress(OSError):  # another part works there still
            directory.rmdir()
    return made
