"""Writes a tree as an ext4 file system: a `Disk` of metadata bytes and ranges of what the files lie in.

Every tree taken is laid out behind what lies there already, so that a tree that grows layer by layer changes little of
what its lower layers wrote: numbers of inodes and places of blocks stay.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diskmorph.formats.allocator import Identity
from diskmorph.formats.errors import TargetError
from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4 import xattrs
from diskmorph.formats.ext4.collect import Collector, content, file_types, require_holdable
from diskmorph.formats.ext4.directories import Directories, pack
from diskmorph.formats.ext4.geometry import BLOCK, Geometry, sized, smallest
from diskmorph.formats.ext4.image import Contents, build
from diskmorph.formats.ext4.inodes import inode_numbers
from diskmorph.formats.ext4.schema import FIRST_INO, INODE_LARGE, INODE_ROW
from diskmorph.formats.ext4.segments import SEGMENT, cut, segments, tree_blocks
from diskmorph.formats.ext4.superblock import line_reserved
from diskmorph.formats.ext4.zeroes import PIECE, joined, without_zeroes
from diskmorph.formats.source import ByteSource, BytesSource

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.tree import Node, Tree

_IN_INODE_XATTRS = INODE_LARGE - INODE_ROW.itemsize
_FAST_LINK = 60  # a shorter target lies in the inode


@dataclass(frozen=True)
class Ext4Options:
    """How a file system is made.

    `label`: at most 16 bytes; `identity`: where UUID, hash seed and time come from, the same for all layers;
    `reserved`: percent of the blocks kept for root.
    """

    label: bytes = b""
    identity: Identity = field(default_factory=Identity)
    reserved: int = 5


class _Xattrs(NamedTuple):
    """An object's attributes as a tree has them and as they are stored; what is empty is not stored."""

    owner: int
    given: Mapping[bytes, bytes]
    inline: bytes
    block: bytes


@dataclass(eq=False)
class State:
    """A tree as it was taken, and what was new in it: ready to be laid out, when that of earlier ones is."""

    alive: NDArray[np.int64]
    columns: NDArray[np.int64]
    links: NDArray[np.int64]
    directories: Directories
    segments: NDArray[np.void]
    pieces: NDArray[np.void]
    runs: NDArray[np.int64]
    xattrs: list[_Xattrs]
    placed: bool = False


