import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from pipeline import build_files, publish, shard_file, shards
from pipeline.manifest import ShardSet
from pipeline.shard_file import Span
from pipeline.sources import list_source
from pipeline.tars import TarError


def make_tree(root: Path, num_classes: int = 3, per_class: int = 8, side: int = 40) -> Path:
    """Noise, different in every image, as PNG so that the stored pixels are known."""
    generator = np.random.default_rng(0)
    for label in range(num_classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 256, (side, side + 4, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{number}.png", compress_level=0)
    return root


def build(
    source: Path, destination: Path, size: int = 32, workers: int = 1, max_skipped: int = 0, **options
) -> ShardSet:
    plan = shards.plan(list_source(source), image_size=size, **{"samples_per_shard": 7, **options})
    destination.mkdir(exist_ok=True)
    return shards.build(plan, destination, workers=workers, max_skipped=max_skipped).shard_set


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def payloads(shard_set: ShardSet) -> list[bytes]:
    """The encoded images, read by index."""
    index, manifest = shard_set.index, shard_set.manifest
    files = [Path(shard_set.location, shard.name).read_bytes() for shard in manifest.shards]
    places = zip(index.sample_shard, index.sample_offset, index.sample_size, strict=True)
    return [files[shard][offset : offset + size] for shard, offset, size in places]


def pixels_of(payload: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(payload)))


def reference_pixels(path_or_file, size: int) -> np.ndarray:
    image = Image.open(path_or_file)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).convert("RGB")
    return np.asarray(square if side == size else square.resize((size, size), Image.Resampling.LANCZOS))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("source") / "tree")


@pytest.fixture(scope="module")
def imagenet(shared_data, tmp_path_factory) -> ShardSet:
    """The real tar at 128 px: 500 images of 500 classes."""
    destination = tmp_path_factory.mktemp("imagenet128")
    return build(shared_data / "ILSVRC2012_img_train.tar", destination, 128, samples_per_shard=128)


def test_imagenet_has_every_image_with_the_label_of_its_synset(imagenet, shared_data):
    manifest, index = imagenet.manifest, imagenet.index
    with tarfile.open(shared_data / "ILSVRC2012_img_train.tar") as tar:
        synsets = sorted(name.removesuffix(".tar") for name in tar.getnames())
    assert manifest.class_names == tuple(synsets)
    assert (manifest.num_samples, manifest.num_classes) == (500, 500)
    assert not manifest.complete, "ImageNet has 1,281,167: scores against these may not be called fid"
    assert (manifest.name, manifest.split) == ("ILSVRC2012_img_train", "train")
    assert sorted(index.sample_label.tolist()) == list(range(500))
    assert [shard.samples for shard in manifest.shards] == [128, 128, 128, 116]
    assert index.block_stop.max() - index.block_start.min() <= 4_000_000


def test_imagenet_pixels_are_pillows(imagenet, shared_data):
    """Every grey image, and every seventh of the others."""
    stored = dict(zip(imagenet.index.sample_label.tolist(), payloads(imagenet), strict=True))
    num_grey = 0
    with tarfile.open(shared_data / "ILSVRC2012_img_train.tar") as tar:
        for label, synset in enumerate(imagenet.manifest.class_names):
            with tarfile.open(fileobj=tar.extractfile(f"{synset}.tar")) as inner:
                original = io.BytesIO(inner.extractfile(inner.next()).read())
            is_grey = Image.open(original).mode == "L"
            if is_grey or label % 7 == 0:
                num_grey += is_grey
                np.testing.assert_array_equal(pixels_of(stored[label]), reference_pixels(original, 128))
    assert num_grey == 9


def test_imagenet_shards_are_fair_samples(imagenet):
    """One permutation over all: labels do not rise with the position, as in the source."""
    ranks = np.corrcoef(np.arange(500), imagenet.index.sample_label)[0, 1]
    assert abs(ranks) < 4 / np.sqrt(500)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves closing to the collector
