"""L1 and L2 tables as arrays: read in large pieces, judged and turned into extents as wholes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.extents import ABSENT, DATA, DEFLATE, EXTENT, HOLE, ZERO, ZSTD
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.header import bad

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.source import ByteSource

CHUNK = 4 << 20
"""Bytes of L2 tables that are read and held at once."""
_GAP = 64 << 10
"""Bytes between two tables that are read along rather than skipped."""
_CACHED = 4 << 20
_SLICE = 1 << 14
_U = np.uint64


def read_l1(source: ByteSource, offset: int, entries: int) -> NDArray[np.uint64]:
    """Return an L1 table (already known to lie in the file) in the machine's byte order."""
    return np.frombuffer(source.read(offset, entries * 8), s.ENTRY).astype(_U)


def l2_offsets(l1: NDArray[np.uint64], header: Header, source: ByteSource, l1_offset: int) -> NDArray[np.uint64]:
    """Return the offsets of L2 tables (0: none) of L1 entries.

    Raises FormatError for reserved bits, misaligned tables and tables that do not lie wholly in the file.
    """
    offsets = l1 & _U(s.OFFSET_MASK)
    wrong = (l1 & _U(s.L1_RESERVED)) != 0
    wrong |= (offsets & _U(header.cluster - 1)) != 0
    room = max(source.size - header.cluster, 0)
    wrong |= offsets > _U(room)
    found = np.flatnonzero(wrong)
    if not len(found):
        return offsets
    index = int(found[0])
    entry, offset = int(l1[index]), int(offsets[index])
    if entry & s.L1_RESERVED:
        problem, expected = "an L1 entry has reserved bits set", "zeroes"
    elif offset % header.cluster:
        problem, expected = "an L2 table does not begin on a cluster", f"a multiple of {header.cluster}"
    else:
        raise bad(
            "the image is truncated: an L2 table lies beyond its end",
            source,
            "L2 table",
            field="offset",
            offset=offset,
            expected=f"{header.cluster} bytes",
            found=f"the end at {source.size}",
        )
    raise bad(
        problem,
        source,
        "L1 table",
        field=f"entry {index}",
        offset=l1_offset + 8 * index,
        expected=expected,
        found=f"{entry:#018x}",
    )


