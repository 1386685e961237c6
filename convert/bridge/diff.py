"""What changed between two trees, as the entries of an image layer: new and changed names, and whiteouts."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diskmorph.convert.bridge.injected import FOLDER, fingerprint
from diskmorph.convert.bridge.pseudo import EMPTIED
from diskmorph.formats.oci.layers import WHITEOUT
from diskmorph.formats.tree import Entry, Node, file_node

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diskmorph.formats.tree import Tree

_STEP = 1 << 20
_SECOND = 10**9
_IGNORED = frozenset((FOLDER, b"lost+found"))


@dataclass(frozen=True)
class Known:
    """What is not to count as a change: paths that a build put in, with their fingerprints, and those it took away."""

    added: Mapping[bytes, str] = field(default_factory=dict)
    removed: frozenset[bytes] = frozenset()


def changes(base: Tree, new: Tree, known: Known) -> list[Entry]:
    """Return the entries of a layer that turns `base` into `new`, parents first, sorted by name."""
    return list(_Diff(base, new, known).directory(b"", base.root, new.root))


class _Diff:
    def __init__(self, base: Tree, new: Tree, known: Known) -> None:
        self._known = known
        self._names = (_links(base), _links(new))

    def directory(self, path: bytes, old: Node, new: Node) -> Iterator[Entry]:
        """Yield what changed in and below a directory that both trees have."""
        if _attributes_differ(old, new) and not self._is_ours(path, new):
            yield Entry(path, new)
        if path in EMPTIED:
            return
        before, now = old.children, new.children
        for name in sorted({*before, *now}):
            whole = path + b"/" + name if path else name
            if whole in _IGNORED:
                continue
            was, found = before.get(name), now.get(name)
            if found is None:
                if whole not in self._known.removed:
                    yield Entry((path + b"/" if path else b"") + WHITEOUT + name, file_node(b""))
            elif was is None:
                yield from self._added(whole, found)
            elif was.is_dir and found.is_dir:
                yield from self.directory(whole, was, found)
            elif found.is_dir:
                yield from self._added(whole, found)
            elif self._differ(was, found) and not self._is_ours(whole, found):
                yield Entry(whole, found)

    def _added(self, path: bytes, node: Node) -> Iterator[Entry]:
        """Yield a new name and all below it."""
        if not self._is_ours(path, node):
            yield Entry(path, node)
        for name, child in sorted(node.children.items()):
            yield from self._added(path + b"/" + name, child)

    def _is_ours(self, path: bytes, node: Node) -> bool:
        told = self._known.added.get(path)
        return told is not None and told == fingerprint(node)

    def _differ(self, old: Node, new: Node) -> bool:
        """Return whether two files that are no directories differ, the names of their inodes included."""
        if _attributes_differ(old, new) or old.kind != new.kind:
            return True
        if (old.size, old.target, old.rdev) != (new.size, new.target, new.rdev):
            return True
        if self._names[0].get(id(old)) != self._names[1].get(id(new)):
            return True
        return old.kind == stat.S_IFREG and not _same_content(old, new)


def _attributes_differ(old: Node, new: Node) -> bool:
    if (old.mode, old.uid, old.gid) != (new.mode, new.uid, new.gid) and old.kind != stat.S_IFLNK:
        return True
    if (old.uid, old.gid) != (new.uid, new.gid) or dict(old.xattrs) != dict(new.xattrs):
        return True
    if old.mtime == new.mtime:
        return False
    coarse = not old.mtime % _SECOND or not new.mtime % _SECOND  # one of the two keeps whole seconds only
    return not coarse or old.mtime // _SECOND != new.mtime // _SECOND


def _same_content(old: Node, new: Node) -> bool:
    one, other = old.source(), new.source()
    for at in range(0, old.size, _STEP):
        count = min(_STEP, old.size - at)
        if one.read(at, count) != other.read(at, count):
            return False
    return True


def _links(tree: Tree) -> dict[int, list[bytes]]:
    """Return, for each node with several names, all of them, by its id."""
    first: dict[int, bytes] = {}
    found: dict[int, list[bytes]] = {}
    for path, node in tree.walk(ordered=True):
        if node.is_dir:
            continue
        key = id(node)
        if key in first:
            found.setdefault(key, [first[key]]).append(path)
        else:
            first[key] = path
    return found
