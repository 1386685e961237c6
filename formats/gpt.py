"""Partition tables: MBR with logical partitions, and GPT, read from any Disk and built as byte strings.

`read_table` tells what a disk has; `build_gpt` and `build_mbr` return the bytes for a new disk's start and end. Sizes
and positions are in bytes everywhere.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from diskmorph.formats.errors import FormatError, TargetError
from diskmorph.formats.gpt_types import GPT_TYPES, MBR_TYPES

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator, Sequence

    from diskmorph.formats.disk import Disk

SECTOR_SIZES = (512, 4096)
_MOST_ENTRIES = 16_384 * 128  # bytes of a GPT's entries: 16,384 partitions, far above what any system takes
_MOST_LOGICAL = 256
_ENTRIES = 128
_ENTRY_SIZE = 128


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition. `number` counts from 1; of logical partitions from 5.

    `type` is a GUID in capitals, or of an MBR `0x83`; `uuid` is the partition's GUID, or of an MBR DISKID-NUMBER as
    Linux names it. `start` and `length` are bytes. `attributes` are GPT's own bits.
    """

    number: int
    type: str
    name: str
    start: int
    length: int
    uuid: str
    bootable: bool = False
    attributes: int = 0

    @property
    def type_name(self) -> str:
        """The type in words, the type itself where it is not known."""
        if self.type.startswith("0x"):
            return MBR_TYPES.get(int(self.type, 16), self.type)
        return GPT_TYPES.get(self.type, self.type)

    @property
    def stop(self) -> int:
        """The first byte behind the partition."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """What a disk's partition table says. `scheme` is "gpt" or "mbr"; `disk_id` the disk's GUID, or 8 hex digits."""

    scheme: str
    disk_id: str
    sector_size: int
    partitions: tuple[Partition, ...]
    warnings: tuple[str, ...] = ()


class Hybrid(NamedTuple):
    """A GPT partition that stands in the MBR too: its number, MBR type, and whether it is active there."""

    number: int
    type: int
    active: bool = False


@dataclass(slots=True)
class _Reader:
    """One disk being read, and what was found odd on the way."""

    disk: Disk
    warnings: list[str] = field(default_factory=list)

    def upto(self, offset: int, length: int) -> bytes:
        """Read `length` bytes, or fewer at the disk's end."""
        if offset >= self.disk.size:
            return b""
        return self.disk.read(offset, min(length, self.disk.size - offset))

    def error(self, problem: str, structure: str, offset: int, **values: Any) -> FormatError:
        return FormatError(problem, file=self.disk.name, structure=structure, offset=offset, **values)


def read_partitions(disk: Disk) -> list[Partition]:
    """Return the partitions of a disk, none where it has no partition table. Raises FormatError as `read_table`."""
    table = read_table(disk)
    return list(table.partitions) if table is not None else []


def read_table(disk: Disk) -> PartitionTable | None:
    """Return the partition table of a disk, None where it has none.

    A GPT counts where the MBR is protective, or missing; its backup is used when the primary is damaged. Raises
    FormatError where a GPT is announced and no copy of it is whole, or logical partitions loop.
    """
    reader = _Reader(disk)
    first = reader.upto(0, 512)
    marked = first[510:512] == b"\x55\xaa"
    entries = [first[446 + 16 * i : 462 + 16 * i] for i in range(4)] if marked else []
    types = {entry[4] for entry in entries}
    if 0xEE in types or (not any(types) and _has_header(reader)):
        return _read_gpt(reader, protected=0xEE in types)
    if not marked or not _plausible(first, entries):
        return None
    if _has_header(reader):
        reader.warnings.append("a GPT header stands beside an MBR that does not protect it; the MBR counts")
    return _read_mbr(reader, first)


def _has_header(reader: _Reader) -> bool:
    return any(reader.upto(sector, 8) == b"EFI PART" for sector in SECTOR_SIZES)


