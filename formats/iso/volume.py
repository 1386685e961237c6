"""What stands in front of an ISO's directories: volume descriptors, the root records, the El Torito boot catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from construct import ConstructError

from diskmorph.formats.errors import FormatError
from diskmorph.formats.iso.schema import (
    BOOT_RECORD,
    FIRST_DESCRIPTOR,
    JOLIET_ESCAPES,
    LAST_DESCRIPTOR,
    PLATFORMS,
    PRIMARY,
    SECTOR,
    SUPPLEMENTARY,
    TERMINATOR,
    BootEntry,
    BootRecord,
    DirectoryRecord,
    SectionHeader,
    ValidationEntry,
    VolumeDescriptor,
)

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource


@dataclass(frozen=True, slots=True)
class Root:
    """The root directory of one hierarchy: where it lies, in bytes, and the seconds since 1970 of its record."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class BootImage:
    """An entry of the boot catalogue: platform, where the image begins (bytes), sectors of 512 bytes to load."""

    platform: str
    offset: int
    load_sectors: int
    bootable: bool
    media: int


@dataclass(frozen=True, slots=True)
class Volume:
    """The descriptors of an ISO. `udf`: a UDF volume lies on the same blocks. Sizes in bytes."""

    label: str
    size: int
    block_size: int
    root: Root
    joliet: Root | None
    udf: bool
    boot: tuple[BootImage, ...]
    system: str
    publisher: str
    application: str
    created: str


def _text(raw: bytes) -> str:
    return raw.decode("ascii", "replace").rstrip(" \0")


def _root(descriptor: Any, source: ByteSource, at: int) -> Root:
    try:
        record = DirectoryRecord.parse(descriptor.root)
    except ConstructError as error:
        raise FormatError(
            "the root directory's record is damaged",
            file=source.name,
            format="iso",
            structure="volume descriptor",
            field="root",
            offset=at + 156,
        ) from error
    root = Root(record.extent * SECTOR, record.size)
    if record.size == 0 or root.offset + root.size > source.size:
        raise FormatError(
            "the root directory lies beyond the end of the file",
            file=source.name,
            format="iso",
            structure="volume descriptor",
            field="root",
            offset=at + 156,
            expected=f"{root.size} bytes at {root.offset}",
            found=f"the end at {source.size}",
        )
    return root


def read_volume(source: ByteSource) -> Volume:
    """Read the volume descriptors (ECMA-119 8). Raises FormatError."""
    primary: Any = None
    joliet: Root | None = None
    root: Root | None = None
    boot: tuple[BootImage, ...] = ()
    at = FIRST_DESCRIPTOR * SECTOR
    for at in range(FIRST_DESCRIPTOR * SECTOR, LAST_DESCRIPTOR * SECTOR, SECTOR):
        raw = source.read(at, SECTOR)
        if raw[1:6] != b"CD001":
            break
        if raw[0] == TERMINATOR:
            break
        if raw[0] == PRIMARY and primary is None:
            primary = _descriptor(raw, source, at)
            root = _root(primary, source, at)
        elif raw[0] == SUPPLEMENTARY and raw[88:91] in JOLIET_ESCAPES:
            joliet = _root(_descriptor(raw, source, at), source, at)
        elif raw[0] == BOOT_RECORD and raw[7:30] == b"EL TORITO SPECIFICATION":
            boot = read_catalog(source, BootRecord.parse(raw).catalog * SECTOR)
    if primary is None or root is None:
        raise FormatError(
            "has no primary volume descriptor", file=source.name, format="iso", structure="volume descriptor", offset=at
        )
    digits = primary.created.digits.decode("ascii", "replace")
    return Volume(
        label=_text(primary.volume_id),
        size=primary.blocks * primary.block_size,
        block_size=primary.block_size,
        root=root,
        joliet=joliet,
        udf=_has_udf(source, at),
        boot=boot,
        system=_text(primary.system_id),
        publisher=_text(primary.publisher_id),
        application=_text(primary.application_id),
        created=f"{digits[:4]}-{digits[4:6]}-{digits[6:8]}T{digits[8:10]}:{digits[10:12]}:{digits[12:14]}"
        if digits[:4].isdigit()
        else "",
    )


def _descriptor(raw: bytes, source: ByteSource, at: int) -> Any:
    try:
        found = VolumeDescriptor.parse(raw)
    except ConstructError as error:
        raise FormatError(
            "a volume descriptor is damaged", file=source.name, format="iso", structure="volume descriptor", offset=at
        ) from error
    if found.block_size != SECTOR:
        raise FormatError(
            "logical blocks of another size than 2048 bytes are not supported",
            file=source.name,
            format="iso",
            structure="volume descriptor",
            field="block_size",
            offset=at + 128,
            expected=SECTOR,
            found=found.block_size,
        )
    return found


def _has_udf(source: ByteSource, at: int) -> bool:
    """Whether a volume recognition sequence with NSR follows the ISO descriptors (ECMA-167 2/8.3)."""
    for offset in range(at, at + 64 * SECTOR, SECTOR):
        word = source.read_upto(offset + 1, 5)
        if word in {b"NSR02", b"NSR03"}:
            return True
        if word not in {b"CD001", b"BEA01", b"BOOT2", b"CDW02"}:
            return False
    return False


def read_catalog(source: ByteSource, at: int) -> tuple[BootImage, ...]:
    """Return the entries of the boot catalogue at byte `at` (El Torito 2). Raises FormatError."""
    raw = source.read(at, SECTOR)
    try:
        validation = ValidationEntry.parse(raw[:32])
    except ConstructError as error:
        raise FormatError(
            "the boot catalogue is damaged", file=source.name, format="iso", structure="validation entry", offset=at
        ) from error
    found = [_entry(raw[32:64], validation.platform)]
    place = 64
    while place + 32 <= len(raw) and raw[place] in {0x90, 0x91}:
        header = SectionHeader.parse(raw[place : place + 32])
        last = raw[place] == 0x91
        for _ in range(header.entries):
            place += 32
            if place + 32 > len(raw):
                break
            found.append(_entry(raw[place : place + 32], header.platform))
        place += 32
        if last:
            break
    return tuple(found)


def _entry(raw: bytes, platform: int) -> BootImage:
    entry = BootEntry.parse(raw)
    name = PLATFORMS.get(platform, f"platform {platform:#x}")
    return BootImage(name, entry.extent * SECTOR, entry.sectors, entry.indicator == 0x88, entry.media & 0xF)
