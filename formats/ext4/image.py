"""Puts an ext4 file system together: inode tables, bitmaps, group descriptors, superblocks, and the map of it all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.checksum import chain, inode_seeds, start
from diskmorph.formats.ext4.geometry import BLOCK, GROUP_BLOCKS, Geometry, backup_groups
from diskmorph.formats.ext4.groups import GroupTables, build_groups
from diskmorph.formats.ext4.inodes import InodeTable, build_inodes, inode_numbers
from diskmorph.formats.ext4.segments import SEGMENT, cut
from diskmorph.formats.ext4.superblock import build_super, copy_of_super, line_reserved, put_journal, put_resize
from diskmorph.formats.extents import DATA, EXTENT, HOLE, coalesce
from diskmorph.formats.source import ByteSource, BytesSource
from diskmorph.formats.views import Mapped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.ext4.directories import Directories
    from diskmorph.formats.source import Buffer
    from diskmorph.formats.tree import Node

# Content on the data line: `length` bytes at byte `at` of it are those of a source from `offset`.
PLACED_PIECE = np.dtype([("owner", "<i8"), ("at", "<i8"), ("length", "<i8"), ("offset", "<i8"), ("source", "<i8")])


@dataclass
class Contents:
    """Everything that a file system holds, laid out on the data line; what is not alive is left out when built.

    `alive`: object numbers, ascending, with a row of `columns` (mode, uid, gid, size, seconds, nanoseconds) for each;
    `links` by object number; `segments` (sorted by owner and block): what each object has of the line.
    """

    uuid: bytes
    hash_seed: bytes
    now: int
    label: bytes
    reserved: int
    nodes: list[Node] = field(default_factory=list)
    alive: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 6), np.int64))
    links: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    directories: Directories = None  # type: ignore[assignment]  # set by the first tree taken
    sources: list[ByteSource] = field(default_factory=list)
    pieces: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, PLACED_PIECE))
    segments: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, SEGMENT))
    inline_xattrs: dict[int, bytes] = field(default_factory=dict)
    block_xattrs: dict[int, bytes] = field(default_factory=dict)
    xattr_places: dict[int, int] = field(default_factory=dict)
    tree_places: dict[int, list[int]] = field(default_factory=dict)

    def add_pieces(self, pieces: NDArray[np.void], shift: NDArray[np.int64]) -> None:
        """Note content; `shift`: where on the line block 0 of each piece's file would lie."""
        rows = np.zeros(len(pieces), PLACED_PIECE)
        for name in ("owner", "length", "offset", "source"):
            rows[name] = pieces[name]
        rows["at"] = shift * BLOCK + pieces["start"]
        self.pieces = np.concatenate((self.pieces, rows))


class Canvas:
    """Collects what lies where: ranges of sources at byte offsets of the file system."""

    def __init__(self, sources: list[ByteSource]) -> None:
        self._sources = list(sources)
        self._parts: list[NDArray[np.void]] = []
        self._small: list[tuple[int, bytes]] = []

    def put(self, offset: int, data: Buffer, name: str = "metadata") -> None:
        """Lay a large byte string at `offset`."""
        rows = np.zeros(1, EXTENT)
        self._sources.append(BytesSource(data, name))
        rows[0] = (offset, memoryview(data).nbytes, 0, 0, 0, len(self._sources) - 1, DATA, 0, 0, 0)
        self._parts.append(rows)

    def put_small(self, offset: int, data: bytes) -> None:
        """Lay a small byte string at `offset`; many of them become one source."""
        self._small.append((offset, data))

    def put_rows(
        self,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        offsets: NDArray[np.int64],
        files: NDArray[np.int64] | int,
    ) -> None:
        """Lay ranges of sources (by number) at `starts`."""
        rows = np.zeros(len(starts), EXTENT)
        rows["start"], rows["length"], rows["offset"], rows["file"] = starts, lengths, offsets, files
        self._parts.append(rows)

    def add_source(self, data: Buffer, name: str) -> int:
        """Return the number of a new source of bytes, for `put_rows`."""
        self._sources.append(BytesSource(data, name))
        return len(self._sources) - 1

    def disk(self, size: int) -> Disk:
        """Return everything as a disk of `size` bytes, holes where nothing lies."""
        if self._small:
            lengths = np.array([len(data) for _, data in self._small], np.int64)
            number = self.add_source(b"".join(data for _, data in self._small), "metadata")
            starts = np.array([offset for offset, _ in self._small], np.int64)
            self.put_rows(starts, lengths, np.cumsum(lengths) - lengths, number)
        rows = np.concatenate(self._parts)
        rows = rows[np.argsort(rows["start"], kind="stable")]
        ends = rows["start"] + rows["length"]
        begins = np.append(rows["start"], np.uint64(size))
        ends = np.concatenate((np.zeros(1, np.uint64), ends))
        if (ends > begins).any():
            raise AssertionError("two parts of the file system lie in one place")
        gaps = np.zeros(len(begins), EXTENT)
        gaps["start"], gaps["length"], gaps["kind"] = ends, begins - ends, HOLE
        both = np.concatenate((rows, gaps[gaps["length"] > 0]))
        both = both[np.argsort(both["start"], kind="stable")]
        disk = Mapped(coalesce(both), self._sources)
        disk.format, disk.name = "ext4", "ext4"
        return disk