class Ext4Writer:
    """Takes a tree, or the states of a tree that grows, and returns each as a file system.

    `lost` tells what ext4 could not hold. Raises TargetError where the tree cannot be held at all.
    """

    def __init__(self, options: Ext4Options | None = None) -> None:
        self.options = options or Ext4Options()
        self.lost: list[str] = []
        self.geometry: Geometry | None = None
        self._collector = Collector()
        identity = self.options.identity
        self._contents = Contents(
            identity.uuid("ext4").bytes,
            identity.uuid("ext4 directory hash").bytes,
            int(identity.time()),
            self.options.label,
            self.options.reserved,
        )
        self._source_numbers: dict[int, int] = {}
        self._states: list[State] = []
        self._directory_blocks: dict[int, int] = {}
        self._encoded: dict[int, _Xattrs] = {}
        self._line = 0

    def take(self, tree: Tree) -> State:
        """Read a tree, or its next state: what is in it now, less what is gone. Content is read to find zeroes."""
        collector = self._collector
        known = len(collector.nodes)
        names = collector.take(tree)
        fresh = collector.nodes[known:]
        pieces = self._content(fresh, known)
        found, runs = segments(pieces)
        nodes = collector.nodes
        links = np.bincount(np.array(names.objects, np.int64), minlength=len(nodes))
        require_holdable(nodes, links)
        columns = collector.columns(tree)
        self._note_times(columns[np.array(collector.alive) >= known, 4])
        modes = np.fromiter((node.mode for node in nodes), np.int64, len(nodes))
        state = State(
            alive=np.array(collector.alive, np.int64),
            columns=columns,
            links=links,
            directories=pack(names, inode_numbers(np.arange(len(nodes))), file_types(modes), self._contents.hash_seed),
            segments=found,
            pieces=pieces,
            runs=runs,
            xattrs=self._take_xattrs(collector.alive),
        )
        self._states.append(state)
        return state

    def _note_times(self, seconds: NDArray[np.int64]) -> None:
        beyond = np.count_nonzero((seconds < s.FIRST_TIME) | (seconds > s.LAST_TIME))
        self.lost.extend(["a time before 1901 or after 2446"] * int(beyond))

    def _content(self, fresh: list[Node], known: int) -> NDArray[np.void]:
        """Return where the content of new objects lies, zeroes left out, targets of long links included."""
        sources = self._contents.sources
        pieces = joined(content(fresh, known, sources, self._source_numbers))
        pieces = without_zeroes(pieces, sources, BLOCK)
        links = self._long_links(fresh, known)
        if not len(links):
            return pieces
        pieces = np.concatenate((pieces, links))
        return np.asarray(pieces[np.lexsort((pieces["start"], pieces["owner"]))])

    def _long_links(self, fresh: list[Node], known: int) -> NDArray[np.void]:
        """Return the targets of long symbolic links as pieces of a source made of them."""
        owners, targets = [], []
        for owner, node in enumerate(fresh, known):
            if node.mode & 0o170000 == stat.S_IFLNK and len(node.target) >= _FAST_LINK:
                if len(node.target) >= BLOCK:
                    raise TargetError("a symbolic link's target is too long for ext4", expected=f"{BLOCK - 1} bytes")
                owners.append(owner)
                targets.append(node.target)
        pieces = np.zeros(len(owners), PIECE)
        if owners:
            pieces["owner"] = owners
            pieces["length"] = [len(target) for target in targets]
            pieces["offset"] = np.cumsum(pieces["length"]) - pieces["length"]
            pieces["source"] = self._add_source(BytesSource(b"".join(targets), "link targets"))
        return pieces

    def _add_source(self, source: ByteSource) -> int:
        self._contents.sources.append(source)
        return len(self._contents.sources) - 1

    def _take_xattrs(self, alive: list[int]) -> list[_Xattrs]:
        """Return the attributes of the objects alive, encoded where they are new or other than in earlier states."""
        found = []
        for owner in alive:
            given = self._collector.nodes[owner].xattrs
            if not given:
                continue
            known = self._encoded.get(owner)
            if known is None or known.given is not given:
                known = self._encoded[owner] = self._encode(owner, given)
            found.append(known)
        return found

    def _encode(self, owner: int, given: Mapping[bytes, bytes]) -> _Xattrs:
        kept, refused = xattrs.split_names(given)
        inner, outer, left = xattrs.place(kept, _IN_INODE_XATTRS, BLOCK)
        names = [*refused, *(a.full_name for a in left)]
        self.lost.extend(f"extended attribute {name.decode(errors='backslashreplace')}" for name in names)
        inline = xattrs.build_inline(inner, _IN_INODE_XATTRS) if inner else b""
        return _Xattrs(owner, given, inline, xattrs.build_block(outer, BLOCK) if outer else b"")

    def need(self) -> tuple[int, int]:
        """Return the blocks of the data line that all states take, journal excluded, and the inodes.

        What files take in tree blocks is estimated from above.
        """
        found = np.concatenate([state.segments for state in self._states])
        blocks = (
            int(found["count"].sum())
            + 1
            + len({one.owner for state in self._states for one in state.xattrs if one.block})
        )
        most = np.zeros(len(self._collector.nodes), np.int64)
        for state in self._states:
            np.maximum.at(most, state.directories.objects, state.directories.counts)
        blocks += int(most.sum())
        cuts = found["count"] // (BLOCK * 2) + 1
        per_owner = np.bincount(np.unique(found["owner"], return_inverse=True)[1], weights=cuts + 1)
        trees = sum(tree_blocks(int(count)) for count in per_owner[per_owner > 2].tolist())
        return blocks + trees, len(self._collector.nodes) + FIRST_INO + 1

    def disk(self, size: int | None = None, *, slack: int = 0, inodes: int = 0, state: State | None = None) -> Disk:
        """Return the file system of a state: the last one taken, unless another is named.

        `size` in bytes (None: the smallest), `slack` bytes to be left free, `inodes` at least; all three decide only
        the first time, the states of a growing tree share one layout. States are asked for in the order in which they
        were taken. Raises TargetError where it is too small.
        """
        state = state or self._states[-1]
        if self.geometry is None:
            blocks, count = self.need()
            count = max(count, inodes)
            self.geometry = smallest(blocks, count, slack) if size is None else sized(size, count)
            self._line = line_reserved(self.geometry)
        for earlier in self._states[: self._states.index(state) + 1]:
            if not earlier.placed:
                self._place(self.geometry, earlier)
        contents = self._contents
        contents.nodes = self._collector.nodes
        contents.alive, contents.columns = state.alive, state.columns
        contents.links, contents.directories = state.links, state.directories
        contents.inline_xattrs = {one.owner: one.inline for one in state.xattrs if one.inline}
        contents.block_xattrs = {one.owner: one.block for one in state.xattrs if one.block}
        return build(contents, self.geometry)

    def _place(self, geometry: Geometry, state: State) -> None:
        """Give everything new its position on the data line: directories, xattr blocks, files, tree blocks."""
        contents = self._contents
        owners, growth, had = self._directory_growth(state.directories)
        grown = np.zeros(len(owners), SEGMENT)
        grown["owner"], grown["block"], grown["count"] = owners, had, growth
        grown = grown[growth > 0]
        self._advance(grown)
        self._directory_blocks.update(
            zip(grown["owner"].tolist(), (grown["block"] + grown["count"]).tolist(), strict=True)
        )
        for one in state.xattrs:
            if one.block and one.owner not in contents.xattr_places:
                contents.xattr_places[one.owner] = self._line
                self._line += 1
        found = state.segments
        self._advance(found)
        contents.add_pieces(state.pieces, found["at"][state.runs] - found["block"][state.runs])
        table = np.concatenate((contents.segments, grown, found))
        contents.segments = table[np.lexsort((table["block"], table["owner"]))]
        self._place_trees(geometry)
        state.placed = True
        state.pieces = state.segments = np.zeros(0, SEGMENT)
        if self._line > geometry.free:
            raise TargetError(
                f"the file system is too small: {geometry.blocks * BLOCK} bytes do not hold the tree",
                expected=f"{(self._line - geometry.free) * BLOCK} bytes more",
            )

    def _advance(self, rows: NDArray[np.void]) -> None:
        ends = self._line + np.cumsum(rows["count"])
        rows["at"] = ends - rows["count"]
        self._line = int(ends[-1]) if len(ends) else self._line

    def _directory_growth(self, found: Directories) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return directories' objects, the blocks that each wants more, and those that it has."""
        had = np.array([self._directory_blocks.get(owner, 0) for owner in found.objects.tolist()], np.int64)
        return found.objects, np.maximum(found.counts - had, 0), had

    def _place_trees(self, geometry: Geometry) -> None:
        """Give tree blocks to files that need more of them than they have."""
        table = self._contents.segments
        row, _, _ = cut(table["at"], table["count"], geometry.run_positions)
        owners, counts = np.unique(table["owner"][row], return_counts=True)
        for owner, count in zip(owners[counts > 4].tolist(), counts[counts > 4].tolist(), strict=True):
            places = self._contents.tree_places.setdefault(owner, [])
            while len(places) < tree_blocks(count):
                places.append(self._line)
                self._line += 1
