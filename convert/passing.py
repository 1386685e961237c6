"""Compressed units that stand in the target as they are in the source: decoded to be checked, not encoded again.

Decoding tells where a stream ends, which qcow2's tables do not, and that the unit is sound; a damaged one is never
passed on.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

from diskmorph.formats.extents import DEFLATE, ZLIB

if TYPE_CHECKING:
    from diskmorph.formats.allocator import Allocator
    from diskmorph.formats.source import Buffer

_HEADER = b"\x48\x0d"  # RFC 1950: deflate with a window of 2^12 bytes
_TRAILER = 4  # Adler-32


class Stream(NamedTuple):
    """The encoded bytes of one unit, exactly, and the bytes that they decode to."""

    codec: int
    data: Buffer
    length: int


def may_pass(allocator: Allocator) -> bool:
    """Whether the target takes streams made by others: not where a level is asked for, nor where it is encrypted."""
    return allocator.level is None and not allocator.encrypted


def passed(stream: Stream, unit: Buffer, codec: int, window_bits: int) -> Buffer | None:
    """Return the stream as one of `codec`, `unit` being what it decodes to; None where that takes encoding it anew.

    `window_bits`: the largest window that the target's readers promise to take. Raw streams are of 12 bits, or are not
    offered (`decode_exactly`).
    """
    if stream.length != len(unit):
        return None
    if stream.codec == codec:
        return stream.data
    if stream.codec == DEFLATE and codec == ZLIB:
        return b"".join((_HEADER, stream.data, zlib.adler32(unit).to_bytes(_TRAILER, "big")))
    if stream.codec == ZLIB and codec == DEFLATE and (stream.data[0] >> 4) + 8 <= window_bits:
        return memoryview(stream.data)[len(_HEADER) : -_TRAILER]
    return None
