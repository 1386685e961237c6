"""Finding a VHD's footer: at the end of the file, and as a copy at the start of dynamic and differencing disks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.vhd.schema import (
    COOKIE,
    FIXED,
    FOOTER,
    FOOTER_CHECKSUM_AT,
    FOOTER_SIZE,
    GEOMETRY_LIMIT,
    OLD_FOOTER_SIZE,
    SECTOR,
    TYPE_NAMES,
    checksum,
)

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource

_SIZE_BY_GEOMETRY = {b"vpc ", b"qemu"}
"""Creators that round the disk to whole cylinders and write something else into current_size."""


@dataclass(frozen=True, slots=True)
class Copy:
    """512 bytes that begin with the cookie, at `offset`; a 511-byte footer has its last byte added."""

    offset: int
    raw: bytes

    @property
    def sum_expected(self) -> int:
        """The checksum that these bytes should have."""
        return checksum(self.raw, FOOTER_CHECKSUM_AT)

    @property
    def sum_found(self) -> int:
        """The checksum that they have."""
        return int.from_bytes(self.raw[FOOTER_CHECKSUM_AT : FOOTER_CHECKSUM_AT + 4], "big")

    @property
    def good(self) -> bool:
        """Whether the checksum is right."""
        return self.sum_found == self.sum_expected


@dataclass(frozen=True, slots=True)
class Footers:
    """The footer that counts, parsed; the copies as they are found; what is wrong with them, in words."""

    fields: Any
    first: Copy | None
    last: Copy | None
    data_end: int
    """Where the end footer begins, or the file ends."""
    warnings: tuple[str, ...]


def read_footers(source: ByteSource) -> Footers:
    """Return the footer at the end, or where it is damaged the copy of a dynamic disk at the start.

    Raises FormatError where no footer has a right checksum, UnsupportedError for another version.
    """
    first, last = _copy(source, 0, FOOTER_SIZE), _last(source)
    chosen = _choose(source, first, last)
    fields = FOOTER.parse(chosen.raw)
    if fields.version >> 16 != 1:
        version = f"{fields.version >> 16}.{fields.version & 0xFFFF}"
        raise UnsupportedError(f"VHD version {version} is not known", feature=f"version {version}")
    if fields.type not in TYPE_NAMES:
        raise FormatError(
            "the disk type is not known",
            structure="footer",
            field="type",
            offset=chosen.offset + 60,
            expected="2, 3 or 4",
            found=fields.type,
        )
    end = source.size if last is None else last.offset
    return Footers(fields, first, last, end, tuple(_warnings(fields, first, last)))


def disk_size(fields: Any) -> int:
    """Return the disk's size in bytes: by geometry for creators that mean it so, else current_size."""
    shape = (fields.cylinders, fields.heads, fields.sectors)
    by_geometry = fields.cylinders * fields.heads * fields.sectors * SECTOR
    if fields.creator in _SIZE_BY_GEOMETRY and shape != GEOMETRY_LIMIT and by_geometry:
        return int(by_geometry)
    return int(fields.current_size)


def _copy(source: ByteSource, offset: int, size: int) -> Copy | None:
    if offset < 0:
        return None
    raw = source.read_upto(offset, size)
    return Copy(offset, raw.ljust(FOOTER_SIZE, b"\0")) if len(raw) == size and raw.startswith(COOKIE) else None


def _last(source: ByteSource) -> Copy | None:
    found = _copy(source, source.size - FOOTER_SIZE, FOOTER_SIZE)
    return found or _copy(source, source.size - OLD_FOOTER_SIZE, OLD_FOOTER_SIZE)


def _choose(source: ByteSource, first: Copy | None, last: Copy | None) -> Copy:
    if last is not None and last.good:
        return last
    # The first bytes of a fixed disk are the guest's, whatever they look like.
    if first is not None and first.good and FOOTER.parse(first.raw).type != FIXED:
        return first
    damaged = last or first
    if damaged is None or damaged.good:
        raise FormatError(
            "there is no VHD footer: the file is cut off or no VHD",
            structure="footer",
            field="cookie",
            offset=max(source.size - FOOTER_SIZE, 0),
            expected=COOKIE.decode(),
        )
    raise FormatError(
        "the footer's checksum is wrong",
        structure="footer",
        field="checksum",
        offset=damaged.offset + FOOTER_CHECKSUM_AT,
        expected=f"{damaged.sum_expected:#x}",
        found=f"{damaged.sum_found:#x}",
    )


def _warnings(fields: Any, first: Copy | None, last: Copy | None) -> list[str]:
    found = [] if not fields.saved_state else ["the disk belongs to a machine in saved state"]
    if fields.type == FIXED:
        return found
    for copy, place in ((last, "at the end"), (first, "at the start")):
        if copy is None:
            found.append(f"the footer {place} is missing: read by its copy")
        elif not copy.good:
            found.append(f"the footer {place} has a wrong checksum: read by its copy")
    if first and last and first.good and last.good and first.raw != last.raw:
        found.append("the footer at the start differs from the one at the end, which counts")
    return found
