"""Merges image layers into one tree (OCI image-spec, "Layer Filesystem Changeset").

A layer's whiteouts hide what lower layers have, whatever their place in the layer's archive; so they come first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.errors import FormatError
from diskmorph.formats.tar import members

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.tar import Member
    from diskmorph.formats.tree import Node, Tree

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"


def apply_layer(tree: Tree, source: ByteSource, number: int) -> None:
    """Apply a layer's archive (decoded, its digest known to be right) to the tree of the layers below.

    Raises FormatError: damaged, names out of the tree, links to nothing.
    """
    rest: list[Member] = []
    hidden: dict[bytes, Node] = {}
    for member in members(source, limits=tree.limits, layer=number, lost=tree.lost, complete=False):
        head, _, name = member.name.rstrip(b"/").rpartition(b"/")
        if not name.startswith(WHITEOUT):
            rest.append(member)
        elif name == OPAQUE:
            folder = tree.find(head)
            if folder is not None and folder.is_dir:
                for child in list(folder.children):
                    tree.remove(head + b"/" + child)
        elif not name.startswith(WHITEOUT + WHITEOUT):  # other names of that kind are aufs's own
            _hide(tree, head, name[len(WHITEOUT) :], hidden)
    for member in rest:
        if member.node is not None:
            tree.put(member.name, member.node)
        elif tree.find(member.link, follow=False) is None and _plain(member.link) in hidden:
            tree.put(member.name, hidden[_plain(member.link)])  # linked to and hidden by one layer: a rename
        else:
            tree.link(member.name, member.link)


def _hide(tree: Tree, head: bytes, name: bytes, hidden: dict[bytes, Node]) -> None:
    if name in (b"", b".", b".."):
        raise FormatError(f"a layer hides the name {name!r}", file=tree.name, format=tree.format)
    path = head + b"/" + name
    node = tree.remove(path)
    if node is not None and not node.is_dir:
        hidden[_plain(path)] = node


def _plain(path: bytes) -> bytes:
    return b"/".join(word for word in path.split(b"/") if word not in (b"", b"."))
