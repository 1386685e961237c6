"""What is read is never written over: neither a tree's source nor what that in turn is read from."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.formats.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskmorph.formats.tree import Tree


def refuse_sources(targets: Iterable[Path], names: Iterable[str], tree: Tree | None = None) -> None:
    """Raise TargetError where a target is a file that is read: one of `names`, in one of them, or behind the tree.

    `names`: files and directories that the user named; others (URLs) are passed over. A symbolic link may be replaced.
    The files behind a compressed archive are known by its name alone: they were decoded and closed.
    """
    named = [name for name in names if os.path.exists(name)]  # noqa: PTH110 - Path.exists raises for odd names
    for path in targets:
        try:
            status = path.lstat()
        except OSError:
            continue
        if stat.S_ISLNK(status.st_mode):
            continue
        key = (status.st_dev, status.st_ino)
        for source in tree.sources if tree is not None else ():
            if key in source.origins():
                raise _same(path, source.origins()[key])
        for name in named:
            if path.samefile(name) and not path.is_dir():
                raise _same(path, name)
            if Path(name).is_dir() and not path.is_dir() and path.parent.resolve().is_relative_to(Path(name).resolve()):
                raise _same(path, str(path))


def _same(path: Path, name: str) -> TargetError:
    return TargetError(f"is the same file as {name}, which is read", file=str(path), hint="write to another name")
