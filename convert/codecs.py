"""Encoding of units for compressed targets. Decoding is formats/codecs.py's.

An encoder belongs to one thread. Deflate has a 12-bit window, which every reader of qcow2 takes; its default level is
the fastest, whose output is a few per cent larger than zlib's best. docs/python.md has the levels with their sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.errors import OptionError
from diskmorph.formats.extents import CODEC_NAMES, DEFLATE, ZLIB, ZSTD

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.source import Buffer

    Encoder = Callable[[Buffer], bytes]

_WINDOW_BITS = 12  # qemu's block/qcow2-threads.c reads and writes this window
_LEVELS = {DEFLATE: (0, 9), ZLIB: (0, 9), ZSTD: (1, 22)}
_DEFAULT = {DEFLATE: 1, ZLIB: 1, ZSTD: 3}
_WORDS = {"deflate": DEFLATE, "zlib": DEFLATE, "zstd": ZSTD}
_IGZIP_BEST = 3


def parse_compress(word: str, default: int) -> tuple[int, int | None]:
    """Return codec and level of `default`, `deflate`, `deflate:LEVEL`, `zstd` or `zstd:LEVEL`. Raises OptionError."""
    name, colon, level = word.partition(":")
    codec = default if name == "default" else _WORDS.get(name)
    if codec is None:
        raise OptionError(f"unknown compression {name!r}", hint="deflate or zstd, with a level as in deflate:3")
    if not colon:
        return codec, None
    low, high = _LEVELS[codec]
    if not level.isdigit() or not low <= int(level) <= high:
        raise OptionError(f"{name} has no level {level!r}", hint=f"from {low} to {high}")
    return codec, int(level)


def encoder(codec: int, level: int | None) -> Encoder:
    """Return a function that encodes one unit, for use by one thread. Raises OptionError."""
    chosen = _DEFAULT.get(codec) if level is None else level
    if chosen is None:
        raise OptionError(f"nothing here writes {CODEC_NAMES[codec]}")
    if codec == ZSTD:
        return _zstd(chosen)
    return _deflate(chosen, wrapped=codec == ZLIB)


def _deflate(level: int, *, wrapped: bool) -> Encoder:
    if level <= _IGZIP_BEST:
        from isal import igzip_lib  # noqa: PLC0415 - loads when first used

        flag = igzip_lib.COMP_ZLIB if wrapped else igzip_lib.COMP_DEFLATE
        bits = 15 if wrapped else _WINDOW_BITS
        return lambda unit: igzip_lib.compress(unit, level, flag, 0, bits)
    import zlib  # noqa: PLC0415

    bits = 15 if wrapped else -_WINDOW_BITS

    def encode(unit: Buffer) -> bytes:
        stream = zlib.compressobj(level, zlib.DEFLATED, bits, 9)
        return stream.compress(unit) + stream.flush()

    return encode


def _zstd(level: int) -> Encoder:
    import zstandard  # noqa: PLC0415 - loads when first used

    compressor = zstandard.ZstdCompressor(level=level)
    return compressor.compress
