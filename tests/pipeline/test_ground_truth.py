import io
import tarfile

import numpy as np
import pytest
import scipy.io

from pipeline import ground_truth
from pipeline.ground_truth import LabelError

FILES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
# As in the real devkit: the ids are in another order than the synsets, and inner nodes have ids above the leaves.
SYNSETS = [
    (1, "n300", "cherry", 0),
    (2, "n100", "apple", 0),
    (3, "n200", "banana, plantain", 0),
    (4, "n050", "fruit", 3),
]


@pytest.fixture
def devkit(tmp_path):
    """A devkit folder in the layout of ILSVRC2012_devkit_t12."""
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    scipy.io.savemat(data / "meta.mat", {"synsets": np.array(SYNSETS, dtype=kinds)[:, None]})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n3\n")
    return data.parent


@pytest.mark.parametrize("form", ["folder", "tar.gz", "text file beside meta.mat"])
def test_devkit_ids_become_labels_of_sorted_synsets(devkit, tmp_path, form):
    truth = devkit
    if form == "tar.gz":
        truth = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
        with tarfile.open(truth, "w:gz") as tar:
            tar.add(devkit, devkit.name)
    elif form != "folder":
        truth = devkit / "data" / "ILSVRC2012_validation_ground_truth.txt"
    labels, class_names, titles = ground_truth.read(truth, FILES)
    assert class_names == ("n100", "n200", "n300")
    assert titles == ("apple", "banana, plantain", "cherry")
    assert labels.tolist() == [1, 2, 0, 1]
    assert labels.dtype == np.int32


@pytest.mark.parametrize("named", [True, False])
def test_a_plain_list_of_class_names(tmp_path, named):
    classes = ["n200", "n100", "n200", "n300"]
    lines = [f"{file} {name}" for file, name in zip(FILES, classes, strict=True)] if named else classes
    truth = tmp_path / "truth.txt"
    truth.write_text("\n".join(reversed(lines) if named else lines) + "\n")
    labels, class_names, titles = ground_truth.read(truth, FILES)
    assert (labels.tolist(), class_names, titles) == ([1, 0, 1, 2], ("n100", "n200", "n300"), ())


def test_another_length_is_refused(devkit, tmp_path):
    with pytest.raises(LabelError, match=r"4 lines for 3 images"):
        ground_truth.read(devkit, FILES[:3])
    truth = tmp_path / "truth.txt"
    truth.write_text("n1\nn2\n")
    with pytest.raises(LabelError, match=r"2 lines for 4 images"):
        ground_truth.read(truth, FILES)
    truth.write_text(f"{FILES[0]} n1\n{FILES[1]} n1\nother.JPEG n1\n")
    with pytest.raises(LabelError, match=r"2 have no line \['ILSVRC2012_val_00000003.*1 have no image \['other"):
        ground_truth.read(truth, FILES)


def test_numbers_without_the_devkit_are_refused(tmp_path):
    """Taken for labels they would permute the classes, and nothing would ever say so."""
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("3\n1\n2\n3\n")
    with pytest.raises(LabelError, match=r"holds numbers.*Give the whole devkit"):
        ground_truth.read(truth, FILES)


def test_what_is_no_devkit_is_refused(tmp_path):
    with pytest.raises(LabelError, match="does not exist"):
        ground_truth.read(tmp_path / "absent", FILES)
    with pytest.raises(LabelError, match=r"holds no ILSVRC2012_validation.* and no meta\.mat"):
        ground_truth.read(tmp_path, FILES)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(LabelError, match="no text file"):
        ground_truth.read(tmp_path / "binary", FILES)


def test_a_devkit_tar_without_the_labels_is_refused(tmp_path):
    truth = tmp_path / "other.tar"
    with tarfile.open(truth, "w") as tar:
        member = tarfile.TarInfo("data/meta.mat")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(LabelError, match=r"holds no ILSVRC2012_validation_ground_truth\.txt, so"):
        ground_truth.read(truth, FILES)


def test_titles_are_needed_for_every_class(tmp_path):
    path = tmp_path / "titles.txt"
    path.write_text("n2 great white shark\nn1 tench\nn3 ray\n")
    assert ground_truth.read_titles(path, ["n1", "n2"]) == ("tench", "great white shark")
    with pytest.raises(LabelError, match="no line for 1 of 2 classes, such as n4"):
        ground_truth.read_titles(path, ["n1", "n4"])
