"""Tars that others built, written here by stock webdataset or as img2dataset does, and what adopting makes of them."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline import foreign_shard, object_store, s3_store, shard_file
from pipeline.adopt import adopt
from pipeline.foreign_shard import AdoptError, Reading
from pipeline.ground_truth import LabelError
from pipeline.loader import read_in_order
from pipeline.manifest import ShardSetError, open_shard_set
from pipeline.samples import SampleReader
from pipeline.tars import TarError
from pipeline.upload import upload
from pipeline.verify import verify

RNG = np.random.default_rng(0)


def image(file_format="JPEG", width=12, height=9, mode="RGB", **options) -> bytes:
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def write_tar(path: Path, members, tar_format=tarfile.PAX_FORMAT) -> Path:
    """Members are (name, bytes), or (name, None) for a folder."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname = len(data or b""), 1234567890.5, "bigdata"
            if data is None:
                member.type = tarfile.DIRTYPE
            tar.addfile(member, io.BytesIO(data or b""))
    return path


def labelled(start, count, label=lambda number: str(number % 3), **options):
    """Members of `count` samples with .cls."""
    for number in range(start, start + count):
        yield f"{number:05d}.jpg", image(**options)
        yield f"{number:05d}.cls", label(number).encode()


def write_with_webdataset(folder: Path, samples, per_shard: int) -> list[dict]:
    folder.mkdir()
    samples = list(samples)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=per_shard, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return samples


def read_with_webdataset(folder: Path) -> list[dict]:
    urls = sorted(map(str, folder.glob("*.tar")))
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def content(shard_set, sample: int) -> bytes:
    index = shard_set.index
    name = shard_set.manifest.shards[index.sample_shard[sample]].name
    start = int(index.sample_offset[sample])
    return object_store.read_range(shard_set.shards_location, name, start, start + int(index.sample_size[sample]))


def as_pillow_does(data: bytes, size: int) -> np.ndarray:
    source = Image.open(io.BytesIO(data))
    side = min(source.size)
    left, top = (source.width - side) // 2, (source.height - side) // 2
    square = source.crop((left, top, left + side, top + side)).convert("RGB")
    return np.asarray(square if side == size else square.resize((size, size), Image.Resampling.LANCZOS))


@pytest.fixture
def written(tmp_path):
    """20 samples in shards of 8, by stock webdataset: PAX headers, as its times are fractions; .cls before .jpg."""
    samples = (
        {"__key__": f"train/{n:04d}", "jpg": image(width=10 + n), "cls": n % 3, "txt": "a word"} for n in range(20)
    )
    return tmp_path / "tars", write_with_webdataset(tmp_path / "tars", samples, 8)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_set_of_webdatasets_writer_is_what_webdatasets_reader_reads(written):
    folder, _ = written
    report = adopt(str(folder))
    shard_set = report.shard_set
    manifest, index = shard_set.manifest, shard_set.index
    samples = read_with_webdataset(folder)
    assert len(samples) == manifest.num_samples == 20
    assert [content(shard_set, n) for n in range(20)] == [sample["jpg"] for sample in samples]
    assert index.sample_label.tolist() == [int(sample["cls"]) for sample in samples]
    assert manifest.class_names == ("0", "1", "2") and manifest.class_counts == (7, 7, 6)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("00000.tar", 8), ("00001.tar", 8), ("00002.tar", 4),
    ]  # fmt: skip
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (manifest.encoding, manifest.image_size, manifest.complete) == ("original", None, False)
    adopted = manifest.adopted
    assert adopted.image_formats == {"JPEG": 20} and adopted.label_source == ".cls"
    assert adopted.members == {"cls": 20, "jpg": 20, "txt": 20} and adopted.shorter_side == (9, 9, 9)
    assert verify(str(folder)) == [] and not report.was_there


