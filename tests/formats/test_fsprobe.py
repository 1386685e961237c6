"""File systems made by their own tools are recognised, with the label and UUID that blkid reads."""

from pathlib import Path

import pytest

from diskmorph.formats.fsprobe import FileSystem, probe
from diskmorph.formats.source import FileSource
from diskmorph.formats.views import Memory, Regions, SourceDisk

from testkit import MIB, data, run


def sparse(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def blkid(path: Path) -> dict[str, str]:
    """What blkid reads; `-o value` alone does not escape blanks."""
    return {
        tag: run("/sbin/blkid", "-p", "-o", "value", "-s", tag, path, ok=False).stdout.rstrip("\n")
        for tag in ("TYPE", "LABEL", "UUID")
    }


MADE = {
    "ext2": (4 * MIB, ["mke2fs", "-q", "-t", "ext2", "-L", "the label", "{}"]),
    "ext3": (8 * MIB, ["mke2fs", "-q", "-t", "ext3", "-L", "journalled", "{}"]),
    "ext4": (8 * MIB, ["mke2fs", "-q", "-t", "ext4", "-L", "sixteen letters!", "{}"]),
    "xfs": (320 * MIB, ["mkfs.xfs", "-q", "-L", "twelve chars", "{}"]),
    "btrfs": (128 * MIB, ["mkfs.btrfs", "-q", "-L", "with läbel", "{}"]),
    "fat12": (2 * MIB, ["mkfs.fat", "-F", "12", "-n", "SMALL", "{}"]),
    "fat16": (16 * MIB, ["mkfs.fat", "-F", "16", "-n", "SIXTEEN", "{}"]),
    "fat32": (64 * MIB, ["mkfs.fat", "-F", "32", "-n", "THIRTY TWO", "{}"]),
    "exfat": (16 * MIB, ["mkfs.exfat", "-L", "extended", "{}"]),
    "ntfs": (
        16 * MIB,
        ["mkntfs", "-q", "-F", "-f", "-s", "512", "-p", "0", "-H", "255", "-S", "63", "-L", "New Vol", "{}"],
    ),
    "swap": (2 * MIB, ["mkswap", "-q", "-L", "swapped", "{}"]),
    "udf": (4 * MIB, ["mkudffs", "--label=universal", "{}"]),
}
BLKID = {"fat12": "vfat", "fat16": "vfat", "fat32": "vfat"}


@pytest.mark.parametrize("kind", MADE)
def test_made_by_its_own_tool(kind: str, tmp_path: Path) -> None:
    size, command = MADE[kind]
    path = sparse(tmp_path / "disk", size)
    run(*[word.format(path) for word in command])
    found = probe(SourceDisk(FileSource(path)))
    theirs = blkid(path)
    assert found is not None
    assert found.type == kind
    assert BLKID.get(kind, kind) == theirs["TYPE"]
    assert found.label == theirs["LABEL"]
    assert kind == "udf" or found.uuid == theirs["UUID"]


def test_no_label_is_none(tmp_path: Path) -> None:
    for kind, command in (("ext4", ["mke2fs", "-q", "-t", "ext4"]), ("fat16", ["mkfs.fat", "-F", "16"])):
        path = sparse(tmp_path / kind, 16 * MIB)
        run(*command, path)
        found = probe(SourceDisk(FileSource(path)))
        assert found is not None and found.type == kind and found.label is None


def test_optical_and_packed(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(data("file", 5000))
    run("genisoimage", "-quiet", "-V", "A VOLUME", "-o", tmp_path / "iso", tmp_path / "tree")
    run("mksquashfs", tmp_path / "tree", tmp_path / "squash", "-quiet", "-no-progress")
    iso = probe(SourceDisk(FileSource(tmp_path / "iso")))
    assert iso is not None and (iso.type, iso.label) == ("iso9660", "A VOLUME")
    assert iso.uuid == blkid(tmp_path / "iso")["UUID"]
    squash = probe(SourceDisk(FileSource(tmp_path / "squash")))
    assert squash == FileSystem("squashfs")


@pytest.mark.parametrize("version", [1, 2])
def test_luks(version: int, tmp_path: Path) -> None:
    path = sparse(tmp_path / "disk", 32 * MIB)
    key = tmp_path / "key"
    key.write_bytes(b"a key of no secret")
    cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--batch-mode", "--key-file", key]
    label = ["--label", "locked"] if version == 2 else []
    run("/sbin/cryptsetup", "luksFormat", "--type", f"luks{version}", *cheap, *label, path)
    found = probe(SourceDisk(FileSource(path)))
    assert found == FileSystem("luks", "locked" if version == 2 else None, blkid(path)["UUID"])


def _lvm2() -> bytes:
    head = b"LABELONE" + (1).to_bytes(8, "little") + bytes(4) + (32).to_bytes(4, "little") + b"LVM2 001"
    return bytes(512) + head + b"abcdefGHIJklmnOPQRstuvWXYZ012345" + bytes(2000)


def _zfs() -> bytes:
    label = bytearray(256 << 10)
    label[(128 << 10) + 5 * 1024 : (128 << 10) + 5 * 1024 + 8] = (0x00BAB10C).to_bytes(8, "little")
    return bytes(label)


def _mdraid() -> bytes:
    block = bytearray(8192)
    block[4096:4100] = b"\xfc\x4e\x2b\xa9"
    block[4100:4104] = (1).to_bytes(4, "little")
    block[4112:4128] = bytes(range(16))
    block[4128:4135] = b"host:md"
    return bytes(block)


BY_HAND = {
    "lvm2": (_lvm2(), None, "abcdef-GHIJ-klmn-OPQR-stuv-WXYZ-012345"),
    "zfs": (_zfs(), None, None),
    "mdraid": (_mdraid(), "host:md", "00010203-0405-0607-0809-0a0b0c0d0e0f"),
    "bitlocker": (b"\xeb\x58\x90-FVE-FS-" + bytes(4096), None, None),
    "refs": (b"\0\0\0ReFS\0\0\0\0" + bytes(4096), None, None),
    "apfs": (bytes(32) + b"NXSB" + bytes(4096), None, None),
    "hfsplus": (bytes(1024) + b"H+\0\4" + bytes(4096), None, None),
    "erofs": (bytes(1024) + b"\xe2\xe1\xf5\xe0" + bytes(4096), None, None),
    "f2fs": (bytes(1024) + b"\x10\x20\xf5\xf2" + bytes(4096), None, None),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_made_by_hand(kind: str) -> None:
    block, label, uuid = BY_HAND[kind]
    assert probe(Memory(block)) == FileSystem(kind, label, uuid)


def test_within_a_partition_and_not_beyond_it(tmp_path: Path) -> None:
    path = sparse(tmp_path / "fs", 4 * MIB)
    run("mke2fs", "-q", "-t", "ext4", "-L", "inner", path)
    disk = Regions()
    disk.add_hole(3 * MIB)
    disk.add_range(FileSource(path), 0, 4 * MIB)
    found = probe(disk, 3 * MIB, 4 * MIB)
    assert found is not None and found.label == "inner"
    assert probe(disk, 3 * MIB, 1024) is None
    assert probe(disk) is None


@pytest.mark.parametrize("size", [0, 1, 511, 4096, 70000])
def test_nothing_is_found_where_nothing_is(size: int) -> None:
    assert probe(Memory(bytes(size))) is None
    assert probe(Memory(data("noise", size))) is None


def test_hostile_pointers_are_bounded() -> None:
    """Boot sectors whose pointers lead nowhere: recognised or not, but never an error."""
    for magic in (b"NTFS    ", b"EXFAT   ", b"MSDOS5.0"):
        for filler in (0xFF, 0x80, 0x01):
            sector = bytearray([filler]) * 512
            sector[3:11] = magic
            sector[11:14] = b"\0\2\x08"
            sector[510:512] = b"\x55\xaa"
            probe(Memory(bytes(sector) + bytes(100_000)))
