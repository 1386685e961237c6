"""btrfs as mkfs.btrfs and the kernel make it, read as the kernel reads it; compression, subvolumes, damage."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from treekit import mounted, put, same, sample_tree, snapshot, told

from diskmorph.formats.btrfs import read_btrfs, schema
from diskmorph.formats.btrfs.lzo import decode_frames, decompress
from diskmorph.formats.btrfs.volume import Node, Volume
from diskmorph.formats.btrfs.xxh64 import xxh64
from diskmorph.formats.crc32c import crc32c
from diskmorph.formats.errors import DiskmorphError, FormatError, SourceError, UnsupportedError
from diskmorph.formats.registry import open_disk
from diskmorph.formats.source import BytesSource
from diskmorph.formats.views import Memory
from diskmorph.formats.volumes import open_volume

from testkit import data, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
FORMS: dict[str, tuple[str, ...]] = {
    "default": (),
    "small nodes": ("-n", "4096"),
    "single": ("-m", "single"),
    "mixed": ("-M",),
    "sha256": ("--csum", "sha256"),
    "blake2": ("--csum", "blake2"),
    "xxhash": ("--csum", "xxhash"),
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_tree(tmp_path_factory.mktemp("tree") / "tree")


def made(image: Path, *words: str, size: int = 160) -> Path:
    with image.open("wb") as file:
        file.truncate(size * MIB)
    run("mkfs.btrfs", "-q", *words, image)
    return image


@pytest.mark.parametrize("form", FORMS)
def test_read_as_the_kernel_reads(tmp_path: Path, sample: Path, form: str) -> None:
    image = made(tmp_path / "image", *FORMS[form])
    with mounted(image, "rw", fs="btrfs") as point:
        run("cp", "-a", "--sparse=auto", f"{sample}/.", point)
        with (point / "fragmented").open("wb") as one, (point / "other").open("wb") as two:
            for number in range(600):
                for file, step in ((one, 8192), (two, 4096)):
                    file.seek(number * step)
                    file.write(b"%08d" % number * 512)
                if number % 100 == 0:
                    os.fsync(one.fileno())
        (point / "dir").mkdir()
        for number in range(1500):
            (point / f"dir/entry-{number:05d}-{'x' * 40}").touch()
        for number in range(0, 1500, 3):
            (point / f"dir/entry-{number:05d}-{'x' * 40}").unlink()
        with (point / "reserved").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, MIB)
            file.write(b"written")
        os.setxattr(point / "one-block", "user.huge", b"h" * 3000)
        run("cp", "--reflink=always", point / "big", point / "clone")
        with (point / "clone").open("r+b") as file:
            file.seek(100_000)
            file.write(b"changed" * 5000)
    with mounted(image, fs="btrfs") as point:
        expected = snapshot(point)
    with open_volume(open_disk(image)) as tree:
        assert tree.format == "btrfs"
        same(expected, told(tree))


@pytest.mark.parametrize("codec", ["zlib", "lzo", "zstd"])
def test_compressed_files(tmp_path: Path, codec: str) -> None:
    image = made(tmp_path / "image")
    random_bytes = data("btrfs", 300_000)
    with mounted(image, "rw", f"compress-force={codec}", fs="btrfs") as point:
        put(point, "text", b"".join(b"line %d of a text that repeats itself\n" % number for number in range(50_000)))
        put(point, "random", random_bytes)
        put(point, "zeroes", bytes(1_000_001))
        put(point, "small", b"inline and compressible " * 60)
        put(point, "mixed", (random_bytes[:5000] + bytes(20_000) + b"abc" * 7000) * 11)
        put(point, "binary", os.fsencode(str(os.environ)) * 40)
        put(point, "short-matches", b"".join(bytes([n % 7, n % 5, n % 3]) for n in range(200_000)))
        with (point / "text").open("r+b") as file:
            file.seek(200_000)
            file.write(b"rewritten in the middle" * 1000)
        os.sync()
    with mounted(image, fs="btrfs") as point:
        expected = snapshot(point)
    with read_btrfs(open_disk(image)) as tree:
        same(expected, told(tree))
        node = tree.find("text")
        assert node is not None
        assert len(node.pieces) > 3
        source = node.source()
        with_kernel = hashlib.sha256(source.read(0, node.size)).hexdigest()
        assert with_kernel == expected[b"text"]["sha256"]
        whole = source.read(0, node.size)
        for start in (0, 131_071, 131_072, 200_001, node.size - 5):
            assert source.read(start, 5) == whole[start : start + 5]


def test_subvolumes(tmp_path: Path) -> None:
    image = made(tmp_path / "image")
    with mounted(image, "rw", fs="btrfs") as point:
        put(point, "top", b"t")
        for name in ("one", "one/inner", "@root"):
            run("btrfs", "subvolume", "create", point / name)
        put(point, "one/file", b"1")
        put(point, "one/inner/deep", b"d")
        put(point, "@root/etc/hostname", b"box\n")
        os.link(point / "one/file", point / "one/again")
        run("btrfs", "subvolume", "snapshot", point / "one", point / "copy")
    with mounted(image, fs="btrfs") as point:
        expected = snapshot(point)
    with read_btrfs(open_disk(image)) as tree:
        same(expected, told(tree), "mtime")  # the kernel makes up the time of what a snapshot lost
    with read_btrfs(open_disk(image), subvolume=b"@root") as tree:
        assert [path for path, _ in tree.walk()] == [b"", b"etc", b"etc/hostname"]
    with pytest.raises(SourceError, match="no subvolume"):
        read_btrfs(open_disk(image), subvolume=b"none")
    with mounted(image, "rw", fs="btrfs") as point:
        run("btrfs", "subvolume", "set-default", point / "@root")
    with read_btrfs(open_disk(image)) as tree:
        assert tree.find("etc/hostname") is not None
        assert tree.find("top") is None
    with read_btrfs(open_disk(image), subvolume=b"") as tree:
        assert tree.find("top") is not None


def test_what_needs_more_than_the_image_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        with (tmp_path / name).open("wb") as file:
            file.truncate(160 * MIB)
    run("mkfs.btrfs", "-q", tmp_path / "a", tmp_path / "b")
    with pytest.raises(UnsupportedError, match="one of 2 devices"):
        read_btrfs(open_disk(tmp_path / "a"))
    image = made(tmp_path / "image")
    with mounted(image, "rw", fs="btrfs") as point:
        put(point, "file", b"x" * 100_000)
        with (point / "file").open("r+b") as file:
            file.write(b"y")
            os.fsync(file.fileno())
        shutil.copy(image, tmp_path / "dirty")
    with pytest.raises(UnsupportedError, match="replayed"):
        read_btrfs(open_disk(tmp_path / "dirty"))


# ---------------------------------------------------------------- lzo, the schema


def test_lzo_by_hand() -> None:
    literals = bytes([17 + 10]) + b"0123456789"
    end = b"\x11\0\0"
    assert decompress(literals + end, 100) == b"0123456789"
    # a match of four bytes at distance three, which overlaps itself: 0b0110_0000 | distance bits
    assert decompress(literals + bytes([(3 << 5) | (2 << 2), 0]) + end, 100) == b"01234567897897"
    for broken in (b"", literals, literals[:5], literals + b"\x60\xff", bytes([0]) * 50, b"\x20" + bytes(60)):
        with pytest.raises(FormatError):
            decompress(broken, 100)
    with pytest.raises(FormatError):
        decompress(literals + end, 5)
    with pytest.raises(FormatError):
        decode_frames(b"\xff\xff\xff\xff", 10)
    with pytest.raises(FormatError):
        decode_frames(b"\x0c\0\0\0\x09\0\0\0" + end + b"\0", 10)


@pytest.mark.parametrize("spare", [0, 1, 2, 3, 4])
def test_lzo_counts_what_is_spare_behind_the_last_segment(spare: int) -> None:
    """A length does not cross a sector's end: where no room for one is left, the kernel's total includes the rest."""
    text = data("lzo", 64 - 8 - 4 - spare)
    segment = bytes([17 + len(text)]) + text + b"\x11\0\0"
    total = 64 if spare < 4 else 64 - spare
    frames = total.to_bytes(4, "little") + len(segment).to_bytes(4, "little") + segment + bytes(spare)
    assert decode_frames(frames, 200, 64) == text


def test_random_lzo_streams_end() -> None:
    chance = random.Random(1)
    for _ in range(3000):
        stream = chance.randbytes(chance.randrange(1, 60))
        with contextlib.suppress(FormatError):
            assert len(decompress(stream, 4096)) <= 4096


def test_xxh64_by_the_specifications_values() -> None:
    known = {b"": 0xEF46DB3751D8E999, b"a": 0xD24EC4F1A98C6E5B, b"abc": 0x44BC2CF5AD770999}
    assert {text: xxh64(text) for text in known} == known
    assert xxh64(b"Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1


def test_the_quick_form_of_inodes_is_the_schemas() -> None:
    raw = bytes(range(160))
    parsed = schema.INODE.parse(raw)
    names = ("size", "nlink", "uid", "gid", "mode", "rdev", "mtime_sec", "mtime_nsec")
    assert [parsed[name] for name in names] == list(schema.INODE_FAST.unpack(raw))
    sizes = (schema.SUPER, schema.HEADER, schema.INODE, schema.ROOT)
    assert [one.sizeof() for one in sizes] == [4096, 101, 160, 239]
    assert (schema.ITEM_ROW.itemsize, schema.POINTER_ROW.itemsize, schema.KEY.sizeof()) == (25, 33, schema.KEY_SIZE)


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytearray:
    folder = tmp_path_factory.mktemp("small")
    image = made(folder / "image", "-m", "single", "-n", "4096")
    with mounted(image, "rw", "compress=zlib", fs="btrfs") as point:
        put(point, "sub/inner", b"inner" * 10_000)
        put(point, "file", data("file", 50_000))
        for number in range(200):
            put(point, f"many/name-number-{number}", b"%d" % number)
        (point / "link").symlink_to("t" * 400)
    return bytearray(image.read_bytes())


class Recording(Volume):
    """Notes where the nodes that it reads lie."""

    def _parse(self, logical: int) -> Node:
        found = super()._parse(logical)
        self.__dict__.setdefault("seen", {})[self.place(logical, 4096, "node")] = found
        return found


def nodes(image: bytearray) -> dict[int, Node]:
    """The nodes in use of the tree of trees and the tree of files, by where they lie."""
    volume = Recording(BytesSource(image))
    for number, kind, _, item in list(volume.walk(volume.super.root, volume.super.root_level)):
        if (number, kind) == (schema.FS_TREE, schema.ROOT_ITEM):
            root = schema.ROOT.parse(item)
            assert list(volume.walk(root.bytenr, root.level))
    return volume.__dict__["seen"]


def sealed(body: bytes | bytearray) -> bytes:
    """A block with its checksum made right."""
    return crc32c(bytes(body[32:])).to_bytes(4, "little") + bytes(body[4:])


@contextlib.contextmanager
def changed(image: bytearray, changes: dict[int, bytes]) -> Iterator[bytearray]:
    """The image with other bytes at some places, as long as the context lasts."""
    kept = [(at, bytes(image[at : at + len(new)])) for at, new in changes.items()]
    for at, new in changes.items():
        image[at : at + len(new)] = new
    try:
        yield image
    finally:
        for at, old in reversed(kept):
            image[at : at + len(old)] = old


def read_everything(image: bytes | bytearray | memoryview) -> int:
    count = 0
    with read_btrfs(Memory(image)) as tree:
        for _, node in tree.walk():
            count += 1
            if node.kind == 0o100000 and node.size < 64 * MIB:
                node.read()
    return count


def test_damage_is_found_by_checksums(small: bytearray) -> None:
    assert read_everything(small) == 206
    found = 0
    for at in nodes(small):
        with changed(small, {at + 2000: bytes([small[at + 2000] ^ 0x40])}) as damaged:
            try:
                read_everything(damaged)
            except FormatError as error:
                assert error.structure == "node"
                found += 1
    assert found > 5


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"magic": b"_BHRfS_X"}, FormatError, "no btrfs"),
        ({"nodesize": 100}, FormatError, "nodesize"),
        ({"total_bytes": 1 << 50}, FormatError, "cut off"),
        ({"num_devices": 3}, UnsupportedError, "one of 3 devices"),
        ({"incompat_flags": 0x2000}, UnsupportedError, "extent tree v2"),
        ({"incompat_flags": 1 << 40}, UnsupportedError, "0x10000000000"),
        ({"log_root": 4096}, UnsupportedError, "replayed"),
        ({"root": 5}, FormatError, "chunk"),
        ({"root_level": 3}, FormatError, "level"),
    ],
)
def test_damaged_superblocks(small: bytearray, changes: dict, kind: type[Exception], words: str) -> None:
    values = {**schema.SUPER.parse(bytes(small[65536:69632])), **changes}
    both = {65536: sealed(schema.SUPER.build(values)), 64 << 20: bytes(4096)}
    with changed(small, both) as damaged, pytest.raises(kind, match=words):
        read_everything(damaged)


def test_a_damaged_superblock_is_replaced_by_its_copy(small: bytearray) -> None:
    flipped = {at: bytes([small[at] ^ 1]) for at in (65536 + 500, (64 << 20) + 500)}
    with changed(small, {65536 + 500: flipped[65536 + 500]}) as damaged:
        assert read_everything(damaged) == 206
    with changed(small, flipped) as damaged, pytest.raises(FormatError, match="superblock is damaged"):
        read_everything(damaged)


def with_changes(image: bytearray, changes: dict[int, bytes]) -> dict[int, bytes]:
    """The nodes that hold these changes, their checksums made right."""
    bodies: dict[int, bytearray] = {}
    for place, new in changes.items():
        at = place // 4096 * 4096
        body = bodies.setdefault(at, bytearray(image[at : at + 4096]))
        body[place - at : place - at + len(new)] = new
    return {at: sealed(body) for at, body in bodies.items()}


def entries(image: bytearray) -> dict[bytes, int]:
    """Where directory entries lie, by their names."""
    found = {}
    for at, node in nodes(image).items():
        for (_, kind, _), offset, size in zip(node.keys, node.offsets, node.sizes, strict=False):
            if kind == schema.DIR_INDEX:
                found[node.data[offset + schema.DIRENT.size : offset + size]] = at + offset
    return found


def test_nodes_with_two_parents_are_refused(small: bytearray) -> None:
    at, node = max(nodes(small).items(), key=lambda found: len(found[1].blocks))
    last = at + schema.HEADER_SIZE + 33 * (len(node.blocks) - 1) + 17  # a block and its generation, behind a key
    before = last - 33
    for change in ({last: small[before : before + 16]}, {before: small[last : last + 16]}):
        with (
            changed(small, with_changes(small, change)) as damaged,
            pytest.raises(FormatError, match="its parent says"),
        ):
            read_everything(damaged)
    assert len(node.blocks) > 5


def test_names_that_lead_to_one_inode_are_refused(small: bytearray) -> None:
    places = entries(small)
    place = places[b"name-number-71"]
    for name, words in ((b"sub", "with two names"), (b"file", "more names than it says")):
        change = {place: small[places[name] : places[name] + 8]}
        with changed(small, with_changes(small, change)) as damaged, pytest.raises(FormatError, match=words):
            read_everything(damaged)
    for name in (b"name-number-72", b"name/number-71", b"name\0number-71"):
        change = {place + schema.DIRENT.size: name}
        with (
            changed(small, with_changes(small, change)) as damaged,
            pytest.raises(FormatError, match="holds the name"),
        ):
            read_everything(damaged)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("file", {"at_8": b"\xff" * 8}, "outside|no chunk|wrong length"),  # bytes decoded
        ("file", {"at_17": b"\1"}, "unknown kind"),  # encryption
        ("file", {"at_20": b"\3"}, "unknown kind"),
        ("file", {"at_21": b"\0" * 7 + b"\1"}, "no chunk"),
        ("file", {"at_37": b"\0" * 7 + b"\x70"}, "wrong length"),  # bytes to skip
        ("inner", {"at_16": b"\7"}, "compression 7"),
        ("inner", {"at_16": b"\2"}, "damaged"),
        ("inner", {"at_16": b"\3"}, "damaged"),
        ("inner", {"at_8": b"\0\0\0\1"}, "wrong length"),
    ],
)
def test_extents_that_lie(small: bytearray, name: str, change: dict[str, bytes], words: str) -> None:
    number = int.from_bytes(small[(at := entries(small)[name.encode()]) : at + 8], "little")
    place = next(
        at + offset
        for at, node in nodes(small).items()
        for (objectid, kind, _), offset in zip(node.keys, node.offsets, strict=False)
        if (objectid, kind) == (number, schema.EXTENT_DATA)
    )
    changes = {place + int(key.removeprefix("at_")): value for key, value in change.items()}
    if name == "file" and "at_8" in change:
        changes[place + 16] = b"\1"  # compressed by zlib
    with changed(small, with_changes(small, changes)) as damaged, pytest.raises(DiskmorphError, match=words):
        read_everything(damaged)


def test_cut_images_are_refused(small: bytearray) -> None:
    for stop in (0, 65536, 70_000, len(small) - 1):
        with pytest.raises(FormatError):
            read_everything(memoryview(small)[:stop])


def test_random_damage_with_right_checksums(small: bytearray) -> None:
    chance = random.Random(6)
    places = list(nodes(small))
    for _ in range(300):
        at = chance.choice(places)
        body = bytearray(small[at : at + 4096])
        used = np.flatnonzero(np.frombuffer(bytes(body[96:]), np.uint8))
        for _ in range(3):
            body[96 + int(chance.choice(used))] = chance.randrange(256)
        begun = time.process_time()
        with changed(small, {at: sealed(body)}) as damaged, contextlib.suppress(DiskmorphError):
            read_everything(damaged)
        assert time.process_time() - begun < 5
