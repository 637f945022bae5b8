"""Copies of a set to a real Ceph RGW: whole, restartable, never over another set."""

import shutil

import pytest

from launch import shards as command
from pipeline import object_store, s3, s3_store
from pipeline.manifest import ShardSetError, open_shard_set
from pipeline.upload import upload
from pipeline.verify import verify

pytestmark = pytest.mark.s3
NAMES = ["index.safetensors", "manifest.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]


def test_needs_an_s3_address(tiny_shards, tmp_path):
    with pytest.raises(ShardSetError, match="is not in object storage; expected s3://bucket/prefix"):
        upload(tiny_shards, str(tmp_path))


def test_what_arrives_is_the_set(tiny_shards, s3_bucket):
    location = s3_bucket()
    report = upload(tiny_shards, location)
    total = sum((tiny_shards / name).stat().st_size for name in NAMES)
    assert (report.sent_files, report.sent_bytes, report.kept_files) == (5, total, 0)
    assert object_store.list_names(location) == NAMES  # the records that a build keeps beside its shards stay behind
    for name in NAMES:
        assert object_store.read_bytes(location, name) == (tiny_shards / name).read_bytes()
    assert open_shard_set(location).dataset_id == open_shard_set(str(tiny_shards)).dataset_id
    assert verify(location) == []


def test_what_is_there_and_equal_is_kept(tiny_shards, s3_bucket):
    location = s3_bucket()
    upload(tiny_shards, location)
    where = s3_store.parse(location)
    s3_store.client(where).delete_object(Bucket=where.bucket, Key=where.key("shard-000000.tar"))
    other = bytearray((tiny_shards / "shard-000001.tar").read_bytes())
    s3_store.client(where).put_object(
        Bucket=where.bucket, Key=where.key("shard-000001.tar"), Body=bytes(other)
    )  # no sha256
    report = upload(tiny_shards, location)
    assert (report.sent_files, report.kept_files) == (2, 3)
    assert (upload(tiny_shards, location).sent_files, verify(location)) == (0, [])


def test_the_manifest_goes_last(tiny_shards, s3_bucket, tmp_path):
    """A copy that fails in the middle is no set; the same command again finishes it."""
    location = s3_bucket()
    shutil.copytree(tiny_shards, tmp_path / "set")
    shard = tmp_path / "set/shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardSetError, match=r"shard-000002.tar is damaged: expected sha256 [0-9a-f]{64}, got .*verify"):
        upload(tmp_path / "set", location)
    assert not {"manifest.json", "shard-000002.tar"} & set(object_store.list_names(location))
    with pytest.raises(ShardSetError, match=r"holds no manifest\.json"):
        open_shard_set(location)
    assert upload(tiny_shards, location).sent_files >= 2
    assert verify(location) == []


def test_another_set_is_not_written_over(tiny_shards, s3_bucket):
    location = s3_bucket()
    where = s3_store.parse(location)
    s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key("manifest.json"), Body=b"{}")
    with pytest.raises(ShardSetError, match=r"holds another set \(dataset id 44136fa355b3, .*choose another prefix"):
        upload(tiny_shards, location)
    assert object_store.list_names(location) == ["manifest.json"]


def test_large_files_go_in_parts_and_through_faults(tmp_path, s3_bucket, fault_proxy):
    location = s3_bucket()
    through, proxy = fault_proxy(location, iter([(503, "SlowDown"), ("close", 100), (500, "InternalError")]))
    (tmp_path / "x.bin").write_bytes(bytes(range(256)) * 2**18 + b"end")  # 64 MiB and a little
    sent = []
    s3.upload(through, "x.bin", tmp_path / "x.bin", "0" * 64, sent.append)
    assert proxy.faults == 3 and sum(sent) == 2**26 + 3
    assert object_store.read_range(location, "x.bin", 2**26 - 2, 2**26 + 3) == b"\xfe\xffend"
    assert any("partNumber=5" in line for line, _ in proxy.requests)


def test_faults_in_the_store_come_in_the_order_of_the_shards(tiny_shards, s3_bucket):
    location = s3_bucket()
    upload(tiny_shards, location)
    where = s3_store.parse(location)
    for name in ("shard-000002.tar", "shard-000000.tar"):
        data = bytearray((tiny_shards / name).read_bytes())
        data[700] ^= 1
        s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key(name), Body=bytes(data))
    s3_store.client(where).delete_object(Bucket=where.bucket, Key=where.key("shard-000001.tar"))
    faults = verify(location, 3)
    assert [f"shard-{row:06d}.tar" in fault for row, fault in enumerate(faults)] == [True] * 3
    assert "not found" in faults[1]


def test_the_command_uploads_shows_and_verifies(tiny_shards, s3_bucket, capsys, monkeypatch):
    location = s3_bucket()
    assert command.main(["upload", str(tiny_shards), location, "--workers", "2"]) == 0
    assert "sent 5 file(s)" in (output := capsys.readouterr().out) and "MB/s" in output
    assert command.main(["show", location]) == command.main(["show", str(tiny_shards)]) == 0
    there, here = capsys.readouterr().out.split("set  ")[1:]
    assert there.strip() == here.strip()
    assert command.main(["verify", location]) == 0
    assert f"{location}: sound; 3 shard(s)" in capsys.readouterr().out
    where = s3_store.parse(location)
    data = bytearray((tiny_shards / "shard-000001.tar").read_bytes())
    data[700] ^= 1
    s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key("shard-000001.tar"), Body=bytes(data))
    assert command.main(["verify", location]) == 1
    assert "shard-000001.tar: block 1, bytes" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3_store.client_of.cache_clear()
    for arguments in (["upload", str(tiny_shards), location], ["show", location], ["verify", location]):
        assert command.main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "the secret key is wrong" in line
    assert command.main(["verify", "s3://bucket?regoin=x"]) == 1
    assert "did you mean region?" in capsys.readouterr().err