def test_stock_webdataset_reads_the_same_samples(imagenet):
    urls = [str(Path(imagenet.location, shard.name)) for shard in imagenet.manifest.shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "webp", "cls")
    count = 0
    for (key, pixels, label), ours, our_label in zip(
        dataset, payloads(imagenet), imagenet.index.sample_label, strict=True
    ):
        assert (int(key), label) == (count, our_label)
        if count % 10 == 0:
            np.testing.assert_array_equal(pixels, pixels_of(ours))
        count += 1
    assert count == 500


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(("encoding", "extension"), [("webp", "webp"), ("png", "png"), ("raw", "bin")])
def test_lossless_encodings_hold_the_source_pixels(tree, tmp_path, encoding, extension):
    """Sides that fit are not resampled, so the stored pixels are the centre of the source's."""
    shard_set = build(tree, tmp_path / "set", 40, encoding=encoding)
    originals = {reference_pixels(path, 40).tobytes(): int(path.parent.name[5:]) for path in tree.glob("*/*.png")}
    urls = [str(Path(shard_set.location, shard.name)) for shard in shard_set.manifest.shards]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        data = sample[extension]
        found[data if encoding == "raw" else pixels_of(data).tobytes()] = int(sample["cls"])
    assert found == originals


def test_pixel_hashes_and_statistics_do_not_depend_on_the_encoding(tree, tmp_path):
    sets = [build(tree, tmp_path / encoding, encoding=encoding).manifest for encoding in ("webp", "png", "raw")]
    assert len({tuple(shard.pixels_sha256 for shard in manifest.shards) for manifest in sets}) == 1
    values = np.stack([reference_pixels(path, 32) for path in sorted(tree.glob("*/*.png"))]).reshape(-1, 3)
    for manifest in sets:
        np.testing.assert_allclose(manifest.pixel_mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(manifest.pixel_std, values.std(0), rtol=1e-12)


def test_pixel_hash_is_of_what_a_reader_of_jpeg_gets(tree, tmp_path):
    shard_set = build(tree, tmp_path / "set", encoding="jpeg444", samples_per_shard=50)
    decoded = b"".join(pixels_of(payload).tobytes() for payload in payloads(shard_set))
    assert shard_set.manifest.shards[0].pixels_sha256 == hashlib.sha256(decoded).hexdigest()


def test_one_and_two_workers_write_the_same_bytes(tmp_path):
    tree = make_tree(tmp_path / "tree")
    (tree / "class1" / "3.png").write_text("no image at all")
    build(tree, tmp_path / "one", max_skipped=1)
    build(tree, tmp_path / "two", max_skipped=1, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_imagenet_with_two_workers_is_byte_identical(imagenet, shared_data, tmp_path):
    build(shared_data / "ILSVRC2012_img_train.tar", tmp_path / "two", 128, workers=2, samples_per_shard=128)
    assert contents(tmp_path / "two") == contents(Path(imagenet.location))


def test_a_folder_and_a_tar_of_it_give_the_same_shards(tree, tmp_path):
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        tar.add(tree, "./tree")
    build(tree, tmp_path / "one")
    build(tmp_path / "tree.tar", tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name for name in one if one[name] != two[name]} == {"manifest.json"}  # which names source and layout


def test_another_seed_is_another_order_of_the_same_images(tree, tmp_path):
    one, two = build(tree, tmp_path / "one", seed=1), build(tree, tmp_path / "two", seed=2)
    assert payloads(one) != payloads(two)
    assert sorted(payloads(one)) == sorted(payloads(two))


def test_killed_and_started_again(tmp_path, repo_root):
    """SIGKILL in the middle: the workers end too, finished shards are kept, the set is that of an undisturbed build."""
    tree = make_tree(tmp_path / "tree", 4, 40, side=300)
    command = [sys.executable, "launch/shards.py", "build", "--source", str(tree), "--size", "128", "--workers", "2"]
    command += ["--samples-per-shard", "10", "--destination", str(tmp_path / "set")]
    process = subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "set").glob("shard-*.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not (tmp_path / "set" / "manifest.json").exists()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive

    plan = shards.plan(list_source(tree), image_size=128, samples_per_shard=10)
    report = shards.build(plan, tmp_path / "set")
    assert report.kept_shards >= 1
    assert report.kept_shards + report.built_shards == 16
    build(tree, tmp_path / "undisturbed", 128, samples_per_shard=10)
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


def interrupt_after(shard: int, monkeypatch) -> None:
    """Makes the write of one shard's record fail as on a full disk."""
    write_file = shard_file.write_file

    def full(path: Path, data: bytes) -> None:
        if path.name == f"shard-{shard:06d}.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_file(path, data)

    monkeypatch.setattr(shard_file, "write_file", full)


def test_full_disk_stops_the_build_and_the_next_one_goes_on(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(2, patched)
        with pytest.raises(OSError, match=r"No space left on device: .*shard-000002\.json"):
            build(tree, tmp_path / "set")
    assert not list((tmp_path / "set").glob("*.part"))
    assert not (tmp_path / "set" / "manifest.json").exists()
    report = shards.build(shards.plan(list_source(tree), image_size=32, samples_per_shard=7), tmp_path / "set")
    assert (report.kept_shards, report.built_shards) == (2, 2)
    build(tree, tmp_path / "undisturbed")
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


def test_a_finished_shard_that_was_damaged_since_is_built_again(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(3, patched)
        with pytest.raises(OSError, match="No space"):
            build(tree, tmp_path / "set")
    damaged = bytearray((tmp_path / "set" / "shard-000001.tar").read_bytes())
    damaged[700] ^= 1
    (tmp_path / "set" / "shard-000001.tar").write_bytes(damaged)
    (tmp_path / "set" / "shard-000000.json").write_text("{half a rec")
    (tmp_path / "set" / "shard-000003.tar.1234.part").write_bytes(b"left over")
    report = shards.build(shards.plan(list_source(tree), image_size=32, samples_per_shard=7), tmp_path / "set")
    assert (report.kept_shards, report.built_shards) == (1, 3)
    build(tree, tmp_path / "undisturbed")
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


def test_a_finished_set_is_left_alone(tree, tmp_path):
    build(tree, tmp_path / "set")
    (tmp_path / "set" / "shard-000000.json").write_text("left over from a kill while cleaning up")
    before = (tmp_path / "set" / "shard-000000.tar").stat().st_mtime_ns
    report = shards.build(shards.plan(list_source(tree), image_size=32, samples_per_shard=7), tmp_path / "set")
    assert (report.was_there, report.built_shards) == (True, 0)
    assert (tmp_path / "set" / "shard-000000.tar").stat().st_mtime_ns == before
    assert not (tmp_path / "set" / "shard-000000.json").exists()


def test_a_destination_with_something_else_is_refused(tree, tmp_path, monkeypatch):
    build(tree, tmp_path / "set")
    with pytest.raises(
        shards.BuildError, match=r"holds another set \(image_size is 32 there and 16 now; seed is 0 there"
    ):
        build(tree, tmp_path / "set", 16, seed=3)
    with monkeypatch.context() as patched:
        interrupt_after(1, patched)
        with pytest.raises(OSError, match="No space"):
            build(tree, tmp_path / "unfinished")
    with pytest.raises(
        shards.BuildError, match=r"unfinished build of another set \(encoding is webp there and raw now"
    ):
        build(tree, tmp_path / "unfinished", encoding="raw")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(shards.BuildError, match=r"1 file\(s\) that are no build of ours, such as thesis\.tex"):
        build(tree, tmp_path / "other")


def test_files_of_others_that_look_half_written_stay(tree, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "film.mkv.part").write_text("")
    with pytest.raises(shards.BuildError, match=r"no build of ours, such as film\.mkv\.part"):
        build(tree, tmp_path / "set")
    assert (tmp_path / "set" / "film.mkv.part").exists()


def test_a_changed_source_is_another_set(tmp_path, monkeypatch):
    tree = make_tree(tmp_path / "tree")
    with monkeypatch.context() as patched:
        interrupt_after(1, patched)
        with pytest.raises(OSError, match="No space"):
            build(tree, tmp_path / "set")
    (tree / "class0" / "0.png").write_bytes((tree / "class0" / "1.png").read_bytes() + b"more")
    with pytest.raises(shards.BuildError, match="source_sha256 differs"):
        build(tree, tmp_path / "set")


def test_destinations_that_cannot_be_used(tree, tmp_path):
    with pytest.raises(shards.BuildError, match="is neither a directory nor s3://bucket/prefix"):
        shards.check_destination("gs://bucket/set", tree)
    with pytest.raises(shards.BuildError, match="is for builds into s3://"):
        shards.check_destination(str(tmp_path / "set"), tree, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(shards.BuildError, match=r"cannot be written \(Not a directory\)"):
        shards.check_destination(str(tmp_path / "file" / "set"), tree)
    with pytest.raises(shards.BuildError, match="lies inside --source"):
        shards.check_destination(str(tree / "class0"), tree)


def test_unreadable_images_fail_the_build_or_are_listed(tmp_path):
    tree = make_tree(tmp_path / "tree")
    (tree / "class1" / "3.png").write_text("no image at all")
    whole = (tree / "class2" / "5.png").read_bytes()
    (tree / "class2" / "5.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(shards.BuildError, match=r"of 24 images cannot be read") as caught:
        build(tree, tmp_path / "set", samples_per_shard=50)
    assert "class1/3.png: no image" in str(caught.value)
    assert "class2/5.png: OSError: image file is truncated" in str(caught.value)
    assert "--max-skipped" in str(caught.value)

    shard_set = build(tree, tmp_path / "set", samples_per_shard=50, max_skipped=2)  # goes on in the same place
    manifest, index = shard_set.manifest, shard_set.index
    assert [skip.file for skip in manifest.skipped] == ["class1/3.png", "class2/5.png"]
    assert (manifest.complete, manifest.num_samples, manifest.class_counts) == (False, 22, (8, 7, 7))
    with tarfile.open(tmp_path / "set" / "shard-000000.tar") as tar:
        keys = [int(name[:9]) for name in tar.getnames()[::2]]
    assert len(set(range(24)) - set(keys)) == 2  # a gap for each
    assert keys == sorted(keys)
    by_pixels = {reference_pixels(path, 32).tobytes(): int(path.parent.name[5:]) for path in tree.glob("*/[0-2].png")}
    labels = {
        pixels_of(payload).tobytes(): label
        for payload, label in zip(payloads(shard_set), index.sample_label, strict=True)
    }
    assert labels.items() >= by_pixels.items()


def test_a_set_of_nothing_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(shards.BuildError, match="none of the 1 images of texts can be read"):
        build(tmp_path / "texts", tmp_path / "set", max_skipped=5)


def test_limit_per_class_draws_so_many_of_each(tree, tmp_path):
    few = build(tree, tmp_path / "few", limit_per_class=3)
    assert few.manifest.class_counts == (3, 3, 3)
    assert not few.manifest.complete
    everything = build(tree, tmp_path / "all", limit_per_class=8)
    assert set(payloads(few)) < set(payloads(everything))
    assert everything.manifest.complete


def test_unconditional_sets_have_no_labels(tree, tmp_path):
    shard_set = build(tree / "class0", tmp_path / "set")
    assert (shard_set.manifest.num_classes, shard_set.manifest.class_counts) == (0, ())
    assert set(shard_set.index.sample_label.tolist()) == {-1}
    with tarfile.open(tmp_path / "set" / "shard-000000.tar") as tar:
        assert all(name.endswith(".webp") for name in tar.getnames())


def test_enlarged_images_are_counted(tree, tmp_path):
    assert build(tree, tmp_path / "set", 41).manifest.num_enlarged == 24
    assert build(tree, tmp_path / "smaller", 40).manifest.num_enlarged == 0


def test_shards_are_plain_ustar_without_owner_or_time(tree, tmp_path):
    build(tree, tmp_path / "set")
    with tarfile.open(tmp_path / "set" / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in members} == {(0, 0, "", "", 0, 0o644)}
    assert [m.name for m in members[:4]] == ["000000000.webp", "000000000.cls", "000000001.webp", "000000001.cls"]


def test_blocks_are_consecutive_and_bounded(monkeypatch):
    spans = [Span(start, stop, start, 1, 0) for start, stop in [(0, 40), (40, 90), (90, 100), (100, 350), (350, 360)]]
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 100)
    assert shard_file.cut_blocks(spans) == [(0, 3), (3, 4), (4, 5)]  # 100 bytes, one sample of 250, 10
    assert shard_file.cut_blocks([]) == []


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"1.webp": b"x", "1.cls": b"cat"}, r"1\.cls holds b'cat', which is no label"),
        ({"1.webp": b"x", "2.cls": b"0"}, r"2\.cls is no image of a shard, nor the label of the one before it"),
        ({"1.txt": b"x"}, r"1\.txt is no image of a shard"),
    ],
)
def test_a_tar_that_is_no_shard_of_ours(contents, message):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(TarError, match=message):
        shard_file.read_spans(file, "it")


def test_index_and_manifest_hold_what_the_files_do(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 15_000)
    shard_set = build(tree, tmp_path / "set")
    index, manifest = shard_set.index, shard_set.manifest
    assert index.num_blocks > len(manifest.shards)
    for row, shard in enumerate(manifest.shards):
        data = (tmp_path / "set" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        blocks = np.flatnonzero(index.block_shard == row)
        assert index.block_start[blocks[0]] == 0
        assert (index.block_start[blocks[1:]] == index.block_stop[blocks[:-1]]).all()
        assert not any(data[index.block_stop[blocks[-1]] :])  # the end mark
        for block in blocks:
            part = data[index.block_start[block] : index.block_stop[block]]
            assert hashlib.sha256(part).digest() == index.block_sha256[block].tobytes()
        with tarfile.open(tmp_path / "set" / shard.name) as tar:
            members = tar.getmembers()
            labels = [int(tar.extractfile(member).read()) for member in members[1::2]]
        rows = index.sample_shard == row
        assert index.sample_offset[rows].tolist() == [member.offset_data for member in members[::2]]
        assert index.sample_size[rows].tolist() == [member.size for member in members[::2]]
        assert index.sample_label[rows].tolist() == labels
    assert shard_set.dataset_id == hashlib.sha256((tmp_path / "set" / "manifest.json").read_bytes()).hexdigest()
    assert np.bincount(index.sample_label).tolist() == list(manifest.class_counts)


def test_manifest_names_no_path_of_the_machine(tree, tmp_path):
    build(tree, tmp_path / "set")
    text = (tmp_path / "set" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["source"] == "tree"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("data/ILSVRC2012_img_train.tar", ("ILSVRC2012_img_train", "train")),
        ("data/ILSVRC2012_img_val.tar", ("ILSVRC2012_img_val", "val")),
        ("data/imagenet/train", ("imagenet", "train")),
        ("data/img_align_celeba", ("img_align_celeba", "all")),
        ("data/training", ("training", "all")),
    ],
)
def testname_and_split_come_from_the_source(tmp_path, location, expected):
    assert shards.name_and_split(tmp_path / location) == expected


def part_plan(tree: Path, **options) -> shards.Plan:
    return shards.plan(list_source(tree), image_size=32, samples_per_shard=3, **options)


def build_parts(plan: shards.Plan, destination: Path, which: list[int], parts: int) -> list[shards.PartReport]:
    destination.mkdir(exist_ok=True)
    return [shards.build_part(plan, destination, part, parts) for part in which]


def test_parts_make_the_set_of_one_build(tree, tmp_path):
    """8 shards in 3 parts, of which one is built twice; then merged, twice."""
    plan = part_plan(tree)
    reports = build_parts(plan, tmp_path / "set", [2, 0, 2, 1], 3)
    assert [(report.built_shards, report.kept_shards) for report in reports] == [(2, 0), (3, 0), (0, 2), (3, 0)]
    assert [report.missing for report in reports] == [(0, 1, 3, 4, 6, 7), (1, 4, 7), (1, 4, 7), ()]
    assert reports[0].num_shards == 8
    assert not (tmp_path / "set" / "manifest.json").exists()
    merged = publish.merge(str(tmp_path / "set"))
    assert not merged.was_there
    undisturbed = build(tree, tmp_path / "undisturbed", samples_per_shard=3)
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")
    assert merged.shard_set.dataset_id == undisturbed.dataset_id
    (tmp_path / "set" / "shard-000000.json").write_text("left over from a kill while cleaning up")
    assert publish.merge(str(tmp_path / "set")).was_there
    (after,) = build_parts(plan, tmp_path / "set", [1], 3)
    assert after.was_there and after.missing == ()
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


def test_a_build_without_part_finishes_what_parts_began(tree, tmp_path):
    plan = part_plan(tree)
    build_parts(plan, tmp_path / "set", [1], 3)
    report = shards.build(plan, tmp_path / "set")
    assert (report.kept_shards, report.built_shards) == (3, 5)
    build(tree, tmp_path / "undisturbed", samples_per_shard=3)
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("built", "parts", "said"),
    [
        ([0, 2], 3, "3 of 8 shards of .* missing .*: 1,4,7. .* with --parts 3 --part 1, or without --part"),
        ([0], 2, "4 of 8 shards of .* missing .*: 1,3,5,7. .* with --parts 2 --part 1, or without --part"),
        ([0, 3], 4, r"4 of 8 .*: 1-2,5-6. .* with --parts 4 --part 1 \(and so on: 1-2, which"),
        ([0, 1, 2, 3, 5], 8, r"3 of 8 .*: 4,6-7. .* with --parts 8 --part 4 \(and so on: 4,6-7, which"),
        ([], 1, "8 of 8 .*: 0-7. .* with no --part"),
    ],
)
def test_merge_names_the_missing_shards_and_the_parts_that_make_them(tree, tmp_path, built, parts, said):
    plan = part_plan(tree)
    build_parts(plan, tmp_path / "set", built, parts)
    if not built:
        (tmp_path / "set" / "build.json").write_bytes(plan.manifest.to_bytes())
    with pytest.raises(shards.BuildError, match=said):
        publish.merge(str(tmp_path / "set"))
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_merge_does_not_take_a_shard_of_another_size(tree, tmp_path):
    plan = part_plan(tree)
    build_parts(plan, tmp_path / "set", [0, 1], 2)
    cut = (tmp_path / "set" / "shard-000003.tar").read_bytes()[:-512]
    (tmp_path / "set" / "shard-000003.tar").write_bytes(cut)
    with pytest.raises(shards.BuildError, match=r"1 of 8 .* missing or not of the size .*: 3\. .*--parts 5 --part 3,"):
        publish.merge(str(tmp_path / "set"))
    (again,) = build_parts(plan, tmp_path / "set", [3], 5)
    assert (again.built_shards, again.missing) == (1, ())
    publish.merge(str(tmp_path / "set"))
    build(tree, tmp_path / "undisturbed", samples_per_shard=3)
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


