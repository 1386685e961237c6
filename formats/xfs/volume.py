"""An XFS file system as it is read: superblock, inodes by number, forks, blocks that are verified."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diskmorph.formats.crc32c import crc32c
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.xfs import schema as s

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.source import ByteSource

_WINDOW = 128 << 10
_KEPT = 64
_DEEPEST = 8  # levels of a tree of extents
_MOST_EXTENTS = 1 << 20  # of one file


class Inode(NamedTuple):
    """What is needed of an inode; `data` and `attributes` are its forks' bytes."""

    number: int
    mode: int
    uid: int
    gid: int
    links: int
    size: int
    mtime: int
    format: int
    extents: int
    attribute_format: int
    attribute_extents: int
    data: bytes
    attributes: bytes


class Run(NamedTuple):
    """`length` blocks of a fork from its block `block`, at byte `at` of the file system."""

    block: int
    length: int
    at: int


class Volume:
    """Reads one file system. Raises FormatError (damaged, cut off), UnsupportedError (features by name)."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        head = source.read_upto(0, 512)
        if len(head) < 512 or head[:4] != b"XFSB":
            raise self.error("is no XFS file system", "superblock", 0, field="magic")
        self.super: Any = s.SUPER.parse(head)
        self.version: int = self.super.versionnum & 0xF
        self._require_features()
        self._require_sane()
        if self.version == 5:
            body = source.read(0, self.super.sectsize)
            self.verify(body, s.SUPER_CRC, 0, "superblock")
        self.block_size: int = self.super.blocksize
        self.dir_block: int = self.block_size << self.super.dirblklog
        self.ftype = bool(
            self.super.features_incompat & s.FTYPE if self.version == 5 else self.super.features2 & s.FTYPE_V4
        )
        self._inode_size: int = self.super.inodesize
        self._inode_bits: int = self.super.inopblog
        self._group_bits: int = self.super.agblklog
        self._group_blocks: int = self.super.agblocks
        self._groups: int = self.super.agcount
        self.blocks: int = self.super.dblocks
        self._windows: OrderedDict[int, bytes] = OrderedDict()
        self._claimed: set[int] = set()

    def error(self, problem: str, structure: str, offset: int, **values: Any) -> FormatError:
        """Return an error about this file system; `offset` in bytes from its start."""
        return FormatError(problem, file=self.source.name, format="xfs", structure=structure, offset=offset, **values)

    def _refused(self, feature: str) -> UnsupportedError:
        return UnsupportedError(
            f"uses {feature}", feature=feature, file=self.source.name, format="xfs", structure="superblock"
        )

    def _require_features(self) -> None:
        if self.version not in {4, 5}:
            raise self._refused(f"version {self.version}")
        if self.version == 4:
            if not self.super.versionnum & s.DIRV2:
                raise self._refused("directories of version 1")
            return
        unknown = self.super.features_incompat & ~sum(s.INCOMPAT)
        if unknown:
            bit = unknown & -unknown
            raise self._refused(s.INCOMPAT_NAMES.get(bit, f"unknown incompatible feature {bit:#x}"))

    def _require_sane(self) -> None:
        found = self.super
        checks = (
            ("blocksize", 512 <= found.blocksize <= 65536 and found.blocksize == 1 << found.blocklog),
            ("sectsize", 512 <= found.sectsize <= 32768 and not found.sectsize & (found.sectsize - 1)),
            ("inodesize", 256 <= found.inodesize <= 2048 and found.inodesize == 1 << found.inodelog),
            (
                "inopblock",
                found.inopblock * found.inodesize == found.blocksize and found.inopblock == 1 << found.inopblog,
            ),
            ("agblocks", 0 < found.agblocks <= 1 << min(found.agblklog, 31)),
            ("agcount", found.agcount > 0 and found.dblocks <= found.agblocks * found.agcount),
            ("dirblklog", found.blocksize << found.dirblklog <= 65536),
            ("inprogress", not found.inprogress),
        )
        wrong = next((name for name, fine in checks if not fine), None)
        if wrong is not None:
            raise self.error("the superblock is damaged", "superblock", 0, field=wrong, found=found[wrong])
        if found.dblocks * found.blocksize > self.source.size:
            raise self.error(
                "the file system is cut off",
                "superblock",
                8,
                field="dblocks",
                expected=f"{found.dblocks * found.blocksize} bytes",
                found=self.source.size,
            )

    def verify(self, data: bytes, place: int, offset: int, structure: str) -> None:
        """Raise FormatError unless a structure's CRC, little-endian at `place`, is right (version 5)."""
        stored = int.from_bytes(data[place : place + 4], "little")
        found = crc32c(data[:place] + bytes(4) + data[place + 4 :])
        if stored != found:
            raise self.error(
                f"the {structure} is damaged",
                structure,
                offset + place,
                field="crc",
                expected=f"{found:08x}",
                found=f"{stored:08x}",
            )

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes; small reads are served from windows that are kept."""
        number, within = divmod(offset, _WINDOW)
        if within + length > _WINDOW:
            return self.source.read(offset, length)
        window = self._windows.get(number)
        if window is None:
            window = self._windows[number] = self.source.read_upto(number * _WINDOW, _WINDOW)
            if len(self._windows) > _KEPT:
                self._windows.popitem(last=False)
        data = window[within : within + length]
        return data if len(data) == length else self.source.read(offset, length)

    def claim(self, at: int, structure: str) -> None:
        """Note that the block at byte `at` belongs to one structure. Raises FormatError if it has an owner already.

        So no block is read more often than once for each time that its owner is, whatever leads to it.
        """
        if at in self._claimed:
            raise self.error(f"the {structure} belongs to something else already", structure, at)
        self._claimed.add(at)

    def require_owner(self, data: bytes, place: int, number: int, at: int, structure: str) -> None:
        """Raise FormatError unless a block of version 5 names inode `number` as its owner."""
        found = int.from_bytes(data[place : place + 8], "big")
        if self.version == 5 and found != number:
            raise self.error(
                f"the {structure} belongs to another inode",
                structure,
                at + place,
                field="owner",
                expected=number,
                found=found,
            )

    def place(self, block: int, what: str, count: int = 1) -> int:
        """Return the byte at which a file system block lies. Raises FormatError outside the file system."""
        group, within = block >> self._group_bits, block & ((1 << self._group_bits) - 1)
        linear = group * self._group_blocks + within
        if group >= self._groups or within + count > self._group_blocks or linear + count > self.blocks:
            raise self.error(f"{what} lies outside the file system", what, 0, found=block)
        return linear * self.block_size

    def inode(self, number: int) -> Inode:
        """Return an inode. Raises FormatError for numbers out of range, wrong checksums, unused inodes."""
        block, index = number >> self._inode_bits, number & ((1 << self._inode_bits) - 1)
        at = self.place(block, "inode") + index * self._inode_size
        raw = self.read(at, self._inode_size)
        (
            magic,
            mode,
            version,
            form,
            onlink,
            uid,
            gid,
            nlink,
            big,
            mtime,
            size,
            _,
            nextents,
            anextents,
            forkoff,
            aform,
            flags,
            _,
        ) = s.INODE_FAST.unpack_from(raw)
        if magic != b"IN" or not mode:
            raise self.error(f"inode {number} has a name, but is unused or damaged", "inode", at, field="magic")
        core, flags2 = s.CORE_V2, 0
        if version >= 3:
            core = s.CORE_V3
            self.verify(raw, s.INODE_CRC, at, "inode")
            flags2 = int.from_bytes(raw[s.INODE_FLAGS2 : s.INODE_FLAGS2 + 8], "big")
            if int.from_bytes(raw[s.INODE_INO : s.INODE_INO + 8], "big") != number:
                raise self.error(f"inode {number} says it is another", "inode", at, field="ino")
        if flags & s.REALTIME and mode & 0o170000 == 0o100000:
            raise self._refused("a realtime device")
        if flags2 & s.NREXT64:
            nextents, anextents = big, nextents
        end = core + forkoff * 8 if forkoff else len(raw)
        if end > len(raw):
            raise self.error(f"inode {number} is damaged", "inode", at, field="forkoff", found=forkoff)
        return Inode(
            number,
            mode,
            uid,
            gid,
            onlink if version == 1 else nlink,
            size,
            _time(mtime, bigtime=bool(flags2 & s.BIGTIME)),
            form,
            nextents,
            aform if forkoff else s.EXTENTS,
            anextents if forkoff else 0,
            raw[core:end],
            raw[end:] if forkoff else b"",
        )

    def runs(self, inode: Inode, *, attributes: bool = False) -> list[Run]:
        """Return the runs of blocks of a fork, ascending; those preallocated are left out. Raises FormatError."""
        fork = inode.attributes if attributes else inode.data
        form = inode.attribute_format if attributes else inode.format
        content = not attributes and inode.mode & 0o170000 == 0o100000
        count = inode.attribute_extents if attributes else inode.extents
        if form == s.EXTENTS:
            if count * 16 > len(fork):
                raise self._damaged(inode, "has more extents than room for them")
            return self._decoded(inode, [np.frombuffer(fork, s.EXTENT_ROW, count)], content=content)
        if form != s.BTREE:
            raise self._damaged(inode, f"has a fork of format {form}")
        level, records = int.from_bytes(fork[:2], "big"), int.from_bytes(fork[2:4], "big")
        most = (len(fork) - 4) // 16
        if not 0 < level <= _DEEPEST or not 0 < records <= most:
            raise self._damaged(inode, "has a damaged tree of extents")
        found: list[NDArray[np.void]] = []
        pointers = np.frombuffer(fork, ">u8", records, 4 + most * 8)
        self._descend(inode, pointers.tolist(), level - 1, found)
        return self._decoded(inode, found, content=content)

    def _damaged(self, inode: Inode, problem: str) -> FormatError:
        return self.error(f"inode {inode.number} {problem}", "inode", 0)

    def _descend(self, inode: Inode, blocks: list[int], level: int, found: list[NDArray[np.void]]) -> None:
        header = s.BTREE_LONG_V5 if self.version == 5 else s.BTREE_LONG_V4
        most = (self.block_size - header) // 16
        for block in blocks:
            at = self.place(block, "extent tree block")
            self.claim(at, "extent tree block")
            data = self.read(at, self.block_size)
            if self.version == 5:
                self.verify(data, s.BTREE_CRC, at, "extent tree block")
                self.require_owner(data, s.BTREE_OWNER, inode.number, at, "extent tree block")
            own, records = int.from_bytes(data[4:6], "big"), int.from_bytes(data[6:8], "big")
            if data[:4] != s.MAGIC_BMAP[self.version] or own != level or not 0 < records <= most:
                raise self.error("an extent tree block is damaged", "extent tree block", at)
            if level:
                below = np.frombuffer(data, ">u8", records, header + most * 8).tolist()
                self._descend(inode, below, level - 1, found)
            else:
                found.append(np.frombuffer(data, s.EXTENT_ROW, records, header))

    def _decoded(self, inode: Inode, parts: list[NDArray[np.void]], *, content: bool) -> list[Run]:
        if not parts:
            return []
        rows = np.concatenate(parts)
        if len(rows) > _MOST_EXTENTS:
            raise self._refused(f"a file of more than {_MOST_EXTENTS} extents")
        high, low = rows["high"].astype(np.uint64), rows["low"].astype(np.uint64)
        starts = (high >> np.uint64(9)) & np.uint64((1 << 54) - 1)
        blocks = (high & np.uint64(0x1FF)) << np.uint64(43) | low >> np.uint64(21)
        counts = low & np.uint64((1 << 21) - 1)
        written = (high >> np.uint64(63)) == 0
        found = []
        reach = 0
        table = zip(starts.tolist(), blocks.tolist(), counts.tolist(), written.tolist(), strict=True)
        for start, block, count, plain in table:
            if start < reach or not count:
                raise self._damaged(inode, "has extents out of order")
            reach = start + count
            at = self.place(block, "extent", count)
            if plain:
                found.append(Run(start, count, at))
            elif not content:
                raise self._damaged(inode, "has metadata in an extent that was never written")
        return found


def _time(value: int, *, bigtime: bool) -> int:
    """Return nanoseconds since 1970."""
    if bigtime:
        return (value & 0xFFFFFFFFFFFFFFFF) - s.BIGTIME_EPOCH * 10**9
    seconds, nanoseconds = value >> 32, value & 0xFFFFFFFF  # the upper half is signed
    return seconds * 10**9 + nanoseconds
