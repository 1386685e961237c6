"""FAT12, FAT16 and FAT32: what mkfs.fat and mtools write is read, what is written they read; damage is refused."""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from treekit import EPOCH, put, same, save, snapshot, told

from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, FormatError, TargetError
from diskmorph.formats.fat import FatOptions, fat_disk, read_fat, schema
from diskmorph.formats.fat.names import long_entries, read_long, read_short, short_name
from diskmorph.formats.registry import open_disk
from diskmorph.formats.tree import Node, Tree, file_node, link_node
from diskmorph.formats.views import Memory

from testkit import data, run

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
NOT_HELD = ("mode", "uid", "gid", "mtime", "xattrs")
ENV = {**os.environ, "LC_ALL": "C.UTF-8", "MTOOLS_SKIP_CHECK": "1"}


def sample() -> Tree:
    tree = Tree()
    tree.put("EFI/BOOT/BOOTX64.EFI", file_node(data("efi", 1_000_001), mtime=EPOCH * 10**9))
    for number in range(300):
        tree.put(f"long folder name/entry number {number} with a long name.conf", file_node(b"%d" % number * number))
    tree.put("grub/x/y/z.cfg", file_node(b"a"))
    tree.put("日本語.txt", file_node(b"jp"))
    tree.put("n" * 255, file_node(b"long"))
    tree.put("EMPTY", file_node(b""))
    tree.put("a.b.c", file_node(b"dots"))
    tree.put("thirteen_char", file_node(b"13"))  # no end mark behind such a long name
    return tree


def mtools(word: str, *arguments: object) -> None:
    import subprocess

    done = subprocess.run([word, *map(str, arguments)], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("construct", [schema.DIRENT])
def test_dtype_is_the_construct(construct: object) -> None:
    raw = bytes(range(100, 132))
    parsed = schema.DIRENT.parse(raw)
    row = np.frombuffer(raw, schema.DIRENT_ROW)[0]
    assert schema.DIRENT.sizeof() == schema.DIRENT_ROW.itemsize == 32
    for name in schema.DIRENT_ROW.names or ():
        assert parsed[name] == (row[name].tobytes() if name == "name" else row[name])
    assert schema.LONG.sizeof() == 32
    assert schema.INFO.sizeof() == 512


@pytest.mark.parametrize("bits", [12, 16, 32])
def test_volumes_of_others(tmp_path: Path, bits: int) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate({12: 3, 16: 24, 32: 64}[bits] * MIB)
    run("mkfs.fat", "-F", bits, image)
    tree = tmp_path / "tree"
    put(tree, "A long name of a file.text", data("long", 100_000))
    put(tree, "sub folder/ümläut in a long name.txt", b"u")
    put(tree, "EMPTY")
    put(tree, "UPPER.TXT", b"8.3")
    for number in range(40):
        put(tree, f"sub folder/more/file {number}", b"%d" % number * 1000)
    mtools("mcopy", "-s", "-i", image, *sorted(tree.iterdir()), "::/")
    mtools("mdel", "-i", image, "::/sub folder/more/file 7")
    (tree / "sub folder/more/file 7").unlink()
    mtools("mcopy", "-i", image, tree / "A long name of a file.text", "::/again")
    put(tree, "again", data("long", 100_000))
    with read_fat(open_disk(image)) as found:
        same(snapshot(tree), told(found), *NOT_HELD)
        node = found.find("again")
        assert node is not None
        assert abs(node.mtime / 10**9 - time.time()) < 2 * 86400


@pytest.mark.parametrize("size", [5, 20, 64, 300, 3000])
def test_peers_read_what_is_written(tmp_path: Path, size: int) -> None:
    tree = sample()
    disk = fat_disk(tree, size * MIB, FatOptions("EFI", 0x12345678, MIB))
    image = save(checked(disk), tmp_path / "image")
    assert image.stat().st_size == size * MIB
    checked_by = run("fsck.fat", "-n", image, ok=False)
    assert checked_by.returncode == 0, checked_by.stdout
    (tmp_path / "out").mkdir()
    mtools("mcopy", "-s", "-n", "-i", image, "::/*", tmp_path / "out")
    same(told(tree), snapshot(tmp_path / "out"), *NOT_HELD)
    with read_fat(open_disk(image)) as found:
        same(told(tree), told(found), *NOT_HELD)
        node = found.find("EFI/BOOT/BOOTX64.EFI")
        assert node is not None
        assert node.mtime == EPOCH * 10**9
    said = run("blkid", "-p", image).stdout
    assert 'UUID="1234-5678"' in said
    assert 'LABEL="EFI"' in said
    assert ("FAT32" if size >= 64 else "FAT16") in said


def test_the_same_tree_gives_the_same_bytes() -> None:
    one, two = Tree(), Tree()
    names = [f"Some Name {number}.txt" for number in range(40)]
    for name in names:
        one.put(name, file_node(name.encode(), mtime=EPOCH * 10**9))
    for name in reversed(names):
        two.put(name, file_node(name.encode(), mtime=EPOCH * 10**9))
    disks = [fat_disk(tree, 5 * MIB) for tree in (one, two)]
    assert disks[0].read(0, 5 * MIB) == disks[1].read(0, 5 * MIB)


def test_short_names() -> None:
    taken: set[bytes] = set()
    assert short_name("BOOTX64.EFI", taken) == (b"BOOTX64 EFI", True)
    assert short_name("a long name.text", taken) == (b"ALONGN~1TEX", False)
    assert short_name("a long nape.text", taken) == (b"ALONGN~2TEX", False)
    assert short_name("lower.txt", taken) == (b"LOWER~1 TXT", False)
    assert short_name(".hidden", taken)[0] == b"HIDDEN~1   "
    assert short_name("日本", taken)[0] == b"__~1       "
    for number in range(200):
        assert len(short_name(f"same begin {number}", taken)[0]) == 11
    assert len(taken) == 206
    assert read_short(b"LOWER   TXT", 8 | 16) == "lower.txt"
    assert read_short(b"\x05BC        ", 0) == "\u03c3BC"


def test_long_names() -> None:
    for length in (1, 12, 13, 14, 26, 255):
        name = "ä" * length
        raw = long_entries(name, b"SHORT      ")
        parts = [raw[at : at + 32] for at in range(0, len(raw), 32)]
        assert len(parts) == -(-length // 13)
        assert read_long(parts, b"SHORT      ") == name
        assert read_long(parts, b"OTHER      ") is None
        assert read_long(parts[1:], b"SHORT      ") is None


@pytest.mark.parametrize(
    ("name", "node", "words"),
    [
        ("a:b", file_node(b""), "cannot hold the name"),
        ("dot.", file_node(b""), "cannot hold the name"),
        (b"\xff", file_node(b""), "not UTF-8"),
        ("huge", Node(0o100644, size=1 << 32), "4 GiB"),
        ("large", file_node(b"x" * 6 * MIB), "too small"),
    ],
)
def test_what_cannot_be_held(name: str | bytes, node: Node, words: str) -> None:
    tree = Tree()
    tree.put(name, node)
    with pytest.raises(TargetError, match=words):
        fat_disk(tree, 5 * MIB)


def test_names_that_differ_in_case_only_and_volumes_of_odd_size() -> None:
    tree = Tree()
    tree.put("a", file_node(b""))
    tree.put("A", file_node(b""))
    with pytest.raises(TargetError, match="case only"):
        fat_disk(tree, 5 * MIB)
    with pytest.raises(TargetError, match="too small"):
        fat_disk(Tree(), MIB)
    with pytest.raises(TargetError, match="2 TiB"):
        fat_disk(Tree(), 3 << 40)


def test_links_and_devices_are_told_as_lost() -> None:
    tree = Tree()
    tree.put("link", link_node(b"x"))
    lost: list[str] = []
    fat_disk(tree, 5 * MIB, lost=lost)
    assert lost == ["/link: FAT holds files and directories only"]


# ---------------------------------------------------------------- damage


def read_everything(image: bytes | bytearray) -> None:
    with read_fat(Memory(image)) as tree:
        for _, node in tree.walk():
            if node.kind == 0o100000:
                node.read()


def small(size: int = 5) -> bytearray:
    tree = Tree()
    tree.put("dir/inner/file", file_node(data("x", 5000)))
    tree.put("a long name that takes several entries", file_node(b"x" * 3000))
    disk = fat_disk(tree, size * MIB)
    return bytearray(disk.read(0, disk.size))


@pytest.mark.parametrize("size", [5, 64])
def test_cut_volumes_are_refused(size: int) -> None:
    good = small(size)
    read_everything(good)
    for stop in (0, 100, 511, 600, len(good) - 1):
        with pytest.raises(FormatError):
            read_everything(good[:stop])


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (510, b"\0", "no FAT"),
        (11, b"\1\0", "damaged"),
        (13, b"\3", "damaged"),
        (13, b"\0", "damaged"),
        (16, b"\0", "damaged"),
        (14, b"\0\0", "damaged"),
        (22, b"\1\0", "shorter than the volume"),
        (19, b"\xff\xff", "cut off"),
    ],
)
def test_damaged_boot_sectors(offset: int, value: bytes, words: str) -> None:
    image = small()
    image[offset : offset + len(value)] = value
    with pytest.raises(FormatError, match=words):
        read_everything(image)


