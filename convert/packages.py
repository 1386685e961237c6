"""Disks to OVA and OVF packages, in one pass: each disk is written where it stays, what stands before it comes last.

Sizes and digests are known only when a disk is written, and stand in descriptor and manifest before it: their room is
reserved (a descriptor may end in blanks), the manifest's length does not depend on what it says.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.copy import run
from diskmorph.convert.job import transfer_of
from diskmorph.convert.opening import origin_of, refuse_same
from diskmorph.convert.options import ConvertOptions, ConvertReport, Moved, Progress
from diskmorph.convert.plan import STDOUT, Plan, make_plan
from diskmorph.convert.slots import Slot, SlotTarget
from diskmorph.formats import gpt
from diskmorph.formats.allocator import Identity
from diskmorph.formats.disk import Disk
from diskmorph.formats.errors import DiskmorphError, IntegrityError, OptionError, TargetError, UnsupportedError
from diskmorph.formats.machine import EFI
from diskmorph.formats.output import FileTarget
from diskmorph.formats.ovf.manifest import build_manifest, digest_of, manifest_size
from diskmorph.formats.ovf.profile import MachineOptions, portable_machine, portable_stem, read_options
from diskmorph.formats.ovf.writer import WrittenDisk, build_envelope, envelope_room
from diskmorph.formats.packages import open_package
from diskmorph.formats.policy import Opener
from diskmorph.formats.probe import signatures
from diskmorph.formats.source import BytesSource, FileSource
from diskmorph.formats.tarheader import END, build_header, padding

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.machine import Machine
    from diskmorph.formats.output import Member
    from diskmorph.formats.packages import Package

    Source = str | os.PathLike[str] | Disk

_BLOCK = 512
_BOOT_CODE = 440
_ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
_PROFILES = frozenset({"esxi", "virtualbox", "proxmox", "aws"})
_VMDK = {"subformat": "streamOptimized", "adapter_type": "lsilogic"}


def disks_to_package(
    source: Source | Sequence[Source],
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Write a package of one machine: `target` is NAME.ova, or NAME.ovf with its files beside it.

    Sources are disks, in the order in which the machine has them, or one package, whose machine is kept as far as
    `-o` does not say otherwise. Raises what `convert` raises.
    """
    begun = time.monotonic()
    options = options or ConvertOptions()
    sources = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    name = os.fspath(target)
    _refuse(options, name, len(sources))
    with contextlib.ExitStack() as stack:
        disks, old, lost = _opened(sources, options, stack)
        job = _Job(name, disks, old, lost, options, stack)
        return job.run(on_progress, begun)


def _refuse(options: ConvertOptions, target: str, count: int) -> None:
    if target == STDOUT:
        raise UnsupportedError(
            "a package cannot be written to standard output: what stands first is known last", feature="streaming"
        )
    if options.profile is not None and options.profile not in _PROFILES:
        raise OptionError(f"{options.profile} does not take packages", hint=f"{', '.join(sorted(_PROFILES))} do")
    for word, said in (("-B", options.base is not None), ("--device", options.device)):
        if said:
            raise OptionError(f"{word} does not go with a package")
    if count > 1:
        single = {"--snapshot": options.snapshot, "--size": options.size, "--disk": options.disk}
        for word, value in single.items():
            if value is not None:
                raise OptionError(f"{word} goes with one source only")


@dataclass(slots=True)
class _SourceDisk:
    """A disk that the package gets, and a local file that it is read from, if it has one."""

    disk: Source
    path: Path | None


