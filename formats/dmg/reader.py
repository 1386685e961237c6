"""Reading UDIF: chunks of all tables in one array, in the disk's order; holes, zeroes, plain and encoded data."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.codecs import decode
from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.dmg import schema as s
from diskmorph.formats.dmg.tables import Table, read_tables, read_trailer
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.extents import BATCH, CODEC_NAMES, DATA, EXTENT, HOLE, PLAIN, ZERO, clip, stops
from diskmorph.formats.rows import distinct

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

_KEPT = 32 << 20
_U = np.uint64


class _Unit:
    """A decoded chunk, once it is: chunks lie across any grid, so that two workers ask for the same one at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.data: bytes | bytearray | None = None


class DmgDisk(ImageDisk):
    """One .dmg file. `rows` are all chunks as extents, `place` is where the trailer begins (bytes)."""

    format = "dmg"

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        self.place, self.trailer = read_trailer(source)
        self.tables = read_tables(source, self.trailer, limits)
        self.size = self.trailer.sectors * s.SECTOR
        self.files = (source,)
        self.name = source.name
        self.identity = {}
        self.rows = _in_order(self.tables, self.trailer, self.size)
        encoded = self.rows[self.rows["codec"] != PLAIN]
        self._by_offset = encoded[np.argsort(encoded["offset"], kind="stable")]
        self._require_places(limits)
        self._largest = int(encoded["length"].max()) if len(encoded) else 0
        self._lock = threading.Lock()
        self._units: OrderedDict[int, _Unit] = OrderedDict()
        self.info = self._described()

    def _described(self) -> ImageInfo:
        data = self.rows[self.rows["kind"] == DATA]
        codecs = [int(codec) for codec in distinct(data["codec"])]
        compressed = [codec for codec in codecs if codec != PLAIN]
        kind = compressed or codecs
        names = [table.name for table in self.tables if table.name]
        features: dict[str, Any] = {"chunks": len(self.rows), "codecs": [CODEC_NAMES[codec] for codec in codecs]}
        if names:
            features["tables"] = names
        return ImageInfo(
            "dmg",
            s.VARIANTS[kind[0]] if len(kind) == 1 else None,
            self.size,
            self.sector_size,
            self._largest or None,
            features,
        )

    def unit_size(self) -> int:
        """See Disk: the largest chunk."""
        return self._largest

    def decode_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> bytes | bytearray:
        """See Disk: chunks have lengths of their own."""
        del least
        with self._lock:
            unit = self._units.setdefault(offset, _Unit())
            self._units.move_to_end(offset)
            while len(self._units) > 1 and len(self._units) * self._largest > _KEPT:
                self._units.popitem(last=False)
        with unit.lock:
            if unit.data is None:
                unit.data = self._decode(held or self.files[file], offset, stored, codec)
            return unit.data

    def _decode(self, source: ByteSource, offset: int, stored: int, codec: int) -> bytes | bytearray:
        at = int(np.searchsorted(self._by_offset["offset"], _U(offset)))
        try:
            return decode(codec, source.read(offset, stored), int(self._by_offset["length"][at]))
        except DiskmorphError as error:
            error.structure = error.structure or "compressed data"
            raise error.located(file=self.name, format=self.format, offset=offset) from error.__cause__

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        first = int(np.searchsorted(self.rows["start"], _U(start), side="right")) - 1
        last = int(np.searchsorted(self.rows["start"], _U(stop), side="left"))
        for at in range(first, last, BATCH):
            yield clip(self.rows[at : min(at + BATCH, last)], start, stop)

    def _require_places(self, limits: Limits) -> None:
        """Refuse data beyond the trailer, chunks that decode to too much, and plain ones of the wrong length."""
        data = self.rows[self.rows["kind"] == DATA]
        offset, stored = data["offset"], self._stored(data)
        room = _U(self.place) - np.minimum(offset, _U(self.place))
        self._refuse(data, stored > room, f"the end of the data at {self.place}", "lies beyond the end of the file")
        packed = data["codec"] != PLAIN
        most = limits.decoded_unit
        self._refuse(data, packed & (data["length"] > most), f"at most {most} bytes", "is too large")
        self._refuse(data, packed & (data["stored"] == 0), "compressed data", "holds nothing")
        same = self._by_offset["offset"][1:] == self._by_offset["offset"][:-1]
        for name in ("length", "codec", "stored"):
            other = self._by_offset[name][1:] != self._by_offset[name][:-1]
            self._refuse(self._by_offset[1:], same & other, "one chunk at one place", "lies where another one does")

    def _stored(self, data: NDArray[np.void]) -> NDArray[np.uint64]:
        """Return how many bytes of the file each DATA row takes."""
        found: NDArray[np.uint64] = np.where(data["codec"] == PLAIN, data["length"], data["stored"].astype(_U))
        return found

    def _refuse(self, data: NDArray[np.void], wrong: NDArray[np.bool_], expected: str, what: str) -> None:
        if not wrong.any():
            return
        row = data[np.flatnonzero(wrong)[0]]
        raise FormatError(
            f"the chunk of disk offset {int(row['start'])} {what}",
            structure="chunk table",
            field="offset",
            offset=int(row["offset"]),
            expected=expected,
            found=f"{int(self._stored(row.reshape(1))[0])} bytes for {int(row['length'])}",
        )


