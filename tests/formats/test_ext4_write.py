"""ext4 as it is written: clean to e2fsck, equal to the tree in the kernel's eyes, small in change from layer to layer."""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

import numpy as np
import pytest
from treekit import ACL, EPOCH, fsck, mounted, same, sample_tree, save, snapshot, tar_entry, tar_file

from diskmorph.formats.allocator import Identity
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import TargetError
from diskmorph.formats.ext4 import Ext4Options, Ext4Writer, schema
from diskmorph.formats.ext4 import xattrs as x
from diskmorph.formats.ext4.geometry import BLOCK
from diskmorph.formats.source import BytesSource
from diskmorph.formats.tree import Node, Piece, Tree, dir_node, file_node, link_node
from diskmorph.formats.trees import open_tree

from testkit import data, run

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def writer(label: bytes = b"") -> Ext4Writer:
    return Ext4Writer(Ext4Options(label=label, identity=Identity(b"seed")))


def image_of(tree: Tree, path: Path, size: int | None = None, **more: int) -> Path:
    one = writer()
    one.take(tree)
    save(checked(one.disk(size, **more)), path)
    fsck(path)
    return path


def dumpe2fs(image: Path, *words: str) -> str:
    return run("dumpe2fs", *(words or ("-h",)), image).stdout


# ---------------------------------------------------------------- the schema


@pytest.mark.parametrize(
    ("construct", "dtype"),
    [
        (schema.GROUP, schema.GROUP_ROW),
        (schema.INODE, schema.INODE_ROW),
        (schema.EXTENT, schema.EXTENT_ROW),
        (schema.EXTENT_HEADER, schema.EXTENT_HEADER_ROW),
        (schema.DIRENT, schema.DIRENT_ROW),
    ],
)
def test_dtypes_are_the_constructs(construct: object, dtype: np.dtype) -> None:
    raw = np.random.default_rng(3).bytes(dtype.itemsize)
    if dtype is schema.EXTENT_HEADER_ROW:
        raw = b"\x0a\xf3" + raw[2:]
    assert construct.sizeof() == dtype.itemsize  # type: ignore[attr-defined]
    parsed = construct.parse(raw)  # type: ignore[attr-defined]
    row = np.frombuffer(raw, dtype)[0]
    for name in dtype.names or ():
        if name in {"padding", "reserved"}:
            continue
        value = row[name]
        assert parsed[name] == (value.tobytes() if name == "block" and value.shape else value)


def test_sizes_of_superblocks() -> None:
    assert schema.SUPER.sizeof() == schema.SUPER_SIZE
    assert schema.JOURNAL_SUPER.sizeof() == 1024


# ---------------------------------------------------------------- the kernel's view


@pytest.mark.parametrize("source", ["directory", "pax", "gnu"])
def test_kernel_sees_the_tree(tmp_path: Path, source: str) -> None:
    root = sample_tree(tmp_path / "tree")
    path = root
    if source != "directory":
        path = tmp_path / "x.tar"
        words = ("--xattrs", "--xattrs-include=*", "--acls", *(("--sparse",) if source == "gnu" else ()))
        run("tar", "--format=pax", *words, "--numeric-owner", "-C", root, "-cf", path, ".")
    with open_tree(path) as tree:
        image = image_of(tree, tmp_path / "image")
    with mounted(image, "ro,noload") as found:
        same(snapshot(root), snapshot(found))
        assert (found / "sparse").stat().st_blocks * 512 < MIB, "zero blocks were stored"
        assert (found / "zero-tail").stat().st_blocks == 2 * 8
        assert found.stat().st_mode == root.stat().st_mode
        assert found.stat().st_mtime == EPOCH


@pytest.mark.parametrize("size", [16, 129, 300, 3000, 70_000, 2_000_000])
def test_every_size_is_clean(tmp_path: Path, size: int) -> None:
    root = sample_tree(tmp_path / "tree")
    with open_tree(root) as tree:
        image = image_of(tree, tmp_path / "image", size * MIB + 12345)
    assert size * MIB * 0.93 < image.stat().st_size <= size * MIB + 12345
    with mounted(image, "ro,noload") as found:
        same(snapshot(root), snapshot(found))


def test_features_and_label(tmp_path: Path) -> None:
    one = writer(b"the label")
    one.take(Tree())
    image = save(one.disk(64 * MIB), tmp_path / "image")
    text = dumpe2fs(image)
    features = set(re.search(r"features:\s+(.*)", text)[1].split())  # type: ignore[index]
    assert {"has_journal", "extent", "64bit", "flex_bg", "metadata_csum", "resize_inode", "sparse_super"} <= features
    assert not {"metadata_csum_seed", "orphan_file", "meta_bg"} & features
    assert "the label" in text
    assert str(Identity(b"seed").uuid("ext4")) in text
    same({}, {})


