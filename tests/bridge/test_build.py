"""`build --boot none`: trees become disks whose root partition the kernel finds equal to the tree."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from clikit import dm
from ocikit import docker_archive, oci_layout, tricky_layers
from treekit import fsck, mounted, same, sample_tree, save, snapshot, tar_entry, tar_file

from diskmorph.convert.bridge import BuildOptions, build
from diskmorph.convert.bridge.facts import architecture, seed_of
from diskmorph.convert.bridge.options import Size, parse_boot
from diskmorph.convert.bridge.parts import MIB, ROOT_TYPES, Part, compose, room_for_last, size_of, starts
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.allocator import Identity
from diskmorph.formats.errors import DiskmorphError, OptionError, TargetError
from diskmorph.formats.gpt import read_table
from diskmorph.formats.registry import open_disk
from diskmorph.formats.tree import Tree, file_node
from diskmorph.formats.trees import open_tree
from diskmorph.formats.views import Memory, Slice

from testkit import data, run

if TYPE_CHECKING:
    from diskmorph.formats.disk import Disk

NONE = BuildOptions(boot=(), size=Size(slack=16 * MIB), convert=ConvertOptions(sync=False))


def options(**more: object) -> BuildOptions:
    convert = {k: more.pop(k) for k in ("reproducible", "force", "target_format", "dry_run", "profile") if k in more}
    base = {"boot": (), "size": Size(slack=16 * MIB), "convert": ConvertOptions(sync=False, **convert)}  # type: ignore[arg-type]
    return BuildOptions(**{**base, **more})  # type: ignore[arg-type]


def root_of(disk: Disk, folder: Path) -> Path:
    """The root partition of a disk as a file, judged by e2fsck."""
    table = read_table(disk)
    assert table is not None
    assert table.scheme == "gpt"
    assert not table.warnings
    last = max(table.partitions, key=lambda p: p.start)
    assert last.type in ROOT_TYPES.values()
    assert last.start % MIB == 0
    image = save(Slice(disk, last.start, last.length), folder / "root.img")
    fsck(image)
    return image


def check(path: Path, expected: dict, folder: Path) -> None:
    with open_disk(path) as disk:
        image = root_of(disk, folder)
    with mounted(image, "ro,noload") as found:
        same(expected, snapshot(found))


@pytest.mark.parametrize("form", ["raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx"])
def test_a_directory_in_every_format(tmp_path: Path, form: str) -> None:
    root = sample_tree(tmp_path / "tree")
    report = build(root, tmp_path / f"disk.{form}", options=NONE)
    assert (report.format, report.source) == (form, str(root))
    assert report.bytes.total() == report.virtual_size
    check(tmp_path / f"disk.{form}", snapshot(root), tmp_path)


def test_sgdisk_finds_no_fault(tmp_path: Path) -> None:
    build(sample_tree(tmp_path / "tree"), tmp_path / "disk.raw", options=NONE)
    assert "No problems found" in run("sgdisk", "-v", tmp_path / "disk.raw").stdout


def test_container_images(tmp_path: Path) -> None:
    with open_tree(oci_layout(tmp_path / "oci", tricky_layers())) as tree:
        names = {path for path, _ in tree.walk() if path}
    archive = docker_archive(tmp_path / "docker.tar", tricky_layers())
    for source in (tmp_path / "oci", archive, f"docker-archive:{archive}"):
        build(source, tmp_path / "disk.raw", options=options(force=True))
        with open_disk(tmp_path / "disk.raw") as disk:
            image = root_of(disk, tmp_path)
        with mounted(image, "ro,noload") as found:
            assert set(snapshot(found)) == names


def test_sizes(tmp_path: Path) -> None:
    tree = Tree()
    tree.put("a", file_node(data("a", 20 * MIB)))
    sizes = {}
    for name, size in (("min", "min"), ("slack", "+100M"), ("exact", "1G"), ("odd", str(300 * MIB + 4711))):
        path = tmp_path / name
        build(tree, path, options=options(size=Size.parse(size), target_format="raw"))
        sizes[name] = path.stat().st_size
        with open_disk(path) as disk:
            root_of(disk, tmp_path)
    assert sizes["exact"] == 1 << 30
    assert sizes["odd"] == 300 * MIB + 4711
    assert sizes["min"] < 30 * MIB
    assert 100 * MIB < sizes["slack"] - sizes["min"] < 115 * MIB
    with pytest.raises(TargetError, match="20971520 bytes is too small"):
        build(tree, tmp_path / "small.raw", options=options(size=Size.parse("20M")))
    assert not (tmp_path / "small.raw").exists()


def test_a_profile_rounds_the_disk_before_the_table_is_made(tmp_path: Path) -> None:
    tree = Tree()
    tree.put("a", file_node(b"x"))
    report = build(tree, tmp_path / "disk.raw", options=options(profile="gcp", target_format="raw"))
    assert report.virtual_size % (1 << 30) == 0
    with open_disk(tmp_path / "disk.raw") as disk:
        root_of(disk, tmp_path)  # with the backup table at the disk's end: no warnings


def test_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    root = sample_tree(tmp_path / "tree")
    for name in ("a", "b"):
        build(root, tmp_path / name, options=options(reproducible=True, target_format="qcow2"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    ids = set()
    for name in ("c", "d"):
        build(root, tmp_path / name, options=options(target_format="raw"))
        with open_disk(tmp_path / name) as disk:
            ids.add(run("blkid", "-p", "-o", "value", "-s", "UUID", root_of(disk, tmp_path)).stdout)
            ids.add(read_table(disk).disk_id)  # type: ignore[union-attr]
    assert len(ids) == 4


def test_seeds_depend_on_everything() -> None:
    def seed(**change: object) -> bytes:
        tree = Tree()
        node = file_node(change.pop("content", b"x"), 0o644, 1, 2, 3)  # type: ignore[arg-type]
        for name, value in change.items():
            setattr(node, name, value)
        tree.put("a", node)
        return seed_of(tree)

    seeds = [seed(), seed(content=b"y"), seed(mode=0o100600), seed(uid=5), seed(mtime=4), seed(xattrs={b"user.a": b""})]
    assert len(set(seeds)) == len(seeds)
    assert seed() == seeds[0]


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    build(sample_tree(tmp_path / "tree"), tmp_path / "disk.qcow2", options=options(dry_run=True))
    assert {p.name for p in tmp_path.iterdir()} == {"tree"}


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(tar_file(tar_entry("a", b"x"))[:700])
    (tmp_path / "old.raw").write_bytes(b"mine")
    for target in ("new.raw", "old.raw"):
        with pytest.raises(DiskmorphError):
            build(tmp_path / "bad.tar", tmp_path / target, options=NONE)
    with pytest.raises(TargetError, match="exists"):
        build(sample_tree(tmp_path / "tree"), tmp_path / "old.raw", options=NONE)
    assert {p.name for p in tmp_path.iterdir()} == {"bad.tar", "old.raw", "tree"}
    assert (tmp_path / "old.raw").read_bytes() == b"mine"


def test_words() -> None:
    assert parse_boot("bios,uefi") == ("bios", "uefi")
    assert parse_boot("none") == ()
    for word in ("", "grub", "uefi,uki", "none,bios"):
        with pytest.raises(OptionError):
            parse_boot(word)
    assert Size.parse("3G").total == 3 << 30
    assert Size.parse("min") == Size(slack=0)
    assert Size.parse("+2M").slack == 2 << 20
    with pytest.raises(OptionError):
        Size.parse("large")
    with pytest.raises(OptionError):
        build(Tree(), "x.raw", options=options(fs="xfs"))


@pytest.mark.parametrize(("machine", "name"), [(62, "amd64"), (183, "arm64"), (243, "riscv64")])
def test_the_architecture_decides_the_partitions_type(tmp_path: Path, machine: int, name: str) -> None:
    tree = Tree()
    tree.put("bin/sh", file_node(b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 2, machine) + bytes(40), 0o755))
    assert architecture(tree) == name
    build(tree, tmp_path / "disk.raw", options=NONE)
    with open_disk(tmp_path / "disk.raw") as disk:
        assert read_table(disk).partitions[0].type == ROOT_TYPES[name]  # type: ignore[union-attr]
    tree.config = {"architecture": "s390x"}
    assert architecture(tree) == "s390x"


def test_parts_are_laid_one_after_the_other() -> None:
    parts = [
        Part("a", ROOT_TYPES["amd64"], Memory(b"a" * 5000)),
        Part("b", ROOT_TYPES["amd64"], Memory(b"b" * 3 * MIB)),
    ]
    assert starts(parts) == [MIB, 2 * MIB, 5 * MIB]
    assert size_of(parts) == 6 * MIB
    assert room_for_last(10 * MIB, parts[:1]) == 7 * MIB
    disk = compose(parts, 10 * MIB, Identity(b"x"))
    table = read_table(disk)
    assert table is not None
    assert [(p.start, p.length) for p in table.partitions] == [(MIB, MIB), (2 * MIB, 7 * MIB)]
    assert disk.read(MIB, 5000) == b"a" * 5000
    assert disk.read(2 * MIB, 10) == b"b" * 10
    with pytest.raises(TargetError):
        compose(parts, 4 * MIB, Identity(b"x"))


def test_the_command_line(tmp_path: Path) -> None:
    root = sample_tree(tmp_path / "tree")
    words = ("--boot", "none", "--size", "min", "--no-sync")
    report = dm("build", root, tmp_path / "disk.qcow2", *words, "--json").ok().json
    assert report["format"] == "qcow2"
    assert sum(report["bytes"].values()) == report["virtual_size"]
    done = dm("build", root, tmp_path / "disk.qcow2", *words)
    assert done.status == 1
    assert "--force" in done.err
    assert dm("build", root, tmp_path / "x.qcow2", "--boot", "sometimes").status == 2
    assert {p.name for p in tmp_path.iterdir()} == {"tree", "disk.qcow2"}
