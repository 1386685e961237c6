"""cpio archives of the "newc" form: initial ramdisks are written so, and the files of .rpm packages read.

The form is that of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from construct import Bytes, Struct

from diskmorph.formats.errors import FormatError
from diskmorph.formats.limits import Limits
from diskmorph.formats.tree import Node, Piece, Tree

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource

MAGIC = b"070701"
_MAGICS = (MAGIC, b"070702")  # the second has checksums
_TRAILER = b"TRAILER!!!"
_LONGEST_NAME = 4096
_LONGEST_LINK = 4096
# Every number is eight hexadecimal digits.
HEADER = Struct(
    "magic" / Bytes(6),
    "ino" / Bytes(8),  # names with the same number are one file, whose bytes come with the last
    "mode" / Bytes(8),
    "uid" / Bytes(8),
    "gid" / Bytes(8),
    "nlink" / Bytes(8),
    "mtime" / Bytes(8),  # seconds since 1970
    "filesize" / Bytes(8),
    "devmajor" / Bytes(8),
    "devminor" / Bytes(8),
    "rdevmajor" / Bytes(8),
    "rdevminor" / Bytes(8),
    "namesize" / Bytes(8),  # with its NUL
    "check" / Bytes(8),
)
_SIZE = HEADER.sizeof()
_NUMBERS = ("ino", "mode", "uid", "gid", "nlink", "mtime", "filesize", "rdevmajor", "rdevminor", "namesize")


def write_cpio(tree: Tree) -> bytes:
    """Return a tree as an archive: names sorted, parents first, numbers counted; the same bytes for the same tree.

    Meant for initial ramdisks: the whole archive is held in memory. A file of several names is written for each.
    """
    found = bytearray()
    for number, (path, node) in enumerate(tree.walk(ordered=True), 1):
        if path:
            content = node.target if node.kind == stat.S_IFLNK else node.read() if node.kind == stat.S_IFREG else b""
            found += _member(path, node, number, content)
    found += _member(_TRAILER, Node(0), 0, b"")
    found += bytes(-len(found) % 512)
    return bytes(found)


def _member(path: bytes, node: Node, number: int, content: bytes) -> bytes:
    values = {
        "ino": number,
        "mode": node.mode,
        "uid": node.uid,
        "gid": node.gid,
        "nlink": 1 + node.is_dir,
        "mtime": max(0, node.mtime // 10**9) & 0xFFFFFFFF,
        "filesize": len(content),
        "rdevmajor": node.rdev[0],
        "rdevminor": node.rdev[1],
        "namesize": len(path) + 1,
    }
    fields = {name: b"%08X" % values.get(name, 0) for name in (*_NUMBERS, "devmajor", "devminor", "check")}
    head = bytes(HEADER.build({"magic": MAGIC, **fields})) + path + b"\0"
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def read_cpio(source: ByteSource, *, limits: Limits | None = None) -> Tree:
    """Return the tree of one archive; the tree owns `source`. Raises FormatError: damaged, cut off, bad names."""
    tree = Tree(name=source.name, format="cpio", limits=limits or Limits())
    tree.sources.append(source)
    waiting: dict[int, list[bytes]] = {}
    at = 0
    while True:
        numbers, name, data = _read_head(source, at)
        at = data + numbers["filesize"] + -numbers["filesize"] % 4
        if name == _TRAILER:
            break
        if data + numbers["filesize"] > source.size:
            raise _fault(source, "is cut off within a file", at)
        node = _node(source, numbers, data)
        names = [name]
        if node.kind == stat.S_IFREG and numbers["nlink"] > 1:
            names = [*waiting.pop(numbers["ino"], []), name]
            if not numbers["filesize"]:
                waiting[numbers["ino"]] = names
        for word in names:
            tree.put(word, node)
    return tree


def _read_head(source: ByteSource, at: int) -> tuple[dict[str, int], bytes, int]:
    """Return the numbers, the name and where the content begins."""
    raw = source.read_upto(at, _SIZE)
    if len(raw) < _SIZE:
        raise _fault(source, "is cut off: it has no trailer", at)
    header = HEADER.parse(raw)
    if header.magic not in _MAGICS:
        raise _fault(source, "is damaged: no member begins here", at)
    try:
        numbers = {name: int(header[name], 16) for name in _NUMBERS}
    except ValueError:
        raise _fault(source, "is damaged: a number is none", at) from None
    if min(numbers.values()) < 0:  # a size below zero would lead back to where the reader has been
        raise _fault(source, "is damaged: a number is below zero", at)
    length = numbers["namesize"]
    if not 0 < length <= _LONGEST_NAME:
        raise _fault(source, "has a name of an impossible length", at)
    data = at + _SIZE + length + -(_SIZE + length) % 4
    return numbers, source.read(at + _SIZE, length).rstrip(b"\0"), data


def _node(source: ByteSource, numbers: dict[str, int], data: int) -> Node:
    mode, size = numbers["mode"], numbers["filesize"]
    if mode & 0o170000 == stat.S_IFLNK and size > _LONGEST_LINK:
        raise _fault(source, "has a link of an impossible length", data)
    owner, group, mtime = numbers["uid"], numbers["gid"], numbers["mtime"] * 10**9
    if mode & 0o170000 == stat.S_IFLNK:
        return Node(mode, owner, group, mtime, target=source.read(data, size), size=size)
    if mode & 0o170000 == stat.S_IFREG:
        pieces = (Piece(0, size, source, data),) if size else ()
        return Node(mode, owner, group, mtime, size=size, pieces=pieces)
    return Node(mode, owner, group, mtime, rdev=(numbers["rdevmajor"], numbers["rdevminor"]))


def _fault(source: ByteSource, problem: str, offset: int) -> FormatError:
    return FormatError(problem, file=source.name, format="cpio", structure="member", offset=offset)
