"""Parallels HDD images (.hds), read only: one table of clusters, under two magics.

Sections are those of QEMU's docs/interop/parallels.txt. All numbers are little-endian.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from construct import Array, Bytes, Int32ul, Int64ul, Struct, this

from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE, clip, from_units
from diskmorph.formats.places import shared_places

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.allocator import NewImage, Option
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ()

OLD_MAGIC = b"WithoutFreeSpace"
"""Entries of the table count sectors; the disk's size has 32 bits."""
MAGIC = b"WithouFreSpacExt"
"""Entries of the table count clusters; the disk's size has 64 bits."""

# "Catalog file header".
HEADER = Struct(
    "magic" / Bytes(16),
    "version" / Int32ul,  # 2
    "heads" / Int32ul,
    "cylinders" / Int32ul,
    "tracks" / Int32ul,  # cluster size, in sectors; any number
    "entries" / Int32ul,  # of the block allocation table, which follows the header
    "sectors" / Int64ul,  # the disk's size; under the old magic only the lower half counts
    "in_use" / Int32ul,
    "data_offset" / Int32ul,  # sectors; 0: right behind the table
    "flags" / Int32ul,
    "extension" / Int64ul,  # sectors; dirty bitmaps, which do not concern the content
)
HEADER_SIZE = HEADER.sizeof()

IN_USE = 0x746F_6E59
"""The image was not closed."""

# "BAT": where a cluster begins, from the start of the file; 0: never written.
ENTRY = np.dtype("<u4")
TABLE = Array(this.entries, Int32ul)

_SECTOR = 512
_BATCH = 1 << 16  # entries read at once: 256 KiB
_MOST_TRACKS = 1 << 21  # clusters of 1 GiB


