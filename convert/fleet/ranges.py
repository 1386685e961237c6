"""Large disks by ranges: each range a task of its own, into a target that takes ranges.

A raw file on a path that all workers share is made in full size under a hidden name; ranges write their bytes into it,
each as often as it must, always the same bytes; when all are there the file gets its name. A range holds a shared lock
on the file while it writes and stops where the hidden name is gone; naming takes the lock alone. So a straggler that
the cluster gave up for dead never writes into a file that has its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diskmorph.formats import marks
from diskmorph.formats.errors import IntegrityError, TargetError
from diskmorph.formats.output import Member, Target
from diskmorph.formats.remote import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskmorph.convert.fleet.rows import Result, Row, RunOptions
    from diskmorph.convert.options import ConvertOptions, ConvertReport
    from diskmorph.formats.source import Buffer

_WAIT = 60.0
"""Seconds that naming waits for stragglers."""


@dataclass(frozen=True, slots=True)
class Split:
    """How a row is cut: `ranges` (start, stop) of the disk; `part` is the hidden file. Sizes in bytes."""

    token: str
    part: str
    size: int
    ranges: tuple[tuple[int, int], ...]
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def split_of(row: Row, run: RunOptions, token: str) -> Split | None:
    """Return how a row is split, its hidden file made; None: in one piece. Raises what planning raises."""
    if run.split is None or not _may_split(row):
        return None
    from diskmorph.convert.plan import make_plan  # noqa: PLC0415 - loads the pipeline

    target = cast("str", row.target)
    options = cast("ConvertOptions", row.options)
    with make_plan(row.source, target, options) as plan:
        if plan.format.name != "raw" or plan.disk.size < run.split:
            return None
        size, lost, notes = plan.disk.size, plan.lost, plan.notes
    part = Path(target).with_name(f".{Path(target).name[:180]}.{token}.part")
    with _opened(part, create=True) as fd:
        os.ftruncate(fd, size)
        if options.format_options.get("preallocation", "off") != "off":
            os.posix_fallocate(fd, 0, size)
    step = max(run.part, 1 << 20) >> 20 << 20
    ranges = tuple((start, min(start + step, size)) for start in range(0, size, step))
    return Split(token, str(part), size, ranges, lost, notes)


def _may_split(row: Row) -> bool:
    """Return whether a row is a plain conversion of one disk to one local file that takes ranges, as far as it says."""
    if row.verb != "convert" or row.target is None or is_url(row.target):
        return False
    from diskmorph.convert.job import convert  # noqa: PLC0415 - loads the pipeline
    from diskmorph.convert.routes import converter  # noqa: PLC0415

    options = cast("ConvertOptions", row.options)
    plain = options.base is None and options.compress is None and not options.verify and not options.device
    return plain and converter(row.source, row.target, options) is convert


@contextlib.contextmanager
def _opened(part: Path, *, create: bool = False) -> Iterator[int]:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        fd = os.open(part, flags, 0o666)
    except OSError as error:
        raise TargetError(f"cannot be opened: {os.strerror(error.errno or 0)}", file=str(part)) from error
    try:
        yield fd
    except OSError as error:
        hint = "make room, or choose another place" if error.errno in {errno.ENOSPC, errno.EDQUOT} else None
        raise TargetError(f"cannot be written: {error.strerror}", file=str(part), hint=hint) from error
    finally:
        os.close(fd)


class RangeMember(Member):
    """`size` bytes from `start` of a file that is larger; what was never written reads as zeroes."""

    fresh = True
    ordered = False  # whatever comes first may be written first

    def __init__(self, fd: int, name: str, start: int, size: int) -> None:
        self.name = name
        self._fd, self._start, self._size = fd, start, size

    def write(self, offset: int, data: Buffer) -> None:
        """See Member. Raises IntegrityError for bytes beyond the range."""
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self._size:
            raise IntegrityError("a range was written beyond its end", file=self.name, offset=self._start + offset)
        at = self._start + offset
        try:
            while view:
                count = os.pwrite(self._fd, view, at)
                at, view = at + count, view[count:]
        except OSError as error:
            hint = "make room, or choose another place" if error.errno in {errno.ENOSPC, errno.EDQUOT} else None
            raise TargetError(f"cannot be written: {error.strerror}", file=self.name, offset=at, hint=hint) from error


class RangeTarget(Target):
    """One range of a file, written in place; whether it ever shows is decided elsewhere."""

    def __init__(self, fd: int, name: str, start: int, size: int) -> None:
        self.members = (RangeMember(fd, name, start, size),)

    def commit(self, sizes: Sequence[int]) -> None:
        """See Target."""

    def close(self) -> None:
        """See Target."""


def _is_named(fd: int, part: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), part.lstat())
    except FileNotFoundError:
        return False


def write_range(row: Row, run: RunOptions, split: Split, start: int, stop: int) -> tuple[int, dict[str, int]]:
    """Write one range of a row's disk into the hidden file; return where it starts and the bytes by how they moved.

    Raises what converting raises; TargetError where the file is gone, for then the row has ended.
    """
    from diskmorph.convert.copy import run as move  # noqa: PLC0415 - loads the pipeline
    from diskmorph.convert.fleet.perform import worker_options  # noqa: PLC0415 - which takes this module
    from diskmorph.convert.fleet.worker import Pulse, slot  # noqa: PLC0415
    from diskmorph.convert.job import transfer_of  # noqa: PLC0415
    from diskmorph.convert.plan import make_plan, new_allocator  # noqa: PLC0415
    from diskmorph.formats.views import Slice  # noqa: PLC0415

    part = Path(split.part)
    options = replace(worker_options(cast("ConvertOptions", row.options), run), digest=False)
    with slot(run), make_plan(row.source, cast("str", row.target), options) as plan, _opened(part) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if not _is_named(fd, part):
            raise TargetError("the row has ended already", file=str(part))
        piece = Slice(plan.disk, start, stop - start)
        allocator = new_allocator(plan.format, piece, plan.target, _unallocated(options), None)
        transfer = replace(transfer_of(plan), disk=piece, allocator=allocator)
        with RangeTarget(fd, split.part, start, stop - start) as target:
            moved = move(transfer, target, None, Pulse(row.number))
            target.commit(allocator.sizes())
        plan.source.disk.verify_unchanged()
    return start, {name: getattr(moved, name) for name in ("cloned", "copied", "encoded", "passed", "skipped")}


def _unallocated(options: ConvertOptions) -> ConvertOptions:
    """Return the options of a range: the whole file was reserved when it was made."""
    return replace(options, format_options={})


def finish_split(row: Row, run: RunOptions, split: Split, moved: dict[str, int], begun: float) -> Result:
    """Give the hidden file its name and return the row's result; safe to be said again. Raises TargetError.

    `begun`: when the row was started, in seconds since 1970.
    """
    from diskmorph.convert.fleet.perform import told  # noqa: PLC0415 - which takes this module
    from diskmorph.convert.fleet.places import OURS, mark, standing  # noqa: PLC0415
    from diskmorph.convert.fleet.worker import here  # noqa: PLC0415

    target, part = cast("str", row.target), Path(split.part)
    options = cast("ConvertOptions", row.options)
    if standing(target, split.token).state != OURS:
        with _opened(part) as fd, marks.marked(mark(split.token, run.run)):
            _lock_alone(fd, split.part)
            if options.sync:
                os.fsync(fd)
            _name(fd, part, Path(target), replace_old=options.force)
    part.unlink(missing_ok=True)
    report = _report(row, split, moved, time.time() - begun, _digest(target) if run.digest else None)
    return replace(told(row, run, split.token, report), started=begun, worker=here(), ranges=len(split.ranges))


def _lock_alone(fd: int, name: str) -> None:
    end = time.monotonic() + _WAIT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise TargetError("another worker still writes to it", file=name) from error
            time.sleep(0.05)
        else:
            return


def _name(fd: int, part: Path, target: Path, *, replace_old: bool) -> None:
    """Name the file by which it was hidden; the hidden name goes first, so that no straggler takes it for his."""
    marks.attach(fd, target)
    try:
        if replace_old:
            part.rename(target)
        else:
            os.link(part, target)
            part.unlink()
    except FileExistsError as error:
        raise TargetError("exists already", file=str(target), hint="replace it with --force") from error
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(target: str) -> str:
    from diskmorph.convert.digest import digest  # noqa: PLC0415

    return digest(target, format="raw").digest


def _report(row: Row, split: Split, moved: dict[str, int], seconds: float, digest: str | None) -> ConvertReport:
    from diskmorph.convert.options import ConvertReport, Moved  # noqa: PLC0415

    return ConvertReport(
        source=row.source,
        target=cast("str", row.target),
        format="raw",
        virtual_size=split.size,
        stored_size=split.size,
        bytes=Moved(**moved),
        seconds=seconds,
        verified=False,
        lost=split.lost,
        notes=split.notes,
        digest=digest,
        members=(Path(cast("str", row.target)).name,),
    )


def abandon_split(split: Split) -> None:
    """Remove the hidden file of a row that failed."""
    Path(split.part).unlink(missing_ok=True)


def summed(parts: list[dict[str, int]]) -> dict[str, int]:
    """Return the sum of what ranges moved."""
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total
