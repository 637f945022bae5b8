"""One shard that extensions built: its samples, their images and labels, its blocks, in one pass over its bytes.

A sample is what webdataset takes for one: consecutive members whose paths are equal up to the first dot of the base
name, such as `train/0001.jpg`, `train/0001.cls`, `train/0001.txt`.
"""

import hashlib
import json
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, cast

from pipeline import images, object_store, shard_file, tars
from pipeline.manifest import Shard, Skipped
from pipeline.shard_file import ShardRecord, Span
from pipeline.sources import printable
from pipeline.workers import Advance

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "cls", "class_id")  # of .json, tried in samples without .cls
READ_AHEAD_BYTES = 4_000_000


class AdoptError(ValueError):
    """Tars that cannot become a set as they are; the message says which sample of which shard, and the way out."""


@dataclass(frozen=True)
class Reading:
    """How samples are read where that is not plain."""

    image_key: str | None = None  # extension of the image; None: the one of IMAGE_KEYS that a sample has
    label_key: str | None = None  # of .json; None: .cls, else the one of LABEL_KEYS that .json has
    check_images: bool = False  # decodes every image; else its header must be one


@dataclass(frozen=True)
class ForeignShard:
    """A shard to be read; small enough to hand to another process."""

    location: str
    name: str
    size: int  # bytes
    version: str  # is another once the file was replaced
    reading: Reading


@dataclass(frozen=True)
class Found:
    """What one shard holds."""

    record: ShardRecord  # its labels are -1: what they mean is known when all shards are read
    first_key: str  # of its samples, for messages; empty: there are none
    label_source: str | None
    labels: tuple[str, ...]  # as they are written; empty if label_source is None
    first_with: dict[str, str]  # label -> key of its first sample
    formats: Counter[str]
    shorter_sides: tuple[int, ...]  # pixels, of each image
    members: Counter[str]  # by extension; "": outside of any sample

    def sample(self, key: str) -> str:
        """A sample for messages."""
        return f"{self.record.shard.name}: sample {key}"


@dataclass
class _Sample:
    """Consecutive members with one key."""

    key: str
    start: int
    stop: int
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # by extension


class _Window:
    """A shard as a file that is read once from front to back: hashes all, keeps what is not yet forgotten."""

    def __init__(self, shard: ForeignShard, advance: Advance):
        self._shard, self._advance = shard, advance
        self._data, self._start, self._position = bytearray(), 0, 0
        self.sha256 = hashlib.sha256()

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence in (0, 2)
        self._position = offset + (self._shard.size if whence == 2 else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, num_bytes: int) -> bytes:
        stop = min(self._position + num_bytes, self._shard.size)
        data = bytes(self._view(self._position, stop))
        self._position += len(data)
        return data

    def block_sha256(self, start: int, stop: int) -> str:
        return hashlib.sha256(self._view(start, stop)).hexdigest()

    def forget(self, before: int) -> None:
        del self._data[: before - self._start]
        self._start = max(self._start, before)

    def _view(self, start: int, stop: int) -> memoryview:
        assert start >= self._start, (start, self._start)
        while (end := self._start + len(self._data)) < stop:
            ahead = min(max(stop, end + READ_AHEAD_BYTES), self._shard.size)
            chunk = object_store.read_range(self._shard.location, self._shard.name, end, ahead)
            self.sha256.update(chunk)
            self._data += chunk
            self._advance(len(chunk))
        return memoryview(self._data)[start - self._start : max(stop, start) - self._start]


class _Image(NamedTuple):
    """What is known of a sample once its image was looked at."""

    key: str
    span: Span
    format: str
    shorter_side: int
    label_source: str | None
    label: str


def read_shard(shard: ForeignShard, advance: Advance) -> Found:
    """Reads a shard; cuts its blocks as `shard_file.cut_blocks` does, while their bytes are at hand.

    Raises:
        AdoptError: image or label of a sample are left open.
        TarError: cut off, damaged, or no tar archive.
    """
    where = object_store.join(shard.location, shard.name)
    window = _Window(shard, advance)
    found: list[_Image] = []
    skipped: list[Skipped] = []
    extensions: Counter[str] = Counter()
    blocks: list[tuple[int, int, int, str]] = []  # start, stop, samples, sha256
    begun: list[Span] = []  # samples of the block that is not closed yet

    def close_block() -> None:
        start, stop = begun[0].start, begun[-1].stop
        blocks.append((start, stop, len(begun), window.block_sha256(start, stop)))
        begun.clear()

    for sample in _samples(cast(BinaryIO, window), where, extensions):
        try:
            image = _look_at(sample, window, shard.reading, f"{where}: sample {sample.key}")
        except images.UnreadableImage as error:
            skipped.append(Skipped(printable(f"{shard.name}: {sample.key}"), str(error)))
        else:
            found.append(image)
            if image.label_source != found[0].label_source:
                raise AdoptError(
                    f"{where}: sample {image.key} has {in_words(image.label_source)}, sample {found[0].key} has "
                    f"{in_words(found[0].label_source)}; every sample needs its label in the same place, or none "
                    "may have one"
                )
            if begun and image.span.stop - begun[0].start > shard_file.BLOCK_BYTES:
                close_block()
            begun.append(image.span)
        extensions.update(list(sample.members))
        window.forget(begun[0].start if begun else sample.stop)
    if begun:
        close_block()
    record = ShardRecord(
        Shard(shard.name, len(found), shard.size, window.sha256.hexdigest(), None),
        sample_offset=tuple(image.span.offset for image in found),
        sample_size=tuple(image.span.size for image in found),
        sample_label=(-1,) * len(found),
        block_start=tuple(start for start, _, _, _ in blocks),
        block_stop=tuple(stop for _, stop, _, _ in blocks),
        block_samples=tuple(count for _, _, count, _ in blocks),
        block_sha256=tuple(sha256 for _, _, _, sha256 in blocks),
        skipped=tuple(skipped),
        num_enlarged=0,
        pixel_sum=(0, 0, 0),
        pixel_square_sum=(0, 0, 0),
    )
    return Found(
        record,
        first_key=found[0].key if found else "",
        label_source=found[0].label_source if found else None,
        labels=tuple(image.label for image in found if image.label_source),
        first_with={image.label: image.key for image in reversed(found) if image.label_source},
        formats=Counter(image.format for image in found),
        shorter_sides=tuple(image.shorter_side for image in found),
        members=extensions,
    )


