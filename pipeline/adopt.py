"""Adopts WebDataset tars that others built: reads each once and writes the index and the manifest that they lack.

The tars stay as they are and where they are. Their images keep their sizes; readers crop and resize them.
"""

import hashlib
import itertools
import os
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from pipeline import images, object_store, publish, s3, s3_store, shards
from pipeline.bar import Bar
from pipeline.foreign_shard import AdoptError, ForeignShard, Found, Reading, in_words, read_shard
from pipeline.ground_truth import read_classes
from pipeline.kept_shards import KeptShards
from pipeline.manifest import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    Adopted,
    Manifest,
    ShardSet,
    find_shards,
    index_faults,
    open_shard_set,
    parse_manifest,
)
from pipeline.shard_file import PART, write_file
from pipeline.sources import printable
from pipeline.workers import run

LAYOUT = "WebDataset tars of others"


@dataclass(frozen=True)
class AdoptReport:
    """What indexing did, for people."""

    shard_set: ShardSet
    was_there: bool  # the same index was there already
    other_files: dict[str, int]  # files beside the tars, by extension
    seconds: float


def adopt(
    location: str,
    output: str | None = None,
    *,
    reading: Reading | None = None,
    class_file: Path | None = None,
    split: str | None = None,
    complete: bool = False,
    max_skipped: int = 0,
    workers: int = 1,
) -> AdoptReport:
    """Writes index and manifest of the tars at a location; the result does not depend on `workers`.

    What was read of whole shards stays until the set is made, so that the same call goes on where one was interrupted.

    Args:
        location: directory, or s3://bucket/prefix, of the tars.
        output: where index and manifest go; None: beside the tars.
        reading: which members are image and label.
        class_file: lines `CLASS title`, in the order of the labels; None: the classes are those found, sorted.
        split: name of the part of the data set; None: train, val or test where the location says so, else all.
        complete: whether the tars hold every image of that split, which they cannot tell.
        max_skipped: so many samples may lack a readable image; the manifest lists them.
        workers: processes, each with a shard.

    Raises:
        AdoptError: tars that leave image or label of a sample open, too many bad samples, or another set at `output`.
        TarError: a tar that is cut off or damaged.
        LabelError: a class file that is none.
        OSError: reading or writing failed.
    """
    classes = read_classes(class_file) if class_file else None
    names, others = _list(location)
    with ThreadPoolExecutor(16) as pool:
        files = list(pool.map(lambda name: object_store.size_and_version(location, name), names))
    output = location if output is None else output
    elsewhere = _from_output(location, output)
    if not object_store.is_remote(output):
        _check_writable(output)
    tasks = [
        ForeignShard(location, name, size, version, reading or Reading())
        for name, (size, version) in zip(names, files, strict=True)
    ]
    there = _what_is_there(output, [(task.name, task.size) for task in tasks])
    found, seconds = _read(tasks, KeptShards(output) if there is None else None, max_skipped, workers)
    label_of, class_names, titles = _labels(found, classes, class_file)
    records = [replace(one.record, sample_label=_ids(one, label_of)) for one in found]
    index = publish.index_of(records)
    if not index.num_samples:
        raise AdoptError(f"the {len(names)} tar(s) at {location} hold no image; are they WebDataset tars of images?")
    skipped = tuple(skip for record in records for skip in record.skipped)
    name, found_split = shards.name_and_split(_source_path(location))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        split=split or found_split,
        complete=complete and not skipped,
        image_size=None,
        num_samples=index.num_samples,
        class_names=class_names,
        class_titles=titles,
        class_counts=tuple(np.bincount(index.sample_label, minlength=len(class_names)).tolist()) if class_names else (),
        encoding="original",
        interpolation=None,
        crop=None,
        exif_orientation=images.EXIF_ORIENTATION,
        num_enlarged=0,
        pixel_mean=None,
        pixel_std=None,
        samples_per_shard=None,
        seed=None,
        limit_per_class=None,
        source=printable(_source_path(location).name),
        source_layout=LAYOUT,
        source_images=index.num_samples + len(skipped),
        source_sha256=None,
        skipped=skipped,
        library_versions={},  # none has touched the pixels
        shards=tuple(record.shard for record in records),
        index_sha256=hashlib.sha256(index.to_bytes()).hexdigest(),
        adopted=_summary(found, elsewhere),
    )
    faults = index_faults(manifest, index)
    assert not faults, faults
    if there is None:
        _write(output, INDEX_NAME, index.to_bytes())
        _write(output, MANIFEST_NAME, manifest.to_bytes())
        KeptShards(output).remove()
    elif there != manifest:
        changes = [item.name for item in fields(Manifest) if getattr(there, item.name) != getattr(manifest, item.name)]
        raise _other_set(output, f"{', '.join(changes)} differ")
    return AdoptReport(open_shard_set(output), there is not None, others, seconds)


