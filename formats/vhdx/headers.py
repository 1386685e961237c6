"""The header section: file identifier, both headers, both region tables (2.2). Reader and check share it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from construct import ConstructError

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.vhdx.schema import (
    BAT_REGION,
    HEADER_SECTION,
    HEADER_SIZE,
    HEADERS_AT,
    IDENTIFIER_AT,
    LOG_VERSION,
    MAX_ENTRIES,
    METADATA_REGION,
    MIB,
    NO_GUID,
    REGION_DTYPE,
    REGION_TABLE_SIZE,
    REGION_TABLES_AT,
    VERSION,
    Header,
    Identifier,
    RegionTableHeader,
    checksum,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.source import ByteSource

REGION_NAMES = {BAT_REGION: "BAT", METADATA_REGION: "metadata"}


@dataclass(frozen=True, slots=True)
class Copy:
    """One of the two copies of a header or region table: where, its bytes, its fields, or why it is not valid."""

    name: str
    offset: int
    block: bytes
    fields: Any
    fault: str | None
    expected: object = None
    found: object = None

    @property
    def valid(self) -> bool:
        """Whether signature and checksum are right."""
        return self.fault is None


@dataclass(frozen=True, slots=True)
class Region:
    """A region of the file, in bytes; `name` is its GUID where we do not know it."""

    name: str
    offset: int
    length: int

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.offset + self.length


def read_creator(source: ByteSource) -> str:
    """Return who made the file (2.2.1). Raises FormatError where the identifier is missing."""
    block = source.read_upto(IDENTIFIER_AT, Identifier.sizeof())
    try:
        creator = bytes(Identifier.parse(block).creator)
    except ConstructError:
        raise FormatError(
            "is not a VHDX file, or is cut off",
            structure="file identifier",
            field="signature",
            offset=IDENTIFIER_AT,
            expected="vhdxfile",
            found=block[:8].decode("latin-1").rstrip("\0") or "nothing",
        ) from None
    return creator.decode("utf-16-le", "replace").split("\0")[0]


def _copy(source: ByteSource, name: str, offset: int, size: int, schema: Any) -> Copy:
    block = source.read_upto(offset, size)
    if len(block) < size:
        return Copy(name, offset, block, None, "the file is truncated", f"{size} bytes", f"the end at {source.size}")
    try:
        fields = schema.parse(block)
    except ConstructError:
        expected = schema.subcons[0].subcon.value.decode()
        return Copy(name, offset, block, None, "its signature is wrong", expected, repr(block[:4])[1:])
    computed = checksum(block)
    if computed != fields.checksum:
        stored = f"{fields.checksum:#010x}"
        return Copy(name, offset, block, fields, "its checksum is wrong", f"{computed:#010x}", stored)
    return Copy(name, offset, block, fields, None)


def header_copies(source: ByteSource) -> list[Copy]:
    """Return both headers, valid or not."""
    return [_copy(source, f"header {i + 1}", at, HEADER_SIZE, Header) for i, at in enumerate(HEADERS_AT)]


def region_copies(source: ByteSource) -> list[Copy]:
    """Return both region tables, valid or not; a log must have been replayed before (2.3.3)."""
    return [
        _copy(source, f"region table {i + 1}", at, REGION_TABLE_SIZE, RegionTableHeader)
        for i, at in enumerate(REGION_TABLES_AT)
    ]


def require_one(copies: Sequence[Copy], what: str) -> list[Copy]:
    """Return the valid copies. Raises FormatError where there is none."""
    valid = [copy for copy in copies if copy.valid]
    if valid:
        return valid
    first = copies[0]
    raise FormatError(
        f"both {what}s are damaged: of the first {first.fault}",
        structure=first.name,
        field="checksum" if first.fields is not None else "signature",
        offset=first.offset,
        expected=first.expected,
        found=first.found,
    )


def current_header(copies: Sequence[Copy]) -> Copy:
    """Return the valid header with the higher sequence number (2.2.2).

    Raises FormatError where none is valid, or where both have the same number and say different things, and
    UnsupportedError for another version of the format.
    """
    valid = require_one(copies, "header")
    valid.sort(key=lambda copy: int(copy.fields.sequence_number), reverse=True)
    best = valid[0]
    if len(valid) == 2 and best.fields.sequence_number == valid[1].fields.sequence_number:
        if best.block != valid[1].block:
            raise FormatError(
                "both headers have the same sequence number, but differ",
                structure=best.name,
                field="sequence_number",
                offset=best.offset + 8,
                found=best.fields.sequence_number,
            )
        best = copies[0]
    if best.fields.version != VERSION:
        raise UnsupportedError(
            f"is of VHDX version {best.fields.version}",
            feature="version",
            structure=best.name,
            field="version",
            offset=best.offset + 66,
            expected=VERSION,
            found=best.fields.version,
        )
    return best


def require_log_version(header: Copy) -> None:
    """Raise UnsupportedError where a log must be replayed whose version is not known."""
    if header.fields.log_version == LOG_VERSION:
        return
    raise UnsupportedError(
        "has a log to replay, of an unknown version",
        feature="log version",
        structure=header.name,
        field="log_version",
        offset=header.offset + 64,
        expected=LOG_VERSION,
        found=header.fields.log_version,
    )


def log_region(header: Copy, file_size: int) -> Region:
    """Return where the log lies. Raises FormatError where it lies outside the file or off a MiB."""
    offset, length = int(header.fields.log_offset), int(header.fields.log_length)
    _require_place("log", offset, length, header.name, header.offset + 68)
    if offset + length > file_size:
        raise FormatError(
            "the log lies beyond the end of the file: it is truncated",
            structure=header.name,
            field="log_offset",
            offset=header.offset + 72,
            expected=f"{length} bytes from {offset}",
            found=f"the end at {file_size}",
        )
    return Region("log", offset, length)


def has_log(header: Copy) -> bool:
    """Return whether log entries may have to be replayed."""
    return bool(header.fields.log_guid != NO_GUID)


def _require_place(what: str, offset: int, length: int, structure: str, at: int) -> None:
    if offset % MIB == 0 and length % MIB == 0 and offset >= HEADER_SECTION and length:
        return
    raise FormatError(
        f"the {what} is not at a multiple of 1 MiB behind the header section",
        structure=structure,
        field=what,
        offset=at,
        expected="multiples of 1048576",
        found=f"{length} bytes at {offset}",
    )


def parse_regions(table: Copy) -> dict[uuid.UUID, Region]:
    """Return the regions that a valid region table lists (2.2.3).

    Raises FormatError where regions overlap, repeat or lie off a MiB, and UnsupportedError for an unknown region that
    is required, by its GUID.
    """
    count = int(table.fields.entry_count)
    if count > MAX_ENTRIES:
        raise FormatError(
            "the region table has too many entries",
            structure=table.name,
            field="entry_count",
            offset=table.offset + 8,
            expected=f"at most {MAX_ENTRIES}",
            found=count,
        )
    rows = np.frombuffer(table.block, REGION_DTYPE, count, RegionTableHeader.sizeof())
    regions: dict[uuid.UUID, Region] = {}
    for number, row in enumerate(rows.tolist()):
        at = table.offset + 16 + 32 * number
        guid = uuid.UUID(bytes_le=row[0])
        name = REGION_NAMES.get(guid, str(guid))
        if guid in regions:
            raise FormatError(f"the region {name} is listed twice", structure=table.name, field="guid", offset=at)
        if guid not in REGION_NAMES and row[3] & 1:
            raise UnsupportedError(
                f"needs the region {guid}, which is not known",
                feature=f"region {guid}",
                structure=table.name,
                field="guid",
                offset=at,
            )
        _require_place(f"{name} region", row[1], row[2], table.name, at + 16)
        regions[guid] = Region(name, row[1], row[2])
    _require_apart(list(regions.values()), table)
    for guid, name in REGION_NAMES.items():
        if guid not in regions:
            raise FormatError(f"has no {name} region", structure=table.name, field="guid", offset=table.offset + 16)
    return regions


def _require_apart(regions: list[Region], table: Copy) -> None:
    regions.sort(key=lambda region: region.offset)
    for low, high in pairwise(regions):
        if low.stop > high.offset:
            raise FormatError(
                f"the regions {low.name} and {high.name} overlap",
                structure=table.name,
                field="file_offset",
                offset=table.offset,
                expected=f"{high.name} at {low.stop} or later",
                found=high.offset,
            )
