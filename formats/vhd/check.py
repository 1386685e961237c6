"""Checking VHD: the two footers, the dynamic header, blocks at wrong places, bitmaps."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diskmorph.formats.check import WARNING, CheckReport, Patch
from diskmorph.formats.places import shared_places
from diskmorph.formats.vhd.reader import DynamicDisk, VhdDisk, open_image
from diskmorph.formats.vhd.schema import (
    ENTRY,
    FIXED,
    FOOTER_SIZE,
    NOWHERE,
    OLD_FOOTER_SIZE,
    SECTOR,
    UNALLOCATED,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource


class _Ends(NamedTuple):
    """Where the last block ends in the file: what the disk needs of it, and all of it."""

    needed: int
    stored: int


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule. `repair` "all" writes a damaged or differing footer anew from the one that counts."""
    disk = open_image(source, context)
    report = CheckReport("vhd")
    _check_footers(disk, report)
    if not isinstance(disk, DynamicDisk):
        _check_fixed(disk, report)
        return report
    _check_header(disk, report)
    ends = _check_blocks(disk, report)
    _check_bitmaps(disk, report)
    if repair == "all":
        _mend_footers(disk, report, ends)
    return report


def _check_footers(disk: VhdDisk, report: CheckReport) -> None:
    footers = disk.footers
    fields = footers.fields
    if fields.saved_state:
        report.add("footer", footers.data_end + 84, "the disk belongs to a machine in saved state", WARNING)
    if not fields.features & 2:
        report.add("footer", footers.data_end + 8, "the reserved feature bit is not set", WARNING)
    if footers.last is not None and disk.files[0].size - footers.last.offset == OLD_FOOTER_SIZE:
        report.add("footer", footers.last.offset, "the footer has 511 bytes, as before Virtual PC 2004", WARNING)
    if fields.type == FIXED:
        return
    for copy, place, offset in ((footers.last, "end", footers.data_end), (footers.first, "start", 0)):
        if copy is None:
            report.add("footer", offset, f"there is no footer at the {place}")
        elif not copy.good:
            found = f"{copy.sum_found:#x} instead of {copy.sum_expected:#x}"
            report.add("footer", offset, f"the checksum of the footer at the {place} is wrong: {found}")
    first, last = footers.first, footers.last
    if first and last and first.good and last.good and first.raw != last.raw:
        report.add("footer", 0, "the footer at the start differs from the one at the end")


def _check_fixed(disk: VhdDisk, report: CheckReport) -> None:
    spare = disk.footers.data_end - disk.size
    if spare:
        report.add("footer", disk.footers.data_end, f"{spare} bytes lie between the disk's end and the footer", WARNING)
    if disk.footers.fields.data_offset != NOWHERE:
        report.add("footer", disk.footers.data_end + 16, "data_offset of a fixed disk is not all ones", WARNING)


def _check_header(disk: DynamicDisk, report: CheckReport) -> None:
    at, header = disk.footers.fields.data_offset, disk.header
    if header.data_offset != NOWHERE:
        report.add("dynamic header", at + 8, "data_offset is not all ones", WARNING)
    if header.table_offset % SECTOR:
        report.add("dynamic header", at + 16, "the block table does not begin on a sector", WARNING)
    if disk.info.parent is not None and not header.parent_uuid.int:
        report.add("dynamic header", at + 40, "a differencing disk without its parent's unique id")
    if disk.info.parent is not None and not disk.info.parent.names:
        report.add("dynamic header", at + 64, "a differencing disk that names no parent", WARNING)
    tables = sorted(disk.tables())
    for (_, stop), (start, _) in itertools.pairwise(tables):
        if start < stop:
            report.add("dynamic header", start, "footer, header and block table overlap")