def chain_at(image: bytearray, cluster: int) -> slice:
    at = int.from_bytes(image[14:16], "little") * 512 + cluster * 2
    return slice(at, at + 2)


@pytest.mark.parametrize(
    ("value", "words"), [(b"\0\0", "leaves the volume"), (b"\xf0\xff", "leaves the volume"), (b"\xff\xff", "shorter")]
)
def test_damaged_chains(value: bytes, words: str) -> None:
    image = small()
    clusters = [n for n in range(2, 30) if image[chain_at(image, n)] == (n + 1).to_bytes(2, "little")]
    image[chain_at(image, clusters[2])] = value
    with pytest.raises(FormatError, match=words):
        read_everything(image)


def test_directories_that_loop() -> None:
    image = small()
    at = image.index(b"INNER~1")
    assert image[at + 11] == schema.DIRECTORY
    parent = image.index(b"DIR~1")
    image[at + 26 : at + 28] = image[parent + 26 : parent + 28]
    with pytest.raises(FormatError, match="two names"):
        read_everything(image)
    image = small()
    first = int.from_bytes(image[parent + 26 : parent + 28], "little")
    image[chain_at(image, first)] = first.to_bytes(2, "little")  # a chain that follows itself
    begun = time.monotonic()
    with contextlib.suppress(FormatError):
        read_everything(image)
    assert time.monotonic() - begun < 5


def test_random_damage_is_refused_or_harmless_and_quick() -> None:
    good = small()
    used = np.flatnonzero(np.frombuffer(good, np.uint8))
    chance = random.Random(4)
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(3):
            damaged[int(chance.choice(used))] = chance.randrange(256)
        begun = time.monotonic()
        with contextlib.suppress(DiskmorphError):
            read_everything(damaged)
        assert time.monotonic() - begun < 5