def test_blocks_are_cut_as_those_of_our_own_shards(written, monkeypatch):
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 12_000)
    monkeypatch.setattr(foreign_shard, "READ_AHEAD_BYTES", 700)
    folder, _ = written
    index = adopt(str(folder)).shard_set.index
    row = 0
    for shard, path in enumerate(sorted(folder.glob("*.tar"))):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        starts = [member.offset for member in members[::3]]  # three to the sample
        stops = [*starts[1:], members[-1].offset_data + 512]
        spans = [shard_file.Span(start, stop, 0, 0, 0) for start, stop in zip(starts, stops, strict=True)]
        cuts = shard_file.cut_blocks(spans)
        assert len(cuts) > 1
        for first, last in cuts:
            start, stop = starts[first], stops[last - 1]
            assert (index.block_shard[row], index.block_start[row], index.block_stop[row]) == (shard, start, stop)
            expected = hashlib.sha256(path.read_bytes()[start:stop]).digest()
            assert index.block_sha256[row].tobytes() == expected
            row += 1
    assert row == index.num_blocks


def test_img2dataset_output(tmp_path):
    """Captions and metadata in the tars, tables and statistics beside them, failed samples left out, no labels."""
    folder, kept = tmp_path / "laion", []
    for shard in range(2):
        members = []
        for number in (0, 1, 3, 4):  # 2 could not be downloaded
            key, data = f"{shard:05d}{number:04d}", image(width=30, height=20)
            kept.append(data)
            meta = {"caption": "x", "url": "http://x", "key": key, "status": "success", "width": 30, "height": 20}
            members += [(f"{key}.jpg", data), (f"{key}.json", json.dumps(meta).encode()), (f"{key}.txt", b"x")]
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 5, "successes": 4}')
    report = adopt(str(folder))
    manifest = report.shard_set.manifest
    assert [content(report.shard_set, n) for n in range(8)] == kept
    assert (manifest.num_classes, manifest.class_counts) == (0, ()) and (
        report.shard_set.index.sample_label == -1
    ).all()
    assert manifest.adopted.members == {"jpg": 8, "json": 8, "txt": 8} and manifest.adopted.label_source is None
    assert report.other_files == {".json": 2, ".parquet": 2}
    assert verify(str(folder)) == []


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_over_100_bytes(tmp_path, tar_format):
    """They stand in headers of their own, before the member's."""
    long = "deep/" * 30 + "n" * 120
    members = [
        (f"{long}{n}.{end}", data) for n in range(5) for end, data in (("jpg", image()), ("cls", b"%d" % (n % 2)))
    ]
    write_tar(tmp_path / "t/a.tar", members, tar_format)
    shard_set = adopt(str(tmp_path / "t")).shard_set
    assert [content(shard_set, n) for n in range(5)] == [data for name, data in members if name.endswith("jpg")]
    assert shard_set.index.block_start[0] == 0 and verify(str(tmp_path / "t")) == []


def test_a_global_pax_header_lies_in_no_sample(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", pax_headers={"comment": "made by git archive"}) as tar:
        data = image()
        member = tarfile.TarInfo("a.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    shard_set = adopt(str(tmp_path)).shard_set
    assert content(shard_set, 0) == data and shard_set.index.block_start[0] == 1024 and verify(str(tmp_path)) == []


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_samples_are_grouped_as_webdataset_groups_them(tmp_path):
    """Keys end at the first dot of the base name, folders count, extensions are lower-cased, others belong to none."""
    a, b, c = image(), image(), image()
    write_tar(
        tmp_path / "t/x.tar",
        [("v1.0", None), ("v1.0/a.JPEG", a), ("v1.0/._a.JPEG", b"mac"), ("v1.0/a.seg.png", image("PNG")),
         ("README", b"x"), ("v2/a.jpg", b), ("v2/b.txt.gz", b"z"), ("v2/b.jpg", c)],
    )  # fmt: skip
    shard_set = adopt(str(tmp_path / "t")).shard_set
    assert [content(shard_set, n) for n in range(shard_set.manifest.num_samples)] == [a, b, c]
    assert shard_set.manifest.adopted.members == {"": 2, "jpeg": 1, "jpg": 2, "seg.png": 1, "txt.gz": 1}
    stock = read_with_webdataset(tmp_path / "t")
    assert [sample.get("jpg", sample.get("jpeg")) for sample in stock] == [a, b, c]
    assert verify(str(tmp_path / "t")) == []


def test_images_of_all_kinds_are_cropped_and_resized_as_pillow_does_it(tmp_path):
    """Grey, CMYK, palette with transparency, a PNG named .jpg; a rotation in EXIF is not followed."""
    exif = Image.Exif()
    exif[0x0112] = 6
    payloads = [
        image(mode="L", width=20, height=31),
        image(mode="CMYK", width=19, height=17),
        image("PNG", mode="P", transparency=3),
        image(exif=exif, width=40, height=16),
        image("PNG", mode="RGBA"),
        image("WEBP"),
        image("PNG", width=16, height=16),
    ]
    write_tar(tmp_path / "t/x.tar", [(f"{n}.jpg", data) for n, data in enumerate(payloads)])
    report = adopt(str(tmp_path / "t"), reading=Reading(check_images=True))
    assert report.shard_set.manifest.adopted.image_formats == {"JPEG": 3, "PNG": 3, "WEBP": 1}
    pixels, _ = SampleReader(report.shard_set, 16).read(np.arange(len(payloads)))
    for found, data in zip(pixels, payloads, strict=True):
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), as_pillow_does(data, 16))