def _read(
    tasks: list[ForeignShard], kept: KeptShards | None, max_skipped: int, workers: int
) -> tuple[list[Found], float]:
    """What each shard holds, in order, and the seconds that took; a set that is there already is read anew.

    Raises:
        AdoptError: as `adopt`.
    """
    earlier = {task.name: one for task in tasks if kept and (one := kept.find(task))}
    left = {task.name: task for task in tasks if task.name not in earlier}
    if earlier:
        print(f"{len(earlier):,} of {len(tasks):,} shard(s) were read by an earlier run", file=sys.stderr)
    found: list[Found] = []
    what, num_bytes = f"indexing {_source_path(tasks[0].location).name}", sum(task.size for task in left.values())
    with (
        Bar(num_bytes, what, "B", in_bytes=True) as bar,
        closing(run(read_shard, iter(left.values()), workers, bar)) as results,
    ):
        for one in itertools.chain(earlier.values(), results):
            if kept and one.record.shard.name in left:
                kept.keep(left[one.record.shard.name], one)
            found.append(one)
            _check_alike(found)
            _check_skipped(found, max_skipped)
        return sorted(found, key=lambda one: one.record.shard.name), bar.format_dict["elapsed"]


def _source_path(location: str) -> Path:
    """A path whose last parts name the set."""
    if not object_store.is_remote(location):
        return Path(os.path.abspath(location))
    where = s3_store.parse(location)
    return Path("/", where.bucket, where.prefix)


def _list(location: str) -> tuple[list[str], dict[str, int]]:
    """Names of the tars, and what else lies beside them by extension."""
    files = [name for name in object_store.list_names(location) if name not in (INDEX_NAME, MANIFEST_NAME)]
    names = [name for name in files if name.endswith(".tar")]
    others = Counter(os.path.splitext(name)[1] or name for name in files if not name.endswith((".tar", PART)))
    if names:
        return names, dict(sorted(others.items()))
    compressed = [name for name in files if re.search(r"\.(tgz|tar\.\w+)$", name)]
    hint = (
        f"{compressed[0]} is compressed, so that its samples cannot be read in place: decompress it"
        if compressed
        else "give the directory or prefix in which they lie themselves, not one above it"
    )
    raise AdoptError(f"{location} holds no .tar ({len(files)} other file(s)); {hint}")


def _from_output(location: str, output: str) -> str | None:
    """How the manifest says where the tars lie."""
    remote, output_remote = object_store.is_remote(location), object_store.is_remote(output)
    if output_remote and not remote:
        raise AdoptError(
            f"--output {output} is in object storage, but the tars at {location} are on this machine only; copy them "
            "there as well and index them there, or choose a directory"
        )
    if remote:
        same = output_remote and s3_store.parse(location) == s3_store.parse(output)
        return None if same else location
    relative = os.path.relpath(os.path.realpath(location), os.path.realpath(output))
    return None if relative == "." else relative


def _check_writable(output: str) -> None:
    """Finds out before the tars are read, which may take hours, that nothing could be written."""
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"probe{PART}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise AdoptError(
            f"{output} cannot be written ({error.strerror}); name another directory for index and manifest with "
            "--output DIR"
        ) from error


def _what_is_there(output: str, files: list[tuple[str, int]]) -> Manifest | None:
    """The manifest of the finished set at `output`, which may be no other set than that of these tars."""
    if not object_store.exists(output, MANIFEST_NAME):
        return None
    manifest = parse_manifest(object_store.read_bytes(output, MANIFEST_NAME), output)
    if manifest.adopted is None:
        raise _other_set(output, "it was built, and has its index")
    if [(shard.name, shard.bytes) for shard in manifest.shards] != files:
        raise _other_set(output, "names or sizes of its shards differ")
    find_shards(output, manifest)
    return manifest


def _other_set(output: str, why: str) -> AdoptError:
    return AdoptError(
        f"{output} holds the manifest of another set ({why}); choose another --output, or remove "
        f"{MANIFEST_NAME} and {INDEX_NAME} there if no run needs them"
    )


