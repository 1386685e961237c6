"""Writes a tree as FAT16 or FAT32: the same bytes for the same tree, content where it lies."""

from __future__ import annotations

import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import TargetError
from diskmorph.formats.extents import DATA, EXTENT, HOLE, coalesce
from diskmorph.formats.fat import schema as s
from diskmorph.formats.fat.names import long_entries, long_name, short_name
from diskmorph.formats.source import ByteSource, BytesSource
from diskmorph.formats.views import Mapped

if TYPE_CHECKING:
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.tree import Node, Tree

_ROOT_ENTRIES = 512  # of a FAT16
_RESERVED_32 = 32
_BACKUP, _INFO = 6, 1
_SECTORS_PER_TRACK, _HEADS = 32, 64
_MEDIA = 0xF8
_LARGEST = 0xFFFFFFFF
_FIRST_DATE, _LAST_DATE = 315532800, 4354819198  # 1980 to 2107


@dataclass(frozen=True, slots=True)
class FatOptions:
    """How a volume is made: label (11 characters), serial number, bytes before it on the disk."""

    label: str = ""
    volume_id: int = 0
    hidden: int = 0


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes in sectors, but for `clusters`."""

    bits: int
    total: int
    per_cluster: int
    reserved: int
    fat: int
    root: int
    clusters: int

    @property
    def data(self) -> int:
        """Where cluster 2 begins."""
        return self.reserved + 2 * self.fat + self.root

    @property
    def cluster_bytes(self) -> int:
        return self.per_cluster * s.SECTOR


def fat_disk(tree: Tree, size: int, options: FatOptions | None = None, lost: list[str] | None = None) -> Disk:
    """Return a FAT volume of `size` bytes that holds a tree; FAT32 from 33 MiB on, below FAT16.

    Owners, modes and what is neither file nor directory are told in `lost`. Raises TargetError: names, files of 4 GiB,
    no room.
    """
    writer = _Writer(_shape(size), options or FatOptions(), lost if lost is not None else [])
    return writer.write(tree)


def _shape(size: int) -> _Shape:
    total = size // s.SECTOR
    if total >= 1 << 32:
        raise TargetError("FAT holds less than 2 TiB", found=size)
    for bits, per_cluster in ((32, 128), (32, 64), (32, 32), (32, 16), (32, 8), (32, 4), (32, 2), (32, 1)):
        found = _try_shape(total, bits, per_cluster)
        if found is not None and found.clusters >= s.LEAST_32 and (found.clusters >= 1 << 17 or per_cluster == 1):
            return found
    for per_cluster in (1, 2, 4, 8):
        found = _try_shape(total, 16, per_cluster)
        if found is not None and s.LEAST_16 <= found.clusters < s.LEAST_32:
            return found
    raise TargetError("is too small for a FAT16", expected="3 MiB at least", found=size)


def _try_shape(total: int, bits: int, per_cluster: int) -> _Shape | None:
    reserved = _RESERVED_32 if bits == 32 else 4
    root = 0 if bits == 32 else _ROOT_ENTRIES * 32 // s.SECTOR
    fat = 1
    while True:
        clusters = (total - reserved - root - 2 * fat) // per_cluster
        if clusters < s.LEAST_16:
            return None
        need = -(-(clusters + 2) * bits // 8 // s.SECTOR)
        if need <= fat:
            return _Shape(bits, total, per_cluster, reserved, fat, root, clusters)
        fat = need


class _Writer:
    def __init__(self, shape: _Shape, options: FatOptions, lost: list[str]) -> None:
        self._shape = shape
        self._options = options
        self._lost = lost
        self._table = np.zeros(shape.clusters + 2, "<u4" if shape.bits == 32 else "<u2")
        self._end = 0x0FFFFFFF if shape.bits == 32 else 0xFFFF
        self._table[0], self._table[1] = self._end & ~0xFF | _MEDIA, self._end
        self._next = 2
        self._sources: list[ByteSource] = []
        self._rows: list[tuple[int, int, int, int]] = []  # start, length, offset, source

    def write(self, tree: Tree) -> Disk:
        """Lay everything out and return the volume."""
        root = self._plan(tree.root, b"")
        self._place_root(root)
        self._put_boot()
        fat = self._table.tobytes()
        for number in range(2):
            self._put((self._shape.reserved + number * self._shape.fat) * s.SECTOR, fat)
        return self._disk()

    # A directory's entries refer to the clusters of what is in it: so its own cluster is taken first, and its bytes
    # are written when everything below has its place.

    def _plan(self, folder: Node, path: bytes) -> list[tuple[str, bytes, bool, Node]]:
        taken: set[bytes] = set()
        seen: set[str] = set()
        found = []
        for name, node in sorted(folder.children.items()):
            whole = path + b"/" + name
            if node.kind not in {stat.S_IFREG, stat.S_IFDIR}:
                self._lost.append(f"{whole.decode(errors='backslashreplace')}: FAT holds files and directories only")
                continue
            text = long_name(name)
            if text.lower() in seen:
                raise TargetError(f"FAT cannot hold two names that differ in case only: {text!r}")
            seen.add(text.lower())
            short, whole_name = short_name(text, taken)
            found.append((text, short, whole_name, node))
        return found

    def _place_root(self, entries: list[tuple[str, bytes, bool, Node]]) -> None:
        label = self._label_entry()
        length = len(label) + self._entries_length(entries)
        if self._shape.bits == 32:
            first = self._take(max(length, 1))
            places = [self._cluster_at(first)]
            self._put(places[0], label + self._entries(entries, b"", first))
            return
        if length > self._shape.root * s.SECTOR:
            raise TargetError("the root directory of a FAT16 has no room for its names")
        self._put((self._shape.reserved + 2 * self._shape.fat) * s.SECTOR, label + self._entries(entries, b"", 0))

    def _label_entry(self) -> bytes:
        if not self._options.label:
            return b""
        return _dirent(self._label(), s.VOLUME, 0, 0, 0)

    def _label(self) -> bytes:
        label = (self._options.label or "NO NAME").upper().encode("ascii", "replace")
        return label[:11].ljust(11)

    def _entries_length(self, entries: list[tuple[str, bytes, bool, Node]]) -> int:
        return sum(32 + (0 if whole else 32 * -(-len(text.encode("utf-16-le")) // 26)) for text, _, whole, _ in entries)

    def _entries(self, entries: list[tuple[str, bytes, bool, Node]], path: bytes, own: int) -> bytes:
        """Place everything in a directory and return its bytes, `.` and `..` excluded."""
        parts = []
        for text, short, whole, node in entries:
            if not whole:
                parts.append(long_entries(text, short))
            if node.is_dir:
                first = self._directory(node, path + b"/" + text.encode(), own)
                parts.append(_dirent(short, s.DIRECTORY, first, 0, node.mtime))
            else:
                parts.append(_dirent(short, s.ARCHIVE, self._file(node, text), node.size, node.mtime))
        return b"".join(parts)

    def _directory(self, folder: Node, path: bytes, parent: int) -> int:
        entries = self._plan(folder, path)
        first = self._take(64 + self._entries_length(entries))
        above = 0 if path.count(b"/") == 1 else parent  # the root is cluster 0 here, also on FAT32
        dots = _dirent(b".".ljust(11), s.DIRECTORY, first, 0, folder.mtime)
        dots += _dirent(b"..".ljust(11), s.DIRECTORY, above, 0, folder.mtime)
        self._put(self._cluster_at(first), dots + self._entries(entries, path, first))
        return first

    def _file(self, node: Node, text: str) -> int:
        if node.size > _LARGEST:
            raise TargetError(f"FAT holds files below 4 GiB: {text!r} is larger", found=node.size)
        if not node.size:
            return 0
        first = self._take(node.size)
        base = self._cluster_at(first)
        for piece in node.pieces:
            self._sources.append(piece.source)
            self._rows.append((base + piece.start, piece.length, piece.offset, len(self._sources) - 1))
        return first

    def _take(self, length: int) -> int:
        """Take clusters for `length` bytes, one after the other; return the first."""
        count = -(-length // self._shape.cluster_bytes)
        first = self._next
        if first + count > len(self._table):
            raise TargetError("the FAT volume is too small for what comes into it", found=self._shape.total * s.SECTOR)
        self._table[first : first + count] = np.arange(first + 1, first + count + 1)
        self._table[first + count - 1] = self._end
        self._next += count
        return first

    def _cluster_at(self, cluster: int) -> int:
        return self._shape.data * s.SECTOR + (cluster - 2) * self._shape.cluster_bytes

    def _put(self, offset: int, data: bytes) -> None:
        if data:
            self._sources.append(BytesSource(data, "FAT"))
            self._rows.append((offset, len(data), 0, len(self._sources) - 1))

    def _put_boot(self) -> None:
        boot = self._boot_sector()
        self._put(0, boot)
        if self._shape.bits != 32:
            return
        free = self._shape.clusters + 2 - self._next
        info = s.INFO.build({"free": free, "next": self._next})
        self._put(_INFO * s.SECTOR, info)
        self._put(_BACKUP * s.SECTOR, boot)
        self._put((_BACKUP + _INFO) * s.SECTOR, info)

    def _boot_sector(self) -> bytes:
        shape, options = self._shape, self._options
        wide = shape.bits == 32
        small = not wide and shape.total < 1 << 16
        head = s.BPB.build(
            {
                "jump": b"\xeb\x58\x90" if wide else b"\xeb\x3c\x90",
                "oem": b"mkfs.fat",  # what old firmware is known to take
                "bytes_per_sector": s.SECTOR,
                "sectors_per_cluster": shape.per_cluster,
                "reserved_sectors": shape.reserved,
                "fats": 2,
                "root_entries": 0 if wide else _ROOT_ENTRIES,
                "total_sectors_16": shape.total if small else 0,
                "media": _MEDIA,
                "fat_sectors_16": 0 if wide else shape.fat,
                "sectors_per_track": _SECTORS_PER_TRACK,
                "heads": _HEADS,
                "hidden_sectors": options.hidden // s.SECTOR,
                "total_sectors_32": 0 if small else shape.total,
            }
        )
        common = {"drive": 0x80, "signature": 0x29, "volume_id": options.volume_id, "label": self._label()}
        if wide:
            fields = {"fat_sectors": shape.fat, "flags": 0, "version": 0, "root_cluster": 2, "info_sector": _INFO}
            head += s.EXTENDED_32.build({**common, **fields, "backup_sector": _BACKUP, "type": b"FAT32   "})
        else:
            head += s.EXTENDED_16.build({**common, "type": b"FAT16   "})
        return head + bytes(510 - len(head)) + b"\x55\xaa"

    def _disk(self) -> Disk:
        size = self._shape.total * s.SECTOR
        rows = np.zeros(len(self._rows), EXTENT)
        table = np.array(self._rows, np.uint64)
        for column, name in enumerate(("start", "length", "offset", "file")):
            rows[name] = table[:, column]
        rows["kind"] = DATA
        rows = rows[np.argsort(rows["start"])]
        ends = np.concatenate((np.zeros(1, np.uint64), rows["start"] + rows["length"]))
        begins = np.append(rows["start"], np.uint64(size))
        gaps = np.zeros(len(begins), EXTENT)
        gaps["start"], gaps["length"], gaps["kind"] = ends, begins - ends, HOLE
        both = np.concatenate((rows, gaps[gaps["length"] > 0]))
        disk = Mapped(coalesce(both[np.argsort(both["start"])]), self._sources)
        disk.format = disk.name = "fat"
        return disk


def _dirent(short: bytes, attributes: int, cluster: int, size: int, mtime: int) -> bytes:
    moment = time.gmtime(min(max(mtime // 10**9, _FIRST_DATE), _LAST_DATE))
    date = (moment.tm_year - 1980) << 9 | moment.tm_mon << 5 | moment.tm_mday
    clock = moment.tm_hour << 11 | moment.tm_min << 5 | moment.tm_sec // 2
    return s.DIRENT.build(
        {
            "name": short,
            "attributes": attributes,
            "case": 0,
            "created_tenths": moment.tm_sec % 2 * 100,
            "created_time": clock,
            "created_date": date,
            "accessed_date": date,
            "cluster_hi": cluster >> 16,
            "time": clock,
            "date": date,
            "cluster_lo": cluster & 0xFFFF,
            "size": size,
        }
    )
