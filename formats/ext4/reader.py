"""Reads ext2, ext3 and ext4 as trees, directory by directory when first asked for."""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING

from diskmorph.formats.errors import DiskmorphError, UnsupportedError
from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4 import xattrs
from diskmorph.formats.ext4.blockmap import pieces_of, read_all, runs_of
from diskmorph.formats.ext4.checksum import chain, inode_seed
from diskmorph.formats.ext4.journal import replayed
from diskmorph.formats.ext4.volume import Inode, Volume
from diskmorph.formats.source import BytesSource
from diskmorph.formats.tree import Node, Piece, Tree
from diskmorph.formats.views import DiskSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.limits import Limits

_IN_BLOCK = 60  # bytes of an inode that hold a short link, or the start of inline data
_MOST_BLOCKS = 1 << 32  # of a file
_LONGEST_LINK = 65536
_LARGEST_VALUE = 65536  # of an extended attribute
_KINDS = frozenset((*s.FILE_TYPES,))


def read_ext(disk: Disk, *, limits: Limits | None = None) -> Tree:
    """Return the tree of a file system, its journal replayed in memory where that is needed.

    The tree owns the disk. Raises FormatError (damaged, cut off) and UnsupportedError, here or when a directory is
    first looked into.
    """
    source = DiskSource.of(disk)
    volume = replayed(Volume(source), limits)
    tree = Tree(_Reader(volume).root(), name=disk.name, format="ext4", limits=limits)
    tree.sources.append(source)
    return tree


