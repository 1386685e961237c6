"""Reading EWF: tables are loaded as they are needed, a terabyte has two thousand of them."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from diskmorph.formats.codecs import decode
from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.ewf import schema as s
from diskmorph.formats.ewf.segments import Contents, Table, read_segments
from diskmorph.formats.extents import BATCH, DATA, EXTENT, PLAIN, ZLIB, clip

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

_CACHED = 1 << 18  # chunks of the tables held at once: 10 MiB, or a single larger table
_U = np.uint64


class EwfDisk(ImageDisk):
    """An image in one or more segment files, `contents` being what their sections say."""

    format = "ewf"

    def __init__(self, contents: Contents, limits: Limits) -> None:
        self.contents = contents
        self.files = tuple(contents.files)
        self.name = self.files[0].name
        self.chunk, self.size, self.sector_size = _geometry(contents, limits)
        self.identity = {}
        self._firsts = [table.first for table in contents.tables]
        self._lock = threading.Lock()
        self._loaded: OrderedDict[int, NDArray[np.void]] = OrderedDict()
        self._last: tuple[int, int] | None = None
        features: dict[str, Any] = {"segments": len(self.files)}
        features |= {name: value.hex() for name, value in contents.hashes.items()}
        if not contents.old:
            features["media"] = s.MEDIA.get(contents.volume.media, str(contents.volume.media))
        unread = f"{contents.unread} sectors could not be read when the image was made, and hold zeroes"
        warnings = (unread,) if contents.unread else ()
        kind = "S01" if contents.old else "E01"
        self.info = ImageInfo("ewf", kind, self.size, self.sector_size, self.chunk, features, warnings=warnings)

    def entries(self, table: Table, place: int) -> NDArray[np.uint32]:
        """Return the entries of a table, or of its copy, that begins at `place`. Raises FormatError."""
        source, start = self.files[table.file], place + s.TABLE_SIZE
        length = table.count * s.ENTRY.itemsize
        raw = source.read(start, length + (s.CHECKSUM if table.tail else 0))
        if table.tail and zlib.adler32(raw[:length]) != int.from_bytes(raw[length:], "little"):
            self._refuse(table, start + length, "checksum", f"{zlib.adler32(raw[:length]):08x}", raw[length:].hex())
        return np.frombuffer(raw, s.ENTRY, table.count)

    def rows(self, index: int) -> NDArray[np.void]:
        """Return the chunks of a table as extents: of its copy, where the table itself is damaged."""
        with self._lock:
            found = self._loaded.get(index)
            if found is not None:
                self._loaded.move_to_end(index)
                return found
        table = self.contents.tables[index]
        try:
            rows = self.parsed(table, table.place)
        except FormatError:
            if table.mirror is None:
                raise
            rows = self.parsed(table, table.mirror)
        with self._lock:
            self._loaded[index] = rows
            while len(self._loaded) > 1 and sum(map(len, self._loaded.values())) > _CACHED:
                self._loaded.popitem(last=False)
        return rows

    def parsed(self, table: Table, place: int) -> NDArray[np.void]:
        """Return a table, or its copy, that begins at `place`, as extents to the disk's end. Raises FormatError."""
        entries = self.entries(table, place)
        packed = entries >= np.uint32(s.PACKED)
        offsets = (entries & np.uint32(s.PACKED - 1)).astype(_U) + _U(table.base)
        ends = np.append(offsets[1:], _U(table.high))
        rows = np.zeros(table.count, EXTENT)
        rows["start"] = np.arange(table.first, table.first + table.count, dtype=_U) * _U(self.chunk)
        rows["length"] = np.minimum(_U(self.chunk), _U(self.size) - rows["start"])
        rows["offset"], rows["file"], rows["kind"] = offsets, table.file, DATA
        rows["codec"] = np.where(packed, ZLIB, PLAIN)
        stored = ends - np.minimum(offsets, ends)
        # What zlib cannot pack grows by less than this. Behind the last chunk anything may follow.
        most = _U(self.chunk + self.chunk // 8 + 1024)
        stored[-1] = min(int(stored[-1]), int(most))
        least = np.where(packed, _U(1), rows["length"] + _U(s.CHECKSUM))
        wrong = (offsets < _U(table.low)) | (ends > _U(table.high)) | (stored < least) | (stored > most)
        bad = np.flatnonzero(wrong)
        if len(bad):
            at = int(bad[0])
            self._refuse(
                table,
                place + s.TABLE_SIZE + at * s.ENTRY.itemsize,
                f"entry {table.first + at}",
                f"{int(least[at])} to {int(most)} bytes from {table.low} to {table.high}",
                f"{int(offsets[at])} to {int(ends[at])}",
            )
        rows["stored"] = np.where(packed, stored, _U(0))
        return rows

    def _refuse(self, table: Table, offset: int, name: str, expected: object, found: object) -> NoReturn:
        raise FormatError(
            "a table of chunks is damaged",
            file=self.files[table.file].name,
            format=self.format,
            structure="section table",
            field=name,
            offset=offset,
            expected=expected,
            found=found,
        )

    def unit_size(self) -> int:
        """See Disk: the chunk's size."""
        return self.chunk

    def decode_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> bytes | bytearray:
        """See Disk: the last chunk is as long as the disk leaves it."""
        length = self.chunk
        if self.size % self.chunk:
            if self._last is None:
                row = self.rows(len(self.contents.tables) - 1)[-1]
                self._last = int(row["file"]), int(row["offset"])
            length = self.size % self.chunk if (file, offset) == self._last else length
        if least > length:  # two tables name the last chunk
            raise FormatError(
                "the disk's last chunk is also another one",
                file=self.files[file].name,
                format=self.format,
                structure="section table",
                offset=offset,
                expected=f"{length} bytes",
                found=f"{least} bytes",
            )
        try:
            return decode(codec, (held or self.files[file]).view(offset, stored), length)
        except DiskmorphError as error:
            error.structure = error.structure or "compressed data"
            raise error.located(file=self.files[file].name, format=self.format, offset=offset) from error.__cause__

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        index = int(np.searchsorted(self._firsts, start // self.chunk, side="right")) - 1
        while index < len(self._firsts) and self._firsts[index] * self.chunk < stop:
            rows = clip(self.rows(index), start, stop)
            for at in range(0, len(rows), BATCH):
                yield rows[at : at + BATCH]
            index += 1


def _geometry(contents: Contents, limits: Limits) -> tuple[int, int, int]:
    """Return bytes of a chunk, of the disk, of a sector. Raises FormatError where the sections contradict it."""
    volume, first = contents.volume, contents.files[0]
    if volume is None:
        raise FormatError("has no volume section", file=first.name, structure="section volume", offset=13)
    fields = (
        ("sector", volume.sector, 512, 4096, volume.sector & (volume.sector - 1)),
        ("chunk_sectors", volume.chunk_sectors, 1, limits.decoded_unit // max(volume.sector, 1), 0),
        ("sectors", volume.sectors, 0, (1 << 62) // max(volume.sector, 1), 0),
    )
    for name, value, low, high, odd in fields:
        if not low <= value <= high or odd:
            raise FormatError(
                "the volume section says what is impossible",
                file=first.name,
                structure="section volume",
                field=name,
                offset=13,
                expected=f"{low} to {high}",
                found=value,
            )
    chunk, size = volume.chunk_sectors * volume.sector, volume.sectors * volume.sector
    if -(-size // chunk) != contents.chunks:
        raise FormatError(
            "the tables do not hold the chunks of the disk: the image is incomplete or damaged",
            file=contents.files[-1].name,
            structure="section table",
            field="entries",
            offset=contents.tables[-1].place if contents.tables else 13,
            expected=f"{-(-size // chunk)} chunks in all",
            found=contents.chunks,
        )
    return chunk, size, volume.sector if volume.sector == 4096 else 512


def open_image(source: ByteSource, context: OpenContext) -> EwfDisk:
    """See FormatModule. Further segment files are opened beside the first."""
    if context.snapshot is not None:
        raise UnsupportedError(f"an EWF image has no snapshot {context.snapshot!r}", feature="internal snapshots")
    contents = read_segments(source, context)
    try:
        return EwfDisk(contents, context.limits)
    except BaseException:
        for one in contents.files[1:]:
            one.close()
        raise
