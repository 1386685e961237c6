"""Sparse members of tar archives (GNU tar manual, "Storing Sparse Files"): old GNU, PAX 0.0, 0.1 and 1.0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError
from diskmorph.formats.numbers import whole_number
from diskmorph.formats.tar import schema as s
from diskmorph.formats.tree import Piece

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.tar.pax import Pax

_STEP = 64 << 10


def _damaged(source: ByteSource, problem: str, at: int, **place: Any) -> FormatError:
    return FormatError(problem, file=source.name, format="tar", structure="sparse map", offset=at, **place)


def sparse_of_header(
    source: ByteSource, header: bytes, at: int, data: int, stored: int, most: int
) -> tuple[int, tuple[Piece, ...]]:
    """Return real size and pieces of a member of type "S", whose header lies at `at` and data at `data`."""
    first = s.GNU_SPARSE.parse(header[s.GNU_SPARSE_OFFSET :])
    entries = list(first.entries)
    for block in range(at + s.BLOCK, data, s.BLOCK):
        entries.extend(s.GNU_SPARSE_MORE.parse(source.read(block, s.BLOCK)).entries)
        if len(entries) > most:
            raise _damaged(source, "a sparse map is too large", at)
    numbers = [s.number(field) for entry in entries if entry.numbytes[0] for field in (entry.offset, entry.numbytes)]
    return _pieces(source, at, data, stored, s.number(first.realsize), numbers)


def sparse_of_pax(
    source: ByteSource, pax: Pax, at: int, data: int, stored: int, most: int
) -> tuple[int, tuple[Piece, ...]]:
    """Return real size and pieces of a member with GNU.sparse records; `stored` bytes lie at `data`."""
    if pax.get(b"GNU.sparse.major", b"0") == b"0":
        words = [word for word in pax.get(b"GNU.sparse.map", b"").split(b",") if word]
        size = _decimal(pax.get(b"GNU.sparse.size", b""))
        return _pieces(source, at, data, stored, size, [_decimal(word) for word in words])
    if (pax[b"GNU.sparse.major"], pax.get(b"GNU.sparse.minor")) != (b"1", b"0"):
        raise _damaged(source, "a sparse file is of an unknown version", at, found=pax[b"GNU.sparse.major"])
    numbers, length = _map_before_data(source, at, data, stored, most)
    size = _decimal(pax.get(b"GNU.sparse.realsize", b""))
    return _pieces(source, at, data + length, stored - length, size, numbers)


def _decimal(text: bytes) -> int | None:
    return whole_number(text, (1 << 64) - 1)


def _map_before_data(source: ByteSource, at: int, data: int, stored: int, most: int) -> tuple[list[int | None], int]:
    """Read format 1.0's map, decimal lines before the data; return its numbers and its length with padding."""
    text = b""
    wanted = 1
    while text.count(b"\n") < wanted:
        if len(text) >= stored:
            raise _damaged(source, "a sparse map runs beyond its member", at)
        text += source.read(data + len(text), min(_STEP, stored - len(text)))
        count = _decimal(text.split(b"\n", 1)[0]) if b"\n" in text else 0
        if count is None or count > most:
            raise _damaged(source, "a sparse map is damaged or too large", at, field="entries")
        wanted = 1 + 2 * count
    lines = text.split(b"\n", wanted)[:wanted]
    length = sum(len(line) + 1 for line in lines)
    return [_decimal(line) for line in lines[1:]], length + -length % s.BLOCK


def _pieces(
    source: ByteSource, at: int, data: int, stored: int, size: int | None, numbers: Iterable[int | None]
) -> tuple[int, tuple[Piece, ...]]:
    flat = list(numbers)
    if size is None or size >= 1 << 62 or None in flat or len(flat) % 2:
        raise _damaged(source, "a sparse map is damaged", at)
    found = []
    reach = used = 0
    for start, length in zip(flat[::2], flat[1::2], strict=True):
        assert start is not None and length is not None  # noqa: S101, PT018 - None was refused above
        if start < reach or start + length > size or used + length > stored:
            raise _damaged(source, "a sparse map is damaged", at, expected=f"ranges up to {size}", found=start)
        if length:
            found.append(Piece(start, length, source, data + used))
        reach, used = start + length, used + length
    return size, tuple(found)
