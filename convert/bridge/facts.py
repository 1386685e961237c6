"""What a tree tells of itself: architecture, operating system, a seed for reproducible builds."""

from __future__ import annotations

import hashlib
import platform
from typing import TYPE_CHECKING

from diskmorph.formats.roots import os_release

if TYPE_CHECKING:
    from diskmorph.formats.tree import Node, Tree

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "riscv64": "riscv64"}
# e_machine of ELF, at byte 18
_ELF = {62: "amd64", 183: "arm64", 3: "386", 40: "arm", 243: "riscv64", 21: "ppc64le", 22: "s390x"}
_PROGRAMS = ("bin/sh", "sbin/init", "bin/busybox", "usr/bin/env", "usr/bin/bash", "lib/systemd/systemd")
_LARGEST_TEXT = 1 << 20
_STEP = 1 << 20


def architecture(tree: Tree) -> str:
    """Return the tree's architecture in OCI's words: what its configuration says, else its programs, else our own."""
    told = tree.config.get("architecture")
    if isinstance(told, str) and told:
        return told
    nodes = [node for name in _PROGRAMS if (node := tree.find(name)) is not None]
    for node in nodes or _some_files(tree):
        found = _elf_machine(node)
        if found is not None:
            return found
    return _MACHINES.get(platform.machine(), platform.machine())


def _some_files(tree: Tree) -> list[Node]:
    """Return the programs in the usual folders, the first few."""
    found: list[Node] = []
    for folder in ("", "bin", "usr/bin", "sbin", "app"):
        node = tree.find(folder)
        if node is not None and node.is_dir:
            found.extend(child for child in list(node.children.values())[:64] if child.mode & 0o111)
    return found


def _elf_machine(node: Node) -> str | None:
    if node.kind != 0o100000 or node.size < 20:
        return None
    head = node.source().read(0, 20)
    if head[:4] != b"\x7fELF":
        return None
    return _ELF.get(int.from_bytes(head[18:20], "big" if head[5] == 2 else "little"))


def read_text(tree: Tree, path: str) -> str | None:
    """Return a small text file of the tree, None where there is none."""
    node = tree.find(path)
    if node is None or node.kind != 0o100000 or node.size > _LARGEST_TEXT:
        return None
    return node.read().decode("utf-8", "replace")


def seed_of(tree: Tree) -> bytes:
    """Return a hash of everything in the tree, content included: what identifiers of reproducible builds come from."""
    found = hashlib.blake2b(digest_size=32)
    numbers: dict[int, int] = {}
    for path, node in tree.walk(ordered=True):
        number = numbers.setdefault(id(node), len(numbers))
        told = (path, number, node.mode, node.uid, node.gid, node.mtime, node.size, node.target, node.rdev)
        found.update(repr((told, sorted(node.xattrs.items()))).encode())
        if number == len(numbers) - 1:
            for piece in node.pieces:
                found.update(b"%d %d" % (piece.start, piece.length))
                for at in range(0, piece.length, _STEP):
                    found.update(piece.source.read(piece.offset + at, min(_STEP, piece.length - at)))
    return found.digest()


__all__ = ["architecture", "os_release", "read_text", "seed_of"]