# --- labels


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["0", "2", "1", "2"], ("0", "1", "2"), [0, 2, 1, 2]),
        (["10", "9", "010 \n", "100"], ("9", "10", "100"), [1, 0, 1, 2]),
        (["great auk", "n01", "great auk", "cat"], ("cat", "great auk", "n01"), [1, 2, 1, 0]),
    ],
)
def test_classes_found_are_sorted(tmp_path, labels, names, ids):
    write_tar(tmp_path / "t/x.tar", labelled(0, 4, labels.__getitem__))
    shard_set = adopt(str(tmp_path / "t")).shard_set
    assert shard_set.manifest.class_names == names and shard_set.index.sample_label.tolist() == ids


@pytest.mark.parametrize("labels", [["n3", "n1", "n1"], ["0", "2", "2"]])
def test_a_file_of_classes_gives_names_order_and_titles(tmp_path, labels):
    """Labels are its names, or numbers of its lines."""
    (tmp_path / "names.txt").write_text("n3 great auk\nn2 cat\nn1 dog\n")
    write_tar(tmp_path / "t/x.tar", labelled(0, 3, labels.__getitem__))
    shard_set = adopt(str(tmp_path / "t"), class_file=tmp_path / "names.txt").shard_set
    manifest = shard_set.manifest
    assert manifest.class_names == ("n3", "n2", "n1") and manifest.class_titles == ("great auk", "cat", "dog")
    assert shard_set.index.sample_label.tolist() == [0, 2, 2] and manifest.class_counts == (1, 0, 2)


@pytest.mark.parametrize(
    ("records", "label_key", "source"),
    [
        ([{"label": 1}, {"label": 0}], None, "label in .json"),
        ([{"cls": "1", "url": "x"}, {"cls": "0"}], None, "cls in .json"),
        ([{"class_id": 1}, {"class_id": 0}], None, "class_id in .json"),
        ([{"label": 7, "kind": 1}, {"label": 7, "kind": 0}], "kind", "kind in .json"),
    ],
)
def test_labels_in_json(tmp_path, records, label_key, source):
    members = [
        (f"{n}.{end}", data)
        for n, record in enumerate(records)
        for end, data in (("jpg", image()), ("json", json.dumps(record).encode()))
    ]
    write_tar(tmp_path / "t/x.tar", members)
    shard_set = adopt(str(tmp_path / "t"), reading=Reading(label_key=label_key)).shard_set
    assert shard_set.index.sample_label.tolist() == [1, 0] and shard_set.manifest.adopted.label_source == source


def test_cls_goes_before_json(tmp_path):
    write_tar(tmp_path / "t/x.tar", [("a.jpg", image()), ("a.cls", b"5"), ("a.json", b'{"label": 6}')])
    assert adopt(str(tmp_path / "t")).shard_set.manifest.class_names == ("5",)


J = image()


