"""A btrfs file system as it is read: superblock, chunks, nodes that are verified, items by key."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diskmorph.formats.btrfs import schema as s
from diskmorph.formats.btrfs.xxh64 import xxh64
from diskmorph.formats.crc32c import crc32c
from diskmorph.formats.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.source import ByteSource

_KEPT = 4 << 20  # bytes of nodes kept
_DEEPEST = 8
_MOST_CHUNKS = 1 << 20


Key = tuple[int, int, int]  # objectid, type, offset


class Item(NamedTuple):
    """An item of a leaf: the rest of its key, and its data."""

    type: int
    key: int
    data: bytes


@dataclass(frozen=True)
class Node:
    """A node of a tree, parsed: keys of its items or pointers, and for leaves where the items' data lie."""

    level: int
    keys: list[Key]
    blocks: list[int]
    data: bytes
    offsets: list[int]
    sizes: list[int]


class Volume:
    """Reads one file system of one device. Raises FormatError (damaged, cut off), UnsupportedError (by name)."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.super = self._first_sound_super()
        self._require_features()
        self._require_sane()
        self._node_size: int = self.super.nodesize
        self._device = s.DEVICE_ID.unpack_from(self.super.dev_item)[0]
        self._chunks: list[tuple[int, int, int]] = []  # logical address, length, physical address
        self._starts: list[int] = []
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        self._read_system_chunks()
        self._read_chunks()

    def error(self, problem: str, structure: str, offset: int, **values: Any) -> FormatError:
        """Return an error about this file system; `offset` in bytes from its start."""
        return FormatError(problem, file=self.source.name, format="btrfs", structure=structure, offset=offset, **values)

    def refused(self, feature: str, problem: str = "") -> UnsupportedError:
        """Return the error that names what is not read."""
        return UnsupportedError(problem or f"uses {feature}", feature=feature, file=self.source.name, format="btrfs")

    def _first_sound_super(self) -> Any:
        """Return the superblock, or where it is damaged its first sound copy. Raises FormatError if there is none."""
        failure: FormatError | None = None
        for offset in s.SUPER_OFFSETS:
            raw = self.source.read_upto(offset, s.SUPER_SIZE)
            if len(raw) < s.SUPER_SIZE or raw[0x40:0x48] != s.MAGIC:
                continue
            parsed = s.SUPER.parse(raw)
            if self._sum_fits(parsed.csum_type, raw) and parsed.bytenr == offset:
                return parsed
            failure = failure or self.error("the superblock is damaged", "superblock", offset, field="csum")
        raise failure or self.error("is no btrfs file system", "superblock", s.SUPER_OFFSETS[0], field="magic")

    def _sum_fits(self, kind: int, raw: bytes) -> bool:
        """Return whether a block's checksum is right."""
        body = raw[s.CSUM_SIZE :]
        if kind == s.CRC32C:
            return raw[:4] == crc32c(body).to_bytes(4, "little")
        if kind == s.SHA256:
            return raw[:32] == hashlib.sha256(body).digest()
        if kind == s.BLAKE2B:
            return raw[:32] == hashlib.blake2b(body, digest_size=32).digest()
        if kind == s.XXHASH64:
            return raw[:8] == xxh64(body).to_bytes(8, "little")
        raise self.refused(f"checksums of type {kind}")

    def _require_features(self) -> None:
        found = self.super
        unknown = found.incompat_flags & ~sum(s.INCOMPAT)
        if unknown:
            bit = unknown & -unknown
            raise self.refused(s.INCOMPAT_NAMES.get(bit, f"unknown incompatible feature {bit:#x}"))
        if found.num_devices != 1:
            raise self.refused("multiple devices", f"is one of {found.num_devices} devices of a btrfs file system")
        if found.log_root:
            raise self.refused("log tree", "its log (journal) needs to be replayed: mount and unmount it once")
        if found.flags & s.METADATA_ONLY:
            raise self.refused("metadata alone", "is a copy of a btrfs file system's metadata, without its files")

    def _require_sane(self) -> None:
        found = self.super
        checks = (
            ("nodesize", 4096 <= found.nodesize <= 65536 and not found.nodesize & (found.nodesize - 1)),
            ("sectorsize", 512 <= found.sectorsize <= 65536 and not found.sectorsize & (found.sectorsize - 1)),
            ("sys_chunk_array_size", found.sys_chunk_array_size <= len(found.sys_chunk_array)),
            ("root_level", max(found.root_level, found.chunk_root_level) < _DEEPEST),
        )
        wrong = next((name for name, fine in checks if not fine), None)
        if wrong is not None:
            raise self.error("the superblock is damaged", "superblock", found.bytenr, field=wrong, found=found[wrong])
        if found.total_bytes > self.source.size:
            raise self.error(
                "the file system is cut off",
                "superblock",
                found.bytenr + 0x70,
                field="total_bytes",
                expected=f"{found.total_bytes} bytes",
                found=self.source.size,
            )

    # --- chunks

    def _read_system_chunks(self) -> None:
        data = self.super.sys_chunk_array[: self.super.sys_chunk_array_size]
        at = 0
        while at + s.KEY_SIZE + s.CHUNK.sizeof() <= len(data):
            key = s.KEY.parse(data[at : at + s.KEY_SIZE])
            at += s.KEY_SIZE
            at += self._add_chunk(key.offset, data[at:])
        self._sort_chunks()

    def _read_chunks(self) -> None:
        for _, kind, logical, data in self.walk(self.super.chunk_root, self.super.chunk_root_level):
            if kind == s.CHUNK_ITEM and logical not in self._starts:
                self._add_chunk(logical, data)
                if len(self._chunks) > _MOST_CHUNKS:
                    raise self.error("there are too many chunks", "chunk tree", 0)
        self._sort_chunks()

    def _add_chunk(self, logical: int, data: bytes) -> int:
        """Note a chunk; return the bytes that it takes with its stripes."""
        size = s.CHUNK.sizeof()
        if len(data) < size + s.STRIPE.sizeof():
            raise self.error("a chunk is damaged", "chunk", 0, found=logical)
        chunk = s.CHUNK.parse(data[:size])
        if chunk.type & s.STRIPED and chunk.num_stripes != 1:
            raise self.refused("striping (RAID)")
        end = size + chunk.num_stripes * s.STRIPE.sizeof()
        if end > len(data):
            raise self.error("a chunk is damaged", "chunk", 0, field="num_stripes", found=chunk.num_stripes)
        stripes = (s.STRIPE.parse(data[at : at + s.STRIPE.sizeof()]) for at in range(size, end, s.STRIPE.sizeof()))
        stripe = next((one for one in stripes if one.devid == self._device), None)
        if stripe is None:
            raise self.refused("multiple devices", "has data on a device that is missing")
        if stripe.offset + chunk.length > self.source.size or logical >= 1 << 63:
            raise self.error("a chunk lies outside the file system", "chunk", stripe.offset, found=logical)
        self._chunks.append((logical, chunk.length, stripe.offset))
        return int(end)

    def _sort_chunks(self) -> None:
        self._chunks.sort()
        self._starts = [start for start, _, _ in self._chunks]

    def place(self, logical: int, length: int, what: str) -> int:
        """Return where logical bytes lie on the device; they must lie in one chunk. Raises FormatError."""
        index = bisect_right(self._starts, logical) - 1
        if index >= 0:
            start, size, physical = self._chunks[index]
            if logical + length <= start + size:
                return physical + logical - start
        raise self.error(f"{what} lies in no chunk", what, 0, found=logical)

    def places(self, logical: int, length: int, what: str) -> Iterator[tuple[int, int]]:
        """Yield (place, length) of logical bytes that may cross chunks."""
        while length:
            index = bisect_right(self._starts, logical) - 1
            start, size, _ = self._chunks[index] if index >= 0 else (0, 0, 0)
            part = min(length, max(start + size - logical, 0)) or length
            yield self.place(logical, part, what), part
            logical, length = logical + part, length - part

    # --- trees

    def node(self, logical: int, level: int) -> Node:
        """Return a node, which must be of that level. Raises FormatError."""
        found = self._nodes.get(logical)
        if found is None:
            found = self._nodes[logical] = self._parse(logical)
            if len(self._nodes) * self._node_size > _KEPT:
                self._nodes.popitem(last=False)
        else:
            self._nodes.move_to_end(logical)
        if found.level != level:
            raise self.error("a node is of another level than its parent says", "node", logical)
        return found

    def _parse(self, logical: int) -> Node:
        at = self.place(logical, self._node_size, "node")
        raw = self.source.read(at, self._node_size)
        header = s.HEADER.parse(raw)
        if header.bytenr != logical or not self._sum_fits(self.super.csum_type, raw):
            raise self.error("a node is damaged", "node", at, field="csum")
        row = s.POINTER_ROW if header.level else s.ITEM_ROW
        if s.HEADER_SIZE + header.nritems * row.itemsize > len(raw) or header.level >= _DEEPEST:
            raise self.error("a node is damaged", "node", at, field="nritems", found=header.nritems)
        rows = np.frombuffer(raw, row, header.nritems, s.HEADER_SIZE)
        keys = list(zip(rows["objectid"].tolist(), rows["type"].tolist(), rows["key"].tolist(), strict=True))
        if any(a >= b for a, b in pairwise(keys)):
            raise self.error("a node's keys are out of order", "node", at)
        if header.level:
            return Node(header.level, keys, rows["block"].tolist(), b"", [], [])
        ends = rows["offset"].astype(np.int64) + rows["size"]
        if len(ends) and int(ends.max()) > len(raw) - s.HEADER_SIZE:
            raise self.error("an item lies outside its leaf", "node", at)
        return Node(0, keys, [], raw, (rows["offset"] + s.HEADER_SIZE).tolist(), rows["size"].tolist())

    def _below(self, node: Node, index: int) -> Node:
        """Return a node's child, whose keys must be those that its place among its siblings leaves to it.

        So no node has two parents, and whatever a hostile file system says, none is visited twice in one search.
        """
        block = node.blocks[index]
        child = self.node(block, node.level - 1)
        after = node.keys[index + 1] if index + 1 < len(node.keys) else None
        if not child.keys or child.keys[0] != node.keys[index] or (after is not None and child.keys[-1] >= after):
            raise self.error("a node's keys are not those that its parent says", "node", block)
        return child

    def walk(self, root: int, level: int) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield all items of a tree: objectid, type, offset of the key, data."""
        yield from self._walk(self.node(root, level))

    def _walk(self, node: Node) -> Iterator[tuple[int, int, int, bytes]]:
        if not node.level:
            for (objectid, kind, key), offset, size in zip(node.keys, node.offsets, node.sizes, strict=True):
                yield objectid, kind, key, node.data[offset : offset + size]
            return
        for index in range(len(node.blocks)):
            yield from self._walk(self._below(node, index))

    def items(self, root: int, level: int, low: Key, high: Key) -> list[Item]:
        """Return the items of a tree whose keys are from `low` and below `high`, by ascending key."""
        found: list[Item] = []
        self._collect(self.node(root, level), low, high, found)
        return found

    def _collect(self, node: Node, low: Key, high: Key, found: list[Item]) -> None:
        if node.level:
            for index in range(max(bisect_right(node.keys, low) - 1, 0), bisect_left(node.keys, high)):
                self._collect(self._below(node, index), low, high, found)
            return
        for index in range(bisect_left(node.keys, low), bisect_left(node.keys, high)):
            _, kind, key = node.keys[index]
            offset = node.offsets[index]
            found.append(Item(kind, key, node.data[offset : offset + node.sizes[index]]))
