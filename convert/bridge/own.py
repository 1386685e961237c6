"""What is read is never written over: neither a tree's source nor what that in turn is read from."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.opening import origin_of, refuse_same, same_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskmorph.formats.tree import Tree


def refuse_sources(targets: Iterable[Path], names: Iterable[str], tree: Tree | None = None) -> None:
    """Raise TargetError where a target is a file that is read: one of `names`, in one of them, or behind the tree.

    `names`: files and directories that the user named; others (URLs) are passed over. A symbolic link may be replaced.
    The files behind a compressed archive are known by its name alone: they were decoded and closed.
    """
    origins: dict[tuple[int, int], str] = {}
    for source in tree.sources if tree is not None else ():
        origins.update(source.origins())
    folders = []
    for name in names:
        origins.update(origin_of(name))
        if os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for odd names
            folders.append(Path(name).resolve())
    for path in targets:
        refuse_same(path, origins)
        if _is_plain(path) and any(path.parent.resolve().is_relative_to(folder) for folder in folders):
            raise same_file(path, str(path))


def _is_plain(path: Path) -> bool:
    """Say whether there is a file that would be replaced, no link and no directory."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return not stat.S_ISLNK(mode) and not stat.S_ISDIR(mode)