@pytest.mark.parametrize(
    ("members", "options", "told"),
    [
        ([("a.jpg", J), ("a.cls", b"1"), ("b.jpg", J)], {}, r"x\.tar: sample b has no label, sample a has its label"),
        ([("a.jpg", J), ("a.cls", b"1"), ("b.jpg", J), ("b.json", b'{"label": 1}')], {}, "same place"),
        ([("a.jpg", J), ("a.cls", b"-1")], {}, r"x\.tar: sample a has the label -1, but labels count from 0"),
        ([("a.jpg", J), ("a.cls", b"3")], {"names": "a\nb\n"}, r"x\.tar: sample a has the label 3, .*, 0 to 1"),
        ([("a.jpg", J), ("a.cls", b"c")], {"names": "a\nb\n"}, r"sample a has the label c, which is no class of .*\(a"),
        ([("a.jpg", J)], {"names": "a\nb\n"}, "no sample has a label"),
        ([("a.jpg", J), ("a.cls", b"3"), ("b.jpg", J), ("b.cls", b"cat")], {}, "a has the label 3, .*b has cat; which"),
        ([("a.jpg", J), ("a.cls", b" ")], {}, r"sample a: its \.cls is empty"),
        ([("a.jpg", J), ("a.cls", b"\xff")], {}, r"sample a: its \.cls is empty or no text"),
        ([("a.jpg", J), ("a.json", b"{")], {}, r"sample a: its \.json is damaged"),
        ([("a.jpg", J), ("a.json", b'{"label": 1, "cls": 1}')], {}, "has label and cls; say .* --label-key"),
        ([("a.jpg", J), ("a.json", b'{"label": 1.5}')], {}, r"label in its \.json is 1\.5"),
        ([("a.jpg", J), ("a.json", b'{"label": true}')], {}, r"label in its \.json is True"),
        ([("a.jpg", J), ("a.json", b'{"label": 1}')], {"label_key": "kind"}, r"kind in its \.json is None"),
        ([("a.jpg", J), ("a.cls", b"1")], {"label_key": "kind"}, r"has no \.json that could hold --label-key kind"),
        ([("a.jpg", J), ("b.jpg", J), ("a.cls", b"1")], {}, "sample a comes twice, with others in between"),
        ([("a.jpg", J), ("a.JPG", J)], {}, r"sample a has two members \.jpg"),
        ([("a.jpg", J), ("a.png", J)], {}, r"sample a has 2 images, \.jpg and \.png; .*--image-key jpg"),
    ],
)  # fmt: skip
def test_what_leaves_a_sample_open_is_refused_by_shard_and_sample(tmp_path, members, options, told):
    write_tar(tmp_path / "t/x.tar", members)
    names = tmp_path / "names.txt" if "names" in options else None
    if names:
        names.write_text(options["names"])
    with pytest.raises(AdoptError, match=told):
        adopt(str(tmp_path / "t"), reading=Reading(label_key=options.get("label_key")), class_file=names)
    assert not (tmp_path / "t/manifest.json").exists()


def test_a_shard_without_labels_beside_one_with_them(tmp_path):
    write_tar(tmp_path / "t/a.tar", labelled(0, 2))
    write_tar(tmp_path / "t/b.tar", [("x.jpg", J)])
    with pytest.raises(AdoptError, match=r"a\.tar: sample 00000 has its label in \.cls, b\.tar: sample x has no label"):
        adopt(str(tmp_path / "t"))


@pytest.mark.parametrize(("text", "told"), [("", "has no line"), ("a x\na y\n", "a twice"), ("a x\nb\n", "none for b")])
def test_a_file_of_classes_that_is_none(tmp_path, text, told):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(LabelError, match=told):
        adopt(str(tmp_path), class_file=tmp_path / "names.txt")


def test_the_image_of_several_is_named(tmp_path):
    a, b = image(), image("PNG")
    write_tar(tmp_path / "t/x.tar", [("a.jpg", a), ("a.input.png", b)])
    for key, expected in ((None, a), ("jpg", a), ("input.png", b)):
        report = adopt(str(tmp_path / "t"), str(tmp_path / str(key)), reading=Reading(image_key=key))
        assert content(report.shard_set, 0) == expected


# --- damage


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([("bad.txt", b"x")], r"no \.jpg, \.jpeg, \.png, \.webp among its members \(\.txt\)"),
        ([("bad.jpg", b"no image at all")], "no image"),
        ([("bad.jpg", b"")], "no image"),
    ],
)
def test_samples_without_an_image_fail_or_are_listed(tmp_path, bad, reason):
    write_tar(tmp_path / "t/x.tar", [*labelled(0, 3), *bad, *labelled(5, 3)])
    with pytest.raises(
        AdoptError, match=rf"1 sample\(s\) have no readable image .*\n  x\.tar: bad: {reason}\n.*max-sk"
    ):
        adopt(str(tmp_path / "t"))
    shard_set = adopt(str(tmp_path / "t"), max_skipped=1, complete=True).shard_set
    manifest = shard_set.manifest
    assert (manifest.num_samples, manifest.source_images, manifest.complete) == (6, 7, False)
    assert [skip.file for skip in manifest.skipped] == ["x.tar: bad"]
    assert verify(str(tmp_path / "t")) == []
    assert shard_set.index.num_blocks == 1  # what was left out lies in the block of those around it


