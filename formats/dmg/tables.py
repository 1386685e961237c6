"""From a UDIF file to its chunk tables: the trailer is found, the property list or the resource fork is taken apart."""

from __future__ import annotations

import plistlib
import re
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any
from xml.parsers import expat

import numpy as np
from construct import ConstructError

from diskmorph.formats.dmg import schema as s
from diskmorph.formats.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.source import ByteSource

MOST_XML = 16 << 20
"""Bytes of a property list: some 300,000 chunks, at their usual size a disk of 70 to 300 GB."""
MOST_ELEMENTS = 100_000
"""Of a property list: a partition's table takes a dozen."""
MOST_ATTRIBUTES = 1000
"""Of all elements together: lists have one. Expat takes minutes over an element with a million."""
_ATTRIBUTE = re.compile(rb"=\s*[\"']")
MOST_SECTORS = 1 << 54
_FAULTS = (expat.ExpatError, ValueError, TypeError, AttributeError, LookupError, OverflowError)
"""What plistlib raises of damaged lists. Entities it refuses (ValueError)."""


@dataclass(frozen=True)
class Table:
    """One partition's chunks. `place` is where the file keeps its list (bytes), `first` a sector of the disk."""

    name: str
    place: int
    first: int
    sectors: int
    data_offset: int
    checksum: Any
    rows: NDArray[np.void]


def find_trailer(source: ByteSource) -> int | None:
    """Return where the trailer begins: 512 bytes before the end, or a little more where something was appended."""
    place = source.size - s.TRAILER_SIZE
    if place < 0:
        return None
    if source.read_upto(place, 4) == b"koly":
        return place
    low = max(place - s.TRAILER_SIZE + 1, 0)
    found = source.read_upto(low, s.TRAILER_SIZE + len(s.MAGIC)).rfind(s.MAGIC)
    return low + found if found >= 0 and low + found <= place else None


def read_trailer(source: ByteSource) -> tuple[int, Any]:
    """Return where the trailer lies, and the trailer. Raises FormatError, UnsupportedError."""
    if source.read_upto(0, 8) in s.ENCRYPTED or source.read_upto(max(source.size - 8, 0), 8) in s.ENCRYPTED:
        raise UnsupportedError("the image is encrypted, which is not supported", feature="encrypted dmg", offset=0)
    place = find_trailer(source)
    if place is None:
        raise FormatError(
            "has no UDIF trailer: it may be cut off",
            structure="trailer",
            offset=max(source.size - s.TRAILER_SIZE, 0),
            expected="koly",
            hint="read it as a plain disk with -f raw if that is what it is",
        )
    trailer = s.TRAILER.parse(source.read(place, s.TRAILER_SIZE))
    if trailer.version != s.VERSION or trailer.size != s.TRAILER_SIZE:
        raise UnsupportedError(
            f"UDIF version {trailer.version} is not known",
            feature="UDIF version",
            structure="trailer",
            field="version",
            offset=place + 4,
            expected=f"version {s.VERSION} in {s.TRAILER_SIZE} bytes",
            found=f"version {trailer.version} in {trailer.size} bytes",
        )
    if trailer.segments > 1:
        raise UnsupportedError(
            f"is one of {trailer.segments} segments, which are not put together",
            feature="segmented dmg",
            structure="trailer",
            field="segments",
            offset=place + 60,
        )
    _require_places(trailer, place)
    return place, trailer


def _require_places(trailer: Any, end: int) -> None:
    fields = (
        ("data_offset", 24, trailer.data_offset, trailer.data_length),
        ("fork_offset", 40, trailer.fork_offset, trailer.fork_length),
        ("xml_offset", 216, trailer.xml_offset, trailer.xml_length),
    )
    for name, at, offset, length in fields:
        if length and offset + length > end:
            raise FormatError(
                "a part of the image lies beyond its end",
                structure="trailer",
                field=name,
                offset=end + at,
                expected=f"at most {end}",
                found=f"{length} bytes at {offset}",
            )
    if trailer.sectors > MOST_SECTORS:
        raise FormatError(
            "the disk's size is impossible",
            structure="trailer",
            field="sectors",
            offset=end + 492,
            expected=f"at most {MOST_SECTORS}",
            found=trailer.sectors,
        )


def read_tables(source: ByteSource, trailer: Any, limits: Limits) -> list[Table]:
    """Return the chunk tables in the order of the file. Raises FormatError where there are none or one is damaged."""
    tables = list((_of_list if trailer.xml_length else _of_fork)(source, trailer, limits))
    if not tables:
        raise FormatError(
            "has no chunk table",
            structure="property list" if trailer.xml_length else "resource fork",
            offset=trailer.xml_offset if trailer.xml_length else trailer.fork_offset,
        )
    return tables


def _too_large(structure: str, offset: int, most: int, found: int) -> FormatError:
    return FormatError(
        f"the {structure} is too large", structure=structure, offset=offset, expected=f"at most {most}", found=found
    )


def _require_modest(raw: bytes, limits: Limits) -> None:
    """Raise ValueError where the list's elements, not only its bytes, would cost too much; entities are refused too."""
    if (b"encoding" in (head := raw[:256].lower().partition(b"?>")[0]) and b"utf-8" not in head) or b"\0" in raw:
        raise ValueError("only UTF-8 is read")
    if len(list(islice(_ATTRIBUTE.finditer(raw), MOST_ATTRIBUTES + 1))) > MOST_ATTRIBUTES:
        raise ValueError(f"more than {MOST_ATTRIBUTES} attributes")
    depth = count = 0

    def begin(_name: str, _attributes: Any) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > limits.xml_depth or count > MOST_ELEMENTS:
            raise ValueError(f"more than {MOST_ELEMENTS} elements, or {limits.xml_depth} inside each other")

    def end(_name: str) -> None:
        nonlocal depth
        depth -= 1

    def refuse(*_: Any) -> None:
        raise ValueError("entities are not allowed")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.EntityDeclHandler = begin, end, refuse
    parser.Parse(raw, True)


