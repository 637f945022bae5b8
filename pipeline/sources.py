"""Finds the images of a source and their labels: official ImageNet tars, class folders, flat folders, tars of either.

Nothing is unpacked: a source is a list of (name, place, size, label), read in place. The list is sorted by class and
name, so that a folder and a tar of it are the same source.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from pipeline import ground_truth, tars
from pipeline.bar import Bar

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_LAYOUTS = (
    "a tar of one tar per class (ILSVRC2012_img_train.tar), a folder per class, a folder of images, or a tar of these"
)


class SourceError(ValueError):
    """A source that cannot become a set; the message says what was found, where, and the way out."""


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a source, in order of class and name."""

    location: Path  # the tar, or the folder that `files` are relative to
    layout: str  # for people
    files: Sequence[str]  # N names, unique
    offsets: npt.NDArray[np.int64]  # (N,) first byte in the tar; -1: a file of its own
    sizes: npt.NDArray[np.int64]  # (N,) bytes
    labels: npt.NDArray[np.int32]  # (N,) -1: no labels
    class_names: tuple[str, ...]
    class_titles: tuple[str, ...]
    num_hidden: int  # files passed over because their name, or a folder's above them, begins with a dot

    def __len__(self) -> int:
        return len(self.files)

    def select(self, rows: npt.NDArray[np.int64]) -> "Source":
        """The same source with these images only, in this order."""
        return replace(
            self,
            files=[self.files[row] for row in rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            labels=self.labels[rows],
        )

    def read_all(self) -> Iterator[bytes]:
        """Yields the content of each file, in order.

        Raises:
            SourceError: a file is shorter or longer than it was when the source was listed.
        """
        with nullcontext() if self.location.is_dir() else open(self.location, "rb") as tar:
            for name, offset, size in zip(self.files, self.offsets.tolist(), self.sizes.tolist(), strict=True):
                data = os.pread(tar.fileno(), size, offset) if tar else (self.location / name).read_bytes()
                if len(data) != size:
                    raise SourceError(
                        f"{self.location}: {name} had {size:,} bytes when the source was listed, now {len(data):,}; "
                        "leave the source alone while it is read, and run the same command again"
                    )
                yield data

    def sha256(self) -> str:
        """Hash over the list (name, bytes, label): equal for a folder and a tar of it."""
        lines = zip(self.files, self.sizes.tolist(), self.labels.tolist(), strict=True)
        text = "".join(f"{name}\0{size}\0{label}\n" for name, size, label in lines)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class _Entries:
    """What lies in a folder or a tar, before it is known what it means."""

    files: list[tuple[str, int, int]]  # (name, offset, bytes)
    folders: set[str]
    num_hidden: int = 0

    def add_file(self, name: str, offset: int, size: int) -> None:
        if _is_hidden(name):
            self.num_hidden += 1
        else:
            self.files.append((name, offset, size))

    def add_folder(self, name: str) -> None:
        if not _is_hidden(name):
            self.folders.add(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def list_source(location: Path, truth: Path | None = None, titles: Path | None = None) -> Source:
    """Lists a source, whose layout it finds out.

    Args:
        location: a tar or a folder.
        truth: labels of a flat source: the ImageNet devkit (folder or tar), or a list (`ground_truth.read`).
        titles: file of lines `CLASS title`, which names every class.

    Raises:
        SourceError: no images, empty classes, a layout that leaves the labels open, labels that do not fit.
        TarError: an archive that is cut off or damaged.
    """
    if not location.exists():
        raise SourceError(f"--source {location} does not exist; give {_LAYOUTS}")
    read = f"the {'folder' if location.is_dir() else 'tar'} {location}"
    entries = _walk_folder(location) if location.is_dir() else _walk_tar(location)
    if not entries.files:
        raise SourceError(f"{read} holds no files; give {_LAYOUTS}")
    class_tars = [name for name, _, _ in entries.files if name.endswith(".tar")]
    if not class_tars:
        source = _tree(location, entries, read, truth)
    elif location.is_dir():
        raise SourceError(f"{read} holds {len(class_tars)} tar(s), such as {min(class_tars)}; give one tar as --source")
    elif truth is not None:
        raise SourceError(f"{read} has its labels in the names of its {len(class_tars)} tars; leave out --ground-truth")
    else:
        source = _tar_of_class_tars(location, entries)
    doubled = [name for name, count in Counter(source.files).items() if count > 1]
    if doubled:
        raise SourceError(f"{read} holds {len(doubled)} name(s) twice, such as {doubled[0]}; pack it again")
    if titles is not None:
        source = replace(source, class_titles=ground_truth.read_titles(titles, source.class_names))
    return source


def _walk_folder(location: Path) -> _Entries:
    def fail(error: OSError) -> None:
        raise SourceError(f"{error.filename} cannot be listed ({error.strerror}); check its permissions") from error

    entries = _Entries([], set())
    with Bar(None, f"listing {location.name}", "files") as bar:
        for parent, folders, names in os.walk(location, onerror=fail, followlinks=True):
            inside = "" if parent == str(location) else os.path.relpath(parent, location) + "/"
            for name in folders:
                entries.add_folder(inside + name)
            for name in names:
                path = os.path.join(parent, name)
                try:
                    entries.add_file(inside + name, -1, os.stat(path).st_size)
                except OSError as error:
                    raise SourceError(f"{path} cannot be read ({error.strerror}); mend or remove it") from error
            bar.update(len(names))
    return entries


def _walk_tar(location: Path) -> _Entries:
    entries = _Entries([], set())
    with open(location, "rb") as file, Bar(location.stat().st_size, f"listing {location.name}", "B", True) as bar:
        magic = file.read(6)
        for start, name in _COMPRESSED.items():
            if magic.startswith(start):
                raise SourceError(
                    f"{location} is compressed ({name}), so that its files cannot be read in place; decompress it "
                    f"first, or give a folder. A source is {_LAYOUTS}"
                )
        for member in tars.members(file, str(location)):
            name = str(PurePosixPath(member.name))  # without a leading ./
            if member.isdir():
                entries.add_folder(name)
            else:
                entries.add_file(name, member.offset_data, member.size)
            bar.update(tars.end_of(member) - bar.n)
    return entries


def _tar_of_class_tars(location: Path, entries: _Entries) -> Source:
    """ILSVRC2012_img_train.tar: n01440764.tar, ... each with the images of one class."""
    strangers = [name for name, _, _ in entries.files if not name.endswith(".tar")]
    if strangers:
        raise SourceError(
            f"{location} holds class tars, but also {len(strangers)} other file(s), such as {strangers[0]}; "
            "pack it again without them"
        )
    found = _Entries([], set(), entries.num_hidden)
    empty = []
    with open(location, "rb") as file, Bar(len(entries.files), f"listing {location.name}", "classes") as bar:
        for tar_name, start, size in entries.files:
            class_name = PurePosixPath(tar_name).stem
            before = len(found.files)
            for member in tars.members(file, f"{location}: {tar_name}", start, start + size):
                if member.isreg():
                    found.add_file(f"{class_name}/{PurePosixPath(member.name).name}", member.offset_data, member.size)
            if len(found.files) == before:
                empty.append(tar_name)
            bar.update()
    if empty:
        raise _empty(f"the tar {location}", "class tar", empty)
    return _by_folder(location, "tar of one tar per class", found)


def _tree(location: Path, entries: _Entries, read: str, truth: Path | None) -> Source:
    """Class folders, or one folder of images; folders that hold everything else are passed through."""
    parents = {str(PurePosixPath(name).parent) for name, _, _ in entries.files}
    full = {str(folder) for parent in parents for folder in (PurePosixPath(parent), *PurePosixPath(parent).parents)}
    empty = sorted(entries.folders - full)
    if empty:
        raise _empty(read, "folder", empty)
    wrapper = os.path.commonpath(parents) if "." not in parents else ""
    if wrapper:
        entries.files = [(name[len(wrapper) + 1 :], offset, size) for name, offset, size in entries.files]
        if location.is_dir():
            location = location / wrapper
    within = f", inside {wrapper}/" if wrapper else ""
    kind = "folder" if location.is_dir() else "tar"
    depths = {name.count("/") for name, _, _ in entries.files}
    if depths == {0} and truth is not None:
        flat = _flat(location, "", entries)
        labels, class_names, titles = ground_truth.read(truth, flat.files)
        layout = f"{kind} of images{within}, labels from {truth.name}"
        return replace(flat, layout=layout, labels=labels, class_names=class_names, class_titles=titles)
    if truth is not None:
        raise SourceError(f"{read} has folders, which are its labels; leave out --ground-truth, or give a flat source")
    if depths == {0}:
        return _flat(location, f"{kind} of images without labels{within}", entries)
    if depths == {1}:
        return _by_folder(location, f"{kind} of one folder per class{within}", entries)
    raise _wrong_depth(read, location, entries)


def _flat(location: Path, layout: str, entries: _Entries) -> Source:
    first = min(entries.files)[0]
    if layout and re.match(r"ILSVRC2012_val_\d{8}\.", first):
        raise SourceError(
            f"{location} holds ImageNet's validation images ({first}), whose labels are elsewhere; "
            "give --ground-truth with the devkit (ILSVRC2012_devkit_t12.tar.gz or its folder)"
        )
    return _source(location, layout, sorted(entries.files), lambda name: -1, (), entries.num_hidden)


def _by_folder(location: Path, layout: str, entries: _Entries) -> Source:
    files = sorted(entries.files, key=lambda file: file[0].split("/"))
    folders = sorted({name.split("/")[0] for name, _, _ in files})
    if {folder.lower() for folder in folders} <= _SPLITS:
        raise SourceError(
            f"the folders {', '.join(folders)} in {location} are splits, not classes; "
            f"build each as a set of its own, with --source {location / folders[0]}"
        )
    label_of = {folder: label for label, folder in enumerate(folders)}
    class_names = tuple(printable(folder) for folder in folders)
    return _source(location, layout, files, lambda name: label_of[name.split("/")[0]], class_names, entries.num_hidden)


def _source(
    location: Path,
    layout: str,
    files: list[tuple[str, int, int]],
    label_of: Callable[[str], int],
    class_names: tuple[str, ...],
    num_hidden: int,
) -> Source:
    return Source(
        location,
        layout,
        [name for name, _, _ in files],
        np.array([offset for _, offset, _ in files], np.int64),
        np.array([size for _, _, size in files], np.int64),
        np.array([label_of(name) for name, _, _ in files], np.int32),
        class_names,
        (),
        num_hidden,
    )


def printable(name: str) -> str:
    """A file name as text that can be written as UTF-8, whatever bytes it has on disk."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _wrong_depth(read: str, location: Path, entries: _Entries) -> SourceError:
    deepest = max((name for name, _, _ in entries.files), key=lambda name: name.count("/"))
    flattest = min((name for name, _, _ in entries.files), key=lambda name: name.count("/"))
    tops = sorted({name.split("/")[0] for name, _, _ in entries.files if "/" in name})
    if {top.lower() for top in tops} <= _SPLITS:
        hint = f"{' and '.join(tops)} are splits: build each as a set of its own"
    elif "/" not in flattest:
        hint = f"{flattest} lies beside the class folders: remove it"
    else:
        hint = f"class folders lie one level too deep, or have folders of their own: is it {tops[0]} that you mean?"
    way_out = f"--source {location / tops[0]}" if location.is_dir() else "a tar of one of its folders"
    return SourceError(
        f"{read} leaves open which folder names the class of {deepest}; {hint} ({way_out}). "
        "Every image must lie in exactly one folder, its class, or all in one folder"
    )


def _empty(read: str, what: str, names: list[str]) -> SourceError:
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return SourceError(f"{read} has {len(names)} empty {what}(s): {listed}; fill or remove them")
