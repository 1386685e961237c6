"""What `info` tells of what is no disk: packages, kernels and ramdisks, container images and other trees."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import DiskmorphError, OptionError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.packages import open_package
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import identify
from diskmorph.formats.tree_names import IMAGE_FORMATS, split_prefix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.machine import Machine
    from diskmorph.formats.packages import Package
    from diskmorph.formats.policy import Allowed
    from diskmorph.formats.probe import Signature
    from diskmorph.formats.source import ByteSource


TREE_KINDS = frozenset((*IMAGE_FORMATS, "tar", "directory"))
"""What is described as a tree; an ISO is a disk as well."""


def describe(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    parents: Allowed = None,
    limits: Limits | None = None,
    source: ByteSource | None = None,
    platform: str | None = None,
) -> dict[str, Any] | None:
    """Return the JSON object that `info` shows of what is no disk (docs/json.md); None for disks.

    `source`: the bytes, where they are open already, which stay open. `platform` (`os/architecture[/variant]`) chooses
    from an index of container images. A package's manifest is verified first. Raises UnsupportedError (a package that
    is no file), and what `open_package` and the readers of kernels, ramdisks and trees raise.
    """
    limits = limits or Limits()
    parents = Parents.of(parents)
    prefix, name = split_prefix(os.fspath(path))
    if source is not None and format in TREE_KINDS:
        raise OptionError(f"{format} is not read from standard input", hint="name the file")
    if source is None and (prefix or format in TREE_KINDS or (format is None and name and Path(name).is_dir())):
        return _described_tree(path, format, platform, limits)
    with Opener(parents, limits).user_source(path) if source is None else nullcontext(source) as opened:
        try:
            entry, found = identify(opened, format)
        except UnsupportedError:
            tree = None if source is not None else _described_tree(path, format, platform, limits)
            if tree is None:
                raise
            return tree
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


def _described_tree(
    path: str | os.PathLike[str], format: str | None, platform: str | None, limits: Limits
) -> dict[str, Any] | None:
    """Return what `info` shows of a container image, an archive or a directory; None where it is none of them."""
    from diskmorph.convert.describe_trees import describe_tree  # noqa: PLC0415 - seldom needed
    from diskmorph.formats.trees import tree_format  # noqa: PLC0415 - as above

    kind = format if format in TREE_KINDS else tree_format(path)
    if kind not in TREE_KINDS:
        return None
    return {**_common(os.fspath(path), kind, 0, ()), **describe_tree(path, kind, platform=platform, limits=limits)}


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
