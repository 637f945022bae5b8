"""The local side of the object store: exact answers, and failures that name the file."""

import pytest

from pipeline import object_store


@pytest.fixture
def location(tmp_path):
    (tmp_path / "b.tar").write_bytes(bytes(range(100)))
    (tmp_path / "a.json").write_bytes(b"{}")
    (tmp_path / "folder").mkdir()
    return str(tmp_path)


def test_reads_whole_files_and_ranges(location):
    assert object_store.read_bytes(location, "b.tar") == bytes(range(100))
    assert object_store.read_range(location, "b.tar", 10, 13) == bytes([10, 11, 12])
    assert object_store.read_range(location, "b.tar", 100, 100) == b""
    assert object_store.read_ranges(location, "b.tar", [(99, 100), (0, 2)]) == [bytes([99]), bytes([0, 1])]


def test_tells_what_is_there(location):
    assert object_store.list_names(location) == ["a.json", "b.tar"]  # files only, sorted
    assert object_store.exists(location, "b.tar")
    assert not object_store.exists(location, "c.tar")
    assert not object_store.exists(location, "folder")
    assert object_store.size(location, "b.tar") == 100
    assert object_store.join(location, "b.tar") == f"{location}/b.tar"


def test_a_short_read_is_an_error_that_names_the_range(location):
    expected = r"b\.tar: expected 20 bytes at \[90, 110\), got 10: the file ends at byte 100"
    with pytest.raises(OSError, match=expected):
        object_store.read_range(location, "b.tar", 90, 110)


@pytest.mark.parametrize("read", [object_store.read_bytes, object_store.size])
def test_a_missing_file_is_named(location, read):
    with pytest.raises(FileNotFoundError, match=r"c\.tar: not found; check"):
        read(location, "c.tar")


def test_a_missing_location_is_named(location):
    with pytest.raises(FileNotFoundError, match="nowhere: not found; check"):
        object_store.list_names(f"{location}/nowhere")


def test_addresses_that_cannot_be_read_are_refused(location):
    with pytest.raises(object_store.LocationError, match="gs://bucket/set: expected a directory or s3://bucket/prefix"):
        object_store.read_bytes("gs://bucket/set", "manifest.json")