def _of_list(source: ByteSource, trailer: Any, limits: Limits) -> Iterator[Table]:
    place, length = trailer.xml_offset, trailer.xml_length
    most = min(MOST_XML, limits.resident_table)
    if length > most:
        raise _too_large("property list", place, most, length)
    raw = source.read(place, length)
    try:
        _require_modest(raw, limits)
        found = plistlib.loads(raw, fmt=plistlib.FMT_XML)["resource-fork"]["blkx"]
        blocks = [(str(block.get("CFName") or block.get("Name") or ""), block["Data"]) for block in found]
    except _FAULTS as error:
        raise FormatError(
            "the property list is damaged, or has no chunk tables",
            structure="property list",
            field="resource-fork.blkx",
            offset=place,
            found=f"{type(error).__name__}: {error}"[:200],
        ) from error
    if len(blocks) > limits.members:
        raise _too_large("list of chunk tables", place, limits.members, len(blocks))
    at = max(raw.find(b"<key>blkx</key>"), 0)
    for number, (name, data) in enumerate(blocks):
        at = max(raw.find(b"<data>", at) + 1, at)
        if not isinstance(data, bytes):
            raise _damaged(place, number, "data", "bytes", type(data).__name__)
        yield _table(name, place + max(at - 1, 0), number, data)


def _of_fork(source: ByteSource, trailer: Any, limits: Limits) -> Iterator[Table]:
    """Yield the tables of a resource fork ("Resource Fork Format"): what is no table among its data is passed over."""
    place, length = trailer.fork_offset, trailer.fork_length
    if length > min(MOST_XML, limits.resident_table):
        raise _too_large("resource fork", place, min(MOST_XML, limits.resident_table), length)
    if length < s.FORK.sizeof():
        return
    raw = source.read(place, length)
    head = s.FORK.parse(raw[: s.FORK.sizeof()])
    at, end = head.data_offset, head.data_offset + head.data_length
    if end > length:
        raise FormatError(
            "the resources lie beyond the end of the resource fork",
            structure="resource fork",
            field="data_length",
            offset=place + 8,
            expected=f"at most {length}",
            found=end,
        )
    number = 0
    while at + 4 <= end:
        size = int.from_bytes(raw[at : at + 4], "big")
        if at + 4 + size > end:
            raise FormatError(
                "a resource lies beyond the end of the resource fork",
                structure="resource fork",
                field="length",
                offset=place + at,
                expected=f"at most {end - at - 4}",
                found=size,
            )
        data = raw[at + 4 : at + 4 + size]
        if data[:4] == b"mish":
            yield _table("", place + at + 4, number, data)
            number += 1
        at += 4 + size


def _damaged(place: int, number: int, field: str, expected: object, found: object) -> FormatError:
    return FormatError(
        "a chunk table is damaged",
        structure=f"chunk table {number}",
        field=field,
        offset=place,
        expected=expected,
        found=found,
    )


def _table(name: str, place: int, number: int, data: bytes) -> Table:
    if len(data) < s.TABLE_SIZE:
        raise _damaged(place, number, "length", f"at least {s.TABLE_SIZE}", len(data))
    try:
        head = s.TABLE.parse(data[: s.TABLE_SIZE])
    except ConstructError as error:
        raise _damaged(place, number, "magic", "mish", repr(data[:4])) from error
    room = (len(data) - s.TABLE_SIZE) // s.CHUNK.itemsize
    if head.version != 1:
        raise _damaged(place, number, "version", 1, head.version)
    if head.chunks > room:
        raise _damaged(place, number, "chunks", f"at most {room}", head.chunks)
    if max(head.first, head.sectors, head.first + head.sectors) > MOST_SECTORS:
        raise _damaged(place, number, "sectors", f"at most {MOST_SECTORS}", f"{head.sectors} from {head.first}")
    rows = np.frombuffer(data, s.CHUNK, head.chunks, s.TABLE_SIZE)
    rows = rows[(rows["kind"] != s.COMMENT) & (rows["kind"] != s.TERMINATOR) & (rows["sectors"] != 0)]
    _require_known(rows, place, number)
    wide = np.flatnonzero(
        (rows["sector"] > head.sectors) | (rows["sectors"] > head.sectors - np.minimum(rows["sector"], head.sectors))
    )
    if len(wide):
        row = rows[wide[0]]
        raise _damaged(
            place,
            number,
            "sectors",
            f"at most {head.sectors} in all",
            f"{int(row['sectors'])} from {int(row['sector'])}",
        )
    return Table(name, place, head.first, head.sectors, head.data_offset, head.checksum, rows)


def _require_known(rows: NDArray[np.void], place: int, number: int) -> None:
    known = np.isin(rows["kind"], [s.ZEROES, s.IGNORED, *s.CODECS])
    if not known.all():
        kind = f"0x{int(rows['kind'][~known][0]):08x}"
        raise UnsupportedError(
            f"has chunks of a kind that is not known, {kind}",
            feature=f"chunks of kind {kind}",
            structure=f"chunk table {number}",
            field="kind",
            offset=place,
        )
