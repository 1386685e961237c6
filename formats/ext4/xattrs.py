"""Extended attributes as ext4 stores them, in an inode or in a block (kernel docs, "Extended Attributes").

POSIX ACLs have two forms: version 2 is what `getxattr` returns and tar archives hold, version 1 is what lies on disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diskmorph.formats.errors import FormatError
from diskmorph.formats.ext4 import schema as s

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_ENTRY = s.XATTR_ENTRY.sizeof()
_HEADER = s.XATTR_HEADER.sizeof()
_BY_PREFIX = sorted(((prefix, index) for index, prefix in s.XATTR_PREFIXES.items() if prefix), reverse=True)
_ACLS = {2, 3}
_MASK = 0xFFFFFFFF
_ACL_SHORT = np.dtype([("tag", "<u2"), ("perm", "<u2")])
_ACL_LONG = np.dtype([("tag", "<u2"), ("perm", "<u2"), ("id", "<u4")])
_NAMED = {2, 8}  # ACL_USER, ACL_GROUP: entries with an id


class Attribute(NamedTuple):
    """One attribute: the index of its prefix (XATTR_PREFIXES), the rest of its name, its value as stored."""

    prefix: int
    name: bytes
    value: bytes

    @property
    def full_name(self) -> bytes:
        """The name as a tree has it."""
        return s.XATTR_PREFIXES[self.prefix] + self.name

    @property
    def room(self) -> int:
        """Bytes that it takes, name and value padded."""
        return _ENTRY + (len(self.name) + 3 & ~3) + (len(self.value) + 3 & ~3)


def encode_acl(value: bytes) -> bytes | None:
    """Return an ACL of version 2 as version 1; None if it is none."""
    if value[:4] != b"\2\0\0\0" or len(value) % 8 != 4:
        return None
    out = [b"\1\0\0\0"]
    for tag, perm, number in np.frombuffer(value, _ACL_LONG, offset=4).tolist():
        row = (tag, perm, number) if tag in _NAMED else (tag, perm)
        out.append(np.array([row], _ACL_LONG if tag in _NAMED else _ACL_SHORT).tobytes())
    return b"".join(out)


def decode_acl(value: bytes) -> bytes | None:
    """Return an ACL of version 1 as version 2; None if it is damaged."""
    if value[:4] != b"\1\0\0\0":
        return None
    rows = []
    at = 4
    while at < len(value):
        tag = int.from_bytes(value[at : at + 2], "little")
        size = 8 if tag in _NAMED else 4
        piece = value[at : at + size]
        if len(piece) != size:
            return None
        perm = int.from_bytes(piece[2:4], "little")
        rows.append((tag, perm, int.from_bytes(piece[4:], "little") if tag in _NAMED else _MASK))
        at += size
    return b"\2\0\0\0" + np.array(rows, _ACL_LONG).tobytes()


def split_names(xattrs: Mapping[bytes, bytes]) -> tuple[list[Attribute], list[bytes]]:
    """Return attributes as stored, sorted as a block wants them, and the names that ext4 cannot hold."""
    kept, refused = [], []
    for name, stored in xattrs.items():
        found = next(((prefix, index) for prefix, index in _BY_PREFIX if name.startswith(prefix)), None)
        value: bytes | None = stored
        rest = name[len(found[0]) :] if found else b""
        if found and found[1] in _ACLS:
            value = encode_acl(stored) if not rest else None
        if found is None or value is None or len(rest) > 255 or (not rest and found[1] not in _ACLS):
            refused.append(name)
            continue
        kept.append(Attribute(found[1], rest, value))
    kept.sort(key=lambda a: (a.prefix, len(a.name), a.name))
    return kept, refused


def place(
    attributes: Sequence[Attribute], inline: int, block: int
) -> tuple[list[Attribute], list[Attribute], list[Attribute]]:
    """Share attributes out: into `inline` bytes of the inode, a block of `block` bytes, and what has no room."""
    inline_room, block_room = inline - 8, block - _HEADER - 4  # magic, and the four zero bytes that end each list
    if sum(a.room for a in attributes) <= inline_room:
        return list(attributes), [], []
    if sum(a.room for a in attributes) <= block_room:
        return [], list(attributes), []
    inner: list[Attribute] = []
    outer: list[Attribute] = []
    left: list[Attribute] = []
    for attribute in sorted(attributes, key=lambda a: a.room):
        if attribute.room <= inline_room:
            inline_room -= attribute.room
            inner.append(attribute)
        elif attribute.room <= block_room:
            block_room -= attribute.room
            outer.append(attribute)
        else:
            left.append(attribute)
    outer.sort(key=lambda a: (a.prefix, len(a.name), a.name))
    return inner, outer, left


def entry_hash(name: bytes, value: bytes) -> int:
    """Return the hash of one attribute (fs/ext4/xattr.c, ext4_xattr_hash_entry)."""
    found = 0
    for byte in name:
        found = ((found << 5) ^ (found >> 27) ^ byte) & _MASK
    padded = value + bytes(-len(value) % 4)
    for word in np.frombuffer(padded, "<u4").tolist():
        found = ((found << 16) ^ (found >> 16) ^ word) & _MASK
    return found


def _table(attributes: Sequence[Attribute], size: int, base: int) -> bytes:
    """Return `size` bytes: entries from the start, values from the end; offsets count from `base` bytes before."""
    out = bytearray(size)
    at, end = 0, size
    for attribute in attributes:
        end -= len(attribute.value) + 3 & ~3
        out[end : end + len(attribute.value)] = attribute.value
        entry = s.XATTR_ENTRY.build(
            {
                "name_len": len(attribute.name),
                "name_index": attribute.prefix,
                "value_offs": end + base if attribute.value else 0,
                "value_inum": 0,
                "value_size": len(attribute.value),
                "hash": entry_hash(attribute.name, attribute.value),
            }
        )
        out[at : at + _ENTRY] = entry
        out[at + _ENTRY : at + _ENTRY + len(attribute.name)] = attribute.name
        at += _ENTRY + (len(attribute.name) + 3 & ~3)
    return bytes(out)


def build_inline(attributes: Sequence[Attribute], size: int) -> bytes:
    """Return the end of an inode, `size` bytes, that holds attributes."""
    return s.XATTR_MAGIC.to_bytes(4, "little") + _table(attributes, size - 4, 0)


def build_block(attributes: Sequence[Attribute], size: int) -> bytes:
    """Return a block of attributes (sorted) without its checksum, which depends on where it lies."""
    found = 0
    for attribute in attributes:
        found = ((found << 16) ^ (found >> 16) ^ entry_hash(attribute.name, attribute.value)) & _MASK
    head = s.XATTR_HEADER.build({"refcount": 1, "hash": found, "checksum": 0})
    return head + _table(attributes, size - _HEADER, _HEADER)


def parse(table: bytes, first: int, values: int, outside: Callable[[int, int], bytes] | None) -> dict[bytes, bytes]:
    """Return the attributes whose entries begin at `first` of `table`; value offsets count from `values`.

    `outside` reads values that lie in inodes of their own (number, size). Raises FormatError.
    """
    found: dict[bytes, bytes] = {}
    at = first
    while at + 4 <= len(table) and table[at : at + 4] != bytes(4):
        if at + _ENTRY > len(table):
            raise FormatError("an extended attribute runs beyond its place", structure="xattr entry", field="name_len")
        entry = s.XATTR_ENTRY.parse(table[at : at + _ENTRY])
        name = table[at + _ENTRY : at + _ENTRY + entry.name_len]
        if entry.value_inum:
            if outside is None:
                raise FormatError("an attribute's value lies in an inode, without ea_inode", structure="xattr entry")
            value = outside(entry.value_inum, entry.value_size)
        else:
            begin = values + entry.value_offs
            value = table[begin : begin + entry.value_size]
            if len(value) != entry.value_size:
                raise FormatError("an attribute's value lies beyond its place", structure="xattr entry", found=begin)
        prefix = s.XATTR_PREFIXES.get(entry.name_index)
        if prefix is not None and len(name) == entry.name_len:
            if entry.name_index in _ACLS:
                value = decode_acl(value) or b""
            if entry.name_index not in _ACLS or value:
                found[prefix + name] = value
        at += _ENTRY + (entry.name_len + 3 & ~3)
    return found
