"""ext2, ext3 and ext4 as mke2fs and the kernel make them, read as the kernel reads them; damage is refused."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import time
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from treekit import mounted, put, same, sample_tree, save, snapshot, told

from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.ext4 import Ext4Writer, schema
from diskmorph.formats.ext4.journal import PatchedSource
from diskmorph.formats.ext4.reader import read_ext
from diskmorph.formats.registry import open_disk
from diskmorph.formats.source import BytesSource
from diskmorph.formats.tree import file_node
from diskmorph.formats.trees import open_tree
from diskmorph.formats.views import DiskSource, Memory, Slice

from testkit import data, run

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
SIZE = 200 * MIB
FORMS = {
    "ext2": ("ext2", ()),
    "ext3": ("ext3", ()),
    "ext4": ("ext4", ()),
    "1k": ("ext4", ("-b", "1024")),
    "nocsum": ("ext4", ("-O", "^metadata_csum,^64bit")),
    "noextent": ("ext4", ("-O", "^extent,^64bit,^flex_bg")),
    "small inodes": ("ext4", ("-I", "128")),
    "bigalloc": ("ext4", ("-O", "bigalloc")),
    "inline": ("ext4", ("-O", "inline_data", "-I", "512")),
    "seed": ("ext4", ("-O", "metadata_csum_seed,ea_inode,large_dir")),
    "meta_bg": ("ext4", ("-O", "meta_bg,^resize_inode", "-b", "1024")),
    "old": ("ext2", ("-r", "0", "-I", "128")),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trees")
    rich, plain = sample_tree(folder / "rich"), sample_tree(folder / "plain", xattrs=False)
    os.utime(plain / "one-block", (1, 2))  # 128-byte inodes end in 2038
    return {"rich": rich, "plain": plain}


def filled(image: Path, tree: Path, form: str, *words: str) -> Path:
    """A file system by mke2fs, filled by the kernel with a tree and with what makes its structures work."""
    with image.open("wb") as file:
        file.truncate(SIZE)
    kind, options = FORMS[form]
    block = () if "-b" in options else ("-b", "4096")
    run("mke2fs", "-q", "-t", kind, *block, *options, *words, image)
    with mounted(
        image, "rw", fs="ext2" if kind == "ext2" and form != "old" else "ext4" if kind == "ext4" else kind
    ) as point:
        run("cp", "-a", "--sparse=auto", f"{tree}/.", point)
        with (point / "fragmented").open("wb") as one, (point / "other").open("wb") as two:
            for number in range(600):
                for file, step in ((one, 8192), (two, 4096)):
                    file.seek(number * step)
                    file.write(b"%08d" % number * 512)
                if number % 200 == 0:
                    os.fsync(one.fileno())
                    os.fsync(two.fileno())
        (point / "htree").mkdir()
        for number in range(1500):
            (point / f"htree/entry-{number:05d}-{'x' * 40}").touch()
        for number in range(0, 1500, 3):
            (point / f"htree/entry-{number:05d}-{'x' * 40}").unlink()
        with (point / "reserved").open("wb") as file:
            with contextlib.suppress(OSError):  # ext2 and ext3 have no preallocation
                os.posix_fallocate(file.fileno(), 0, MIB)
            file.write(b"written")
    return image


@pytest.mark.parametrize("form", FORMS)
def test_read_as_the_kernel_reads(tmp_path: Path, trees: dict[str, Path], form: str) -> None:
    plain = form in {"small inodes", "old"}
    image = filled(tmp_path / "image", trees["plain" if plain else "rich"], form)
    with mounted(image, *(("ro", "noload") if FORMS[form][0] != "ext2" else ("ro",))) as point:
        expected = snapshot(point)
    with read_ext(open_disk(image)) as tree:
        same(expected, told(tree))


def test_read_from_a_compressed_qcow2_and_from_a_partition(tmp_path: Path, trees: dict[str, Path]) -> None:
    image = filled(tmp_path / "image", trees["rich"], "ext4")
    run("qemu-img", "convert", "-c", "-O", "qcow2", image, tmp_path / "image.qcow2")
    with read_ext(open_disk(image)) as tree:
        expected = told(tree)
    with read_ext(open_disk(tmp_path / "image.qcow2")) as tree:
        same(expected, told(tree))
    shifted = tmp_path / "shifted"
    shifted.write_bytes(bytes(MIB) + image.read_bytes())
    disk = open_disk(shifted)
    with read_ext(Slice(disk, MIB, SIZE)) as tree:
        same(expected, told(tree))


def test_what_we_write_is_read_back(tmp_path: Path, trees: dict[str, Path]) -> None:
    writer = Ext4Writer()
    with open_tree(trees["rich"]) as tree:
        writer.take(tree)
        disk = writer.disk(64 * MIB)
        found = read_ext(disk)
        same(told(tree), told(found))


def test_directories_are_read_when_asked_for(tmp_path: Path, trees: dict[str, Path]) -> None:
    image = filled(tmp_path / "image", trees["rich"], "ext4")
    with read_ext(open_disk(image)) as tree:
        source = tree.sources[0]
        reads = []
        original = source.pread
        source.pread = lambda offset, buffer: reads.append(offset) or original(offset, buffer)  # type: ignore[method-assign,func-returns-value]
        assert tree.find("etc/hostname").read() == b"box\n"  # type: ignore[union-attr]
        assert len(reads) < 10


# ---------------------------------------------------------------- the journal


@pytest.mark.parametrize("words", [("-J", "size=4"), ("-O", "^64bit"), ("-O", "^metadata_csum"), ("-t", "ext3")])
def test_a_dirty_journal_is_replayed_in_memory(tmp_path: Path, words: tuple[str, ...]) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    put(tmp_path / "tree", "d/old", b"old")
    run("mke2fs", "-q", *(() if "-t" in words else ("-t", "ext4")), *words, "-d", tmp_path / "tree", image)
    with mounted(image, "rw", fs="ext3" if "-t" in words else "ext4") as point:
        (point / "d/new").write_bytes(b"new" * 1000)
        os.sync()
        for number in range(100):
            (point / f"d/late{number}").write_bytes(b"late")
        (point / "d/old").unlink()
        fd = os.open(point / "d", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        shutil.copy(image, tmp_path / "dirty")
    assert "needs_recovery" in run("dumpe2fs", "-h", tmp_path / "dirty").stdout
    before = (tmp_path / "dirty").read_bytes()
    with read_ext(open_disk(tmp_path / "dirty")) as tree:
        found = told(tree)
    assert (tmp_path / "dirty").read_bytes() == before
    shutil.copy(tmp_path / "dirty", tmp_path / "fixed")
    run("e2fsck", "-fy", tmp_path / "fixed", ok=False)
    with mounted(tmp_path / "fixed") as point:
        same(snapshot(point), found)
    assert b"d/late99" in found
    assert b"d/old" not in found


def test_patched_sources() -> None:
    base = bytes(range(256)) * 64
    source = PatchedSource(BytesSource(base), {1: b"x" * 1024, 3: b"y" * 1024, 15: b"z" * 1024}, 1024)
    want = bytearray(base)
    want[1024:2048], want[3072:4096], want[15360:16384] = b"x" * 1024, b"y" * 1024, b"z" * 1024
    for start in range(0, len(base), 777):
        for length in (1, 500, 1024, 3000, len(base)):
            stop = min(start + length, len(base))
            assert source.read(start, stop - start) == want[start:stop]


def test_an_external_journal_is_named(tmp_path: Path) -> None:
    image = bytearray(small_image(tmp_path).read_bytes())
    edit_super(image, feature_incompat=lambda bits: bits | schema.RECOVER, journal_inum=lambda _: 0)
    with pytest.raises(UnsupportedError, match="journal"):
        read_ext(Memory(image))


# ---------------------------------------------------------------- hostile images


def small_image(tmp_path: Path, *words: str) -> Path:
    tree = tmp_path / "small"
    put(tree, "XXXcanary", b"evil")
    put(tree, "YYYYYYYYYYYYY", b"evil")
    put(tree, "sub/inner", data("inner", 40_000))
    put(tree, "xattr", b"x")
    os.setxattr(tree / "xattr", "user.large", b"l" * 500)
    (tree / "link").symlink_to("t" * 80)
    image = tmp_path / "small.img"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", *(words or ("-O", "^metadata_csum,^64bit")), "-d", tree, image)
    return image


def edit_super(image: bytearray, **changes: object) -> None:
    """Change fields of the superblock (its checksum must be off)."""
    values = dict(schema.SUPER.parse(bytes(image[1024:2048])))
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    image[1024:2048] = schema.SUPER.build(values)


def read_everything(image: bytes | bytearray) -> int:
    with read_ext(Memory(image)) as tree:
        count = 0
        for _, node in tree.walk():
            count += 1
            if node.kind == 0o100000 and node.size < 64 * MIB:
                node.read()
        return count


@pytest.mark.parametrize("name", [b"../canary", b"/etc/evil", b"sub/inner", b"a\0b------"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: bytes) -> None:
    good = small_image(tmp_path).read_bytes()
    assert read_everything(good) > 5
    with pytest.raises(FormatError, match="holds the name") as caught:
        read_everything(good.replace(b"XXXcanary", name.ljust(9, b"_")[:9]))
    assert caught.value.offset


def test_a_directory_with_two_names_is_refused(tmp_path: Path) -> None:
    image = small_image(tmp_path)
    run("debugfs", "-w", "-R", "ln <2> sub/again", image)
    with pytest.raises(FormatError, match="another name"):
        read_everything(image.read_bytes())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("set_inode_field XXXcanary size 0xffffffffffff", "damaged"),
        ("set_inode_field XXXcanary block[5] 0x0fffffff", "beyond the end"),
        ("set_inode_field XXXcanary block[4] 0", "extents out of order"),
        ("set_inode_field XXXcanary block[0] 0x1f30b", "damaged extent tree"),
        ("set_inode_field XXXcanary mode 0", "unused or damaged"),
        ("set_inode_field XXXcanary links_count 0", "unused or damaged"),
        ("set_inode_field XXXcanary file_acl 0x7fffffff", "outside the file system"),
        ("set_inode_field sub block[5] 3", ""),
        ("set_inode_field <2> mode 0100644", "root is not a directory"),
        ("set_inode_field XXXcanary flags 0x80800", "encrypted"),
    ],
)
def test_damaged_inodes_are_refused(tmp_path: Path, command: str, words: str) -> None:
    image = small_image(tmp_path)
    run("debugfs", "-w", "-R", command, image)
    with pytest.raises(DiskmorphError, match=words or "damaged|leads|holds"):
        read_everything(image.read_bytes())


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"magic": 0}, FormatError, "no ext"),
        ({"log_block_size": 40}, FormatError, "log_block_size"),
        ({"inode_size": 100}, FormatError, "inode_size"),
        ({"inodes_per_group": 0}, FormatError, "inodes_per_group"),
        ({"blocks_per_group": 0}, FormatError, "blocks_per_group"),
        ({"blocks_count_lo": 0xFFFFFFFF}, FormatError, "cut off"),
        ({"blocks_count_lo": 1}, FormatError, "first_data_block"),
        ({"feature_incompat": 1}, UnsupportedError, "compression"),
        ({"feature_incompat": 0x80000000}, UnsupportedError, "0x80000000"),
        ({"desc_size": 7, "feature_incompat": 0xC2}, FormatError, "desc_size"),
    ],
)
def test_damaged_superblocks_are_refused(
    tmp_path: Path, changes: dict[str, int], kind: type[Exception], words: str
) -> None:
    image = bytearray(small_image(tmp_path).read_bytes())
    edit_super(image, **changes)
    with pytest.raises(kind, match=words):
        read_everything(image)


def test_a_block_size_that_is_no_size_costs_no_memory(tmp_path: Path) -> None:
    """2 to the power of what a superblock says may be a number of half a gigabyte."""
    image = bytearray(small_image(tmp_path).read_bytes())
    edit_super(image, log_block_size=1 << 31)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="log_block_size"):
            read_everything(image)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_cut_images_are_refused(tmp_path: Path) -> None:
    good = small_image(tmp_path).read_bytes()
    for stop in (0, 1000, 1500, 2048, 100_000, len(good) - 1):
        with pytest.raises(FormatError):
            read_everything(good[:stop])


def test_checksums_are_verified(tmp_path: Path) -> None:
    """Damage in each kind of structure is found by its checksum."""
    image = small_image(tmp_path, "-O", "metadata_csum")
    good = image.read_bytes()
    read_everything(good)
    block = 1024

    def stat_of(path: str, field: str) -> int:
        text = run("debugfs", "-R", f"stat {path}", image).stdout
        return int(re.search(field, text)[1])  # type: ignore[index]

    places = {
        "superblock": 1024 + 0x78,
        "group descriptor": 2048 + 0x10,
        "directory": stat_of("sub", r"\(0\):(\d+)") * block + 900,
        "xattr block": stat_of("xattr", r"File ACL: (\d+)") * block + 700
        if stat_of("xattr", r"File ACL: (\d+)")
        else 0,
    }
    for structure, place in places.items():
        damaged = bytearray(good)
        damaged[place] ^= 0x10
        with pytest.raises(FormatError, match="damaged") as caught:
            read_everything(damaged)
        assert caught.value.structure == structure
    table = int(next(w for w in run("dumpe2fs", image).stdout.split("Inode table at ")[1:])[0:8].split("-")[0])
    inode = table * block + 256 + 24  # the root's flags
    damaged = bytearray(good)
    damaged[inode] ^= 1
    with pytest.raises(FormatError, match="inode 2 is damaged"):
        read_everything(damaged)


def test_random_damage_is_refused_or_harmless_and_quick(tmp_path: Path) -> None:
    good = small_image(tmp_path).read_bytes()
    used = np.flatnonzero(np.frombuffer(good, np.uint8))
    chance = random.Random(4)
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(4):
            damaged[int(chance.choice(used))] = chance.randrange(256)
        begun = time.monotonic()
        with contextlib.suppress(DiskmorphError):
            read_everything(damaged)
        assert time.monotonic() - begun < 5


def test_a_disk_as_a_source(tmp_path: Path) -> None:
    content = data("disk", 3 * MIB + 77)
    disk = Memory(content)
    source = DiskSource(disk)
    for start, length in ((0, 10), (MIB - 5, 10), (5, 2 * MIB), (len(content) - 7, 7), (262_140, 8)):
        assert source.read(start, length) == content[start : start + length]
    with pytest.raises(FormatError):
        source.read(len(content) - 3, 4)
    assert DiskSource.of(disk) is disk.files[0]
    part = DiskSource.of(Slice(disk, 1000, 5000))
    assert part.read(10, 20) == content[1010:1030]
    assert list(source.runs(0, source.size)) == [(0, len(content), True)]
    node = file_node(b"x")
    assert save(Memory(node.read()), tmp_path / "x").read_bytes() == b"x"