class _Reader:
    """Makes nodes of inodes; names of one inode share its node."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._linked: dict[int, Node] = {}
        self._directories = {s.ROOT_INO}

    def root(self) -> Node:
        inode = self._volume.inode(s.ROOT_INO)
        if inode.mode & 0o170000 != stat.S_IFDIR:
            raise self._volume.error("the root is not a directory", "inode", 0, found=oct(inode.mode))
        return self._node(inode)

    def _lister(self, inode: Inode) -> Callable[[], dict[bytes, Node]]:
        return lambda: self._children(inode)

    def _children(self, folder: Inode) -> dict[bytes, Node]:
        found: dict[bytes, Node] = {}
        for number, name in self._entries(folder):
            inode = self._volume.inode(number)
            if inode.mode & 0o170000 == stat.S_IFDIR:
                if number in self._directories:
                    raise self._error(folder, f"leads to directory {number}, which has another name already")
                self._directories.add(number)
                found[name] = self._node(inode)
            elif inode.links > 1:
                node = self._linked.get(number)
                if node is None:
                    node = self._linked[number] = self._node(inode)
                found[name] = node
            else:
                found[name] = self._node(inode)
        return found

    def _error(self, inode: Inode, problem: str) -> DiskmorphError:
        return self._volume.error(f"directory {inode.number} {problem}", "directory", 0)

    def _node(self, inode: Inode) -> Node:
        kind = inode.mode & 0o170000
        if kind >> 12 not in _KINDS or not inode.links:
            raise self._volume.error(
                f"inode {inode.number} has a name, but is unused or damaged", "inode", 0, found=oct(inode.mode)
            )
        if inode.size > _MOST_BLOCKS * self._volume.block_size:
            raise self._volume.error(f"inode {inode.number} is damaged", "inode", 0, field="size", found=inode.size)
        if inode.flags & s.ENCRYPT_FL:
            raise UnsupportedError(
                f"inode {inode.number} is encrypted", feature="encrypt", file=self._volume.source.name, format="ext4"
            )
        attributes = self._attributes(inode)
        inline = attributes.pop(b"system.data", None)
        node = Node(
            inode.mode,
            inode.uid,
            inode.gid,
            inode.mtime,
            xattrs=attributes,
            children=self._lister(inode) if kind == stat.S_IFDIR else None,
        )
        if kind == stat.S_IFREG:
            node.size = inode.size
            node.pieces = self._content(inode, inline)
        elif kind == stat.S_IFLNK:
            node.target = self._target(inode, inline)
            node.size = len(node.target)
        elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
            node.rdev = _device(inode)
        return node

    def _content(self, inode: Inode, inline: bytes | None) -> tuple[Piece, ...]:
        if not inode.flags & s.INLINE_DATA_FL:
            return pieces_of(self._volume, inode) if inode.size else ()
        data = self._inline(inode, inline)
        return (Piece(0, len(data), BytesSource(data), 0),) if data else ()

    def _inline(self, inode: Inode, rest: bytes | None) -> bytes:
        data = inode.block + (rest or b"")
        if inode.size > len(data):
            raise self._volume.error(f"inode {inode.number} lacks inline data", "inode", 0, found=inode.size)
        return data[: inode.size]

    def _target(self, inode: Inode, inline: bytes | None) -> bytes:
        if inode.flags & s.INLINE_DATA_FL:
            target = self._inline(inode, inline)
        elif inode.size < _IN_BLOCK and not inode.flags & s.EXTENTS_FL and not self._data_sectors(inode):
            target = inode.block[: inode.size]
        else:
            target = read_all(self._volume, inode, _LONGEST_LINK)
        if not target or b"\0" in target:
            raise self._volume.error(f"the symbolic link of inode {inode.number} is damaged", "inode", 0)
        return target

    def _data_sectors(self, inode: Inode) -> int:
        return inode.sectors - (self._volume.block_size // 512 if inode.file_acl else 0)

    def _attributes(self, inode: Inode) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        volume = self._volume
        if volume.inode_size > s.OLD_INODE:
            at = s.OLD_INODE + int.from_bytes(inode.raw[128:130], "little")
            if inode.raw[at : at + 4] == s.XATTR_MAGIC.to_bytes(4, "little"):
                found = xattrs.parse(inode.raw, at + 4, at + 4, self._outside)
        if inode.file_acl:
            block = volume.read_block(inode.file_acl, "xattr block")
            self._verify_xattrs(inode.file_acl, block)
            found |= xattrs.parse(block, s.XATTR_HEADER.sizeof(), 0, self._outside)
        return found

    def _verify_xattrs(self, number: int, block: bytes) -> None:
        volume = self._volume
        if block[:4] != s.XATTR_MAGIC.to_bytes(4, "little"):
            raise volume.error("an xattr block is damaged", "xattr block", number * volume.block_size, field="magic")
        if volume.sums:
            seed = chain(volume.seed, number.to_bytes(8, "little"))
            if chain(seed, block[:16] + bytes(4) + block[20:]).to_bytes(4, "little") != block[16:20]:
                at = number * volume.block_size + 16
                raise volume.error("an xattr block is damaged", "xattr block", at, field="checksum")

    def _outside(self, number: int, size: int) -> bytes:
        """Read an attribute's value from its own inode (feature ea_inode)."""
        inode = self._volume.inode(number)
        if not inode.flags & s.EA_INODE_FL or inode.size != size:
            raise self._volume.error(f"inode {number} holds no attribute's value", "inode", 0, found=inode.size)
        return read_all(self._volume, inode, _LARGEST_VALUE)

    def _entries(self, folder: Inode) -> Iterator[tuple[int, bytes]]:
        """Yield (inode number, name) of a directory's entries but `.` and `..`."""
        if folder.flags & s.INLINE_DATA_FL:
            rest = self._attributes_with_data(folder)
            yield from self._parsed(folder, folder.block[4:], 0)
            if rest:
                yield from self._parsed(folder, rest, 0)
            return
        volume = self._volume
        size = volume.block_size
        seed = inode_seed(volume.seed, folder.number, folder.generation) if volume.sums else 0
        for run in runs_of(volume, folder):
            count = min(run.length, -(-folder.size // size) - run.block)
            for number in range(run.at, run.at + count):
                block = volume.source.read(number * size, size)
                inner = number == run.at - run.block or int.from_bytes(block[4:6], "little") >= size
                if volume.sums and not (inner and folder.flags & s.INDEX_FL):  # those of a hash tree hold no names
                    self._verify_block(block, number, seed)
                yield from self._parsed(folder, block, number * size)

    def _attributes_with_data(self, folder: Inode) -> bytes:
        at = s.OLD_INODE + int.from_bytes(folder.raw[128:130], "little")
        return xattrs.parse(folder.raw, at + 4, at + 4, self._outside).get(b"system.data", b"")

    def _verify_block(self, block: bytes, number: int, seed: int) -> None:
        if block[-12:-4] != _TAIL:
            raise self._volume.error(
                "a directory block has no checksum", "directory", (number + 1) * len(block) - 12, field="tail"
            )
        if chain(seed, block[:-12]) != int.from_bytes(block[-4:], "little"):
            raise self._volume.error(
                "a directory block is damaged", "directory", (number + 1) * len(block) - 4, field="checksum"
            )

    def _parsed(self, folder: Inode, block: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
        at, end = 0, len(block)
        unpack = _DIRENT.unpack_from
        while at + 8 <= end:
            number, length, size, _ = unpack(block, at)
            if length in {0, 65535} and end == 65536:
                length = end - at if length == 65535 and at == 0 else 65536 - at
            if length < 8 or length & 3 or at + length > end or (number and size + 8 > length):
                raise self._volume.error(
                    f"directory {folder.number} is damaged",
                    "directory entry",
                    offset + at,
                    field="rec_len",
                    found=length,
                )
            if number:
                name = block[at + 8 : at + 8 + size]
                if name not in _DOTS:
                    if not name or b"/" in name or b"\0" in name:
                        raise self._volume.error(
                            f"directory {folder.number} holds the name {name!r}", "directory entry", offset + at + 8
                        )
                    yield number, name
            at += length


_DIRENT = struct.Struct("<IHBB")  # schema.DIRENT, by one call for each entry; a test holds one against the other
_TAIL = s.DIRENT_TAIL.build({"checksum": 0})[:8]
_DOTS = frozenset((b".", b".."))


def _device(inode: Inode) -> tuple[int, int]:
    old = int.from_bytes(inode.block[:4], "little")
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    new = int.from_bytes(inode.block[4:8], "little")
    return (new & 0xFFF00) >> 8, new & 0xFF | new >> 12 & 0xFFF00
