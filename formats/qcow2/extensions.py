"""Header extensions, snapshot table and bitmap directory: the lists that a qcow2 header points to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diskmorph.formats.disk import Snapshot
from diskmorph.formats.errors import FormatError
from diskmorph.formats.qcow2 import schema as s

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.source import ByteSource

_PIECE = 1 << 16


@dataclass(frozen=True)
class Extensions:
    """What the header extensions say; `bitmaps` and `crypto` are (offset, bytes) of what they point to."""

    backing_format: str | None = None
    data_file: str | None = None
    feature_names: Mapping[tuple[int, int], str] = field(default_factory=dict)
    bitmap_count: int = 0
    bitmaps: tuple[int, int] | None = None
    crypto: tuple[int, int] | None = None


def _bad(problem: str, source: ByteSource, structure: str, **place: Any) -> FormatError:
    return FormatError(problem, file=source.name, format="qcow2", structure=structure, **place)


def read_extensions(source: ByteSource, start: int, stop: int, limits: Limits) -> Extensions:
    """Read the extensions between `start` and `stop` (bytes of the file). Raises FormatError."""
    found: dict[str, Any] = {}
    at = start
    for _ in range(limits.header_extensions):
        if at + 8 > min(stop, source.size):
            break
        head = s.EXTENSION.parse(source.read(at, 8))
        kind, length = int(head.type), int(head.length)
        if kind == s.EXT_END:
            break
        if at + 8 + length > min(stop, source.size):
            raise _bad(
                "a header extension is longer than the room for it",
                source,
                "header extension",
                field="length",
                offset=at + 4,
                expected=f"at most {max(min(stop, source.size) - at - 8, 0)}",
                found=length,
            )
        found |= _extension(kind, source.read(at + 8, length), source, at)
        at += 8 + -(-length // 8) * 8
    return Extensions(**found)


def _extension(kind: int, data: bytes, source: ByteSource, at: int) -> dict[str, Any]:
    if kind == s.EXT_BACKING_FORMAT:
        return {"backing_format": data.decode("utf-8", "replace")}
    if kind == s.EXT_DATA_FILE:
        return {"data_file": data.decode("utf-8", "surrogateescape")}
    if kind == s.EXT_FEATURE_NAMES:
        size = s.FEATURE_NAME.sizeof()
        rows = [s.FEATURE_NAME.parse(data[i : i + size]) for i in range(0, len(data) - size + 1, size)]
        return {"feature_names": {(r.type, r.bit): r.name.rstrip(b"\0").decode("utf-8", "replace") for r in rows}}
    fixed = {s.EXT_BITMAPS: s.BITMAPS, s.EXT_CRYPTO: s.CRYPTO}.get(kind)
    if fixed is None:
        return {}
    if len(data) < fixed.sizeof():
        raise _bad(
            "a header extension is too short",
            source,
            "header extension",
            field="length",
            offset=at + 4,
            expected=fixed.sizeof(),
            found=len(data),
        )
    raw = fixed.parse(data)
    if kind == s.EXT_CRYPTO:
        return {"crypto": (int(raw.offset), int(raw.length))}
    return {"bitmap_count": int(raw.count), "bitmaps": (int(raw.directory_offset), int(raw.directory_size))}


@dataclass(frozen=True)
class SnapshotEntry:
    """One entry of the snapshot table, and where in the file it lies. Sizes in bytes, `l1_size` in entries."""

    info: Snapshot
    l1_offset: int
    l1_size: int
    offset: int
    length: int


class _Table:
    """The snapshot table's bytes, read in large pieces: there may be tens of thousands of entries."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._start, self._data = source, 0, b""

    def part(self, offset: int, length: int, number: int) -> bytes:
        """Return bytes of entry `number`. Raises FormatError where they pass the file's end."""
        at = offset - self._start
        if at < 0 or at + length > len(self._data):
            if offset + length > self._source.size:
                raise _bad(
                    f"the entry of snapshot number {number + 1} lies beyond the end of the file",
                    self._source,
                    "snapshot table",
                    field="entry",
                    offset=offset,
                    expected=f"{length} bytes",
                    found=f"the end at {self._source.size}",
                )
            self._start, at = offset, 0
            self._data = self._source.read_upto(offset, max(length, _PIECE))
        return self._data[at : at + length]