def _in_order(tables: list[Table], trailer: Any, size: int) -> NDArray[np.void]:
    """Return all chunks as extents that cover the disk without gap or overlap. Raises FormatError."""
    parts = [_extents_of(table, trailer) for table in tables]
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    rows = np.concatenate(parts)
    order = np.argsort(rows["start"], kind="stable")
    rows, owner = rows[order], owner[order]
    ends = stops(rows)
    before = np.concatenate((np.zeros(1, _U), ends))
    after = np.concatenate((rows["start"], np.array([size], _U)))
    wrong = np.flatnonzero(before != after)
    if not len(wrong):
        return rows
    at = int(wrong[0])
    table = int(owner[min(at, len(owner) - 1)]) if len(owner) else 0
    end, begin = int(before[at]), int(after[at])
    what = "no chunk covers" if end < begin else "two chunks cover, or one passes the disk's end by,"
    raise FormatError(
        f"the chunk tables contradict each other: {what} disk offsets {min(end, begin)}..{max(end, begin)}",
        structure=f"chunk table {table}",
        field="sectors",
        offset=tables[table].place,
        expected=f"a chunk from disk offset {end}",
        found=begin,
    )


def _extents_of(table: Table, trailer: Any) -> NDArray[np.void]:
    chunks = table.rows
    rows = np.zeros(len(chunks), EXTENT)
    rows["start"] = (chunks["sector"].astype(_U) + _U(table.first)) * _U(s.SECTOR)
    rows["length"] = chunks["sectors"].astype(_U) * _U(s.SECTOR)
    rows["kind"] = np.select([chunks["kind"] == s.ZEROES, chunks["kind"] == s.IGNORED], [ZERO, HOLE], DATA)
    base = trailer.data_offset + table.data_offset
    data = rows["kind"] == DATA
    far = data & ((chunks["offset"] >= _U(1 << 62)) | (chunks["stored"] >= _U(1 << 32)))
    raw = chunks["kind"] == s.RAW
    uneven = raw & (chunks["stored"] != rows["length"])
    far &= ~raw | (chunks["offset"] >= _U(1 << 62))
    if base >= 1 << 62 or far.any() or uneven.any():
        wrong = chunks[np.flatnonzero(far | uneven)[:1]]
        raise FormatError(
            "a chunk's place or length is impossible",
            structure="chunk table",
            field="stored" if uneven.any() else "offset",
            offset=table.place,
            expected="as many bytes as sectors hold" if uneven.any() else "a place in the file",
            found=f"{int(wrong['stored'][0])} bytes at {int(wrong['offset'][0])}" if len(wrong) else base,
        )
    rows["offset"][data] = chunks["offset"][data].astype(_U) + _U(base)
    for kind, codec in s.CODECS.items():
        rows["codec"][chunks["kind"] == kind] = codec
    packed = data & ~raw
    rows["stored"][packed] = chunks["stored"][packed]
    return rows


def open_image(source: ByteSource, context: OpenContext) -> DmgDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(
            f"a dmg image has no internal snapshot {context.snapshot!r}", feature="internal snapshots"
        )
    return DmgDisk(source, context.limits)
