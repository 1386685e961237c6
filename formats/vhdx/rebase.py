"""Another parent for a differencing VHDX: its parent locator, written through the file's own log (2.3).

In this order, each on stable storage before the next: the log entry, a header that says so, the metadata, a header
that says that the log is empty. Whenever that breaks off, a reader finds the old locator or the new one.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.check import Patch
from diskmorph.formats.errors import TargetError, UnsupportedError
from diskmorph.formats.vhdx import headers
from diskmorph.formats.vhdx.metadata import read_items, read_metadata
from diskmorph.formats.vhdx.schema import (
    LOG_SECTOR,
    METADATA_DTYPE,
    METADATA_REGION,
    METADATA_TABLE_SIZE,
    NO_GUID,
    PARENT_LOCATOR,
    DataDescriptor,
    DataSector,
    Header,
    LogEntryHeader,
    MetadataEntry,
    MetadataTableHeader,
    sealed,
)
from diskmorph.formats.vhdx.writer import parent_locator

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewParent
    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.vhdx.headers import Copy, Region


def parent_patches(source: ByteSource, parent: NewParent) -> list[Patch]:
    """Return what makes `parent` the image's parent.

    Raises OptionError (it is no VHDX), TargetError (no room for its name), UnsupportedError (its log must be replayed
    first, or it has no parent).
    """
    item = parent_locator(parent)
    copies = headers.header_copies(source)
    current = headers.current_header(copies)
    if headers.has_log(current):
        raise UnsupportedError(
            "was not closed: its log must be replayed before it is changed",
            feature="rebase",
            file=source.name,
            format="vhdx",
            hint="let Hyper-V open it once, or write it anew with -o FILE",
        )
    tables = headers.require_one(headers.region_copies(source), "region table")
    region = headers.parse_regions(tables[0])[METADATA_REGION]
    if not read_metadata(source, region).has_parent:
        raise UnsupportedError("is no differencing VHDX", feature="rebase", file=source.name, format="vhdx")
    other = next(copy for copy in copies if copy.offset != current.offset)
    sectors = _sectors(source, region, item)
    guid = uuid.uuid4()
    log = headers.log_region(current, source.size)
    why = f"the parent becomes {parent.name}"
    return [
        Patch(log.offset, _log_entry(sectors, guid, source.size), "log entry"),
        Patch(other.offset, _header(current, 1, guid), "header with a log", sync=True),
        *(Patch(at, data, why, sync=number == 0) for number, (at, data) in enumerate(sorted(sectors.items()))),
        Patch(current.offset, _header(current, 2, NO_GUID), "header without a log", sync=True),
    ]


def _sectors(source: ByteSource, region: Region, item: bytes) -> dict[int, bytes]:
    """Return the sectors of the metadata region that change, by their places in the file."""
    table = bytearray(source.read(region.offset, METADATA_TABLE_SIZE))
    count = MetadataTableHeader.parse(bytes(table)).entry_count
    rows = np.frombuffer(bytes(table), METADATA_DTYPE, count, MetadataTableHeader.sizeof())
    number = next(i for i, row in enumerate(rows) if uuid.UUID(bytes_le=row["item_id"].tobytes()) == PARENT_LOCATOR)
    offset = int(rows["offset"][number])
    assert region.offset + offset == read_items(source, region)[PARENT_LOCATOR].offset  # noqa: S101 - the same table
    ends = np.delete(rows["offset"].astype(np.int64) + rows["length"], number)
    later = np.delete(rows["offset"], number)
    room = int(min(later[later > offset], default=region.length)) - offset
    if len(item) > room:
        offset = -(-max(int(ends.max()), offset) // LOG_SECTOR) * LOG_SECTOR
        if offset < METADATA_TABLE_SIZE or offset + len(item) > region.length:
            raise TargetError("the metadata region has no room for the parent's name", file=source.name, format="vhdx")
    entry = MetadataTableHeader.sizeof() + MetadataEntry.sizeof() * number
    words = {"item_id": PARENT_LOCATOR, "offset": offset, "length": len(item), "reserved": 0}
    table[entry : entry + MetadataEntry.sizeof()] = MetadataEntry.build(words | {"flags": int(rows["flags"][number])})
    low = entry // LOG_SECTOR * LOG_SECTOR
    found = {region.offset + low: bytes(table[low : low + LOG_SECTOR])}
    low, high = offset // LOG_SECTOR * LOG_SECTOR, -(-(offset + len(item)) // LOG_SECTOR) * LOG_SECTOR
    block = bytearray(source.read(region.offset + low, high - low))
    block[offset - low : offset - low + len(item)] = item
    for at in range(0, high - low, LOG_SECTOR):
        found[region.offset + low + at] = bytes(block[at : at + LOG_SECTOR])
    return found


def _log_entry(sectors: dict[int, bytes], guid: uuid.UUID, size: int) -> bytes:
    """Return one log entry with these sectors, the first of a new log (2.3.1)."""
    sequence = 1
    descriptors, data = b"", b""
    for at, sector in sorted(sectors.items()):
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
            "descriptor_count": len(sectors),
            "reserved": 0,
            "log_guid": guid,
            "flushed_file_offset": size,
            "last_file_offset": size,
        }
    )
    return sealed((head + descriptors).ljust(first, b"\0") + data)


def _header(current: Copy, step: int, log: uuid.UUID) -> bytes:
    fields: dict[str, Any] = {key: value for key, value in current.fields.items() if not key.startswith("_")}
    fields |= {
        "sequence_number": int(fields["sequence_number"]) + step,
        "file_write_guid": uuid.uuid4(),
        "log_guid": log,
        "checksum": 0,
    }
    return sealed(Header.build(fields))
