"""The extents that a disk is made of: flat files, zeroes, and what is common to the sparse kinds."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diskmorph.formats.errors import FormatError
from diskmorph.formats.extents import DATA, EXTENT, HOLE, PLAIN, ZERO, clip, plain_runs, require_within, row
from diskmorph.formats.vmdk.schema import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.source import Buffer, ByteSource

_CHUNK_ENTRIES = 1 << 17
_CACHED_TABLES = 64


class Extent(ABC):
    """A part of the disk: `size` bytes, kept in `source`, or in no file. `kind` is the word of its extent line."""

    size: int
    source: ByteSource | None = None
    kind: ClassVar[str]
    grain: int | None = None
    warnings: tuple[str, ...] = ()

    @abstractmethod
    def rows(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        """Yield sorted, gapless EXTENT rows over start..stop (bytes in the extent), all with file number 0."""

    def decode(self, offset: int, stored: int, held: ByteSource | None = None) -> tuple[bytes | bytearray, Buffer]:
        """Return the compressed grain whose zlib stream begins at `offset` and takes at most `stored` bytes.

        The second is the stream itself; nothing where its end is not known.
        """
        raise NotImplementedError


class ZeroExtent(Extent):
    """A part that reads as zeroes and has no file."""

    kind = "ZERO"

    def __init__(self, size: int) -> None:
        self.size = size

    def rows(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        """See Extent."""
        yield row(start, stop - start, ZERO)


class FlatExtent(Extent):
    """A part that lies in its file as it is, from byte `offset`. `hole` is what the file's own holes are."""

    kind = "FLAT"

    def __init__(self, source: ByteSource, size: int, offset: int, hole: int = HOLE) -> None:
        self.source, self.size = source, size
        self._offset, self._hole = offset, hole
        if offset + size > source.size:
            raise FormatError(
                "the extent lies beyond the end of its file",
                file=source.name,
                format="vmdk",
                structure="extent",
                offset=offset,
                expected=f"{size} bytes",
                found=f"the end at {source.size}",
                hint="restore the whole file",
            )

    def rows(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        """See Extent."""
        if self.source is None:
            return
        yield from plain_runs(
            self.source.runs(self._offset + start, self._offset + stop), base=self._offset, hole=self._hole
        )


class GrainTables(Extent):
    """A sparse extent: a directory of tables whose entries say where each grain lies.

    `tables` holds the byte offset of each grain table, 0 where there is none; `empty` is what an unallocated grain is
    (HOLE, or ABSENT where a parent is asked). Tables are read when they are needed, in batches.
    """

    kind = "SPARSE"
    dtype: ClassVar[np.dtype[Any]]
    source: ByteSource

    def __init__(
        self, source: ByteSource, size: int, *, grain: int, entries: int, tables: NDArray[np.uint64], empty: int
    ) -> None:
        self.source, self.size = source, size
        self.grain: int = grain
        self.entries = entries
        self.tables = tables
        self.empty = empty
        self._used = np.flatnonzero(tables)
        self._step = max(1, _CHUNK_ENTRIES // entries)
        self._cache: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    @abstractmethod
    def resolve(self, first: int, entries: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """Return kind and byte offset of each of the entries, the first being that of grain `first`."""

    @property
    def table_bytes(self) -> int:
        """Bytes of one grain table."""
        return self.entries * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        """See Extent."""
        span = self.grain * self.entries
        at, last = start // span, -(-stop // span)
        while at < last:
            position = int(np.searchsorted(self._used, at))
            used = min(int(self._used[position]), last) if position < len(self._used) else last
            if used > at:
                yield clip(row(at * span, (used - at) * span, self.empty), start, stop)
                at = used
                continue
            upto = min(at + self._step, last)
            part = clip(self.chunk(at, upto), start, stop)
            require_within(part, [self.source.size], file=self.source.name, format="vmdk", structure="grain")
            yield part
            at = upto

    def chunk(self, first: int, last: int) -> NDArray[np.void]:
        """Return the rows of tables first..last."""
        unit = first * self.entries
        kinds, offsets = self.resolve(unit, self.load(first, last))
        return self.compact(unit, kinds, offsets)

    def compact(self, first: int, kinds: NDArray[np.uint8], offsets: NDArray[np.uint64]) -> NDArray[np.void]:
        """Return rows of grains from number `first`, neighbours merged that continue each other."""
        data = kinds == DATA
        same = kinds[1:] == kinds[:-1]
        same &= ~data[1:] | (offsets[1:] == offsets[:-1] + np.uint64(self.grain))
        heads = np.concatenate(([0], np.flatnonzero(~same) + 1))
        return self.build(first, len(kinds), heads, kinds[heads], offsets[heads])

    def build(
        self, first: int, count: int, heads: NDArray[Any], kinds: NDArray[np.uint8], offsets: NDArray[np.uint64]
    ) -> NDArray[np.void]:
        """Return the rows that begin at the grains `heads` (of `count`, counted from `first`)."""
        rows = np.zeros(len(heads), EXTENT)
        rows["start"] = (heads + first).astype(np.uint64) * np.uint64(self.grain)
        rows["length"] = np.diff(np.append(heads, count)).astype(np.uint64) * np.uint64(self.grain)
        rows["kind"] = kinds
        rows["codec"] = PLAIN
        rows["offset"] = np.where(kinds == DATA, offsets, np.uint64(0))
        return rows

    def load(self, first: int, last: int) -> NDArray[Any]:
        """Return the entries of tables first..last, zeroes for those that do not exist."""
        if last - first > 4:
            return self._load(first, last)
        return np.concatenate([self._cached(number) for number in range(first, last)])

    def _cached(self, number: int) -> NDArray[Any]:
        with self._lock:
            found = self._cache.get(number)
        if found is not None:
            return found
        table = self._load(number, number + 1)
        with self._lock:
            self._cache[number] = table
            while len(self._cache) > _CACHED_TABLES:
                self._cache.popitem(last=False)
        return table

    def _load(self, first: int, last: int) -> NDArray[Any]:
        return load_tables(self.source, self.tables[first:last], self.entries, self.dtype)


def load_tables(source: ByteSource, tables: NDArray[np.uint64], entries: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the entries of the tables at byte offsets `tables` (0: a table of zeroes), neighbours read at once."""
    out = np.zeros((len(tables), entries), dtype)
    where = np.flatnonzero(tables)
    offsets = tables[where]
    stride = entries * dtype.itemsize
    heads = [0, *(np.flatnonzero(np.diff(offsets) != stride) + 1).tolist(), len(where)]
    for low, high in pairwise(heads):
        if high > low:
            raw = source.read(int(offsets[low]), (high - low) * stride)
            out[where[low:high]] = np.frombuffer(raw, dtype).reshape(-1, entries)
    return out.reshape(-1)


def load_directory(
    source: ByteSource, sector: int, count: int, dtype: np.dtype[Any], name: str = "grain directory"
) -> NDArray[Any]:
    """Return the `count` entries of the directory at `sector`. Raises FormatError if it is not all in the file."""
    size = count * dtype.itemsize
    if sector == 0 or sector * SECTOR + size > source.size:
        raise FormatError(
            f"the {name} lies beyond the end of the file",
            file=source.name,
            format="vmdk",
            structure=name,
            offset=sector * SECTOR,
            expected=f"{size} bytes",
            found=f"the end at {source.size}",
        )
    return np.frombuffer(source.read(sector * SECTOR, size), dtype)


def require_tables(
    source: ByteSource, tables: NDArray[np.uint64], table_bytes: int, name: str = "grain directory"
) -> None:
    """Raise FormatError if a grain table lies beyond the file, in its first sector or over another table."""
    used = np.sort(tables[tables != 0])
    if not len(used):
        return
    problem, at = None, 0
    if int(used[-1]) + table_bytes > source.size:
        problem, at = "a grain table lies beyond the end of the file", int(used[-1])
    elif (clash := np.flatnonzero(np.diff(used) < table_bytes)).size:
        problem, at = "two grain tables lie at one place", int(used[clash[0]])
    if problem is not None:
        index = int(np.flatnonzero(tables == at)[0])
        raise FormatError(
            problem,
            file=source.name,
            format="vmdk",
            structure=name,
            field=f"entry {index}",
            offset=at,
            found=at // SECTOR,
        )