def _plausible(first: bytes, entries: list[bytes]) -> bool:
    """Whether a marked first sector is an MBR: boot sectors of file systems carry the same mark."""
    if first[3:11] in {b"NTFS    ", b"EXFAT   ", b"-FVE-FS-"} or first[54:57] == b"FAT" or first[82:85] == b"FAT":
        return False
    used = [entry for entry in entries if entry[4]]
    return bool(used) and all(entry[0] in {0, 0x80} for entry in entries) and all(any(e[12:16]) for e in used)


# --- MBR


def _read_mbr(reader: _Reader, first: bytes) -> PartitionTable:
    from diskmorph.formats.gpt_schema import EXTENDED, MBR  # noqa: PLC0415 - disks without a table need no Construct

    mbr = MBR.parse(first)
    disk_id = f"{mbr.disk_id:08x}"
    sector = reader.disk.sector_size
    found: list[Partition] = []
    extended: list[tuple[int, int]] = []
    for number, entry in enumerate(mbr.entries, 1):
        if not entry.type:
            continue
        found.append(_mbr_partition(number, entry, entry.start * sector, sector, disk_id))
        if entry.type in EXTENDED:
            extended.append((entry.start * sector, entry.count * sector))
    for start, length in extended:
        found.extend(_logical(reader, start, length, 5 + sum(p.number > 4 for p in found), disk_id))
    return PartitionTable("mbr", disk_id, sector, tuple(_within(reader, found)), tuple(reader.warnings))


def _mbr_partition(number: int, entry: Any, start: int, sector: int, disk_id: str) -> Partition:
    kind = f"0x{entry.type:02x}"
    active = entry.status == 0x80
    return Partition(number, kind, "", start, entry.count * sector, f"{disk_id}-{number:02x}", active)


def _logical(reader: _Reader, start: int, length: int, number: int, disk_id: str) -> Iterator[Partition]:
    """Yield the logical partitions of an extended one: each has a boot record with itself and a link to the next."""
    from diskmorph.formats.gpt_schema import EXTENDED, MBR  # noqa: PLC0415

    sector = reader.disk.sector_size
    at = start
    seen: set[int] = set()
    while True:
        if at in seen or len(seen) >= _MOST_LOGICAL:
            raise reader.error("the chain of logical partitions does not end", "extended boot record", at)
        seen.add(at)
        record = reader.upto(at, 512)
        if record[510:512] != b"\x55\xaa":
            reader.warnings.append(f"an extended boot record is missing at {at}: logical partitions may be lost")
            return
        own, link = MBR.parse(record).entries[:2]
        if own.type and own.count and own.type not in EXTENDED:
            yield _mbr_partition(number, own, at + own.start * sector, sector, disk_id)
            number += 1
        if link.type not in EXTENDED or not link.start:
            return
        at = start + link.start * sector
        if not start <= at < start + length:
            raise reader.error("a logical partition lies outside the extended one", "extended boot record", at)


def _within(reader: _Reader, partitions: Sequence[Partition]) -> Sequence[Partition]:
    for partition in partitions:
        if partition.stop > reader.disk.size:
            reader.warnings.append(
                f"partition {partition.number} ends at {partition.stop}, beyond the disk's end at {reader.disk.size}"
            )
    return partitions


# --- GPT


