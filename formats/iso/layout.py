"""Where everything of a new ISO goes, and the bytes of its directories.

A directory is followed at once by its continuation areas, and all directories come before all file data: readers that
only go forwards (bsdtar) depend on it.
"""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import TargetError
from diskmorph.formats.iso import names, rockridge
from diskmorph.formats.iso.schema import DIRECTORY, MORE_EXTENTS, RECORD, RECORD_SIZE, SECTOR, Continuation
from diskmorph.formats.tree import chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskmorph.formats.tree import Node, Tree

_RECORD_MOST = 254  # even, and the length is one byte
_CE = 28
_EXTENT_MOST = 0xFFFFFFFF // SECTOR * SECTOR


def sectors(size: int) -> int:
    """Return how many sectors `size` bytes take."""
    return -(-size // SECTOR)


@dataclass(slots=True)
class Content:
    """The data of one or several equal files: the node that has it, its size, and the sector where it lies."""

    node: Node
    size: int
    sector: int = 0


@dataclass(slots=True)
class Item:
    """A name in a directory. `folder`: number of the directory it is; `content`: number of a file's data."""

    name: bytes
    node: Node
    folder: int | None = None
    content: int | None = None


@dataclass(slots=True)
class Folder:
    """A directory: its items sorted for one hierarchy are made when needed; `parent`: number of its parent."""

    node: Node
    parent: int
    items: list[Item]
    links: int = 2


@dataclass(slots=True)
class Records:
    """A directory's records for one hierarchy: their bytes without places, and the continuation areas behind them.

    `heads` (schema.RECORD), `tails` (name, padding, inline system use without CE), `areas` of each record.
    """

    heads: np.ndarray
    tails: list[bytes]
    areas: list[list[bytes]]
    targets: list[tuple[int | None, int | None, int]]  # folder number, content number, byte of the content
    size: int = 0
    spots: list[list[tuple[int, int]]] = field(default_factory=list)  # of areas: block, offset
    area_blocks: int = 0


@dataclass(slots=True)
class Collected:
    """The tree as lists: folders by level (the order of path tables), and distinct contents in order of first use."""

    folders: list[Folder]
    contents: list[Content]
    links: dict[int, int]
    serials: dict[int, int]


def collect(tree: Tree) -> Collected:
    """Return the tree's directories and distinct contents. Equal files share their data."""
    folders = [Folder(tree.root, 0, [])]
    collected = Collected(folders, [], {}, {})
    by_node: dict[int, int] = {}
    number = 0
    while number < len(folders):
        folder = folders[number]
        for name in sorted(folder.node.children):
            node = folder.node.children[name]
            item = Item(name, node)
            collected.links[id(node)] = collected.links.get(id(node), 0) + 1
            collected.serials.setdefault(id(node), len(collected.serials) + 1)
            if node.is_dir:
                item.folder = len(folders)
                folder.links += 1
                folders.append(Folder(node, number, []))
            elif node.kind == stat.S_IFREG and node.size:
                if id(node) not in by_node:
                    by_node[id(node)] = len(collected.contents)
                    collected.contents.append(Content(node, node.size))
                item.content = by_node[id(node)]
            folder.items.append(item)
        number += 1
    _share_equal(collected)
    return collected


def _share_equal(collected: Collected) -> None:
    """Let files of equal content point to the first of them; only files of equal size are read for it."""
    sizes: dict[int, list[int]] = {}
    for number, content in enumerate(collected.contents):
        sizes.setdefault(content.size, []).append(number)
    same: dict[int, int] = {}
    for group in sizes.values():
        if len(group) < 2:
            continue
        first: dict[bytes, int] = {}
        for number in group:
            digest = hashlib.sha256()
            for chunk in chunks(collected.contents[number].node):
                digest.update(chunk)
            same[number] = first.setdefault(digest.digest(), number)
    kept = [number for number in range(len(collected.contents)) if same.get(number, number) == number]
    renumbered = {number: index for index, number in enumerate(kept)}
    collected.contents = [collected.contents[number] for number in kept]
    for folder in collected.folders:
        for item in folder.items:
            if item.content is not None:
                item.content = renumbered[same.get(item.content, item.content)]


def _files(item: Item, contents: Sequence[Content]) -> Iterator[tuple[int, int, int]]:
    """Yield (byte of the content, length, flags) of each extent of a file."""
    size = contents[item.content].size if item.content is not None else 0
    at = 0
    while size - at > _EXTENT_MOST:
        yield at, _EXTENT_MOST, MORE_EXTENTS
        at += _EXTENT_MOST
    yield at, size - at, 0


class Hierarchy:
    """One of the two sides of an ISO: plain with Rock Ridge, or Joliet."""

    def __init__(self, collected: Collected, *, joliet: bool) -> None:
        self._all = collected
        self._joliet = joliet
        self.identifiers: dict[int, bytes] = {0: b"\0"}  # of folders, for path tables
        self.order = self._path_order()
        self.records = {number: self._records(number) for number in self.order}
        self.sectors: dict[int, int] = {}

    def _sorted(self, number: int) -> list[tuple[bytes, Item]]:
        items = self._all.folders[number].items
        plain = [(item.name, item.folder is not None) for item in items]
        made = names.joliet_names(plain) if self._joliet else names.iso_names(plain)
        rank = names.joliet_rank if self._joliet else names.iso_rank
        return sorted(zip(made, items, strict=True), key=lambda pair: rank(pair[0]))

    def _path_order(self) -> list[int]:
        """Return folder numbers by level, parent and identifier (ECMA-119 6.9.1)."""
        self._named = {number: self._sorted(number) for number in range(len(self._all.folders))}
        order = [0]
        level = [0]
        while level:
            following = []
            for number in level:
                for name, item in self._named[number]:
                    if item.folder is not None:
                        self.identifiers[item.folder] = name
                        following.append(item.folder)
            order += following
            level = following
        return order

    def _records(self, number: int) -> Records:
        folder = self._all.folders[number]
        parent = self._all.folders[folder.parent]
        rows: list[tuple[bytes, int, int, int]] = []  # identifier, size, flags, mtime
        areas: list[list[bytes]] = []
        tails: list[bytes] = []
        targets: list[tuple[int | None, int | None, int]] = []

        def add(
            identifier: bytes,
            node: Node,
            use: list[bytes],
            target: tuple[int | None, int | None, int],
            size: int,
            flags: int,
        ) -> None:
            inline, rest = _split(use, len(identifier))
            rows.append((identifier, size, flags, node.mtime // 1_000_000_000))
            tails.append(identifier + bytes(1 - len(identifier) % 2) + inline)
            areas.append(rest)
            targets.append(target)

        add(b"\0", folder.node, self._own_use(number), (number, None, 0), 0, DIRECTORY)
        up = [] if self._joliet else rockridge.entries(parent.node, b"", parent.links, 0)
        add(b"\1", parent.node, up, (folder.parent, None, 0), 0, DIRECTORY)
        for identifier, item in self._named[number]:
            use = self._use(item)
            if item.folder is not None:
                add(identifier, item.node, use, (item.folder, None, 0), 0, DIRECTORY)
                continue
            for at, size, more in _files(item, self._all.contents):
                add(identifier, item.node, use, (None, item.content, at), size, more)
        return _measured(Records(_heads(rows, tails, areas), tails, areas, targets))

    def _own_use(self, number: int) -> list[bytes]:
        folder = self._all.folders[number]
        if self._joliet:
            return []
        serial = self._all.serials.get(id(folder.node), 0)
        if number == 0:
            return rockridge.root_entries(folder.node, folder.links, serial)
        return rockridge.entries(folder.node, b"", folder.links, serial)

    def _use(self, item: Item) -> list[bytes]:
        if self._joliet:
            return []
        links = self._all.folders[item.folder].links if item.folder is not None else self._all.links[id(item.node)]
        return rockridge.entries(item.node, item.name, links, self._all.serials[id(item.node)])

    def assign(self, sector: int) -> int:
        """Give every directory its place from `sector` on; return the first sector behind them."""
        for number in self.order:
            self.sectors[number] = sector
            records = self.records[number]
            sector += sectors(records.size) + records.area_blocks
        return sector

    def build(self, number: int, empty: int) -> bytes:
        """Return the sectors of a directory, its continuation areas included; `empty`: where empty files point to."""
        records = self.records[number]
        extents = [self._extent(target, empty) for target in records.targets]
        heads = records.heads
        heads["extent"] = heads["extent_big"] = extents
        is_folder = [target[0] for target in records.targets]
        lengths = [sectors(self.records[f].size) * SECTOR if f is not None else -1 for f in is_folder]
        sizes = np.where(np.array(lengths) >= 0, lengths, heads["size"])
        heads["size"] = heads["size_big"] = sizes
        base = self.sectors[number] + sectors(records.size)
        out = bytearray()
        area = bytearray(records.area_blocks * SECTOR)
        raw = heads.tobytes()
        for index, tail in enumerate(records.tails):
            spots = [(base + block, offset) for block, offset in records.spots[index]]
            record = raw[index * RECORD_SIZE : (index + 1) * RECORD_SIZE] + tail
            record += _continuation(records.areas[index], spots, 0)
            if len(out) % SECTOR + len(record) > SECTOR:
                out += bytes(-len(out) % SECTOR)
            out += record
            for turn, (block, offset) in enumerate(spots):
                piece = records.areas[index][turn] + _continuation(records.areas[index], spots, turn + 1)
                at = (block - base) * SECTOR + offset
                area[at : at + len(piece)] = piece
        out += bytes(-len(out) % SECTOR)
        return bytes(out + area)

    def _extent(self, target: tuple[int | None, int | None, int], empty: int) -> int:
        folder, content, at = target
        if folder is not None:
            return self.sectors[folder]
        return empty if content is None else self._all.contents[content].sector + at // SECTOR


def _continuation(areas: Sequence[bytes], spots: Sequence[tuple[int, int]], turn: int) -> bytes:
    """Return the CE entry that leads to area number `turn`; nothing if there is none."""
    if turn >= len(areas):
        return b""
    length = len(areas[turn]) + (_CE if turn + 1 < len(areas) else 0)
    return bytes(Continuation.build({"block": spots[turn][0], "offset": spots[turn][1], "length": length}))


def _split(use: list[bytes], name_length: int) -> tuple[bytes, list[bytes]]:
    """Return what of the system use entries fits a record, and continuation areas of at most a sector for the rest."""
    room = _RECORD_MOST - RECORD_SIZE - name_length - (1 - name_length % 2)
    if sum(map(len, use)) <= room:
        joined = b"".join(use)
        return joined + bytes(len(joined) % 2), []
    room -= _CE
    count = total = 0
    while total + len(use[count]) <= room:
        total += len(use[count])
        count += 1
    inline = b"".join(use[:count])
    areas = [b""]
    for entry in use[count:]:
        if len(areas[-1]) + len(entry) > SECTOR - _CE:
            areas.append(b"")
        areas[-1] += entry
    return inline, areas


def _heads(
    rows: Sequence[tuple[bytes, int, int, int]], tails: Sequence[bytes], areas: Sequence[list[bytes]]
) -> np.ndarray:
    heads = np.zeros(len(rows), RECORD)
    heads["length"] = [RECORD_SIZE + len(t) + (_CE if a else 0) for t, a in zip(tails, areas, strict=True)]
    heads["size"] = heads["size_big"] = [row[1] for row in rows]
    heads["flags"] = [row[2] for row in rows]
    heads["volume"] = heads["volume_big"] = 1
    heads["name_length"] = [len(row[0]) for row in rows]
    stamps = np.frombuffer(b"".join(rockridge.record_time(row[3]) for row in rows), np.uint8).reshape(-1, 7)
    heads["time"] = stamps[:, :6]
    heads["zone"] = stamps[:, 6].view(np.int8)
    return heads


def _measured(records: Records) -> Records:
    """Work out the directory's size and where its continuation areas go: none crosses a sector (SUSP 5.1)."""
    at = 0
    for length in records.heads["length"].tolist():
        if at % SECTOR + length > SECTOR:
            at += -at % SECTOR
        at += length
    records.size = sectors(at) * SECTOR
    if records.size > _EXTENT_MOST:
        raise TargetError("a directory is too large for ISO 9660")
    block = offset = 0
    for areas in records.areas:
        spots = []
        for turn, area in enumerate(areas):
            length = len(area) + (_CE if turn + 1 < len(areas) else 0)
            if offset + length > SECTOR:
                block, offset = block + 1, 0
            spots.append((block, offset))
            offset += length
        records.spots.append(spots)
    records.area_blocks = block + (1 if offset else 0)
    return records
