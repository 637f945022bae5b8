import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.ground_truth import LabelError
from pipeline.sources import SourceError, list_source
from pipeline.tars import TarError

TREE = {
    "cat/b.jpg": b"cat b",
    "cat/a.jpg": b"cat a!",
    "ant/10.jpg": b"ant ten",
    "cat-2/a.jpg": b"other",
    "dog/x.png": b"d",
}
IN_ORDER = ["ant/10.jpg", "cat/a.jpg", "cat/b.jpg", "cat-2/a.jpg", "dog/x.png"]


def make_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def tar_bytes(tmp_path: Path, files: dict[str, bytes]) -> bytes:
    return make_tar(tmp_path / "inner.tar", files).read_bytes()


@pytest.mark.parametrize("form", ["folder", "folder inside", "tar", "tar ./", "tar inside", "tar of tars"])
def test_every_form_of_class_folders_is_the_same_source(tmp_path, form):
    wrapper = "data/train/" if "inside" in form else ""
    wrapped = {wrapper + name: data for name, data in TREE.items()}
    if form.startswith("folder"):
        location = make_tree(tmp_path / "set", wrapped)
    elif form == "tar of tars":
        classes = {name.split("/")[0] for name in TREE}
        location = make_tar(
            tmp_path / "set.tar",
            {
                f"{folder}.tar": tar_bytes(
                    tmp_path, {n.split("/")[1]: d for n, d in TREE.items() if n.split("/")[0] == folder}
                )
                for folder in classes
            },
        )
    elif form == "tar ./":
        make_tree(tmp_path / "set", TREE)
        location = tmp_path / "set.tar"
        with tarfile.open(location, "w") as tar:
            tar.add(tmp_path / "set", ".")
    else:
        location = make_tar(tmp_path / "set.tar", wrapped)
    source = list_source(location)
    assert source.files == IN_ORDER
    assert source.class_names == ("ant", "cat", "cat-2", "dog")
    assert source.labels.tolist() == [0, 1, 1, 2, 3]
    assert source.sizes.tolist() == [len(TREE[name]) for name in IN_ORDER]
    assert list(source.read_all()) == [TREE[name] for name in IN_ORDER]
    assert source.sha256() == list_source(make_tree(tmp_path / "reference", TREE)).sha256()


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_one_folder_of_images_has_no_labels(tmp_path, kind):
    faces = {"img/000002.jpg": b"2", "img/000001.jpg": b"1"}
    location = make_tree(tmp_path / "faces", faces) if kind == "folder" else make_tar(tmp_path / "faces.tar", faces)
    source = list_source(location)
    assert source.layout == f"{kind} of images without labels, inside img/"
    assert (source.files, source.labels.tolist(), source.class_names) == (["000001.jpg", "000002.jpg"], [-1, -1], ())


def test_validation_tar_takes_its_labels_from_the_ground_truth(tmp_path):
    files = {f"ILSVRC2012_val_{number:08d}.JPEG": b"%d" % number for number in (3, 1, 2)}
    location = make_tar(tmp_path / "ILSVRC2012_img_val.tar", files)
    truth = tmp_path / "truth.txt"
    truth.write_text("n2\nn1\nn2\n")
    source = list_source(location, truth)
    assert list(source.read_all()) == [b"1", b"2", b"3"]
    assert source.labels.tolist() == [1, 0, 1]
    with pytest.raises(SourceError, match=r"ImageNet's validation images.*give --ground-truth"):
        list_source(location)
    truth.write_text("n2\nn1\n")
    with pytest.raises(LabelError, match="2 lines for 3 images"):
        list_source(location, truth)


def test_hidden_files_are_passed_over_and_counted(tmp_path):
    source = list_source(make_tree(tmp_path, {**TREE, ".DS_Store": b"", "cat/._a.jpg": b"", ".git/objects/ab/cd": b""}))
    assert source.files == IN_ORDER
    assert source.num_hidden == 3


def test_titles_are_read(tmp_path):
    titles = tmp_path / "titles.txt"
    titles.write_text("ant an ant\ncat a cat\ncat-2 another cat\ndog a dog\nelk an elk\n")
    source = list_source(make_tree(tmp_path / "set", TREE), titles=titles)
    assert source.class_titles == ("an ant", "a cat", "another cat", "a dog")


def test_selected_images_come_in_the_order_asked_for(tmp_path):
    source = list_source(make_tree(tmp_path, TREE))
    chosen = source.select(np.array([3, 0]))
    assert list(chosen.read_all()) == [b"other", b"ant ten"]
    assert chosen.labels.tolist() == [2, 0]


def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path):
    source = list_source(make_tree(tmp_path, TREE))
    (tmp_path / "cat" / "b.jpg").write_bytes(b"other length")
    with pytest.raises(SourceError, match=r"cat/b\.jpg had 5 bytes when the source was listed, now 12"):
        list(source.read_all())


