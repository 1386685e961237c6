"""Reads FAT12, FAT16 and FAT32 as trees."""

from __future__ import annotations

import calendar
import stat
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.errors import FormatError
from diskmorph.formats.fat import schema as s
from diskmorph.formats.fat.names import read_long, read_short
from diskmorph.formats.tree import Node, Piece, Tree
from diskmorph.formats.views import DiskSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.limits import Limits

_MOST_DIRECTORY = 2 << 20  # bytes: 65,536 entries
_TABLE_WINDOW = 3 << 16  # bytes of the FAT read at once; whole numbers of 12-bit pairs
_KEPT = 8


def read_fat(disk: Disk, *, limits: Limits | None = None) -> Tree:
    """Return the tree of a volume; owners are root's, modes 0755 and 0644, times taken as UTC.

    The tree owns the disk. Raises FormatError, here or when a directory is first looked into.
    """
    source = DiskSource.of(disk)
    tree = Tree(_Volume(source).root(), name=disk.name, format="fat", limits=limits)
    tree.sources.append(source)
    return tree


class _Volume:
    def __init__(self, source: Any) -> None:
        self.source = source
        head = source.read_upto(0, s.SECTOR)
        if len(head) < s.SECTOR or head[510:512] != b"\x55\xaa":
            raise self.error("is no FAT volume", "boot sector", 510)
        bpb = s.BPB.parse(head)
        self._sector = bpb.bytes_per_sector
        self._require_sane(bpb)
        wide = s.EXTENDED_32.parse(head[36:]) if not bpb.fat_sectors_16 else None
        fat_sectors = wide.fat_sectors if wide is not None else bpb.fat_sectors_16
        total = bpb.total_sectors_16 or bpb.total_sectors_32
        self._root_at = (bpb.reserved_sectors + bpb.fats * fat_sectors) * self._sector
        root_sectors = -(-bpb.root_entries * 32 // self._sector)
        self._data = self._root_at + root_sectors * self._sector
        self._cluster = bpb.sectors_per_cluster * self._sector
        self._clusters = (total - self._data // self._sector) // bpb.sectors_per_cluster
        self.bits = s.bits_of(self._clusters) if wide is None else 32
        active = wide.flags & 0xF if wide is not None and wide.flags & 0x80 else 0
        self._table_at = (bpb.reserved_sectors + active * fat_sectors) * self._sector
        self._root_entries = bpb.root_entries
        self._root_cluster = wide.root_cluster if wide is not None else 0
        self._require_room(total, fat_sectors)
        self._windows: OrderedDict[int, tuple[NDArray[Any], NDArray[Any]]] = OrderedDict()
        self._seen: set[int] = set()

    def error(self, problem: str, structure: str, offset: int, **values: Any) -> FormatError:
        return FormatError(problem, file=self.source.name, format="fat", structure=structure, offset=offset, **values)

    def _require_sane(self, bpb: Any) -> None:
        sector, per = bpb.bytes_per_sector, bpb.sectors_per_cluster
        fine = sector in {512, 1024, 2048, 4096} and per and not per & (per - 1) and bpb.fats and bpb.reserved_sectors
        if not fine:
            raise self.error("the boot sector is damaged, or is no FAT's", "boot sector", 11)

    def _require_room(self, total: int, fat_sectors: int) -> None:
        if self._clusters < 1 or self._clusters > s.MOST_32 or total * self._sector > self.source.size:
            raise self.error(
                "the volume is cut off or damaged",
                "boot sector",
                32,
                field="total_sectors",
                expected=f"{total * self._sector} bytes",
                found=self.source.size,
            )
        if (self._clusters + 2) * self.bits > fat_sectors * self._sector * 8:
            raise self.error("the FAT is shorter than the volume", "boot sector", 22, field="fat_sectors")

    def root(self) -> Node:
        return Node(stat.S_IFDIR | 0o755, children=lambda: self._list(self._root_cluster, root=True))

    # --- clusters

    def _table(self, cluster: int) -> tuple[int, NDArray[Any], NDArray[Any]]:
        """Return the FAT around a cluster: number of its first entry, the entries, and the places where runs end."""
        per = _TABLE_WINDOW * 8 // self.bits
        number = cluster // per
        found = self._windows.get(number)
        if found is None:
            count = min(per, self._clusters + 2 - number * per)
            at = self._table_at + number * _TABLE_WINDOW
            entries = _entries(self.source.read(at, -(-count * self.bits // 8)), self.bits, count)
            follows = np.arange(number * per + 1, number * per + count + 1)
            found = self._windows[number] = entries, np.flatnonzero(entries != follows)
            if len(self._windows) > _KEPT:
                self._windows.popitem(last=False)
        return number * per, *found

    def _runs(self, first: int, most: int) -> Iterator[tuple[int, int]]:
        """Yield (first cluster, count) along a chain of at least `most` clusters, or to its end. Raises FormatError."""
        cluster, left = first, most
        while left > 0:
            if not 2 <= cluster < self._clusters + 2:
                at = self._table_at + cluster * self.bits // 8
                raise self.error("a chain of clusters leaves the volume", "FAT", at, found=cluster)
            base, entries, ends = self._table(cluster)
            index = cluster - base
            place = int(np.searchsorted(ends, index))
            last = int(ends[place]) if place < len(ends) else len(entries) - 1
            count = min(last - index + 1, left)
            yield cluster, count
            left -= count
            cluster = int(entries[last])
            if self._is_end(cluster):
                return

    def _is_end(self, value: int) -> bool:
        return value >= {12: 0xFF8, 16: 0xFFF8}.get(self.bits, 0x0FFFFFF8)

    def _place(self, cluster: int) -> int:
        return int(self._data + (cluster - 2) * self._cluster)

    # --- directories

    def _bytes_of(self, first: int, *, root: bool) -> bytes:
        if root and self.bits != 32:
            return bytes(self.source.read(self._root_at, self._root_entries * 32))
        if first in self._seen:
            raise self.error("a directory has two names", "directory", self._place(first), found=first)
        self._seen.add(first)
        parts = []
        most = _MOST_DIRECTORY // self._cluster + 1
        count = 0
        for cluster, length in self._runs(first, most + 1):
            count += length
            if count > most:
                raise self.error("a directory does not end", "directory", self._place(first))
            parts.append(self.source.read(self._place(cluster), length * self._cluster))
        return b"".join(parts)

    def _list(self, first: int, *, root: bool = False) -> dict[bytes, Node]:
        data = self._bytes_of(first, root=root)
        rows = np.frombuffer(data, s.DIRENT_ROW, len(data) // 32)
        found: dict[bytes, Node] = {}
        parts: list[bytes] = []
        for number, row in enumerate(rows.tolist()):
            entry = data[number * 32 : number * 32 + 32]
            if entry[0] == s.LAST:
                break
            if entry[0] == s.DELETED:
                parts = []
            elif entry[11] & 0x3F == s.LONG_NAME:
                parts.append(entry)
            else:
                if not entry[11] & s.VOLUME and entry[:2] not in (b". ", b".."):
                    self._add(found, entry[:11], parts, row)
                parts = []
        return found

    def _add(self, found: dict[bytes, Node], short: bytes, parts: list[bytes], row: tuple[Any, ...]) -> None:
        _, attributes, case, _, _, _, _, high, clock, date, low, size = row
        text = (read_long(parts, short) if parts else None) or read_short(short, case)
        name = text.encode("utf-8", "surrogatepass")
        if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
            raise self.error(f"a directory holds the name {text!r}", "directory", 0)
        mtime = _seconds(date, clock) * 10**9
        cluster = low | (high << 16 if self.bits == 32 else 0)
        if attributes & s.DIRECTORY:
            found[name] = Node(stat.S_IFDIR | 0o755, mtime=mtime, children=self._lister(cluster))
            return
        found[name] = Node(
            stat.S_IFREG | 0o644, mtime=mtime, size=size, pieces=self._pieces(cluster, size) if size else ()
        )

    def _lister(self, cluster: int) -> Callable[[], dict[bytes, Node]]:
        return lambda: self._list(cluster)

    def _pieces(self, first: int, size: int) -> tuple[Piece, ...]:
        pieces = []
        start = 0
        for cluster, count in self._runs(first, -(-size // self._cluster)):
            length = min(count * self._cluster, size - start)
            pieces.append(Piece(start, length, self.source, self._place(cluster)))
            start += length
        if start < size:
            raise self.error("a file's chain of clusters is shorter than the file", "FAT", self._table_at, found=start)
        return tuple(pieces)


def _entries(data: bytes, bits: int, count: int) -> NDArray[Any]:
    if bits == 32:
        return np.frombuffer(data, "<u4", count) & 0x0FFFFFFF
    if bits == 16:
        return np.frombuffer(data, "<u2", count).astype(np.uint32)
    triples = np.frombuffer(data + bytes(-len(data) % 3), np.uint8).reshape(-1, 3).astype(np.uint32)
    both = np.column_stack((triples[:, 0] | (triples[:, 1] & 15) << 8, triples[:, 1] >> 4 | triples[:, 2] << 4))
    return both.reshape(-1)[:count]


def _seconds(date: int, clock: int) -> int:
    day, month, year = date & 31, date >> 5 & 15, 1980 + (date >> 9)
    if not 1 <= month <= 12 or not 1 <= day <= 31:
        day, month, year = 1, 1, 1980
    hours, minutes, seconds = clock >> 11, clock >> 5 & 63, (clock & 31) * 2
    return calendar.timegm((year, month, day, min(hours, 23), min(minutes, 59), min(seconds, 59)))
