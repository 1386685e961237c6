"""Encoding of units for compressed targets. Decoding is formats/codecs.py's.

An encoder belongs to one thread. Deflate's window is the allocator's to choose: libdeflate, the best at all but the
fastest levels, knows 32 KiB only. The default is about as fast as level 1, its output 6 per cent larger than zlib's at
level 6. docs/python.md has the levels with their sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.errors import OptionError
from diskmorph.formats.extents import CODEC_NAMES, DEFLATE, ZLIB, ZSTD
from diskmorph.formats.numbers import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.source import Buffer

    Encoder = Callable[[Buffer], bytes | bytearray]

_LEVELS = {DEFLATE: (0, 9), ZLIB: (0, 9), ZSTD: (1, 22)}
_ZSTD_DEFAULT = 3
_WORDS = {"deflate": DEFLATE, "zlib": DEFLATE, "zstd": ZSTD}
_IGZIP_BEST = 3
_IGZIP_DEFAULT = 2
_ICF_DEFAULT, _ICF_SMALL = 0, 2
"""igzip's room for symbols of one block: with the small one, half a unit has Huffman codes of its own."""
_WIDE = 15
_LIBDEFLATE = {2: 1, 3: 2}
"""Levels of libdeflate where ours are others: igzip is level 1, so what comes next is libdeflate's fastest."""


def parse_compress(word: str, default: int) -> tuple[int, int | None]:
    """Return codec and level of `default`, `deflate`, `deflate:LEVEL`, `zstd` or `zstd:LEVEL`. Raises OptionError."""
    name, colon, level = word.partition(":")
    codec = default if name == "default" else _WORDS.get(name)
    if codec is None:
        raise OptionError(f"unknown compression {name!r}", hint="deflate or zstd, with a level as in deflate:3")
    if not colon:
        return codec, None
    low, high = _LEVELS[codec]
    found = whole_number(level, high)
    if found is None or found < low:
        raise OptionError(f"{name} has no level {level!r}", hint=f"from {low} to {high}")
    return codec, found


def encoder(codec: int, level: int | None, window_bits: int = _WIDE) -> Encoder:
    """Return a function that encodes one unit, for use by one thread. Raises OptionError.

    `window_bits`: 12 or 15, the largest window of deflate streams (RFC 1951) as a power of two.
    """
    if codec == ZSTD:
        return _zstd(_ZSTD_DEFAULT if level is None else level)
    if codec not in _LEVELS:
        raise OptionError(f"nothing here writes {CODEC_NAMES[codec]}")
    wrapped = codec == ZLIB
    if level is None:
        return _igzip(_IGZIP_DEFAULT, wrapped=wrapped, bits=window_bits, room=_ICF_SMALL)
    if level < min(_LIBDEFLATE):
        return _igzip(level, wrapped=wrapped, bits=window_bits)
    if window_bits == _WIDE:
        return _libdeflate(_LIBDEFLATE.get(level, level), wrapped=wrapped)
    return _narrow(level, wrapped=wrapped, bits=window_bits)


def _igzip(level: int, *, wrapped: bool, bits: int, room: int = _ICF_DEFAULT) -> Encoder:
    from isal import igzip_lib  # noqa: PLC0415 - loads when first used

    flag = igzip_lib.COMP_ZLIB if wrapped else igzip_lib.COMP_DEFLATE
    return lambda unit: igzip_lib.compress(unit, level, flag, room, bits)


def _libdeflate(level: int, *, wrapped: bool) -> Encoder:
    import deflate  # noqa: PLC0415 - loads when first used

    compress = deflate.zlib_compress if wrapped else deflate.deflate_compress
    return lambda unit: compress(unit, level)


def _narrow(level: int, *, wrapped: bool, bits: int) -> Encoder:
    """Return an encoder with a window below 32 KiB: igzip as far as its levels go, then zlib."""
    if level <= _IGZIP_BEST:
        return _igzip(level, wrapped=wrapped, bits=bits)
    import zlib  # noqa: PLC0415

    def encode(unit: Buffer) -> bytes:
        stream = zlib.compressobj(level, zlib.DEFLATED, bits if wrapped else -bits, 9)
        return stream.compress(unit) + stream.flush()

    return encode


def _zstd(level: int) -> Encoder:
    import zstandard  # noqa: PLC0415 - loads when first used

    compressor = zstandard.ZstdCompressor(level=level)
    return compressor.compress
