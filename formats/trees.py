"""From a path to a `Tree`, whatever it is: a directory, an archive, a container image, a file system in a disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.formats.errors import DiskmorphError
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Opener
from diskmorph.formats.tree_names import IMAGE_FORMATS, split_prefix

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.tree import Tree

_ISO_MARK = 32769  # the first volume descriptor's identifier, ECMA-119 8.1.2


def tree_format(path: str | os.PathLike[str]) -> str | None:
    """Return which kind of tree a path is, by its content: one of TREE_FORMATS; None if it is none of them.

    `oci:`, `oci-archive:`, `docker-archive:` and `docker://` before a name decide. Raises SourceError if it cannot be
    read.
    """
    prefix, _ = split_prefix(os.fspath(path))
    if prefix:
        return prefix
    if Path(path).is_dir():
        return "oci" if (Path(path) / "oci-layout").is_file() else "directory"
    with _opened(path, Limits()) as source:
        return _archive_format(source)


def open_tree(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    platform: str | None = None,
    limits: Limits | None = None,
    on_fetch: Callable[[int, int], None] | None = None,
) -> Tree:
    """Open a directory, an archive, a container image, an ISO or a disk's root file system as a tree.

    Archives may be compressed (gzip, zstd, xz): they are decoded once into an unlinked file in `$TMPDIR`. `format`
    decides where content is ambiguous; `platform` (`os/architecture[/variant]`) chooses from an image index; `on_fetch`
    is told how many bytes of a registry's layers are there, of how many. Close the tree, or use it in `with`. Raises
    FormatError, UnsupportedError, SourceError, OptionError.
    """
    limits = limits or Limits()
    prefix, name = split_prefix(os.fspath(path))
    found = format or prefix or tree_format(name)
    if found == "directory":
        from diskmorph.formats.directory import read_directory  # noqa: PLC0415 - what is used is loaded

        return read_directory(name, limits=limits)
    if found in IMAGE_FORMATS:
        from diskmorph.formats.oci import open_image  # noqa: PLC0415

        return open_image(name, format=found, platform=platform, limits=limits, on_fetch=on_fetch).tree()
    if found == "tar":
        return _open_tar(_opened(name, limits), limits)
    if found == "iso":
        from diskmorph.formats.iso import open_tree as open_iso  # noqa: PLC0415

        return open_iso(_opened(name, limits), limits)
    return _open_root(name, found, limits)


def _opened(name: str | os.PathLike[str], limits: Limits) -> ByteSource:
    """Open a file, or what a URL names."""
    return Opener(limits=limits).user_source(name)


def _open_root(name: str, format: str | None, limits: Limits) -> Tree:
    """Open the root file system of a disk."""
    from diskmorph.formats.registry import open_disk  # noqa: PLC0415
    from diskmorph.formats.roots import open_root  # noqa: PLC0415

    disk = open_disk(name, format=format, limits=limits)
    try:
        return open_root(disk, limits=limits)
    except BaseException:
        disk.close()
        raise


def _open_tar(source: ByteSource, limits: Limits) -> Tree:
    from diskmorph.formats.spool import decoded  # noqa: PLC0415
    from diskmorph.formats.tar import read_tar  # noqa: PLC0415

    plain = source
    try:
        plain = decoded(source, limits)
        return read_tar(plain, limits=limits, name=source.name)
    except DiskmorphError as error:
        plain.close()
        source.close()
        raise error.located(file=source.name, format="tar") from error.__cause__


def _archive_format(source: ByteSource) -> str | None:
    """Return the kind of archive a file is."""
    from diskmorph.formats.spool import codec_of, decoded, head_of  # noqa: PLC0415
    from diskmorph.formats.tar.schema import is_tar  # noqa: PLC0415

    head = head_of(source, 512)
    if not is_tar(head):
        return "iso" if source.read_upto(_ISO_MARK, 5) == b"CD001" else None
    from diskmorph.formats.oci.archive import archive_format, may_be_image  # noqa: PLC0415

    if codec_of(source) is None:
        return archive_format(source) or "tar"
    if not may_be_image(head):
        return "tar"
    with decoded(source.window(0, source.size), Limits()) as plain:
        return archive_format(plain) or "tar"
