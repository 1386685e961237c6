"""Disks made of other disks: they hold no format's knowledge.

`Slice` is a partition or an archive member, `Overlay` a chain, `Regions` a disk put together from pieces, `Mapped` one
given by its extents, `Zero` and `Memory` what they say.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.disk import Disk
from diskmorph.formats.extents import ABSENT, DATA, EXTENT, HOLE, ZERO, clip, cut, plain_runs, row, stops
from diskmorph.formats.rows import copied, either, joined
from diskmorph.formats.source import ByteSource, BytesSource, WindowSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.source import Buffer


class Zero(Disk):
    """A disk without any data."""

    format = "zero"

    def __init__(self, size: int, *, kind: int = HOLE, sector_size: int = 512) -> None:
        self.size = size
        self.sector_size = sector_size
        self._kind = kind

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        yield row(start, stop - start, self._kind)


class SourceDisk(Disk):
    """A ByteSource as a disk: its data where it has data, holes where it has none."""

    format = "raw"

    def __init__(self, source: ByteSource, *, sector_size: int = 512) -> None:
        self.size = source.size
        self.sector_size = sector_size
        self.files = (source,)
        self.name = source.name

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        return plain_runs(self.files[0].runs(start, stop))


class Memory(SourceDisk):
    """A byte string as a disk."""

    def __init__(self, data: Buffer, *, sector_size: int = 512) -> None:
        super().__init__(BytesSource(data), sector_size=sector_size)


class Mapped(Disk):
    """A disk given by its extents: sorted, gapless rows from 0 to the end, pointing into `files`."""

    format = "mapped"

    def __init__(self, rows: NDArray[np.void], files: Sequence[ByteSource], *, sector_size: int = 512) -> None:
        self._rows = rows
        self.size = int(stops(rows)[-1]) if len(rows) else 0
        self.files = tuple(files)
        self.sector_size = sector_size

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        yield clip(self._rows, start, stop)


class _Derived(Disk):
    """A view whose encoded units are decoded by the disk that they come from."""

    def _owner(self, file: int) -> tuple[Disk, int]:
        """Return the disk that file number `file` belongs to, and its number there."""
        raise NotImplementedError

    def decode_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> bytes | bytearray:
        owner, index = self._owner(file)
        return owner.decode_unit(index, offset, stored, codec, least, held)

    def encoded_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> tuple[bytes | bytearray, Buffer]:
        owner, index = self._owner(file)
        return owner.encoded_unit(index, offset, stored, codec, least, held)

    def verify_unchanged(self) -> None:
        for disk in self._parts():
            disk.verify_unchanged()

    def close(self) -> None:
        for disk in self._parts():
            disk.close()

    def _parts(self) -> Sequence[Disk]:
        raise NotImplementedError


class DiskSource(ByteSource):
    """A disk as a source of bytes, for readers of what lies inside it. Small reads are served from windows kept."""

    _WINDOW = 256 << 10
    _KEPT = 16

    def __init__(self, disk: Disk) -> None:
        self.name = disk.name
        self.size = disk.size
        self._disk = disk
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def of(disk: Disk) -> ByteSource:
        """Return a disk's bytes, closing which closes the disk.

        That is its file itself, or a window of it, where the disk is that and nothing more.
        """
        if isinstance(disk, Slice):
            return _SliceSource(DiskSource.of(disk.disk), disk.offset, disk.size, disk.name)
        plain = disk.format == "raw" and len(disk.files) == 1 and disk.files[0].size == disk.size
        return disk.files[0] if plain else DiskSource(disk)

    def origins(self) -> Mapping[tuple[int, int], str]:
        """See ByteSource."""
        return {key: name for source in self._disk.files for key, name in source.origins().items()}

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        count = max(0, min(len(buffer), self.size - offset))
        if count >= self._WINDOW:
            self._disk.read_into(offset, buffer[:count])
            return count
        number, within = divmod(offset, self._WINDOW)
        piece = self._window(number)[within : within + count]
        buffer[: len(piece)] = piece
        return len(piece)

    def _window(self, number: int) -> bytes:
        with self._lock:
            found = self._kept.get(number)
            if found is not None:
                self._kept.move_to_end(number)
                return found
        start = number * self._WINDOW
        found = self._disk.read(start, min(self._WINDOW, self.size - start))
        with self._lock:
            self._kept[number] = found
            if len(self._kept) > self._KEPT:
                self._kept.popitem(last=False)
        return found

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """See ByteSource."""
        for batch in self._disk.extents(start, stop):
            kinds = batch["kind"].tolist()
            for at, length, kind in zip(batch["start"].tolist(), batch["length"].tolist(), kinds, strict=True):
                yield at, length, kind == DATA

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self._disk.verify_unchanged()

    def close(self) -> None:
        """See ByteSource."""
        self._disk.close()


class _SliceSource(WindowSource):
    """A window that closes what it looks into."""

    def close(self) -> None:
        self._source.close()


class Slice(_Derived):
    """`length` bytes of a disk from `offset`: a partition."""

    def __init__(self, disk: Disk, offset: int, length: int, name: str | None = None) -> None:
        disk._require_range(offset, offset + length)  # noqa: SLF001 - a view of the same kind
        self._disk, self._offset = disk, offset
        self.size = length
        self.sector_size = disk.sector_size
        self.files = disk.files
        self.format, self.name = disk.format, name or disk.name

    @property
    def disk(self) -> Disk:
        """The disk that this is a part of."""
        return self._disk

    @property
    def offset(self) -> int:
        """Where on the disk it begins, in bytes."""
        return self._offset

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        for batch in self._disk.extents(self._offset + start, self._offset + stop):
            rows = copied(batch)
            rows["start"] -= np.uint64(self._offset)
            yield rows

    def _owner(self, file: int) -> tuple[Disk, int]:
        return self._disk, file

    def _parts(self) -> Sequence[Disk]:
        return (self._disk,)


class Overlay(_Derived):
    """A layer over its parent: what the layer lacks (ABSENT) is the parent's; beyond a short parent, a hole."""

    def __init__(self, top: Disk, parent: Disk) -> None:
        self._top, self._parent = top, parent
        self.size = top.size
        self.sector_size = top.sector_size
        self.files = (*top.files, *parent.files)
        self._shift = len(top.files)
        self.format, self.name = top.format, top.name

    @property
    def layers(self) -> tuple[Disk, ...]:
        """The disks of the chain, the top first."""
        below = self._parent.layers if isinstance(self._parent, Overlay) else (self._parent,)
        return (self._top, *below)

    def _owner(self, file: int) -> tuple[Disk, int]:
        return (self._top, file) if file < self._shift else (self._parent, file - self._shift)

    def _parts(self) -> Sequence[Disk]:
        return (self._top, self._parent)

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        for rows in self._top.extents(start, stop):
            absent = np.flatnonzero(rows["kind"] == ABSENT)
            if not len(absent):
                yield rows
                continue
            # All rows of the batch between its first and last absent one meet the parent's rows for that range.
            low, high = int(absent[0]), int(absent[-1]) + 1
            yield rows[:low]
            yield from self._merged(rows[low:high])
            yield rows[high:]

    def _merged(self, rows: NDArray[np.void]) -> Iterator[NDArray[np.void]]:
        start, stop = int(rows["start"][0]), int(stops(rows)[-1])
        for below in self._below(start, stop):
            first, last = int(below["start"][0]), int(stops(below)[-1])
            yield _merge(clip(rows, first, last), below, self._shift)

    def _below(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        end = min(stop, max(self._parent.size, start))
        if start < end:
            yield from self._parent.extents(start, end)
        if end < stop:
            yield row(end, stop - end, HOLE)


def _merge(top: NDArray[np.void], below: NDArray[np.void], shift: int) -> NDArray[np.void]:
    """Return the rows of `top` with its ABSENT ranges taken from `below`; both cover the same range."""
    fine = cut(top, below["start"])
    absent = fine["kind"] == ABSENT
    under = cut(below, fine["start"])
    out = either(absent, under, fine)
    data = absent & (under["kind"] == DATA)
    out["file"] += np.where(data, shift, 0).astype(np.uint32)
    out["depth"] += np.where(absent & (under["kind"] != HOLE), 1, 0).astype(np.uint8)
    return out


class Regions(_Derived):
    """A disk put together, piece after piece, from byte strings, ranges of files, disks and holes.

    `add_*` append at the end; then it is read like any disk. Pieces cost one row each, so hundreds of thousands are
    fine.
    """

    format = "regions"

    def __init__(self, *, sector_size: int = 512) -> None:
        self.size = 0
        self.sector_size = sector_size
        self._sources: list[ByteSource] = []
        self._index: dict[int, int] = {}
        self._pieces: list[NDArray[np.void]] = []
        self._disks: list[tuple[int, Disk, int]] = []  # start, disk, first file number
        self._owners: list[tuple[Disk | None, int]] = []
        self._rows: NDArray[np.void] | None = None

    def add_bytes(self, data: Buffer) -> None:
        """Append a byte string."""
        self.add_range(BytesSource(data), 0, len(data))

    def add_range(self, source: ByteSource, offset: int, length: int) -> None:
        """Append `length` bytes of a source from `offset`."""
        if length:
            self._append(row(self.size, length, DATA, offset=offset, file=self._file(source)))

    def add_hole(self, length: int, kind: int = HOLE) -> None:
        """Append `length` bytes of nothing: HOLE or ZERO."""
        if length:
            self._append(row(self.size, length, kind))

    def add_rows(self, rows: NDArray[np.void], files: Sequence[ByteSource]) -> None:
        """Append ready rows (starting at 0, gapless) that point into `files`; for builders with many pieces."""
        if not len(rows):
            return
        numbers = np.array([self._file(source) for source in files] or [0], np.uint32)
        rows = copied(rows)
        rows["start"] += np.uint64(self.size)
        data = rows["kind"] == DATA
        rows["file"] = np.where(data, numbers[np.minimum(rows["file"], len(numbers) - 1)], 0)
        self._append(rows)

    def add_disk(self, disk: Disk) -> None:
        """Append a whole disk; its extents are asked for when they are needed."""
        if not disk.size:
            return
        first = len(self._sources)
        self._sources.extend(disk.files)
        self._owners.extend((disk, number) for number in range(len(disk.files)))
        self._disks.append((self.size, disk, first))
        self._append(row(self.size, disk.size, ABSENT))  # ABSENT marks a nested disk; no piece is otherwise absent

    def pad_to(self, offset: int) -> None:
        """Append a hole up to `offset`."""
        if offset < self.size:
            raise ValueError(f"pad_to({offset}): already {self.size} bytes")
        self.add_hole(offset - self.size)

    def _append(self, rows: NDArray[np.void]) -> None:
        self._pieces.append(rows)
        self._rows = None
        self.size = int(stops(rows)[-1])
        self.files = self._sources

    def _file(self, source: ByteSource) -> int:
        number = self._index.get(id(source))
        if number is None:
            number = self._index[id(source)] = len(self._sources)
            self._sources.append(source)
            self._owners.append((None, 0))
        return number

    def _table(self) -> NDArray[np.void]:
        if self._rows is None:
            self._rows = joined(self._pieces) if self._pieces else np.zeros(0, EXTENT)
            self._pieces = [self._rows]
        return self._rows

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        rows = clip(self._table(), start, stop)
        nested = np.flatnonzero(rows["kind"] == ABSENT)
        at = 0
        for index in nested.tolist():
            yield rows[at:index]
            yield from self._nested(int(rows["start"][index]), int(stops(rows)[index]))
            at = index + 1
        yield rows[at:]

    def _nested(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        begin, disk, first = self._disks[bisect_right(self._disks, start, key=lambda entry: entry[0]) - 1]
        for batch in disk.extents(start - begin, stop - begin):
            rows = copied(batch)
            rows["start"] += np.uint64(begin)
            rows["file"] += np.where(rows["kind"] == DATA, first, 0).astype(np.uint32)
            yield rows

    def _owner(self, file: int) -> tuple[Disk, int]:
        owner, number = self._owners[file]
        if owner is None:
            raise LookupError(f"file {file} holds no encoded units")
        return owner, number

    def _parts(self) -> Sequence[Disk]:
        return [disk for _, disk, _ in self._disks]

    def verify_unchanged(self) -> None:
        """See Disk."""
        for source in self._sources:
            source.verify_unchanged()

    def close(self) -> None:
        """See Disk."""
        super().close()
        for source in self._sources:
            source.close()


def grown(disk: Disk, size: int) -> Disk:
    """Return the disk with a hole appended up to `size` bytes; itself where it has that size."""
    if size <= disk.size:
        return disk
    regions = Regions(sector_size=disk.sector_size)
    regions.add_disk(disk)
    regions.pad_to(size)
    regions.format, regions.name = disk.format, disk.name
    return regions


__all__ = [
    "HOLE",
    "ZERO",
    "DiskSource",
    "Mapped",
    "Memory",
    "Overlay",
    "Regions",
    "Slice",
    "SourceDisk",
    "Zero",
    "grown",
]