def _opened(
    sources: list[Source], options: ConvertOptions, stack: contextlib.ExitStack
) -> tuple[list[_SourceDisk], Machine | None, list[str]]:
    """Return the sources' disks, and of a package the machine that they come from and what of it is left out."""
    package = _package(sources[0], options) if len(sources) == 1 else None
    if package is None:
        return [_SourceDisk(one, None if isinstance(one, Disk) else Path(one)) for one in sources], None, []
    stack.enter_context(package)
    path = Path(package.name)
    if options.disk is not None:
        number = package.pick(options.disk).number
        machine = next((one for one in package.machines if any(d.number == number for d in one.disks)), None)
        return [_SourceDisk(stack.enter_context(package.open_disk(number)), path)], machine, []
    owners = [machine for machine in package.machines if machine.disks]
    if len(owners) != 1:
        what = "no machine with disks" if not owners else f"{len(owners)} machines with disks"
        raise UnsupportedError(
            f"holds {what}; a new package describes one",
            feature="packages of many machines",
            file=package.name,
            hint="convert its disks one by one with --disk N",
        )
    disks = [stack.enter_context(package.open_disk(disk.number)) for disk in owners[0].disks]
    attached = {disk.number for disk in owners[0].disks}
    lost = [
        f"disk {disk.number} ({disk.file or disk.id}), which is attached to no machine; --disk {disk.number} chooses it"
        for disk in package.disks
        if disk.number not in attached
    ]
    return [_SourceDisk(disk, path) for disk in disks], owners[0], lost


def _package(source: Source, options: ConvertOptions) -> Package | None:
    """Return the source as a package, if it is one."""
    if isinstance(source, Disk) or os.fspath(source) == STDOUT:
        return None
    kind = options.source_format
    if kind is None:
        with Opener(options.parents, options.limits).user_source(source) as file:
            kind = next((found.format for found in signatures(file) if found.outer), None)
    if kind not in {"ova", "ovf"}:
        return None
    return open_package(source, format=kind, parents=options.parents, limits=options.limits)


