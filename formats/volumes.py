"""File systems as trees: from what a disk or partition holds to the reader that understands it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from diskmorph.formats import fsprobe
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.fsprobe import FileSystem
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.tree import Tree

# fsprobe's type -> the module and function that read it
READERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), ("diskmorph.formats.ext4.reader", "read_ext")),
    **dict.fromkeys(("fat12", "fat16", "fat32", "vfat"), ("diskmorph.formats.fat.reader", "read_fat")),
    "btrfs": ("diskmorph.formats.btrfs", "read_btrfs"),
    "xfs": ("diskmorph.formats.xfs", "read_xfs"),
    **dict.fromkeys(("iso9660", "udf"), (__name__, "_read_iso")),
}
_WORDS = {
    "luks": ("is encrypted by LUKS", "open it first, and convert what lies inside"),
    "bitlocker": ("is encrypted by BitLocker", "decrypt it first"),
    "mdraid": ("is a member of a Linux md RAID", "assemble the RAID first, and convert what lies inside"),
    "lvm2": ("is an LVM2 physical volume", "choose a logical volume by --partition GROUP/NAME"),
    "swap": ("is swap space", None),
}


def readable(found: FileSystem | None) -> bool:
    """Return whether a file system is read as a tree."""
    return found is not None and found.type in READERS


def open_volume(disk: Disk, *, limits: Limits | None = None) -> Tree:
    """Return the tree of the file system that a disk (or a slice of one) holds. The tree owns the disk.

    Raises UnsupportedError, naming what it is, where it is not read; FormatError where it is damaged or nothing known.
    """
    found = fsprobe.probe(disk)
    if found is None:
        raise FormatError("holds no file system that is known", file=disk.name)
    if found.type not in READERS:
        raise unsupported(found.type, disk.name)
    module, function = READERS[found.type]
    reader = cast("Callable[..., Tree]", getattr(importlib.import_module(module), function))
    try:
        return reader(disk, limits=limits)
    except DiskmorphError as error:
        raise error.located(file=disk.name, format=found.type) from error.__cause__


def _read_iso(disk: Disk, *, limits: Limits | None = None) -> Tree:
    from diskmorph.formats.iso import open_tree  # noqa: PLC0415 - loaded for ISOs
    from diskmorph.formats.views import DiskSource  # noqa: PLC0415

    return open_tree(DiskSource.of(disk), limits)


def unsupported(kind: str, name: str) -> UnsupportedError:
    """Return the error that names what is there and is not read."""
    words, hint = _WORDS.get(kind, (f"holds {kind}, which is not read", None))
    return UnsupportedError(f"{words} ({kind})", feature=kind, file=name, hint=hint)