class ParallelsDisk(ImageDisk):
    """One .hds file. Deltas of a bundle (DiskDescriptor.xml) look like any other and are not put together."""

    format = "parallels"

    def __init__(self, source: ByteSource, header: Any) -> None:
        self.header = header
        self.cluster_size: int = header.tracks * _SECTOR
        self.size = _sectors(header) * _SECTOR
        self.files = (source,)
        self.name = source.name
        self.identity = {}
        self.table_end = HEADER_SIZE + header.entries * ENTRY.itemsize
        warnings = ("was not closed by the program that wrote to it",) if header.in_use == IN_USE else ()
        self.info = ImageInfo(
            "parallels",
            None,
            self.size,
            self.sector_size,
            self.cluster_size,
            features={"magic": header.magic.decode("ascii"), "version": header.version},
            warnings=warnings,
        )

    def places(self, first: int, stop: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Yield (number of the first cluster, offsets in bytes, 0 where there is none) for clusters first..stop."""
        step = _SECTOR if self.header.magic == OLD_MAGIC else self.cluster_size
        for at in range(first, stop, _BATCH):
            count = min(_BATCH, stop - at)
            raw = self.files[0].read(HEADER_SIZE + at * ENTRY.itemsize, count * ENTRY.itemsize)
            yield at, np.frombuffer(raw, ENTRY).astype(np.uint64) * np.uint64(step)

    def misplaced(self, first: int, places: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return which of consecutive clusters pass the end of the file or cover header and table."""
        starts = (np.arange(len(places), dtype=np.uint64) + np.uint64(first)) * np.uint64(self.cluster_size)
        left = np.uint64(self.size) - np.minimum(starts, np.uint64(self.size))
        ends = places + np.minimum(left, np.uint64(self.cluster_size))
        wrong = (ends > np.uint64(self.files[0].size)) | (places < np.uint64(self.table_end))
        bad: NDArray[np.bool_] = wrong & (places != 0)
        return bad

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        for first, places in self.places(start // self.cluster_size, -(-stop // self.cluster_size)):
            wrong = np.flatnonzero(self.misplaced(first, places))
            if len(wrong):
                self._refuse(first + int(wrong[0]), int(places[wrong[0]]))
            kinds = np.where(places == 0, HOLE, DATA)
            yield clip(from_units(first, self.cluster_size, kinds, places, self.size), start, stop)

    def _refuse(self, cluster: int, place: int) -> NoReturn:
        raise FormatError(
            f"cluster {cluster} lies beyond the end of the file or over the table: the image is truncated or damaged",
            file=self.name,
            format="parallels",
            structure="block table",
            field=f"entry {cluster}",
            offset=HEADER_SIZE + cluster * ENTRY.itemsize,
            expected=f"a place from {self.table_end} to {self.files[0].size}",
            found=f"{self.cluster_size} bytes at {place}",
        )


def _sectors(header: Any) -> int:
    return int(header.sectors) & 0xFFFF_FFFF if header.magic == OLD_MAGIC else int(header.sectors)


def open_image(source: ByteSource, context: OpenContext) -> ParallelsDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(
            f"a Parallels image has no internal snapshot {context.snapshot!r}", feature="internal snapshots"
        )
    header = HEADER.parse(source.read(0, HEADER_SIZE))
    if header.magic not in {OLD_MAGIC, MAGIC}:
        raise _wrong("magic", 0, f"{OLD_MAGIC.decode()} or {MAGIC.decode()}", header.magic)
    if header.version != 2:
        version = f"version {header.version}"
        raise UnsupportedError(f"Parallels {version} is not known", feature=version, offset=16)
    if not 0 < header.tracks <= _MOST_TRACKS:
        raise _wrong("tracks", 28, f"1 to {_MOST_TRACKS} sectors", header.tracks)
    needed = -(-_sectors(header) // header.tracks)
    if header.entries < needed:
        raise _wrong("bat_entries", 32, f"at least {needed} for the disk's size", header.entries)
    disk = ParallelsDisk(source, header)
    if disk.table_end > source.size:
        raise FormatError(
            "the block table lies beyond the end of the file",
            structure="block table",
            offset=HEADER_SIZE,
            expected=f"{disk.table_end - HEADER_SIZE} bytes",
            found=f"the end at {source.size}",
        )
    return disk


def _wrong(field: str, offset: int, expected: object, found: object) -> FormatError:
    return FormatError(
        "the Parallels header is damaged",
        structure="header",
        field=field,
        offset=offset,
        expected=expected,
        found=found,
    )


def new_allocator(image: NewImage) -> NoReturn:
    """See FormatModule: there is no writer."""
    raise UnsupportedError("Parallels images are read only", feature="writing parallels", file=image.name)


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: nothing is repaired."""
    del repair
    disk = open_image(source, context)
    report = CheckReport("parallels")
    for warning in disk.info.warnings:
        report.add("header", 44, warning, WARNING)
    for first, places in disk.places(0, disk.header.entries):
        wrong = (np.flatnonzero(disk.misplaced(first, places)) + first).tolist()
        for cluster in wrong[: CheckReport.LIMIT]:
            message = f"cluster {cluster} lies beyond the end of the file or over the table"
            report.add("block table", HEADER_SIZE + ENTRY.itemsize * cluster, message)
        if len(wrong) > CheckReport.LIMIT:
            rest = len(wrong) - CheckReport.LIMIT
            report.add("block table", HEADER_SIZE, f"{rest} more clusters are like that", count=rest)
    _check_shared(disk, report)
    return report


def _check_shared(disk: ParallelsDisk, report: CheckReport) -> None:
    def sectors() -> Iterator[NDArray[np.uint64]]:
        for _, places in disk.places(0, disk.header.entries):
            yield places[places != 0] // np.uint64(_SECTOR)

    shared = shared_places(sectors, disk.header.tracks)
    if shared.overlapping:
        some = ", ".join(str(place * _SECTOR) for place in shared.some[:4])
        report.add("block table", HEADER_SIZE, f"clusters overlap in the file, at {some}", count=shared.overlapping)
    first = disk.header.data_offset * _SECTOR or -(-disk.table_end // disk.cluster_size) * disk.cluster_size
    spare = (disk.files[0].size - first) // disk.cluster_size - shared.distinct
    if spare > 0:
        report.add("block table", HEADER_SIZE, f"{spare} clusters of the file belong to no place of the disk", WARNING)
