"""tar archives: what GNU tar, bsdtar and Python write is read; what is written, they read; hostile ones are refused."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
from treekit import (
    ACL,
    EPOCH,
    pax_records,
    same,
    sample_tree,
    save,
    sealed,
    snapshot,
    tar_entry,
    tar_file,
    told,
    without_acls,
)

from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.source import BytesSource
from diskmorph.formats.tar import TarOptions, is_tar, read_tar, schema, tar_disk
from diskmorph.formats.tar.acl import from_text, to_text
from diskmorph.formats.tar.pax import nanoseconds, record, time_text
from diskmorph.formats.tar.writer import header_bytes
from diskmorph.formats.tree import Node, Piece, Tree, file_node, link_node
from diskmorph.formats.trees import open_tree

from testkit import run

if TYPE_CHECKING:
    from pathlib import Path


def tree_of(*entries: bytes, end: bool = True) -> Tree:
    return read_tar(BytesSource(tar_file(*entries) if end else b"".join(entries), "test.tar"))


def node_of(*entries: bytes, name: str = "a") -> Node:
    found = tree_of(*entries).find(name, follow=False)
    assert found is not None
    return found


# ---------------------------------------------------------------- the schema


def test_dtype_is_the_construct() -> None:
    assert schema.ROW.itemsize == schema.HEADER.sizeof() == 512
    header = bytes(range(256)) * 2
    parsed = schema.HEADER.parse(header)
    row = np.frombuffer(header, schema.ROW)
    for name in schema.ROW.names or ():
        width = len(parsed[name])
        start = schema.ROW.fields[name][1]  # type: ignore[index]
        assert header[start : start + width] == parsed[name]
        assert schema.ROW.fields[name][0].itemsize == width  # type: ignore[index]
    assert schema.HEADER.build(parsed) == header
    assert row["typeflag"][0] == parsed.typeflag[0]


def test_numbers_octal_and_base_256() -> None:
    assert schema.number(b"0000644\0") == 0o644
    assert schema.number(b"   644 \0") == 0o644
    assert schema.number(b"\0" * 8) == 0
    assert schema.number(b"\x80" + (1 << 40).to_bytes(11, "big")) == 1 << 40
    assert schema.number(b"\xff" * 12) == -1
    assert schema.number(b"abc\0\0\0\0\0") is None
    values, odd = schema.octal(np.array([list(b"0000644\0"), list(b" 12 345\0"), list(b"x000000\0")], np.uint8))
    assert values.tolist()[:2] == [0o644, 0o12]
    assert odd.tolist() == [False, False, True]
    assert schema.to_octal(np.array([0o1234567]), 8).tobytes() == b"1234567\0"


def test_probe_by_magic_and_checksum() -> None:
    assert is_tar(tar_entry("a"))
    assert is_tar(tar_entry("a", magic=bytes(8)))
    assert not is_tar(bytes(512))
    assert not is_tar(b"a" * 512)
    assert not is_tar(tar_entry("a")[:511])


# ---------------------------------------------------------------- read what others write

_WRITERS = {
    "gnu pax": ("tar", "--format=pax", "--xattrs", "--xattrs-include=*", "--acls", "--sparse"),
    "gnu pax sparse 0.0": ("tar", "--format=pax", "--sparse", "--sparse-version=0.0"),
    "gnu pax sparse 0.1": ("tar", "--format=pax", "--sparse", "--sparse-version=0.1"),
    "gnu": ("tar", "--format=gnu", "--sparse"),
    "bsdtar pax": ("bsdtar", "--format=pax"),
    "bsdtar gnutar": ("bsdtar", "--format=gnutar"),
}


@pytest.mark.parametrize("writer", _WRITERS)
def test_archives_of_others(tmp_path: Path, writer: str) -> None:
    tree = sample_tree(tmp_path / "tree")
    words = _WRITERS[writer]
    rich = "--xattrs" in words or writer == "bsdtar pax"
    run(*words, "--numeric-owner", "-C", tree, "-cf", tmp_path / "x.tar", ".")
    found = told(open_tree(tmp_path / "x.tar"))
    expected = snapshot(tree)
    if writer.startswith("bsdtar"):
        expected, found = without_acls(expected), without_acls(found)
    if writer == "bsdtar gnutar":  # it takes the ACL's mask out of the mode, and has no place for the ACL
        expected[b"etc/shadow"]["mode"] = 0o644
    drop = () if rich else ("xattrs",)
    same(expected, found, *drop, seconds=("gnu" in writer and "pax" not in writer) or writer == "bsdtar gnutar")


def test_archives_of_python_in_every_format() -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            for name in ("short", "x/" * 60 + "name" * 20 if form != tarfile.USTAR_FORMAT else "d/" * 40 + "n" * 90):
                info = tarfile.TarInfo(name)
                info.size, info.uid, info.mtime = 5, 70000, EPOCH
                tar.addfile(info, io.BytesIO(b"12345"))
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, "t" * (100 if form == tarfile.USTAR_FORMAT else 300)
            tar.addfile(info)
        tree = read_tar(BytesSource(out.getvalue()))
        files = [(path, node) for path, node in tree.walk() if node.kind == 0o100000]
        assert [(len(path), node.read(), node.uid, node.mtime) for path, node in files] == [
            (5, b"12345", 70000, EPOCH * 10**9),
            (len(files[1][0]), b"12345", 70000, EPOCH * 10**9),
        ]
        assert len(files[1][0]) > 160
        link = tree.find("link", follow=False)
        assert link is not None
        assert len(link.target) in {100, 300}


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz", "bz2"])
def test_compressed_archives(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.tar.{suffix}"
    plain = tar_file(tar_entry("a", b"content" * 10_000))
    (tmp_path / "x.tar").write_bytes(plain)
    packer = {"gz": "gzip", "zst": "zstd", "xz": "xz", "bz2": "bzip2"}[suffix]
    run("sh", "-c", f"{packer} -c {tmp_path}/x.tar > {path}")
    with open_tree(path) as tree:
        found = tree.find("a")
        assert found is not None
        assert found.read() == b"content" * 10_000
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar", path.name}


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_compression_is_refused(tmp_path: Path, suffix: str, damage: str) -> None:
    (tmp_path / "x.tar").write_bytes(tar_file(tar_entry("a", np.random.default_rng(1).bytes(200_000))))
    packer = {"gz": "gzip", "zst": "zstd --check", "xz": "xz"}[suffix]
    run("sh", "-c", f"{packer} -c {tmp_path}/x.tar > {tmp_path}/x")
    packed = bytearray((tmp_path / "x").read_bytes())
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    else:
        packed[len(packed) // 2] ^= 0x55
    (tmp_path / "x").write_bytes(packed)
    with pytest.raises(FormatError):
        open_tree(tmp_path / "x", format="tar")


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.tar.zst"
    run("sh", "-c", f"(head -c 512 /dev/zero; head -c 200M /dev/zero) | zstd -q -o {bomb}")
    with pytest.raises(FormatError, match="expands"):
        open_tree(bomb, format="tar", limits=Limits(expansion=100))


# ---------------------------------------------------------------- fields and records


def test_attributes_devices_and_kinds() -> None:
    node = node_of(tar_entry("a", b"x", mode=0o4755, uid=7, gid=8, mtime=9))
    assert (node.mode, node.uid, node.gid, node.mtime, node.read()) == (0o104755, 7, 8, 9 * 10**9, b"x")
    assert node_of(tar_entry("a", type=b"3", dev=(511, 70000))).rdev == (511, 70000)
    assert node_of(tar_entry("a", type=b"6")).kind == 0o010000
    assert node_of(tar_entry("a", b"y", type=b"7")).read() == b"y"
    assert node_of(tar_entry("a", b"y", type=b"\0")).read() == b"y"
    assert node_of(tar_entry("a/", magic=bytes(8))).is_dir  # before POSIX a slash made a directory


def test_ustar_prefix_and_star() -> None:
    assert tree_of(tar_entry("b", prefix=b"long/prefix")).find("long/prefix/b") is not None
    star = bytearray(tar_entry("b", prefix=b"p")[:512])
    star[345 + 131 : 345 + 155] = b"00000000001 00000000001 "  # atime and ctime
    star[508:512] = b"tar\0"
    assert tree_of(sealed(star)).find("p/b") is not None
    gnu = tar_entry("b", magic=b"ustar  \0", prefix=b"00000000001")  # GNU: atime, not a prefix
    assert tree_of(gnu).find("b") is not None


def test_signed_checksums_of_old_writers() -> None:
    header = bytearray(tar_entry(b"caf\xe9")[:512])
    total = sum(header[:148]) + 8 * 32 + sum(header[156:]) - 256  # one byte above 0x7f
    header[148:156] = b"%06o\0 " % total
    assert tree_of(bytes(header)).find(b"caf\xe9") is not None


def test_pax_records() -> None:
    long = "d/" * 100 + "name"
    records = {
        "path": long.encode(),
        "uid": b"3000000000",
        "gid": b"5",
        "mtime": b"1700000000.123456789",
        "SCHILY.xattr.user.x": b"\0=\xff\n1",
        "LIBARCHIVE.xattr.user.y%20z": b"AAE",
        "RHT.security.selinux": b"system_u:object_r:etc_t:s0",
        "SCHILY.acl.default": b"user::rw-,user:lp:rwx:7,group::r--,mask::rwx,other::---",
    }
    node = node_of(tar_entry("short", b"x", pax=records), name=long)
    assert (node.uid, node.gid, node.mtime) == (3000000000, 5, 1700000000123456789)
    assert node.xattrs[b"user.x"] == b"\0=\xff\n1"
    assert node.xattrs[b"user.y z"] == b"\0\1"
    assert node.xattrs[b"security.selinux"] == b"system_u:object_r:etc_t:s0\0"
    assert to_text(node.xattrs[b"system.posix_acl_default"]) == b"user::rw-,user:7:rwx,group::r--,mask::rwx,other::---"


def test_pax_size_and_linkpath() -> None:
    entry = bytearray(tar_entry("a", b"x" * 600, pax={"size": b"600"}))
    at = entry.index(b"a\0", 1024)
    entry[at : at + 512] = tar_entry("a")[:512]  # the header itself says 0
    assert node_of(bytes(entry)).size == 600
    link = node_of(tar_entry("a", type=b"2", link="x", pax={"linkpath": b"y" * 300}))
    assert link.target == b"y" * 300


def test_global_records_hold_for_all_that_follow() -> None:
    head = tar_entry("g", pax_records({"uid": b"9", "comment": b"abc"}), b"g")
    tree = tree_of(head, tar_entry("a"), tar_entry("b", pax={"uid": b"8"}))
    assert [tree.find(name).uid for name in "ab"] == [9, 8]  # type: ignore[union-attr]


def test_times_before_1970_and_below_a_second() -> None:
    assert nanoseconds(b"-1.5", "", 0) == -1_500_000_000
    for value in (0, 1, -1_500_000_000, 1_700_000_000_100_000_000):
        assert nanoseconds(time_text(value), "", 0) == value
    node = node_of(tar_entry("a", pax={"mtime": b"-100"}))
    assert node.mtime == -100 * 10**9


def test_records_count_their_own_length() -> None:
    for length in range(1, 1200):
        found = record(b"k", b"v" * length)
        assert int(found.split(b" ", 1)[0]) == len(found)


def test_acl_text() -> None:
    text = to_text(ACL)
    assert text == b"user::rw-,user:4242:rwx,group::r--,group:4343:r-x,mask::rwx,other::r--"
    assert from_text(text) == ACL
    assert from_text(b"u::rw-\ng::r--\no:r--\n") is not None
    for number in ("lp", "\u00b2", "9" * 5000):
        assert from_text(f"user::rw-,user:{number}:rwx,group::r--,other::r--".encode()) is None
    with pytest.raises(FormatError):
        from_text(b"user::rwz")


def test_a_users_name_without_number_is_told_as_lost() -> None:
    tree = tree_of(tar_entry("a", pax={"SCHILY.acl.access": b"user::rw-,user:lp:rwx,group::r--,other::r--"}))
    assert any("ACL" in word for word in tree.lost)


# ---------------------------------------------------------------- hostile archives

_GOOD = tar_entry("a", b"x")
_HOSTILE = {
    "dotdot": ([tar_entry("../x", b"")], "not allowed"),
    "dotdot inside": ([tar_entry("a/../../x", b"")], "not allowed"),
    "hard link out": ([tar_entry("h", type=b"1", link="../secret")], "not allowed"),
    "hard link to the machine": ([tar_entry("h", type=b"1", link="/etc/passwd")], "not in the tree"),
    "hard link to itself": ([tar_entry("h", type=b"1", link="h")], "not in the tree"),
    "hard link to a directory": ([tar_entry("d/", type=b"5"), tar_entry("h", type=b"1", link="d")], "a directory"),
    "empty link": ([tar_entry("s", type=b"2")], "no target"),
    "NUL in a name": ([tar_entry("a", pax={"path": b"a\0b"})], "NUL"),
    "NUL in a link": ([tar_entry("a", type=b"2", link="x", pax={"linkpath": b"a\0b"})], "NUL"),
    "no name": ([tar_entry("", b"x")], "root"),
    "checksum": ([_GOOD[:10] + b"z" + _GOOD[11:]], "damaged"),
    "negative size": ([sealed(_GOOD[:124] + b"\xff" * 12 + _GOOD[136:512])], "damaged"),
    "size beyond the end": ([sealed(_GOOD[:124] + b"77777777777\0" + _GOOD[136:512])], "cut off"),
    "huge size": ([sealed(_GOOD[:124] + b"\x80" + b"\x7f" * 11 + _GOOD[136:512])], "cut off"),
    "mtime beyond all dates": (
        [sealed(_GOOD[:136] + b"\x80" + b"\x0f".rjust(4, b"\0") + bytes(7) + _GOOD[148:512])],
        "damaged",
    ),
    "size below zero": ([sealed(_GOOD[:124] + b"-0000001000\0" + _GOOD[136:512])], "damaged"),
    "size is no number": ([sealed(_GOOD[:124] + b"hello\0\0\0\0\0\0\0" + _GOOD[136:512])], "damaged"),
    "uid negative": ([sealed(_GOOD[:108] + b"\xff" * 8 + _GOOD[116:512]) + _GOOD[512:]], "damaged"),
    "pax length": ([tar_entry("p", b"99999 a=b\n", b"x"), _GOOD], "damaged"),
    "pax no equals": ([tar_entry("p", b"5 ab\n", b"x"), _GOOD], "damaged"),
    "pax size": ([tar_entry("a", pax={"size": b"-5"})], "damaged"),
    "pax uid": ([tar_entry("a", pax={"uid": b"99999999999"})], "damaged"),
    "pax uid of 5,000 digits": ([tar_entry("a", pax={"uid": b"9" * 5000})], "damaged"),
    "pax gid of 5,000 digits": ([tar_entry("a", pax={"gid": b"9" * 5000})], "damaged"),
    "pax mtime beyond all dates": ([tar_entry("a", pax={"mtime": b"9" * 17})], "damaged"),
    "pax mtime before all dates": ([tar_entry("a", pax={"mtime": b"-" + b"9" * 17})], "damaged"),
    "pax mtime": ([tar_entry("a", pax={"mtime": b"soon"})], "damaged"),
    "pax too large": ([tar_entry("p", b"", b"x", size=5 << 20)], "too large"),
    "sparse overlap": (
        [tar_entry("a", bytes(512), pax={"GNU.sparse.size": b"99", "GNU.sparse.map": b"5,9,3,9"})],
        "sparse",
    ),
    "sparse beyond": ([tar_entry("a", bytes(512), pax={"GNU.sparse.size": b"9", "GNU.sparse.map": b"5,9"})], "sparse"),
    "sparse more than stored": (
        [tar_entry("a", bytes(8), pax={"GNU.sparse.size": b"99", "GNU.sparse.map": b"5,9"})],
        "sparse",
    ),
    "sparse map endless": (
        [
            tar_entry(
                "a", b"1" * 512, pax={"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": b"9"}
            )
        ],
        "sparse",
    ),
    "sparse map huge": (
        [
            tar_entry(
                "a",
                b"99999999999\n" + bytes(500),
                pax={"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": b"9"},
            )
        ],
        "too large",
    ),
}


@pytest.mark.parametrize("case", _HOSTILE)
def test_hostile_archives_are_refused(case: str) -> None:
    entries, words = _HOSTILE[case]
    with pytest.raises(FormatError, match=words):
        tree_of(*entries)


def test_unknown_types_are_named() -> None:
    with pytest.raises(UnsupportedError, match="'Q'"):
        tree_of(tar_entry("a", type=b"Q"))
    with pytest.raises(UnsupportedError, match="'M'"):
        tree_of(tar_entry("a", type=b"M"))  # the rest of a file of another volume


def test_archives_cut_anywhere_are_refused() -> None:
    whole = tar_file(tar_entry("a", b"x" * 700), tar_entry("b", b"y", pax={"uid": b"5"}))
    for stop in (*range(0, len(whole) - 1024, 256), len(whole) - 1023):
        if stop == len(whole) - 1024 + 512:
            continue
        with pytest.raises(FormatError):
            read_tar(BytesSource(whole[:stop]))


def test_error_says_where() -> None:
    bad = bytearray(_GOOD)
    bad[0] ^= 1
    with pytest.raises(FormatError) as caught:
        tree_of(_GOOD, bytes(bad))
    assert (caught.value.structure, caught.value.field, caught.value.offset) == ("header", "chksum", len(_GOOD))


def test_random_damage_never_fails_otherwise() -> None:
    whole = bytearray(tar_file(tar_entry("d/", type=b"5"), tar_entry("d/a", b"x" * 600, pax={"uid": b"5"}), _GOOD))
    random = np.random.default_rng(7)
    for _ in range(400):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] = random.integers(0, 256)
        with contextlib.suppress(DiskmorphError):
            list(read_tar(BytesSource(damaged)).walk())


# ---------------------------------------------------------------- written archives


@pytest.mark.parametrize("peer", ["tar", "bsdtar"])
def test_peers_read_what_is_written(tmp_path: Path, peer: str) -> None:
    tree = sample_tree(tmp_path / "tree")
    disk = tar_disk(open_tree(tree).walk(ordered=True))
    save(disk, tmp_path / "x.tar")
    (tmp_path / "out").mkdir()
    words = ("--xattrs", "--xattrs-include=*", "--acls", "--delay-directory-restore") if peer == "tar" else ("--acls",)
    run(peer, *words, "--numeric-owner", "-C", tmp_path / "out", "-xpf", tmp_path / "x.tar")
    drop = () if peer == "tar" else ("xattrs",)
    same(snapshot(tree), snapshot(tmp_path / "out"), *drop)
    blocks = (tmp_path / "out/sparse").stat().st_blocks
    assert blocks * 512 < 1 << 20, "holes became data"


def test_python_reads_what_is_written_and_names_are_sorted(tmp_path: Path) -> None:
    tree = sample_tree(tmp_path / "tree")
    save(tar_disk(open_tree(tree).walk(ordered=True), TarOptions(root_name=b"", sparse=None)), tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = tar.getnames()
        assert len(names) == len(set(names)) == len(snapshot(tree))
        assert tar.extractfile("big").read() == (tree / "big").read_bytes()  # type: ignore[union-attr]
        assert tar.getmember("sparse").size == 32 << 20
        assert tar.getmember("etc/hard-b").isreg() != tar.getmember("big").isreg()


def test_read_back_equal_and_the_same_bytes_twice(tmp_path: Path) -> None:
    tree = open_tree(sample_tree(tmp_path / "tree"))
    first = save(tar_disk(tree.walk(ordered=True)), tmp_path / "1.tar").read_bytes()
    again = open_tree(tmp_path / "1.tar")
    same(told(tree), told(again))
    second = save(tar_disk(again.walk(ordered=True)), tmp_path / "2.tar").read_bytes()
    assert first == second


def test_order_of_insertion_does_not_matter() -> None:
    one, two = Tree(), Tree()
    names = [f"n{number}" for number in range(50)]
    for name in names:
        one.put(name, file_node(name.encode()))
    for name in reversed(names):
        two.put(name, file_node(name.encode()))
    disks = [tar_disk(tree.walk(ordered=True)) for tree in (one, two)]
    assert disks[0].read(0, disks[0].size) == disks[1].read(0, disks[1].size)


def test_large_values_go_into_records() -> None:
    tree = Tree()
    source = BytesSource(b"x")
    huge = Node(0o100644, 1 << 31, 1 << 30, -5 * 10**9, size=10 << 30, pieces=(Piece(0, 1, source, 0),))
    tree.put("huge", huge)
    tree.put("p/" * 80 + "x", link_node(b"t" * 150))
    disk = tar_disk(tree.walk(), TarOptions(sparse=None))
    assert disk.size > 10 << 30
    sparse = tar_disk(tree.walk())
    assert sparse.size < 1 << 20
    found = read_tar(BytesSource(sparse.read(0, sparse.size))).find("huge")
    assert found is not None
    assert (found.size, found.uid, found.gid, found.mtime) == (10 << 30, 1 << 31, 1 << 30, -5 * 10**9)
    with tarfile.open(fileobj=io.BytesIO(sparse.read(0, sparse.size))) as tar:
        assert tar.getmember("huge").size == 10 << 30


def test_header_of_a_file_above_8_gib() -> None:
    for size in (5, 9 << 30):
        info = tarfile.TarInfo.frombuf(header_bytes(b"blob", size, EPOCH), "utf-8", "strict")
        assert (info.name, info.size, info.mtime) == ("blob", size, EPOCH)


def test_sockets_are_told_as_lost() -> None:
    tree = Tree()
    tree.put("run/socket", Node(0o140755))
    lost: list[str] = []
    tar_disk(tree.walk(), lost=lost)
    assert lost == ["run/socket: a socket"]


@pytest.mark.parametrize("name", [b"user.a=b", b"user.100%", b"user.%3D", b"user.%25=", b"user.plain"])
def test_names_of_attributes_may_hold_equals_signs(tmp_path: Path, name: bytes) -> None:
    tree = Tree()
    tree.put("f", Node(0o100644, xattrs={name: b"v=w"}))
    disk = tar_disk(tree.walk())
    found = read_tar(BytesSource(disk.read(0, disk.size))).find("f")
    assert found is not None
    assert dict(found.xattrs) == {name: b"v=w"}
    (tmp_path / "x").touch()
    os.setxattr(tmp_path / "x", name, b"v=w")
    run("tar", "--format=pax", "--xattrs", "-C", tmp_path, "-cf", tmp_path / "t.tar", "x")
    with open_tree(tmp_path / "t.tar") as theirs:
        assert dict(theirs.find("x").xattrs) == {name: b"v=w"}  # type: ignore[union-attr]


def test_owners_beyond_32_bits_are_refused() -> None:
    info = tarfile.TarInfo("f")
    for info.uid, fine in ((0xFFFFFFFF, True), (1 << 32, False)):
        header = info.tobuf(tarfile.GNU_FORMAT)
        if fine:
            assert node_of(header, name="f").uid == 0xFFFFFFFF
            continue
        with pytest.raises(FormatError, match="uid"):
            tree_of(header)


def test_acl_entries_are_in_the_kernels_order() -> None:
    found = from_text(b"user::rw-,user:70000:r--,user:1000:rw-,group::r--,mask::rw-,other::r--")
    assert to_text(found or b"") == b"user::rw-,user:1000:rw-,user:70000:r--,group::r--,mask::rw-,other::r--"
