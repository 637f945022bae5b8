"""What a shard set is: its manifest, its index, and how both are read and checked.

A set is a directory, or a prefix of a bucket, that holds

- `shard-000000.tar`, ...: WebDataset tars, per sample `KEY.webp|bin|png|jpg` and, if there are classes, `KEY.cls`;
- `index.safetensors`: where each sample and each block lies (`Index`), so that a reader parses no tar;
- `manifest.json`: what the set is (`Manifest`), written last. Its sha256 is the dataset id.

A set that was adopted (`pipeline.adopt`) has the tars of others, under their own names, beside these files or
elsewhere.

A *sample id* is a row of the index, 0 ... num_samples - 1, in the order of the shards. A *block* is a run of
consecutive samples of one shard, about 4 MB, and the unit in which readers fetch, verify and cache.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pydantic
import safetensors.numpy

from pipeline import object_store

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.safetensors"

Encoding = Literal["webp", "raw", "png", "jpeg444", "original"]


class ShardSetError(ValueError):
    """A shard set is missing, unfinished, damaged or of another version; the message says which and the way out."""


@dataclass(frozen=True)
class Shard:
    """One tar file of a set."""

    name: str  # in the set's directory
    samples: int
    bytes: int
    sha256: str  # of the file
    pixels_sha256: str | None  # of the decoded uint8 pixels (N, H, W, RGB): the same for every lossless encoding


@dataclass(frozen=True)
class Skipped:
    """A source file that is not in the set, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Adopted:
    """What was found in the tars of a set that others built."""

    shards_location: (
        str | None
    )  # s3://bucket/prefix, or a path relative to the set's directory; None: beside the manifest
    label_source: str | None  # the member that holds the labels, such as `.cls` or `label in .json`; None: no labels
    image_formats: dict[str, int]  # images of each format, by content
    shorter_side: tuple[int, int, int]  # pixels: smallest, median and largest of all images
    members: dict[str, int]  # of all samples, by extension; "": files outside of any sample


@dataclass(frozen=True)
class Manifest:
    """All there is to know about a set but where its samples lie. No times and no paths: equal inputs, equal bytes."""

    format_version: int
    name: str
    split: str
    complete: bool  # every image of the source is in the set: none was skipped or over a limit per class
    image_size: int | None  # side of the square images in pixels; None: original sizes, the reader crops and resizes
    num_samples: int
    class_names: tuple[str, ...]  # sorted unless given, the position is the label; empty: no labels (unconditional)
    class_titles: tuple[str, ...]  # what a person calls them, in the same order; empty if unknown
    class_counts: tuple[int, ...]
    encoding: Encoding
    interpolation: str | None  # as are crop and exif_orientation: what was done to the images, in words
    crop: str | None
    exif_orientation: str
    num_enlarged: int  # images of which a square smaller than image_size was taken
    pixel_mean: tuple[float, float, float] | None  # red, green, blue over all pixels, in [0, 255]
    pixel_std: tuple[float, float, float] | None
    samples_per_shard: int | None
    seed: int | None  # of the permutation that dealt the source's images to the shards
    limit_per_class: int | None
    source: str  # base name of the file or folder the set was built from
    source_layout: str
    source_images: int
    source_sha256: str | None  # of the source's list of (file, bytes, label), not of its pixels
    skipped: tuple[Skipped, ...]
    library_versions: dict[str, str]
    shards: tuple[Shard, ...]
    index_sha256: str
    adopted: Adopted | None = None  # None: the set was built

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 for an unconditional set."""
        return len(self.class_names)

    def to_bytes(self) -> bytes:
        """The bytes of manifest.json."""
        values = dataclasses.asdict(self)
        if self.adopted is None:  # a set that was built reads as before there were others
            del values["adopted"]
        return (json.dumps(values, indent=1) + "\n").encode("ascii")


@dataclass(frozen=True, eq=False)
class Index:
    """Where everything lies: N samples, K blocks. Rows follow the order of the shards and of the bytes in a shard."""

    sample_shard: npt.NDArray[np.int32]  # (N,) row of the shard in the manifest
    sample_offset: npt.NDArray[np.int64]  # (N,) first byte of the encoded image in the shard
    sample_size: npt.NDArray[np.int32]  # (N,) bytes of the encoded image
    sample_label: npt.NDArray[np.int32]  # (N,) -1 in an unconditional set
    block_shard: npt.NDArray[np.int32]  # (K,) row of the shard in the manifest
    block_start: npt.NDArray[np.int64]  # (K,) first byte in the shard; tar headers belong to the block of their sample
    block_stop: npt.NDArray[np.int64]  # (K,) one past the last byte
    block_first_sample: npt.NDArray[np.int64]  # (K + 1,) block k holds the samples [k] ... [k + 1] - 1
    block_sha256: npt.NDArray[np.uint8]  # (K, 32) of the bytes block_start ... block_stop - 1

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.sample_shard)

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.block_shard)

    def to_bytes(self) -> bytes:
        """The bytes of index.safetensors."""
        # One metadata key only: safetensors writes several in random order. Arrays that are not contiguous it writes
        # wrongly, without a word.
        return safetensors.numpy.save(
            {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in dataclasses.fields(self)},
            metadata={"format_version": str(FORMAT_VERSION)},
        )


INDEX_DTYPES = {
    "sample_shard": "int32",
    "sample_offset": "int64",
    "sample_size": "int32",
    "sample_label": "int32",
    "block_shard": "int32",
    "block_start": "int64",
    "block_stop": "int64",
    "block_first_sample": "int64",
    "block_sha256": "uint8",
}


@dataclass(frozen=True, eq=False)
class ShardSet:
    """A set that was opened and checked: where it is, what it is, where its samples lie."""

    location: str
    """Directory, or s3://bucket/prefix."""
    manifest: Manifest
    index: Index
    dataset_id: str
    """sha256 of manifest.json, hexadecimal."""

    @property
    def shards_location(self) -> str:
        """Directory, or s3://bucket/prefix, of the shards; `location` but for sets that were adopted from elsewhere."""
        return find_shards(self.location, self.manifest)


