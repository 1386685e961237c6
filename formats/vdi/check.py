"""Checking VDI: two blocks at one place, blocks beyond the end, a wrong count of allocated blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.check import ERROR, LEAK, WARNING, CheckReport, Patch
from diskmorph.formats.places import shared_places
from diskmorph.formats.vdi.reader import VdiDisk, open_image
from diskmorph.formats.vdi.schema import ZERO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule. `repair` "all" sets the count of allocated blocks right, "leaks" where that frees places."""
    disk = open_image(source, context)
    report = CheckReport("vdi")
    _check_header(disk, report)
    end = _check_places(disk, report)
    _check_count(disk, report, end, repair)
    return report


def _check_header(disk: VdiDisk, report: CheckReport) -> None:
    header = disk.header
    for name in ("create_uuid", "modify_uuid"):
        if not getattr(header, name).int:
            report.add("header", None, f"{name} is null: VirtualBox refuses such images", WARNING)
    if disk.info.parent is not None and not header.linkage_uuid.int:
        report.add("header", None, "linkage_uuid is null: the parent of this difference is unknown")
    if header.block_extra & (header.block_extra - 1):
        report.add("header", None, f"block_extra {header.block_extra} is not a power of two", WARNING)
    if header.disk_size % 512:
        report.add("header", None, f"disk_size {header.disk_size} is not a multiple of 512", WARNING)
    spare = header.blocks - -(-header.disk_size // header.block_size)
    if spare > 0:
        report.add("block map", header.map_offset, f"{spare} entries lie behind the disk's end", WARNING)


def _check_places(disk: VdiDisk, report: CheckReport) -> int:
    """Report blocks at wrong places; return the number of places in use, up to the last good one."""
    header = disk.header
    end = 0
    for first, entries in disk.pointers(0, header.blocks):
        used = np.flatnonzero(entries < ZERO)
        pointers = entries[used].astype(np.uint64)
        starts = (used.astype(np.uint64) + np.uint64(first)) * np.uint64(header.block_size)
        # The last block of a disk is often partial, and a file may end with the disk's last byte.
        room = np.minimum(np.uint64(header.block_size), np.uint64(disk.size) - np.minimum(starts, np.uint64(disk.size)))
        ends = pointers * np.uint64(header.stride) + np.uint64(header.data_offset + header.block_extra) + room
        beyond = ends > np.uint64(disk.files[0].size)
        _report(report, header.map_offset, first + used[beyond], "lies beyond the end of the file")
        many = ~beyond & (pointers >= np.uint64(header.blocks))
        _report(report, header.map_offset, first + used[many], "has a place that is no block of this disk")
        if (~beyond).any():
            end = max(end, int(pointers[~beyond].max()) + 1)

    def places() -> Iterator[NDArray[np.uint64]]:
        for _, entries in disk.pointers(0, header.blocks):
            yield entries[entries < min(ZERO, end)].astype(np.uint64)

    shared = shared_places(places, 1)
    if shared.overlapping:
        some = ", ".join(str(header.data_offset + place * header.stride) for place in shared.some[:4])
        report.add(
            "block map", header.map_offset, f"two blocks lie at one place of the file: {some}", count=shared.overlapping
        )
    if end > shared.distinct:
        report.add(
            "block map", header.map_offset, f"{end - shared.distinct} places hold no block", LEAK, end - shared.distinct
        )
    return end


def _report(report: CheckReport, map_offset: int, blocks: NDArray[np.int64], what: str) -> None:
    for block in blocks[: CheckReport.LIMIT].tolist():
        report.add("block map", map_offset + 4 * block, f"block {block} {what}")
    rest = len(blocks) - CheckReport.LIMIT
    if rest > 0:
        report.add("block map", map_offset, f"{rest} more blocks are like that", count=rest)


def _check_count(disk: VdiDisk, report: CheckReport, end: int, repair: str | None) -> None:
    """VirtualBox puts the next block at place `blocks_allocated`: a lower count than there are places loses data."""
    header = disk.header
    said = header.blocks_allocated
    if said == end:
        return
    low = said < end
    # Beyond the places in use may lie the data of a block whose entry is damaged: leave room for it to be saved.
    mendable = low or not report.corruptions
    message = f"blocks_allocated is {said}, but the map uses {end} places"
    report.add("header", header.allocated_at, message, ERROR if low else LEAK, 1 if low else said - end)
    if mendable and (repair == "all" or (repair == "leaks" and not low)):
        report.patches.append(Patch(header.allocated_at, end.to_bytes(4, "little"), "count of allocated blocks"))