def _read_gpt(reader: _Reader, *, protected: bool) -> PartitionTable:
    if not protected:
        reader.warnings.append("the GPT has no protective MBR")
    failures: list[FormatError] = []
    own = reader.disk.sector_size
    for sector in (own, *(size for size in SECTOR_SIZES if size != own)):
        last = (reader.disk.size // sector - 1) * sector
        for offset, which in ((sector, "primary"), (last, "backup")):
            try:
                header = _gpt_header(reader, offset, sector)
                partitions = _gpt_entries(reader, header, sector)
            except FormatError as error:
                failures.append(error)
                continue
            if which == "backup":
                reader.warnings.append("the primary GPT is damaged; its backup at the disk's end was read")
            elif header.alternate_lba * sector != last:
                reader.warnings.append("the backup GPT is not at the disk's end: the disk was made larger or smaller")
            disk_id = _guid(header.disk_guid)
            return PartitionTable("gpt", disk_id, sector, tuple(_within(reader, partitions)), tuple(reader.warnings))
    raise next((f for f in failures if f.field != "signature"), failures[0])


def _gpt_header(reader: _Reader, offset: int, sector: int) -> Any:
    from diskmorph.formats.gpt_schema import GPT_HEADER  # noqa: PLC0415

    data = reader.upto(offset, sector) if offset > 0 else b""
    if data[:8] != b"EFI PART" or len(data) < GPT_HEADER.sizeof():
        raise reader.error("there is no GPT header", "GPT header", max(offset, 0), field="signature")
    header = GPT_HEADER.parse(data)
    size = header.header_size
    if not GPT_HEADER.sizeof() <= size <= len(data):
        raise reader.error("the GPT header is damaged", "GPT header", offset + 12, field="header_size", found=size)
    crc = binascii.crc32(data[:16] + bytes(4) + data[20:size])
    if crc != header.header_crc:
        raise reader.error(
            "the GPT header is damaged",
            "GPT header",
            offset + 16,
            field="header_crc",
            expected=f"{crc:08x}",
            found=f"{header.header_crc:08x}",
        )
    if header.my_lba * sector != offset:
        raise reader.error(
            "the GPT header is not where it says",
            "GPT header",
            offset + 24,
            field="my_lba",
            expected=offset // sector,
            found=header.my_lba,
        )
    return header


def _gpt_entries(reader: _Reader, header: Any, sector: int) -> list[Partition]:
    size = header.entry_size
    total = header.entry_count * size
    offset = header.entries_lba * sector
    if size < _ENTRY_SIZE or size & (size - 1) or total > _MOST_ENTRIES or offset + total > reader.disk.size:
        raise reader.error(
            "the GPT's entries cannot be where the header says",
            "GPT header",
            header.my_lba * sector + 80,
            field="entry_count",
            found=f"{header.entry_count} entries of {size} bytes at {offset}",
        )
    data = reader.disk.read(offset, total)
    crc = binascii.crc32(data)
    if crc != header.entries_crc:
        raise reader.error(
            "the GPT's entries are damaged",
            "GPT entries",
            offset,
            field="entries_crc",
            expected=f"{header.entries_crc:08x}",
            found=f"{crc:08x}",
        )
    return [_gpt_partition(number, entry, sector) for number, entry in _used(data, size)]


def _used(data: bytes, size: int) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of the entries that are in use."""
    import numpy as np  # noqa: PLC0415

    from diskmorph.formats.gpt_schema import GPT_ENTRY_DTYPE  # noqa: PLC0415

    table = np.frombuffer(data, np.uint8).reshape(-1, size)
    used = np.flatnonzero(table[:, :16].any(axis=1))
    rows = np.ascontiguousarray(table[used, :_ENTRY_SIZE]).view(GPT_ENTRY_DTYPE)[:, 0]
    return zip((used + 1).tolist(), rows, strict=True)


def _gpt_partition(number: int, entry: Any, sector: int) -> Partition:
    first, last = int(entry["first"]), int(entry["last"])
    attributes = int(entry["attributes"])
    name = entry["name"].tobytes().decode("utf-16-le", "replace").partition("\0")[0]
    return Partition(
        number,
        _guid(entry["type"].tobytes()),
        name,
        first * sector,
        max(last + 1 - first, 0) * sector,
        _guid(entry["guid"].tobytes()),
        bool(attributes & 4),
        attributes,
    )


def _guid(data: bytes) -> str:
    """Return a mixed-endian GUID as text; by hand, since to load `uuid` takes longer than to read a disk's table."""
    parts = (data[3::-1], data[5:3:-1], data[7:5:-1], data[8:10], data[10:16])
    return "-".join(part.hex() for part in parts).upper()


def _guid_bytes(text: str) -> bytes:
    import uuid  # noqa: PLC0415 - builders only

    return uuid.UUID(text).bytes_le


# --- writing


def first_usable(sector_size: int = 512) -> int:
    """Return the first byte that a partition may have on a GPT disk."""
    return 2 * sector_size + _ENTRIES * _ENTRY_SIZE


def last_usable(size: int, sector_size: int = 512) -> int:
    """Return the first byte, from the end of a GPT disk of `size` bytes, that no partition may have."""
    return size // sector_size * sector_size - sector_size - _ENTRIES * _ENTRY_SIZE


def build_gpt(
    size: int,
    partitions: Sequence[Partition],
    *,
    disk_guid: uuid.UUID | str,
    sector_size: int = 512,
    mbr_code: bytes = b"",
    hybrid: Sequence[Hybrid] = (),
) -> tuple[bytes, bytes]:
    """Return (head, tail) of a GPT disk of `size` bytes: MBR, header and entries; backup entries and header.

    The head goes to byte 0, the tail ends at `size` rounded down to a sector. Partitions lie at their own `number`;
    `bootable` sets the legacy BIOS bit. `mbr_code` is at most 440 bytes of boot code, or 446 with a disk signature;
    `hybrid` names up to three partitions that stand in the MBR too, before the protective entry. Raises TargetError
    where a partition is not aligned, lies outside the usable sectors or overlaps another.
    """
    from diskmorph.formats.gpt_schema import GPT_HEADER  # noqa: PLC0415

    sectors = size // sector_size
    _require_fit(partitions, first_usable(sector_size), last_usable(size, sector_size), sector_size)
    entries = _build_entries(partitions, sector_size)
    guid = _guid_bytes(str(disk_guid))
    table_sectors = len(entries) // sector_size

    def header(my_lba: int, alternate: int, entries_lba: int) -> bytes:
        values = {
            "my_lba": my_lba,
            "alternate_lba": alternate,
            "first_usable": first_usable(sector_size) // sector_size,
            "last_usable": last_usable(size, sector_size) // sector_size - 1,
            "disk_guid": guid,
            "entries_lba": entries_lba,
            "entries_crc": binascii.crc32(entries),
        }
        crc = binascii.crc32(GPT_HEADER.build(values))
        return _padded(GPT_HEADER.build({**values, "header_crc": crc}), sector_size)

    last = sectors - 1
    mbr = _protective_mbr(sectors, partitions, sector_size, mbr_code, hybrid)
    head = _padded(mbr, sector_size) + header(1, last, 2) + entries
    return head, entries + header(last, 1, last - table_sectors)


def build_mbr(
    partitions: Sequence[Partition], *, disk_id: int = 0, mbr_code: bytes = b"", sector_size: int = 512
) -> bytes:
    """Return the 512 bytes of an MBR with up to four primary partitions, `type` being such as `0x83`.

    Raises TargetError where a partition is not aligned, overlaps another or lies beyond 2^32 sectors.
    """
    if any(not 1 <= partition.number <= 4 for partition in partitions):
        raise TargetError("an MBR holds four partitions")
    _require_fit(partitions, sector_size, sector_size << 32, sector_size)
    entries: list[dict[str, int]] = [{}, {}, {}, {}]
    for partition in partitions:
        entries[partition.number - 1] = _mbr_entry(partition, int(partition.type, 16), sector_size, partition.bootable)
    return _mbr_bytes(entries, mbr_code, disk_id)


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(-len(data) % size)


def _require_fit(partitions: Sequence[Partition], first: int, stop: int, sector_size: int) -> None:
    before: Partition | None = None
    for partition in sorted(partitions, key=lambda p: p.start):
        if partition.start % sector_size or partition.length % sector_size or partition.length <= 0:
            raise TargetError(
                f"partition {partition.number} does not begin and end on a sector",
                expected=f"multiples of {sector_size}",
                found=f"{partition.start} and {partition.length} bytes",
            )
        if partition.start < first or partition.stop > stop:
            raise TargetError(
                f"partition {partition.number} does not fit on the disk",
                expected=f"bytes {first} to {stop}",
                found=f"{partition.start} to {partition.stop}",
            )
        if before is not None and partition.start < before.stop:
            raise TargetError(f"partitions {before.number} and {partition.number} overlap")
        before = partition


def _build_entries(partitions: Sequence[Partition], sector_size: int) -> bytes:
    from diskmorph.formats.gpt_schema import GPT_ENTRY, LEGACY_BOOTABLE  # noqa: PLC0415

    table = bytearray(_ENTRIES * _ENTRY_SIZE)
    for partition in partitions:
        if not 1 <= partition.number <= _ENTRIES:
            raise TargetError(f"partition number {partition.number} is out of range", expected=f"1 to {_ENTRIES}")
        name = partition.name.encode("utf-16-le")
        if len(name) > 72:
            raise TargetError(f"the name of partition {partition.number} is too long", expected="36 UTF-16 units")
        at = (partition.number - 1) * _ENTRY_SIZE
        table[at : at + _ENTRY_SIZE] = GPT_ENTRY.build(
            {
                "type": _guid_bytes(partition.type),
                "guid": _guid_bytes(partition.uuid),
                "first": partition.start // sector_size,
                "last": partition.stop // sector_size - 1,
                "attributes": partition.attributes | (LEGACY_BOOTABLE if partition.bootable else 0),
                "name": name.ljust(72, b"\0"),
            }
        )
    return bytes(table)


def _protective_mbr(
    sectors: int, partitions: Sequence[Partition], sector_size: int, code: bytes, hybrid: Sequence[Hybrid]
) -> bytes:
    from diskmorph.formats.gpt_schema import PROTECTIVE  # noqa: PLC0415

    if len(hybrid) > 3:
        raise TargetError("a hybrid MBR holds three partitions beside the protective entry")
    by_number = {partition.number: partition for partition in partitions}
    chosen = [by_number.get(entry.number) for entry in hybrid]
    entries: list[dict[str, int]] = []
    for entry, partition in zip(hybrid, chosen, strict=True):
        if partition is None:
            raise TargetError(f"there is no partition {entry.number} for the hybrid MBR")
        entries.append(_mbr_entry(partition, entry.type, sector_size, entry.active))
    # UEFI 2.10, 5.2.3: from LBA 1 to the disk's end, or as far as 32 bits reach; hybrid: up to the first partition.
    stop = min([sectors, *(partition.start // sector_size for partition in chosen if partition is not None)])
    entries.append({"type": PROTECTIVE, "start": 1, "count": min(stop - 1, 0xFFFFFFFF)})
    return _mbr_bytes([*entries, {}, {}, {}][:4], code, None)


def _mbr_entry(partition: Partition, kind: int, sector_size: int, active: bool) -> dict[str, int]:
    count = partition.length // sector_size
    if partition.stop // sector_size > 0xFFFFFFFF:
        raise TargetError(f"partition {partition.number} lies beyond what an MBR can say")
    return {"status": 0x80 if active else 0, "type": kind, "start": partition.start // sector_size, "count": count}


def _mbr_bytes(entries: Sequence[dict[str, int]], code: bytes, disk_id: int | None) -> bytes:
    from diskmorph.formats.gpt_schema import MBR  # noqa: PLC0415

    if len(code) > 440 and len(code) != 446:
        raise TargetError("the boot code does not fit into the MBR", expected="440 bytes, or 446", found=len(code))
    blank = {"first_chs": bytes(3), "last_chs": bytes(3)}
    sector = MBR.build({"entries": [entry or blank for entry in entries], "disk_id": disk_id or 0})
    return code + sector[len(code) :]
