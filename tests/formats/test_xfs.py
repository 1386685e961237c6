"""XFS as mkfs.xfs and the kernel make it, read as the kernel reads it; a dirty log and damage are refused."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from treekit import mounted, put, same, sample_tree, snapshot, told

from diskmorph.formats.crc32c import crc32c
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.registry import open_disk
from diskmorph.formats.source import BytesSource
from diskmorph.formats.views import Memory
from diskmorph.formats.volumes import open_volume
from diskmorph.formats.xfs import read_xfs, schema
from diskmorph.formats.xfs.reader import _Reader
from diskmorph.formats.xfs.volume import Volume

from testkit import run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
FORMS: dict[str, tuple[str, ...]] = {
    "default": (),
    "nrext64": ("-i", "nrext64=1"),
    "1k": ("-b", "size=1024"),
    "large inodes": ("-i", "size=2048"),
    "large directories": ("-n", "size=65536"),
    "old times": ("-m", "bigtime=0,reflink=0,rmapbt=1"),
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_tree(tmp_path_factory.mktemp("tree") / "tree")


def made(image: Path, *words: str, size: int = 320) -> Path:
    with image.open("wb") as file:
        file.truncate(size * MIB)
    run("mkfs.xfs", "-q", *words, image)
    return image


def little(image: Path, *words: str) -> Path:
    """A file system smaller than mkfs.xfs likes: quick to copy and to damage."""
    return made(image, "--unsupported", *words, size=32)


def without_kernels_own(entries: dict) -> dict:
    """Without the names under which the kernel shows ACLs a second time."""
    for entry in entries.values():
        if entry.get("xattrs"):
            entry["xattrs"] = {k: v for k, v in entry["xattrs"].items() if not k.startswith("trusted.SGI_ACL_")}
    return entries


@pytest.mark.parametrize("form", FORMS)
def test_read_as_the_kernel_reads(tmp_path: Path, sample: Path, form: str) -> None:
    image = made(tmp_path / "image", *FORMS[form])
    with mounted(image, "rw", fs="xfs") as point:
        run("cp", "-a", "--sparse=auto", f"{sample}/.", point)
        with (point / "fragmented").open("wb") as one, (point / "other").open("wb") as two:
            for number in range(1500):
                for file, step in ((one, 8192), (two, 4096)):
                    file.seek(number * step)
                    file.write(b"%08d" % number * 512)
                if number % 20 == 0:
                    os.fsync(one.fileno())
        for number in range(3000):
            (point / "big-dir").mkdir(exist_ok=True)
            (point / f"big-dir/entry-{number:05d}-{'x' * 40}").touch()
        for number in range(0, 3000, 3):
            (point / f"big-dir/entry-{number:05d}-{'x' * 40}").unlink()
        for number in range(60):
            os.setxattr(point / "one-block", f"user.attribute-{number:03d}", b"v" * (number * 40))
        os.setxattr(point / "big-dir", "user.remote", bytes(range(256)) * 200)
        with (point / "reserved").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, MIB)
            file.write(b"written")
        (point / "long-link").symlink_to("t" * 1000)
        if "reflink=0" not in str(FORMS[form]):
            run("cp", "--reflink=always", point / "big", point / "clone")
    with mounted(image, "ro", "norecovery", fs="xfs") as point:
        expected = without_kernels_own(snapshot(point))
    with open_volume(open_disk(image)) as tree:
        assert tree.format == "xfs"
        same(expected, told(tree))


@pytest.mark.parametrize("words", [("-m", "crc=0"), ("-m", "crc=0", "-n", "ftype=0"), ("-m", "crc=1")])
def test_version_4_as_mkfs_fills_it(tmp_path: Path, words: tuple[str, ...]) -> None:
    put(tmp_path, "f1", b"x" * 100_000)
    names = "".join(f"a-long-name-number-{number} ---600 0 0 {tmp_path}/f1\n" for number in range(300))
    inner = f"d d--755 0 0\ninner ---644 0 0 {tmp_path}/f1\n$\n"
    entries = f"file ---644 5 6 {tmp_path}/f1\n{names}link l--777 0 0 {'t' * 300}\nnull c--666 0 0 1 3\n{inner}$\n"
    (tmp_path / "proto").write_text(f"/dev/null\n0 0\nd--755 0 0\n{entries}")
    image = made(tmp_path / "image", *words, "-p", str(tmp_path / "proto"))
    with read_xfs(open_disk(image)) as tree:
        found = told(tree)
    assert len(found) == 305
    assert found[b"link"]["target"] == b"t" * 300
    assert found[b"null"]["device"] == (1, 3)
    assert found[b"d/inner"]["sha256"] == found[b"file"]["sha256"] == told_hash(b"x" * 100_000)
    assert (found[b"file"]["uid"], found[b"file"]["gid"]) == (5, 6)


def told_hash(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def test_a_log_that_needs_replay_is_refused(tmp_path: Path) -> None:
    image = made(tmp_path / "image")
    with read_xfs(open_disk(image)) as tree:
        assert list(tree.root.children) == []
    with mounted(image, "rw", fs="xfs") as point:
        for number in range(200):
            (point / f"file-{number}").write_bytes(b"x" * number)
        fd = os.open(point, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        shutil.copy(image, tmp_path / "dirty")
    before = (tmp_path / "dirty").read_bytes()
    with pytest.raises(UnsupportedError, match="needs to be replayed"):
        read_xfs(open_disk(tmp_path / "dirty"))
    assert (tmp_path / "dirty").read_bytes() == before
    with read_xfs(open_disk(image)) as tree:
        assert len(tree.root.children) == 200


def test_a_log_that_went_round_many_times_is_read(tmp_path: Path) -> None:
    image = little(tmp_path / "image")
    for cycle in range(4):
        with mounted(image, "rw", fs="xfs") as point:
            for number in range(1500):
                (point / f"{cycle}-{number}").touch()
            for number in range(1490):
                (point / f"{cycle}-{number}").unlink()
            for number in range(40):  # each a record in the log
                (point / f"{cycle}-1499").write_bytes(b"%d" % number)
                run("sync", "-f", point)
        with read_xfs(open_disk(image)) as tree:
            assert len(tree.root.children) == 10 * (cycle + 1)


# ---------------------------------------------------------------- the schema, damage


def test_the_quick_form_of_inodes_is_the_schemas() -> None:
    raw = b"IN" + bytes(range(1, 175))
    parsed = schema.INODE.parse(raw)
    fast = schema.INODE_FAST.unpack_from(raw)
    names = "magic mode version format onlink uid gid nlink big_nextents mtime size nblocks nextents anextents forkoff"
    wanted = [parsed[name] for name in (*names.split(), "aformat", "flags", "gen")]
    assert list(fast) == wanted
    assert schema.SUPER.sizeof() == 264
    assert schema.INODE.sizeof() == schema.CORE_V2
    assert schema.INODE.sizeof() + schema.INODE_V3.sizeof() == schema.CORE_V3
    assert schema.LOG_RECORD.sizeof() <= 512


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytearray:
    """A small file system in memory; what is changed in it is put right again."""
    folder = tmp_path_factory.mktemp("small")
    image = little(folder / "image")
    with mounted(image, "rw", fs="xfs") as point:
        put(point, "sub/inner", b"inner" * 10_000)
        put(point, "file", b"f" * 5000)
        for number in range(100):
            put(point, f"many/name-number-{number}", b"")
        for number in range(20):
            put(point, f"few/name-number-{number}", b"")
        os.setxattr(point / "file", "user.large", b"l" * 3000)
        (point / "link").symlink_to("t" * 400)
    return bytearray(image.read_bytes())


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
    with read_xfs(Memory(image)) as tree:
        for _, node in tree.walk():
            count += 1
            if node.kind == 0o100000 and node.size < 64 * MIB:
                node.read()
    return count


def test_damage_is_found_by_checksums(small: bytearray) -> None:
    assert read_everything(small) == 127
    marks = {
        "inode": b"IN\x41\xed",
        "directory block": b"XDB3",
        "attribute block": b"\x3b\xee\0\0",
        "symbolic link": b"XSLM",
    }
    for structure, mark in marks.items():
        at = small.find(mark)
        assert at > 0, structure
        with (
            changed(small, {at + 70: bytes([small[at + 70] ^ 0x40])}) as damaged,
            pytest.raises(FormatError, match="damaged") as caught,
        ):
            read_everything(damaged)
        assert caught.value.structure == structure
        assert caught.value.field == "crc"


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"magic": b"XFSX"}, FormatError, "no XFS"),
        ({"blocksize": 3}, FormatError, "blocksize"),
        ({"agcount": 0}, FormatError, "agcount"),
        ({"inodesize": 100}, FormatError, "inodesize"),
        ({"inodesize": 0, "blocksize": 0}, FormatError, "blocksize"),
        ({"versionnum": 0xB4A3}, UnsupportedError, "version 3"),
        ({"features_incompat": 0x100}, UnsupportedError, "metadir"),
        ({"features_incompat": 0x10}, UnsupportedError, "needsrepair"),
        ({"features_incompat": 0x8000}, UnsupportedError, "0x8000"),
        ({"logstart": 0}, FormatError, "superblock"),
    ],
)
def test_damaged_superblocks(small: bytearray, changes: dict, kind: type[Exception], words: str) -> None:
    values = {**schema.SUPER.parse(bytes(small[:264])), **changes}
    with changed(small, {0: schema.SUPER.build(values)}) as damaged, pytest.raises(kind, match=words):
        read_everything(damaged)


def test_cut_images_are_refused(small: bytearray) -> None:
    for stop in (0, 300, 4096, len(small) - 1):
        with pytest.raises(FormatError):
            read_everything(memoryview(small)[:stop])


STRUCTURES = {  # by their first bytes: where the checksum lies, and how long the structure is
    b"IN\x41\xed": (100, 512),
    b"IN\x81\xa4": (100, 512),
    b"IN\xa1\xff": (100, 512),
    b"XDB3": (4, 4096),
    b"XDD3": (4, 4096),
    b"XSLM": (12, 4096),
    b"XARM": (12, 4096),
    b"BMA3": (64, 4096),
}


def structures(image: bytearray) -> list[tuple[int, int, int]]:
    """Where structures with checksums lie: (place, place of the checksum, length)."""
    found = []
    for at in range(0, len(image), 512):
        shape = STRUCTURES.get(bytes(image[at : at + 4]))
        if shape is None and at % 4096 == 0 and image[at + 8 : at + 10] == schema.MAGIC_ATTR_LEAF[5]:
            shape = (12, 4096)
        if shape is not None:
            found.append((at, *shape))
    return found


def sealed(image: bytearray, at: int, place: int, size: int, **values: bytes) -> bytes:
    """A structure with other bytes at its places (`at_12=b"..."`), and a checksum that is right again."""
    body = bytearray(image[at : at + size])
    for name, value in values.items():
        start = int(name.removeprefix("at_"))
        body[start : start + len(value)] = value
    body[place : place + 4] = bytes(4)
    body[place : place + 4] = crc32c(bytes(body)).to_bytes(4, "little")
    return bytes(body)


def inode_of(image: bytearray, path: str) -> tuple[int, int]:
    """Where an inode lies, and its number."""
    with read_xfs(Memory(image)):
        volume = Volume(BytesSource(image))
    number = volume.super.rootino
    for word in path.split("/"):
        number = {name: found for found, name in _Reader(volume)._entries(volume.inode(number))}[word.encode()]
        volume = Volume(BytesSource(image))
    block, index = number >> volume.super.inopblog, number & (1 << volume.super.inopblog) - 1
    return volume.place(block, "inode") + index * 512, number


@pytest.mark.parametrize(
    ("path", "values", "words"),
    [
        ("sub", {"at_56": bytes(8)}, "damaged directory"),  # no bytes at all in a directory within its inode
        ("sub", {"at_5": b"\7"}, "fork of format"),
        ("many", {"at_5": b"\3"}, "tree of extents"),
        ("many", {"at_76": b"\0\0\7\0"}, "more extents than room"),
        ("many", {"at_176": b"\x80"}, "never written"),
        ("file", {"at_82": b"\xff"}, "forkoff"),
        ("file", {"at_2": b"\0\0"}, "unused or damaged"),
        ("file", {"at_16": bytes(4)}, "unused or damaged"),
        ("file", {"at_56": b"\xff" * 8}, "unused or damaged"),
        ("file", {"at_152": bytes(8)}, "says it is another"),
        ("file", {"at_176": b"\0\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"}, "outside the file system"),
        ("link", {"at_56": b"\0\0\0\0\0\0\7\0"}, "wrong length"),
    ],
)
def test_inodes_that_lie(small: bytearray, path: str, values: dict[str, bytes], words: str) -> None:
    at, _ = inode_of(small, path)
    body = sealed(small, at, 100, 512, **values)
    with changed(small, {at: body}) as damaged, pytest.raises(FormatError, match=words):
        read_everything(damaged)


def test_names_that_lead_to_one_inode_are_refused(small: bytearray) -> None:
    at = small.find(b"XDB3")
    _, inner = inode_of(small, "sub/inner")
    _, folder = inode_of(small, "sub")
    for number, words in ((inner, "more names than it says"), (folder, "another name already")):
        place = small.find(b"\x0dname-number-7", at) - 8
        body = sealed(small, at, 4, 4096, **{f"at_{place - at}": number.to_bytes(8, "big")})
        with changed(small, {at: body}) as damaged, pytest.raises(FormatError, match=words):
            read_everything(damaged)
    place = small.find(b"name-number-7", at) - at
    for name, words in ((b"name-number-8", "holds the name"), (b"name/number-7", "holds the name")):
        with (
            changed(small, {at: sealed(small, at, 4, 4096, **{f"at_{place}": name})}) as damaged,
            pytest.raises(FormatError, match=words),
        ):
            read_everything(damaged)


def test_blocks_of_other_owners_are_refused(small: bytearray) -> None:
    for mark, place, crc in ((b"XDB3", 40, 4), (b"\x3b\xee\0\0", 48, 12)):
        at = small.find(mark) // 4096 * 4096
        body = sealed(small, at, crc, 4096, **{f"at_{place}": b"\0\0\0\0\0\0\0\5"})
        with changed(small, {at: body}) as damaged, pytest.raises(FormatError, match="another inode") as caught:
            read_everything(damaged)
        assert caught.value.field == "owner"


def test_random_damage_with_right_checksums(small: bytearray) -> None:
    places = structures(small)
    assert len(places) > 130
    few = [places[number] for number in range(6)] + [place for place in places if place[2] == 4096]
    chance = random.Random(3)
    for _ in range(300):
        at, crc, size = chance.choice(few)
        values = {f"at_{chance.randrange(2, min(size, 800))}": bytes([chance.randrange(256)]) for _ in range(2)}
        begun = time.monotonic()
        with (
            changed(small, {at: sealed(small, at, crc, size, **values)}) as damaged,
            contextlib.suppress(DiskmorphError),
        ):
            read_everything(damaged)
        assert time.monotonic() - begun < 5


def test_random_damage(small: bytearray) -> None:
    used = np.flatnonzero(np.frombuffer(bytes(small), np.uint8))
    chance = random.Random(4)
    for _ in range(100):
        changes = {int(chance.choice(used)): bytes([chance.randrange(256)]) for _ in range(4)}
        with changed(small, changes) as damaged, contextlib.suppress(DiskmorphError):
            read_everything(damaged)
