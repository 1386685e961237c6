"""Decoders of the codecs that few formats use: ADC, LZFSE, LZ4, LZO.

Each returns the decoded bytes, and 0: where its stream ends is not told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import ADC, LZ4, LZFSE, LZO

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.source import Buffer


def adc(stored: bytes, most: int) -> bytes:
    """Return what an ADC stream (Apple Data Compression) decodes to, `most` bytes or, by its last code, a few more.

    Raises FormatError where a code is cut off or points before the beginning.
    """
    out = bytearray()
    at, end = 0, len(stored)
    while at < end and len(out) < most:
        code = stored[at]
        if code & 0x80:  # the lower 7 bits + 1 literals follow
            stop = at + code - 0x7E
            if stop > end:
                raise _damaged("literals are cut off")
            out += stored[at + 1 : stop]
            at = stop
            continue
        if code & 0x40:  # the lower 6 bits + 4 bytes, from a distance of 16 bits + 1
            count, width = (code & 0x3F) + 4, 3
            distance = int.from_bytes(stored[at + 1 : at + 3], "big") + 1
        else:  # 4 bits + 3 bytes, from a distance of 10 bits + 1
            count, width = (code >> 2) + 3, 2
            distance = ((code & 3) << 8 | int.from_bytes(stored[at + 1 : at + 2], "big")) + 1
        at += width
        begin = len(out) - distance
        if at > end or begin < 0:
            raise _damaged("a match is cut off" if at > end else "a match begins before the data")
        if distance >= count:
            out += out[begin : begin + count]
        else:  # it repeats what it writes
            out += (out[begin:] * (count // distance + 1))[:count]
    return bytes(out)


def _damaged(why: str) -> FormatError:
    return FormatError(f"compressed data is damaged: {why}")


def _adc(stored: Buffer, length: int) -> tuple[bytes, int]:
    return adc(bytes(stored), length + 1), 0


def _lzfse(stored: Buffer, length: int) -> tuple[bytes, int]:
    try:
        from imagecodecs import LzfseError, lzfse_decode  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UnsupportedError(
            "data is compressed by LZFSE, for which a library is missing",
            feature="LZFSE compression",
            hint="install it: pip install 'diskmorph[lzfse]'",
        ) from error
    try:
        return bytes(lzfse_decode(bytes(stored), out=length + 1)), 0
    except LzfseError as error:
        raise _damaged(str(error)) from error


def _lz4(stored: Buffer, length: int) -> tuple[bytes, int]:
    import lz4.block  # type: ignore[import-untyped]  # noqa: PLC0415 - loads when first used

    try:
        return lz4.block.decompress(bytes(stored), uncompressed_size=length), 0
    except lz4.block.LZ4BlockError as error:
        raise _damaged(str(error)) from error


def _lzo(stored: Buffer, length: int) -> tuple[bytes, int]:
    from diskmorph.formats.btrfs.lzo import decompress  # noqa: PLC0415 - loads when first used

    return decompress(bytes(stored), length), 0


DECODERS: dict[int, Callable[[Buffer, int], tuple[bytes, int]]] = {ADC: _adc, LZFSE: _lzfse, LZ4: _lz4, LZO: _lzo}