def test_slack_is_left_free_and_the_smallest_is_small(tmp_path: Path) -> None:
    tree = Tree()
    tree.put("a", file_node(data("a", 20 * MIB)))
    for slack in (0, 100 * MIB, 500 * MIB):
        image = image_of(tree, tmp_path / "image", slack=slack)
        free = int(re.search(r"Free blocks:\s+(\d+)", dumpe2fs(image))[1]) * BLOCK  # type: ignore[index]
        assert slack <= free < slack * 1.05 + MIB
    with pytest.raises(TargetError, match="too small"):
        image_of(tree, tmp_path / "image", 20 * MIB)
    with pytest.raises(TargetError, match="too small"):
        image_of(tree, tmp_path / "image", 8192)


@pytest.mark.parametrize("size", [None, 300 * MIB])
def test_resize2fs_grows_it_without_meta_bg(tmp_path: Path, size: int | None) -> None:
    root = sample_tree(tmp_path / "tree")
    with open_tree(root) as tree:
        image = image_of(tree, tmp_path / "image", size)
    os.truncate(image, 6 << 30)
    run("resize2fs", "-f", image)
    fsck(image)
    assert "meta_bg" not in dumpe2fs(image)
    with mounted(image, "ro,noload") as found:
        same(snapshot(root), snapshot(found))


def test_the_kernel_writes_to_it_and_e2fsck_stays_content(tmp_path: Path) -> None:
    with open_tree(sample_tree(tmp_path / "tree")) as tree:
        image = image_of(tree, tmp_path / "image", slack=32 * MIB)
    with mounted(image, "rw") as found:
        for number in range(500):
            (found / f"many/new-{number}").write_bytes(b"x" * number * 10)
        (found / "many/file-0003").unlink()
        os.setxattr(found / "one-block", "user.more", b"m" * 50)
    fsck(image)


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    root = sample_tree(tmp_path / "tree")
    found = []
    for name in "ab":
        with open_tree(root) as tree:
            found.append(image_of(tree, tmp_path / name, 64 * MIB).read_bytes())
    assert found[0] == found[1]


# ---------------------------------------------------------------- large things


def test_a_large_directory_and_a_file_of_islands(tmp_path: Path) -> None:
    tree = Tree()
    for number in range(20_000):
        tree.put(f"d/{number:06d}-{'long-name-' * 8}", file_node(b""))
    island = BytesSource(b"i" * 100)
    pieces = tuple(Piece(number * 16384, 100, island, 0) for number in range(3000))
    tree.put("islands", Node(0o100644, size=3000 * 16384, pieces=pieces))
    image = image_of(tree, tmp_path / "image")
    with mounted(image, "ro,noload") as found:
        assert len(os.listdir(found / "d")) == 20_000
        with (found / "islands").open("rb") as file:
            for number in (0, 1, 1500, 2999):
                file.seek(number * 16384)
                assert file.read(101) == b"i" * 100 + b"\0"
        assert (found / "islands").stat().st_blocks * 512 < 14 * MIB
    text = run("debugfs", "-R", "stat <13>", image).stdout + run("debugfs", "-R", "ex /islands", image).stdout
    assert re.search(r"\b2/ ?2\b|^ *2/", text, re.MULTILINE) or "2/ 2" in text, "the tree is not two levels deep"


def test_a_file_across_many_groups(tmp_path: Path) -> None:
    source = BytesSource(data("large", MIB))
    pieces = tuple(Piece(number * MIB, MIB, source, 0) for number in range(700))
    tree = Tree()
    tree.put("large", Node(0o100644, size=700 * MIB, pieces=pieces))
    image = image_of(tree, tmp_path / "image")
    with mounted(image, "ro,noload") as found, (found / "large").open("rb") as file:
        for number in (0, 127, 128, 129, 400, 699):
            file.seek(number * MIB)
            assert file.read(MIB) == data("large", MIB)


def test_many_inodes_make_more_groups(tmp_path: Path) -> None:
    tree = Tree()
    for number in range(40_000):
        tree.put(f"{number % 100}/{number}", file_node(b""))
    image = image_of(tree, tmp_path / "image")
    with mounted(image, "ro,noload") as found:
        assert sum(len(files) for _, _, files in os.walk(found)) == 40_000


def test_many_subdirectories(tmp_path: Path) -> None:
    tree = Tree()
    for number in range(66_000):
        tree.root.children[b"%d" % number] = dir_node()
    one = writer()
    one.take(tree)
    image = save(one.disk(), tmp_path / "image")
    fsck(image)  # a directory with more than 65,000 links says 1


