"""What a user names as a tree: the root file system of a disk, an ISO, an archive, a container image, a directory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from diskmorph.formats.errors import DiskmorphError, OptionError
from diskmorph.formats.registry import open_disk
from diskmorph.formats.roots import open_root
from diskmorph.formats.tree_names import TREE_FORMATS
from diskmorph.formats.trees import open_tree, tree_format

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.convert.options import ConvertOptions
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.tree import Tree


def open_source_tree(
    source: str | os.PathLike[str] | Disk,
    wanted: ConvertOptions,
    *,
    partition: int | str | None = None,
    platform: str | None = None,
    on_fetch: Callable[[int, int], None] | None = None,
) -> Tree:
    """Open a disk's root, or what is a tree already. The tree owns what was opened. Raises DiskmorphError."""
    if isinstance(source, str | os.PathLike):
        kind = wanted.source_format or tree_format(source)
        if kind in TREE_FORMATS:
            if partition is not None:
                raise OptionError(f"{os.fspath(source)} is no disk", hint="leave --partition out")
            return open_tree(source, format=kind, platform=platform, limits=wanted.limits, on_fetch=on_fetch)
        disk = open_disk(source, format=wanted.source_format, parents=wanted.parents, limits=wanted.limits)
    else:
        disk = source
    try:
        return open_root(disk, partition=partition, limits=wanted.limits)
    except DiskmorphError as error:
        if disk is not source:
            disk.close()
        raise error.located(file=disk.name) from error.__cause__
