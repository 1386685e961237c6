"""Packages checked: the manifest's digests, the descriptor, and every disk by its own format's check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.check import CheckReport
from diskmorph.formats.errors import DiskmorphError, IntegrityError, UnsupportedError
from diskmorph.formats.ovf.container import ArchiveContainer
from diskmorph.formats.ovf.package import OvfPackage, open_package

if TYPE_CHECKING:
    from diskmorph.formats.machine import MachineDisk
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource


def check_package(source: ByteSource, format: str, context: OpenContext, repair: str | None) -> CheckReport:
    """Return what is wrong in a package. Raises FormatError where it cannot be read, UnsupportedError for repairs."""
    if repair is not None:
        raise UnsupportedError(
            "a package is not repaired in place",
            feature="repairing packages",
            file=source.name,
            hint="convert its disks, repair them, and make a new package",
        )
    report = CheckReport(format)
    try:
        package = open_package(source, format, context.opener, context.limits)
    except IntegrityError as error:
        report.add(error.structure or "package", error.offset, str(error.problem))
        return report
    for warning in package.warnings:
        report.add("package", None, warning, "warning")
    for disk in package.disks:
        _check_disk(package, disk, context, report)
    return report


def _check_disk(package: OvfPackage, disk: MachineDisk, context: OpenContext, report: CheckReport) -> None:
    """Add what is wrong with one disk; offsets are the package's where the disk lies in it as it is."""
    from diskmorph.formats.registry import identify, load  # noqa: PLC0415 - the registry opens packages too

    ref = package.envelope.disks[disk.id]
    file = package.envelope.files.get(ref.file or "")
    if file is None:
        return
    base: int | None = None
    container = package.container
    if isinstance(container, ArchiveContainer) and not file.chunk_size and not file.compression:
        member = container.members.get(container.locate(file.href))
        base = member.offset if member is not None else None
    try:
        with package.open_disk(disk.number) as whole, container.open_reference(file) as source:
            entry, _ = identify(source)
            found = load(entry).check_image(source, context)
            if disk.virtual_size is not None and ref.parent is None and whole.size != disk.virtual_size:
                report.add(
                    file.href,
                    None,
                    f"the descriptor says {disk.virtual_size} bytes, the disk has {whole.size}",
                    "warning",
                )
    except DiskmorphError as error:
        at = error.offset if error.offset is None or base is None else base + error.offset
        report.add(f"{file.href}: {error.structure or 'disk'}", at, error.problem)
        return
    for finding in found.findings:
        at = finding.offset if finding.offset is None or base is None else base + finding.offset
        report.add(f"{file.href}: {finding.structure}", at, finding.message, finding.severity)
    report.omitted += found.omitted
    report.corruptions += found.corruptions - sum(one.severity == "error" for one in found.findings)
    report.leaks += found.leaks - sum(one.severity == "leak" for one in found.findings)
