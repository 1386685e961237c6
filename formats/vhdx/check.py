"""Checking VHDX: both copies of headers and region tables, the log, the metadata, every BAT entry.

Repair ("all") restores a damaged copy from the good one and replays the log into the file.
"""

from __future__ import annotations

import uuid
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.check import ERROR, WARNING, CheckReport, Patch
from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.extents import DATA
from diskmorph.formats.fields import fields_of
from diskmorph.formats.vhdx.headers import (
    has_log,
    header_copies,
    log_region,
    parse_regions,
    region_copies,
    require_one,
)
from diskmorph.formats.vhdx.log import ReplayedSource
from diskmorph.formats.vhdx.reader import RESERVED_STATE, kinds_of_states, open_structures
from diskmorph.formats.vhdx.schema import (
    BAT_ENTRY,
    BITMAP_BLOCK,
    BITMAP_NOT_PRESENT,
    BITMAP_PRESENT,
    HEADER_SECTION,
    LOG_VERSION,
    MIB,
    NO_GUID,
    NOT_PRESENT,
    PARTIALLY_PRESENT,
    REGION_TABLES_AT,
    RESERVED_MASK,
    STATE_MASK,
    TIB,
    UNDEFINED,
    Header,
    sealed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.vhdx.headers import Copy
    from diskmorph.formats.vhdx.reader import Opened

_BATCH = 1 << 16
_LARGEST_FILE = 72 * TIB  # the largest disk with its bitmaps and its BAT, and more
_LARGEST_REPLAY = 64 * MIB


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule. There are no leaks to repair: the format does not say which room is free."""
    report = CheckReport("vhdx")
    opened = open_structures(source, context)
    headers = header_copies(source)
    tables = region_copies(opened.source)
    _report_copies(report, [*headers, *tables])
    _check_headers(report, opened, headers)
    _check_tables(report, tables)
    _BatCheck(report, opened).run()
    if repair == "all":
        report.patches += _repairs(source, opened, headers, tables)
    return report


def _report_copies(report: CheckReport, copies: list[Copy]) -> None:
    for copy in copies:
        if not copy.valid:
            report.add(copy.name, copy.offset, f"{copy.fault}: expected {copy.expected}, found {copy.found}")


def _check_headers(report: CheckReport, opened: Opened, headers: list[Copy]) -> None:
    if has_log(opened.header):
        report.add("log", int(opened.header.fields.log_offset), "changes wait in the log to be replayed", WARNING)
    if opened.header.fields.log_version != LOG_VERSION:
        report.add("header", opened.header.offset + 64, "the version of the log is unknown", WARNING)
    valid = [copy for copy in headers if copy.valid]
    if len(valid) == 2 and valid[0].fields.sequence_number == valid[1].fields.sequence_number:
        report.add("header", valid[0].offset + 8, "both headers have the same sequence number", WARNING)


def _check_tables(report: CheckReport, tables: list[Copy]) -> None:
    if all(copy.valid for copy in tables) and tables[0].block != tables[1].block:
        report.add("region table 2", REGION_TABLES_AT[1], "says something else than region table 1")


def _place(report: CheckReport, opened: Opened) -> NDArray[np.int64]:
    """Return start and stop of what the file holds besides blocks, and report what overlaps."""
    table = require_one(region_copies(opened.source), "region table")[0]
    places = [(0, HEADER_SECTION, "header section")]
    log = log_region(opened.header, opened.source.size) if opened.header.fields.log_length else None
    named = [*parse_regions(table).values(), *([log] if log else [])]
    places += [(region.offset, region.stop, region.name) for region in named]
    places.sort()
    for (_, stop, low), (start, _, high) in pairwise(places):
        if stop > start:
            report.add(high, start, f"overlaps the {low}")
    return np.array([place[:2] for place in places], np.int64)


class _BatCheck:
    """One pass over the BAT, in batches; which MiB of the file are taken is kept in one byte each."""

    def __init__(self, report: CheckReport, opened: Opened) -> None:
        self._report = report
        self._source = opened.source
        self._meta = opened.metadata
        self._at = opened.bat.offset
        self._kinds = kinds_of_states(has_parent=self._meta.has_parent)
        if self._source.size > _LARGEST_FILE:
            raise UnsupportedError("is larger than any VHDX file can be", feature="large file", found=self._source.size)
        self._taken = np.zeros(-(-self._source.size // MIB), bool)
        for start, stop in _place(report, opened).tolist():
            self._taken[start // MIB : stop // MIB] = True

    def run(self) -> None:
        """Report what is wrong with each entry."""
        period = self._meta.chunk_ratio + 1
        step = max(_BATCH // period, 1) * period  # whole chunks, so that blocks meet their bitmap
        for first in range(0, self._meta.bat_entries, step):
            stop = min(first + step, self._meta.bat_entries)
            table = self._source.read(self._at + BAT_ENTRY.itemsize * first, BAT_ENTRY.itemsize * (stop - first))
            entries = np.frombuffer(table, BAT_ENTRY)
            numbers = np.arange(first, stop)
            is_bitmap = numbers % period == period - 1
            self._payload(numbers[~is_bitmap], entries[~is_bitmap])
            self._bitmaps(numbers[is_bitmap], entries[is_bitmap])
            if self._meta.has_parent:
                self._pairs(numbers, entries, period)

    def _payload(self, numbers: NDArray[Any], entries: NDArray[Any]) -> None:
        states = (entries & np.uint64(STATE_MASK)).astype(np.int64)
        starts = (entries >> np.uint64(20)).astype(np.int64)  # in MiB: as bytes they may pass 63 bits
        kinds = self._kinds[states]
        self._note(numbers[kinds == RESERVED_STATE], "the state is not valid here")
        self._note(numbers[entries & np.uint64(RESERVED_MASK) != 0], "reserved bits are set", WARNING)
        free = (states == NOT_PRESENT) | (states == UNDEFINED)  # their offsets mean nothing
        stray = ~free & (kinds != DATA) & (kinds != RESERVED_STATE) & (starts != 0)
        self._note(numbers[stray], "a block without data has an offset, which Hyper-V refuses", WARNING)
        here = kinds == DATA
        blocks = numbers[here] - numbers[here] // (self._meta.chunk_ratio + 1)
        used = np.minimum(self._meta.size - blocks * self._meta.block_size, self._meta.block_size)
        self._places(numbers[here], starts[here], used, self._meta.block_size)

    def _bitmaps(self, numbers: NDArray[Any], entries: NDArray[Any]) -> None:
        states = (entries & np.uint64(STATE_MASK)).astype(np.int64)
        if not self._meta.has_parent:
            self._note(numbers[states != BITMAP_NOT_PRESENT], "a sector bitmap where none may be", WARNING)
            return
        here = states == BITMAP_PRESENT
        self._note(numbers[~here & (states != BITMAP_NOT_PRESENT)], "the state is not valid here")
        starts = (entries[here] >> np.uint64(20)).astype(np.int64)
        self._places(numbers[here], starts, np.full(len(starts), BITMAP_BLOCK), BITMAP_BLOCK)

    def _pairs(self, numbers: NDArray[Any], entries: NDArray[Any], period: int) -> None:
        """Report partially present blocks whose chunk has no sector bitmap."""
        states = entries & np.uint64(STATE_MASK)
        partial = numbers[(states == PARTIALLY_PRESENT) & (numbers % period != period - 1)]
        needed = partial // period * period + period - 1
        found = np.zeros(len(needed), bool)
        inside = (needed >= numbers[0]) & (needed <= numbers[-1])
        found[inside] = states[needed[inside] - numbers[0]] == BITMAP_PRESENT
        self._note(partial[~found], "the block is partially present, but has no sector bitmap")

    def _places(self, numbers: NDArray[Any], starts: NDArray[Any], used: NDArray[Any], length: int) -> None:
        """Report blocks of `length` bytes, `used` of which matter, that lie outside the file or where others lie.

        `starts` are in MiB. Take the room of the others.
        """
        room = self._source.size - np.minimum(starts, len(self._taken)) * MIB
        low, high = starts < HEADER_SECTION // MIB, room < used
        self._note(numbers[low], "the block lies in the header section")
        self._note(numbers[high], "the block lies beyond the end of the file")
        cut_short = numbers[~high & (room < length)]
        self._note(cut_short, "the file ends behind the disk's last byte, but within its block", WARNING)
        good = np.flatnonzero(~(low | high))
        good = good[np.argsort(starts[good], kind="stable")]
        numbers, starts = numbers[good], starts[good]
        clash = np.zeros(len(starts), bool)
        clash[1:] = np.diff(starts) < length // MIB
        for step in range(length // MIB):
            units = np.minimum(starts + step, len(self._taken) - 1)
            clash |= self._taken[units] & (starts + step < len(self._taken))
        for step in range(length // MIB):
            self._taken[np.minimum(starts + step, len(self._taken) - 1)] = True
        self._note(numbers[clash], "the block lies where another block or region lies")

    def _note(self, numbers: NDArray[Any], message: str, severity: str = ERROR) -> None:
        room = max(CheckReport.LIMIT - len(self._report.findings), 0)
        for number in numbers[:room].tolist():
            self._report.add("BAT", self._at + BAT_ENTRY.itemsize * number, f"entry {number}: {message}", severity)
        if len(numbers) > room:
            self._report.add("BAT", self._at, message, severity, len(numbers) - room)


def _repairs(source: ByteSource, opened: Opened, headers: list[Copy], tables: list[Copy]) -> Iterator[Patch]:
    """Yield what mends the file, in an order that leaves it readable at every moment: headers last."""
    replayed = opened.source
    if isinstance(replayed, ReplayedSource):
        yield from _replay(source, replayed)
    good = require_one(tables, "region table")[0].block
    for table in tables:
        if table.block != good:
            yield Patch(table.offset, good, f"{table.name} restored from the other one")
    if has_log(opened.header) or not all(copy.valid for copy in headers):
        yield from _new_headers(opened.header, headers)


def _replay(source: ByteSource, replayed: ReplayedSource) -> Iterator[Patch]:
    total = int((replayed.patches["stop"] - replayed.patches["start"]).sum())
    if total > _LARGEST_REPLAY:
        raise UnsupportedError(
            "has a log that changes too much to be repaired in place",
            feature="large log",
            expected=f"at most {_LARGEST_REPLAY} bytes",
            found=total,
            hint="convert it into a new file",
        )
    if replayed.size > source.size:
        yield Patch(replayed.size - 1, b"\0", "file extended to the size that its log says")
    for patch in replayed.patches:
        low, high = int(patch["start"]), int(patch["stop"])
        yield Patch(low, replayed.patched(patch, low, high), "change replayed from the log")


def _new_headers(current: Copy, headers: list[Copy]) -> Iterator[Patch]:
    """Yield both headers anew, the one that is not current first, with an empty log and a new FileWriteGuid.

    What the log said is on stable storage before the first one empties it, and that one before the other is touched.
    """
    fields = fields_of(current.fields)
    fields["log_guid"] = NO_GUID
    fields["file_write_guid"] = uuid.uuid5(fields["file_write_guid"], "repair")
    others = [copy for copy in headers if copy.offset != current.offset]
    for step, copy in enumerate((*others, current)):
        fields["sequence_number"] = (int(current.fields.sequence_number) + 1 + step) & 0xFFFF_FFFF_FFFF_FFFF
        yield Patch(copy.offset, sealed(Header.build(fields)), f"{copy.name} written anew", sync=True)
