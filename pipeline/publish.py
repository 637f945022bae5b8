"""The end of a build: finished shards and their records become a set, index first, manifest last."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline import object_store
from pipeline.build_files import BuildError, clean, find_plan, find_records, num_shards, write
from pipeline.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Index,
    Manifest,
    ShardSet,
    Skipped,
    index_faults,
    open_shard_set,
)
from pipeline.shard_file import ShardRecord

Channels = tuple[float, float, float]

# An archive of a known name that holds fewer is a part of the set, whatever it calls itself.
PUBLISHED_IMAGES = {"ILSVRC2012_img_train": 1_281_167, "ILSVRC2012_img_val": 50_000}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    shard_set: ShardSet
    was_there: bool  # published before, so nothing was done


def merge(location: str, max_skipped: int = 0) -> MergeReport:
    """Makes a set of shards that were built in parts; needs no source. Does nothing if that was done before.

    Args:
        location: directory or s3://bucket/prefix that the parts were built into.
        max_skipped: so many images may be unreadable, in all parts together; the manifest lists them.

    Raises:
        BuildError: no build there, shards that are missing, or too many images that cannot be read.
        OSError: reading or writing failed; the same command goes on from there.
    """
    was_there = object_store.exists(location, MANIFEST_NAME)
    if not was_there:
        planned = find_plan(location)
        if planned is None:
            raise BuildError(f"{location} holds no set and no build of one; check the path, or begin with `build`")
        found = find_records(planned, location)
        missing = [number for number, record in enumerate(found) if record is None]
        if missing:
            raise BuildError(_how_to_make(missing, num_shards(planned), location))
        records = [record for record in found if record is not None]
        check_skipped(records, planned.num_samples, max_skipped)
        publish(planned, records, location)
    shard_set = open_shard_set(location)
    clean(location)
    return MergeReport(shard_set, was_there)


def _how_to_make(missing: list[int], total: int, location: str) -> str:
    """Names the shards, and the parts of the smallest N that are these shards and no others."""
    for parts in range(1, total + 1):
        numbers = sorted({number % parts for number in missing})
        if sum(len(range(number, total, parts)) for number in numbers) == len(missing):
            break
    what = f"{len(missing):,} of {total:,} shards of {location} are missing or not of the size that was built"
    part = f"--parts {parts} --part {numbers[0]}" if parts > 1 else "no --part"
    more = f" (and so on: {ranges(numbers)}, which is also how sbatch --array takes them)" if len(numbers) > 1 else ""
    return (
        f"{what}: {ranges(missing)}. To make them, run the build command again with {part}{more}, "
        "or without --part, which makes all that is missing and needs no merge"
    )


def ranges(numbers: list[int]) -> str:
    """Sorted numbers in short: 0-2,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def skipped_lines(skipped: Sequence[Skipped]) -> str:
    """The first of the images that cannot be read, a line each."""
    lines = [f"  {skip.file}: {skip.reason}\n" for skip in skipped[:20]]
    more = f"  ... and {len(skipped) - len(lines)} more\n" if len(skipped) > len(lines) else ""
    return "".join(lines) + more


def check_skipped(records: list[ShardRecord], total: int, max_skipped: int) -> None:
    """Raises a BuildError that lists the unreadable images if there are more than `max_skipped`."""
    skipped = [skip for record in records for skip in record.skipped]
    if len(skipped) > max_skipped:
        raise BuildError(
            f"{len(skipped)} of {total:,} images cannot be read (so far), --max-skipped allows {max_skipped}:\n"
            + skipped_lines(skipped)
            + "Mend or remove them in the source and build it anew, or run the same command with a larger "
            "--max-skipped: it goes on from here, and the manifest lists what is missing"
        )


def publish(planned: Manifest, records: list[ShardRecord], location: str) -> None:
    """Writes index and manifest of a set whose shards are all there, in the order of their records."""
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
    write(location, INDEX_NAME, index.to_bytes())
    write(location, MANIFEST_NAME, manifest.to_bytes())


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
