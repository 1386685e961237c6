"""A journal while the pipeline runs: hands that tell it of their windows, and the replay of what it tells."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from diskmorph.convert.options import Moved
from diskmorph.formats.errors import OptionError
from diskmorph.formats.output import FileMember

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from diskmorph.convert.moves import Writer
    from diskmorph.convert.resume import Journal, Record
    from diskmorph.convert.windows import Window
    from diskmorph.formats.allocator import Write


class _Hand(Protocol):
    done: int
    moved: Moved

    def prepare(self, window: Window) -> Any: ...
    def settle(self, batch: Any) -> None: ...
    def write(self, batch: Any) -> None: ...
    def replay(self, stop: int, runs: NDArray[np.void]) -> tuple[NDArray[np.void], tuple[Write, ...]]: ...


class RecordingHand:
    """A hand that tells a journal of each window when it has its places, and when it is written."""

    def __init__(self, hand: _Hand, journal: Journal) -> None:
        self._hand, self._journal = hand, journal
        self._numbers: dict[int, int] = {}

    @property
    def done(self) -> int:
        """See Hand."""
        return self._hand.done

    @property
    def moved(self) -> Moved:
        """Return what this hand moved."""
        return self._hand.moved

    def prepare(self, window: Window) -> Any:
        """See Hand."""
        return self._hand.prepare(window)

    def settle(self, batch: Any) -> None:
        """See Hand."""
        self._hand.settle(batch)
        window = batch.window
        self._numbers[window.start] = self._journal.settled(window.start, window.stop, batch.runs)

    def write(self, batch: Any) -> None:
        """See Hand."""
        before = replace(self._hand.moved)
        self._hand.write(batch)
        after = self._hand.moved
        moved = Moved(
            after.cloned - before.cloned,
            after.copied - before.copied,
            after.encoded - before.encoded,
            after.passed - before.passed,
            after.skipped - before.skipped,
        )
        self._journal.written(self._numbers.pop(batch.window.start), moved)


def replay(
    journal: Journal, windows: Iterator[Window], hand: _Hand, writer: Writer, begun: Iterable[Write]
) -> Iterator[Window]:
    """Ask for the places of what was done before; return the windows that are left.

    `begun`: what `Allocator.begin` yielded, which was written again. What lies behind the places is cut off the files.
    Windows that are no longer divided as they were (a file system may tell of holes in another way) are done again.
    """
    members = _files(writer)
    ends = [0] * len(members)
    _reach(ends, begun)
    records = iter(() if journal.fresh else journal.records())
    last: Record | None = None
    left: Iterator[Window] = windows
    for record in records:
        window = next(windows, None)
        if window is None:
            break
        if (window.start, window.stop) != (record.start, record.stop):
            left = chain([window], windows)
            break
        placed, tables = hand.replay(record.stop, record.runs)
        for number, end in zip(placed["member"].tolist(), (placed["offset"] + placed["length"]).tolist(), strict=True):
            ends[number] = max(ends[number], end)
        _reach(ends, tables)
        journal.take(record)
        last = record
    for member, end in zip(members, ends, strict=True):
        member.resize(end)
    journal.go_on(last, [member.fileno() or 0 for member in members])
    return left


def _files(writer: Writer) -> Sequence[FileMember]:
    members = [member for member in writer.members if isinstance(member, FileMember)]
    if len(members) < len(writer.members):
        raise OptionError("--resume needs files as targets")
    return members


def _reach(ends: list[int], writes: Iterable[Write]) -> None:
    for member, offset, data in writes:
        ends[member] = max(ends[member], offset + memoryview(data).nbytes)
