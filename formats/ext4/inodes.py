"""Builds the inode table: one row of 256 bytes for each inode, all filled column by column."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.checksum import chain, chain_rows, inode_seeds
from diskmorph.formats.ext4.geometry import BLOCK, Geometry
from diskmorph.formats.ext4.segments import IN_INODE, build_tree, small_roots, tree_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.ext4.image import Canvas, Contents

_SECTORS = BLOCK // 512
_XATTRS_AT = s.INODE_ROW.itemsize


def inode_numbers(objects: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the inode numbers of objects: the root's is 2, the others follow the reserved ones."""
    return np.where(objects == 0, s.ROOT_INO, objects + s.FIRST_INO - 1)


class InodeTable:
    """Inodes 1 to the last used one, `rows` of shape (n, 256), padded to whole blocks.

    `used`: which are in use; `directories`: which are directories; `tree_blocks`: blocks of extent trees.
    """

    def __init__(self, last: int) -> None:
        per_block = BLOCK // s.INODE_LARGE
        self.rows = np.zeros((-(-last // per_block) * per_block, s.INODE_LARGE), np.uint8)
        self.used = np.zeros(len(self.rows), np.bool_)
        self.used[: s.FIRST_INO - 1] = True
        self.directories = np.zeros(len(self.rows), np.bool_)
        self.tree_blocks: list[int] = []

    @property
    def fields(self) -> NDArray[np.void]:
        """The rows' first 160 bytes as INODE_ROW; a view."""
        row = np.dtype((np.void, s.INODE_LARGE))
        whole = np.dtype([("inode", s.INODE_ROW), ("rest", "u1", s.INODE_LARGE - _XATTRS_AT)])
        assert row.itemsize == whole.itemsize  # noqa: S101 - the sum of its parts
        view: NDArray[np.void] = self.rows.reshape(-1).view(whole)["inode"]
        return view

    def words(self) -> NDArray[np.uint32]:
        """Return a view of the 15 words of `block` of every inode."""
        at = s.INODE_ROW.fields["block"][1] // 4  # type: ignore[index]  # the dtype has fields
        view: NDArray[np.uint32] = self.rows.view("<u4")[:, at : at + 15]
        return view

    def seal(self, seed: int) -> None:
        """Give every inode that is not all zero its checksum."""
        filled = np.flatnonzero(self.used & self.rows.any(axis=1))
        sums = chain_rows(inode_seeds(seed, filled + 1), self.rows[filled])
        fields = self.fields
        fields["checksum_lo"][filled] = sums & 0xFFFF
        fields["checksum_hi"][filled] = sums >> 16


def build_inodes(
    contents: Contents, geometry: Geometry, extents: NDArray[np.void], seed: int, canvas: Canvas
) -> InodeTable:
    """Return the inodes of everything alive, and lay their extent trees and xattr blocks on the canvas."""
    numbers = inode_numbers(contents.alive)
    table = InodeTable(max(int(numbers.max()), s.FIRST_INO))
    rows = numbers - 1
    table.used[rows] = True
    _attributes(contents, table, rows)
    _devices(contents, table, rows)
    sectors = np.zeros(len(table.rows), np.int64)
    _extents(contents, geometry, extents, seed, table, sectors, canvas)
    _fast_links(contents, table)
    _xattrs(contents, geometry, seed, table, sectors, canvas)
    fields = table.fields
    fields["blocks_lo"] = sectors & 0xFFFFFFFF
    fields["blocks_hi"] = sectors >> 32
    return table


def _attributes(contents: Contents, table: InodeTable, rows: NDArray[np.int64]) -> None:
    mode, uid, gid, size, seconds, nanoseconds = contents.columns.T
    kinds = mode & 0o170000
    folders = kinds == stat.S_IFDIR
    table.directories[rows[folders]] = True
    size = np.where((kinds == stat.S_IFREG) | (kinds == stat.S_IFLNK), size, 0)
    counts = np.zeros(len(contents.nodes), np.int64)
    counts[contents.directories.objects] = contents.directories.counts
    size = np.where(folders, counts[contents.alive] * BLOCK, size)
    # Every entry counts, a directory's own "." and its children's ".." included.
    links = contents.links[contents.alive]
    links = np.where(folders & (links > s.MOST_LINKS), 1, links)  # dir_nlink
    fresh = np.zeros(len(rows), s.INODE_ROW)
    fresh["mode"], fresh["links_count"] = mode, links
    fresh["uid_lo"], fresh["uid_hi"] = uid & 0xFFFF, uid >> 16
    fresh["gid_lo"], fresh["gid_hi"] = gid & 0xFFFF, gid >> 16
    fresh["size_lo"], fresh["size_hi"] = size & 0xFFFFFFFF, size >> 32
    fresh["extra_isize"] = s.EXTRA_ISIZE_BYTES
    seconds = np.clip(seconds, s.FIRST_TIME, s.LAST_TIME)
    epoch = (seconds + (1 << 31)) >> 32 & 3
    for name in ("atime", "ctime", "mtime", "crtime"):
        fresh[name] = seconds & 0xFFFFFFFF
        fresh[name + "_extra"] = epoch | nanoseconds << 2
    table.fields[rows] = fresh


def _devices(contents: Contents, table: InodeTable, rows: NDArray[np.int64]) -> None:
    """Encode device numbers as the kernel does: the old form in word 0 where it fits, else the new one in word 1."""
    kinds = contents.columns[:, 0] & 0o170000
    words = table.words()
    for index in np.flatnonzero((kinds == stat.S_IFCHR) | (kinds == stat.S_IFBLK)).tolist():
        major, minor = contents.nodes[int(contents.alive[index])].rdev
        if major < 256 and minor < 256:
            words[rows[index], 0] = major << 8 | minor
        else:
            words[rows[index], 1] = minor & 0xFF | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12


def _extents(
    contents: Contents,
    geometry: Geometry,
    extents: NDArray[np.void],
    seed: int,
    table: InodeTable,
    sectors: NDArray[np.int64],
    canvas: Canvas,
) -> None:
    kinds = contents.columns[:, 0] & 0o170000
    links = (kinds == stat.S_IFLNK) & (contents.columns[:, 3] >= 60)
    rows = inode_numbers(contents.alive[(kinds == stat.S_IFREG) | (kinds == stat.S_IFDIR) | links]) - 1
    words, fields = table.words(), table.fields
    fields["flags"][rows] |= s.EXTENTS_FL
    found = contents.directories
    fields["flags"][inode_numbers(found.objects[found.indexed]) - 1] |= s.INDEX_FL
    words[rows, 0], words[rows, 1] = s.EXTENT_MAGIC, IN_INODE
    owners = inode_numbers(extents["owner"]) - 1
    counts = np.bincount(owners, minlength=len(table.rows))
    np.add.at(sectors, owners, extents["count"] * _SECTORS)
    large = counts[owners] > IN_INODE
    small_roots(owners[~large], extents[~large], words)
    seeds = inode_seeds(seed, np.arange(1, len(table.rows) + 1))
    for owner in np.unique(extents["owner"][large]).tolist():
        row = int(inode_numbers(np.array([owner]))[0]) - 1
        mine = extents[np.searchsorted(extents["owner"], owner) : np.searchsorted(extents["owner"], owner, "right")]
        wanted = tree_blocks(len(mine))
        places = geometry.blocks_of(np.array(contents.tree_places[owner][:wanted], np.int64)).tolist()
        table.tree_blocks.extend(places)
        words[row] = build_tree(mine, places, int(seeds[row]), lambda at, data: canvas.put_small(at * BLOCK, data))
        sectors[row] += wanted * _SECTORS


def _fast_links(contents: Contents, table: InodeTable) -> None:
    kinds = contents.columns[:, 0] & 0o170000
    chosen = contents.alive[(kinds == stat.S_IFLNK) & (contents.columns[:, 3] < 60)]
    if not len(chosen):
        return
    targets = np.array([contents.nodes[number].target for number in chosen.tolist()], "S60")
    table.words()[inode_numbers(chosen) - 1] = targets.view("<u4").reshape(-1, 15)


def _xattrs(
    contents: Contents,
    geometry: Geometry,
    seed: int,
    table: InodeTable,
    sectors: NDArray[np.int64],
    canvas: Canvas,
) -> None:
    fields = table.fields
    for owner, data in contents.inline_xattrs.items():
        table.rows[_row(owner), _XATTRS_AT:] = np.frombuffer(data, np.uint8)
    checksum_at = 16  # of XATTR_HEADER.checksum
    for owner, data in contents.block_xattrs.items():
        block = int(geometry.blocks_of(np.array([contents.xattr_places[owner]]))[0])
        row = _row(owner)
        if not table.used[row]:
            continue
        fields["file_acl_lo"][row], fields["file_acl_hi"][row] = block & 0xFFFFFFFF, block >> 32
        sectors[row] += _SECTORS
        found = chain(chain(seed, block.to_bytes(8, "little")), data)
        canvas.put_small(block * BLOCK, data[:checksum_at] + found.to_bytes(4, "little") + data[checksum_at + 4 :])


def _row(owner: int) -> int:
    return owner + s.FIRST_INO - 2 if owner else s.ROOT_INO - 1