def test_check_images_finds_what_a_header_hides(tmp_path):
    data = image(width=100, height=100)
    write_tar(tmp_path / "t/x.tar", [("a.jpg", J), ("b.jpg", data[: len(data) // 2])])
    with pytest.raises(AdoptError, match=r"x\.tar: b: OSError: .*truncated"):
        adopt(str(tmp_path / "t"), reading=Reading(check_images=True))
    shard_set = adopt(str(tmp_path / "t")).shard_set  # the header alone is sound; reading it is an error that names it
    with pytest.raises(ShardSetError, match=r"x\.tar: sample 1 .*truncated"):
        list(read_in_order(shard_set, 8, [range(2)]))


def test_32_bit_images_are_found_by_their_header(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(file, "TIFF")
    write_tar(tmp_path / "t/x.tar", [("a.jpg", file.getvalue())])
    with pytest.raises(AdoptError, match="32-bit pixels"):
        adopt(str(tmp_path / "t"))


def test_an_output_that_cannot_be_written_is_told_before_anything_is_read(written, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("pipeline.adopt.read_shard", None)
    with pytest.raises(AdoptError, match=r"file/set cannot be written \(Not a directory\); name another directory"):
        adopt(str(written[0]), str(tmp_path / "file/set"))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_cut_and_joined_tars_are_refused(tmp_path):
    """Stock webdataset reads half of each without a word."""
    whole = write_tar(tmp_path / "t/x.tar", labelled(0, 8)).read_bytes()
    with tarfile.open(tmp_path / "t/x.tar") as tar:
        border = tar.getmembers()[8].offset
    for data, told in ((whole[:border], "is cut off"), (whole + whole, "goes on after its end mark"), (b"", "no tar")):
        (tmp_path / "t/x.tar").write_bytes(data)
        if data:
            assert len(read_with_webdataset(tmp_path / "t")) in (4, 8)
        with pytest.raises(TarError, match=rf"x\.tar .*{told}"):
            adopt(str(tmp_path / "t"))


def test_where_there_are_no_tars(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(
        AdoptError, match=r"holds no \.tar \(0 other file\(s\)\); give the directory or prefix in which"
    ):
        adopt(str(tmp_path))
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(AdoptError, match=r"0\.tar\.gz is compressed"):
        adopt(str(tmp_path))
    write_tar(tmp_path / "sub/x.tar", [])
    with pytest.raises(AdoptError, match="hold no image"):
        adopt(str(tmp_path / "sub"))


# --- where it is written, and again


def test_two_workers_write_the_same_bytes(written, tmp_path):
    folder, _ = written
    write_tar(folder / "empty.tar", [])
    adopt(str(folder), str(tmp_path / "one"))
    adopt(str(folder), str(tmp_path / "two"), workers=2)
    for name in ("manifest.json", "index.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_elsewhere_the_shards_are_found_from_there_and_move_along(written, tmp_path):
    folder, _ = written
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    shard_set = adopt(str(folder), str(tmp_path / "indices/set")).shard_set
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before  # nothing beside the tars
    assert shard_set.manifest.adopted.shards_location == "../../tars"
    expected = [content(shard_set, n) for n in range(20)]
    beside = adopt(str(folder)).shard_set
    assert beside.manifest.adopted.shards_location is None and [content(beside, n) for n in range(20)] == expected

    (tmp_path / "moved").mkdir()
    for name in ("tars", "indices"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    location = str(tmp_path / "moved/indices/set")
    moved = open_shard_set(location)
    assert [content(moved, n) for n in range(20)] == expected and verify(location) == []
    pixels, _ = SampleReader(moved, 8).read(np.arange(20))
    np.testing.assert_array_equal(pixels[7].permute(1, 2, 0).numpy(), as_pillow_does(expected[7], 8))
    write_tar(tmp_path / "moved/tars/new.tar", [("a.jpg", J)])
    assert ["new.tar" in fault for fault in verify(location)] == [True]

    shutil.move(tmp_path / "moved/tars", tmp_path / "tars")
    for read in (open_shard_set, verify):
        with pytest.raises(
            ShardSetError, match=r"lie in \.\./\.\./tars from there, .*no such directory; put them back"
        ):
            read(location)


def test_a_link_to_the_output_leads_to_the_same_shards(written, tmp_path):
    folder, _ = written
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    shard_set = adopt(str(folder), str(tmp_path / "link")).shard_set
    assert shard_set.manifest.adopted.shards_location == "../../tars"
    assert content(shard_set, 3) == content(adopt(str(folder)).shard_set, 3)


def test_again_it_is_the_same_and_another_set_is_not_written_over(written, tmp_path, tiny_shards):
    folder, _ = written
    first = adopt(str(folder))
    again = adopt(str(folder))
    assert again.was_there and again.shard_set.dataset_id == first.shard_set.dataset_id
    with pytest.raises(
        AdoptError, match=r"holds the manifest of another set \(split differ\); choose another --output"
    ):
        adopt(str(folder), split="other")
    data = bytearray((folder / "00001.tar").read_bytes())
    data[int(first.shard_set.index.sample_offset[8]) + 400] ^= 1
    (folder / "00001.tar").write_bytes(data)
    with pytest.raises(AdoptError, match=r"another set \(shards, index_sha256 differ\)"):
        adopt(str(folder))
    write_tar(folder / "00003.tar", labelled(0, 1))
    with pytest.raises(AdoptError, match=r"another set \(names or sizes of its shards differ\)"):
        adopt(str(folder))
    with pytest.raises(AdoptError, match=r"another set \(it was built, and has its index\)"):
        adopt(str(tiny_shards))
    assert open_shard_set(str(folder)).dataset_id == first.shard_set.dataset_id


def test_shards_of_our_own_can_be_adopted_elsewhere(tiny_shards, tmp_path):
    ours, theirs = open_shard_set(str(tiny_shards)), adopt(str(tiny_shards), str(tmp_path / "set")).shard_set
    for item in dataclasses.fields(ours.index):
        np.testing.assert_array_equal(getattr(theirs.index, item.name), getattr(ours.index, item.name))


def test_an_interrupted_run_leaves_no_set(written, monkeypatch):
    """The manifest is the last to be written."""
    folder, _ = written
    write = shard_file.write_file

    def fail_at_manifest(path, data):
        if path.name == "manifest.json":
            raise OSError("no space left")
        write(path, data)

    monkeypatch.setattr("pipeline.adopt.write_file", fail_at_manifest)
    with pytest.raises(OSError, match="no space"):
        adopt(str(folder))
    with pytest.raises(ShardSetError, match=r"holds no manifest\.json.*shards.py index"):
        open_shard_set(str(folder))
    monkeypatch.undo()
    assert not adopt(str(folder)).was_there
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors", ".tar", ".tar", ".tar"]


@pytest.fixture
def shards_read(monkeypatch) -> list[str]:
    """Names of the shards whose bytes are read from now on."""
    names = []

    def noted(shard, advance):
        names.append(shard.name)
        return foreign_shard.read_shard(shard, advance)

    monkeypatch.setattr("pipeline.adopt.read_shard", noted)
    return names


def test_an_interrupted_run_goes_on_after_the_shards_it_has_read(written, tmp_path, shards_read, capsys):
    folder, _ = written
    whole = adopt(str(folder), str(tmp_path / "whole"))
    data = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(data[:2000])
    shards_read.clear()
    with pytest.raises(TarError):
        adopt(str(folder), str(tmp_path / "set"))
    (folder / "00002.tar").write_bytes(data)
    capsys.readouterr()
    report = adopt(str(folder), str(tmp_path / "set"))
    assert shards_read == ["00000.tar", "00001.tar", "00002.tar", "00002.tar"]
    assert "2 of 3 shard(s) were read by an earlier run" in capsys.readouterr().err
    assert report.shard_set.manifest == whole.shard_set.manifest
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["index.safetensors", "manifest.json"]


@pytest.mark.parametrize("change", ["time of the tar", "reading", "half a record"])
def test_what_an_interrupted_run_has_read_is_read_anew_if_it_may_differ(change, written, tmp_path, shards_read):
    folder, _ = written
    write_tar(folder / "00003.tar", [("a.jpg", image()), ("a.cls", b"")])
    with pytest.raises(AdoptError):
        adopt(str(folder))
    (folder / "00003.tar").unlink()
    shards_read.clear()
    if change == "time of the tar":
        os.utime(folder / "00001.tar", (0, 0))
    elif change == "half a record":
        record = next(path for path in (folder / ".indexing").iterdir() if b"00001.tar" in path.read_bytes())
        os.truncate(record, record.stat().st_size // 2)
    adopt(str(folder), reading=Reading(check_images=change == "reading"))
    assert shards_read == (["00000.tar", "00001.tar", "00002.tar"] if change == "reading" else ["00001.tar"])


def test_memory_is_bounded_by_blocks_not_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 50_000)
    monkeypatch.setattr(foreign_shard, "READ_AHEAD_BYTES", 20_000)
    held = []
    forget = foreign_shard._Window.forget

    def measured(window, before):
        held.append(len(window._data))
        forget(window, before)

    monkeypatch.setattr(foreign_shard._Window, "forget", measured)
    write_tar(tmp_path / "t/x.tar", labelled(0, 200))
    assert len((tmp_path / "t/x.tar").read_bytes()) > 500_000
    adopt(str(tmp_path / "t"))
    assert max(held) <= 50_000 + 20_000 + 10_000


# --- object storage


def put_tars(folder: Path, location: str) -> None:
    where = s3_store.parse(location)
    for path in folder.glob("*.tar"):
        s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key(path.name), Body=path.read_bytes())


@pytest.mark.s3
def test_tars_in_object_storage(written, tmp_path, s3_bucket, monkeypatch):
    """Index beside them, in another prefix, or on this machine; each byte is asked for once."""
    folder, _ = written
    location = s3_bucket()
    put_tars(folder, location)
    local = adopt(str(folder), str(tmp_path / "local")).shard_set
    asked, read = [], object_store.read_range

    def counted(location, name, start, stop, counts=None):
        asked.append((name, start, stop))
        return read(location, name, start, stop, counts)

    monkeypatch.setattr(object_store, "read_range", counted)
    with pytest.raises(AdoptError, match=r"no \.png among"):
        adopt(location, reading=Reading(image_key="png"))
    asked.clear()  # read otherwise, so it does not count
    beside = adopt(location).shard_set
    assert sum(stop - start for _, start, stop in asked) == sum(shard.bytes for shard in local.manifest.shards)
    monkeypatch.undo()
    assert adopt(location).was_there
    here = adopt(location, str(tmp_path / "here")).shard_set
    there = adopt(location, location.replace("/set", "/other")).shard_set
    for shard_set in (beside, here, there):
        assert shard_set.manifest.index_sha256 == local.manifest.index_sha256
        assert shard_set.shards_location == location
        assert verify(shard_set.location) == []
        pixels, _ = SampleReader(shard_set, 8).read(np.arange(20))
        np.testing.assert_array_equal(pixels, SampleReader(local, 8).read(np.arange(20))[0])
    assert beside.manifest.adopted.shards_location is None
    assert here.manifest.adopted.shards_location == there.manifest.adopted.shards_location == location
    with pytest.raises(AdoptError, match=r"is in object storage, but the tars at .* are on this machine only"):
        adopt(str(folder), location)
    with pytest.raises(ShardSetError, match=r"shards of .* lie in .*; copy them to .* then run .* index"):
        upload(tmp_path / "local", location.replace("/set", "/third"))


@pytest.mark.s3
def test_a_relative_place_of_shards_means_nothing_in_a_bucket(written, tmp_path, s3_bucket):
    folder, _ = written
    location = s3_bucket()
    adopt(str(folder), str(tmp_path / "local"))
    where = s3_store.parse(location)
    for path in (tmp_path / "local").iterdir():
        s3_store.client(where).put_object(Bucket=where.bucket, Key=where.key(path.name), Body=path.read_bytes())
    with pytest.raises(ShardSetError, match=r"lie in \.\./tars from there, .* no such directory"):
        open_shard_set(location)
