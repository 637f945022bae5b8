import dataclasses
import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import object_store, shard_file, shards
from pipeline.manifest import ShardSetError, open_shard_set
from pipeline.sources import list_source
from pipeline.verify import verify


@pytest.fixture
def location(tmp_path, monkeypatch) -> Path:
    """A set of 2 classes, 3 shards of 8 samples, 2 blocks each."""
    generator = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / f"tree/class{label}").mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"tree/class{label}/{number:02d}.png")
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 11_000)
    plan = shards.plan(list_source(tmp_path / "tree"), image_size=16, samples_per_shard=8)
    (tmp_path / "set").mkdir()
    assert shards.build(plan, tmp_path / "set").shard_set.index.num_blocks == 6
    return tmp_path / "set"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_sound_set_has_no_faults(location):
    assert verify(str(location)) == []


@pytest.mark.parametrize("position", [3, 600, 12_345])  # header, payload, and the second block
def test_a_flipped_bit_names_shard_block_and_samples(location, position):
    index = open_shard_set(str(location)).index
    flip(location / "shard-000001.tar", position)
    in_shard = np.flatnonzero(index.block_shard == 1)
    block = in_shard[np.searchsorted(index.block_stop[in_shard], position, side="right")]
    first, last = index.block_first_sample[block], index.block_first_sample[block + 1] - 1
    (fault,) = verify(str(location))
    assert fault.startswith(
        f"shard-000001.tar: block {block}, bytes {index.block_start[block]}-{index.block_stop[block]}, "
        f"samples {first}-{last}: expected sha256 {index.block_sha256[block].tobytes().hex()}, got "
    )


def test_a_flipped_bit_behind_the_last_block_is_found(location):
    flip(location / "shard-000002.tar", -1)
    (fault,) = verify(str(location))
    assert fault.startswith("shard-000002.tar: expected sha256 ")


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_every_fault_is_reported_at_once(location, workers):
    flip(location / "shard-000000.tar", 600)
    flip(location / "shard-000000.tar", 12_345)
    (location / "shard-000001.tar").unlink()
    shard = (location / "shard-000002.tar").read_bytes()
    (location / "shard-000002.tar").write_bytes(shard[:-512])
    (location / "shard-000003.tar").write_bytes(shard)
    faults = verify(str(location), workers)
    assert [fault.split(":")[0].split("/")[-1] for fault in faults] == [
        "shard-000003.tar",
        "shard-000000.tar",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]
    assert "is no shard of this set" in faults[0]
    assert "shard-000001.tar: not found" in faults[3]
    assert f"expected {len(shard)} bytes, got {len(shard) - 512}" in faults[4]


def test_faults_come_in_the_order_of_the_shards_and_several_are_read_at_once(location, monkeypatch):
    """Each waits for the two others."""
    read_range, others = object_store.read_range, threading.Barrier(3, timeout=30)
    for shard in range(3):
        flip(location / f"shard-{shard:06d}.tar", 600)

    def slow(location, name, start, stop):
        if start == 0 and stop > 0:
            others.wait()
        return read_range(location, name, start, stop)

    monkeypatch.setattr(object_store, "read_range", slow)
    assert [fault[:12] for fault in verify(str(location), 3)] == ["shard-000000", "shard-000001", "shard-000002"]


def test_without_a_sound_index_the_shards_are_checked_still(location):
    flip(location / "index.safetensors", -1)
    flip(location / "shard-000001.tar", 600)
    faults = verify(str(location))
    assert "index.safetensors is damaged: expected sha256" in faults[0]
    assert "cannot be checked without it" in faults[0]
    assert [fault.split(":")[0] for fault in faults[1:]] == ["shard-000001.tar"]
    (location / "index.safetensors").unlink()
    assert "index.safetensors: not found" in verify(str(location))[0]


def test_an_index_that_tells_other_labels_than_the_shards_is_found(location):
    """All hashes fit: only the labels in the tars can tell."""
    shard_set = open_shard_set(str(location))
    index = dataclasses.replace(shard_set.index, sample_label=1 - shard_set.index.sample_label)
    manifest = dataclasses.replace(shard_set.manifest, index_sha256=hashlib.sha256(index.to_bytes()).hexdigest())
    (location / "index.safetensors").write_bytes(index.to_bytes())
    (location / "manifest.json").write_bytes(manifest.to_bytes())
    faults = verify(str(location))
    assert len(faults) == 6
    assert "its tar members are not those of the index" in faults[0]


def test_no_set(tmp_path):
    with pytest.raises(ShardSetError, match=r"holds no manifest\.json"):
        verify(str(tmp_path))
