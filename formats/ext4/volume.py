"""An ext2, ext3 or ext4 file system as it is read: superblock, group descriptors, inodes by number."""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.checksum import chain_rows, inode_seeds, start

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.source import ByteSource

_REFUSED = {0x1: "compression", 0x8: "journal device", 0x1000: "dirdata"}
_KNOWN = sum(s.INCOMPAT) & ~sum(_REFUSED)
_CHUNK = 1024  # inodes read at once
_KEPT = 32  # chunks kept
_MOST_LOG = 6  # blocks of 64 KiB
_MOST_GROUPS = 1 << 22


class Inode(NamedTuple):
    """What is needed of an inode, unpacked; `raw` are all its bytes."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    links: int
    sectors: int
    flags: int
    block: bytes
    generation: int
    file_acl: int
    raw: bytes


class Volume:
    """Reads one file system from a source of exactly or at least its size.

    Raises FormatError (damaged, cut off), UnsupportedError (features by name).
    """

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        head = source.read_upto(s.SUPER_OFFSET, s.SUPER_SIZE)
        if len(head) < s.SUPER_SIZE or head[0x38:0x3A] != s.MAGIC.to_bytes(2, "little"):
            raise self.error("is no ext file system", "superblock", s.SUPER_OFFSET + 0x38, field="magic")
        self.super: Any = s.SUPER.parse(head)
        self._require_features()
        self.block_size = 1024 << min(self.super.log_block_size, _MOST_LOG + 1)  # which is refused below
        self.inode_size = self.super.inode_size if self.super.rev_level else s.OLD_INODE
        self.blocks = self.super.blocks_count_lo | (self.super.blocks_count_hi << 32 if self.has(s.BIT64) else 0)
        self.sums = bool(self.super.feature_ro_compat & s.METADATA_CSUM)
        self.seed = self.super.checksum_seed if self.has(s.CSUM_SEED) else start(self.super.uuid)
        if self.sums and start(head[:-4]) != self.super.checksum:
            raise self.error("the superblock is damaged", "superblock", s.SUPER_OFFSET + 0x3FC, field="checksum")
        self._require_sane()
        self.groups = -(-(self.blocks - self.super.first_data_block) // self.super.blocks_per_group)
        self._tables = self._read_groups()
        self._inodes_per_group: int = self.super.inodes_per_group
        self._inodes: int = self.super.inodes_count
        self._large_dir = self.has(s.LARGE_DIR)
        self._chunks: OrderedDict[tuple[int, int], tuple[bytes, list[bool]]] = OrderedDict()

    def has(self, feature: int) -> bool:
        """Return whether an incompatible feature is set."""
        return bool(self.super.feature_incompat & feature)

    def error(self, problem: str, structure: str, offset: int, **values: Any) -> FormatError:
        """Return an error about this file system; `offset` in bytes from its start."""
        return FormatError(problem, file=self.source.name, format="ext4", structure=structure, offset=offset, **values)

    def _require_features(self) -> None:
        if not self.super.rev_level:
            return
        bits = self.super.feature_incompat
        unknown = bits & ~_KNOWN
        if unknown:
            bit = unknown & -unknown
            name = _REFUSED.get(bit, f"unknown incompatible feature {bit:#x}")
            raise UnsupportedError(
                f"uses {name}", feature=name, file=self.source.name, format="ext4", structure="superblock"
            )

    def _require_sane(self) -> None:
        found = self.super
        size = self.inode_size
        wrong = next(
            (
                field
                for field, fine in (
                    ("log_block_size", found.log_block_size <= _MOST_LOG),
                    ("inode_size", s.OLD_INODE <= size <= self.block_size and not size & (size - 1)),
                    ("blocks_per_group", 0 < found.blocks_per_group <= 8 * self.block_size << 16),
                    ("inodes_per_group", 0 < found.inodes_per_group <= 8 * self.block_size),
                    ("first_data_block", found.first_data_block <= 1 and found.first_data_block < self.blocks),
                )
                if not fine
            ),
            None,
        )
        if wrong:
            raise self.error("the superblock is damaged", "superblock", s.SUPER_OFFSET, field=wrong, found=found[wrong])
        if self.blocks * self.block_size > self.source.size:
            raise self.error(
                "the file system is cut off",
                "superblock",
                s.SUPER_OFFSET,
                field="blocks_count",
                expected=f"{self.blocks * self.block_size} bytes",
                found=self.source.size,
            )

    def _read_groups(self) -> NDArray[np.int64]:
        """Return the block of each group's inode table."""
        size = (self.super.desc_size if self.has(s.BIT64) else 32) or 32
        if size not in {32, 64} and (size < 64 or size & (size - 1) or size > self.block_size):
            raise self.error("the superblock is damaged", "superblock", s.SUPER_OFFSET, field="desc_size", found=size)
        if self.groups > _MOST_GROUPS:
            raise self.error("the file system has too many groups", "superblock", s.SUPER_OFFSET, found=self.groups)
        data = self._descriptors(size)
        table = np.zeros((self.groups, max(size, 64)), np.uint8)
        table[:, :size] = np.frombuffer(data, np.uint8).reshape(self.groups, size)
        rows = np.ascontiguousarray(table[:, :64]).view(s.GROUP_ROW)[:, 0]
        if self.sums:
            self._verify_groups(table[:, :size].copy(), rows["checksum"])
        high = rows["inode_table_hi"].astype(np.int64) << 32 if size >= 64 else 0
        return np.asarray(rows["inode_table_lo"].astype(np.int64) | high)

    def _descriptors(self, size: int) -> bytes:
        """Return all group descriptors: behind the superblock, or with meta_bg in the groups they describe."""
        per_block = self.block_size // size
        first = self.super.first_data_block
        count = -(-self.groups // per_block)
        meta = self.super.first_meta_bg if self.has(s.META_BG) else count
        near = min(meta, count)
        data = self.source.read((first + 1) * self.block_size, near * self.block_size)
        parts = [data]
        for number in range(near, count):
            group = number * per_block
            block = first + group * self.super.blocks_per_group + self._has_super(group)
            parts.append(self.source.read(block * self.block_size, self.block_size))
        return b"".join(parts)[: self.groups * size]

    def _has_super(self, group: int) -> int:
        if group <= 1 or not self.super.feature_ro_compat & s.SPARSE_SUPER:
            return 1
        for base in (3, 5, 7):
            power = base
            while power < group:
                power *= base
            if power == group:
                return 1
        return 0

    def _verify_groups(self, table: NDArray[np.uint8], stored: NDArray[Any]) -> None:
        table[:, 0x1E:0x20] = 0
        numbers = np.zeros((len(table), 4), np.uint8)
        numbers.view("<u4")[:, 0] = np.arange(len(table))
        sums = chain_rows(chain_rows(self.seed, numbers), table) & 0xFFFF
        bad = np.flatnonzero(sums != stored)
        if len(bad):
            raise self.error(
                "a group descriptor is damaged",
                "group descriptor",
                (self.super.first_data_block + 1) * self.block_size + int(bad[0]) * table.shape[1],
                field="checksum",
                expected=int(sums[bad[0]]),
                found=int(stored[bad[0]]),
            )

    def read_block(self, number: int, what: str) -> bytes:
        """Return a block. Raises FormatError if it lies outside the file system."""
        if not 0 < number < self.blocks:
            raise self.error(f"{what} lies outside the file system", what, number * self.block_size, found=number)
        return self.source.read(number * self.block_size, self.block_size)

    def inode(self, number: int) -> Inode:
        """Return an inode. Raises FormatError for numbers out of range and for wrong checksums."""
        per_group = self._inodes_per_group
        group, index = divmod(number - 1, per_group)
        if not 0 <= group < self.groups or number > self._inodes:
            raise self.error(f"inode {number} does not exist", "inode", 0, found=number)
        first = index // _CHUNK * _CHUNK
        data, sound = self._chunk(group, first)
        at = (index - first) * self.inode_size
        if not sound[index - first]:
            place = int(self._tables[group]) * self.block_size + index * self.inode_size
            raise self.error(f"inode {number} is damaged", "inode", place, field="checksum")
        return self._unpacked(number, data[at : at + self.inode_size])

    def _chunk(self, group: int, first: int) -> tuple[bytes, list[bool]]:
        key = (group, first)
        found = self._chunks.get(key)
        if found is not None:
            self._chunks.move_to_end(key)
            return found
        count = min(_CHUNK, self.super.inodes_per_group - first)
        start_at = int(self._tables[group]) * self.block_size + first * self.inode_size
        length = count * self.inode_size
        if start_at <= 0 or start_at + length > self.blocks * self.block_size:
            raise self.error("an inode table lies outside the file system", "group descriptor", start_at)
        data = self.source.read(start_at, length)
        numbers = group * self.super.inodes_per_group + first + 1 + np.arange(count)
        found = self._chunks[key] = data, self._sound(data, numbers)
        if len(self._chunks) > _KEPT:
            self._chunks.popitem(last=False)
        return found

    def _sound(self, data: bytes, numbers: NDArray[Any]) -> list[bool]:
        if not self.sums:
            return [True] * len(numbers)
        table = np.frombuffer(data, np.uint8).reshape(-1, self.inode_size).copy()
        generations = table[:, 100:104].copy().view("<u4")[:, 0]
        stored = table[:, 124:126].copy().view("<u2")[:, 0].astype(np.uint32)
        mask = np.full(len(table), 0xFFFF, np.uint32)
        filled = table.any(axis=1)
        table[:, 124:126] = 0
        if self.inode_size > s.OLD_INODE:
            extra = table[:, 128:130].copy().view("<u2")[:, 0]
            high = extra >= 4
            stored |= np.where(high, table[:, 130:132].copy().view("<u2")[:, 0].astype(np.uint32) << 16, 0)
            mask[high] = 0xFFFFFFFF
            table[high, 130:132] = 0
        chosen = np.flatnonzero(filled)
        sums = chain_rows(inode_seeds(self.seed, numbers[chosen], generations[chosen]), table[chosen])
        bad = set(chosen[(sums & mask[chosen]) != stored[chosen]].tolist())
        return [number not in bad for number in range(len(table))]

    def _unpacked(self, number: int, raw: bytes) -> Inode:
        (
            mode,
            uid,
            size,
            mtime,
            gid,
            links,
            sectors,
            flags,
            block,
            generation,
            acl,
            size_hi,
            sectors_hi,
            acl_hi,
            uid_hi,
            gid_hi,
        ) = _INODE.unpack_from(raw)
        nanoseconds = 0
        if self.inode_size > s.OLD_INODE and int.from_bytes(raw[128:130], "little") >= 12:
            extra = int.from_bytes(raw[136:140], "little")
            mtime += (extra & 3) << 32
            nanoseconds = extra >> 2
        regular = mode & 0o170000 != 0o040000 or self._large_dir
        return Inode(
            number,
            mode,
            uid | uid_hi << 16,
            gid | gid_hi << 16,
            size | size_hi << 32 if regular else size,
            mtime * 10**9 + nanoseconds,
            links,
            sectors | sectors_hi << 32,
            flags,
            block,
            generation,
            acl | acl_hi << 32,
            raw,
        )


# The fields of schema.INODE that are needed, by one call for each inode; a test holds it against the schema.
_INODE = struct.Struct("<HHI4x4xi4xHHII4x60sIII4xHHHH")
