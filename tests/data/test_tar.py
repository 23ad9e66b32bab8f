"""Headers of tars: as Python's tarfile reads whole archives, and without end or memory where it would not."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfast.data import ImageTextDataset, eval_transform, tar


def scan(data, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return tar.scan(str(path), descriptor)
    finally:
        os.close(descriptor)


def padded(data):
    return data + bytes(-len(data) % 512)


def header(name, size, kind=b"0", **fields):
    """A sound USTAR header, also of a size that tarfile would not write."""
    info = tarfile.TarInfo(name)
    raw = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    raw[156:157] = kind
    raw[124:136] = b"%011o\0" % size if size >= 0 else b"\xff" + (size % 256**11).to_bytes(11, "big")
    for start, value in fields.items():
        raw[int(start[1:]) : int(start[1:]) + len(value)] = value
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def file(name, data, **fields):
    return header(name, len(data), **fields) + padded(data)


def pax(*records, kind=b"x"):
    """An extended header of records b"key=value"."""
    data = b""
    for record in records:
        length = next(n for n in range(len(record) + 3, len(record) + 9) if n == len(record) + 2 + len(str(n)))
        data += b"%d %s\n" % (length, record)
    return file("pax", data, kind=kind)


END = bytes(1024)
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=200).map("d/{}.x".format)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=600)), max_size=6))
def test_whole_archives_read_as_tarfile_reads_them(tmp_path_factory, form, members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:  # a name that USTAR has no room for
                continue
        for number, kind in enumerate((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
            other = tarfile.TarInfo(f"other{number}")
            other.type, other.linkname = kind, "d/target" * 20
            archive.addfile(other) if form != tarfile.USTAR_FORMAT else None
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive if member.isreg()]
    assert scan(buffer.getvalue(), tmp_path_factory.getbasetemp()) == (expected, False)


def test_old_archives_and_sizes_in_base_256(tmp_path):
    old = bytearray(header("old", 3))
    old[257:265] = bytes(8)  # before ustar
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    large = header("large", 0, _124=b"\x80" + (5).to_bytes(11, "big")) + padded(b"12345")
    members, damaged = scan(bytes(old) + padded(b"abc") + large + END, tmp_path)
    assert [(member.name, member.size) for member in members] == [("old", 3), ("large", 5)]
    assert not damaged


def test_joined_archives_are_read_to_the_last(tmp_path):
    data = file("a", b"1") + bytes(10240) + file("b", b"2") + bytes(1 << 21) + file("c", b"3") + END
    members, damaged = scan(data, tmp_path)
    assert [member.name for member in members] == ["a", "b", "c"]
    assert not damaged
    assert all(data[member.offset : member.offset + 1] == b"%d" % (n + 1) for n, member in enumerate(members))


@pytest.mark.parametrize(
    "bad",
    [
        header("b", -1),
        header("b", -512),
        header("b", -(256**11)),
        header("b", 0, _124=b"-0000000001\0"),
        header("b", 0, _124=b"0_1\0"),
        header("b", 1 << 50, _124=b"\x80" + (1 << 80).to_bytes(11, "big")),
        header("b", -512, b"L"),
        header("b", -512, b"K"),
        header("b", -512, b"x"),
        header("b", -512, b"g"),
        header("b", -512, b"5"),
        header("b", -512, b"S"),
        header("b", 2 << 20, b"L") + bytes(3 << 20),
        header("b", 2 << 20, b"x") + bytes(3 << 20),
        pax(b"size=-512") + file("b", b"2"),
        pax(b"size=-512", kind=b"g") + file("b", b"2"),
        pax(b"size=1e3") + file("b", b"2"),
        pax(b"size=99999999999") + file("b", b"2"),
        file("b", b"0 path=x\n", kind=b"x"),
        file("b", b"-9 path=x\n", kind=b"x"),
        file("b", b"99 path=x\n", kind=b"x"),
        file("b", b"nonsense", kind=b"x"),
        header("b", 1)[:-1] + b"?",
        b"?" * 512,
    ],
)
def test_a_bad_header_ends_the_archive_at_once(tmp_path, bad):
    members, damaged = scan(file("a", b"1") + bad + file("c", b"3") + END, tmp_path)
    assert [member.name for member in members] == ["a"]
    assert damaged


def test_pax_records_of_one_file_are_not_the_next_one_s(tmp_path):
    data = pax(b"path=long") + file("short", b"1") + file("own", b"2") + END
    assert [member.name for member in scan(data, tmp_path)[0]] == ["long", "own"]


def dataset(path):
    return ImageTextDataset(str(path), transform=eval_transform(8))


@pytest.mark.parametrize(
    "sparse",
    [
        header("a.png", 0, b"S"),
        pax(b"GNU.sparse.size=9", b"GNU.sparse.numblocks=0") + file("a.png", b"1"),
        pax(b"GNU.sparse.map=0,1", b"GNU.sparse.size=9", b"GNU.sparse.name=a.png") + file("x", b"1"),
        pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.name=a.png", b"GNU.sparse.realsize=9")
        + file("x", b"999999\n"),
    ],
)
def test_sparse_files_are_named(tmp_path, sparse):
    (tmp_path / "s.tar").write_bytes(file("0.txt", b"x") + sparse + END)
    with pytest.raises(ValueError, match=r"source: .*s\.tar holds sparse files, such as 'a\.png'; expected whole ones"):
        dataset(tmp_path / "s.tar")


def zipped(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.tar", data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("pack", "kind"),
    [
        (gzip.compress, "gzip-compressed"),
        (bz2.compress, "bzip2-compressed"),
        (lzma.compress, "xz-compressed"),
        (lambda data: lzma.compress(data, lzma.FORMAT_ALONE), "lzma-compressed"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "zstd-compressed"),
        (lambda data: b"\x04\x22\x4d\x18" + data, "lz4-compressed"),
        (zipped, "a zip archive"),
    ],
)
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_compressed_archive_says_what_it_is(tmp_path, pack, kind, length, png):
    whole = file("a.png", png(0)) + file("a.txt", os.urandom(length)) + END
    (tmp_path / "a.tar").write_bytes(pack(whole))
    with pytest.raises(ValueError, match=rf"source: .*a\.tar is {kind}; expected a plain \.tar"):
        dataset(tmp_path / "a.tar")


def test_a_plain_archive_whose_first_name_looks_compressed_is_read(tmp_path, png):
    (tmp_path / "a.tar").write_bytes(file("BZh.png", png(0)) + file("BZh.txt", b"x") + END)
    assert dataset(tmp_path / "a.tar")[0].key == "BZh"
