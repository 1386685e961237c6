"""The tar header (POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format").

`HEADER` describes it; `ROW` is the same as a NumPy dtype, by which thousands of headers are parsed and built at once.
Numbers are octal digits ended by NUL or space, or GNU's base-256: first bit set, then a big-endian two's complement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from construct import Array, Bytes, Padded, Struct

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 512

HEADER = Struct(
    "name" / Bytes(100),  # up to the first NUL; not always ended by one
    "mode" / Bytes(8),  # permission bits
    "uid" / Bytes(8),
    "gid" / Bytes(8),
    "size" / Bytes(12),  # bytes of data that follow, without padding; says nothing for links and devices
    "mtime" / Bytes(12),  # seconds since 1970
    "chksum" / Bytes(8),  # sum of the header's bytes, these eight counted as spaces
    "typeflag" / Bytes(1),
    "linkname" / Bytes(100),
    "magic" / Bytes(6),  # "ustar\0" POSIX, "ustar " GNU
    "version" / Bytes(2),  # "00" POSIX, " \0" GNU
    "uname" / Bytes(32),
    "gname" / Bytes(32),
    "devmajor" / Bytes(8),
    "devminor" / Bytes(8),
    "prefix" / Bytes(155),  # POSIX: goes before name with a slash between
    "padding" / Bytes(12),  # "tar\0" in its last four: star, whose prefix is 131 bytes
)

_SPARSE_ENTRY = Struct("offset" / Bytes(12), "numbytes" / Bytes(12))

# Old GNU sparse header (type "S"): from byte 386 of the header.
GNU_SPARSE = Struct("entries" / Array(4, _SPARSE_ENTRY), "isextended" / Bytes(1), "realsize" / Bytes(12))
GNU_SPARSE_OFFSET = 386
# Each further block while isextended is set.
GNU_SPARSE_MORE = Padded(BLOCK, Struct("entries" / Array(21, _SPARSE_ENTRY), "isextended" / Bytes(1)))

ROW = np.dtype(
    [
        ("name", "S100"),
        ("mode", "u1", 8),
        ("uid", "u1", 8),
        ("gid", "u1", 8),
        ("size", "u1", 12),
        ("mtime", "u1", 12),
        ("chksum", "u1", 8),
        ("typeflag", "u1"),
        ("linkname", "S100"),
        ("magic", "S6"),
        ("version", "S2"),
        ("uname", "S32"),
        ("gname", "S32"),
        ("devmajor", "u1", 8),
        ("devminor", "u1", 8),
        ("prefix", "S155"),
        ("padding", "S12"),
    ]
)

# typeflag
REGULAR, OLD_REGULAR, HARD, SYMBOLIC, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO, CONTIGUOUS = b"0\x001234567"
PAX, PAX_GLOBAL, PAX_SUN, GNU_LONG_NAME, GNU_LONG_LINK, GNU_SPARSE_FILE, GNU_DUMPDIR, GNU_VOLUME = b"xgXLKSDV"

_CHKSUM = slice(148, 156)


def is_tar(head: bytes) -> bool:
    """Return whether a file that begins with these 512 bytes is a tar archive: by its magic and checksum.

    Headers older than POSIX have no magic; then the checksum alone decides. An archive without members is none.
    """
    if len(head) < BLOCK or not head[0]:
        return False
    digits = head[_CHKSUM].strip(b"\0 ")
    if not digits or not digits.isdigit() or b"8" in digits or b"9" in digits:
        return False
    return int(digits, 8) == sum(head[:148]) + 8 * 32 + sum(head[156:BLOCK])


def checksums(rows: NDArray[np.void]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the unsigned and the signed (old SunOS) sums of headers, their checksum fields counted as spaces."""
    table = rows.view(np.uint8).reshape(len(rows), BLOCK)
    field = table[:, _CHKSUM]
    unsigned = table.sum(axis=1, dtype=np.int64) - field.sum(axis=1, dtype=np.int64) + 8 * 32
    high = (table >= 0x80).sum(axis=1, dtype=np.int64) - (field >= 0x80).sum(axis=1, dtype=np.int64)
    return unsigned, unsigned - 256 * high


def octal(field: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the numbers of a column of octal fields, shape (n, width), and which rows are not plain octal."""
    value = np.zeros(len(field), np.int64)
    begun = np.zeros(len(field), np.bool_)
    ended = np.zeros(len(field), np.bool_)
    odd = np.zeros(len(field), np.bool_)
    for column in field.T:
        digit = (column >= 48) & (column < 56)
        odd |= ~digit & (column != 0) & (column != 32) & ~ended
        ended |= begun & ~digit
        take = digit & ~ended
        value = np.where(take, value * 8 + column - 48, value)
        begun |= take
    return value, odd


def number(field: bytes) -> int | None:
    """Return the number of one field, octal or base-256; None if it is neither."""
    if field[:1] >= b"\x80":
        value = int.from_bytes(field, "big", signed=False)
        bits = 8 * len(field)
        return value - (1 << bits) if field[0] == 0xFF else value & ((1 << (bits - 1)) - 1)
    digits = field.lstrip(b" \0").split(b"\0", 1)[0].split(b" ", 1)[0]
    if not digits:
        return 0
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def to_octal(values: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Return a column of octal fields of `width` bytes, the last a NUL; the values must fit."""
    shifts = np.arange(width - 2, -1, -1, dtype=np.int64) * 3
    field = np.zeros((len(values), width), np.uint8)
    field[:, :-1] = ((values[:, None] >> shifts) & 7) + 48
    return field
