"""`extract`: roots found and taken out, round trips, what stays behind, what is refused; `ls`, `cat`, `convert`."""

from __future__ import annotations

import gc
import json
import os
import struct
from typing import TYPE_CHECKING

import pytest
from clikit import dm
from treekit import put, same, sample_tree, save, snapshot, tar_entry, tar_file, told, without_acls

from diskmorph.commands import ls
from diskmorph.convert.bridge import BuildOptions, ExtractOptions, build, extract
from diskmorph.convert.bridge.options import Size
from diskmorph.convert.bridge.pseudo import drop_pseudo, strip_boot
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import (
    DiskmorphError,
    FormatError,
    OptionError,
    SourceError,
    TargetError,
    UnsupportedError,
)
from diskmorph.formats.gpt import Partition, build_gpt
from diskmorph.formats.registry import open_disk
from diskmorph.formats.roots import open_root, volumes_of
from diskmorph.formats.tree import Entry, Tree, file_node, link_node
from diskmorph.formats.trees import open_tree
from diskmorph.formats.views import Regions

from testkit import run

if TYPE_CHECKING:
    from pathlib import Path

    from diskmorph.formats.disk import Disk

MIB = 1 << 20
QUICK = ConvertOptions(sync=False)
ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
UUID = "6a8f2c1e-0000-4000-8000-00000000000a"


def quick(**more: object) -> ExtractOptions:
    return ExtractOptions(convert=QUICK, **more)  # type: ignore[arg-type]


def ext4(folder: Path, tree: Path, *words: str) -> Path:
    image = folder / f"{tree.name}.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    run("mke2fs", "-q", "-t", "ext4", *words, "-d", tree, image)
    return image


