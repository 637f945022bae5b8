"""Builds shard sets.

A build is three steps: `plan` (what goes where), `shard_file.build_shard` for each shard (any order, any process), and
publishing (index, then manifest). Between them the destination holds the plan (`build.json`, a manifest without
results) and a record beside each finished shard; with both, a build that was killed goes on where it was.
"""

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import images
from pipeline.bar import Bar
from pipeline.manifest import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    Encoding,
    Index,
    Manifest,
    ShardSet,
    index_faults,
    open_shard_set,
    parse_manifest,
)
from pipeline.shard_file import PART, ShardRecord, ShardTask, build_shard, write_file
from pipeline.sources import Source, printable
from pipeline.workers import run

PLAN_NAME = "build.json"
Channels = tuple[float, float, float]
_RESULTS = {  # the fields of a manifest that its plan does not decide
    "complete",
    "num_samples",
    "class_counts",
    "num_enlarged",
    "pixel_mean",
    "pixel_std",
    "skipped",
    "shards",
    "index_sha256",
}


# An archive of a known name that holds fewer is a part of the set, whatever it calls itself.
PUBLISHED_IMAGES = {"ILSVRC2012_img_train": 1_281_167, "ILSVRC2012_img_val": 50_000}


class BuildError(ValueError):
    """A build that cannot start or go on; the message says why and the way out."""


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a set."""

    manifest: Manifest  # still without results
    source: Source
    order: npt.NDArray[np.int64]  # (places,) row of the source for each place in the set

    def tasks(self, destination: Path) -> Iterator[ShardTask]:
        """Yields the shards to build, in order."""
        image_size, samples_per_shard = self.manifest.image_size, self.manifest.samples_per_shard
        assert image_size is not None
        assert samples_per_shard is not None
        for shard, first in enumerate(range(0, len(self.order), samples_per_shard)):
            source = self.source.select(self.order[first : first + samples_per_shard])
            yield ShardTask(destination, f"shard-{shard:06d}.tar", first, source, image_size, self.manifest.encoding)


@dataclass(frozen=True)
class BuildReport:
    """What a build did, for people."""

    shard_set: ShardSet
    was_there: bool  # finished before, so nothing was done
    built_images: int
    built_shards: int
    kept_shards: int  # finished by an earlier, interrupted run
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
        num_samples=0,
        class_names=source.class_names,
        class_titles=source.class_titles,
        class_counts=(),
        encoding=encoding,
        interpolation=images.INTERPOLATION,
        crop=images.CROP,
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
    return Plan(manifest, source, order)


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


def check_destination(destination: str, source: Path) -> Path:
    """Finds out before the source is listed, which may take minutes, that nothing could be written.

    Raises:
        BuildError: a URL, no directory, not writable, or inside the source.
    """
    if "://" in destination:
        raise BuildError(f"--destination {destination} is no local directory; build into one and copy the set")
    path = Path(destination)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"probe{PART}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BuildError(f"--destination {destination} cannot be written ({error.strerror}); choose another") from error
    if path.resolve().is_relative_to(source.resolve()):
        raise BuildError(f"--destination {destination} lies inside --source {source}; choose a directory outside of it")
    return path


def build(plan: Plan, destination: Path, *, workers: int = 1, max_skipped: int = 0) -> BuildReport:
    """Builds a set, or finishes the build of it that was interrupted; does nothing if it is there already.

    Args:
        plan: what to build.
        destination: directory that is empty or holds this very build.
        workers: processes; the bytes of the set do not depend on it.
        max_skipped: so many images may be unreadable; the manifest lists them.

    Raises:
        BuildError: the destination holds something else, or too many images cannot be read.
        OSError: reading or writing failed. What is finished stays, and the same command goes on from there.
    """
    started = time.perf_counter()
    records: list[ShardRecord] = []
    built_images = built_shards = 0
    was_there = _is_published(plan, destination)
    if not was_there:
        _claim(plan, destination)
        total = len(plan.order)
        with (
            Bar(total, f"building {destination.name}", "images") as bar,
            closing(run(build_shard, plan.tasks(destination), workers, bar)) as results,
        ):
            for record, was_kept in results:
                records.append(record)
                built_images += 0 if was_kept else record.shard.samples
                built_shards += not was_kept
                _check_skipped(records, total, max_skipped)
        records.sort(key=lambda record: record.shard.name)
        _publish(plan.manifest, records, destination)
    _clean(destination)
    seconds = time.perf_counter() - started
    shard_set = open_shard_set(str(destination))
    return BuildReport(shard_set, was_there, built_images, built_shards, len(records) - built_shards, seconds)


def _is_published(plan: Plan, destination: Path) -> bool:
    """Whether the destination holds the finished set of this plan; another finished set is an error."""
    if not (destination / MANIFEST_NAME).exists():
        return False
    found = open_shard_set(str(destination)).manifest
    # A finished set stays what it is when libraries are updated.
    changes = _differences(replace(found, library_versions=plan.manifest.library_versions), plan.manifest)
    if changes:
        raise BuildError(
            f"{destination} holds another set ({'; '.join(changes)}); choose another --destination, or remove that set"
        )
    return True


def _claim(plan: Plan, destination: Path) -> None:
    """Makes the destination this build's, which must be empty or hold the same plan; removes half-written files."""
    plan_file = destination / PLAN_NAME
    for left_over in destination.glob(f"*{PART}"):
        left_over.unlink(missing_ok=True)
    if plan_file.exists():
        changes = _differences(parse_manifest(plan_file.read_bytes(), str(plan_file)), plan.manifest)
        if changes:
            raise BuildError(
                f"{destination} holds an unfinished build of another set ({'; '.join(changes)}); "
                "finish it with its own options, choose another --destination, or remove it"
            )
        return
    strangers = sorted(path.name for path in destination.iterdir())
    if strangers:
        raise BuildError(
            f"{destination} holds {len(strangers)} file(s) that are no build of ours, such as {strangers[0]}; "
            "choose a new or empty --destination"
        )
    write_file(plan_file, plan.manifest.to_bytes())


