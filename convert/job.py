"""`convert` itself: plan, write beside the target's name, verify, commit, report."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from diskmorph.convert.copy import Transfer, run
from diskmorph.convert.options import ConvertOptions, ConvertReport, Moved, Progress
from diskmorph.convert.plan import STDOUT, Plan, make_plan
from diskmorph.convert.workers import Stopped
from diskmorph.formats.errors import OptionError, TargetError, UnsupportedError
from diskmorph.formats.output import FileTarget, StreamTarget, Target
from diskmorph.formats.output_in_place import DeviceTarget
from diskmorph.formats.remote import is_url

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.disk import Disk


def convert(
    source: str | os.PathLike[str] | Disk,
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Convert a disk into another format; return what was done.

    `source` is a path, `-` for standard input, or an open Disk; `target` a path, or `-` for standard output, where the
    format can be streamed. The target appears complete or not at all; an existing one needs `options.force`. Progress
    is told in bytes of the disk, from the calling thread.

    Raises DiskmorphError: OptionError, TargetError, FormatError, UnsupportedError, PolicyError, SourceError,
    IntegrityError.
    """
    begun = time.monotonic()
    with make_plan(source, target, options or ConvertOptions()) as plan:
        refuse_own_files(plan)
        return perform(plan, on_progress, begun=begun)


def perform(
    plan: Plan,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    differences: bool = True,
    begun: float | None = None,
    against: Disk | None = None,
) -> ConvertReport:
    """Carry a plan out and report; `differences` False takes the disk as it is, though the plan has a base.

    `against`: the base's content as another disk shows it, which is cheaper to compare with.
    """
    begun = time.monotonic() if begun is None else begun
    transfer = transfer_of(plan)
    if not differences:
        transfer = replace(transfer, base=None)
    elif against is not None:
        transfer = replace(transfer, base=against)
    moved, sizes, digest, verified = _perform(plan, transfer, on_progress)
    return ConvertReport(
        source=plan.source.name,
        target=plan.target,
        format=plan.format.name,
        virtual_size=plan.disk.size,
        stored_size=sum(sizes),
        bytes=moved,
        seconds=time.monotonic() - begun,
        verified=verified,
        lost=plan.lost,
        notes=plan.notes,
        digest=digest,
        members=tuple(plan.allocator.members),
        properties=_properties(plan),
        resumed=0 if plan.journal is None else plan.journal.resumed,
    )


def _properties(plan: Plan) -> dict[str, str]:
    if plan.options.profile != "openstack":
        return {}
    from diskmorph.convert.cloud_facts import glance_properties  # noqa: PLC0415 - only when asked for

    return glance_properties(plan.disk)


def _perform(
    plan: Plan, transfer: Transfer, on_progress: Callable[[Progress], None] | None
) -> tuple[Moved, tuple[int, ...], str | None, bool]:
    if not plan.options.digest:
        return _carry_out(plan, transfer, on_progress, None)
    with _Digest(plan) as digest:
        return _carry_out(plan, transfer, on_progress, digest)


def _carry_out(
    plan: Plan, transfer: Transfer, on_progress: Callable[[Progress], None] | None, digest: _Digest | None
) -> tuple[Moved, tuple[int, ...], str | None, bool]:
    options = plan.options
    if options.dry_run:
        moved = run(transfer, None, None, on_progress)
        return moved, tuple(plan.allocator.sizes()), digest.value() if digest else None, False
    with _new_target(plan) as target:
        folder = Path(plan.target).parent if isinstance(target, FileTarget) else None
        moved = run(transfer, target, folder, on_progress, plan.journal)
        sizes = tuple(plan.allocator.sizes())
        text = digest.value() if digest else None
        plan.source.disk.verify_unchanged()
        if plan.base is not None:
            plan.base.disk.verify_unchanged()
        verified = False
        if options.verify:
            from diskmorph.convert.verify import verify  # noqa: PLC0415 - only when asked for

            verify(plan, target, sizes, on_progress)
            verified = True
        target.commit(sizes)
    return moved, sizes, text, verified


def transfer_of(plan: Plan) -> Transfer:
    """Return what the pipeline shall move for a plan."""
    options = plan.options
    return Transfer(
        disk=plan.disk,
        allocator=plan.allocator,
        base=plan.base.disk if plan.base is not None else None,
        zero_unit=options.zero_unit,
        holes=options.reproducible,
        rate=options.rate,
        threads=options.threads,
    )


class _Digest:
    """The source's SHA-256, computed beside the conversion; leaving the context ends the work, done or not."""

    def __init__(self, plan: Plan) -> None:
        import threading  # noqa: PLC0415

        self._disk = plan.disk
        self._value: str | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _tick(self, _: Progress) -> None:
        if self._stop.is_set():
            raise Stopped

    def _work(self) -> None:
        from diskmorph.convert.digest import content_digest  # noqa: PLC0415

        try:
            self._value = content_digest(self._disk, on_progress=self._tick)
        except BaseException as error:  # noqa: BLE001 - raised again by `value`
            self._error = error

    def value(self) -> str | None:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


def _new_target(plan: Plan) -> Target:
    options, allocator = plan.options, plan.allocator
    if is_url(plan.target):
        from diskmorph.convert.to_url import new_url_target  # noqa: PLC0415 - what is used is loaded

        return new_url_target(plan)
    if plan.target == STDOUT:
        if not allocator.sequential or len(allocator.members) > 1:
            raise UnsupportedError(
                f"{plan.format.name} cannot be written to standard output: its tables come after its data",
                feature="streaming",
                hint="raw, fixed VHD and streamOptimized VMDK can; or write to a file",
            )
        return StreamTarget(sys.stdout.buffer)
    path = Path(plan.target)
    if options.device:
        if len(allocator.members) > 1:
            raise OptionError("an image of several files cannot be written to a device")
        return DeviceTarget(path, _foretold(plan), sync=options.sync)
    folder = path.parent
    return FileTarget(folder, list(allocator.members), force=options.force, sync=options.sync, keeper=plan.journal)


def _foretold(plan: Plan) -> int:
    """Return the bytes that a device must have at least; what else is needed shows when it is written."""
    return plan.disk.size if plan.format.name == "raw" else 0


def refuse_own_files(plan: Plan) -> None:
    """Raise TargetError where the target is one of the files that are read; a symbolic link to one may be replaced."""
    if plan.target == STDOUT:
        return
    if is_url(plan.target):
        if plan.target == plan.source.name:
            raise TargetError("is the same as the source", file=plan.target, hint="write to another name")
        return
    folder = Path(plan.target).parent
    for opened in (plan.source,) if plan.base is None else (plan.source, plan.base):
        for member in plan.allocator.members:
            opened.refuse_to_write(folder / member, device=plan.options.device)
