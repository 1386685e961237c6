"""What `info` tells of packages, kernels and ramdisks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import DiskmorphError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.packages import open_package
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import identify

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from diskmorph.formats.machine import Machine
    from diskmorph.formats.packages import Package
    from diskmorph.formats.policy import Allowed
    from diskmorph.formats.probe import Signature
    from diskmorph.formats.source import ByteSource


def describe(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    parents: Allowed = None,
    limits: Limits | None = None,
    source: ByteSource | None = None,
) -> dict[str, Any] | None:
    """Return the JSON object that `info` shows of a package, kernel or ramdisk (docs/json.md); None for disks.

    `source`: the bytes, where they are open already, which stay open. A package's manifest is verified first. Raises
    UnsupportedError (a package that is no file), and what `open_package` and the readers of kernels and ramdisks raise.
    """
    limits = limits or Limits()
    parents = Parents.of(parents)
    with Opener(parents, limits).user_source(path) if source is None else nullcontext(source) as opened:
        entry, found = identify(opened, format)
        if entry.kind in {"disk", "wrapper"}:
            return None
        common = _common(str(path), entry.name, opened.size, found)
        if entry.kind == "part":
            return {**common, **_part(entry.name, opened)}
        if source is not None:
            raise UnsupportedError(
                "is a package, which is read from a file", feature="packages from a pipe", file=source.name
            )
    with open_package(path, format=entry.name, parents=parents, limits=limits) as package:
        return {**common, **_package(package)}


def _common(file: str, format: str, size: int, found: Sequence[Signature]) -> dict[str, Any]:
    """Return the keys that every `info` has."""
    return {
        "file": file,
        "format": format,
        "subformat": None,
        "virtual_size": None,
        "stored_size": size,
        "sector_size": None,
        "allocation_unit": None,
        "features": {},
        "snapshots": [],
        "parent": None,
        "signatures": [asdict(signature) for signature in found],
        "partitions": [],
        "warnings": [],
    }


def _part(format: str, source: ByteSource) -> dict[str, Any]:
    from diskmorph.formats import ami  # noqa: PLC0415 - seldom needed

    try:
        if format == "aki":
            return {"kernel": ami.read_kernel(source).as_dict()}
        return ami.read_ramdisk(source).as_dict()
    except DiskmorphError as error:
        raise error.located(file=source.name, format=format) from error.__cause__


def _package(package: Package) -> dict[str, Any]:
    sizes = {disk.number: disk.virtual_size for disk in package.disks}
    warnings = list(package.warnings)
    for number in [number for number, size in sizes.items() if size is None]:
        try:
            with package.open_disk(number) as disk:
                sizes[number] = disk.size
        except DiskmorphError as error:
            warnings.append(f"the size of disk {number} is unknown: {error}")
    known = [size for size in sizes.values() if size is not None]
    details = package.details()
    return {
        "virtual_size": sum(known) if package.disks and len(known) == len(sizes) else None,
        **details,
        "machines": [_machine(machine, sizes) for machine in package.machines],
        "disks": [{**asdict(disk), "virtual_size": sizes[disk.number]} for disk in package.disks],
        "warnings": warnings,
    }


def _machine(machine: Machine, sizes: dict[int, int | None]) -> dict[str, Any]:
    said = machine.as_dict()
    for disk in said["disks"]:
        disk["virtual_size"] = sizes[disk["number"]]
    return said
