"""Extended attributes of XFS inodes ("Extended Attributes"): in the inode, in leaves, in blocks of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.xfs import schema as s

if TYPE_CHECKING:
    from diskmorph.formats.xfs.volume import Inode, Run, Volume

_LARGEST = 65536  # bytes of a value (XFS_XATTR_SIZE_MAX)
_MOST_BYTES = 4 << 20  # of an inode's values; their names, which the kernel lists in 64 KiB, are few
_ACL = np.dtype([("tag", "<u2"), ("perm", "<u2"), ("id", "<u4")])
_WITH_ID = (2, 8)  # ACL_USER, ACL_GROUP


def attributes_of(volume: Volume, inode: Inode) -> dict[bytes, bytes]:
    """Return an inode's attributes by their full names. Raises FormatError."""
    if not inode.attributes:
        return {}
    if inode.attribute_format == s.LOCAL:
        return _short(volume, inode)
    if not inode.attribute_extents:
        return {}
    return _Leaves(volume, inode).read()


def _named(found: dict[bytes, bytes], flags: int, name: bytes, value: bytes) -> None:
    """Note an attribute under the name that the kernel gives it; parent pointers and unfinished ones are none."""
    if flags & (s.ATTR_PARENT | s.ATTR_INCOMPLETE):
        return
    if flags & s.ATTR_ROOT and name in s.ACL_NAMES:
        found[s.ACL_NAMES[name]] = _acl(value)
        return
    prefix = b"trusted." if flags & s.ATTR_ROOT else b"security." if flags & s.ATTR_SECURE else b"user."
    found[prefix + name] = value


def _acl(value: bytes) -> bytes:
    """Return an ACL as getxattr gives it."""
    count = min(int.from_bytes(value[:4], "big"), (len(value) - 4) // s.ACL_ROW.itemsize)
    rows = np.frombuffer(value[4:], s.ACL_ROW, max(count, 0)) if count > 0 else np.zeros(0, s.ACL_ROW)
    out = np.zeros(len(rows), _ACL)
    out["tag"], out["perm"] = rows["tag"], rows["perm"]
    out["id"] = np.where(np.isin(rows["tag"], _WITH_ID), rows["id"], 0xFFFFFFFF)
    return b"\2\0\0\0" + out.tobytes()


def _short(volume: Volume, inode: Inode) -> dict[bytes, bytes]:
    fork = inode.attributes
    size, count = int.from_bytes(fork[:2], "big"), fork[2]
    found: dict[bytes, bytes] = {}
    at = 4
    for _ in range(count):
        if at + 3 > min(size, len(fork)):
            raise volume.error(f"the attributes of inode {inode.number} are damaged", "attribute fork", 0)
        names, values, flags = fork[at : at + 3]
        name, value = fork[at + 3 : at + 3 + names], fork[at + 3 + names : at + 3 + names + values]
        if not names or len(name) != names or len(value) != values:
            raise volume.error(f"the attributes of inode {inode.number} are damaged", "attribute fork", 0)
        _named(found, flags, name, value)
        at += 3 + names + values
    return found


class _Leaves:
    """The attribute fork as blocks: a leaf, or nodes above leaves that point forward to each other."""

    def __init__(self, volume: Volume, inode: Inode) -> None:
        self._volume = volume
        self._inode = inode
        self._runs: list[Run] = volume.runs(inode, attributes=True)
        self._bytes = 0
        self._info = 56 if volume.version == 5 else 12  # bytes of a block's own description

    def read(self) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        data, at = self._first_leaf()
        while True:
            self._volume.claim(at, "attribute block")
            self._leaf(data, at, found)
            number = int.from_bytes(data[:4], "big")
            if not number:
                return found
            data, at = self._block(number)
            if data[8:10] != s.MAGIC_ATTR_LEAF[self._volume.version]:
                raise self._damaged(at)

    def _damaged(self, at: int) -> Exception:
        return self._volume.error(f"the attributes of inode {self._inode.number} are damaged", "attribute block", at)

    def _first_leaf(self) -> tuple[bytes, int]:
        number = 0
        for _ in range(8):
            data, at = self._block(number)
            if data[8:10] == s.MAGIC_ATTR_LEAF[self._volume.version]:
                return data, at
            if data[8:10] != s.MAGIC_ATTR_NODE[self._volume.version]:
                raise self._damaged(at)
            first = s.ATTR_NODE_V5 if self._volume.version == 5 else s.ATTR_NODE_V4
            number = int.from_bytes(data[first + 4 : first + 8], "big")
        raise self._damaged(0)

    def _place(self, number: int) -> int:
        run = next((run for run in self._runs if run.block <= number < run.block + run.length), None)
        if run is None:
            raise self._damaged(0)
        return run.at + (number - run.block) * self._volume.block_size

    def _block(self, number: int) -> tuple[bytes, int]:
        at = self._place(number)
        data = self._volume.read(at, self._volume.block_size)
        if self._volume.version == 5:
            self._volume.verify(data, s.ATTR_CRC, at, "attribute block")
            self._volume.require_owner(data, s.ATTR_OWNER, self._inode.number, at, "attribute block")
        return data, at

    def _leaf(self, data: bytes, at: int, found: dict[bytes, bytes]) -> None:
        count = int.from_bytes(data[self._info : self._info + 2], "big")
        first = s.ATTR_LEAF_V5 if self._volume.version == 5 else s.ATTR_LEAF_V4
        if first + count * 8 > len(data):
            raise self._damaged(at)
        for entry in range(first, first + count * 8, 8):
            index, flags = int.from_bytes(data[entry + 4 : entry + 6], "big"), data[entry + 6]
            if flags & s.ATTR_LOCAL:
                values, names = (
                    int.from_bytes(data[index : index + 2], "big"),
                    data[index + 2] if index + 2 < len(data) else 0,
                )
                name = data[index + 3 : index + 3 + names]
                value = data[index + 3 + names : index + 3 + names + values]
                if not names or len(name) != names or len(value) != values:
                    raise self._damaged(at + index)
            elif flags & s.ATTR_INCOMPLETE:  # its value may lie nowhere
                continue
            else:
                name, value = self._remote(data, index, at)
            self._bytes += len(value)
            if self._bytes > _MOST_BYTES:
                raise self._damaged(at)
            _named(found, flags, name, value)

    def _remote(self, data: bytes, index: int, at: int) -> tuple[bytes, bytes]:
        head = data[index : index + 9]
        if len(head) < 9:
            raise self._damaged(at + index)
        number, left, names = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big"), head[8]
        name = data[index + 9 : index + 9 + names]
        if not names or len(name) != names or left > _LARGEST:
            raise self._damaged(at + index)
        parts = []
        header = s.REMOTE_HEADER if self._volume.version == 5 else 0
        while left > 0:
            place = self._place(number)
            block = self._volume.read(place, self._volume.block_size)
            if header:
                self._volume.verify(block, s.REMOTE_CRC, place, "attribute value")
                if block[:4] != s.MAGIC_REMOTE:
                    raise self._damaged(place)
                self._volume.require_owner(block, s.REMOTE_OWNER, self._inode.number, place, "attribute value")
            part = block[header : header + left]
            parts.append(part)
            left -= len(part)
            number += 1
        return name, b"".join(parts)
