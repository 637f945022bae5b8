"""Checks a shard set again from its bytes, and reports every fault, not the first only."""

import hashlib
import threading
from io import BytesIO

import numpy as np

from pipeline import object_store
from pipeline.bar import Bar
from pipeline.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Index,
    Manifest,
    ShardSetError,
    find_shards,
    parse_index,
    parse_manifest,
)
from pipeline.shard_file import read_spans
from pipeline.tars import TarError, members
from pipeline.workers import Advance, in_threads

_END_MARK = bytes(1024)


def verify(location: str, workers: int = 8) -> list[str]:
    """Re-hashes manifest, index, every block and every shard, and reads every sample's header and label again.

    Args:
        location: directory or s3://bucket/prefix.
        workers: shards read at once, by threads: hashing and reading leave the interpreter to others.

    Returns:
        The faults in words, in the order of the shards; empty for a sound set.

    Raises:
        ShardSetError: no manifest that could be checked against.
    """
    if not object_store.exists(location, MANIFEST_NAME):
        raise ShardSetError(f"{location} holds no {MANIFEST_NAME}, so it is no finished shard set; check the path")
    manifest = parse_manifest(object_store.read_bytes(location, MANIFEST_NAME), location)
    faults, index = [], None
    try:
        index = parse_index(object_store.read_bytes(location, INDEX_NAME), manifest, location)
    except (ShardSetError, OSError) as error:
        faults.append(f"{error} (blocks and samples cannot be checked without it)")
    shards_location = find_shards(location, manifest)
    expected = {shard.name for shard in manifest.shards}
    faults += [
        f"{name}: is no shard of this set, but a reader of shard-*.tar would take it for one; remove it"
        for name in object_store.list_names(shards_location)
        if name.endswith(".tar") and name not in expected
    ]
    with Bar(sum(shard.bytes for shard in manifest.shards), "verifying", "B", in_bytes=True) as bar:
        lock = threading.Lock()

        def advance(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        def check(row: int) -> list[str]:
            try:
                return _shard_faults(shards_location, manifest, index, row, advance)
            except OSError as error:
                return [str(error)]

        for found in in_threads(check, range(len(manifest.shards)), workers):
            faults += found
    return faults


def _shard_faults(location: str, manifest: Manifest, index: Index | None, row: int, advance: Advance) -> list[str]:
    shard = manifest.shards[row]
    size = object_store.size(location, shard.name)
    if size != shard.bytes:
        return [f"{shard.name}: expected {shard.bytes} bytes, got {size}; copy it again"]
    faults, position, whole = [], 0, hashlib.sha256()
    for block in np.flatnonzero(index.block_shard == row).tolist() if index else []:
        assert index is not None
        start, stop = int(index.block_start[block]), int(index.block_stop[block])
        whole.update(object_store.read_range(location, shard.name, position, start))
        data = object_store.read_range(location, shard.name, start, stop)
        whole.update(data)
        advance(stop - position)
        position = stop
        first, last = index.block_first_sample[block : block + 2].tolist()
        where = f"{shard.name}: block {block}, bytes {start}-{stop}, samples {first}-{last - 1}"
        expected, got = index.block_sha256[block].tobytes().hex(), hashlib.sha256(data).hexdigest()
        if got != expected:
            faults.append(f"{where}: expected sha256 {expected}, got {got}; copy the shard again")
        else:
            faults += [f"{where}: {fault}" for fault in _sample_faults(data, index, block, manifest)]
    while position < size:
        stop = min(position + 4_000_000, size)
        whole.update(object_store.read_range(location, shard.name, position, stop))
        advance(stop - position)
        position = stop
    if whole.hexdigest() != shard.sha256 and not faults:
        faults.append(f"{shard.name}: expected sha256 {shard.sha256}, got {whole.hexdigest()}; copy it again")
    return faults


def _sample_faults(block_bytes: bytes, index: Index, block: int, manifest: Manifest) -> list[str]:
    """Compares a block's tar members with the index; only a set that was made wrong can fail here.

    In the tars of others labels may be written in many ways: there only the places of the images are compared.
    """
    samples = slice(*index.block_first_sample[block : block + 2].tolist())
    places = zip(index.sample_offset[samples] - index.block_start[block], index.sample_size[samples], strict=True)
    labels = index.sample_label[samples].tolist()
    file, what = BytesIO(block_bytes + _END_MARK), "its tar members"
    try:
        if manifest.adopted:
            is_sound = set(places) <= {(member.offset_data, member.size) for member in members(file, what)}
        else:
            spans = read_spans(file, what)
            is_sound = [(span.offset, span.size) for span in spans] == list(places)
            is_sound &= [span.label for span in spans] == labels
    except TarError as error:
        return [str(error)]
    return [] if is_sound else ["its tar members are not those of the index; build the set again"]