def _write(location: str, name: str, data: bytes) -> None:
    if not object_store.is_remote(location):
        write_file(Path(location, name), data)
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        s3.upload(location, name, Path(file.name), hashlib.sha256(data).hexdigest(), lambda _: None)


def _check_alike(found: list[Found]) -> None:
    """All samples have their label in the same member, or none has one; checked as the last shard comes in."""
    other = found[-1]
    first = next((one for one in found if one.first_key), other)
    if other.first_key and first.label_source != other.label_source:
        raise AdoptError(
            f"{first.sample(first.first_key)} has {in_words(first.label_source)}, "
            f"{other.sample(other.first_key)} has {in_words(other.label_source)}; "
            "every sample needs its label in the same place, or none may have one"
        )


def _check_skipped(found: list[Found], max_skipped: int) -> None:
    skipped = [skip for one in found for skip in one.record.skipped]
    if len(skipped) > max_skipped:
        raise AdoptError(
            f"{len(skipped)} sample(s) have no readable image (so far), --max-skipped allows {max_skipped}:\n"
            + publish.skipped_lines(skipped)
            + "Run the same command with a larger --max-skipped: the manifest then lists what is left out"
        )


Classes = tuple[tuple[str, ...], tuple[str, ...]]  # names and titles


def _labels(found: list[Found], classes: Classes | None, class_file: Path | None) -> tuple[dict[str, int], *Classes]:
    """What each written label means, the names of the classes and their titles."""
    where = {label: one.sample(key) for one in reversed(found) for label, key in one.first_with.items()}
    if not where:
        if classes:
            raise AdoptError(
                f"--class-names {class_file} is given, but no sample has a label, neither .cls nor a key of .json; "
                "leave it out for an unconditional set, or name the key of .json with --label-key"
            )
        return {}, (), ()
    for label in sorted(where):
        if re.fullmatch(r"-\d+", label):
            raise AdoptError(
                f"{where[label]} has the label {label}, but labels count from 0; if it stands for `unknown`, "
                "leave such samples, or all labels, out of the tars"
            )
    if classes:
        return _labels_of_file(where, classes[0], class_file), *classes
    numbers = {label: int(label) for label in where if _is_number(label)}
    if numbers and len(numbers) < len(where):
        number, name = min(numbers), min(where.keys() - numbers)
        raise AdoptError(
            f"{where[number]} has the label {number}, {where[name]} has {name}; which class a number is, beside names, "
            "cannot be told: give --class-names FILE"
        )
    values: list[int] | list[str] = sorted(set(numbers.values())) if numbers else sorted(where)
    place = {value: label for label, value in enumerate(values)}
    return {label: place[numbers.get(label, label)] for label in where}, tuple(map(str, values)), ()


def _labels_of_file(where: dict[str, str], names: tuple[str, ...], class_file: Path | None) -> dict[str, int]:
    """Labels that are all names of the file, or all numbers of its lines, counted from 0."""
    place = {name: label for label, name in enumerate(names)}
    strangers = sorted(label for label in where if label not in place)
    if not strangers:
        return {label: place[label] for label in where}
    if not all(map(_is_number, where)):
        raise AdoptError(
            f"{where[strangers[0]]} has the label {strangers[0]}, which is no class of --class-names {class_file} "
            f"({names[0]}, ..., {names[-1]}); it needs a line `CLASS title` for each"
        )
    beyond = [label for label in strangers if int(label) >= len(names)]
    if beyond:
        raise AdoptError(
            f"{where[beyond[0]]} has the label {beyond[0]}, but --class-names {class_file} has {len(names)} classes, "
            f"0 to {len(names) - 1}; give the file of all classes"
        )
    return {label: int(label) for label in where}


def _ids(found: Found, label_of: dict[str, int]) -> tuple[int, ...]:
    return tuple(label_of[label] for label in found.labels) or found.record.sample_label


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _summary(found: list[Found], elsewhere: str | None) -> Adopted:
    sides = sorted(side for one in found for side in one.shorter_sides)
    formats: Counter[str] = sum((one.formats for one in found), Counter())
    members: Counter[str] = sum((one.members for one in found), Counter())
    return Adopted(
        elsewhere,
        next((one.label_source for one in found if one.first_key), None),
        dict(sorted(formats.items())),
        (sides[0], sides[len(sides) // 2], sides[-1]),
        dict(sorted(members.items())),
    )