def find_shards(location: str, manifest: Manifest) -> str:
    """Where the shards of a set lie.

    Args:
        location: of the set.
        manifest: its manifest.

    Raises:
        ShardSetError: the manifest names a directory that is not there.
    """
    elsewhere = manifest.adopted.shards_location if manifest.adopted else None
    if elsewhere is None or object_store.is_remote(elsewhere):
        return elsewhere or location
    found = os.path.join(location, elsewhere)
    if object_store.is_remote(location) or not os.path.isdir(found):
        raise ShardSetError(
            f"the shards of {location} lie in {elsewhere} from there, by its manifest, and there is no such directory; "
            "put them back, or run `python launch/shards.py index` on the directory where they are now"
        )
    return found


def parse_manifest(data: bytes, location: str) -> Manifest:
    """Reads manifest.json; another format version, a missing, unknown or mistyped field is a ShardSetError."""
    where = object_store.join(location, MANIFEST_NAME)
    try:
        version = json.loads(data)["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardSetError(f"{where} is no manifest of a shard set ({error!r}); build the set again") from None
    if version != FORMAT_VERSION:
        raise ShardSetError(
            f"{where} has format_version {version}, this program reads {FORMAT_VERSION}; "
            "build the set again, or use the version of this program that wrote it"
        )
    try:
        return pydantic.TypeAdapter(Manifest).validate_json(data, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(key) for key in fault['loc'])}: {fault['msg']}" for fault in error.errors())
        raise ShardSetError(f"{where} is damaged or was edited ({faults}); build the set again") from None


def parse_index(data: bytes, manifest: Manifest, location: str) -> Index:
    """Reads index.safetensors, checked against the manifest.

    Raises:
        ShardSetError: other bytes than the manifest names, or rows that contradict it or each other.
    """
    where = object_store.join(location, INDEX_NAME)
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.index_sha256:
        raise ShardSetError(
            f"{where} is damaged: expected sha256 {manifest.index_sha256}, got {found} ({len(data)} bytes); "
            "copy it again from where it was built, or build the set again"
        )
    try:
        arrays = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ShardSetError(f"{where} is no safetensors file ({error}); build the set again") from None
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    if dtypes != INDEX_DTYPES:
        raise ShardSetError(f"{where} holds {dtypes}, expected {INDEX_DTYPES}; build the set again")
    index = Index(**arrays)
    faults = index_faults(manifest, index)
    if faults:
        raise ShardSetError(f"{where} contradicts the manifest: {'; '.join(faults)}; build the set again")
    return index