class L2Reader:
    """Reads L2 tables: many at once in large pieces, or single ones through a small cache. Thread-safe."""

    def __init__(self, source: ByteSource, header: Header) -> None:
        self._source, self._header = source, header
        self._cache: OrderedDict[int, NDArray[np.uint64]] = OrderedDict()
        self._lock = threading.Lock()
        self._most = max(_CACHED // header.cluster, 2)

    def one(self, offset: int) -> NDArray[np.uint64]:
        """Return one table's u64 words (two an entry where extended), from the cache if it is there."""
        with self._lock:
            table = self._cache.get(offset)
            if table is not None:
                self._cache.move_to_end(offset)
                return table
        table = np.frombuffer(self._source.read(offset, self._header.cluster), s.ENTRY).astype(_U)
        with self._lock:
            self._cache[offset] = table
            while len(self._cache) > self._most:
                self._cache.popitem(last=False)
        return table

    def many(self, offsets: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the words of several tables, one row each, zeroes where the offset is 0.

        Neighbouring tables come by one read; the caller bounds their number (CHUNK).
        """
        cluster = self._header.cluster
        out = np.zeros((len(offsets), cluster // 8), _U)
        present = np.flatnonzero(offsets)
        if not len(present):
            return out
        order = present[np.argsort(offsets[present], kind="stable")]
        at = offsets[order].astype(np.int64)
        steps = np.diff(at)
        heads = np.concatenate(([0], np.flatnonzero(steps > cluster + _GAP) + 1, [len(at)]))
        for low, high in zip(heads[:-1].tolist(), heads[1:].tolist(), strict=True):
            self._gather(at[low:high], order[low:high], out)
        return out

    def _gather(self, at: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.uint64]) -> None:
        cluster = self._header.cluster
        most = max(CHUNK // cluster, 1) * cluster
        low = 0
        while low < len(at):
            base = int(at[low])
            high = int(np.searchsorted(at, base + most - cluster, side="right"))
            data = self._source.read(base, int(at[high - 1]) + cluster - base)
            words = np.frombuffer(data, s.ENTRY).reshape(-1, cluster // 8)
            out[rows[low:high]] = words[(at[low:high] - base) // cluster]
            low = high


def chunks(l1: NDArray[np.uint64], header: Header, first: int, last: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (first, stop, empty) of L1 indices in first..last: runs without tables, and chunks that have some."""
    step = max(CHUNK // header.cluster, 1)
    used = np.flatnonzero(l1[first:last]) + first
    at = first
    while at < last:
        place = int(np.searchsorted(used, at))
        following = int(used[place]) if place < len(used) else last
        if following > at:
            yield at, following, True
            at = following
            continue
        stop = min(at + step, last)
        yield at, stop, False
        at = stop


class Judge:
    """Turns L2 entries into extents; what is wrong in them becomes a FormatError that says where."""

    def __init__(self, source: ByteSource, header: Header, *, backed: bool) -> None:
        self._source, self._header = source, header
        self._void = ABSENT if backed else HOLE
        self._codec = ZSTD if header.compression == 1 else DEFLATE
        self._file = 1 if header.has_data_file else 0
        self.end = (1 << 63) if header.has_data_file else source.size
        """Where the file that data lies in ends."""

    def rows(self, first: int, words: NDArray[np.uint64], table: int) -> Iterator[NDArray[np.void]]:
        """Yield extents of consecutive L2 entries, the first being cluster number `first`.

        `words` are the entries' u64 words, `table` the file offset of the first one, for messages (0 if unknown).
        """
        if not words.any():
            width = 2 if self._header.extended else 1
            yield self._plain_rows(np.array([first * self._header.cluster]), len(words) // width * self._header.cluster)
            return
        if not self._header.extended:
            yield self._standard(first, words, table)
            return
        pairs = words.reshape(-1, 2)
        for low in range(0, len(pairs), _SLICE):
            part = pairs[low : low + _SLICE]
            yield self._extended(first + low, part[:, 0], part[:, 1], table + 16 * low if table else 0)

    def _plain_rows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.void]:
        rows = np.zeros(len(starts), EXTENT)
        rows["start"] = starts
        rows["length"] = length
        rows["kind"] = self._void
        return rows

    def _kinds(self, entries: NDArray[np.uint64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.uint64]]:
        """Return kind, whether compressed, and host offset of standard entries."""
        offsets = entries & _U(s.OFFSET_MASK)
        packed = (entries & _U(s.COMPRESSED)) != 0
        placed = offsets != 0
        if self._header.has_data_file:
            placed |= (entries & _U(s.COPIED)) != 0  # a data file may be used from its first byte on
        kinds = np.where(placed, np.uint8(DATA), np.uint8(self._void))
        kinds[((entries & _U(s.ZERO_FLAG)) != 0) & ~packed] = ZERO
        kinds[packed] = DATA
        return kinds, packed, offsets

    def _standard(self, first: int, entries: NDArray[np.uint64], table: int) -> NDArray[np.void]:
        cluster = _U(self._header.cluster)
        kinds, packed, offsets = self._kinds(entries)
        data = kinds == DATA
        joined = kinds[1:] == kinds[:-1]
        joined &= ~data[1:] | (offsets[1:] == offsets[:-1] + cluster)
        joined &= ~(packed[1:] | packed[:-1])
        # A run of zero clusters is judged entry by entry only where its bits differ.
        joined &= ((entries[1:] ^ entries[:-1]) & _U(s.L2_RESERVED | (self._header.cluster - 1))) == 0
        heads = np.concatenate(([0], np.flatnonzero(~joined) + 1))
        self._require_entries(entries, heads, table)
        rows = np.zeros(len(heads), EXTENT)
        rows["start"] = (heads + first).astype(_U) * cluster
        rows["length"] = np.diff(np.append(heads, len(entries))).astype(_U) * cluster
        rows["kind"] = kinds[heads]
        rows["offset"] = np.where(data[heads], offsets[heads], _U(0))
        rows["file"] = np.where(data[heads], self._file, 0)
        self._compress(rows, entries[heads], packed[heads])
        return rows

    def _compress(self, rows: NDArray[np.void], entries: NDArray[np.uint64], packed: NDArray[np.bool_]) -> None:
        """Fill in offset, codec and stored bytes of compressed clusters ("Compressed Clusters Descriptor")."""
        where = np.flatnonzero(packed)
        if not len(where):
            return
        x = _U(62 - (self._header.cluster_bits - 8))
        word = entries[where] & _U(s.COMPRESSED - 1)
        offsets = word & _U((1 << int(x)) - 1)
        ends = (offsets | _U(511)) + _U(1) + (word >> x) * _U(512)
        rows["offset"][where] = offsets
        rows["file"][where] = 0
        rows["codec"][where] = self._codec
        stored = np.minimum(ends, _U(max(self._source.size, 0))).astype(np.int64) - offsets.astype(np.int64)
        rows["stored"][where] = np.maximum(stored, 1)

    def _require_entries(self, entries: NDArray[np.uint64], index: NDArray[np.int64], table: int) -> None:
        """Raise FormatError for the first of these standard entries that the specification does not allow."""
        some = entries[index]
        packed = (some & _U(s.COMPRESSED)) != 0
        wrong = ~packed & ((some & _U(s.L2_RESERVED)) != 0)
        wrong |= ~packed & ((some & _U(s.OFFSET_MASK & (self._header.cluster - 1))) != 0)
        if self._header.version < 3 or self._header.extended:
            wrong |= ~packed & ((some & _U(s.ZERO_FLAG)) != 0)
        if self._header.has_data_file:
            wrong |= packed
        found = np.flatnonzero(wrong)
        if len(found):
            self._refuse(int(some[found[0]]), int(index[found[0]]), table)

    def _refuse(self, entry: int, index: int, table: int) -> None:
        packed = bool(entry & s.COMPRESSED)
        if packed:
            problem, expected = "a compressed cluster in an image with a data file", "plain clusters"
        elif entry & s.L2_RESERVED:
            problem, expected = "an L2 entry has reserved bits set", "zeroes"
        elif entry & s.OFFSET_MASK & (self._header.cluster - 1):
            problem, expected = "a data cluster does not begin on a cluster", f"a multiple of {self._header.cluster}"
        else:
            kind = "extended L2 entries" if self._header.extended else "version 2"
            problem, expected = f"the zero flag is not allowed in {kind}", "bit 0 clear"
        width = 16 if self._header.extended else 8
        raise bad(
            problem,
            self._source,
            "L2 table",
            field=f"entry {index}",
            offset=table + width * index if table else None,
            expected=expected,
            found=f"{entry:#018x}",
        )

    def _extended(
        self, first: int, entries: NDArray[np.uint64], bitmaps: NDArray[np.uint64], table: int
    ) -> NDArray[np.void]:
        """Return extents of extended entries: whole clusters where their subclusters are alike, else 32 rows each."""
        cluster = _U(self._header.cluster)
        _, packed, offsets = self._kinds(entries)
        self._require_entries(entries, np.arange(len(entries)), table)
        self._require_bitmaps(entries, bitmaps, packed, table)
        full, zero = bitmaps == _U(s.ALL_ALLOCATED), bitmaps == _U(s.ALL_ZERO)
        alike = packed | full | zero | (bitmaps == 0)
        kinds = np.full(len(entries), self._void, np.uint8)
        kinds[full | packed] = DATA
        kinds[zero & ~packed] = ZERO
        joined = alike[1:] & alike[:-1] & (kinds[1:] == kinds[:-1]) & ~(packed[1:] | packed[:-1])
        joined &= (kinds[1:] != DATA) | (offsets[1:] == offsets[:-1] + cluster)
        heads = np.concatenate(([0], np.flatnonzero(~joined) + 1))
        rows = np.zeros(len(heads), EXTENT)
        rows["start"] = (heads + first).astype(_U) * cluster
        rows["length"] = np.diff(np.append(heads, len(entries))).astype(_U) * cluster
        rows["kind"] = kinds[heads]
        rows["offset"] = np.where(rows["kind"] == DATA, offsets[heads], _U(0))
        rows["file"] = np.where(rows["kind"] == DATA, self._file, 0)
        self._compress(rows, entries[heads], packed[heads])
        mixed = ~alike[heads]
        return self._split(rows, mixed, bitmaps[heads], offsets[heads]) if mixed.any() else rows

    def _split(
        self, rows: NDArray[np.void], mixed: NDArray[np.bool_], bitmaps: NDArray[np.uint64], offsets: NDArray[np.uint64]
    ) -> NDArray[np.void]:
        counts = np.where(mixed, s.SUBCLUSTERS, 1)
        index = np.repeat(np.arange(len(rows)), counts)
        sub = (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(_U)
        out = rows[index]
        split = mixed[index]
        size = _U(self._header.cluster // s.SUBCLUSTERS)
        bits = bitmaps[index] >> sub
        data, zero = (bits & _U(1)) != 0, (bits >> _U(32) & _U(1)) != 0
        kinds = np.where(data, DATA, np.where(zero, ZERO, self._void)).astype(np.uint8)
        out["start"] += np.where(split, sub * size, _U(0))
        out["length"] = np.where(split, size, out["length"])
        out["kind"] = np.where(split, kinds, out["kind"])
        out["offset"] = np.where(split, np.where(data, offsets[index] + sub * size, _U(0)), out["offset"])
        out["file"] = np.where(split, np.where(data, self._file, 0), out["file"])
        return out

    def _require_bitmaps(
        self, entries: NDArray[np.uint64], bitmaps: NDArray[np.uint64], packed: NDArray[np.bool_], table: int
    ) -> None:
        allocated, zero = bitmaps & _U(s.ALL_ALLOCATED), bitmaps >> _U(32)
        both = ~packed & ((allocated & zero) != 0)
        homeless = ~packed & (allocated != 0) & ((entries & _U(s.OFFSET_MASK)) == 0)
        if self._header.has_data_file:
            homeless &= (entries & _U(s.COPIED)) == 0
        found = np.flatnonzero(both | homeless | (packed & (bitmaps != 0)))
        if not len(found):
            return
        index = int(found[0])
        if packed[index]:
            problem = "a compressed cluster has a subcluster bitmap"
        elif both[index]:
            problem = "a subcluster is marked as allocated and as zero at once"
        else:
            problem = "subclusters are allocated in a cluster that has no place"
        raise bad(
            problem,
            self._source,
            "L2 table",
            field=f"bitmap of entry {index}",
            offset=table + 16 * index + 8 if table else None,
            found=f"{int(bitmaps[index]):#018x}",
        )