# ---------------------------------------------------------------- attributes


def test_xattrs_in_inode_and_block_and_beyond(tmp_path: Path) -> None:
    tree = Tree()
    kinds = {
        "inode": {b"user.a": b"1", b"user.b": b"22"},
        "block": {b"user.large": bytes(range(256)) * 12, b"trusted.b": b"x"},
        "both": {b"user.large": b"x" * 3900, b"user.small": b"y" * 50, b"security.small": b"z"},
        "empty value": {b"user.none": b""},
        "many": {b"user.%d" % number: b"%d" % number for number in range(100)},
    }
    for name, attributes in kinds.items():
        node = file_node(b"x")
        node.xattrs = attributes
        tree.put(name, node)
    image = image_of(tree, tmp_path / "image")
    with mounted(image, "ro,noload") as found:
        for name, attributes in kinds.items():
            names = os.listxattr(found / name)
            assert {os.fsencode(key): os.getxattr(found / name, key) for key in names} == attributes


def test_what_ext4_cannot_hold_is_told_as_lost() -> None:
    tree = Tree()
    node = file_node(b"x")
    node.xattrs = {b"user.huge": b"x" * 5000, b"com.apple.thing": b"y", b"user.fine": b"z"}
    tree.put("a", node)
    one = writer()
    one.take(tree)
    assert sorted(one.lost) == ["extended attribute com.apple.thing", "extended attribute user.huge"]


def test_acls_have_two_forms() -> None:
    stored = x.encode_acl(ACL)
    assert stored is not None
    assert stored[:4] == b"\1\0\0\0"
    assert len(stored) == 4 + 4 * 4 + 2 * 8
    assert x.decode_acl(stored) == ACL
    assert x.encode_acl(b"\1\0\0\0") is None
    assert x.decode_acl(stored[:-1]) is None


def test_hash_of_an_attribute() -> None:
    """Held against what mke2fs wrote, in test_ext4_read; here: words are taken whole, names byte by byte."""
    assert x.entry_hash(b"", b"") == 0
    assert x.entry_hash(b"a", b"") == 97
    assert x.entry_hash(b"", b"\1\0\0\0") == 1
    assert x.entry_hash(b"", b"\1") == 1


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (file_node(b"", uid=1 << 33), "32 bits"),
        (Node(0o100644, size=1 << 70), "too large"),
        (link_node(b"x" * 4096), "too long"),
    ],
)
def test_what_cannot_be_held_at_all(node: Node, words: str) -> None:
    tree = Tree()
    tree.put("a", node)
    with pytest.raises(TargetError, match=words):
        writer().take(tree)


def test_names_and_lost_found() -> None:
    tree = Tree()
    tree.put("n" * 256, file_node(b""))
    with pytest.raises(TargetError, match="name is too long"):
        writer().take(tree)
    tree = Tree()
    tree.put("lost+found", file_node(b""))
    with pytest.raises(TargetError, match="lost"):
        writer().take(tree)


def test_the_trees_own_lost_found_is_kept(tmp_path: Path) -> None:
    tree = Tree()
    tree.put("lost+found/mine", file_node(b"x"))
    image = image_of(tree, tmp_path / "image")
    with mounted(image, "ro,noload") as found:
        assert (found / "lost+found/mine").read_bytes() == b"x"
    assert list(tree.root.children) == [b"lost+found"]


def test_times_beyond_what_can_be_said_are_clipped(tmp_path: Path) -> None:
    tree = Tree()
    for name, seconds in (("old", -(1 << 33)), ("1901", -(1 << 31)), ("1969", -5), ("2446", (1 << 34) - (1 << 31) - 1)):
        tree.put(name, file_node(b"", mtime=seconds * 10**9))
    image = image_of(tree, tmp_path / "image")
    with mounted(image, "ro,noload") as found:
        times = [(found / name).stat().st_mtime for name in ("old", "1901", "1969", "2446")]
    assert times == [-(1 << 31), -(1 << 31), -5, (1 << 34) - (1 << 31) - 1]


# ---------------------------------------------------------------- layers


