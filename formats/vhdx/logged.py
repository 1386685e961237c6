"""Changing a closed VHDX in place through its own log (2.3).

In this order, each on stable storage before the next: the log entry, a header that says so, the sectors, a header that
says that the log is empty. Whenever that breaks off, a reader finds what was there before or what is there then.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from diskmorph.formats.check import Patch
from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.fields import fields_of
from diskmorph.formats.vhdx import headers
from diskmorph.formats.vhdx.schema import (
    LOG_SECTOR,
    LOG_VERSION,
    MIB,
    NO_GUID,
    DataDescriptor,
    DataSector,
    Header,
    LogEntryHeader,
    sealed,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.vhdx.headers import Copy, Region


def regions_of_closed(source: ByteSource, feature: str) -> dict[uuid.UUID, Region]:
    """Return the regions of a file whose log is empty; else raise UnsupportedError: it must be replayed first."""
    current = headers.current_header(headers.header_copies(source))
    if headers.has_log(current):
        raise UnsupportedError(
            "was not closed: its log must be replayed before it is changed",
            feature=feature,
            file=source.name,
            format="vhdx",
            hint="let Hyper-V open it once, or write it anew with -o FILE",
        )
    tables = headers.require_one(headers.region_copies(source), "region table")
    return headers.parse_regions(tables[0])


def sectors(source: ByteSource, offset: int, data: bytes) -> dict[int, bytes]:
    """Return the log's sectors that hold `data` at `offset` of the file, by their places; around it all stays."""
    low, high = offset // LOG_SECTOR * LOG_SECTOR, -(-(offset + len(data)) // LOG_SECTOR) * LOG_SECTOR
    block = bytearray(source.read(low, high - low))
    block[offset - low : offset - low + len(data)] = data
    return {low + at: bytes(block[at : at + LOG_SECTOR]) for at in range(0, high - low, LOG_SECTOR)}


def patches(source: ByteSource, changed: dict[int, bytes], why: str, **fields: uuid.UUID) -> list[Patch]:
    """Return what writes sectors (by their places in the file) through the log of a closed file.

    `fields` of the header change too, from the first header written on. Raises UnsupportedError where the header's
    sequence number has no successors.
    """
    copies = headers.header_copies(source)
    current = headers.current_header(copies)
    if int(current.fields.sequence_number) + 2 >= 1 << 64:
        raise UnsupportedError("its headers cannot be changed any more", feature="sequence number", format="vhdx")
    other = next(copy for copy in copies if copy.offset != current.offset)
    guid = uuid.uuid4()
    log = headers.log_region(current, source.size)
    return [
        Patch(log.offset, _log_entry(changed, guid, source.size), "log entry"),
        Patch(other.offset, _header(current, 1, guid, fields), "header with a log", sync=True),
        *(Patch(at, data, why, sync=number == 0) for number, (at, data) in enumerate(sorted(changed.items()))),
        Patch(current.offset, _header(current, 2, NO_GUID, fields), "header without a log", sync=True),
    ]


def _log_entry(changed: dict[int, bytes], guid: uuid.UUID, size: int) -> bytes:
    """Return one log entry with these sectors, the first of a new log (2.3.1)."""
    sequence = 1
    descriptors, data = b"", b""
    for at, sector in sorted(changed.items()):
        descriptors += DataDescriptor.build(
            {
                "trailing_bytes": int.from_bytes(sector[-4:], "little"),
                "leading_bytes": int.from_bytes(sector[:8], "little"),
                "file_offset": at,
                "sequence_number": sequence,
            }
        )
        data += DataSector.build({"sequence_high": sequence >> 32, "data": sector[8:-4], "sequence_low": sequence})
    first = -(-(LogEntryHeader.sizeof() + len(descriptors)) // LOG_SECTOR) * LOG_SECTOR
    head = LogEntryHeader.build(
        {
            "checksum": 0,
            "entry_length": first + len(data),
            "tail": 0,
            "sequence_number": sequence,
            "descriptor_count": len(changed),
            "reserved": 0,
            "log_guid": guid,
            "flushed_file_offset": size // MIB * MIB,
            "last_file_offset": -(-size // MIB) * MIB,
        }
    )
    return sealed((head + descriptors).ljust(first, b"\0") + data)


def _header(current: Copy, step: int, log: uuid.UUID, changed: Mapping[str, uuid.UUID]) -> bytes:
    fields = fields_of(current.fields)
    fields |= {
        "sequence_number": int(fields["sequence_number"]) + step,
        "file_write_guid": uuid.uuid4(),
        "log_guid": log,
        "log_version": LOG_VERSION,
        "checksum": 0,
    }
    return sealed(Header.build(fields | dict(changed)))