class _Job:
    """One new package."""

    def __init__(
        self,
        target: str,
        disks: list[_SourceDisk],
        old: Machine | None,
        lost: list[str],
        options: ConvertOptions,
        stack: contextlib.ExitStack,
    ) -> None:
        self._target = Path(target)
        self._archive = (
            not target.lower().endswith(".ovf") if options.target_format is None else (options.target_format == "ova")
        )
        if not self._target.name:
            raise TargetError("is not the name of a file", file=target)
        self._options, self._lost = options, lost
        self._words: MachineOptions = read_options(options.format_options)
        # Inside an archive files are called by the machine, so that the archive's own name is not in its bytes.
        called = self._words.name or (old.name if old is not None else None)
        self._stem = portable_stem((called if self._archive else None) or self._target.stem)
        self._descriptor = f"{self._stem}.ovf" if self._archive else self._target.name
        self._manifest_name = f"{self._stem}.mf" if self._archive else f"{self._target.stem}.mf"
        self._files = [f"{self._stem}-disk{number}.vmdk" for number in range(1, len(disks) + 1)]
        self._plans = [stack.enter_context(self._plan(one, file)) for one, file in zip(disks, self._files, strict=True)]
        self._members = (self._target.name,) if self._archive else (self._descriptor, self._manifest_name, *self._files)
        self._refuse_sources(disks)
        capacities = [(file, plan.allocator.size) for file, plan in zip(self._files, self._plans, strict=True)]
        self._notes: tuple[str, ...] = ()
        if self._words.firmware is None and old is None and boots_by_efi_alone(self._plans[0].disk):
            self._words = replace(self._words, firmware=EFI)
            self._notes = (
                "the disk boots by EFI alone: the machine has firmware=efi; -o firmware=bios says otherwise",
            )
        self._machine = portable_machine(self._target.stem, capacities, self._words, old)
        self._time = int(Identity(b"package" if options.reproducible else None).time())
        self._moved = Moved()

    def _refuse_sources(self, disks: list[_SourceDisk]) -> None:
        """Raise TargetError where a file to be written is one of those that are read."""
        read = [one.path for one in disks if one.path is not None]
        for name in self._members:
            path = self._target.parent / name
            for plan in self._plans:
                plan.source.refuse_to_write(path)
            for source in read:
                refuse_same(path, origin_of(source))

    def _plan(self, one: _SourceDisk, file: str) -> Plan:
        options = replace(
            self._options,
            target_format="vmdk",
            format_options=_VMDK,
            profile=None,
            disk=None,
            source_format=None if isinstance(one.disk, Disk) else self._options.source_format,
        )
        return make_plan(one.disk, str(self._target.parent / file), options)

    def run(self, on_progress: Callable[[Progress], None] | None, begun: float) -> ConvertReport:
        """Write everything; report."""
        total = sum(plan.disk.size for plan in self._plans)
        tell = _Tell(on_progress, total)
        if self._options.dry_run:
            stored = self._measure(tell)
        else:
            stored = self._write_archive(tell) if self._archive else self._write_folder(tell)
        notes = tuple(dict.fromkeys((*self._notes, *(note for plan in self._plans for note in plan.notes))))
        return ConvertReport(
            source=", ".join(plan.source.name for plan in self._plans),
            target=str(self._target),
            format="ova" if self._archive else "ovf",
            virtual_size=total,
            stored_size=stored,
            bytes=self._moved,
            seconds=time.monotonic() - begun,
            verified=self._options.verify and not self._options.dry_run,
            lost=tuple(dict.fromkeys((*self._lost, *(loss for plan in self._plans for loss in plan.lost)))),
            notes=notes,
            digest=self._digest(),
            members=self._members,
        )

    def _digest(self) -> str | None:
        if not self._options.digest:
            return None
        if len(self._plans) > 1:
            raise OptionError("--digest takes one disk, not several")
        from diskmorph.convert.digest import content_digest  # noqa: PLC0415 - only when asked for

        return content_digest(self._plans[0].disk)

    def _measure(self, tell: _Tell) -> int:
        """Return about how large the package would be."""
        sizes = []
        for plan in self._plans:
            self._add(run(transfer_of(plan), None, None, tell.part(plan.disk.size)))
            sizes.append(plan.allocator.sizes()[0])
        return sum(sizes) + envelope_room(self._machine, self._written(sizes))

    def _add(self, moved: Moved) -> None:
        for word in ("cloned", "copied", "encoded", "passed", "skipped"):
            setattr(self._moved, word, getattr(self._moved, word) + getattr(moved, word))

    def _written(self, sizes: list[int]) -> list[WrittenDisk]:
        return [
            WrittenDisk(file, size, plan.allocator.size)
            for file, size, plan in zip(self._files, sizes, self._plans, strict=True)
        ]

    def _disk(self, number: int, member: Member, base: int, tell: _Tell) -> tuple[int, str]:
        """Write disk `number` at `base` of a file; return its size and digest."""
        plan = self._plans[number]
        slot = Slot(member, base, self._files[number], self._words.manifest)
        self._add(run(transfer_of(plan), SlotTarget(slot), None, tell.part(plan.disk.size)))
        plan.source.disk.verify_unchanged()
        size = plan.allocator.sizes()[0]
        return size, slot.digest(size)

    def _write_archive(self, tell: _Tell) -> int:
        """Write an OVA; return its size."""
        widest = self._written([0] * len(self._plans))
        room = _blocks(envelope_room(self._machine, widest))
        names = [self._descriptor, *self._files]
        manifest_at = _BLOCK + room
        length = manifest_size(self._words.manifest, names)
        at = manifest_at + _BLOCK + _blocks(length)
        folder = self._target.parent
        with FileTarget(folder, [self._target.name], force=self._options.force, sync=self._options.sync) as target:
            member = target.members[0]
            sizes, digests = [], []
            for number, file in enumerate(self._files):
                size, digest = self._disk(number, member, at + _BLOCK, tell)
                member.write(at, build_header(file, size, self._time))
                self._verify(number, member, at + _BLOCK, size)
                at += _BLOCK + size + padding(size)
                sizes.append(size)
                digests.append(digest)
            descriptor = _filled(build_envelope(self._machine, self._written(sizes)), room)
            manifest = self._manifest(descriptor, digests)
            if len(manifest) != length or _blocks(len(descriptor)) != room:
                raise IntegrityError("descriptor or manifest do not fit their room", file=str(self._target))
            member.write(0, build_header(names[0], len(descriptor), self._time) + descriptor)
            member.write(manifest_at, build_header(self._manifest_name, length, self._time) + manifest)
            member.write(at, END)
            target.commit([at + len(END)])
        return at + len(END)

    def _manifest(self, descriptor: bytes, digests: list[str]) -> bytes:
        kind = self._words.manifest
        own = digest_of(BytesSource(descriptor), (kind.upper(),))[kind.upper()]
        return build_manifest(kind, {self._descriptor: own, **dict(zip(self._files, digests, strict=True))})

    def _write_folder(self, tell: _Tell) -> int:
        """Write an .ovf with its files beside it; return the bytes of all."""
        folder = self._target.parent
        with FileTarget(folder, self._members, force=self._options.force, sync=self._options.sync) as target:
            sizes, digests = [], []
            for number in range(len(self._files)):
                member = target.members[2 + number]
                size, digest = self._disk(number, member, 0, tell)
                self._verify(number, member, 0, size)
                sizes.append(size)
                digests.append(digest)
            descriptor = build_envelope(self._machine, self._written(sizes))
            manifest = self._manifest(descriptor, digests)
            target.members[0].write(0, descriptor)
            target.members[1].write(0, manifest)
            every = [len(descriptor), len(manifest), *sizes]
            target.commit(every)
        return sum(every)

    def _verify(self, number: int, member: Member, base: int, size: int) -> None:
        """Read a disk back, if that was asked for. Raises IntegrityError."""
        if not self._options.verify:
            return
        from diskmorph.convert.compare import compare_disks  # noqa: PLC0415 - only when asked for
        from diskmorph.formats.registry import open_disk  # noqa: PLC0415

        descriptor = member.fileno()
        assert descriptor is not None  # noqa: S101 - files have one
        source = FileSource(f"/proc/self/fd/{descriptor}", shared=True)
        plan = self._plans[number]
        with source, open_disk(source.window(base, size), format="vmdk", limits=self._options.limits) as written:
            found = compare_disks(plan.disk, written, max_ranges=1, threads=self._options.threads)
        if not found.identical:
            raise IntegrityError(
                "what was written does not read back as the source",
                file=str(self._target),
                offset=found.first_difference,
            )