def test_merge_of_nothing(tmp_path):
    with pytest.raises(shards.BuildError, match="holds no set and no build of one"):
        publish.merge(str(tmp_path))
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(shards.BuildError, match=r"build\.json is no plan of a build"):
        publish.merge(str(tmp_path))


def test_merge_counts_the_skipped_of_all_parts(tmp_path):
    tree = make_tree(tmp_path / "tree")
    for name in ("class0/1.png", "class1/3.png", "class2/5.png"):
        (tree / name).write_text("no image at all")
    plan = part_plan(tree)
    (tmp_path / "set").mkdir()
    for part in range(8):
        shards.build_part(plan, tmp_path / "set", part, 8, max_skipped=3)
    with pytest.raises(shards.BuildError, match=r"3 of 24 images cannot be read .* --max-skipped allows 2"):
        publish.merge(str(tmp_path / "set"), 2)
    assert len(publish.merge(str(tmp_path / "set"), 3).shard_set.manifest.skipped) == 3


def test_a_part_that_failed_once_goes_on(tree, tmp_path, monkeypatch):
    plan = part_plan(tree)
    with monkeypatch.context() as patched:
        interrupt_after(5, patched)
        with pytest.raises(OSError, match="No space"):
            build_parts(plan, tmp_path / "set", [1], 2)
    (again,) = build_parts(plan, tmp_path / "set", [1], 2)
    assert (again.kept_shards, again.built_shards, again.missing) == (2, 2, (0, 2, 4, 6))