# Bad input: (files, what the message must say). Each as a folder and as a tar.
BAD_TREES = {
    "above a train and val pair": (
        {"train/cat/1.jpg": b"", "train/dog/1.jpg": b"", "val/cat/1.jpg": b"", "val/dog/2.jpg": b""},
        r"train and val are splits: build each as a set of its own",
    ),
    "above flat splits": ({"train/1.jpg": b"", "val/2.jpg": b""}, r"folders train, val .* are splits, not classes"),
    "one level too deep": (
        {"cat/images/1.jpg": b"", "dog/images/1.jpg": b""},
        r"class folders lie one level too deep, or have folders of their own",
    ),
    "one class with a folder of its own": (
        {"cat/1.jpg": b"", "dog/more/2.jpg": b""},
        r"names the class of dog/more/2\.jpg; class folders lie one level too deep, or have folders of their own",
    ),
    "a file beside the class folders": (
        {"cat/1.jpg": b"", "dog/1.jpg": b"", "readme.txt": b""},
        r"readme\.txt lies beside the class folders: remove it",
    ),
}


@pytest.mark.parametrize("case", BAD_TREES)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_layouts_that_leave_the_labels_open(tmp_path, case, kind):
    files, message = BAD_TREES[case]
    location = make_tree(tmp_path / "set", files) if kind == "folder" else make_tar(tmp_path / "set.tar", files)
    with pytest.raises(SourceError, match=message):
        list_source(location)


def test_empty_classes_are_named(tmp_path):
    make_tree(tmp_path / "tree", TREE)
    (tmp_path / "tree" / "eel").mkdir()
    with pytest.raises(SourceError, match=r"has 1 empty folder\(s\): eel; fill or remove"):
        list_source(tmp_path / "tree")
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        tar.add(tmp_path / "tree", ".")
    with pytest.raises(SourceError, match=r"has 1 empty folder\(s\): eel; fill or remove"):
        list_source(tmp_path / "tree.tar")
    tars = {"n1.tar": tar_bytes(tmp_path, {"a.JPEG": b"a"}), "n2.tar": tar_bytes(tmp_path, {})}
    with pytest.raises(SourceError, match=r"has 1 empty class tar\(s\): n2\.tar"):
        list_source(make_tar(tmp_path / "train.tar", tars))


def test_no_images(tmp_path):
    with pytest.raises(SourceError, match=r"does not exist; give a tar of one tar per class"):
        list_source(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no files; give"):
        list_source(tmp_path / "empty")
    with pytest.raises(SourceError, match="holds no files; give"):
        list_source(make_tar(tmp_path / "empty.tar", {}))


def test_what_cannot_be_read_in_place_is_explained(tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(b"whatever"))
    with pytest.raises(SourceError, match=r"compressed \(gzip\).*decompress it first"):
        list_source(tmp_path / "set.tar.gz")
    (tmp_path / "notes.txt").write_bytes(b"no tar at all" * 100)
    with pytest.raises(TarError, match=r"notes\.txt is no tar archive"):
        list_source(tmp_path / "notes.txt")
    with pytest.raises(SourceError, match=r"holds 1 tar\(s\), such as n1\.tar; give one tar as --source"):
        list_source(make_tree(tmp_path / "half unpacked", {"n1.tar": b""}))


def test_mixed_and_doubled_members(tmp_path):
    inner = tar_bytes(tmp_path, {"a.JPEG": b"a"})
    with pytest.raises(SourceError, match=r"1 other file\(s\), such as readme\.txt"):
        list_source(make_tar(tmp_path / "mixed.tar", {"n1.tar": inner, "readme.txt": b""}))
    with pytest.raises(SourceError, match=r"1 name\(s\) twice, such as n1/a\.JPEG"):
        list_source(make_tar(tmp_path / "doubled.tar", {"x/n1.tar": inner, "y/n1.tar": inner}))


def test_ground_truth_for_a_source_with_labels_of_its_own(tmp_path):
    (tmp_path / "truth.txt").write_text("a\n")
    with pytest.raises(SourceError, match="has folders, which are its labels; leave out --ground-truth"):
        list_source(make_tree(tmp_path / "set", TREE), tmp_path / "truth.txt")
    inner = tar_bytes(tmp_path, {"a.JPEG": b"a"})
    with pytest.raises(SourceError, match="labels in the names of its 1 tars"):
        list_source(make_tar(tmp_path / "train.tar", {"n1.tar": inner}), tmp_path / "truth.txt")


def test_truncated_imagenet_tar(tmp_path, shared_data):
    """Cut in the outer archive, at a border between class tars, and inside the last class tar's own bytes."""
    with open(shared_data / "ILSVRC2012_img_train.tar", "rb") as file:
        data = file.read(512 + 102400 + 512 + 102400)
    (tmp_path / "border.tar").write_bytes(data)
    with pytest.raises(TarError, match=r"border\.tar is cut off: its 205,824 bytes end before the end of its end mark"):
        list_source(tmp_path / "border.tar")
    (tmp_path / "middle.tar").write_bytes(data[:-50_000])
    with pytest.raises(TarError, match=r"middle\.tar is cut off.* before the end of n01484850\.tar"):
        list_source(tmp_path / "middle.tar")


def test_truncated_class_tar(tmp_path):
    inner = tar_bytes(tmp_path, {"a.JPEG": b"a" * 2000, "b.JPEG": b"b" * 2000})
    for stop in (3000, 512 + 2048, 512 + 2048 + 512 + 100):  # in a's content, behind a, in b's content
        location = make_tar(tmp_path / "train.tar", {"n1.tar": inner, "n2.tar": inner[:stop], "n3.tar": inner})
        with pytest.raises(TarError, match=r"train\.tar: n2\.tar is cut off"):
            list_source(location)
