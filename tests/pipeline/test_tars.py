import io
import tarfile

import pytest

from pipeline import tars


def archive(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


CONTENTS = {"a.txt": b"alpha" * 300, "folder/b.txt": b"beta", "c.txt": b"", "long/" + "name" * 40: b"delta" * 100}


def listed(data: bytes, start: int = 0, stop: int | None = None) -> dict[str, bytes]:
    members = tars.members(io.BytesIO(data), "it", start, stop)
    return {member.name: data[member.offset_data : member.offset_data + member.size] for member in members}


def test_lists_every_member_with_its_place_in_the_file():
    assert listed(archive(CONTENTS)) == CONTENTS


def test_reads_an_archive_inside_a_file():
    inner = archive(CONTENTS)
    around = archive({"x": b"y"})
    assert listed(around + inner + around, len(around), len(around) + len(inner)) == CONTENTS


def test_a_cut_is_found_wherever_it_is():
    # Python's own tarfile lists fewer members, without an error, if the cut is at a member's border.
    data = archive(CONTENTS)
    with_end_mark = max(member.offset_data + 512 for member in tars.members(io.BytesIO(data), "it")) + 512
    for stop in range(0, with_end_mark, 256):
        with pytest.raises(tars.TarError, match=r"it is (cut off|no tar)"):
            listed(data[:stop])
        padded = data[:stop] + archive({})  # an archive that goes on with another: cut off inside the bounds
        with pytest.raises(tars.TarError, match=r"it is (cut off|no tar)"):
            listed(padded, 0, stop)


def test_a_damaged_header_is_found():
    # Python's own tarfile takes it for the end of the archive.
    data = bytearray(archive(CONTENTS))
    headers = [member.offset for member in tars.members(io.BytesIO(bytes(data)), "it")]
    for header in headers:
        damaged = bytearray(data)
        damaged[header + 3] ^= 1
        with pytest.raises(tars.TarError, match="damaged"):
            listed(bytes(damaged))


def test_a_link_is_refused():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.jpg"
        tar.addfile(link)
    with pytest.raises(tars.TarError, match=r"link\.jpg is a link.*--dereference"):
        listed(file.getvalue())


def test_an_empty_archive_has_no_members_and_an_empty_file_is_none():
    assert listed(archive({})) == {}
    with pytest.raises(tars.TarError, match="no tar archive"):
        listed(b"")


def test_what_follows_the_end_mark_is_told():
    # Python's own tarfile reads the first of two joined archives only.
    data = archive(CONTENTS)
    assert listed(data + bytes(3_000_000)) == CONTENTS
    for behind in (archive(CONTENTS), bytes(3_000_000) + b"x"):
        with pytest.raises(tars.TarError, match=r"goes on after its end mark at byte [\d,]+: .*keep them apart"):
            listed(data + behind)


def test_a_sparse_file_is_refused():
    # Its size is not that of what is stored.
    data = bytearray(archive({"a.jpg": bytes(600)}))
    data[156:157] = tarfile.GNUTYPE_SPARSE
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    with pytest.raises(tars.TarError, match=r"a\.jpg is a link, a device or a sparse file"):
        listed(bytes(data))
