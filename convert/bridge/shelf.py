"""Where boot parts are taken from: the tree itself, packages that were given, and last the machine's own files."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.bridge.software import open_software
from diskmorph.formats.errors import OptionError, SourceError
from diskmorph.formats.source import FileSource
from diskmorph.formats.tree import Node, Piece, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from diskmorph.formats.limits import Limits

_LARGEST_PART = 64 << 20


class Shelf:
    """Looks for files by their paths, in turn: the tree, packages, the machine.

    What is found belongs to the tree, which closes its sources. Nothing is executed.
    """

    def __init__(self, tree: Tree, packages: Sequence[Path], limits: Limits) -> None:
        self._trees = [tree]
        for path in packages:
            found = open_software(path, limits)
            tree.sources.extend(found.sources)
            self._trees.append(found)

    def trees(self) -> Iterator[Tree]:
        """Yield the tree and the packages."""
        yield from self._trees

    def packages(self) -> Iterator[Tree]:
        """Yield the packages."""
        yield from self._trees[1:]

    def find(self, paths: Iterable[str], fits: Callable[[Node], bool] = lambda _: True) -> Node | None:
        """Return the first regular file at one of `paths` that fits, or None."""
        paths = tuple(paths)
        for tree in self._trees:
            for path in paths:
                node = tree.find(path)
                if node is not None and node.kind == stat.S_IFREG and node.size <= _LARGEST_PART and fits(node):
                    return node
        for path in paths:
            node = host_file(Path("/") / path)
            if node is not None and fits(node):
                return node
        return None

    def folder(self, paths: Iterable[str], needed: str) -> dict[str, Node] | Path | None:
        """Return the first folder that has a file `needed`: its files, or the machine's own path; else None."""
        paths = tuple(paths)
        for tree in self._trees:
            for path in paths:
                node = tree.find(path)
                if node is not None and needed.encode() in node.children:
                    return {_text(name): child for name, child in node.children.items() if child.kind == stat.S_IFREG}
        for path in paths:
            if (Path("/") / path / needed).is_file():
                return Path("/") / path
        return None


def host_file(path: Path) -> Node | None:
    """Return a file of this machine as a node, None where there is none that can be read."""
    try:
        source = FileSource(path)
    except SourceError:
        return None
    if source.size > _LARGEST_PART:
        return None
    return Node(stat.S_IFREG | 0o755, size=source.size, pieces=(Piece(0, source.size, source, 0),))


def given_file(path: Path, option: str) -> Node:
    """Return a file that the user named. Raises SourceError, OptionError where it is too large to be one."""
    source = FileSource(path)
    if source.size > 1 << 30:
        raise OptionError(f"{path} is larger than 1 GiB", hint=f"is it what {option} means?")
    return Node(stat.S_IFREG | 0o644, size=source.size, pieces=(Piece(0, source.size, source, 0),))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
