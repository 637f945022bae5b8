"""What is in a shard set, for people."""

import math
from itertools import pairwise

import numpy as np

from pipeline.manifest import Manifest, ShardSet


def describe_set(shard_set: ShardSet) -> str:
    """What is in a set, as lines for people."""
    manifest, index = shard_set.manifest, shard_set.index
    total_bytes = sum(shard.bytes for shard in manifest.shards)
    rows = [
        ("set", f"{manifest.name}, split {manifest.split}"),
        ("dataset id", shard_set.dataset_id),
        ("source", f"{manifest.source} ({manifest.source_layout}), {manifest.source_images:,} images"),
        ("images", f"{manifest.num_samples:,}, {_completeness(manifest)}"),
        *_class_rows(shard_set),
        ("pixels", _pixels(manifest)),
        ("encoding", _ENCODINGS[manifest.encoding]),
        *_adopted_rows(shard_set),
        ("shards", f"{len(manifest.shards):,} of {_range([shard.samples for shard in manifest.shards])} images"),
        ("blocks", f"{index.num_blocks:,} of {_range(np.diff(index.block_first_sample).tolist())} images"),
        ("bytes", f"{total_bytes:,}, {total_bytes / manifest.num_samples:,.0f} per image"),
        ("order", f"one permutation of all images, seed {manifest.seed}" if manifest.seed is not None else "as found"),
        ("built with", ", ".join(f"{name} {version}" for name, version in manifest.library_versions.items()) or "-"),
        ("skipped", f"{len(manifest.skipped):,}" if manifest.skipped else "none"),
        *(("", f"{skip.file}: {skip.reason}") for skip in manifest.skipped),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


_ENCODINGS = {
    "webp": "webp, lossless",
    "raw": "raw: KEY.bin is the uint8 pixels in the order row, column, channel (np.frombuffer)",
    "png": "png, lossless",
    "jpeg444": "jpeg, quality 95, 4:4:4 (lossy)",
    "original": "files as they were",
}


def _completeness(manifest: Manifest) -> str:
    if manifest.complete:
        return "the complete set"
    limit = f", at most {manifest.limit_per_class:,} per class" if manifest.limit_per_class is not None else ""
    return f"not the complete set{limit}"


def _pixels(manifest: Manifest) -> str:
    if manifest.image_size is None:
        return "original sizes"
    text = f"{manifest.image_size} x {manifest.image_size}, {manifest.crop}, {manifest.interpolation}"
    text += f", {manifest.num_enlarged:,} enlarged; EXIF orientation {manifest.exif_orientation}"
    if manifest.pixel_mean and manifest.pixel_std:
        mean, std = (
            " ".join(f"{value:.2f}" for value in values) for values in (manifest.pixel_mean, manifest.pixel_std)
        )
        text += f"; RGB mean {mean}, std {std}"
    return text


def _adopted_rows(shard_set: ShardSet) -> list[tuple[str, str]]:
    adopted, index = shard_set.manifest.adopted, shard_set.index
    if adopted is None:
        return []
    in_block = [
        len(np.unique(index.sample_label[first:last])) for first, last in pairwise(index.block_first_sample.tolist())
    ]
    labels = f"in {adopted.label_source}; {_range(in_block)} classes in a block" if adopted.label_source else "none"
    sides = " / ".join(f"{side:,}" for side in adopted.shorter_side)
    return [
        ("formats", f"{in_numbers(adopted.image_formats)}; shorter side {sides} px (min/median/max)"),
        ("labels", labels),
        ("members", in_numbers(adopted.members)),
        ("lie in", shard_set.shards_location),
    ]


def in_numbers(counts: dict[str, int]) -> str:
    """Counts by name, as words."""
    return ", ".join(f"{count:,} {name or '(of no sample)'}" for name, count in counts.items())


def _class_rows(shard_set: ShardSet) -> list[tuple[str, str]]:
    manifest, index = shard_set.manifest, shard_set.index
    if not manifest.num_classes:
        return [("classes", "none (unconditional)")]
    counts = np.array(manifest.class_counts)
    shares = counts[counts > 0] / counts.sum()
    # 1 for equal classes; a single class is as balanced as can be.
    balance = float(-(shares * np.log(shares)).sum() / math.log(len(counts))) if len(counts) > 1 else 1.0
    order = np.argsort(-counts, kind="stable").tolist()
    in_shard = [
        len(np.unique(index.sample_label[index.sample_shard == shard])) for shard in range(len(manifest.shards))
    ]
    return [
        ("classes", f"{len(counts):,}, label 0 is {_class(manifest, 0)}, the last {_class(manifest, len(counts) - 1)}"),
        (
            "balance",
            f"{counts.min():,} / {np.median(counts):,.0f} / {counts.max():,} images per class (min/median/max), "
            f"entropy {balance:.4f} of that of equal classes",
        ),
        ("", f"most: {', '.join(_count(manifest, label) for label in order[:3])}"),
        ("", f"least: {', '.join(_count(manifest, label) for label in order[::-1][:3])}"),
        ("", f"{_range(in_shard)} classes in a shard"),
    ]


def _class(manifest: Manifest, label: int) -> str:
    return f"{manifest.class_names[label]} {manifest.class_titles[label] if manifest.class_titles else ''}".strip()


def _count(manifest: Manifest, label: int) -> str:
    return f"{_class(manifest, label)} {manifest.class_counts[label]:,}"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
