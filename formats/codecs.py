"""Decoding of the codecs that extents name. Encoding is convert/codecs.py's.

Heavy libraries load when their codec is first met.
"""

from __future__ import annotations

import threading
import zlib
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import BZIP2, CODEC_NAMES, DEFLATE, LZMA, ZLIB, ZSTD

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.source import Buffer

_FRAME = (0xFD2FB528).to_bytes(4, "little")
_RLE = 1  # a block of one byte, repeated
_LZMA_MEMORY = 128 << 20  # of one decoder, whose header asks for it: `xz -9` needs 65 MiB


def _inflate(wbits: int) -> Callable[[Buffer, int], tuple[bytes, int]]:
    def decode(stored: Buffer, length: int) -> tuple[bytes, int]:
        from isal import igzip_lib, isal_zlib  # noqa: PLC0415 - loads when first used

        stream = isal_zlib.decompressobj(wbits)
        try:
            out = stream.decompress(stored, length)
            if not stream.eof and len(out) == length:
                out += stream.decompress(stream.unconsumed_tail, 1)
        except (igzip_lib.IsalError, zlib.error) as error:  # type: ignore[misc]  # a class, though its stub says otherwise
            raise FormatError(f"compressed data is damaged: {error}") from error
        return out, len(stored) - len(stream.unused_data) if stream.eof else 0

    return decode


def _zstd(stored: Buffer, length: int) -> tuple[bytes, int]:
    import zstandard  # noqa: PLC0415 - loads when first used

    try:
        with zstandard.ZstdDecompressor().stream_reader(stored) as reader:
            out = reader.read(length + 1)
        taken = _frame_end(stored) if len(out) == length else 0
    except zstandard.ZstdError as error:
        raise FormatError(f"compressed data is damaged: {error}") from error
    if len(out) == length and not taken:  # a reader of streams takes the end of the bytes for that of the frame
        raise FormatError("compressed data is cut off")
    return out, taken


def _frame_end(stored: Buffer) -> int:
    """Return where a zstd frame that was decoded ends (RFC 8878, 3.1.1); 0 if cut off, or no plain frame."""
    import zstandard  # noqa: PLC0415 - loaded by now

    view = memoryview(stored)
    if view[:4] != _FRAME:
        return 0
    at = zstandard.frame_header_size(view)
    last = 0
    while not last and at < len(view):
        head = int.from_bytes(view[at : at + 3], "little")
        last, kind = head & 1, head >> 1 & 3
        at += 3 + (1 if kind == _RLE else head >> 3)
    at += 4 if zstandard.get_frame_parameters(view).has_checksum else 0
    return at if last and at <= len(view) else 0


def _bzip2(stored: Buffer, length: int) -> tuple[bytes, int]:
    import bz2  # noqa: PLC0415

    try:
        return bz2.BZ2Decompressor().decompress(bytes(stored), length + 1), 0
    except OSError as error:
        raise FormatError(f"compressed data is damaged: {error}") from error


def _lzma(stored: Buffer, length: int) -> tuple[bytes, int]:
    import lzma  # noqa: PLC0415

    try:
        return lzma.LZMADecompressor(lzma.FORMAT_AUTO, _LZMA_MEMORY).decompress(bytes(stored), length + 1), 0
    except lzma.LZMAError as error:
        raise FormatError(f"compressed data is damaged: {error}") from error


_narrow = _inflate(-12)  # ISA-L refuses what looks back further

_DECODERS: dict[int, Callable[[Buffer, int], tuple[bytes, int]]] = {
    DEFLATE: _inflate(-15),  # qemu writes a 12-bit window, others 15: inflate takes both
    ZLIB: _inflate(15),
    ZSTD: _zstd,
    BZIP2: _bzip2,
    LZMA: _lzma,
}


def _seldom(codec: int) -> Callable[[Buffer, int], tuple[bytes, int]] | None:
    from diskmorph.formats import seldom_codecs  # noqa: PLC0415 - few images need them

    return seldom_codecs.DECODERS.get(codec)


def decode(codec: int, stored: Buffer, length: int) -> bytes | bytearray:
    """Return the `length` decoded bytes of one encoded unit; bytes behind the encoded stream are ignored.

    Never decodes more than about `length`. Raises FormatError if the data is damaged, or shorter or longer than
    `length`; UnsupportedError if nothing here decodes `codec`.
    """
    quick = _quickly(codec, stored, length)
    return _decode(codec, stored, length)[0] if quick is None else quick


def _quickly(codec: int, stored: Buffer, length: int) -> bytes | bytearray | None:
    """Decode a whole unit by the fastest decoder there is; None where that finds a fault, but not which."""
    quick = _QUICK.get(codec)
    out = quick(stored, length) if quick is not None and length else None
    return out if out is not None and len(out) == length else None


def _libdeflate(wrapped: bool) -> Callable[[Buffer, int], bytearray | None]:
    def decode(stored: Buffer, length: int) -> bytearray | None:
        import deflate  # noqa: PLC0415 - loads when first used

        try:
            return (deflate.zlib_decompress if wrapped else deflate.deflate_decompress)(stored, length)
        except deflate.DeflateError:
            return None

    return decode


class _Own(threading.local):
    """What one thread decodes by: a ZstdDecompressor keeps tables that are dear to make."""

    zstd: Any = None


_own = _Own()


def _zstd_frame(stored: Buffer, length: int) -> bytes | None:
    import zstandard  # noqa: PLC0415 - loads when first used

    if _own.zstd is None:
        _own.zstd = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(stored) not in {length, -1}:  # -1: the frame does not say
            return None
        return bytes(_own.zstd.decompress(stored, max_output_size=length, allow_extra_data=True))
    except zstandard.ZstdError:
        return None


_QUICK: dict[int, Callable[[Buffer, int], bytes | bytearray | None]] = {
    DEFLATE: _libdeflate(wrapped=False),
    ZLIB: _libdeflate(wrapped=True),
    ZSTD: _zstd_frame,
}


def decode_exactly(codec: int, stored: Buffer, length: int) -> tuple[bytes | bytearray, int]:
    """Return what `decode` does, and how many bytes of `stored` the encoded stream takes; 0 where that is not known.

    0 too of raw deflate that looks back further than 4 KiB: not every reader takes it, and nothing in it says so.
    """
    if codec == ZSTD:
        return decode(codec, stored, length), _frame_end(stored)
    if codec != DEFLATE:
        return _decode(codec, stored, length)
    try:
        out, taken = _narrow(stored, length)
    except FormatError:
        taken = 0
    return (out, taken) if taken and len(out) == length else (decode(codec, stored, length), 0)


def _decode(codec: int, stored: Buffer, length: int) -> tuple[bytes, int]:
    decoder = _DECODERS.get(codec) or _seldom(codec)
    if decoder is None:
        raise UnsupportedError(f"{CODEC_NAMES[codec]} compression is not supported", feature=CODEC_NAMES[codec])
    out, taken = decoder(stored, length)
    if len(out) != length:
        found = "more" if len(out) > length else f"{len(out)} bytes"
        raise FormatError("compressed data has the wrong length", expected=f"{length} bytes", found=found)
    return out, taken