def _differences(found: Manifest, wanted: Manifest) -> list[str]:
    """What differs between the plans of two sets, in words."""
    changes = []
    for name in (field.name for field in fields(Manifest) if field.name not in _RESULTS):
        there, now = getattr(found, name), getattr(wanted, name)
        if there != now:
            long = isinstance(now, tuple) or name == "source_sha256"
            changes.append(f"{name} differs" if long else f"{name} is {there} there and {now} now")
    return changes


def _check_skipped(records: list[ShardRecord], total: int, max_skipped: int) -> None:
    skipped = [skip for record in records for skip in record.skipped]
    if len(skipped) > max_skipped:
        lines = [f"  {skip.file}: {skip.reason}" for skip in skipped[:20]]
        if len(skipped) > len(lines):
            lines.append(f"  ... and {len(skipped) - len(lines)} more")
        raise BuildError(
            f"{len(skipped)} of {total:,} images cannot be read (so far), --max-skipped allows {max_skipped}:\n"
            + "\n".join(lines)
            + "\nMend or remove them in the source and build it anew, or run the same command with a larger "
            "--max-skipped: it goes on from here, and the manifest lists what is missing"
        )


def _publish(planned: Manifest, records: list[ShardRecord], destination: Path) -> None:
    """Writes index and manifest of a set whose shards are all there."""
    index = index_of(records)
    if not index.num_samples:
        raise BuildError(
            f"none of the {planned.source_images} images of {planned.source} can be read; is it the right one?"
        )
    skipped = sorted((skip for record in records for skip in record.skipped), key=lambda skip: skip.file)
    counts = np.bincount(index.sample_label, minlength=planned.num_classes) if planned.num_classes else ()
    mean, std = _mean_and_std(planned, records, index.num_samples)
    manifest = replace(
        planned,
        complete=index.num_samples == PUBLISHED_IMAGES.get(planned.name, planned.source_images),
        num_samples=index.num_samples,
        class_counts=tuple(int(count) for count in counts),
        num_enlarged=sum(record.num_enlarged for record in records),
        pixel_mean=mean,
        pixel_std=std,
        skipped=tuple(skipped),
        shards=tuple(record.shard for record in records),
        index_sha256=hashlib.sha256(index.to_bytes()).hexdigest(),
    )
    faults = index_faults(manifest, index)
    assert not faults, faults
    write_file(destination / INDEX_NAME, index.to_bytes())
    write_file(destination / MANIFEST_NAME, manifest.to_bytes())


def index_of(records: list[ShardRecord]) -> Index:
    """The index of the set that these shards make, in order."""

    def joined(name: str) -> list[int]:
        return [value for record in records for value in getattr(record, name)]

    shards = np.arange(len(records), dtype=np.int32)
    sha256 = b"".join(bytes.fromhex(sha256) for record in records for sha256 in record.block_sha256)
    return Index(
        sample_shard=np.repeat(shards, [record.shard.samples for record in records]),
        sample_offset=np.array(joined("sample_offset"), np.int64),
        sample_size=np.array(joined("sample_size"), np.int32),
        sample_label=np.array(joined("sample_label"), np.int32),
        block_shard=np.repeat(shards, [len(record.block_start) for record in records]),
        block_start=np.array(joined("block_start"), np.int64),
        block_stop=np.array(joined("block_stop"), np.int64),
        block_first_sample=np.cumsum([0, *joined("block_samples")], dtype=np.int64),
        block_sha256=np.frombuffer(sha256, np.uint8).reshape(-1, 32),
    )


def _mean_and_std(planned: Manifest, records: list[ShardRecord], num_samples: int) -> tuple[Channels, Channels]:
    """Per channel over all pixels, from integer sums, so that the order of the shards does not matter."""
    assert planned.image_size is not None
    num_pixels = num_samples * planned.image_size**2
    sums = [sum(record.pixel_sum[channel] for record in records) for channel in range(3)]
    square_sums = [sum(record.pixel_square_sum[channel] for record in records) for channel in range(3)]
    variances = [
        (num_pixels * square_sum - value**2) / num_pixels**2
        for value, square_sum in zip(sums, square_sums, strict=True)
    ]
    red, green, blue = (value / num_pixels for value in sums)
    red_std, green_std, blue_std = (math.sqrt(variance) for variance in variances)
    return (red, green, blue), (red_std, green_std, blue_std)


def _clean(destination: Path) -> None:
    """Removes what only an unfinished build needs."""
    for pattern in (PLAN_NAME, "shard-*.json", f"*{PART}"):
        for path in destination.glob(pattern):
            path.unlink(missing_ok=True)
