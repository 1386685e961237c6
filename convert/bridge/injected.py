"""Keeps a record, in the tree itself, of what a build puts in or takes away, so that `commit` can leave it out.

The record lies in `/.diskmorph/added`: a line of JSON for each path, with the hash of what was put there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from typing import TYPE_CHECKING, Any

from diskmorph.formats.tree import Node, Tree, dir_node, file_node

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = b".diskmorph"
RECORD = FOLDER + b"/added"
_LARGEST_RECORD = 16 << 20


def fingerprint(node: Node) -> str:
    """Return a hash of a node's attributes, times excluded, and content; of a directory without what is in it."""
    found = hashlib.sha256(repr((node.mode, node.uid, node.gid, node.target, node.rdev)).encode())
    if node.kind == stat.S_IFREG:
        source = node.source()
        for at in range(0, node.size, 1 << 20):
            found.update(source.read(at, min(1 << 20, node.size - at)))
    return found.hexdigest()


class Injector:
    """Changes a tree before it is built; `finish` writes the record into it.

    Parents that are missing are made and recorded; those that are there keep their times.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._added: dict[bytes, str] = {}
        self._removed: set[bytes] = set()

    def put(self, path: bytes | str, node: Node) -> None:
        """Put a node at a path, over whatever is there."""
        name = _plain(path)
        for parent in _parents(name):
            if self._tree.find(parent) is None:
                self._note(parent, dir_node(mtime=node.mtime))
        self._note(name, node)

    def remove(self, path: bytes | str) -> None:
        """Take a path away, if it is there."""
        if self._tree.remove(path) is not None:
            self._removed.add(_plain(path))

    def finish(self, mtime: int = 0) -> None:
        """Write the record."""
        self.put(FOLDER, dir_node(0o700, mtime=mtime))
        lines = [_line(path, fingerprint=found) for path, found in sorted(self._added.items())]
        lines += [_line(path) for path in sorted(self._removed)]
        self._tree.put(RECORD, file_node("".join(lines).encode(), 0o600, mtime=mtime))

    def _note(self, path: bytes, node: Node) -> None:
        self._tree.put(path, node)
        self._added[path] = fingerprint(node)


def _line(path: bytes, **fields: Any) -> str:
    return json.dumps({"path": base64.b64encode(path).decode(), **fields}, sort_keys=True) + "\n"


def _plain(path: bytes | str) -> bytes:
    name = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
    return b"/".join(word for word in name.split(b"/") if word not in (b"", b"."))


def _parents(path: bytes) -> Iterator[bytes]:
    words = path.split(b"/")
    for count in range(1, len(words)):
        yield b"/".join(words[:count])


def read_record(tree: Tree) -> tuple[dict[bytes, str], set[bytes]]:
    """Return the paths that a build put into a tree, with fingerprints, and those it took away; empty without a record.

    The record comes from the disk: lines that make no sense are passed over.
    """
    node = tree.find(RECORD, follow=False)
    added: dict[bytes, str] = {}
    removed: set[bytes] = set()
    if node is None or node.kind != stat.S_IFREG or node.size > _LARGEST_RECORD:
        return added, removed
    for line in node.read().splitlines():
        try:
            fields = json.loads(line)
            path = base64.b64decode(fields["path"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        found = fields.get("fingerprint")
        if isinstance(found, str):
            added[path] = found
        else:
            removed.add(path)
    added[RECORD] = fingerprint(node)
    return added, removed