def _samples(file: BinaryIO, where: str, extensions: Counter[str]) -> Iterator[_Sample]:
    """Yields the samples of a shard in order; counts members that belong to none."""
    sample: _Sample | None = None
    keys: set[str] = set()
    for member in tars.members(file, where):
        # Keys and extensions as webdataset.tariterators.base_plus_ext and group_by_keys have them.
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
        if not match or member.isdir():
            extensions[""] += member.isreg()
            continue
        key, extension = match[1], printable(match[2].lower())
        if sample is None or key != sample.key:
            if sample:
                yield sample
            if key in keys:
                raise AdoptError(
                    f"{where}: sample {key} comes twice, with others in between; pack the shard again so that the "
                    "members of a sample follow each other and no key is used twice"
                )
            keys.add(key)
            sample = _Sample(key, member.offset, 0)
        if extension in sample.members:
            raise AdoptError(f"{where}: sample {key} has two members .{extension}; pack the shard again without one")
        sample.members[extension] = member
        sample.stop = tars.end_of(member)
    if sample:
        yield sample


def _look_at(sample: _Sample, window: "_Window", reading: Reading, where: str) -> _Image:
    """Image and label of a sample; raises UnreadableImage if it has no image."""
    member = sample.members[_image_key(sample, reading, where)]
    data = _content(window, member)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which the pixels do not depend on
        image = images.open_header(data)
        if reading.check_images:
            images.to_square(images.decode(data), min(image.size))
    span = Span(sample.start, sample.stop, member.offset_data, member.size, -1)
    return _Image(
        sample.key, span, image.format or "unknown", min(image.size), *_label_of(sample, window, reading, where)
    )


def _image_key(sample: _Sample, reading: Reading, where: str) -> str:
    """Extension of a sample's image."""
    if reading.image_key is not None:
        found = [key for key in sample.members if key == reading.image_key]
    else:
        found = [key for key in sample.members if key in IMAGE_KEYS]
    if not found:
        wanted = ", .".join(IMAGE_KEYS if reading.image_key is None else [reading.image_key])
        there = ", .".join(sample.members)
        raise images.UnreadableImage(f"no .{wanted} among its members (.{there})")
    if len(found) > 1:
        raise AdoptError(
            f"{where} has {len(found)} images, .{' and .'.join(sorted(found))}; say which to take, such as "
            f"--image-key {found[0]}"
        )
    return found[0]


def _content(window: _Window, member: tarfile.TarInfo) -> bytes:
    window.seek(member.offset_data)
    return window.read(member.size)


def _label_of(sample: _Sample, window: _Window, reading: Reading, where: str) -> tuple[str | None, str]:
    """Where a sample's label is written, and the label; (None, "") if it has none."""
    if reading.label_key is None and "cls" in sample.members:
        try:
            text = _content(window, sample.members["cls"]).decode().strip()
        except UnicodeDecodeError:
            text = ""
        if not text:
            raise AdoptError(f"{where}: its .cls is empty or no text; it must hold a class, as a number or a name")
        return ".cls", text
    if "json" not in sample.members:
        if reading.label_key is not None:
            raise AdoptError(f"{where} has no .json that could hold --label-key {reading.label_key}")
        return None, ""
    try:
        values = json.loads(_content(window, sample.members["json"]))
    except ValueError as error:
        raise AdoptError(f"{where}: its .json is damaged ({error}); mend it, or leave it out") from error
    values = values if isinstance(values, dict) else {}
    keys = [key for key in LABEL_KEYS if key in values] if reading.label_key is None else [reading.label_key]
    if len(keys) > 1:
        raise AdoptError(f"{where}: its .json has {' and '.join(keys)}; say which is the label, with --label-key KEY")
    if not keys:
        return None, ""
    label = values.get(keys[0])
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
        raise AdoptError(f"{where}: {keys[0]} in its .json is {label!r}; a label must be a whole number or a name")
    return f"{keys[0]} in .json", str(label).strip()


def in_words(label_source: str | None) -> str:
    """Where a label is written, for messages."""
    return "no label" if label_source is None else f"its label in {label_source}"