def build(contents: Contents, geometry: Geometry) -> Disk:
    """Return the file system."""
    canvas = Canvas(contents.sources)
    seed = start(contents.uuid)
    alive = np.zeros(len(contents.nodes), np.bool_)
    alive[contents.alive] = True
    extents = _physical(_living(contents, alive), geometry)
    _put_content(canvas, contents, geometry, alive)
    _put_directories(canvas, contents, extents, seed)
    table = build_inodes(contents, geometry, extents, seed, canvas)
    journal = put_journal(contents, geometry, table, seed, canvas)
    put_resize(contents, geometry, table, canvas)
    table.seal(seed)
    groups = build_groups(geometry, table, _used(contents, geometry, extents, table, alive), seed)
    _put_groups(canvas, geometry, table, groups)
    main = build_super(contents, geometry, groups, journal)
    descriptors = groups.descriptors.tobytes()
    for group in (0, *backup_groups(geometry.groups)):
        copy = main if group == 0 else copy_of_super(main, group)
        canvas.put_small(group * GROUP_BLOCKS * BLOCK + (0 if group else s.SUPER_OFFSET), copy)
        canvas.put((group * GROUP_BLOCKS + 1) * BLOCK, descriptors, "group descriptors")
    return canvas.disk(geometry.blocks * BLOCK)


def _living(contents: Contents, alive: NDArray[np.bool_]) -> NDArray[np.void]:
    """Return the segments of what is in the tree; a directory's only as far as it has blocks now."""
    rows = contents.segments[alive[contents.segments["owner"]]].copy()
    length = np.full(len(alive), 1 << 62, np.int64)
    length[contents.directories.objects] = contents.directories.counts
    rows["count"] = np.minimum(rows["count"], length[rows["owner"]] - rows["block"])
    living: NDArray[np.void] = rows[rows["count"] > 0]
    return living


def _physical(rows: NDArray[np.void], geometry: Geometry) -> NDArray[np.void]:
    """Return segments cut where the data line is broken, `at` being block numbers."""
    row, begin, count = cut(rows["at"], rows["count"], geometry.run_positions)
    out = rows[row]
    out["block"] += begin - rows["at"][row]
    out["at"], out["count"] = geometry.blocks_of(begin), count
    return out


def _put_content(canvas: Canvas, contents: Contents, geometry: Geometry, alive: NDArray[np.bool_]) -> None:
    pieces = contents.pieces[alive[contents.pieces["owner"]]]
    row, begin, length = cut(pieces["at"], pieces["length"], geometry.run_positions * BLOCK)
    starts = geometry.blocks_of(begin // BLOCK) * BLOCK + begin % BLOCK
    canvas.put_rows(starts, length, pieces["offset"][row] + begin - pieces["at"][row], pieces["source"][row])


def _put_directories(canvas: Canvas, contents: Contents, extents: NDArray[np.void], seed: int) -> None:
    """Lay the directories' blocks, each sealed by its checksum."""
    found = contents.directories
    owners = np.repeat(found.objects, found.counts)
    seeds = inode_seeds(seed, inode_numbers(owners))
    flat = found.blocks.reshape(-1).data
    sums = [chain(one, flat[n * BLOCK : (n + 1) * BLOCK - 12]) for n, one in enumerate(seeds.tolist())]
    for n in np.flatnonzero(found.covered).tolist():  # an index: its used part, and the tail with zeroes
        sums[n] = chain(chain(int(seeds[n]), flat[n * BLOCK : n * BLOCK + int(found.covered[n])]), bytes(8))
    found.blocks[:, -4:] = np.array(sums, "<u4").view(np.uint8).reshape(-1, 4)
    firsts = np.full(len(contents.nodes), -1, np.int64)
    firsts[found.objects] = np.cumsum(found.counts) - found.counts
    rows = extents[firsts[extents["owner"]] >= 0]
    number = canvas.add_source(flat, "directories")
    offsets = (firsts[rows["owner"]] + rows["block"]) * BLOCK
    canvas.put_rows(rows["at"] * BLOCK, rows["count"] * BLOCK, offsets, number)


def _used(
    contents: Contents,
    geometry: Geometry,
    extents: NDArray[np.void],
    table: InodeTable,
    alive: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Return every range of blocks that is in use beside the fixed parts: shape (n, 2), first block and count."""
    _, begin, count = cut(np.array([0]), np.array([line_reserved(geometry)]), geometry.run_positions)
    ranges = [
        np.column_stack((extents["at"], extents["count"])),
        np.column_stack((geometry.blocks_of(begin), count)),
    ]
    single = [contents.xattr_places[owner] for owner in contents.block_xattrs if alive[owner]]
    blocks = np.concatenate((geometry.blocks_of(np.array(single, np.int64)), np.array(table.tree_blocks, np.int64)))
    ranges.append(np.column_stack((blocks, np.ones(len(blocks), np.int64))))
    return np.concatenate(ranges)


def _put_groups(canvas: Canvas, geometry: Geometry, table: InodeTable, groups: GroupTables) -> None:
    """Lay bitmaps and the used parts of inode tables."""
    for bitmaps, places, name in (
        (groups.block_bitmaps, geometry.block_bitmaps, "block bitmaps"),
        (groups.inode_bitmaps, geometry.inode_bitmaps, "inode bitmaps"),
    ):
        numbers = np.array(sorted(bitmaps), np.int64)
        if len(numbers):
            number = canvas.add_source(b"".join(bitmaps[n] for n in numbers.tolist()), name)
            count = np.full(len(numbers), BLOCK)
            canvas.put_rows(places[numbers] * BLOCK, count, np.arange(len(numbers)) * BLOCK, number)
    per_group = geometry.inodes_per_group * s.INODE_LARGE
    size = table.rows.nbytes
    number = canvas.add_source(table.rows.reshape(-1).data, "inode tables")
    offsets = np.arange(0, size, per_group)
    lengths = np.minimum(per_group, size - offsets)
    canvas.put_rows(geometry.inode_tables[: len(offsets)] * BLOCK, lengths, offsets, number)
