"""One shard: written from images, and read back as the samples and blocks an index is made of."""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pydantic

from pipeline import images, tars
from pipeline.manifest import Encoding, Shard, Skipped
from pipeline.sources import Source, printable
from pipeline.workers import Advance

BLOCK_BYTES = 4_000_000  # a block is the unit of fetch, verification and cache; larger only for one larger image
PART = ".part"  # ends the name of a file that is still being written


class Span(NamedTuple):
    """Where a sample lies in its shard: bytes [start, stop) with headers and padding, the image's own; its label."""

    start: int
    stop: int
    offset: int
    size: int
    label: int


@dataclass(frozen=True)
class ShardTask:
    """One shard to be built; small enough to hand to another process."""

    location: str  # of the set
    directory: Path  # where the file is written: the set's, or a scratch directory if that is in object storage
    name: str
    first_key: int
    source: Source  # this shard's images only, in order
    image_size: int
    crop: int | None  # side of the square cut out of each image, in its pixels; None: its shorter side
    encoding: Encoding


@dataclass(frozen=True)
class ShardRecord:
    """What publishing a set needs to know of a finished shard; lies beside it as JSON until then."""

    shard: Shard
    sample_offset: tuple[int, ...]
    sample_size: tuple[int, ...]
    sample_label: tuple[int, ...]
    block_start: tuple[int, ...]
    block_stop: tuple[int, ...]
    block_samples: tuple[int, ...]
    block_sha256: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    num_enlarged: int
    pixel_sum: tuple[int, int, int]
    pixel_square_sum: tuple[int, int, int]

    def to_bytes(self) -> bytes:
        """The bytes of its JSON file."""
        return json.dumps(dataclasses.asdict(self)).encode()


def record_name(shard_name: str) -> str:
    """Name of the file that holds a shard's record."""
    return f"{shard_name.removesuffix('.tar')}.json"


def parse_record(data: bytes) -> ShardRecord | None:
    """Reads a record; None if it is not one, whole."""
    try:
        return pydantic.TypeAdapter(ShardRecord).validate_json(data, strict=True)
    except pydantic.ValidationError:
        return None


def build_shard(task: ShardTask, advance: Advance) -> tuple[ShardRecord, bool]:
    """Builds one shard, or keeps the one that is there if its bytes are those its record names.

    An image's KEY is its place in the set's order, so a skipped image leaves a gap and moves no other.

    Returns:
        Its record, and whether it was kept.
    """
    record = _finished(task)
    if record is not None:
        advance(len(task.source))
        return record, True
    path = task.directory / task.name
    remove_half_written(path)
    with _published(path) as file:
        pixels = _write_samples(file, task, advance)
        record = _describe(file, task, pixels)
    write_file(path.with_name(record_name(task.name)), record.to_bytes())
    return record, False


def remove_half_written(shard: Path) -> None:
    """Removes what killed builds left of a shard and its record; those of other shards may still be written."""
    for left_over in shard.parent.glob(f"{shard.stem}.*{PART}"):
        left_over.unlink(missing_ok=True)


def read_spans(file: BinaryIO, what: str) -> list[Span]:
    """Reads where the samples of a shard lie from its tar headers.

    Raises:
        TarError: cut off, damaged, or not a shard of ours.
    """
    spans: list[Span] = []
    key = ""
    for member in tars.members(file, what):
        member_key, _, extension = member.name.partition(".")
        if extension in images.EXTENSIONS.values():
            key = member_key
            spans.append(Span(member.offset, tars.end_of(member), member.offset_data, member.size, -1))
        elif extension == "cls" and spans and member_key == key:
            file.seek(member.offset_data)
            label = file.read(member.size)
            if not label.isdigit():
                raise tars.TarError(f"{what}: {member.name} holds {label!r}, which is no label")
            spans[-1] = spans[-1]._replace(stop=tars.end_of(member), label=int(label))
        else:
            raise tars.TarError(f"{what}: {member.name} is no image of a shard, nor the label of the one before it")
    return spans


