"""The pipeline: moves a disk into the places that an allocator gives, by the cheapest correct move for each run."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diskmorph.convert.buffers import FINE
from diskmorph.convert.clone import Cloner
from diskmorph.convert.encode import EncodeHand
from diskmorph.convert.moves import Reader, Writer
from diskmorph.convert.options import Moved, Progress
from diskmorph.convert.plain import PlainHand, Ways
from diskmorph.convert.recording import RecordingHand, replay
from diskmorph.convert.windows import CLONE_ALIGN, Grid, everything, pair_windows, windows
from diskmorph.convert.workers import Crew
from diskmorph.formats.errors import DiskmorphError, IntegrityError, OptionError
from diskmorph.formats.extents import HOLE, PLAIN, ZERO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from diskmorph.convert.resume import Journal
    from diskmorph.convert.windows import Window
    from diskmorph.formats.allocator import Allocator
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.output import Target

_CAPACITY = 1 << 22
"""Bytes that a worker reads at once: small enough to stay in a processor's cache until they are written."""
_RATED = 256 << 10
_TINY = 4 << 20
_COPYING = 2
"""Copying threads: more than two do not help where one memory bus is the limit."""
_STRIDE = 64 << 20
"""Where the tables of reproducible images are settled."""
_MEMORY = 96 << 20
"""Bytes that all workers' buffers may take together."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What is moved: `disk` (as large as the allocator's image) over `base`, if that is given, into `allocator`.

    `zero_unit`: unit of zero detection in bytes, 0 for none and everything allocated. `holes`: zeroes of any kind are
    written as holes (reproducible images). `rate`: bytes read a second. `threads`: workers, None for one a processor.
    """

    disk: Disk
    allocator: Allocator
    base: Disk | None = None
    zero_unit: int = FINE
    holes: bool = False
    rate: int | None = None
    threads: int | None = None
    phase: str = "convert"


OnProgress = "Callable[[Progress], None] | None"


def run(
    transfer: Transfer,
    target: Target | None,
    folder: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    journal: Journal | None = None,
) -> Moved:
    """Move everything, tables too; `target` None moves nothing but asks for all places (to measure).

    `folder` is that of a target of files, where clones may be tried. `journal` tells what was done before, and takes
    what is done now. Returns what was moved; the target is not committed. Raises IntegrityError where that is not what
    was planned.
    """
    allocator = transfer.allocator
    members = target.members if target is not None else ()
    writer = Writer(members, allocator.seal if allocator.encrypted else None) if target is not None else None
    ways = _ways(transfer, writer)
    total = transfer.disk.size

    def tick(done: int) -> None:
        if on_progress is not None:
            on_progress(Progress(transfer.phase, min(done, total), total))

    tick(0)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Reader(transfer.disk))
        base = stack.enter_context(Reader(transfer.base)) if transfer.base is not None else None
        cloner = Cloner(reader, folder) if _may_clone(transfer, folder) and folder is not None else None
        begun = tuple(allocator.begin())
        if writer is not None:
            writer.tables(begun)
        hands: Sequence[Any] = _hands(transfer, ways, reader, base, writer)
        left = _windows(transfer, ways, cloner)
        if journal is None or writer is None:
            Crew(hands, left, transfer.rate).run(tick)
        else:
            left = replay(journal, left, hands[0], writer, begun)
            hands = [RecordingHand(hand, journal) for hand in hands]
            try:
                Crew(hands, left, transfer.rate).run(lambda done: tick(done + journal.resumed))
            except BaseException:
                with contextlib.suppress(DiskmorphError):  # the first failure is told
                    journal.checkpoint()
                raise
            journal.checkpoint()
        if writer is not None:
            writer.tables(allocator.finish())
        else:
            _exhaust(allocator.finish())
    moved = _sum([hand.moved for hand in hands] + ([journal.moved] if journal is not None else []))
    if moved.total() != total:
        raise IntegrityError("other bytes were moved than planned", expected=total, found=moved.total())
    tick(total)
    return moved


