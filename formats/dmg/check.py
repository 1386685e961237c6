"""Checking UDIF: chunks over each other in the file, data that does not decode, and the CRC-32 of everything."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.dmg import schema as s
from diskmorph.formats.dmg.reader import DmgDisk, open_image
from diskmorph.formats.errors import FormatError
from diskmorph.formats.extents import DATA, HOLE, PLAIN, stops

if TYPE_CHECKING:
    from diskmorph.formats.dmg.tables import Table
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

_STEP = 4 << 20
_U = np.uint64
_POLYNOMIAL = 0xEDB8_8320  # of CRC-32, reflected


def check_image(source: ByteSource, context: OpenContext) -> CheckReport:
    """Return what is wrong with an image that can be opened. Raises FormatError, UnsupportedError."""
    disk = open_image(source, context)
    report = CheckReport("dmg")
    _check_places(disk, report)
    whole = b""
    for number, table in enumerate(disk.tables):
        found = _content_sum(disk, table, report)
        if found is not None and _is_crc(table.checksum):
            _compare(found, table.checksum, report, f"chunk table {number}", table.place)
        if table.checksum.kind == s.CRC32:
            whole += table.checksum.data[: table.checksum.bits // 8]
    trailer = disk.trailer
    if _is_crc(trailer.master_checksum) and whole:
        _compare(zlib.crc32(whole), trailer.master_checksum, report, "master checksum", disk.place + 352)
    if _is_crc(trailer.data_checksum) and trailer.data_length:
        found = _stored_sum(source, trailer.data_offset, trailer.data_length)
        _compare(found, trailer.data_checksum, report, "data fork", disk.place + 80)
    return report


def _is_crc(checksum: Any) -> bool:
    return bool(checksum.kind == s.CRC32 and checksum.bits == 32)


def _compare(found: int, checksum: Any, report: CheckReport, structure: str, offset: int) -> None:
    expected = int.from_bytes(checksum.data[:4], "big")
    if found != expected:
        report.add(structure, offset, f"its CRC-32 is {found:08x}, not {expected:08x} as recorded")


def _check_places(disk: DmgDisk, report: CheckReport) -> None:
    data = disk.rows[disk.rows["kind"] == DATA]
    stored = np.where(data["codec"] == PLAIN, data["length"], data["stored"].astype(_U))
    order = np.argsort(data["offset"], kind="stable")
    starts, ends = data["offset"][order], (data["offset"] + stored)[order]
    for place in starts[1:][np.maximum.accumulate(ends)[:-1] > starts[1:]].tolist():
        report.add("chunk table", place, "two chunks lie at one place of the file")
    trailer = disk.trailer
    low, high = trailer.data_offset, trailer.data_offset + trailer.data_length
    outside = (starts < low) | (ends > high) if trailer.data_length else np.zeros(len(starts), bool)
    if outside.any():
        place = int(starts[np.flatnonzero(outside)[0]])
        report.add("chunk table", place, "chunks lie outside of the data fork", WARNING, int(outside.sum()))


def _content_sum(disk: DmgDisk, table: Table, report: CheckReport) -> int | None:
    """Return the CRC-32 of what a table's chunks hold, ignored ones left out; None where one does not decode."""
    total: int | None = 0
    begin, end = table.first * s.SECTOR, (table.first + table.sectors) * s.SECTOR
    rows = disk.rows[(disk.rows["start"] >= _U(begin)) & (stops(disk.rows) <= _U(end)) & (disk.rows["kind"] != HOLE)]
    for row in rows:
        start, length = int(row["start"]), int(row["length"])
        if row["kind"] != DATA:
            total = None if total is None else crc_of_zeroes(total, length)
            continue
        step = _STEP if row["codec"] == PLAIN else length
        for at in range(start, start + length, step):
            count = min(step, start + length - at)
            try:
                piece = disk.read(at, count)
            except FormatError as error:
                report.add(error.structure or "compressed data", error.offset, error.problem)
                total = None
                break
            total = None if total is None else zlib.crc32(piece, total)
    return total


def crc_of_zeroes(crc: int, count: int) -> int:
    """Return the CRC-32 that `crc` becomes by `count` further zero bytes, in time that grows with log(count)."""
    value = crc ^ 0xFFFF_FFFF
    # What one zero bit makes of each bit of the register; squaring doubles the bits.
    step = [_POLYNOMIAL, *(1 << bit for bit in range(31))]
    bits = count * 8
    while bits:
        if bits & 1:
            value = _applied(step, value)
        step = [_applied(step, column) for column in step]
        bits >>= 1
    return value ^ 0xFFFF_FFFF


def _applied(matrix: list[int], value: int) -> int:
    out = 0
    for column in matrix:
        if not value:
            break
        if value & 1:
            out ^= column
        value >>= 1
    return out


def _stored_sum(source: ByteSource, offset: int, length: int) -> int:
    total = 0
    for at in range(offset, offset + length, _STEP):
        total = zlib.crc32(source.read(at, min(_STEP, offset + length - at)), total)
    return total
