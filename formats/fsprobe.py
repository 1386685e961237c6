"""Which file system, or other content, a disk or partition holds: type, label and UUID, by content alone.

Only fixed places are read, and whatever they say is bounded: a probe never follows more than one pointer. Names of
types are those that users type: ext4, xfs, btrfs, fat32, ntfs, lvm2, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.disk import Disk

_HEAD = 4096


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What was recognised. `label` and `uuid` are None where the type has none or it is empty."""

    type: str
    label: str | None = None
    uuid: str | None = None


class _View:
    """A range of a disk, read piece by piece; beyond its end there are no bytes."""

    def __init__(self, disk: Disk, start: int, length: int) -> None:
        self._disk = disk
        self._start = start
        self.size = max(0, min(length, disk.size - start))
        self._head = self._read(0, _HEAD)

    def _read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        return self._disk.read(self._start + offset, length) if length else b""

    def at(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes."""
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        return self._read(offset, length)

    def number(self, offset: int, length: int, order: str = "little") -> int:
        """Return an unsigned number; 0 beyond the end."""
        return int.from_bytes(self.at(offset, length), "big" if order == "big" else "little")


def probe(disk: Disk, start: int = 0, length: int | None = None) -> FileSystem | None:
    """Return what the `length` bytes of a disk from `start` hold, None where nothing is recognised.

    Raises what reading the disk raises.
    """
    view = _View(disk, start, disk.size - start if length is None else length)
    return next((found for each in _PROBES if (found := each(view)) is not None), None)


# --- pieces


def _text(data: bytes, encoding: str = "utf-8") -> str | None:
    """Return a padded label; None where it is empty."""
    text = data.decode(encoding, "replace").partition("\0")[0].strip()
    return text or None


def _uuid(data: bytes) -> str | None:
    """Return 16 bytes as a UUID; None where they are zero."""
    if len(data) < 16 or not any(data):
        return None
    word = data.hex()
    return "-".join((word[:8], word[8:12], word[12:16], word[16:20], word[20:]))


def _serial(number: int) -> str | None:
    """Return a FAT volume's serial number as `1234-ABCD`."""
    return f"{number >> 16:04X}-{number & 0xFFFF:04X}" if number else None


def _magic(
    kind: str,
    offset: int,
    magic: bytes,
    *,
    uuid: int | None = None,
    label: tuple[int, int] | None = None,
) -> Callable[[_View], FileSystem | None]:
    """Return a probe for `magic` at `offset`, with the places of a UUID and of (label, its length)."""

    def probe_magic(view: _View) -> FileSystem | None:
        if view.at(offset, len(magic)) != magic:
            return None
        return FileSystem(
            kind,
            None if label is None else _text(view.at(*label)),
            None if uuid is None else _uuid(view.at(uuid, 16)),
        )

    return probe_magic


# --- Linux


# linux/fs/ext4/ext4.h: superblock at 1024; features that ext3 does not know make it ext4, a journal makes it ext3.
_EXT3_INCOMPAT = 0x0002 | 0x0004 | 0x0010  # filetype, recover, meta_bg
_EXT3_RO_COMPAT = 0x0001 | 0x0002 | 0x0004  # sparse_super, large_file, btree_dir
_EXT_JOURNAL, _EXT_JOURNAL_DEVICE = 0x0004, 0x0008


def _ext(view: _View) -> FileSystem | None:
    if view.at(1024 + 56, 2) != b"\x53\xef":
        return None
    compat, incompat, ro_compat = (view.number(1024 + at, 4) for at in (92, 96, 100))
    if incompat & _EXT_JOURNAL_DEVICE:
        kind = "jbd"
    elif incompat & ~_EXT3_INCOMPAT or ro_compat & ~_EXT3_RO_COMPAT:
        kind = "ext4"
    else:
        kind = "ext3" if compat & _EXT_JOURNAL else "ext2"
    return FileSystem(kind, _text(view.at(1024 + 120, 16)), _uuid(view.at(1024 + 104, 16)))


def _swap(view: _View) -> FileSystem | None:
    """mm/swapfile.c: the signature ends the first page, whose size the architecture chose."""
    for page in (4096, 16384, 65536):
        if view.at(page - 10, 10) in {b"SWAPSPACE2", b"SWAP-SPACE"}:
            return FileSystem("swap", _text(view.at(1024 + 28, 16)), _uuid(view.at(1024 + 12, 16)))
    return None


def _lvm2(view: _View) -> FileSystem | None:
    """lib/format_text/layout.h: a label in one of the first four sectors; the UUID, 32 characters, follows it."""
    for sector in range(4):
        label = view.at(sector * 512, 64)
        if label[:8] != b"LABELONE" or label[24:32] != b"LVM2 001":
            continue
        word = label[32:64].decode("ascii", "replace")
        cuts = (0, 6, 10, 14, 18, 22, 26, 32)
        return FileSystem("lvm2", uuid="-".join(word[a:b] for a, b in pairwise(cuts)))
    return None


def _luks(view: _View) -> FileSystem | None:
    """LUKS On-Disk Format 1.2.3 and LUKS2 1.1.3: version at 6, UUID text at 168; version 2 has a label at 24."""
    if view.at(0, 6) != b"LUKS\xba\xbe":
        return None
    label = _text(view.at(24, 48)) if view.number(6, 2, "big") == 2 else None
    return FileSystem("luks", label, _text(view.at(168, 40)))


def _mdraid(view: _View) -> FileSystem | None:
    """drivers/md/md.c: version 1.2 at 4096, 1.1 at 0, 1.0 and 0.90 near the end."""
    places = (4096, 0, (view.size // 512 - 16) // 8 * 8 * 512, (view.size // 65536 - 1) * 65536)
    for place in places:
        if place < 0 or view.at(place, 4) != b"\xfc\x4e\x2b\xa9":
            continue
        if view.number(place + 4, 4) != 1:
            return FileSystem("mdraid")
        return FileSystem("mdraid", _text(view.at(place + 32, 32)), _uuid(view.at(place + 16, 16)))
    return None


def _zfs(view: _View) -> FileSystem | None:
    """OpenZFS vdev label: uberblocks fill the second 128 KiB of a label; their magic has either byte order."""
    if view.size < 256 << 10:
        return None
    blocks = view.at(128 << 10, 128 << 10)
    marks = {blocks[at : at + 8] for at in range(0, len(blocks), 1024)}
    magic = (0x00BAB10C).to_bytes(8, "little")
    return FileSystem("zfs") if marks & {magic, magic[::-1]} else None


# --- Microsoft


def _bitlocker(view: _View) -> FileSystem | None:
    return FileSystem("bitlocker") if view.at(3, 8) == b"-FVE-FS-" else None


def _boot_sector(view: _View) -> tuple[int, int] | None:
    """Return (bytes per sector, sectors per cluster) of a BIOS parameter block that can be one."""
    sector, cluster = view.number(11, 2), view.number(13, 1)
    if view.at(510, 2) != b"\x55\xaa" or sector not in {512, 1024, 2048, 4096}:
        return None
    return (sector, cluster) if cluster and not cluster & (cluster - 1) else None


def _fat(view: _View) -> FileSystem | None:
    """Microsoft FAT specification 1.03, 3.1 to 3.5: the type follows from the number of clusters."""
    shape = _boot_sector(view)
    reserved, fats, roots = view.number(14, 2), view.number(16, 1), view.number(17, 2)
    if shape is None or not reserved or fats not in {1, 2} or view.at(3, 8) in {b"NTFS    ", b"EXFAT   "}:
        return None
    sector, cluster = shape
    per_fat = view.number(22, 2) or view.number(36, 4)
    total = view.number(19, 2) or view.number(32, 4)
    root_sectors = -(-roots * 32 // sector)
    data = reserved + fats * per_fat + root_sectors
    if not per_fat or total <= data or view.number(21, 1) < 0xF0:
        return None
    clusters = (total - data) // cluster
    kind = "fat32" if not view.number(22, 2) else "fat12" if clusters < 4085 else "fat16"
    boot = 67 if kind == "fat32" else 39  # serial number, then the label
    if kind == "fat32":
        place, length = (data + (view.number(44, 4) - 2) * cluster) * sector, cluster * sector
    else:
        place, length = (reserved + fats * per_fat) * sector, roots * 32
    label = _fat_label(view.at(place, min(length, 1 << 16))) if place > 0 else None
    recorded = _text(view.at(boot + 4, 11), "cp437")
    label = label or (None if recorded == "NO NAME" else recorded)
    return FileSystem(kind, label, _serial(view.number(boot, 4)))


def _fat_label(directory: bytes) -> str | None:
    """Return the volume label among the root directory's entries: attribute 8, not part of a long name."""
    for at in range(0, len(directory) - 31, 32):
        entry = directory[at : at + 32]
        if not entry[0]:
            return None
        if entry[0] != 0xE5 and entry[11] & 0x3F in {0x08, 0x28}:
            return _text(entry[:11], "cp437")
    return None


def _exfat(view: _View) -> FileSystem | None:
    """Microsoft exFAT specification, 3.1 and 7.3: the label is entry 0x83 of the root directory."""
    if view.at(3, 8) != b"EXFAT   ":
        return None
    sector, cluster = view.number(108, 1), view.number(109, 1)
    label = None
    if 9 <= sector <= 12 and sector + cluster <= 25:
        place = (view.number(88, 4) << sector) + (max(view.number(96, 4) - 2, 0) << (sector + cluster))
        directory = view.at(place, min(1 << (sector + cluster), 1 << 16))
        entries = (directory[at : at + 32] for at in range(0, len(directory) - 31, 32))
        named = next((entry for entry in entries if entry[0] == 0x83), None)
        label = None if named is None else _text(named[2 : 2 + 2 * min(named[1], 11)], "utf-16-le")
    return FileSystem("exfat", label, _serial(view.number(100, 4)))


def _ntfs(view: _View) -> FileSystem | None:
    """NTFS: serial number at 72; the label is the $VOLUME_NAME attribute of record 3 ($Volume) of the MFT."""
    shape = _boot_sector(view)
    if view.at(3, 8) != b"NTFS    " or shape is None:
        return None
    sector, cluster = shape
    record_code = view.number(64, 1)
    record = 1 << (256 - record_code) if record_code > 127 else record_code * cluster * sector
    place = view.number(48, 8) * cluster * sector + 3 * record
    label = _ntfs_label(view.at(place, record)) if 512 <= record <= 65536 else None
    return FileSystem("ntfs", label, f"{view.number(72, 8):016X}")


def _ntfs_label(record: bytes) -> str | None:
    if record[:4] != b"FILE":
        return None
    at = int.from_bytes(record[20:22], "little")
    while at + 24 <= len(record):
        kind, length = (int.from_bytes(record[at + i : at + i + 4], "little") for i in (0, 4))
        if kind == 0xFFFFFFFF or length < 24:
            return None
        if kind == 0x60 and not record[at + 8]:
            size = int.from_bytes(record[at + 16 : at + 20], "little")
            start = at + int.from_bytes(record[at + 20 : at + 22], "little")
            return _text(record[start : start + size], "utf-16-le")
        at += length
    return None


# --- optical


def _iso9660(view: _View) -> FileSystem | None:
    """ECMA-119, 8.4: volume identifier at 40; blkid's UUID is the modification time, else the creation time."""
    at = 32768
    if view.at(at + 1, 5) != b"CD001" or view.at(at, 1) != b"\1":
        return None
    times = [view.at(at + place, 16).decode("ascii", "replace") for place in (830, 813)]
    when = next((word for word in times if word.isdigit() and int(word)), None)
    cuts = (0, 4, 6, 8, 10, 12, 14, 16)
    uuid = None if when is None else "-".join(when[a:b] for a, b in pairwise(cuts))
    return FileSystem("iso9660", _text(view.at(at + 40, 32)), uuid)


def _udf(view: _View) -> FileSystem | None:
    """ECMA-167 2/8.3.1: NSR02 or NSR03 in the volume recognition sequence; the label is the logical volume's."""
    for sector in range(16, 32):
        name = view.at(sector * 2048 + 1, 5)
        if name in {b"NSR02", b"NSR03"}:
            return FileSystem("udf", _udf_label(view))
        if name not in {b"BEA01", b"BOOT2", b"CD001", b"CDW02", b"TEA01"}:
            return None
    return None


def _udf_label(view: _View) -> str | None:
    """Follow the anchor (sector 256; ECMA-167 3/10.2) to the logical volume descriptor (3/10.6)."""
    for block in (2048, 512, 4096):
        anchor = view.at(256 * block, 32)
        if anchor[:2] != b"\2\0" or int.from_bytes(anchor[12:16], "little") != 256:
            continue
        length, first = (int.from_bytes(anchor[at : at + 4], "little") for at in (16, 20))
        for number in range(min(length // block, 64)):
            tag = view.at((first + number) * block, 212)
            if tag[:2] == b"\6\0":
                return _dstring(tag[84:212])
    return None


def _dstring(field: bytes) -> str | None:
    """Return an OSTA compressed string: its first byte is 8 or 16, its last the length used."""
    used = field[1 : field[-1]] if field else b""
    return _text(used, "utf-16-be" if field[:1] == b"\x10" else "latin-1")


def _btrfs(view: _View) -> FileSystem | None:
    at = 65536
    if view.at(at + 64, 8) != b"_BHRfS_M":
        return None
    return FileSystem("btrfs", _text(view.at(at + 299, 256)), _uuid(view.at(at + 32, 16)))


# Whole-device containers come before file systems, so that a stale superblock behind them does not count.
_PROBES: tuple[Callable[[_View], FileSystem | None], ...] = (
    _luks,
    _bitlocker,
    _lvm2,
    _mdraid,
    _magic("xfs", 0, b"XFSB", uuid=32, label=(108, 12)),
    _ext,
    _btrfs,
    _exfat,
    _ntfs,
    _magic("refs", 3, b"ReFS\0\0\0\0"),
    _fat,
    _magic("squashfs", 0, b"hsqs"),
    _magic("erofs", 1024, b"\xe2\xe1\xf5\xe0", uuid=1024 + 48, label=(1024 + 64, 16)),
    _magic("f2fs", 1024, b"\x10\x20\xf5\xf2", uuid=1024 + 108),
    _magic("apfs", 32, b"NXSB", uuid=72),
    _magic("hfsplus", 1024, b"H+\0\4"),
    _magic("hfsplus", 1024, b"HX\0\5"),
    _swap,
    _udf,
    _iso9660,
    _zfs,
)
