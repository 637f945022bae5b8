"""Sets built straight into a real Ceph RGW: the bytes of a local build, little on local disk, killed, in parts."""

import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import shards as command
from pipeline import build_files, object_store, publish, remote_build, s3_store, s3_writes, shards
from pipeline.manifest import open_shard_set
from pipeline.sources import list_source
from pipeline.upload import upload
from pipeline.verify import verify

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """2 classes of 40 images that take a moment each."""
    root = tmp_path_factory.mktemp("source") / "tree"
    generator = np.random.default_rng(0)
    for label in range(2):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(40):
            pixels = generator.integers(0, 256, (200, 200, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{number}.png", compress_level=0)
    return root


@pytest.fixture(scope="module")
def local(tree, tmp_path_factory) -> Path:
    """The set of one process, 8 shards."""
    shards.build(plan_of(tree), destination := tmp_path_factory.mktemp("local"))
    return destination


def plan_of(tree: Path, **options) -> shards.Plan:
    return shards.plan(list_source(tree), image_size=64, **{"samples_per_shard": 10, **options})


def command_line(tree: Path, location: str, scratch: Path, *more: str) -> list[str]:
    options = ["--size", "64", "--samples-per-shard", "10", "--scratch", str(scratch), *more]
    return [
        sys.executable,
        *("launch/shards.py", "build", "--source", str(tree), "--destination", location),
        *options,
    ]


def assert_is(location: str, local: Path) -> None:
    """The very bytes of a local set, and nothing else."""
    assert object_store.list_names(location) == sorted(path.name for path in local.iterdir())
    for path in local.iterdir():
        assert object_store.read_bytes(location, path.name) == path.read_bytes()
    assert open_shard_set(location).dataset_id == open_shard_set(str(local)).dataset_id


def put(location: str, name: str, data: bytes) -> None:
    """As another program would: without sha256."""
    where = s3_store.parse(location)
    s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key(name), Body=data)


def times(location: str) -> dict[str, object]:
    where = s3_store.parse(location)
    found = s3_store.client(where).list_objects_v2(Bucket=where.bucket, Prefix=where.prefix + "/")
    return {entry["Key"].rpartition("/")[2]: entry["LastModified"] for entry in found["Contents"]}


def test_a_set_in_the_store_is_that_of_a_local_build(tree, local, s3_bucket, tmp_path):
    location = s3_bucket()
    report = shards.build(plan_of(tree), location, workers=2, scratch=tmp_path)
    assert (report.built_shards, report.kept_shards, report.was_there) == (8, 0, False)
    assert_is(location, local)
    assert verify(location) == []
    assert list(tmp_path.iterdir()) == []
    assert upload(local, location).sent_files == 0  # all carry their sha256
    put(location, "shard-000000.json", b"left over from a kill while cleaning up")
    again = shards.build(plan_of(tree), location, scratch=tmp_path)
    assert again.was_there and publish.merge(location).was_there
    assert_is(location, local)


def test_killed_and_started_again_with_bounded_disk(tree, local, s3_bucket, tmp_path, repo_root):
    """SIGKILL in the middle: what was sent is not sent again. Never more shards on disk than two per worker."""
    location, most, ended = s3_bucket(), [0], threading.Event()

    def look() -> None:
        while not ended.is_set():
            found = [path for path in tmp_path.rglob("*") if ".tar" in path.name]
            most[0] = max(most[0], len(found))
            time.sleep(0.002)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        process = subprocess.Popen(command_line(tree, location, tmp_path, "--workers", "2"), cwd=repo_root)
        deadline = time.monotonic() + 120
        while sum(name.endswith(".json") for name in object_store.list_names(location)) < 3:  # the plan, 2 records
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        time.sleep(0.5)  # its workers end by themselves
        names = object_store.list_names(location)
        records = [name for name in names if name.startswith("shard") and name.endswith(".json")]
        assert "manifest.json" not in names and len(records) < 8
        before = times(location)
        report = shards.build(plan_of(tree), location, scratch=tmp_path)
    finally:
        ended.set()
        looking.join()
    assert 1 <= most[0] <= 4
    assert report.kept_shards >= len(records)
    assert report.kept_shards + report.built_shards == 8
    after = times(location)
    for record in records:
        shard = record.replace(".json", ".tar")
        assert after[shard] == before[shard]
    assert_is(location, local)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_could_not_be_sent_is_sent_by_the_next_run(tree, local, s3_bucket, tmp_path, monkeypatch):
    location, plan = s3_bucket(), plan_of(tree)
    send = remote_build.send

    def broken(file, *arguments):
        if file.name == "shard-000002.tar":
            raise OSError("the network is down")
        return send(file, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(remote_build, "send", broken)
        with pytest.raises(OSError, match="the network is down"):
            shards.build(plan, location, scratch=tmp_path)
    (scratch,) = tmp_path.iterdir()
    assert sorted(path.name for path in scratch.iterdir()) == ["shard-000002.json", "shard-000002.tar"]
    (scratch / "shard-000003.tar.12ab.part").write_text("left by a kill")
    report = shards.build(plan, location, scratch=tmp_path)
    assert (report.kept_shards, report.built_shards) == (3, 5)
    assert_is(location, local)
    assert list(tmp_path.iterdir()) == []


def test_what_was_replaced_in_the_store_meanwhile_is_built_again(tree, local, s3_bucket, tmp_path):
    location, plan = s3_bucket(), plan_of(tree)
    shards.build_part(plan, location, 0, 2, scratch=tmp_path)
    put(location, "shard-000004.tar", object_store.read_bytes(location, "shard-000004.tar"))
    put(location, "shard-000006.json", b"{half a rec")
    report = shards.build(plan, location, scratch=tmp_path)
    assert (report.kept_shards, report.built_shards) == (2, 6)
    assert_is(location, local)


def test_two_parts_at_once_then_merged_without_the_source(tree, local, s3_bucket, tmp_path, repo_root, capsys):
    """Processes that begin together, as tasks of a job array do; the source is not there when they are merged."""
    location = s3_bucket()
    shutil.copytree(tree, copied := tmp_path / "tree")
    parts = []
    for part in "01":
        more = ["--workers", "1", "--parts", "3", "--part", part]
        arguments = command_line(copied, location, tmp_path / "scratch", *more)
        parts.append(subprocess.Popen(arguments, cwd=repo_root, stdout=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=120)[0] for process in parts]
    assert [process.returncode for process in parts] == [0, 0]
    assert all("3 shard(s) built, 0 kept" in text for text in told)
    assert any("still missing: 2 of 8 shards (2,5), of part(s) 2 of 3" in text for text in told)

    assert command.main(["merge", location]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 of 8 shards" in line and ": 2,5. " in line and "--parts 3 --part 2, or without" in line
    assert "manifest.json" not in object_store.list_names(location)

    last = shards.build_part(plan_of(copied), location, 2, 3, scratch=tmp_path / "scratch")
    assert (last.built_shards, last.missing) == (2, ())
    shutil.rmtree(copied)
    assert command.main(["merge", location]) == 0
    assert "merged 8 shard(s)" in capsys.readouterr().out
    assert_is(location, local)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert command.main(["merge", location]) == 0
    assert "is a set already, nothing to do" in capsys.readouterr().out
    finished = shards.build_part(plan_of(tree), location, 2, 3, scratch=tmp_path / "scratch")
    assert finished.was_there and finished.missing == ()


def test_a_destination_with_something_else_is_refused(tree, tiny_shards, s3_bucket, tmp_path, capsys):
    location = s3_bucket()
    put(location, "thesis.tex", b"")
    with pytest.raises(shards.BuildError, match=r"1 file\(s\) that are no build of ours, such as thesis\.tex"):
        shards.build(plan_of(tree), location, scratch=tmp_path)
    assert object_store.list_names(location) == ["thesis.tex"]

    location = s3_bucket()
    shards.build_part(plan_of(tree), location, 0, 8, scratch=tmp_path)
    names = object_store.list_names(location)
    with pytest.raises(shards.BuildError, match=r"unfinished build of another set \(seed is 0 there and 1 now\)"):
        shards.build_part(plan_of(tree, seed=1), location, 1, 8, scratch=tmp_path)
    assert command.main(["upload", str(tiny_shards), location]) == 1
    assert "holds an unfinished build of a set (build.json); finish that" in capsys.readouterr().err
    assert object_store.list_names(location) == names

    location = s3_bucket()
    upload(tiny_shards, location)
    names = object_store.list_names(location)
    with pytest.raises(shards.BuildError, match=r"holds another set \(.*image_size is 16 there and 64 now"):
        shards.build_part(plan_of(tree), location, 0, 8, scratch=tmp_path)
    assert object_store.list_names(location) == names


def test_of_several_plans_at_once_one_is_taken(tree, s3_bucket):
    location, plans = s3_bucket(), [plan_of(tree, seed=seed).manifest for seed in range(6)]

    def try_to_claim(planned):
        try:
            build_files.claim(planned, location)
        except shards.BuildError as error:
            assert "build of another set (seed is" in str(error)
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(try_to_claim, plans))
    assert sum(taken) == 1
    assert object_store.read_bytes(location, "build.json") == plans[taken.index(True)].to_bytes()


def test_small_objects_are_written_through_faults(s3_bucket, fault_proxy):
    location = s3_bucket()
    through, proxy = fault_proxy(location, iter([(503, "SlowDown"), ("close", 100), (500, "InternalError")]))
    s3_writes.put(through, "index.safetensors", b"index")
    s3_writes.create(through, "build.json", b"first")
    s3_writes.create(through, "build.json", b"second")
    s3_writes.remove(through, "index.safetensors")
    s3_writes.remove(through, "index.safetensors")
    assert proxy.faults == 3
    assert object_store.list_names(location) == ["build.json"]
    assert object_store.read_bytes(location, "build.json") == b"first"


def test_what_the_store_does_not_allow_is_one_line(tree, s3_bucket, tmp_path, capsys, monkeypatch):
    """And it comes before the source is listed."""
    location = s3_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3_store.client_of.cache_clear()
    build = ["build", "--source", "absent", "--destination", location, "--size", "8"]
    for arguments in (build, ["merge", location]):
        assert command.main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "the secret key is wrong" in line
    assert command.main(["build", "--source", "absent", "--destination", "s3://b?regoin=x", "--size", "8"]) == 1
    assert "did you mean region?" in capsys.readouterr().err


def test_scratch_must_be_writable_and_outside_of_the_source(tree, s3_bucket, tmp_path):
    location = s3_bucket()
    with pytest.raises(shards.BuildError, match=r"--scratch .* lies inside --source"):
        shards.check_destination(location, tree, tree / "class0")
    (tmp_path / "file").write_text("")
    with pytest.raises(shards.BuildError, match=r"--scratch .* cannot be written \(Not a directory\)"):
        shards.check_destination(location, tree, tmp_path / "file" / "scratch")
    assert object_store.list_names(location) == []


def test_the_scratch_directory_is_that_of_the_command(tree, tmp_path):
    """The same for the same command, another for another destination or plan."""
    planned, other = plan_of(tree).manifest, plan_of(tree, seed=1).manifest
    same, again, elsewhere, differing, temporary = (
        remote_build.scratch_directory(*arguments)
        for arguments in [
            (planned, "s3://a/b", tmp_path),
            (planned, "s3://a/b", tmp_path),
            (planned, "s3://a/c", tmp_path),
            (other, "s3://a/b", tmp_path),
            (planned, "s3://a/b", None),
        ]
    )
    assert same == again and same.parent == tmp_path
    assert len({same, elsewhere, differing, temporary}) == 4
    assert same.name == temporary.name