def test_a_tree_that_grows_keeps_what_it_has(tmp_path: Path) -> None:
    tree = open_tree(sample_tree(tmp_path / "tree"))
    one = writer()
    states = [one.take(tree)]
    tree.remove("etc/hostname")
    tree.put("etc/hostname", file_node(b"other\n"))
    tree.remove("srv")
    tree.put("new/file", file_node(data("new", 300_000)))
    for number in range(3000):
        tree.put(f"etc/more-{number:05d}-{'x' * 30}", file_node(b"%d" % number))
    states.append(one.take(tree))
    for number in range(2950):
        tree.remove(f"etc/more-{number:05d}-{'x' * 30}")
    states.append(one.take(tree))
    images = []
    for number, state in enumerate(states):
        images.append(save(checked(one.disk(256 * MIB, state=state)), tmp_path / f"{number}"))
        fsck(images[-1])
    with mounted(images[0], "ro,noload") as found:
        same(snapshot(tmp_path / "tree"), snapshot(found))
    with mounted(images[2], "ro,noload") as found:
        assert (found / "etc/hostname").read_bytes() == b"other\n"
        assert not (found / "srv").exists()
        assert len(list((found / "etc").glob("more-*"))) == 50
    one_, two = (np.fromfile(image, np.uint8).reshape(-1, 65536) for image in images[:2])
    changed = int((one_ != two).any(axis=1).sum()) * 65536
    assert changed < 20 * MIB, f"{changed >> 20} MiB of the base changed"
    base = writer()
    base.take(open_tree(tmp_path / "tree"))
    assert save(base.disk(256 * MIB), tmp_path / "alone").read_bytes() == images[0].read_bytes()


def test_hostile_archive_becomes_a_clean_file_system(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    entries = [
        tar_entry("a" * 200 + "/" + "b" * 50, b"x"),
        tar_entry("l", type=b"2", link="/etc"),
        tar_entry("l/passwd", b"evil"),
    ]
    entries[0] = tar_entry("x", b"x", pax={"path": b"a" * 200 + b"/" + b"b" * 50})
    path.write_bytes(tar_file(*entries))
    with open_tree(path) as tree:
        image = image_of(tree, tmp_path / "image")
    with mounted(image, "ro,noload") as found:
        assert (found / "etc/passwd").read_bytes() == b"evil"
        assert os.readlink(found / "l") == "/etc"


# ---------------------------------------------------------------- what no inode can say


def test_what_no_inode_can_say_is_refused() -> None:
    for node, words in (
        (Node(stat.S_IFCHR | 0o600, rdev=(4096, 1)), "numbers are too large"),
        (Node(stat.S_IFBLK | 0o600, rdev=(1, 1 << 20)), "numbers are too large"),
        (Node(stat.S_IFREG | 0o600, size=1 << 44), "too large for ext4"),
    ):
        tree = Tree()
        tree.put("x", node)
        with pytest.raises(TargetError, match=words):
            writer().take(tree)


@pytest.mark.parametrize("count", [65000, 65001])
def test_hard_links_are_counted_or_refused(tmp_path: Path, count: int) -> None:
    tree, node = Tree(), file_node(b"one")
    for number in range(count):
        tree.put(b"%d" % number, node)
    if count <= schema.MOST_LINKS:
        image_of(tree, tmp_path / "image")
        return
    with pytest.raises(TargetError, match="too many names"):
        writer().take(tree)


def test_times_beyond_are_told() -> None:
    tree = Tree()
    for number, seconds in enumerate((schema.FIRST_TIME, schema.LAST_TIME, schema.LAST_TIME + 1, -(1 << 40))):
        tree.put(b"%d" % number, file_node(b"", mtime=seconds * 10**9))
    one = writer()
    one.take(tree)
    assert one.lost == ["a time before 1901 or after 2446"] * 2


def test_each_layer_has_its_own_attributes(tmp_path: Path) -> None:
    """A directory's may change, a file's may come later or go."""
    large = b"2" * 500
    tree = Tree()
    tree.put("d", Node(stat.S_IFDIR | 0o755, xattrs={b"user.old": b"1"}))
    tree.put("gone", Node(stat.S_IFREG | 0o644, xattrs={b"user.gone": b"3"}))
    one = writer()
    states = [one.take(tree)]
    tree.put("d", Node(stat.S_IFDIR | 0o700, xattrs={b"user.new": large}))
    tree.put("file", Node(stat.S_IFREG | 0o644, xattrs={b"user.file": large}))
    tree.remove("gone")
    states.append(one.take(tree))
    tree.put("d", Node(stat.S_IFDIR | 0o700))
    states.append(one.take(tree))
    for state, wanted in zip(states, ({"user.old": b"1"}, {"user.new": large}, {}), strict=True):
        image = save(checked(one.disk(state=state)), tmp_path / "image")
        fsck(image)
        with mounted(image, "ro,noload") as found:
            assert {name: os.getxattr(found / "d", name) for name in os.listxattr(found / "d")} == wanted
            assert state is states[0] or os.getxattr(found / "file", "user.file") == large