def index_faults(manifest: Manifest, index: Index) -> list[str]:
    """Every way in which manifest and index contradict each other or themselves; empty if all is well."""
    num_samples, num_blocks, num_shards = index.num_samples, index.num_blocks, len(manifest.shards)
    lengths = {
        "sample_offset": (num_samples,),
        "sample_size": (num_samples,),
        "sample_label": (num_samples,),
        "block_start": (num_blocks,),
        "block_stop": (num_blocks,),
        "block_first_sample": (num_blocks + 1,),
        "block_sha256": (num_blocks, 32),
    }
    shapes = [
        f"{name} has shape {getattr(index, name).shape}, expected {shape}"
        for name, shape in lengths.items()
        if getattr(index, name).shape != shape
    ]
    if shapes or manifest.num_samples != num_samples:
        return [*shapes, f"the manifest counts {manifest.num_samples} samples, the index {num_samples}"]
    samples_per_shard = np.array([shard.samples for shard in manifest.shards], np.int64)
    if not np.array_equal(index.sample_shard, np.repeat(np.arange(num_shards), samples_per_shard)):
        return ["the samples are not dealt to the shards as the manifest counts them"]
    faults = []
    if manifest.num_classes and index.sample_label.min(initial=0) < 0:
        faults.append("a label is negative")
    elif manifest.num_classes:
        counts = np.bincount(index.sample_label, minlength=manifest.num_classes)
        if counts.tolist() != list(manifest.class_counts):
            faults.append("the labels do not add up to class_counts")
    elif (index.sample_label != -1).any():
        faults.append("there are labels but no class names")
    block_samples = np.diff(index.block_first_sample)
    if ((index.block_shard < 0) | (index.block_shard >= num_shards)).any():
        return [*faults, "a block lies in no shard"]
    if (block_samples < 1).any() or index.block_first_sample[0] != 0 or index.block_first_sample[-1] != num_samples:
        return [*faults, "the blocks do not hold each sample once, in order"]
    sample_block = np.repeat(np.arange(num_blocks), block_samples)
    sample_stop = index.sample_offset + index.sample_size
    if (
        not np.array_equal(index.block_shard[sample_block], index.sample_shard)
        or (index.sample_offset < index.block_start[sample_block]).any()
        or (sample_stop > index.block_stop[sample_block]).any()
    ):
        faults.append("a sample lies outside its block")
    shard_bytes = np.array([shard.bytes for shard in manifest.shards], np.int64)
    if (index.block_start < 0).any() or (index.block_stop > shard_bytes[index.block_shard]).any():
        faults.append("a block lies outside its shard")
    return faults


def open_shard_set(location: str) -> ShardSet:
    """Opens a set: reads and checks manifest and index, but not the shards (readers check each block as they use it).

    Args:
        location: directory, or s3://bucket/prefix.

    Raises:
        ShardSetError: no finished set there, damaged, of another version, or not to be reached.
    """
    try:
        return _open(location)
    except (OSError, object_store.LocationError) as error:
        raise ShardSetError(str(error)) from error


def _open(location: str) -> ShardSet:
    if not object_store.exists(location, MANIFEST_NAME):
        raise ShardSetError(
            f"{location} holds no {MANIFEST_NAME}, so it is no finished shard set; check the path, or make it with "
            "`python launch/shards.py build` (the same command again finishes a build that was interrupted); "
            "for WebDataset tars that others built, `python launch/shards.py index` makes one"
        )
    data = object_store.read_bytes(location, MANIFEST_NAME)
    manifest = parse_manifest(data, location)
    if not object_store.exists(location, INDEX_NAME):
        raise ShardSetError(f"{location} lacks {INDEX_NAME}; copy it from where the set was built, or build it again")
    index = parse_index(object_store.read_bytes(location, INDEX_NAME), manifest, location)
    find_shards(location, manifest)  # or tells that they are gone
    return ShardSet(location, manifest, index, hashlib.sha256(data).hexdigest())