def boots_by_efi_alone(disk: Disk) -> bool:
    """Return whether a disk has an EFI system partition but neither boot code nor a BIOS boot partition."""
    try:
        table = gpt.read_table(disk)
        code = disk.read(0, min(disk.size, _BOOT_CODE))
    except DiskmorphError:
        return False
    if table is None or table.scheme != "gpt" or any(code):
        return False
    types = {partition.type.upper() for partition in table.partitions}
    return _ESP in types and _BIOS_BOOT not in types


class _Tell:
    """Progress over several disks."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, total: int) -> None:
        self._on_progress, self._total = on_progress, total
        self._before = 0

    def part(self, size: int) -> Callable[[Progress], None] | None:
        """Return what to call for the next disk, of `size` bytes."""
        if self._on_progress is None:
            return None
        before, self._before = self._before, self._before + size
        tell = self._on_progress
        return lambda progress: tell(Progress(progress.phase, before + progress.done, self._total))


def _blocks(size: int) -> int:
    return size + padding(size)


def _filled(descriptor: bytes, room: int) -> bytes:
    """Return a descriptor that takes all blocks of `room` bytes: blanks may follow the root element (XML 1.0, 2.8)."""
    return descriptor + b" " * max(0, room - _BLOCK + 1 - len(descriptor))
