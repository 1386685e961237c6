"""Roots on LVM2, as Debian and RHEL install them: made by lvm2, found, merged by fstab, chosen by name, told by info."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from clikit import dm
from lvmkit import Lvm
from treekit import mounted, put, same, sample_tree, snapshot, told

from diskmorph.convert.bridge import ExtractOptions, extract
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import FormatError, SourceError, UnsupportedError
from diskmorph.formats.registry import open_disk
from diskmorph.formats.roots import open_root
from diskmorph.formats.trees import open_tree

from testkit import run

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
EFI, LINUX, LVM = (
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    "E6D6D379-F507-44C2-A23C-238F2A3DF928",
)
UUID = "6a8f2c1e-0000-4000-8000-00000000000b"


def partitioned(path: Path, *sizes: tuple[str, int]) -> list[tuple[int, int]]:
    """A GPT disk by sfdisk; return (start, length) of its partitions, in bytes."""
    with path.open("wb") as file:
        file.truncate((sum(size for _, size in sizes) + 3) * MIB)
    words = "label: gpt\n" + "".join(f"size={size}MiB, type={kind}\n" for kind, size in sizes)
    run("sh", "-c", 'printf "%s" "$1" | sfdisk -q "$2"', "sh", words, path)
    table = json.loads(run("sfdisk", "-J", path).stdout)["partitiontable"]["partitions"]
    return [(one["start"] * 512, one["size"] * 512) for one in table]


def ext4(image: Path, tree: Path, size: int, *words: str) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run("mke2fs", "-q", "-t", "ext4", *words, "-d", tree, image)
    return image


def xfs(image: Path, tree: Path, size: int) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.xfs", "-q", "--unsupported", image)
    with mounted(image, "rw", fs="xfs") as point:
        run("cp", "-a", f"{tree}/.", point)
    return image


def fat(image: Path, size: int) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.vfat", image)
    return image


def installed(folder: Path, root: Path) -> Path:
    """A disk as installers make it: ESP, /boot, and a group of root, home, data, swap; the root in two pieces of XFS."""
    for name in ("home", "boot", "data"):
        put(folder / name, f"only-{name}", name.encode())
    fstab = (
        "/dev/mapper/my--vg-root / xfs defaults 0 0\n"
        "/dev/my-vg/home /home ext4 defaults 0 0\n"
        f"UUID={UUID} /srv/data ext4 defaults 0 0\n"
        "LABEL=BOOT /boot ext4 defaults 0 0\n"
        "/dev/mapper/my--vg-wide /var/lost ext4 defaults 0 0\n"
        "/dev/mapper/my--vg-swap none swap sw 0 0\n"
    )
    put(root, "etc/fstab", fstab.encode())
    disk = folder / "disk.raw"
    parts = partitioned(disk, (EFI, 8), (LINUX, 8), (LVM, 100), (LVM, 32))
    images = (fat(folder / "esp", 8 * MIB), ext4(folder / "b", folder / "boot", 8 * MIB, "-L", "BOOT"))
    for (start, _), image in zip(parts, images, strict=False):
        run("dd", f"if={image}", f"of={disk}", "bs=1M", f"seek={start // MIB}", "conv=notrunc", "status=none")
    with Lvm(folder) as lvm:
        devices = [lvm.attach(disk, *part) for part in parts[2:]]
        for device in devices:
            lvm("pvcreate", device)
        lvm("vgcreate", "my-vg", *devices)
        lvm.create("my-vg", "root", "-l", 15)
        for name, count in (("home", 2), ("data", 2), ("swap", 1)):
            lvm.create("my-vg", name, "-l", count)
        lvm("lvextend", "-l", "+5", "my-vg/root", devices[1])
        lvm.create("my-vg", "wide", "-i", 2, "-l", 2)
        lvm("lvchange", "--addtag", "changed", "my-vg/home")
        assert len(lvm.places("my-vg/root")) == 2
        lvm.fill("my-vg/root", xfs(folder / "r", root, 20 * 4 * MIB))
        lvm.fill("my-vg/home", ext4(folder / "h", folder / "home", 8 * MIB))
        lvm.fill("my-vg/data", ext4(folder / "d", folder / "data", 8 * MIB, "-U", UUID))
    return disk


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    return installed(folder, sample_tree(folder / "root", xattrs=False))


def test_a_root_on_logical_volumes_is_extracted(disk: Path, tmp_path: Path) -> None:
    run("qemu-img", "convert", "-O", "qcow2", disk, tmp_path / "disk.qcow2")
    options = ExtractOptions(convert=ConvertOptions(sync=False))
    report = extract(tmp_path / "disk.qcow2", tmp_path / "x.tar", options=options)
    assert report.lost == ("/var/lost, mounted from my-vg/wide (striped)",)
    with open_tree(tmp_path / "x.tar") as tree:
        found = told(tree)
    merged = {b"home", b"home/only-home", b"boot", b"boot/only-boot", b"srv", b"srv/data", b"srv/data/only-data"}
    assert merged <= set(found)
    expected = snapshot(disk.parent / "root")
    same(expected, {name: entry for name, entry in found.items() if name not in merged or name in expected})


def test_logical_volumes_by_name(disk: Path) -> None:
    for word in ("my-vg/home", "/dev/my-vg/home"):
        assert "only-home" in dm("ls", disk, "--partition", word).ok().out.split()
    assert "only-data" in dm("ls", "-R", disk, "srv").ok().out
    assert "only-boot" in dm("ls", disk, "--partition", 2).ok().out
    done = dm("ls", disk, "--partition", "my-vg/none")
    assert done.status
    assert "my-vg/home" in done.err
    assert dm("ls", disk, "--partition", "one").status == 2
    refused = dm("ls", disk, "--partition", "my-vg/wide")
    assert "my-vg/wide is of type striped" in refused.err
    assert "--partition GROUP/NAME" in dm("ls", disk, "--partition", 3).err


def test_info_tells_of_groups(disk: Path) -> None:
    report = dm("info", "--json", disk).ok().json
    assert report["os"]["id"] == "debian"
    (group,) = report["volume_groups"]
    assert (group["name"], group["extent_size"]) == ("my-vg", 4 * MIB)
    assert [one["partition"] for one in group["physical_volumes"]] == [3, 4]
    told = {one["name"]: (one["size"], one["type"], one["filesystem"]) for one in group["logical_volumes"]}
    assert told == {
        "root": (80 * MIB, "linear", "xfs"),
        "home": (8 * MIB, "linear", "ext4"),
        "data": (8 * MIB, "linear", "ext4"),
        "swap": (4 * MIB, "linear", None),
        "wide": (8 * MIB, "striped", None),
    }
    assert any("striped" in warning for warning in report["warnings"])
    text = dm("info", disk).ok().out
    assert "volume group my-vg (LVM2, on partition 3, partition 4):" in text
    assert "striped, not read" in text


def test_a_missing_physical_volume_is_named(disk: Path, tmp_path: Path) -> None:
    run("cp", "--sparse=always", disk, tmp_path / "disk.raw")
    parts = json.loads(run("sfdisk", "-J", disk).stdout)["partitiontable"]["partitions"]
    with (tmp_path / "disk.raw").open("r+b") as file:
        file.seek(parts[3]["start"] * 512)
        file.write(bytes(2 * MIB))
    with pytest.raises(UnsupportedError, match="which is missing"):
        open_root(open_disk(tmp_path / "disk.raw"))
    with open_root(open_disk(tmp_path / "disk.raw"), partition="my-vg/home") as tree:
        assert tree.find("only-home") is not None
    (group,) = dm("info", "--json", tmp_path / "disk.raw").ok().json["volume_groups"]
    assert [one["missing"] for one in group["physical_volumes"]] == [False, True]


def test_a_root_that_may_be_encrypted_is_not_guessed(tmp_path: Path) -> None:
    """A readable /boot alone is no root where LUKS lies beside it: on a partition, or in a logical volume."""
    put(tmp_path / "boot", "vmlinuz", b"kernel")
    boot = ext4(tmp_path / "b", tmp_path / "boot", 8 * MIB)
    luks = tmp_path / "luks"
    luks.write_bytes(b"LUKS\xba\xbe\0\2" + bytes(8 * MIB - 8))
    for kind, size in ((LINUX, 8), (LVM, 24)):
        disk = tmp_path / f"disk-{size}"
        (start, _), second = partitioned(disk, (LINUX, 8), (kind, size))
        run("dd", f"if={boot}", f"of={disk}", "bs=1M", f"seek={start // MIB}", "conv=notrunc", "status=none")
        if kind == LINUX:
            run("dd", f"if={luks}", f"of={disk}", "bs=1M", f"seek={second[0] // MIB}", "conv=notrunc", "status=none")
        else:
            (tmp_path / "lvm").mkdir()
            with Lvm(tmp_path / "lvm") as lvm:
                lvm("pvcreate", lvm.attach(disk, *second))
                lvm("vgcreate", "vg", lvm.loops[0])
                lvm.create("vg", "root", "-l", 2)
                lvm.fill("vg/root", luks)
        with pytest.raises(UnsupportedError, match="encrypted by LUKS"):
            open_root(open_disk(disk))
        with open_root(open_disk(disk), partition=1) as tree:
            assert tree.find("vmlinuz") is not None


def test_a_whole_disk_as_physical_volume(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    put(tmp_path / "tree", "etc/os-release", b"ID=x\n")
    with Lvm(tmp_path) as lvm:
        lvm("pvcreate", lvm.attach(disk))
        with pytest.raises(UnsupportedError, match="LVM2 physical volume"):
            open_root(open_disk(disk))
        lvm("vgcreate", "vg", lvm.loops[0])
        lvm.create("vg", "one", "-l", 2)
        lvm.fill("vg/one", ext4(tmp_path / "i", tmp_path / "tree", 8 * MIB))
    with open_root(open_disk(disk)) as tree:
        assert tree.find("etc/os-release") is not None
    with pytest.raises(SourceError, match="no logical volume"):
        open_root(open_disk(disk), partition="vg/two")
    report = dm("info", "--json", disk).ok().json
    assert report["filesystem"] == "lvm2"
    assert report["volume_groups"][0]["physical_volumes"][0]["partition"] is None
    raw = bytearray(disk.read_bytes())
    raw[4096 + 41] ^= 1
    disk.write_bytes(raw)
    with pytest.raises(FormatError, match="metadata area"):
        open_root(open_disk(disk))
    assert any("metadata area" in warning for warning in dm("info", "--json", disk).ok().json["warnings"])