def disk_of(folder: Path, *parts: tuple[str, Path | bytes]) -> Path:
    """A GPT disk of these partitions, (type, content) each."""
    contents = [what if isinstance(what, bytes) else what.read_bytes() for _, what in parts]
    disk = Regions()
    at = MIB
    table = []
    for number, ((kind, _), content) in enumerate(zip(parts, contents, strict=True), 1):
        length = -(-len(content) // MIB) * MIB
        table.append(Partition(number, kind, f"part {number}", at, length, f"00000000-0000-4000-8000-{number:012}"))
        at += length
    size = at + MIB
    head, tail = build_gpt(size, table, disk_guid="11111111-2222-4333-8444-555555555555")
    disk.add_bytes(head)
    for part, content in zip(table, contents, strict=True):
        disk.pad_to(part.start)
        disk.add_bytes(content)
    disk.pad_to(size - len(tail))
    disk.add_bytes(tail)
    return save(disk, folder / "disk.raw")


def tree_of(path: Path, **more: object) -> Tree:
    disk: Disk = open_disk(path)
    return open_root(disk, **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------- round trips


def test_round_trip_to_every_target(tmp_path: Path) -> None:
    root = sample_tree(tmp_path / "tree")
    build(root, tmp_path / "disk.qcow2", options=BuildOptions(boot=(), size=Size(slack=0), convert=QUICK))
    expected = snapshot(root)
    targets = [
        "x.tar",
        "x.tar.gz",
        "x.tar.zst",
        "dir",
        "oci:layout",
        "oci-archive:oci.tar",
        "docker-archive:docker.tar",
    ]
    for target in targets:
        prefix, _, name = target.rpartition(":")
        place = f"{prefix}:{tmp_path / name}" if prefix else str(tmp_path / name)
        report = extract(tmp_path / "disk.qcow2", place, options=quick())
        assert report.bytes.total() == report.virtual_size, target
        assert report.target == place
        with open_tree(place) as tree:
            same(expected, told(tree))
    same(expected, snapshot(tmp_path / "dir"))
    assert (tmp_path / "dir/sparse").stat().st_blocks * 512 < MIB


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    """A partition is a window of its disk: closing the tree in it closes the disk."""
    build(sample_tree(tmp_path / "tree"), tmp_path / "d.qcow2", options=BuildOptions(boot=(), convert=QUICK))
    extract(tmp_path / "d.qcow2", f"oci:{tmp_path}/first", options=quick())
    gc.collect()
    gc.disable()
    try:
        before = os.listdir("/proc/self/fd")
        for turn in range(3):
            extract(tmp_path / "d.qcow2", f"oci:{tmp_path}/{turn}", options=quick())
        assert os.listdir("/proc/self/fd") == before
    finally:
        gc.enable()


def test_the_configuration_of_images(tmp_path: Path) -> None:
    build(sample_tree(tmp_path / "tree"), tmp_path / "d.raw", options=BuildOptions(boot=(), convert=QUICK))
    words = (
        "--entrypoint",
        '["/bin/app", "a b"]',
        "--cmd",
        "one word",
        "--env",
        "A=1",
        "--env",
        "B=x=y",
        "--user",
        "7",
    )
    dm("extract", tmp_path / "d.raw", f"oci:{tmp_path}/oci:app", *words, "--platform", "linux/arm64/v8").ok()
    config = json.loads(run("skopeo", "inspect", "--config", f"oci:{tmp_path}/oci:app").stdout)
    assert config["config"] == {
        "Entrypoint": ["/bin/app", "a b"],
        "Cmd": ["one word"],
        "Env": ["A=1", "B=x=y"],
        "User": "7",
    }
    assert (config["os"], config["architecture"], config["variant"]) == ("linux", "arm64", "v8")
    assert dm("extract", tmp_path / "d.raw", f"oci:{tmp_path}/x", "--env", "novalue").status == 2
    assert dm("extract", tmp_path / "d.raw", f"oci:{tmp_path}/x", "--cmd", "[1]").status == 2
    with pytest.raises(OptionError):
        extract(tmp_path / "d.raw", f"oci:{tmp_path}/x", options=quick(platform="arm64"))


def test_the_same_disk_gives_the_same_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    build(sample_tree(tmp_path / "tree"), tmp_path / "d.raw", options=BuildOptions(boot=(), convert=QUICK))
    again = ConvertOptions(sync=False, reproducible=True)
    for kind in ("oci", "oci-archive", "docker-archive"):
        for name in "ab":
            place = tmp_path / f"{kind}-{name}"
            extract(tmp_path / "d.raw", f"{kind}:{place}", options=ExtractOptions(convert=again))
        one, two = (tmp_path / f"{kind}-{name}" for name in "ab")
        if kind == "oci":
            one, two = one / "index.json", two / "index.json"
        assert one.read_bytes() == two.read_bytes()


# ---------------------------------------------------------------- which root


def roots(folder: Path) -> dict[str, Path]:
    a, b, c = (folder / name for name in "abc")
    put(a, "only-a", b"a")
    put(b, "only-b", b"b")
    put(b, "etc/os-release", b'ID=debian\nVERSION_ID="12"\n')
    put(b, "etc/fstab", f"UUID={UUID} /boot ext4 defaults 0 2\nproc /proc proc defaults 0 0\n".encode())
    put(b, "boot/hidden-by-mount", b"h")
    put(c, "vmlinuz-6.1.0", b"kernel")
    return {"a": ext4(folder, a), "b": ext4(folder, b), "c": ext4(folder, c, "-U", UUID)}


def test_the_root_by_its_content_with_boot_merged(tmp_path: Path) -> None:
    found = roots(tmp_path)
    disk = disk_of(tmp_path, (LINUX, found["a"]), (LINUX, found["b"]), (LINUX, found["c"]))
    with tree_of(disk) as tree:
        names = {path for path, _ in tree.walk()}
    assert {b"only-b", b"boot/vmlinuz-6.1.0"} <= names
    assert not {b"only-a", b"boot/hidden-by-mount", b"boot/lost+found"} & names
    with tree_of(disk, partition=1) as tree:
        assert tree.find("only-a") is not None
    with pytest.raises(SourceError, match="no partition 9"):
        tree_of(disk, partition=9)
    assert [volume.filesystem.type for volume in volumes_of(open_disk(disk)) if volume.filesystem] == ["ext4"] * 3


def test_the_partitions_type_decides(tmp_path: Path) -> None:
    found = roots(tmp_path)
    with tree_of(disk_of(tmp_path, (LINUX, found["b"]), (ROOT, found["a"]))) as tree:
        assert tree.find("only-a") is not None


@pytest.mark.parametrize(
    "device", ["PARTUUID=00000000-0000-4000-8000-000000000002", "/dev/sda2", "LABEL=usr", "/dev/nvme0n1p2"]
)
def test_words_of_fstab(tmp_path: Path, device: str) -> None:
    root, usr = tmp_path / "root", tmp_path / "usr"
    put(root, "etc/os-release", b"ID=x\n")
    put(root, "etc/fstab", f"# comment\n{device} /usr ext4 ro\nbroken\n".encode())
    put(usr, "bin/true", b"x")
    disk = disk_of(tmp_path, (LINUX, ext4(tmp_path, root)), (LINUX, ext4(tmp_path, usr, "-L", "usr")))
    with tree_of(disk) as tree:
        assert tree.find("usr/bin/true") is not None


def test_a_bare_file_system_is_the_root(tmp_path: Path) -> None:
    found = roots(tmp_path)
    with tree_of(found["a"]) as tree:
        assert tree.find("only-a") is not None


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    luks = b"LUKS\xba\xbe\0\2" + bytes(MIB - 8)
    bitlocker = bytearray(MIB)
    bitlocker[:11], bitlocker[510:512] = b"\xeb\x58\x90-FVE-FS-", b"\x55\xaa"
    raid = bytearray(MIB)
    struct.pack_into("<III", raid, 4096, 0xA92B4EFC, 1, 0)
    for name, content in (("LUKS", luks), ("BitLocker", bytes(bitlocker)), ("RAID", bytes(raid))):
        with pytest.raises(UnsupportedError, match=name):
            tree_of(disk_of(tmp_path, (LINUX, content)))
        with pytest.raises(UnsupportedError, match=name):
            tree_of(disk_of(tmp_path, (LINUX, content)), partition=1)
    with pytest.raises(SourceError, match="looks like a root") as caught:
        tree_of(disk_of(tmp_path, (LINUX, bytes(MIB)), (LINUX, bytes(MIB))))
    assert "1: nothing known" in str(caught.value)
    with pytest.raises(FormatError, match="no file system"):
        tree_of(disk_of(tmp_path, (LINUX, bytes(MIB))), partition=1)


# ---------------------------------------------------------------- what stays behind


def test_pseudo_file_systems_and_swap_stay_behind() -> None:
    tree = Tree()
    for name in ("proc/1/status", "sys/x", "dev/sda", "run/lock", "tmp/t", "lost+found/x", "home/proc/kept"):
        tree.put(name, file_node(b"x"))
    swap = bytes(4086) + b"SWAPSPACE2" + bytes(8000)
    tree.put("swapfile", file_node(swap))
    tree.put("var/swap", file_node(swap))
    tree.put("swapped", file_node(b"no swap at all" * 1000))
    tree.put("etc/fstab", file_node(b"/var/swap none swap sw 0 0\n/../etc/passwd none swap sw 0 0\n"))
    drop_pseudo(tree)
    names = {path for path, _ in tree.walk()}
    assert {b"proc", b"sys", b"dev", b"run", b"tmp", b"home/proc/kept", b"swapped", b"etc/fstab"} <= names
    assert not {b"proc/1", b"sys/x", b"dev/sda", b"tmp/t", b"lost+found", b"swapfile", b"var/swap"} & names


def test_what_is_no_root_is_taken_whole(tmp_path: Path) -> None:
    tree = Tree()
    for name in ("dev/tool.deb", "tmp/t", "run/run.sh", "lost+found/x"):
        tree.put(name, file_node(b"x"))
    extract(tree, tmp_path / "out", options=ExtractOptions(convert=QUICK))
    assert sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file()) == [
        "run.sh",
        "t",
        "tool.deb",
        "x",
    ]


def test_strip_boot() -> None:
    tree = Tree()
    names = ("boot/vmlinuz", "boot/grub/grub.cfg", "usr/lib/modules/6/x.ko", "usr/lib/firmware/f", "usr/lib/libc.so")
    for name in names:
        tree.put(name, file_node(b"x"))
    tree.put("lib", link_node(b"usr/lib"))
    tree.put("vmlinuz", link_node(b"boot/vmlinuz"))
    tree.put("initrd.img.old", link_node(b"boot/initrd"))
    strip_boot(tree)
    assert {path for path, _ in tree.walk()} == {b"", b"boot", b"usr", b"usr/lib", b"usr/lib/libc.so", b"lib"}


# ---------------------------------------------------------------- targets


def test_existing_targets(tmp_path: Path) -> None:
    source = tmp_path / "s.tar"
    source.write_bytes(tar_file(tar_entry("a", b"x")))
    put(tmp_path, "full/mine", b"mine")
    put(tmp_path, "x.tar", b"mine")
    (tmp_path / "link.tar").symlink_to("x.tar")
    for target in ("full", f"oci:{tmp_path}/full", "x.tar", f"docker-archive:{tmp_path}/x.tar"):
        with pytest.raises(TargetError, match="exists"):
            extract(source, target if ":" in target else tmp_path / target, options=quick())
    assert (tmp_path / "x.tar").read_bytes() == b"mine"
    extract(source, tmp_path / "link.tar", options=ExtractOptions(convert=ConvertOptions(sync=False, force=True)))
    assert (tmp_path / "x.tar").read_bytes() == b"mine"
    assert not (tmp_path / "link.tar").is_symlink()


@pytest.mark.parametrize("target", ["dir", "x.tar", "x.tar.gz", "oci:o", "docker-archive:d.tar"])
def test_a_damaged_disk_leaves_nothing(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sample_tree(tmp_path / "tree")
    build(root, tmp_path / "d.raw", options=BuildOptions(boot=(), size=Size(slack=0), convert=QUICK))
    os.truncate(tmp_path / "d.raw", (tmp_path / "d.raw").stat().st_size - 2 * MIB)
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir())
    with pytest.raises(DiskmorphError):
        extract("d.raw", target, options=quick(partition=1))
    assert set(os.listdir()) == before


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "s.tar"
    source.write_bytes(tar_file(tar_entry("a", b"x" * 5000)))
    dry = ExtractOptions(convert=ConvertOptions(dry_run=True))
    for target in ("dir", "x.tar", "x.tar.gz"):
        assert extract(source, tmp_path / target, options=dry).virtual_size >= 5000
    extract(source, f"oci:{tmp_path}/oci", options=dry)
    assert os.listdir(tmp_path) == ["s.tar"]


# ---------------------------------------------------------------- looking inside, trees to trees


def test_ls_and_cat(tmp_path: Path) -> None:
    root = sample_tree(tmp_path / "tree")
    build(root, tmp_path / "d.qcow2", options=BuildOptions(boot=(), size=Size(slack=0), convert=QUICK))
    listed = dm("ls", tmp_path / "d.qcow2", "/etc").ok().out.split()
    assert listed == ["hard-b", "hostname", "os-release", "shadow"]
    long = dm("ls", "-l", tmp_path / "d.qcow2").ok().out
    assert "crw-r--r--" in long
    assert "1, 3" in long
    assert "link -> etc/hostname" in long
    said = dm("ls", "-R", tmp_path / "d.qcow2", "--json").ok().json
    names = {entry["path"] for entry in said["entries"]} - {"lost+found"}
    assert names == {os.fsdecode(path) for path in snapshot(root)}
    assert dm("ls", tmp_path / "d.qcow2", "/etc/hostname").ok().out == "etc/hostname\n"
    assert dm("ls", tmp_path / "d.qcow2", "/none").status == 1
    assert dm("cat", tmp_path / "d.qcow2", "/none").status == 1
    assert dm("cat", tmp_path / "d.qcow2", "/etc").status == 1
    import subprocess
    import sys

    for path, want in (("/link", b"box\n"), ("big", (root / "big").read_bytes())):
        words = [sys.executable, "-m", "diskmorph", "cat", str(tmp_path / "d.qcow2"), path]
        assert subprocess.run(words, capture_output=True, check=True).stdout == want


def test_standard_output_takes_an_archive_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "root", "a", b"x")
    for words in (("-",), ("-", "-O", "oci-archive"), ("docker-archive:-",), ("oci:-",)):
        assert dm("extract", tmp_path / "root", *words).status == 2
    assert not (tmp_path / "-").exists()


def test_ls_of_odd_names_and_times(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_file(tar_entry("a\nb"), tar_entry("c")))
    assert dm("ls", tmp_path / "x.tar").ok().out == "a\\nb\nc\n"
    far = Entry(b"far", file_node(b"", mtime=(1 << 61) * 10**9))  # btrfs keeps such times
    assert f"@{1 << 61} far" in next(ls._lines([far], long=True))


def test_convert_between_trees_leaves_nothing_out(tmp_path: Path) -> None:
    root = sample_tree(tmp_path / "tree")
    put(root, "tmp/kept", b"k")
    expected = snapshot(root)
    dm("convert", root, tmp_path / "x.tar", "--no-sync").ok()
    dm("convert", tmp_path / "x.tar", f"oci:{tmp_path}/oci", "--no-sync").ok()
    dm("convert", f"oci:{tmp_path}/oci", tmp_path / "out", "-O", "directory", "--no-sync").ok()
    found = snapshot(tmp_path / "out")
    drop = {b"tmp"}  # its time changed when the file came into it
    same(
        {k: v for k, v in without_acls(expected).items() if k not in drop},
        {k: v for k, v in without_acls(found).items() if k not in drop},
    )
