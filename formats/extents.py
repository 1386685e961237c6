"""Extents: the table that says, for each range of a disk, what it is and where its bytes lie.

All functions work on whole arrays; nothing here makes a Python object per row.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.errors import FormatError
from diskmorph.formats.rows import chosen, copied, joined

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

# One row: the range [start, start + length) of the disk, in bytes.
EXTENT = np.dtype(
    [
        ("start", "<u8"),
        ("length", "<u8"),
        ("offset", "<u8"),  # DATA: where the bytes, plain or encoded, begin in files[file]
        ("stored", "<u4"),  # encoded only: encoded bytes, an upper bound where the format rounds
        ("skip", "<u4"),  # encoded only: decoded bytes to drop first
        ("file", "<u4"),  # index into Disk.files
        ("kind", "u1"),
        ("codec", "u1"),
        ("depth", "u1"),  # 0: the image itself; 1: its parent; ...
        ("flags", "u1"),
    ]
)

# kind
DATA, ZERO, HOLE, ABSENT = range(4)
KIND_NAMES = ("data", "zero", "hole", "absent")
# codec: one registry for all formats (formats/codecs.py decodes them)
PLAIN, DEFLATE, ZLIB, ZSTD, BZIP2, LZMA, LZO, ADC, LZFSE, LZ4 = range(10)
CODEC_NAMES = ("plain", "deflate", "zlib", "zstd", "bzip2", "lzma", "lzo", "adc", "lzfse", "lz4")

BATCH = 1 << 15
"""Rows of a batch, about: what `extents()` yields at once (1.3 MB)."""

_RUNS = 1 << 12
"""Runs of a file that are asked for before the first of them is dealt with."""

Rows = "NDArray[np.void]"


def row(
    start: int,
    length: int,
    kind: int,
    *,
    offset: int = 0,
    file: int = 0,
    codec: int = PLAIN,
    stored: int = 0,
    skip: int = 0,
) -> NDArray[np.void]:
    """Return one extent as an array of one row."""
    rows = np.zeros(1, EXTENT)
    rows[0] = (start, length, offset, stored, skip, file, kind, codec, 0, 0)
    return rows


def plain_runs(runs: Iterator[tuple[int, int, bool]], *, base: int = 0, hole: int = HOLE) -> Iterator[NDArray[np.void]]:
    """Yield the extents of a plain disk that begins at `base` of its file, whose `runs` are what ByteSource.runs tells.

    `hole` is the kind of what is not allocated.
    """
    while part := list(islice(runs, _RUNS)):
        at, length, allocated = np.array(part, np.uint64).T
        rows = np.zeros(len(part), EXTENT)
        rows["start"], rows["length"] = at - np.uint64(base), length
        rows["offset"] = np.where(allocated, at, np.uint64(0))
        rows["kind"] = np.where(allocated, DATA, hole)
        yield rows


def stops(rows: NDArray[np.void]) -> NDArray[np.uint64]:
    """Return the exclusive end of each row."""
    end: NDArray[np.uint64] = rows["start"] + rows["length"]
    return end


def _advance(rows: NDArray[np.void], delta: NDArray[np.uint64]) -> None:
    """Move the beginnings of rows by `delta` bytes, in place; their ends stay."""
    encoded = rows["codec"] != PLAIN
    rows["start"] += delta
    rows["length"] -= delta
    rows["skip"] += np.where(encoded, delta, 0).astype(np.uint32)
    rows["offset"] += np.where((rows["kind"] == DATA) & ~encoded, delta, np.uint64(0))


def clip(rows: NDArray[np.void], start: int, stop: int) -> NDArray[np.void]:
    """Return the part of sorted rows within start..stop, as a copy; no rows where that is empty."""
    if start >= stop:
        return copied(rows[:0])
    ends = stops(rows)
    first = int(np.searchsorted(ends, np.uint64(start), side="right"))
    last = int(np.searchsorted(rows["start"], np.uint64(stop), side="left"))
    out = copied(rows[first:last])
    if not len(out):
        return out
    if int(out["start"][0]) < start:
        _advance(out[:1], np.array([start - int(out["start"][0])], np.uint64))
    over = int(out["start"][-1]) + int(out["length"][-1]) - stop
    if over > 0:
        out["length"][-1] -= np.uint64(over)
    return out


def cut(rows: NDArray[np.void], bounds: NDArray[np.uint64]) -> NDArray[np.void]:
    """Return the rows split at every bound (sorted disk offsets) that lies inside one; gapless rows stay gapless."""
    if not len(rows):
        return rows
    starts = rows["start"]
    end = starts[-1] + rows["length"][-1]
    inner = bounds[(bounds > starts[0]) & (bounds < end)]
    at = np.searchsorted(starts, inner)
    fresh = starts[np.minimum(at, len(starts) - 1)] != inner
    fresh[1:] &= inner[1:] != inner[:-1]
    if not fresh.any():
        return rows
    points = np.insert(starts, at[fresh], inner[fresh])
    out = rows.take(np.searchsorted(starts, points, side="right") - 1)
    delta = points - out["start"]
    _advance(out, delta)
    out["length"][:-1] = np.minimum(out["length"][:-1], points[1:] - points[:-1])
    return out


def coalesce(rows: NDArray[np.void]) -> NDArray[np.void]:
    """Return the rows with neighbours merged that continue each other.

    ZERO, HOLE and ABSENT continue their like; plain DATA continues where its bytes do; encoded rows continue where they
    are further bytes of the same encoded unit.
    """
    if len(rows) < 2:
        return rows
    maybe = _perhaps(rows)
    if not len(maybe):
        return rows
    a, b = rows.take(maybe), rows.take(maybe + 1)
    same = (a["depth"] == b["depth"]) & (a["codec"] == b["codec"]) & (a["flags"] == b["flags"])
    same &= a["start"] + a["length"] == b["start"]
    data = a["kind"] == DATA
    plain = a["codec"] == PLAIN
    follows = a["offset"] + np.where(plain, a["length"], np.uint64(0)) == b["offset"]
    follows &= plain | (a["skip"] + a["length"] == b["skip"])
    same &= ~data | ((a["file"] == b["file"]) & follows)
    if not same.any():
        return rows
    head = np.ones(len(rows), bool)
    head[maybe[same] + 1] = False
    heads = np.flatnonzero(head)
    out = rows.take(heads)
    out["length"] = np.add.reduceat(rows["length"], heads)
    return out


def _perhaps(rows: NDArray[np.void]) -> NDArray[np.intp]:
    """Return the rows that the next may continue: of its kind, and plain data right in front of it."""
    kind, offset = rows["kind"], rows["offset"]
    apart = (kind == DATA) & (rows["codec"] == PLAIN)
    follows = offset[:-1] + rows["length"][:-1] == offset[1:]
    return np.flatnonzero((kind[:-1] == kind[1:]) & (follows | ~apart[:-1]))


def coalesced(batches: Iterable[NDArray[np.void]], most: int = BATCH) -> Iterator[NDArray[np.void]]:
    """Merge neighbours within and across batches, join small batches and split large ones: about `most` rows each."""
    held: list[NDArray[np.void]] = []
    count = 0
    for batch in batches:
        if not len(batch):
            continue
        rows = coalesce(batch)
        if held:
            sewn = _sewn(held, rows)
            count -= sewn is not rows  # the last row held went into the first of these
            rows = sewn
        if count >= most // 2:
            yield from _portions(held, most)
            held, count = [], 0
        held.append(rows)
        count += len(rows)
    yield from _portions(held, most)


def _sewn(held: list[NDArray[np.void]], rows: NDArray[np.void]) -> NDArray[np.void]:
    """Return rows with the last one held merged into their first, and taken from `held`, if that continues it."""
    last = held[-1]
    seam = coalesce(joined((last[-1:], rows[:1])))
    if len(seam) == 2:
        return rows
    held[-1:] = [last[:-1]] if len(last) > 1 else []
    rows = copied(rows)
    rows[:1] = seam
    return rows


def _portions(held: list[NDArray[np.void]], most: int) -> Iterator[NDArray[np.void]]:
    rows = joined(held) if held else np.zeros(0, EXTENT)
    for at in range(0, len(rows), most):
        yield rows[at : at + most]


def from_units(
    first: int,
    unit: int,
    kinds: NDArray[Any],
    offsets: NDArray[Any],
    size: int,
    *,
    codec: NDArray[Any] | int = PLAIN,
    stored: NDArray[Any] | int = 0,
    file: NDArray[Any] | int = 0,
) -> NDArray[np.void]:
    """Return coalesced extents of consecutive units of `unit` bytes, the first being number `first`.

    `kinds` and `offsets` (bytes) have one value per unit; `codec`, `stored` and `file` one, or one for all. The last
    unit is cut to the disk's `size`.
    """
    kinds = np.asarray(kinds, np.uint8)
    offsets = np.asarray(offsets, np.uint64)
    heads = _unit_heads(kinds, offsets, unit, codec, file)
    rows = np.zeros(len(heads), EXTENT)
    rows["start"] = (heads.astype(np.uint64) + np.uint64(first)) * np.uint64(unit)
    rows["length"] = np.diff(heads, append=len(kinds)).astype(np.uint64) * np.uint64(unit)
    rows["kind"] = kinds[heads]
    data = rows["kind"] == DATA
    rows["offset"] = np.where(data, offsets[heads], np.uint64(0))
    rows["codec"] = np.where(data, _at(codec, heads), PLAIN)
    rows["stored"] = np.where(rows["codec"] != PLAIN, _at(stored, heads), 0)
    rows["file"] = np.where(data, _at(file, heads), 0)
    return coalesce(clip(rows, 0, size))


def _unit_heads(
    kinds: NDArray[np.uint8],
    offsets: NDArray[np.uint64],
    unit: int,
    codec: NDArray[Any] | int,
    file: NDArray[Any] | int,
) -> NDArray[np.int64]:
    """Return the numbers of the units that do not continue the one before: most do, and rows are 40 bytes each."""
    same = kinds[1:] == kinds[:-1]
    data = kinds[1:] == DATA
    if data.any():
        follows = offsets[:-1] + np.uint64(unit) == offsets[1:]
        if isinstance(file, np.ndarray):
            follows &= file[1:] == file[:-1]
        plain = np.asarray(codec) == PLAIN
        follows &= plain[1:] & plain[:-1] if plain.ndim else plain
        same &= ~data | follows
    heads: NDArray[np.int64] = np.flatnonzero(np.concatenate(([True], ~same)) if len(kinds) else same)
    return heads


def _at(values: NDArray[Any] | int, heads: NDArray[np.int64]) -> NDArray[Any] | int:
    return values[heads] if isinstance(values, np.ndarray) and values.ndim else values


def require_within(
    rows: NDArray[np.void], sizes: list[int], *, file: str, format: str, structure: str, allow_partial_unit: int = 0
) -> None:
    """Raise FormatError for the first DATA row whose bytes lie beyond the end of its file.

    `sizes` has one size per file index. Plain rows may pass the end by `allow_partial_unit` bytes less one, where the
    format lets a file end inside its last unit; encoded rows must begin inside.
    """
    data = np.flatnonzero(rows["kind"] == DATA)
    if not len(data):
        return
    part = chosen(rows, data)
    ends = np.asarray(sizes, np.uint64)[part["file"]]
    plain = part["codec"] == PLAIN
    need = np.where(plain, part["length"], np.uint64(1))
    need -= np.where(plain, np.minimum(np.uint64(max(allow_partial_unit - 1, 0)), need), np.uint64(0))
    room = ends - np.minimum(part["offset"], ends)  # offset + length may pass 64 bits
    bad = np.flatnonzero((need > room) | (part["offset"] > ends))
    if not len(bad):
        return
    worst = part[bad[0]]
    raise FormatError(
        f"the image is truncated: the {structure} of disk offset {int(worst['start'])} lies beyond its end",
        file=file,
        format=format,
        structure=structure,
        field="offset",
        offset=int(worst["offset"]),
        expected=f"{int(worst['length'])} bytes",
        found=f"the end at {int(ends[bad[0]])}",
    )
