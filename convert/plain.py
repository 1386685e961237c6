"""The hand that copies: plain units, cloned where they can be, read and gathered where not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.convert import buffers
from diskmorph.convert.buffers import PIECE, layout, meet, new_buffer
from diskmorph.convert.options import Moved
from diskmorph.convert.windows import CLONE, CLONE_ALIGN, READ, Window
from diskmorph.formats.allocator import RUN
from diskmorph.formats.errors import IntegrityError
from diskmorph.formats.extents import ABSENT, DATA, PLAIN, ZERO, stops
from diskmorph.formats.rows import chosen, joined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.convert.moves import Reader, Writer
    from diskmorph.formats.allocator import Allocator, Write

_FIRST_LOOK = 64 << 10


@dataclass(frozen=True, slots=True)
class Ways:
    """How a target is filled; the same for all hands of a run.

    `step` and `fine` in bytes: what has a kind of its own, and the unit of zero detection (0: none). `zero_unit`: zero
    runs shorter than that count as data. `zero_kind`: what zeroes found in data become. `ordered`: the members take
    bytes in order only. `dense`: zeroes inside stored units are written too. `stride`: where not 0, tables are settled
    on its multiples only, see `windows.Grid`.
    """

    step: int
    fine: int
    zero_unit: int
    zero_kind: int = ZERO
    ordered: bool = False
    dense: bool = False
    capacity: int = 1 << 20
    stride: int = 0

    def settled(self, upto: int, size: int) -> int:
        """Return up to where tables may be settled, when everything up to `upto` of `size` bytes is placed."""
        return upto if not self.stride or upto == size else upto // self.stride * self.stride

    @property
    def pad(self) -> int:
        """Return what pieces of a buffer are multiples of."""
        return max(self.step, self.fine or 512, 512)


@dataclass(slots=True)
class Batch:
    """One window on its way: what was asked for, what lies in the buffer, where it shall go."""

    window: Window
    runs: NDArray[np.void]
    pieces: NDArray[np.void] | None
    """PIECE rows to be written from the buffer; None where the window is too large for it and is read again."""
    placed: NDArray[np.void] | None = None
    tables: tuple[Write, ...] = ()


class PlainHand:
    """Reads a window, tells zeroes from data, asks for places, writes; one a worker."""

    def __init__(
        self, reader: Reader, base: Reader | None, writer: Writer | None, allocator: Allocator, ways: Ways
    ) -> None:
        self._reader, self._base, self._writer = reader, base, writer
        self._allocator, self._ways = allocator, ways
        self._memory: memoryview | None = None
        self._base_memory: memoryview | None = None
        self._refused = 0  # bytes of this window that were to be cloned and had to be copied
        self.done = 0
        self.moved = Moved()

    # --- before the turn

    def prepare(self, window: Window) -> Batch:
        """Read the window and find out the kinds of its grains."""
        if not window.read:
            return Batch(window, self._runs(window, None), np.zeros(0, PIECE))
        plan = layout(window.segments, self._ways.pad)
        if plan.size > self._ways.capacity:
            return Batch(window, self._runs(window, self._survey(window, plan.pieces)), None)
        runs, pieces = self._look(window, plan.pieces, plan.size)
        return Batch(window, self._runs(window, runs), pieces)

    def _runs(self, window: Window, runs: NDArray[np.void] | None) -> NDArray[np.void]:
        whole = buffers.with_segments(window, runs)
        if self._ways.zero_kind != ZERO:
            whole["kind"][whole["kind"] == ZERO] = self._ways.zero_kind
        return buffers.joined(whole)

    def _buffer(self, size: int) -> memoryview:
        if self._memory is None:
            self._memory = new_buffer(self._ways.capacity)
        return self._memory[:size]

    def _look(self, window: Window, pieces: NDArray[np.void], size: int) -> tuple[NDArray[np.void], NDArray[np.void]]:
        """Read pieces into the buffer; return their runs and what of them is not zero."""
        ways = self._ways
        buffer = self._buffer(size)
        self._reader.fill(window.rows, pieces, buffer)
        if not ways.fine:
            return buffers.runs_of(pieces, np.full(size // ways.pad, DATA, np.uint8), ways.pad), pieces
        flags = buffers.nonzero(buffer, ways.fine)
        if ways.zero_unit > ways.fine:
            flags = buffers.without_short_zeroes(flags, ways.zero_unit // ways.fine)
        full = bool(flags.all())
        if full and self._base is None:
            return _data_runs(pieces), pieces
        granule = max(ways.step, ways.fine)
        coarse = flags if granule == ways.fine else flags.reshape(-1, granule // ways.fine).any(axis=1)
        kinds = np.where(coarse, DATA, ZERO).astype(np.uint8)
        if self._base is not None:
            same = ~buffers.differing(buffer, self._base_buffer(window, pieces, size), granule)
            kinds[same] = ABSENT
        written = pieces if full or ways.dense else buffers.ranges(pieces, flags, ways.fine)
        return buffers.runs_of(pieces, kinds, granule), written

    def _base_buffer(self, window: Window, pieces: NDArray[np.void], size: int) -> memoryview:
        if self._base_memory is None:
            self._base_memory = new_buffer(self._ways.capacity)
        below = self._base_memory[:size]
        assert self._base is not None  # noqa: S101 - for the type checker
        assert window.base_rows is not None  # noqa: S101
        self._base.fill(window.base_rows, pieces, below)
        return below

    # --- windows whose single unit is larger than the buffer: looked at first, read again to be written

    def _survey(self, window: Window, pieces: NDArray[np.void]) -> NDArray[np.void]:
        """Return the runs of pieces that do not fit into the buffer at once."""
        ways = self._ways
        if ways.step <= ways.capacity:
            found = [self._look(window, part, size)[0] for part, size in self._parts(pieces)]
            return joined(found)
        cells = _cut(pieces, ways.step)
        kinds = np.array([self._kind_of(window, cells[i : i + 1]) for i in range(len(cells))], np.uint8)
        runs = np.zeros(len(cells), RUN)
        runs["start"], runs["length"], runs["kind"] = cells["start"], cells["length"], kinds
        return runs

    def _kind_of(self, window: Window, cell: NDArray[np.void]) -> int:
        """Return the kind of one grain that is larger than the buffer: DATA as soon as that is known."""
        if not self._ways.fine:
            return DATA
        differs, filled = self._base is None, False
        for part, size in self._parts(cell, first=_FIRST_LOOK):
            buffer = self._buffer(size)
            self._reader.fill(window.rows, part, buffer)
            filled = filled or bool(np.frombuffer(buffer, np.uint64).any())
            if not differs:
                below = self._base_buffer(window, part, size)
                differs = bool((np.frombuffer(buffer, np.uint64) != np.frombuffer(below, np.uint64)).any())
            if differs and filled:
                return DATA
        return ZERO if differs else ABSENT

    def _parts(self, pieces: NDArray[np.void], first: int = 0) -> Iterator[tuple[NDArray[np.void], int]]:
        """Yield pieces cut to the buffer's size, each at its beginning, with the bytes that it takes there."""
        pad = self._ways.pad if self._ways.pad <= self._ways.capacity else buffers.FINE
        for piece in pieces:
            at, end = int(piece["start"]), int(piece["start"]) + int(piece["length"])
            count = first or self._ways.capacity
            while at < end:
                part = np.zeros(1, PIECE)
                length = min(count, end - at)
                part[0] = (at, length, 0)
                yield part, -(-length // pad) * pad
                at += length
                count = self._ways.capacity

    # --- in turn

    def settle(self, batch: Batch) -> None:
        """Ask for places; write at once where order matters."""
        batch.placed = self._allocator.place(batch.runs)
        upto = self._ways.settled(batch.window.stop, self._reader.disk.size)
        batch.tables = tuple(self._allocator.settle(upto))
        if self._ways.ordered:
            self._write(batch)

    def replay(self, stop: int, runs: NDArray[np.void]) -> tuple[NDArray[np.void], tuple[Write, ...]]:
        """Ask for the places of runs that were placed before and are written; return these and the tables."""
        placed = self._allocator.place(runs)
        return placed, tuple(self._allocator.settle(self._ways.settled(stop, self._reader.disk.size)))

    # --- after the turn

    def write(self, batch: Batch) -> None:
        """Write data and tables, count what was moved."""
        if not self._ways.ordered:
            self._write(batch)
        self.done += batch.window.stop - batch.window.start

    def _write(self, batch: Batch) -> None:
        placed = batch.placed
        assert placed is not None  # noqa: S101 - for the type checker
        data = _data_of(placed)
        wanted = int(_data_of(batch.runs)["length"].sum())
        if int(data["length"].sum()) != wanted:
            raise IntegrityError(
                "the writer placed other data than it was given",
                offset=batch.window.start,
                expected=f"{wanted} bytes",
                found=int(data["length"].sum()),
            )
        self._refused = 0
        if self._writer is not None:
            self._move(batch, data)
            if len(data) != len(placed):
                self._writer.zeroes(placed[placed["kind"] != DATA], self._allocator.preallocation)
            self._writer.tables(batch.tables)
        cloned = self._cloned(batch.window) - self._refused
        self.moved.copied += wanted - cloned
        self.moved.cloned += cloned
        self.moved.skipped += batch.window.stop - batch.window.start - wanted

    def _cloned(self, window: Window) -> int:
        if not window.clones:
            return 0
        return int(window.segments["length"][window.segments["mode"] == CLONE].sum())

    def _move(self, batch: Batch, data: NDArray[np.void]) -> None:
        if not len(data):
            return
        if batch.pieces is None:
            self._move_again(batch, data)
        elif len(batch.pieces):
            self._put(data, batch.pieces)
        if batch.window.clones:
            self._clone(batch, data)

    def _put(self, data: NDArray[np.void], pieces: NDArray[np.void]) -> None:
        """Write what lies in the buffer as `pieces` to the places `data`."""
        assert self._writer is not None  # noqa: S101 - for the type checker
        assert self._memory is not None  # noqa: S101
        place, piece, start, stop = meet(
            data["start"], stops(data), pieces["start"], pieces["start"] + pieces["length"]
        )
        offset = data["offset"][place] + start - data["start"][place]
        at = pieces["at"][piece] + start - pieces["start"][piece]
        self._writer.pieces(data["member"][place], offset, at, stop - start, self._memory)

    def _move_again(self, batch: Batch, data: NDArray[np.void]) -> None:
        plan = layout(batch.window.segments, self._ways.pad)
        for part, size in self._parts(plan.pieces):
            begin, end = int(part["start"][0]), int(part["start"][0]) + int(part["length"][0])
            if not ((data["start"] < end) & (stops(data) > begin)).any():
                continue
            buffer = self._buffer(size)
            self._reader.fill(batch.window.rows, part, buffer)
            fine = self._ways.fine
            if fine and not self._ways.dense:
                part = buffers.ranges(part, buffers.nonzero(buffer, fine), fine)  # noqa: PLW2901
            if len(part):
                self._put(data, part)

    # --- clones

    def _clone(self, batch: Batch, data: NDArray[np.void]) -> None:
        """Clone the CLONE segments into their places; copy what does not lie as a clone must."""
        assert self._writer is not None  # noqa: S101 - for the type checker
        rows = batch.window.rows
        rows = rows[(rows["kind"] == DATA) & (rows["codec"] == PLAIN)]
        segments = batch.window.segments[batch.window.segments["mode"] == CLONE]
        row, _, start, stop = meet(
            rows["start"], stops(rows), segments["start"], segments["start"] + segments["length"]
        )
        place, part, start2, stop2 = meet(data["start"], stops(data), start, stop)
        row = row[part]
        source = rows["offset"][row] + start2 - rows["start"][row]
        target = data["offset"][place] + start2 - data["start"][place]
        fields = (rows["file"][row], source, data["member"][place], target, stop2 - start2)
        for file, offset, number, to, length in zip(*(field.tolist() for field in fields), strict=True):
            fd, base = self._reader.descriptor(file), self._reader.base(file)
            aligned = not (offset + base) % CLONE_ALIGN and not to % CLONE_ALIGN and not length % CLONE_ALIGN
            if not (aligned and fd is not None and self._writer.clone(fd, offset + base, number, to, length)):
                self._copy_range(file, offset, number, to, length)
                self._refused += length

    def _copy_range(self, file: int, offset: int, number: int, to: int, length: int) -> None:
        assert self._writer is not None  # noqa: S101 - for the type checker
        buffer = self._buffer(self._ways.capacity)
        done = 0
        while done < length:
            count = min(length - done, len(buffer))
            self._reader.read_plain(file, offset + done, buffer[:count])
            self._writer.members[number].write(to + done, buffer[:count])
            done += count


def _data_of(rows: NDArray[np.void]) -> NDArray[np.void]:
    """Return the DATA rows; the rows themselves where all are."""
    data = rows["kind"] == DATA
    return rows if data.all() else chosen(rows, data)


def _data_runs(pieces: NDArray[np.void]) -> NDArray[np.void]:
    runs = np.zeros(len(pieces), RUN)
    runs["start"], runs["length"] = pieces["start"], pieces["length"]
    return runs  # kind and codec 0: DATA, PLAIN


def _cut(pieces: NDArray[np.void], step: int) -> NDArray[np.void]:
    """Return pieces cut on multiples of `step`; their places in a buffer mean nothing."""
    cells = [
        (at, min(step, int(piece["start"]) + int(piece["length"]) - at), 0)
        for piece in pieces
        for at in range(int(piece["start"]), int(piece["start"]) + int(piece["length"]), step)
    ]
    return np.array(cells, PIECE)


__all__ = ["READ", "Batch", "PlainHand", "Ways"]