def cut_blocks(spans: list[Span]) -> list[tuple[int, int]]:
    """Cuts samples into runs [first, last) of at most BLOCK_BYTES, or of one sample."""
    cuts = [0]
    for row, span in enumerate(spans):
        if row > cuts[-1] and span.stop - spans[cuts[-1]].start > BLOCK_BYTES:
            cuts.append(row)
    return list(zip(cuts, [*cuts[1:], len(spans)], strict=True)) if spans else []


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and durably."""
    with _published(path) as file:
        file.write(data)


def create_file(path: Path, data: bytes) -> None:
    """Writes a file as `write_file` does, unless there is one: of several processes that do so at once, one wins."""
    with _published(path, _link) as file:
        file.write(data)


def _link(part: Path, path: Path) -> None:
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # no hard links on this disk, which then is none that nodes share
        os.replace(part, path)
    part.unlink(missing_ok=True)


@contextlib.contextmanager
def _published(path: Path, publish: Callable[[Path, Path], None] = os.replace) -> Iterator[BinaryIO]:
    """A file to write under another name, which gets its own once it is whole and on the disk."""
    # No two processes on any node write the same file, whatever happens.
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PART}")
    try:
        with open(part, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass
class _Pixels:
    """What is gathered of the pixels while a shard is written."""

    sha256: "hashlib._Hash"
    histogram: npt.NDArray[np.int64]  # (3, 256) pixels of each value of red, green, blue
    skipped: list[Skipped]
    num_enlarged: int = 0


def _write_samples(file: BinaryIO, task: ShardTask, advance: Advance) -> _Pixels:
    found = _Pixels(hashlib.sha256(), np.zeros((3, 256), np.int64), [])
    extension = images.EXTENSIONS[task.encoding]
    labels = task.source.labels.tolist()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which the pixels do not depend on
        for row, data in enumerate(task.source.read_all()):
            advance(1)
            try:
                image = images.decode(data)
                pixels = images.to_square(image, task.image_size, task.crop)
            except images.UnreadableImage as error:
                found.skipped.append(Skipped(printable(task.source.files[row]), str(error)))
                continue
            encoded = images.encode(pixels, task.encoding)
            if task.encoding == "jpeg444":
                pixels = images.to_square(images.decode(encoded), task.image_size)
            key = f"{task.first_key + row:09d}"
            _add(tar, f"{key}.{extension}", encoded)
            if labels[row] >= 0:
                _add(tar, f"{key}.cls", str(labels[row]).encode())
            found.sha256.update(pixels.tobytes())
            found.histogram += images.histogram(pixels)
            found.num_enlarged += (task.crop or min(image.size)) < task.image_size
    return found


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mode 644; owner, group and time are 0
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def _describe(file: BinaryIO, task: ShardTask, pixels: _Pixels) -> ShardRecord:
    """Reads back what was written, so that the index holds what the shard does."""
    spans = read_spans(file, task.name)
    blocks = cut_blocks(spans)
    assert len(spans) + len(pixels.skipped) == len(task.source)
    ranges = [(spans[first].start, spans[last - 1].stop) for first, last in blocks]
    block_sha256 = []
    for start, stop in ranges:
        file.seek(start)
        block_sha256.append(hashlib.sha256(file.read(stop - start)).hexdigest())
    file.seek(0)
    values = np.arange(256)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # any binary file will do
    return ShardRecord(
        Shard(task.name, len(spans), file.tell(), sha256, pixels.sha256.hexdigest()),
        sample_offset=tuple(span.offset for span in spans),
        sample_size=tuple(span.size for span in spans),
        sample_label=tuple(span.label for span in spans),
        block_start=tuple(start for start, _ in ranges),
        block_stop=tuple(stop for _, stop in ranges),
        block_samples=tuple(last - first for first, last in blocks),
        block_sha256=tuple(block_sha256),
        skipped=tuple(pixels.skipped),
        num_enlarged=pixels.num_enlarged,
        pixel_sum=tuple((pixels.histogram @ values).tolist()),
        pixel_square_sum=tuple((pixels.histogram @ values**2).tolist()),
    )


def _finished(task: ShardTask) -> ShardRecord | None:
    """The record of a shard that is there whole; None if there is none, or it is not what its record says."""
    path = task.directory / task.name
    with contextlib.suppress(FileNotFoundError):
        record = parse_record(path.with_name(record_name(task.name)).read_bytes())
        with open(path, "rb") as file:
            if record and hashlib.file_digest(file, "sha256").hexdigest() == record.shard.sha256:
                return record
    return None
