import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.manifest import Adopted, Index, Manifest, Shard, ShardSetError, Skipped, index_faults, open_shard_set

# Two shards of 3 and 2 samples with 512 bytes of header before each image of 100 bytes; blocks of 2, 1 and 2 samples.
INDEX = Index(
    sample_shard=np.array([0, 0, 0, 1, 1], np.int32),
    sample_offset=np.array([512, 1536, 2560, 512, 1536], np.int64),
    sample_size=np.array([100] * 5, np.int32),
    sample_label=np.array([1, 0, 1, 1, 0], np.int32),
    block_shard=np.array([0, 0, 1], np.int32),
    block_start=np.array([0, 2048, 0], np.int64),
    block_stop=np.array([2048, 3072, 2048], np.int64),
    block_first_sample=np.array([0, 2, 3, 5], np.int64),
    block_sha256=np.arange(96, dtype=np.uint8).reshape(3, 32),
)
MANIFEST = Manifest(
    format_version=1,
    name="pets",
    split="train",
    complete=False,
    image_size=8,
    num_samples=5,
    class_names=("cat", "d\u00f6g"),
    class_titles=(),
    class_counts=(2, 3),
    encoding="webp",
    interpolation="lanczos",
    crop="centre",
    exif_orientation="ignored",
    num_enlarged=0,
    pixel_mean=(1.0, 2.0, 3.25),
    pixel_std=(0.5, 0.1, 0.2),
    samples_per_shard=3,
    seed=0,
    limit_per_class=None,
    source="pets.tar",
    source_layout="tar",
    source_images=6,
    source_sha256="ab",
    skipped=(Skipped("cat/1.jpg", "no image"),),
    library_versions={"pillow": "13.0.0"},
    shards=(Shard("shard-000000.tar", 3, 10240, "aa", "bb"), Shard("shard-000001.tar", 2, 10240, "cc", None)),
    index_sha256=hashlib.sha256(INDEX.to_bytes()).hexdigest(),
)


def write(folder: Path, manifest: Manifest = MANIFEST, index: Index = INDEX) -> str:
    (folder / "index.safetensors").write_bytes(index.to_bytes())
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return str(folder)


def test_what_is_written_is_what_is_opened(tmp_path):
    opened = open_shard_set(write(tmp_path))
    assert opened.manifest == MANIFEST
    for field in dataclasses.fields(Index):
        written, read = getattr(INDEX, field.name), getattr(opened.index, field.name)
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)
    assert opened.location == str(tmp_path)
    assert opened.dataset_id == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert (opened.manifest.num_classes, opened.index.num_samples, opened.index.num_blocks) == (2, 5, 3)


def test_bytes_are_the_same_each_time():
    assert INDEX.to_bytes() == dataclasses.replace(INDEX).to_bytes()
    assert MANIFEST.to_bytes() == dataclasses.replace(MANIFEST).to_bytes()


def test_a_folder_without_manifest_is_no_finished_set(tmp_path):
    write(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(
        ShardSetError, match=r"holds no manifest\.json, so it is no finished shard set.*same command again"
    ):
        open_shard_set(str(tmp_path))


def test_a_missing_or_damaged_index_is_named(tmp_path):
    write(tmp_path)
    data = bytearray((tmp_path / "index.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "index.safetensors").write_bytes(data)
    with pytest.raises(ShardSetError, match=rf"index\.safetensors is damaged: expected sha256 {MANIFEST.index_sha256}"):
        open_shard_set(str(tmp_path))
    (tmp_path / "index.safetensors").unlink()
    with pytest.raises(ShardSetError, match=r"lacks index\.safetensors"):
        open_shard_set(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"has format_version 2, this program reads 1"),
        ({"num_samples": "5"}, r"num_samples: Input should be a valid integer"),
        ({"encoding": "gif"}, r"encoding: Input should be 'webp', 'raw'"),
        ({"colour": "red"}, r"colour: Unexpected keyword argument"),
        ({"shards": [{"name": "shard-000000.tar"}]}, r"shards\.0\.samples: Field required"),
    ],
)
def test_an_edited_manifest_is_refused_by_field(tmp_path, change, message):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(MANIFEST.to_bytes()) | change))
    with pytest.raises(ShardSetError, match=message):
        open_shard_set(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format_version": 1', "\x00"])
def test_a_cut_manifest_is_refused(tmp_path, text):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardSetError, match="is no manifest of a shard set"):
        open_shard_set(str(tmp_path))


def changed(name: str, position: int, value: int) -> Index:
    array = getattr(INDEX, name).copy()
    array[position] = value
    return dataclasses.replace(INDEX, **{name: array})


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        (changed("sample_shard", 2, 1), "the samples are not dealt to the shards as the manifest counts them"),
        (changed("sample_label", 0, 0), "the labels do not add up to class_counts"),
        (changed("sample_label", 0, 2), "the labels do not add up to class_counts"),
        (changed("sample_label", 0, -1), "a label is negative"),
        (changed("sample_offset", 2, 1536), "a sample lies outside its block"),
        (changed("sample_size", 1, 513), "a sample lies outside its block"),
        (changed("block_shard", 1, 1), "a sample lies outside its block"),
        (changed("block_shard", 1, 2), "a block lies in no shard"),
        (changed("block_stop", 2, 10241), "a block lies outside its shard"),
        (changed("block_first_sample", 1, 3), "the blocks do not hold each sample once, in order"),
        (changed("block_first_sample", 3, 4), "the blocks do not hold each sample once, in order"),
        (
            dataclasses.replace(INDEX, sample_size=INDEX.sample_size[:4]),
            "sample_size has shape (4,), expected (5,)",
        ),
    ],
)
def test_an_index_that_contradicts_the_manifest_or_itself(tmp_path, index, fault):
    assert fault in index_faults(MANIFEST, index)
    manifest = dataclasses.replace(MANIFEST, index_sha256=hashlib.sha256(index.to_bytes()).hexdigest())
    with pytest.raises(ShardSetError, match="contradicts the manifest: "):
        open_shard_set(write(tmp_path, manifest, index))


def test_counts_of_an_unconditional_set():
    manifest = dataclasses.replace(MANIFEST, class_names=(), class_counts=())
    assert index_faults(manifest, INDEX) == ["there are labels but no class names"]
    assert index_faults(manifest, dataclasses.replace(INDEX, sample_label=np.full(5, -1, np.int32))) == []


def test_other_sample_count_is_a_fault():
    assert index_faults(dataclasses.replace(MANIFEST, num_samples=6), INDEX) == [
        "the manifest counts 6 samples, the index 5"
    ]


def test_an_adopted_set_names_where_its_shards_lie(tmp_path):
    (tmp_path / "set").mkdir()
    for place in (None, "../tars", "s3://bucket/tars"):
        manifest = dataclasses.replace(
            MANIFEST, adopted=Adopted(place, ".cls", {"JPEG": 5}, (1, 2, 3), {"jpg": 5, "cls": 5})
        )
        location = write(tmp_path / "set", manifest)
        if place == "../tars":
            with pytest.raises(ShardSetError, match=r"lie in \.\./tars from there.* no such directory; put them back"):
                open_shard_set(location)
            (tmp_path / "tars").mkdir()
        opened = open_shard_set(location)
        assert opened.manifest == manifest
        expected = {None: location, "../tars": f"{location}/../tars"}.get(place, place)
        assert opened.shards_location == expected


def test_a_built_set_says_nothing_of_adoption():
    """So that its manifest, and with it its id, is the one it had before sets could be adopted."""
    assert b"adopted" not in MANIFEST.to_bytes()