def _exhaust(writes: Iterator[object]) -> None:
    for _ in writes:
        pass


def _sum(parts: Sequence[Moved]) -> Moved:
    total = Moved()
    for part in parts:
        for name in ("cloned", "copied", "encoded", "passed", "skipped"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
    return total


def _ways(transfer: Transfer, writer: Writer | None) -> Ways:
    allocator = transfer.allocator
    encoded = allocator.codec != PLAIN
    step = allocator.unit if encoded else allocator.grain
    fine = min(transfer.zero_unit, FINE)
    if transfer.zero_unit and (fine < 512 or transfer.zero_unit & (transfer.zero_unit - 1)):
        raise OptionError("-S takes 0 or a power of two of at least 512")
    if (transfer.base is not None or transfer.holes) and fine:
        fine = min(fine, step)
    capacity = _CAPACITY if not transfer.rate else _RATED
    unit = _unit(allocator)
    if unit <= 4 * _CAPACITY:
        capacity = max(capacity, unit)
    streams = writer is not None and any(member.ordered for member in writer.members)
    return Ways(
        step=step,
        fine=fine,
        zero_unit=fine if transfer.holes else transfer.zero_unit,  # lengths of zero runs depend on the extents
        zero_kind=HOLE if transfer.holes and not allocator.overlay else ZERO,
        ordered=allocator.sequential and streams,
        dense=writer is not None and (allocator.encrypted or not writer.fresh),
        capacity=capacity,
        stride=max(_STRIDE, unit) if transfer.holes else 0,
    )


def _unit(allocator: Allocator) -> int:
    """Return the unit whose pieces must meet in one call: the grain where the whole disk is one unit."""
    return allocator.unit if allocator.unit < allocator.size or allocator.unit <= _MEMORY else allocator.grain


def _windows(transfer: Transfer, ways: Ways, cloner: Cloner | None) -> Iterator[Window]:
    allocator = transfer.allocator
    grid = Grid(transfer.disk.size, _unit(allocator), ways.step, ways.capacity, ways.pad, ways.stride)
    if not transfer.disk.size:
        return iter(())
    if transfer.base is not None:
        return pair_windows(transfer.disk, transfer.base, grid)
    if not transfer.zero_unit:
        return everything(transfer.disk, grid)
    return windows(transfer.disk, grid, cloner.mask if cloner is not None else None)


def _may_clone(transfer: Transfer, folder: Path | None) -> bool:
    allocator = transfer.allocator
    aligned = not allocator.alignment % CLONE_ALIGN and (
        not allocator.unit % CLONE_ALIGN or allocator.unit >= allocator.size
    )
    return (
        folder is not None
        and aligned
        and allocator.codec == PLAIN
        and not allocator.encrypted
        and transfer.base is None
        and transfer.zero_unit > 0
        and not transfer.holes
        and transfer.rate is None
    )


def _hands(
    transfer: Transfer, ways: Ways, reader: Reader, base: Reader | None, writer: Writer | None
) -> list[PlainHand] | list[EncodeHand]:
    allocator = transfer.allocator
    count = transfer.threads or _threads(transfer)
    count = max(1, min(count, _MEMORY // (ways.capacity * (1 if base is None else 2))))
    if allocator.codec == PLAIN:
        return [PlainHand(reader, base, writer, allocator, ways) for _ in range(count)]
    from diskmorph.convert.codecs import encoder  # noqa: PLC0415 - plain targets need none

    return [
        EncodeHand(
            reader, base, writer, allocator, ways, encoder(allocator.codec, allocator.level, allocator.window_bits)
        )
        for _ in range(count)
    ]


def _threads(transfer: Transfer) -> int:
    if transfer.disk.size <= _TINY:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(_COPYING, cores) if transfer.allocator.codec != PLAIN or transfer.disk.unit_size() else _COPYING
