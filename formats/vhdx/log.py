"""The log (2.3): the newest complete sequence of entries is replayed in memory, as a source over the file's bytes."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.crc32c import crc32c
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.source import ByteSource
from diskmorph.formats.vhdx.headers import log_region, require_log_version
from diskmorph.formats.vhdx.schema import (
    DATA_SECTOR_DTYPE,
    DESCRIPTOR_DTYPE,
    HEADERS_AT,
    LOG_ENTRY_DTYPE,
    LOG_SECTOR,
    MIB,
    REGION_TABLES_AT,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.vhdx.headers import Copy, Region

_MOST_DESCRIPTORS = 1 << 17  # of all entries to replay; a log of 256 MiB holds 65,536 sectors of data
_MOST_READINGS = 4  # how often the log may be read through in search of valid entries

# What replaces start..stop of the file: the log's data sector at `sector` of the file, its first 8 and last 4 bytes
# being `leading` and `trailing`; zeroes where `sector` is 0.
PATCH = np.dtype([("start", "<u8"), ("stop", "<u8"), ("sector", "<u8"), ("leading", "<u8"), ("trailing", "<u4")])


@dataclass(frozen=True, slots=True)
class Entry:
    """A valid log entry; `at` and `tail` are offsets in the log."""

    at: int
    length: int
    tail: int
    sequence: int
    descriptors: int
    flushed: int
    last: int

    @property
    def first_sector(self) -> int:
        """Where, from the entry's start, its data sectors begin: behind the descriptors, which share the first one."""
        used = LOG_ENTRY_DTYPE.itemsize + DESCRIPTOR_DTYPE.itemsize * self.descriptors
        return -(-used // LOG_SECTOR) * LOG_SECTOR


class Log:
    """A log that may have to be replayed: `source` is the file, `header` its current header."""

    def __init__(self, source: ByteSource, header: Copy, limits: Limits) -> None:
        require_log_version(header)
        self.region: Region = log_region(header, source.size)
        if self.region.length > limits.log_bytes:
            raise UnsupportedError(
                "has a log to replay that is larger than the limit",
                feature="large log",
                structure=header.name,
                field="log_length",
                offset=header.offset + 68,
                expected=f"at most {limits.log_bytes}",
                found=self.region.length,
            )
        self._source = source
        self._guid = header.fields.log_guid.bytes_le

    def _pieces(self, at: int, length: int) -> Iterator[bytes]:
        """Yield `length` bytes of the log from `at`, going on at its start behind its end."""
        while length:
            count = min(length, self.region.length - at, MIB)
            yield self._source.read(self.region.offset + at, count)
            at = (at + count) % self.region.length
            length -= count

    def _candidates(self) -> list[Entry]:
        """Return what looks like an entry of this log, in order of place."""
        found: list[Entry] = []
        for number, piece in enumerate(self._pieces(0, self.region.length)):
            sectors = np.frombuffer(piece, np.uint8).reshape(-1, LOG_SECTOR)
            heads = np.ascontiguousarray(sectors[:, : LOG_ENTRY_DTYPE.itemsize]).view(LOG_ENTRY_DTYPE)[:, 0]
            good = (heads["signature"] == b"loge") & (heads["entry_length"] <= self.region.length)
            good &= (heads["entry_length"] % LOG_SECTOR == 0) & (heads["sequence_number"] > 0)
            for index in np.flatnonzero(good).tolist():
                head = heads[index]
                entry = Entry(
                    number * MIB + index * LOG_SECTOR,
                    int(head["entry_length"]),
                    int(head["tail"]),
                    int(head["sequence_number"]),
                    int(head["descriptor_count"]),
                    int(head["flushed_file_offset"]),
                    int(head["last_file_offset"]),
                )
                if head["log_guid"].tobytes() == self._guid and 0 < entry.first_sector <= entry.length:
                    found.append(entry)
        return found

    def _intact(self, entry: Entry) -> bool:
        crc = stored = 0
        for number, piece in enumerate(self._pieces(entry.at, entry.length)):
            if number == 0:
                stored = int.from_bytes(piece[4:8], "little")
                crc = crc32c(piece[8:], crc32c(piece[:4] + bytes(4)))
            else:
                crc = crc32c(piece, crc)
        return crc == stored

    def _valid(self) -> dict[int, Entry]:
        """Return the entries whose checksum is right, by place. Raises FormatError where too many overlap."""
        room = _MOST_READINGS * self.region.length
        valid = {}
        for entry in self._candidates():
            room -= entry.length
            if room < 0:
                raise FormatError(
                    "the log's entries overlap too often to be searched",
                    structure="log",
                    field="entry_length",
                    offset=self.region.offset + entry.at,
                    found=entry.length,
                )
            if self._intact(entry):
                valid[entry.at] = entry
        return valid

    def active(self) -> list[Entry]:
        """Return the active sequence, the oldest entry first (2.3.2).

        A sequence is valid where each entry follows on its predecessor in place and number and where the newest one's
        tail is one of them; the one with the highest number is active. Raises FormatError where there is none.
        """
        valid = self._valid()
        best: list[Entry] = []
        for head in sorted(valid.values(), key=lambda entry: entry.sequence, reverse=True):
            follower = valid.get((head.at + head.length) % self.region.length)
            if follower is not None and follower.sequence == head.sequence + 1:
                continue
            best = self._back_to_tail(head, valid)
            if best:
                break
        if not best:
            raise FormatError(
                "its log must be replayed, but holds no valid sequence of entries: the log is damaged",
                structure="log",
                offset=self.region.offset,
                expected="a log entry of this log with a right checksum",
                found=f"{len(valid)} such entries" if valid else "none",
            )
        return best

    def _back_to_tail(self, head: Entry, valid: dict[int, Entry]) -> list[Entry]:
        """Return the entries from the head's tail up to the head; none if they do not lead there."""
        chain: list[Entry] = []
        entry = valid.get(head.tail)
        while entry is not None and entry.sequence <= head.sequence and len(chain) <= len(valid):
            chain.append(entry)
            if entry is head:
                return chain
            follower = valid.get((entry.at + entry.length) % self.region.length)
            entry = follower if follower is not None and follower.sequence == entry.sequence + 1 else None
        return []

    def replay(self) -> ReplayedSource:
        """Return the file as it is with the log replayed; the file itself stays as it is.

        Raises FormatError where the log is damaged, or the file shorter than the log says it was.
        """
        entries = self.active()
        head = entries[-1]
        if self._source.size < head.flushed:
            raise FormatError(
                "the file is truncated: it was larger when its log was written",
                structure="log entry",
                field="flushed_file_offset",
                offset=self.region.offset + head.at + 48,
                expected=f"{head.flushed} bytes",
                found=self._source.size,
            )
        size = max(self._source.size, head.last)
        if size >> 63:
            raise FormatError(
                "the log says the file has an impossible size",
                structure="log entry",
                field="last_file_offset",
                offset=self.region.offset + head.at + 56,
                found=head.last,
            )
        if sum(entry.descriptors for entry in entries) > _MOST_DESCRIPTORS:
            raise UnsupportedError("has a log of too many changes", feature="large log", structure="log")
        changes = [change for entry in entries for change in self._changes(entry, size)]
        return ReplayedSource(self._source, _resolved(changes), size, entries)

    def _changes(self, entry: Entry, size: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield a PATCH for each descriptor of an entry, in order."""
        used = LOG_ENTRY_DTYPE.itemsize + DESCRIPTOR_DTYPE.itemsize * entry.descriptors
        block = b"".join(self._pieces(entry.at, used))
        rows = np.frombuffer(block, DESCRIPTOR_DTYPE, entry.descriptors, LOG_ENTRY_DTYPE.itemsize)
        sector = entry.first_sector
        for number, (signature, trailing, leading, start, sequence) in enumerate(rows.tolist()):
            at = self.region.offset + (entry.at + 64 + 32 * number) % self.region.length
            if signature not in {b"desc", b"zero"} or sequence != entry.sequence:
                raise FormatError(
                    "a descriptor of the log does not belong to its entry",
                    structure="log descriptor",
                    field="signature" if sequence == entry.sequence else "sequence_number",
                    offset=at,
                    expected=f"desc or zero, number {entry.sequence}",
                    found=f"{signature!r}, number {sequence}",
                )
            length = LOG_SECTOR if signature == b"desc" else leading
            self._require_target(start, length, size, at)
            if signature == b"zero":
                yield start, start + length, 0, 0, 0
                continue
            place = self.region.offset + (entry.at + sector) % self.region.length
            self._require_sector(entry, sector, place)
            yield start, start + LOG_SECTOR, place, leading, trailing
            sector += LOG_SECTOR

    def _require_sector(self, entry: Entry, sector: int, place: int) -> None:
        if sector + LOG_SECTOR > entry.length:
            raise FormatError(
                "a log entry has fewer data sectors than descriptors",
                structure="log entry",
                field="descriptor_count",
                offset=self.region.offset + entry.at + 24,
                found=entry.descriptors,
            )
        row = np.frombuffer(self._source.read(place, LOG_SECTOR), DATA_SECTOR_DTYPE)[0]
        sequence = int(row["sequence_high"]) << 32 | int(row["sequence_low"])
        if row["signature"] != b"data" or sequence != entry.sequence:
            raise FormatError(
                "a data sector of the log does not belong to its entry",
                structure="log data sector",
                field="signature" if sequence == entry.sequence else "sequence_high",
                offset=place,
                expected=f"data, number {entry.sequence}",
                found=f"{bytes(row['signature'])!r}, number {sequence}",
            )

    def _require_target(self, start: int, length: int, size: int, at: int) -> None:
        """Check where a change goes: into the file, not into what was read already to find it."""
        aligned = start % LOG_SECTOR == 0 and length % LOG_SECTOR == 0
        outside = start + length <= self.region.offset or start >= self.region.stop
        if aligned and outside and start + length <= size and not HEADERS_AT[0] < start + length <= REGION_TABLES_AT[0]:
            return
        raise FormatError(
            "a descriptor of the log points where no change may go",
            structure="log descriptor",
            field="file_offset",
            offset=at,
            expected=f"4 KiB pieces within {size} bytes, neither in the headers nor in the log",
            found=f"{length} bytes at {start}",
        )


def _resolved(changes: list[tuple[int, int, int, int, int]]) -> NDArray[np.void]:
    """Return PATCH rows, sorted and apart: where changes overlap, the last one holds."""
    changes = [change for change in changes if change[1] > change[0]]
    order = sorted(range(len(changes)), key=lambda index: changes[index][0])
    points = sorted({point for change in changes for point in change[:2]})
    rows: list[tuple[int, int, int, int, int]] = []
    open_now: list[int] = []  # a heap of negated numbers: the last change is its smallest
    taken = 0
    for low, high in pairwise(points):
        while taken < len(order) and changes[order[taken]][0] <= low:
            heapq.heappush(open_now, -order[taken])
            taken += 1
        while open_now and changes[-open_now[0]][1] <= low:
            heapq.heappop(open_now)
        if open_now:
            rows.append((low, high, *changes[-open_now[0]][2:]))
    return np.array(rows, PATCH)


class ReplayedSource(ByteSource):
    """A file with its log's changes over it. `entries` are those that were replayed."""

    def __init__(self, source: ByteSource, patches: NDArray[np.void], size: int, entries: list[Entry]) -> None:
        self.name = source.name
        self.size = size
        self.base = source
        self.patches = patches
        self.entries = entries

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        stop = min(offset + len(buffer), self.size)
        if stop <= offset:
            return 0
        below = max(0, min(stop, self.base.size) - offset)
        self.base.read_into(offset, buffer[:below])
        if below < stop - offset:
            buffer[below : stop - offset] = bytes(stop - offset - below)
        first = int(np.searchsorted(self.patches["stop"], np.uint64(offset), side="right"))
        last = int(np.searchsorted(self.patches["start"], np.uint64(stop), side="left"))
        for patch in self.patches[first:last]:
            low, high = max(int(patch["start"]), offset), min(int(patch["stop"]), stop)
            buffer[low - offset : high - offset] = self.patched(patch, low, high)
        return stop - offset

    def patched(self, patch: np.void, low: int, high: int) -> bytes:
        """Return what a patch says of low..high of the file, which lie in it."""
        if not patch["sector"]:
            return bytes(high - low)
        sector = self.base.read(int(patch["sector"]), LOG_SECTOR)
        whole: bytes = patch["leading"].tobytes() + sector[8:-4] + patch["trailing"].tobytes()
        return whole[low - int(patch["start"]) : high - int(patch["start"])]

    @property
    def path(self) -> Path | None:
        """See ByteSource."""
        return self.base.path

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self.base.verify_unchanged()

    def close(self) -> None:
        """See ByteSource."""
        self.base.close()
