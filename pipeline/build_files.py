"""What a build keeps at its destination until the set is published: its plan, and a record beside each finished shard.

The destination is a directory or s3://bucket/prefix. Several processes on several nodes may build one set there at
once. They agree by its plan, which the first of them writes, and each shard is made by one of them.
"""

import re
from dataclasses import fields
from pathlib import Path

from pipeline import object_store, s3_writes
from pipeline.bar import Bar
from pipeline.manifest import MANIFEST_NAME, Manifest, ShardSetError, parse_manifest
from pipeline.send import File, is_there
from pipeline.shard_file import ShardRecord, create_file, parse_record, record_name, write_file
from pipeline.workers import in_threads

PLAN_NAME = "build.json"
_THREADS = 16  # for many small requests
_HALF_WRITTEN = re.compile(r"(shard-\d+\.(tar|json)|build\.json|index\.safetensors|manifest\.json|probe)\.\w+\.part")
_RECORD = re.compile(r"shard-\d+\.json")
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


class BuildError(ValueError):
    """A build that cannot start or go on; the message says why and the way out."""


def shard_name(number: int) -> str:
    """Name of the shard of this number, from 0."""
    return f"shard-{number:06d}.tar"


def num_shards(planned: Manifest) -> int:
    """How many shards the set of a plan has."""
    assert planned.samples_per_shard is not None
    return -(-planned.num_samples // planned.samples_per_shard)


def claim(planned: Manifest, location: str) -> None:
    """Makes a destination this build's, which must be empty or hold the same plan.

    Raises:
        BuildError: It holds the plan of another set, or files that are no build of ours.
    """
    found = find_plan(location)
    if found is None:
        strangers = [name for name in _entries(location) if not _HALF_WRITTEN.fullmatch(name)]
        found = find_plan(location)  # another process may have begun since
        if found is None and strangers:
            raise BuildError(
                f"{location} holds {len(strangers)} file(s) that are no build of ours, such as {strangers[0]}; "
                "choose a new or empty --destination"
            )
    if found is None:
        _create(location, PLAN_NAME, planned.to_bytes())
        found = find_plan(location)  # of whoever was first
    changes = differences(found, planned) if found else [f"its {PLAN_NAME} was removed meanwhile"]
    if changes:
        raise BuildError(
            f"{location} holds an unfinished build of another set ({'; '.join(changes)}); "
            "finish it with its own options, choose another --destination, or remove it"
        )


def find_plan(location: str) -> Manifest | None:
    """The plan of the unfinished build at a destination; None if there is none."""
    try:
        return parse_manifest(object_store.read_bytes(location, PLAN_NAME), location)
    except FileNotFoundError:
        return None
    except ShardSetError as error:
        address = object_store.join(location, PLAN_NAME)
        raise BuildError(f"{address} is no plan of a build ({error}); remove it, or choose another place") from error


def differences(found: Manifest, wanted: Manifest) -> list[str]:
    """What differs between the plans of two sets, in words."""
    changes = []
    for name in (field.name for field in fields(Manifest) if field.name not in _RESULTS):
        there, now = getattr(found, name), getattr(wanted, name)
        if there != now:
            long = isinstance(now, tuple) or name == "source_sha256"
            changes.append(f"{name} differs" if long else f"{name} is {there} there and {now} now")
    return changes


def find_record(location: str, name: str) -> ShardRecord | None:
    """The record of a finished shard; None without one, or if the shard is not there or not of the bytes it names.

    In a directory their number is compared, in object storage the sha256 that the shard was sent with, too.
    """
    try:
        record = parse_record(object_store.read_bytes(location, record_name(name)))
        if record is None:
            return None
        if object_store.is_remote(location):
            return record if is_there(location, File(name, record.shard.bytes, record.shard.sha256)) else None
        return record if object_store.size(location, name) == record.shard.bytes else None
    except FileNotFoundError:
        return None


def find_records(planned: Manifest, location: str) -> list[ShardRecord | None]:
    """What `find_record` says of each shard of a plan, in order."""
    total = num_shards(planned)
    with Bar(total, "checking", "shards") as bar:
        found = []
        for record in in_threads(lambda number: find_record(location, shard_name(number)), range(total), _THREADS):
            found.append(record)
            bar.update()
    return found


def missing_shards(planned: Manifest, location: str) -> list[int]:
    """Numbers of the shards that are not finished yet, by the names at the destination."""
    names = set(object_store.list_names(location))
    if MANIFEST_NAME in names:  # published since
        return []
    wanted = ((number, shard_name(number)) for number in range(num_shards(planned)))
    return [number for number, name in wanted if not {name, record_name(name)} <= names]


def write(location: str, name: str, data: bytes) -> None:
    """Writes a small file whole or not at all."""
    if object_store.is_remote(location):
        s3_writes.put(location, name, data)
    else:
        write_file(Path(location, name), data)


def remove(location: str, name: str) -> None:
    """Removes a file; one that is not there is no error."""
    if object_store.is_remote(location):
        s3_writes.remove(location, name)
    else:
        Path(location, name).unlink(missing_ok=True)


def clean(location: str) -> None:
    """Removes what only an unfinished build needs."""
    names = object_store.list_names(location)
    doomed = [name for name in names if _RECORD.fullmatch(name) or _HALF_WRITTEN.fullmatch(name)]
    doomed += [name for name in names if name == PLAN_NAME]
    list(in_threads(lambda name: remove(location, name), doomed, _THREADS))


def _create(location: str, name: str, data: bytes) -> None:
    """Writes a small file unless there is one of this name."""
    if object_store.is_remote(location):
        s3_writes.create(location, name, data)
    else:
        create_file(Path(location, name), data)


def _entries(location: str) -> list[str]:
    if object_store.is_remote(location):
        return object_store.list_names(location)
    return sorted(path.name for path in Path(location).iterdir())