def test_a_part_of_another_plan_is_refused(tree, tmp_path):
    build_parts(part_plan(tree), tmp_path / "set", [0], 2)
    with pytest.raises(shards.BuildError, match=r"unfinished build of another set \(seed is 0 there and 1 now\)"):
        build_parts(part_plan(tree, seed=1), tmp_path / "set", [1], 2)


def test_a_part_leaves_alone_what_another_is_writing(tree, tmp_path):
    plan = part_plan(tree)
    (tmp_path / "set").mkdir()
    writing = [tmp_path / "set" / f"shard-{number:06d}.{kind}.12ab.part" for number, kind in [(0, "tar"), (1, "json")]]
    for path in writing:
        path.write_text("")
    build_parts(plan, tmp_path / "set", [0], 2)
    assert [path.exists() for path in writing] == [False, True]
    build_parts(plan, tmp_path / "set", [1], 2)
    assert [path.exists() for path in writing] == [False, False]


def test_more_parts_than_shards(tree, tmp_path):
    (report,) = build_parts(part_plan(tree), tmp_path / "set", [9], 10)
    assert (report.built_shards, report.missing) == (0, tuple(range(8)))


def test_of_several_plans_at_once_one_is_taken(tree, tmp_path):
    """Processes that begin together: exactly the plan that is there goes on, all others are refused."""
    plans = [part_plan(tree, seed=seed).manifest for seed in range(8)]

    def try_to_claim(planned):
        try:
            build_files.claim(planned, str(tmp_path))
        except shards.BuildError as error:
            assert "build of another set (seed is" in str(error)
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(try_to_claim, plans))
    assert sum(taken) == 1
    assert (tmp_path / "build.json").read_bytes() == plans[taken.index(True)].to_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["build.json"]


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    def no_links(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    shard_file.create_file(tmp_path / "build.json", b"plan")
    assert contents(tmp_path) == {"build.json": b"plan"}
