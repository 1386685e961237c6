"""`Package`: metadata plus the disks in it. What `open_package` opens, whatever the kind."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

from diskmorph.formats.errors import OptionError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Opener, Parents

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.machine import Machine, MachineDisk
    from diskmorph.formats.source import ByteSource


class Package(ABC):
    """An open package. Close it, or use it in `with`; its disks must not be read afterwards.

    `format` and `name` stand in messages; `machines` are what it describes; `disks` all its disks, by their numbers
    from 1; `warnings` what a user should know.
    """

    format: str
    name: str
    machines: Sequence[Machine] = ()
    disks: Sequence[MachineDisk] = ()
    warnings: Sequence[str] = ()

    @abstractmethod
    def open_disk(self, number: int | None = None) -> Disk:
        """Open a disk by its number; None is for the only one. Raises OptionError, and what disks raise."""

    @abstractmethod
    def close(self) -> None:
        """Close the package's files."""

    def details(self) -> dict[str, Any]:
        """Return what `info --json` shows beside the machines."""
        return {}

    def pick(self, number: int | None) -> MachineDisk:
        """Return the disk that `--disk` names. Raises OptionError naming the disks there are."""
        if number is None and len(self.disks) == 1:
            return self.disks[0]
        if number is not None and 1 <= number <= len(self.disks):
            return self.disks[number - 1]
        if not self.disks:
            raise UnsupportedError("holds no disk", feature="disks", file=self.name, format=self.format)
        listed = ", ".join(f"{disk.number}: {disk.file or disk.id}" for disk in self.disks)
        problem = "holds several disks" if number is None else f"has no disk {number}"
        raise OptionError(f"{problem} ({listed})", file=self.name, format=self.format, hint="choose one with --disk N")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PackageModule(Protocol):
    """What the module of a package format exports beside what `registry.FormatModule` says."""

    def open_package(self, source: ByteSource, format: str, opener: Opener, limits: Limits) -> Package:
        """Open a package whose file is known to be of `format`."""


PACKAGES = frozenset({"ova", "ovf", "ami"})
"""Format names whose modules have `open_package`."""


def is_package(format: str) -> bool:
    """Return whether files of a format hold disks beside metadata."""
    return format in PACKAGES


def open_package(
    path: str | os.PathLike[str] | ByteSource,
    *,
    format: str | None = None,
    parents: Parents | str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
    limits: Limits | None = None,
) -> Package:
    """Open a package: .ova, .ovf with its folder, the manifest of an EC2 bundle.

    Its manifest and certificate, where it has them, are verified first, over every file that they name. Raises
    FormatError, IntegrityError (a digest or signature is false), PolicyError, UnsupportedError (not a package).
    """
    from diskmorph.formats.registry import identify, load  # noqa: PLC0415 - registry opens packages too

    limits = limits or Limits()
    opener = Opener(Parents.of(parents), limits)
    source = cast("ByteSource", path) if hasattr(path, "pread") else opener.user_source(cast("str", path))
    try:
        entry, _ = identify(source, format)
        if not is_package(entry.name):
            raise UnsupportedError(
                f"is no package but {entry.name}", feature="packages", file=source.name, format=entry.name
            )
        return cast("PackageModule", load(entry)).open_package(source, entry.name, opener, limits)
    except BaseException:
        source.close()
        raise
