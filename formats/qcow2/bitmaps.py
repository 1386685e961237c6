"""Persistent dirty bitmaps, read from an image and laid out in a new one ("Bitmaps" of the specification)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.allocator import Write
from diskmorph.formats.bitmaps import DirtyBitmap
from diskmorph.formats.errors import FormatError
from diskmorph.formats.qcow2 import schema as s

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.qcow2.extensions import BitmapEntry
    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.source import ByteSource

IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4
DIRTY_TRACKING = 1
GRANULARITY_BITS = (9, 31)
ALL_ONES = 1
"""Entry of a bitmap table without an offset: every bit of the cluster is set."""


def size_of(disk_size: int, granularity: int) -> int:
    """Return the bytes of a bitmap."""
    bits = -(-disk_size // granularity)
    return (bits + 7) // 8


def usable(
    source: ByteSource, header: Header, entries: Sequence[BitmapEntry], limits: Limits
) -> tuple[DirtyBitmap, ...]:
    """Return the bitmaps that can be relied on: not those in use (the image was not closed), nor of unknown kinds."""
    found = []
    for entry in entries:
        known = not entry.flags & ~(AUTO | EXTRA_COMPATIBLE) and entry.type == DIRTY_TRACKING
        if not known or (entry.extra and not entry.flags & EXTRA_COMPATIBLE):
            continue
        if not GRANULARITY_BITS[0] <= entry.granularity_bits <= GRANULARITY_BITS[1]:
            continue
        granularity = 1 << entry.granularity_bits
        size = size_of(header.size, granularity)
        table = _Table(source, header.cluster, entry, size, limits)
        found.append(DirtyBitmap(entry.name, granularity, size, bool(entry.flags & AUTO), table.read))
    return tuple(found)


class _Table:
    """A bitmap table, read when it is first asked for."""

    def __init__(self, source: ByteSource, cluster: int, entry: BitmapEntry, size: int, limits: Limits) -> None:
        self._source, self._cluster, self._entry, self._size, self._limits = source, cluster, entry, size, limits
        self._rows: NDArray[np.uint64] | None = None

    def _table(self) -> NDArray[np.uint64]:
        if self._rows is None:
            entry, wanted = self._entry, -(-self._size // self._cluster)
            if entry.table_size != wanted or wanted * 8 > self._limits.resident_table:
                raise self._bad("has another number of entries than the disk needs", wanted, entry.table_size)
            rows = np.frombuffer(self._source.read(entry.table_offset, wanted * 8), s.ENTRY).astype(np.uint64)
            if (rows & np.uint64(s.BITMAP_TABLE_RESERVED)).any():
                raise self._bad("has reserved bits set", 0, "reserved bits")
            self._rows = rows
        return self._rows

    def _bad(self, problem: str, expected: object, found: object) -> FormatError:
        return FormatError(
            f"the table of bitmap {self._entry.name!r} {problem}",
            file=self._source.name,
            format="qcow2",
            structure="bitmap table",
            offset=self._entry.table_offset,
            expected=expected,
            found=found,
        )

    def read(self, offset: int, length: int) -> bytes:
        """See DirtyBitmap."""
        table, parts = self._table(), []
        at, stop = offset, min(offset + length, self._size)
        while at < stop:
            number, skip = divmod(at, self._cluster)
            count = min(self._cluster - skip, stop - at)
            entry = int(table[number])
            host = entry & s.OFFSET_MASK
            if host:
                parts.append(self._source.read(host + skip, count))
            else:
                parts.append((b"\xff" if entry & ALL_ONES else b"\0") * count)
            at += count
        return b"".join(parts)


class NewBitmaps:
    """The bitmaps of a new image: which of their clusters must be stored, and where all of it goes."""

    def __init__(self, bitmaps: Sequence[DirtyBitmap], cluster: int) -> None:
        self._bitmaps, self._cluster = bitmaps, cluster
        self._kinds = [_kinds(bitmap, cluster) for bitmap in bitmaps]
        entry = s.BITMAP_ENTRY.sizeof()
        lengths = [entry + len(bitmap.name.encode()) for bitmap in bitmaps]
        self.directory_size = sum(-(-length // 8) * 8 for length in lengths)

    @property
    def count(self) -> int:
        """Return how many there are."""
        return len(self._bitmaps)

    def room(self) -> int:
        """Return the bytes of the file that data, tables and directory take: whole clusters."""
        clusters = sum(int((kinds == 0).sum()) + self._clusters(len(kinds) * 8) for kinds in self._kinds)
        return (clusters + self._clusters(self.directory_size)) * self._cluster

    def _clusters(self, size: int) -> int:
        return -(-size // self._cluster)

    def writes(self, at: int) -> Iterator[Write]:
        """Yield data, tables and, last, the directory, from `at` on."""
        directory = b""
        for bitmap, kinds in zip(self._bitmaps, self._kinds, strict=True):
            table = np.where(kinds == 2, ALL_ONES, 0).astype(np.uint64)
            stored = np.flatnonzero(kinds == 0)
            table[stored] = np.uint64(at) + np.arange(len(stored), dtype=np.uint64) * np.uint64(self._cluster)
            for number in stored.tolist():
                yield Write(0, at, _piece(bitmap, number, self._cluster))
                at += self._cluster
            yield Write(0, at, table.astype(s.ENTRY).tobytes())
            directory += _entry(bitmap, at, len(kinds))
            at += self._clusters(len(kinds) * 8) * self._cluster
        yield Write(0, at, directory)

    def directory_offset(self, at: int) -> int:
        """Return where `writes(at)` puts the directory."""
        return at + self.room() - self._clusters(self.directory_size) * self._cluster

    def extension(self, at: int) -> bytes:
        """Return the data of the header extension, everything lying from `at` on."""
        return s.BITMAPS.build(
            {
                "count": self.count,
                "reserved": 0,
                "directory_size": self.directory_size,
                "directory_offset": self.directory_offset(at),
            }
        )


def _entry(bitmap: DirtyBitmap, table_offset: int, table_size: int) -> bytes:
    name = bitmap.name.encode()
    raw = s.BITMAP_ENTRY.build(
        {
            "table_offset": table_offset,
            "table_size": table_size,
            "flags": AUTO * bitmap.auto,
            "type": DIRTY_TRACKING,
            "granularity_bits": bitmap.granularity.bit_length() - 1,
            "name_size": len(name),
            "extra_size": 0,
        }
    )
    return raw + name + bytes(-(len(raw) + len(name)) % 8)


def _piece(bitmap: DirtyBitmap, number: int, cluster: int) -> bytes:
    return bitmap.read(number * cluster, cluster).ljust(cluster, b"\0")


def _kinds(bitmap: DirtyBitmap, cluster: int) -> NDArray[np.uint8]:
    """Return for each cluster of a bitmap: 1 all zeroes, 2 all ones, 0 something that must be stored."""
    ones, zeroes = b"\xff" * cluster, bytes(cluster)
    kind = {zeroes: 1, ones: 2}
    pieces = map(partial(_piece, bitmap, cluster=cluster), range(-(-bitmap.size // cluster)))
    return np.array([kind.get(piece, 0) for piece in pieces], np.uint8)
