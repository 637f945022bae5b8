"""Reads tar archives without losing anything silently.

Python's tarfile takes an archive that was cut at a file border, or whose next header is damaged, for one that ends
there. Here an archive ends with its end mark (a block of zeros) or is an error.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK_BYTES = 512
_CHUNK_BYTES = 1_000_000


class TarError(ValueError):
    """An archive that is cut off, damaged or no archive at all; the message says which and where."""


def members(file: BinaryIO, what: str, start: int = 0, stop: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yields the files and folders of the archive in bytes [start, stop) of an open file, in order.

    Args:
        file: seekable.
        what: names the archive in messages.
        start: first byte of the archive in the file.
        stop: one past its last byte; None: the end of the file.

    Yields:
        Members whose `offset` and `offset_data` count from the start of the file.

    Raises:
        TarError: cut off, damaged, no tar archive, or a member that is neither file nor folder.
    """
    if stop is None:
        stop = file.seek(0, 2)
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r")
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every member it ever saw
            if end_of(member) > stop:
                raise _cut_off(what, member.name, stop - start)
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise TarError(
                    f"{what}: {member.name} is a link, a device or a sparse file, not a plain one; "
                    "pack the archive again with `tar --dereference --hard-dereference`"
                )
            yield member
    except tarfile.ReadError as error:
        raise TarError(f"{what} is no tar archive, or a damaged one ({error})") from error
    file.seek(tar.offset)
    mark = file.read(max(0, min(_BLOCK_BYTES, stop - tar.offset)))
    if len(mark) < _BLOCK_BYTES:
        raise _cut_off(what, "its end mark", stop - start)
    if any(mark):
        raise TarError(f"{what} is no tar archive, or a damaged one: byte {tar.offset - start:,} starts no header")
    while (position := file.tell()) < stop:
        if any(file.read(min(_CHUNK_BYTES, stop - position))):
            raise TarError(
                f"{what} goes on after its end mark at byte {tar.offset - start:,}: readers of tar would stop there "
                "without a word; if archives were joined (cat a.tar b.tar), keep them apart"
            )


def end_of(member: tarfile.TarInfo) -> int:
    """One past the last byte of a member, padding included."""
    return member.offset_data + -(-member.size // _BLOCK_BYTES) * _BLOCK_BYTES


def _cut_off(what: str, where: str, size: int) -> TarError:
    return TarError(f"{what} is cut off: its {size:,} bytes end before the end of {where}; copy or download it again")
