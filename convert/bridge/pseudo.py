"""What of a running system's root is not part of its image: pseudo file systems, swap; on request the boot parts."""

from __future__ import annotations

import re
import stat
from typing import TYPE_CHECKING

from diskmorph.formats.oci.layers import WHITEOUT

if TYPE_CHECKING:
    from diskmorph.formats.tree import Node, Tree

EMPTIED = (b"proc", b"sys", b"dev", b"run", b"tmp")
"""Directories whose content is made anew at each boot."""
_LEAST_SWAP = 8192
_SWAP = b"SWAPSPACE2"
_SWAP_AT = (4096 - len(_SWAP), 65536 - len(_SWAP))  # at the end of the first page
_BOOT = (b"lib/modules", b"usr/lib/modules", b"lib/firmware", b"usr/lib/firmware")
_KERNEL_LINK = re.compile(rb"(vmlinuz|initrd\.img|vmlinux)(\.old)?")


def drop_from_root(tree: Tree) -> None:
    """Do as `drop_pseudo` where the tree is a system's root; elsewhere (data, an ISO) these are names as any other.

    An empty lost+found goes in any case: it belongs to the file system.
    """
    etc = tree.find("etc")
    if etc is not None and etc.is_dir:
        drop_pseudo(tree)
        return
    found = tree.root.children.get(b"lost+found")
    if found is not None and found.is_dir and not found.children:
        tree.remove(b"lost+found")


def drop_pseudo(tree: Tree) -> None:
    """Take away what is not part of an image: contents of /proc and the like, lost+found, swap files."""
    for name in EMPTIED:
        node = tree.root.children.get(name)
        if node is not None and node.is_dir:
            node.clear()
    found = tree.root.children.get(b"lost+found")
    if found is not None and found.is_dir:
        tree.remove(b"lost+found")
    for path in (*_swap_of_fstab(tree), *_named_swap(tree.root)):
        node = tree.find(path, follow=False)
        if node is not None and _is_swap(node):
            tree.remove(path)


def drop_whiteouts(tree: Tree) -> None:
    """Take away names that an image layer would take for whiteouts, and tell them in `tree.lost`."""
    found = [path for path, _ in tree.walk(ordered=True) if path.rpartition(b"/")[2].startswith(WHITEOUT)]
    for path in found:
        head, _, name = path.rpartition(b"/")
        folder = tree.find(head, follow=False)
        if folder is not None and folder.children.pop(name, None) is not None:
            shown = path.decode(errors="backslashreplace")
            tree.lost.append(f"{shown}: image layers keep names that begin with .wh. for what is removed")


def _named_swap(root: Node) -> list[bytes]:
    return [name for name, node in root.children.items() if node.kind == stat.S_IFREG and b"swap" in name.lower()]


def _swap_of_fstab(tree: Tree) -> list[bytes]:
    node = tree.find("etc/fstab")
    if node is None or node.kind != stat.S_IFREG or node.size > 1 << 20:
        return []
    lines = [line.split() for line in node.read().splitlines()]
    return [w[0] for w in lines if len(w) > 2 and w[2] == b"swap" and w[0].startswith(b"/") and b".." not in w[0]]


def _is_swap(node: Node) -> bool:
    if node.kind != stat.S_IFREG or node.size < _LEAST_SWAP:
        return False
    source = node.source()
    return any(source.read_upto(at, len(_SWAP)) == _SWAP for at in _SWAP_AT)


def strip_boot(tree: Tree) -> None:
    """Take away kernel, modules, firmware and boot loader: what a container has no use for."""
    boot = tree.root.children.get(b"boot")
    if boot is not None and boot.is_dir:
        boot.clear()
    for path in _BOOT:
        tree.remove(path)
    for name in [name for name in tree.root.children if _KERNEL_LINK.fullmatch(name)]:
        tree.remove(name)
