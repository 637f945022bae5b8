"""Labels of a flat source: ImageNet's devkit, or a plain list."""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_IDS_NAME = "ILSVRC2012_validation_ground_truth.txt"
_META_NAME = "meta.mat"

Labels = tuple[npt.NDArray[np.int32], tuple[str, ...], tuple[str, ...]]


class LabelError(ValueError):
    """Labels that are missing, do not fit the images, or mean nothing; the message says which and the way out."""


def read(truth: Path, files: Sequence[str]) -> Labels:
    """Reads the class of each file.

    Args:
        truth: the devkit ILSVRC2012_devkit_t12 (its folder or its tar, compressed or not), a text file of lines
            `FILE CLASS`, or one of a line `CLASS` per file in the order of their names.
        files: names of the images, sorted.

    Returns:
        (N,) labels in the order of `files`, sorted class names, their titles (empty if the ground truth has none).

    Raises:
        LabelError: ground truth that is missing, of another length, or of numbers whose meaning is not given.
    """
    if not truth.exists():
        raise LabelError(f"--ground-truth {truth} does not exist; give the devkit (folder or tar) or a list of labels")
    if truth.is_dir() or tarfile.is_tarfile(truth):
        return _from_devkit(*_open_devkit(truth), files, truth)
    meta = truth.parent / _META_NAME
    if truth.name == _IDS_NAME and meta.exists():
        return _from_devkit(truth.read_bytes(), meta.read_bytes(), files, truth)
    return _from_list(_lines(truth), files, truth)


def read_titles(path: Path, class_names: Sequence[str]) -> tuple[str, ...]:
    """Reads lines `CLASS title` and returns the titles in the order of class_names; each class must have one."""
    titles = dict(line.split(maxsplit=1) for line in _lines(path) if len(line.split()) > 1)
    missing = [name for name in class_names if name not in titles]
    if missing:
        raise LabelError(
            f"--class-names {path} has no line for {len(missing)} of {len(class_names)} classes, such as {missing[0]}; "
            "it needs a line `CLASS title` for each"
        )
    return tuple(titles[name] for name in class_names)


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reads lines `CLASS title` or `CLASS` as they stand: class names, and their titles (empty if there are none)."""
    lines = [line.split(maxsplit=1) for line in _lines(path)]
    names = tuple(line[0] for line in lines)
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled or not names:
        raise LabelError(f"--class-names {path} " + (f"has {doubled[0]} twice" if doubled else "has no line"))
    untitled = [line[0] for line in lines if len(line) == 1]
    if untitled and len(untitled) < len(lines):
        raise LabelError(f"--class-names {path} has a title for some classes, but none for {untitled[0]}; add or drop")
    return names, () if untitled else tuple(line[1] for line in lines)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LabelError(f"{path} is no text file ({error.reason} at byte {error.start})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _from_list(lines: list[str], files: Sequence[str], truth: Path) -> Labels:
    known = set(files)
    if lines and len(lines[0].split()) > 1 and lines[0].rsplit(maxsplit=1)[0] in known:
        class_of = dict(line.rsplit(maxsplit=1) for line in lines if len(line.split()) > 1)
        unlabelled = [file for file in files if file not in class_of]
        strangers = [file for file in class_of if file not in known]
        if unlabelled or strangers or len(class_of) != len(lines):
            raise LabelError(
                f"--ground-truth {truth} needs one line `FILE CLASS` for each image. Of {len(files):,} images "
                f"{len(unlabelled)} have no line {unlabelled[:1]}; of its {len(lines):,} lines {len(strangers)} have "
                f"no image {strangers[:1]} and {len(lines) - len(class_of)} are doubled or broken"
            )
        classes = [class_of[file] for file in files]
    else:
        _check_length(len(lines), files, truth)
        classes = lines
    if all(re.fullmatch(r"\d+", name) for name in classes):
        raise LabelError(
            f"--ground-truth {truth} holds numbers; which classes they mean cannot be told (the ids of ImageNet's "
            "validation_ground_truth.txt are not in the order of the synsets). Give the whole devkit "
            "(ILSVRC2012_devkit_t12.tar.gz or its folder), or a list of class names"
        )
    return _labels(classes, ())


def _from_devkit(ids: bytes, meta: bytes, files: Sequence[str], truth: Path) -> Labels:
    """The ids 1 ... 1000 of the ground truth are ILSVRC2012_IDs of meta.mat's leaves, which give synset and words.

    Same reading as torchvision.datasets.imagenet.parse_devkit_archive.
    """
    import scipy.io  # slow to import, and only a devkit needs it

    synsets = np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
    synset_of = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
    title_of = {str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves}
    image_ids = [int(line) for line in ids.split()]
    _check_length(len(image_ids), files, truth)
    strange = sorted(set(image_ids) - set(synset_of))
    if strange:
        raise LabelError(f"{truth}: the ground truth names class {strange[0]}, which {_META_NAME} does not have")
    class_names = tuple(sorted(title_of))
    labels, _, _ = _labels([synset_of[image_id] for image_id in image_ids], class_names)
    return labels, class_names, tuple(title_of[name] for name in class_names)


def _labels(classes: list[str], class_names: tuple[str, ...]) -> Labels:
    class_names = class_names or tuple(sorted(set(classes)))
    label_of = {name: label for label, name in enumerate(class_names)}
    return np.array([label_of[name] for name in classes], np.int32), class_names, ()


def _check_length(lines: int, files: Sequence[str], truth: Path) -> None:
    if lines != len(files):
        raise LabelError(
            f"--ground-truth {truth} has {lines:,} lines for {len(files):,} images; it needs one for each, "
            "in the order of the file names: is it the list of another set, or are images missing?"
        )


def _open_devkit(truth: Path) -> tuple[bytes, bytes]:
    """The bytes of ground truth and meta.mat, wherever in the devkit they lie."""
    wanted = (_IDS_NAME, _META_NAME)
    found: dict[str, bytes] = {}
    if truth.is_dir():
        found = {path.name: path.read_bytes() for name in wanted for path in truth.rglob(name)}
    else:
        with tarfile.open(truth) as tar:
            for member in tar:
                name = Path(member.name).name
                file = tar.extractfile(member) if name in wanted else None
                if file is not None:
                    found[name] = file.read()
    missing = [name for name in wanted if name not in found]
    if missing:
        raise LabelError(
            f"--ground-truth {truth} holds no {' and no '.join(missing)}, so it is not ImageNet's devkit; "
            "give ILSVRC2012_devkit_t12.tar.gz or its folder, or a list of labels as a text file"
        )
    return found[_IDS_NAME], found[_META_NAME]
