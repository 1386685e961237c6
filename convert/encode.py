"""The hand that encodes: whole units, compressed before their turn, so that sizes are known when they are placed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.convert import buffers
from diskmorph.convert.buffers import layout, new_buffer
from diskmorph.convert.options import Moved
from diskmorph.convert.passing import Stream, may_pass, passed
from diskmorph.formats.allocator import RUN
from diskmorph.formats.errors import IntegrityError
from diskmorph.formats.extents import ABSENT, DATA, PLAIN, ZERO
from diskmorph.formats.rows import chosen, copied, joined

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.convert.codecs import Encoder
    from diskmorph.convert.moves import Reader, Writer
    from diskmorph.convert.plain import Ways
    from diskmorph.convert.windows import Window
    from diskmorph.formats.allocator import Allocator, Write
    from diskmorph.formats.source import Buffer


@dataclass(slots=True)
class EncodedBatch:
    """One window on its way: its runs, and what is written for each DATA run."""

    window: Window
    runs: NDArray[np.void]
    payloads: list[Buffer]
    passed: int = 0
    """Bytes of the disk whose encoded form was passed through."""
    placed: NDArray[np.void] | None = None
    tables: tuple[Write, ...] = ()


class EncodeHand:
    """Reads units, encodes what is not zero, asks for places, writes; one a worker."""

    def __init__(
        self,
        reader: Reader,
        base: Reader | None,
        writer: Writer | None,
        allocator: Allocator,
        ways: Ways,
        encode: Encoder,
    ) -> None:
        self._reader, self._base, self._writer = reader, base, writer
        self._allocator, self._ways, self._encode = allocator, ways, encode
        self._memory = new_buffer(max(ways.capacity, allocator.unit))
        self._base_memory = new_buffer(len(self._memory)) if base is not None else None
        self._plain_allowed = PLAIN in allocator.codecs
        self._may_pass = may_pass(allocator) and ways.zero_kind == ZERO  # reproducible images hang on content alone
        self.done = 0
        self.moved = Moved()

    def prepare(self, window: Window) -> EncodedBatch:
        """Read the window's units and encode those that hold data."""
        if not window.read:
            return EncodedBatch(window, self._zero_kind(buffers.joined(buffers.with_segments(window, None))), [])
        unit = self._allocator.unit
        plan = layout(window.segments, unit)
        buffer = self._memory[: plan.size]
        streams: dict[int, Stream] | None = {} if self._may_pass else None
        self._reader.fill(window.rows, plan.pieces, buffer, streams)
        kinds = self._kinds(window, plan.pieces, buffer)
        rest = self._zero_kind(buffers.with_segments(window, buffers.runs_of(plan.pieces, kinds, unit)))
        payloads: list[Buffer] = []
        units = self._units(plan.pieces, kinds)
        through = sum(self._add(row, int(row["size"]), buffer, payloads, streams or {}) for row in units)
        units["size"] = [len(payload) for payload in payloads]
        whole = joined([buffers.joined(chosen(rest, rest["kind"] != DATA)), units])
        return EncodedBatch(window, whole.take(np.argsort(whole["start"], kind="stable")), payloads, through)

    def _zero_kind(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        if self._ways.zero_kind != ZERO:
            runs["kind"][runs["kind"] == ZERO] = self._ways.zero_kind
        return runs

    def _kinds(self, window: Window, pieces: NDArray[np.void], buffer: memoryview) -> NDArray[np.uint8]:
        unit = self._allocator.unit
        if not self._ways.fine:
            return np.full(len(buffer) // unit, DATA, np.uint8)
        kinds = np.where(buffers.nonzero(buffer, unit), DATA, ZERO).astype(np.uint8)
        if self._base is not None and self._base_memory is not None and window.base_rows is not None:
            below = self._base_memory[: len(buffer)]
            self._base.fill(window.base_rows, pieces, below)
            kinds[~buffers.differing(buffer, below, unit)] = ABSENT
        return kinds

    def _units(self, pieces: NDArray[np.void], kinds: NDArray[np.uint8]) -> NDArray[np.void]:
        """Return RUN rows of the DATA units, one each; `size` holds the unit's place in the buffer for now."""
        unit = self._allocator.unit
        at = np.flatnonzero(kinds == DATA).astype(np.uint64) * np.uint64(unit)
        owner = np.searchsorted(pieces["at"], at, side="right") - 1
        units = np.zeros(len(at), RUN)
        units["start"] = pieces["start"][owner] + at - pieces["at"][owner]
        ends = pieces["start"][owner] + pieces["length"][owner]
        units["length"] = np.minimum(units["start"] + np.uint64(unit), ends) - units["start"]
        units["size"], units["kind"], units["codec"] = at, DATA, self._allocator.codec
        return units

    def _add(
        self, row: np.void, at: int, buffer: memoryview, payloads: list[Buffer], streams: dict[int, Stream]
    ) -> int:
        """Add what is written for one unit; return how many of the disk's bytes were passed through."""
        unit = buffer[at : at + self._allocator.unit]
        stream = streams.get(at)
        through = None if stream is None else passed(stream, unit, self._allocator.codec, self._allocator.window_bits)
        framed = self._allocator.frame(int(row["start"]), self._encode(unit) if through is None else through)
        if len(framed) >= len(unit) and self._plain_allowed:
            row["codec"] = PLAIN
            framed, through = unit[: int(row["length"])], None
        payloads.append(framed)
        return 0 if through is None else int(row["length"])

    def settle(self, batch: EncodedBatch) -> None:
        """Ask for places; write at once where order matters."""
        batch.placed = self._place(batch.runs)
        upto = self._ways.settled(batch.window.stop, self._reader.disk.size)
        batch.tables = tuple(self._allocator.settle(upto))
        if self._ways.ordered:
            self._write(batch)

    def replay(self, stop: int, runs: NDArray[np.void]) -> tuple[NDArray[np.void], tuple[Write, ...]]:
        """Ask for the places of runs that were placed before and are written; return these and the tables.

        Lengths are the file's.
        """
        placed = copied(self._place(runs))
        encoded = placed["kind"] == DATA
        asked = chosen(runs, runs["kind"] == DATA)
        # What an encoded unit takes in the file may be more than the disk's bytes of it.
        placed["length"][encoded] = np.where(asked["codec"] == PLAIN, asked["length"], asked["size"])
        return placed, tuple(self._allocator.settle(self._ways.settled(stop, self._reader.disk.size)))

    def _place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """Ask for places; for reproducible images in calls of one codec each, as writers may group by codec."""
        if not self._ways.stride or len(runs) < 2:
            return self._allocator.place(runs)
        heads = np.flatnonzero(runs["codec"][1:] != runs["codec"][:-1]) + 1
        return joined([self._allocator.place(part) for part in np.split(runs, heads)])

    def write(self, batch: EncodedBatch) -> None:
        """Write units and tables, count what was moved."""
        if not self._ways.ordered:
            self._write(batch)
        self.done += batch.window.stop - batch.window.start

    def _write(self, batch: EncodedBatch) -> None:
        placed, runs = batch.placed, batch.runs
        assert placed is not None  # noqa: S101 - for the type checker
        data = placed[placed["kind"] == DATA]
        asked = runs[runs["kind"] == DATA]
        if len(data) != len(asked) or (data["start"] != asked["start"]).any():
            raise IntegrityError(
                "the writer placed other units than it was given",
                offset=batch.window.start,
                expected=f"{len(asked)} units",
                found=len(data),
            )
        if self._writer is not None:
            self._writer.strings(data["member"].tolist(), data["offset"].tolist(), batch.payloads)
            if len(data) != len(placed):
                self._writer.zeroes(placed[placed["kind"] != DATA], self._allocator.preallocation)
            self._writer.tables(batch.tables)
        plain = asked["codec"] == PLAIN
        self.moved.copied += int(asked["length"][plain].sum())
        self.moved.encoded += int(asked["length"][~plain].sum()) - batch.passed
        self.moved.passed += batch.passed
        self.moved.skipped += batch.window.stop - batch.window.start - int(asked["length"].sum())