def read_snapshots(source: ByteSource, header: Header) -> list[SnapshotEntry]:
    """Read the snapshot table. Raises FormatError where it passes the file's end."""
    entries = []
    at = header.snapshot_offset
    fixed = s.SNAPSHOT.sizeof()
    table = _Table(source)
    for number in range(header.snapshot_count):
        raw = s.SNAPSHOT.parse(table.part(at, fixed, number))
        id_size, extra_size = int(raw.id_size), int(raw.extra_size)
        names = id_size + int(raw.name_size)
        state, size = int(raw.vm_state_size), header.size
        if extra_size:
            more = table.part(at + fixed, min(extra_size, 16), number)
            extra = s.SNAPSHOT_EXTRA.parse(more.ljust(16, b"\0"))
            state = int(extra.vm_state_size) if extra_size >= 8 else state
            size = int(extra.disk_size) if extra_size >= 16 else size
        words = table.part(at + fixed + extra_size, names, number)
        info = Snapshot(
            words[:id_size].decode("utf-8", "replace"),
            words[id_size:].decode("utf-8", "replace"),
            size,
            raw.seconds + raw.nanoseconds / 1e9,
            state,
        )
        length = fixed + extra_size + names
        entries.append(SnapshotEntry(info, int(raw.l1_offset), int(raw.l1_size), at, length))
        at += -(-length // 8) * 8
    return entries


@dataclass(frozen=True)
class BitmapEntry:
    """One entry of the bitmap directory; `table_size` in entries, `offset` its own place in the file."""

    name: str
    table_offset: int
    table_size: int
    flags: int
    offset: int
    type: int
    granularity_bits: int
    extra: int


def read_bitmaps(source: ByteSource, header: Header, limits: Limits) -> list[BitmapEntry]:
    """Read the bitmap directory; none where the autoclear bit says that it is stale. Raises FormatError."""
    place = header.extensions.bitmaps
    if place is None or not header.autoclear & s.AUTOCLEAR_BITMAPS:
        return []
    offset, size = place
    if offset % header.cluster or not offset or size > limits.descriptor or offset + size > source.size:
        raise _bad(
            "the bitmap directory lies outside the file, not on a cluster, or is too large",
            source,
            "bitmap directory",
            field="offset",
            offset=offset,
            expected=f"at most {min(limits.descriptor, source.size)} bytes on a multiple of {header.cluster}",
            found=f"{size} bytes",
        )
    data = source.read(offset, size)
    entries: list[BitmapEntry] = []
    at = 0
    fixed = s.BITMAP_ENTRY.sizeof()
    while at < size:
        raw = s.BITMAP_ENTRY.parse(data[at : at + fixed]) if at + fixed <= size else None
        length = fixed + int(raw.extra_size) + int(raw.name_size) if raw is not None else size
        if raw is None or at + length > size:
            raise _bad(
                "an entry of the bitmap directory passes its end",
                source,
                "bitmap directory",
                field="entry",
                offset=offset + at,
                expected=f"at most {size - at} bytes",
                found=length,
            )
        name = data[at + length - int(raw.name_size) : at + length].decode("utf-8", "replace")
        entries.append(
            BitmapEntry(
                name,
                table_offset=int(raw.table_offset),
                table_size=int(raw.table_size),
                flags=int(raw.flags),
                offset=offset + at,
                type=int(raw.type),
                granularity_bits=int(raw.granularity_bits),
                extra=int(raw.extra_size),
            )
        )
        at += -(-length // 8) * 8
    if len(entries) != header.extensions.bitmap_count:
        raise _bad(
            "the bitmap directory has another number of entries than the header says",
            source,
            "bitmap directory",
            field="nb_bitmaps",
            offset=offset,
            expected=header.extensions.bitmap_count,
            found=len(entries),
        )
    return entries