def _check_blocks(disk: DynamicDisk, report: CheckReport) -> _Ends:
    """Report blocks at wrong places; return where all blocks end, those at wrong places too."""
    table_at = disk.header.table_offset
    stored = disk.bitmap_size + disk.block_size
    needed = -(-disk.size // disk.block_size)
    beyond = askew = 0
    ends = _Ends(0, 0)
    for first, entries in disk.entries(0, disk.header.entries):
        used = np.flatnonzero(entries != UNALLOCATED)
        blocks = used.astype(np.uint64) + np.uint64(first)
        places = entries[used].astype(np.uint64) * np.uint64(SECTOR)
        wrong = disk.misplaced(blocks, places)
        for block in blocks[wrong][: CheckReport.LIMIT].tolist():
            message = f"block {block} lies beyond the end of the data or over a table"
            report.add("block table", table_at + ENTRY.itemsize * block, message)
        rest = int(wrong.sum()) - CheckReport.LIMIT
        if rest > 0:
            report.add("block table", table_at, f"{rest} more blocks are like that", count=rest)
        ends = _Ends(
            max(ends.needed, int(disk.ends(blocks, places).max(initial=0))),
            max(ends.stored, int((places + np.uint64(stored)).max(initial=0))),
        )
        good = places[~wrong]
        askew += int(((good + np.uint64(disk.bitmap_size)) % np.uint64(4096) != 0).sum())
        beyond += int((blocks >= needed).sum())
    if askew:
        report.add("block table", table_at, f"the data of {askew} blocks is not on 4 KiB boundaries", WARNING)
    if beyond:
        report.add("block table", table_at, f"{beyond} blocks lie behind the disk's end", WARNING)
    _check_shared(disk, report)
    return ends


def _check_shared(disk: DynamicDisk, report: CheckReport) -> None:
    last = disk.footers.data_end // SECTOR

    def places() -> Iterator[NDArray[np.uint64]]:
        for _, entries in disk.entries(0, disk.header.entries):
            yield entries[entries < min(last, UNALLOCATED)].astype(np.uint64)

    shared = shared_places(places, (disk.bitmap_size + disk.block_size) // SECTOR)
    if shared.overlapping:
        some = ", ".join(str(place * SECTOR) for place in shared.some[:4])
        message = f"blocks overlap in the file, at {some}"
        report.add("block table", disk.header.table_offset, message, count=shared.overlapping)


def _check_bitmaps(disk: DynamicDisk, report: CheckReport) -> None:
    """Note sectors that are stored but marked as never written, where other products may show what is stored."""
    if disk.info.parent is not None or report.corruptions:
        return
    unmarked = sum(disk.unmarked_sectors())
    if unmarked:
        message = f"{unmarked} sectors of stored blocks are marked as never written: they read as zeroes"
        report.add("sector bitmap", None, message, WARNING)


def _mend_footers(disk: DynamicDisk, report: CheckReport, ends: _Ends) -> None:
    first, last = disk.footers.first, disk.footers.last
    counts = last if last is not None and last.good else first
    assert counts is not None  # noqa: S101 - the disk was opened by one of them
    if counts is not last:
        _mend_last(disk, report, ends, counts.raw)
    elif (first is None or first.raw != last.raw) and min(_occupied(disk))[0] >= FOOTER_SIZE:
        report.patches.append(Patch(0, counts.raw, "footer at the start, from the one at the end"))


def _mend_last(disk: DynamicDisk, report: CheckReport, ends: _Ends, raw: bytes) -> None:
    """Put the end footer where no byte of a table or block is or should be; nowhere where such bytes are missing."""
    why = "footer at the end, from its copy at the start"
    last, size = disk.footers.last, disk.files[0].size
    tables = max(stop for _, stop in _occupied(disk))
    if last is not None and last.offset >= max(tables, ends.needed):
        report.patches.append(Patch(last.offset, raw[: size - last.offset], why))
        return
    if max(tables, ends.needed) > size:
        return
    behind = max(tables, ends.stored)
    offset = size - FOOTER_SIZE
    if last is not None or offset < behind or offset % SECTOR:
        offset = -(-max(size, behind) // SECTOR) * SECTOR
    report.patches.append(Patch(offset, raw, why))


def _occupied(disk: DynamicDisk) -> list[tuple[int, int]]:
    """Return (begin, end) of the dynamic header, the block table and the parent locators of whatever platform."""
    places = list(disk.tables()[1:])
    if disk.info.parent is None:
        return places
    used = [locator for locator in disk.header.locators if any(locator.platform) and locator.length]
    return places + [(locator.offset, locator.offset + locator.length) for locator in used]
