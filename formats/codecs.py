"""Decoding of the codecs that extents name. Encoding is convert/codecs.py's.

Heavy libraries load when their codec is first met.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import BZIP2, CODEC_NAMES, DEFLATE, LZMA, ZLIB, ZSTD

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.source import Buffer


def _inflate(wbits: int) -> Callable[[Buffer, int], bytes]:
    def decode(stored: Buffer, length: int) -> bytes:
        from isal import igzip_lib, isal_zlib  # noqa: PLC0415 - loads when first used

        try:
            return isal_zlib.decompressobj(wbits).decompress(stored, length + 1)
        except (igzip_lib.IsalError, zlib.error) as error:  # type: ignore[misc]  # a class, though its stub says otherwise
            raise FormatError(f"compressed data is damaged: {error}") from error

    return decode


def _zstd(stored: Buffer, length: int) -> bytes:
    import zstandard  # noqa: PLC0415 - loads when first used

    try:
        with zstandard.ZstdDecompressor().stream_reader(stored) as reader:
            return reader.read(length + 1)
    except zstandard.ZstdError as error:
        raise FormatError(f"compressed data is damaged: {error}") from error


def _bzip2(stored: Buffer, length: int) -> bytes:
    import bz2  # noqa: PLC0415

    try:
        return bz2.BZ2Decompressor().decompress(bytes(stored), length + 1)
    except OSError as error:
        raise FormatError(f"compressed data is damaged: {error}") from error


def _lzma(stored: Buffer, length: int) -> bytes:
    import lzma  # noqa: PLC0415

    try:
        return lzma.LZMADecompressor().decompress(bytes(stored), length + 1)
    except lzma.LZMAError as error:
        raise FormatError(f"compressed data is damaged: {error}") from error


_DECODERS: dict[int, Callable[[Buffer, int], bytes]] = {
    DEFLATE: _inflate(-15),  # qemu writes a 12-bit window, others 15: inflate takes both
    ZLIB: _inflate(15),
    ZSTD: _zstd,
    BZIP2: _bzip2,
    LZMA: _lzma,
}


def decode(codec: int, stored: Buffer, length: int) -> bytes:
    """Return the `length` decoded bytes of one encoded unit; bytes behind the encoded stream are ignored.

    Never decodes more than about `length`. Raises FormatError if the data is damaged, or shorter or longer than
    `length`; UnsupportedError if nothing here decodes `codec`.
    """
    decoder = _DECODERS.get(codec)
    if decoder is None:
        raise UnsupportedError(f"{CODEC_NAMES[codec]} compression is not supported", feature=CODEC_NAMES[codec])
    out = decoder(stored, length)
    if len(out) != length:
        found = "more" if len(out) > length else f"{len(out)} bytes"
        raise FormatError("compressed data has the wrong length", expected=f"{length} bytes", found=found)
    return out
