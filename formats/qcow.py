"""qcow, QEMU's first copy-on-write format (version 1), read-only: L1 and L2 tables, deflate, backing files.

Facts are those of QEMU's block/qcow.c; there is no other specification. All numbers are big-endian.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from construct import Const, Int8ub, Int32ub, Int64ub, Padding, Struct

from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.disk import ImageDisk, ImageInfo, ParentRef
from diskmorph.formats.errors import FormatError, OptionError, SourceError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, DEFLATE, EXTENT, HOLE, PLAIN, clip, row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.allocator import Allocator, NewImage, Option
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import Buffer, ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ()

HEADER = Struct(
    "magic" / Const(b"QFI\xfb"),  # 0
    "version" / Const(1, Int32ub),  # 4
    "backing_offset" / Int64ub,  # 8: of the backing file's name; 0: none
    "backing_length" / Int32ub,  # 16: at most 1023
    "mtime" / Int32ub,  # 20: the backing file's, not used
    "size" / Int64ub,  # 24: the disk's, in bytes
    "cluster_bits" / Int8ub,  # 32: 9..16
    "l2_bits" / Int8ub,  # 33: an L2 table has 1 << l2_bits entries; 6..13
    Padding(2),
    "crypt_method" / Int32ub,  # 36: 0 none, 1 AES
    "l1_offset" / Int64ub,  # 40
)
# An entry of an L1 or L2 table: 0 for none; L1: the L2 table's offset; L2: the data's.
ENTRY = np.dtype(">u8")
ENTRY_STRUCT = Int64ub
COMPRESSED = 1 << 63
"""Of an L2 entry: below it the stored bytes in the top cluster_bits bits, then the offset."""

_U = np.uint64
_CHUNK = 4 << 20
_CACHED = 64


@dataclass(frozen=True)
class Header:
    """The header's fields; sizes and offsets in bytes."""

    size: int
    cluster_bits: int
    l2_bits: int
    crypt_method: int
    l1_offset: int
    backing: str | None

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def coverage(self) -> int:
        """Bytes of the disk that one L2 table maps."""
        return 1 << (self.cluster_bits + self.l2_bits)

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table."""
        return -(-self.size // self.coverage)


def _bad(problem: str, source: ByteSource, structure: str, **place: Any) -> FormatError:
    return FormatError(problem, file=source.name, format="qcow", structure=structure, **place)


def read_header(source: ByteSource, limits: Limits) -> Header:
    """Read and check the header. Raises FormatError."""
    head = source.read_upto(0, HEADER.sizeof())
    if head[:4] != b"QFI\xfb" or head[4:8] != b"\0\0\0\1":
        raise _bad(
            "not a qcow image of version 1", source, "header", field="magic", offset=0, found=head[:8].hex() or None
        )
    if len(head) < HEADER.sizeof():
        raise _bad(
            "the file ends inside its header", source, "header", offset=len(head), expected=f"{HEADER.sizeof()} bytes"
        )
    raw = HEADER.parse(head)
    fields = (
        ("cluster_bits", 32, int(raw.cluster_bits), 9, 16),
        ("l2_bits", 33, int(raw.l2_bits), 6, 13),
        ("crypt_method", 36, int(raw.crypt_method), 0, 1),
        ("size", 24, int(raw.size), 0, (1 << 63) - 1),
        ("backing_file_size", 16, int(raw.backing_length) if raw.backing_offset else 0, 0, 1023),
    )
    for name, offset, value, low, high in fields:
        if not low <= value <= high:
            raise _bad(
                "a header field is impossible",
                source,
                "header",
                field=name,
                offset=offset,
                expected=f"{low}..{high}",
                found=value,
            )
    header = Header(
        int(raw.size),
        int(raw.cluster_bits),
        int(raw.l2_bits),
        int(raw.crypt_method),
        int(raw.l1_offset),
        _backing(raw, source),
    )
    length = header.l1_size * 8
    if length > limits.resident_table or header.l1_offset + length > source.size:
        raise _bad(
            "the L1 table is too large or lies beyond the end of the file",
            source,
            "L1 table",
            field="offset",
            offset=header.l1_offset,
            expected=f"{length} bytes, at most {limits.resident_table}",
            found=f"the end at {source.size}",
        )
    return header


def _backing(raw: Any, source: ByteSource) -> str | None:
    offset, length = int(raw.backing_offset), int(raw.backing_length)
    if not offset or not length:
        return None
    if offset + length > source.size:
        raise _bad(
            "the backing file's name lies beyond the end of the file",
            source,
            "header",
            field="backing_file_offset",
            offset=8,
            expected=f"at most {source.size - length}",
            found=offset,
        )
    return source.read(offset, length).decode("utf-8", "surrogateescape")


class QcowDisk(ImageDisk):
    """One qcow file of version 1, without its backing file."""

    format = "qcow"

    def __init__(self, source: ByteSource, context: OpenContext) -> None:
        if context.snapshot is not None:
            raise SourceError(
                f"has no snapshot {context.snapshot!r}", file=source.name, format="qcow", hint="it has none"
            )
        self._header = header = read_header(source, context.limits)
        self.size = header.size
        self.files = (source,)
        self.name = source.name
        self.identity = {}
        parent = None if header.backing is None else ParentRef((header.backing,))
        features: dict[str, Any] = {"version": 1, "cluster_size": header.cluster, "compression": "zlib"}
        if header.crypt_method:
            features["encryption"] = "AES"
        self.info = ImageInfo("qcow", None, self.size, 512, header.cluster, features, parent=parent)
        self._void = HOLE if parent is None else ABSENT
        self._lock = threading.Lock()
        self._l1: NDArray[np.uint64] | None = None
        self._tables: OrderedDict[int, NDArray[np.uint64]] = OrderedDict()

    def unit_size(self) -> int:
        """Return the cluster's size."""
        return self._header.cluster

    def encoded_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> tuple[bytes | bytearray, Buffer]:
        """See Disk."""
        return self._encoded(file, offset, stored, codec, least, held)

    def _table(self) -> NDArray[np.uint64]:
        """Return the L1 table: offsets of L2 tables, 0 for none. Raises FormatError where one is not in the file."""
        header, source = self._header, self.files[0]
        with self._lock:
            if self._l1 is None:
                data = source.read(header.l1_offset, header.l1_size * 8)
                self._l1 = np.frombuffer(data, ENTRY).astype(_U)
            l1 = self._l1
        room = _U(max(source.size - (8 << header.l2_bits), 0))
        wrong = np.flatnonzero(l1 > room)
        if len(wrong):
            raise _bad(
                "the image is truncated: an L2 table lies beyond its end",
                source,
                "L2 table",
                field="offset",
                offset=int(l1[wrong[0]]),
                expected=f"{8 << header.l2_bits} bytes",
                found=f"the end at {source.size}",
            )
        return l1

    def _l2(self, offset: int) -> NDArray[np.uint64]:
        with self._lock:
            table = self._tables.get(offset)
            if table is not None:
                self._tables.move_to_end(offset)
                return table
        table = np.frombuffer(self.files[0].read(offset, 8 << self._header.l2_bits), ENTRY).astype(_U)
        with self._lock:
            self._tables[offset] = table
            while len(self._tables) > _CACHED:
                self._tables.popitem(last=False)
        return table

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        if self._header.crypt_method:
            raise UnsupportedError(
                "is encrypted with AES, which is not supported",
                feature="AES encryption",
                file=self.name,
                format="qcow",
                structure="header",
                field="crypt_method",
                offset=36,
            )
        header, l1 = self._header, self._table()
        coverage = header.coverage
        step = max(_CHUNK >> (header.l2_bits + 3), 1)
        first, last = start // coverage, -(-stop // coverage)
        used = np.flatnonzero(l1[first:last]) + first
        at = first
        while at < last:
            place = int(np.searchsorted(used, at))
            following = int(used[place]) if place < len(used) else last
            if following > at:
                yield clip(row(at * coverage, (following - at) * coverage, self._void), start, stop)
                at = following
                continue
            high = min(at + step, last)
            rows = self._rows(at, l1[at:high])
            self._require_on_clusters(rows)
            yield self._within(clip(rows, start, stop))
            at = high

    def _rows(self, first: int, offsets: NDArray[np.uint64]) -> NDArray[np.void]:
        """Return the extents of L2 tables that follow one another, from L1 index `first` on."""
        header = self._header
        entries = np.zeros((len(offsets), 1 << header.l2_bits), _U)
        for index in np.flatnonzero(offsets).tolist():
            entries[index] = self._l2(int(offsets[index]))
        flat = entries.reshape(-1)
        packed = (flat & _U(COMPRESSED)) != 0
        kinds = np.where(flat != 0, np.uint8(DATA), np.uint8(self._void))
        joined = (kinds[1:] == kinds[:-1]) & ~(packed[1:] | packed[:-1])
        joined &= (kinds[1:] != DATA) | (flat[1:] == flat[:-1] + _U(header.cluster))
        heads = np.concatenate(([0], np.flatnonzero(~joined) + 1))
        some, compressed = flat[heads], packed[heads]
        shift = _U(63 - header.cluster_bits)
        rows = np.zeros(len(heads), EXTENT)
        rows["start"] = (heads + (first << header.l2_bits)).astype(_U) * _U(header.cluster)
        rows["length"] = np.diff(np.append(heads, len(flat))).astype(_U) * _U(header.cluster)
        rows["kind"] = kinds[heads]
        rows["codec"] = np.where(compressed, DEFLATE, PLAIN)
        rows["offset"] = np.where(compressed, some & _U((1 << int(shift)) - 1), some)
        rows["stored"] = np.where(compressed, (some >> shift) & _U(header.cluster - 1), _U(0))
        return rows

    def _require_on_clusters(self, rows: NDArray[np.void]) -> None:
        """Refuse plain data that does not begin on a cluster; `rows` are whole clusters."""
        plain = (rows["kind"] == DATA) & (rows["codec"] == PLAIN)
        askew = np.flatnonzero(plain & (rows["offset"] % _U(self._header.cluster) != 0))
        if len(askew):
            worst = rows[askew[0]]
            raise _bad(
                f"the data of disk offset {int(worst['start'])} does not begin on a cluster",
                self.files[0],
                "L2 table",
                field="offset",
                offset=int(worst["offset"]),
                expected=f"a multiple of {self._header.cluster}",
            )

    def _within(self, rows: NDArray[np.void]) -> NDArray[np.void]:
        """Refuse data beyond the file's end: QEMU writes whole clusters."""
        source = self.files[0]
        packed = rows["codec"] != PLAIN
        ends = rows["offset"] + np.where(packed, rows["stored"].astype(_U), rows["length"])
        data = rows["kind"] == DATA
        beyond = np.flatnonzero(data & ((ends > _U(source.size)) | packed & (rows["stored"] == 0)))
        if not len(beyond):
            return rows
        worst = rows[beyond[0]]
        raise _bad(
            f"the image is truncated: the data of disk offset {int(worst['start'])} lies beyond its end",
            source,
            "data cluster",
            field="offset",
            offset=int(worst["offset"]),
            expected=f"{int(ends[beyond[0]]) - int(worst['offset'])} bytes",
            found=f"the end at {source.size}",
        )

    def check_places(self, rows: NDArray[np.void], report: CheckReport) -> None:
        """Report what lies over something else, and room in which nothing lies; `rows` are all DATA extents."""
        header, l1 = self._header, self._table()
        if header.size % 512:
            report.add("header", 24, f"the disk's size {header.size} is not a multiple of 512")
        tables = l1[l1 != 0]
        cluster = _U(header.cluster)
        room = np.where(
            rows["codec"] == PLAIN, (rows["length"] + cluster - _U(1)) // cluster * cluster, rows["stored"].astype(_U)
        )
        starts = np.concatenate((np.array([0, header.l1_offset], _U), tables, rows["offset"]))
        lengths = np.concatenate(
            (np.array([48, header.l1_size * 8], _U), np.full(len(tables), 8 << header.l2_bits, _U), room)
        )
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate((starts + lengths)[order])
        for place in starts[1:][ends[:-1] > starts[1:]].tolist():
            report.add("L2 table", place, "a place in the file is used twice")
        reach = np.append(starts[1:], _U(max(self.files[0].size, int(ends[-1]))))
        gaps = (reach - np.minimum(ends, reach)) // cluster
        if gaps.any():
            report.add("file", int(ends[np.argmax(gaps != 0)]), f"{int(gaps.sum())} clusters hold nothing", WARNING)


def open_image(source: ByteSource, context: OpenContext) -> QcowDisk:
    """See FormatModule."""
    return QcowDisk(source, context)


def new_allocator(image: NewImage) -> Allocator:
    """Refuse: qcow of version 1 is not written."""
    raise OptionError(f"qcow is read, but not written: {image.name}", hint="write qcow2")


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: every table and every cluster must lie in the file, no cluster be used twice."""
    del repair
    report = CheckReport("qcow")
    disk = open_image(source, context)
    try:
        seen = [batch[batch["kind"] == DATA] for batch in disk.extents()]
    except UnsupportedError:
        return report
    except FormatError as error:
        report.add(error.structure or "table", error.offset, error.problem)
        return report
    rows = np.concatenate(seen) if seen else np.zeros(0, EXTENT)
    disk.check_places(rows, report)
    return report
