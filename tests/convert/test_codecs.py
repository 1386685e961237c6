"""Encoders keep to the window that is asked for; decoders give the same, and say the same of damage, by whatever way."""

from __future__ import annotations

import zlib

import pytest

import diskmorph
from diskmorph.convert.codecs import encoder, parse_compress
from diskmorph.formats.codecs import decode, decode_exactly
from diskmorph.formats.errors import FormatError, OptionError
from diskmorph.formats.extents import DEFLATE, ZLIB, ZSTD

import testkit
from testkit import MIB, data

UNIT = data("far", 20_000) * 3 + bytes(5536)
"""Repeats itself at a distance that a window of 4 KiB does not reach, one of 32 KiB does."""


def streamed(stream: bytes, bits: int) -> bytes:
    """Decode byte by byte, as a reader does that keeps no more than the window."""
    reader = zlib.decompressobj(bits)
    return b"".join(reader.decompress(bytes([byte])) for byte in stream) + reader.flush()


@pytest.mark.parametrize("level", ["", "10", "-1", "\u00b2", "9" * 5000])
def test_what_is_no_level_is_refused(level):
    with pytest.raises(OptionError, match="has no level"):
        parse_compress(f"deflate:{level}", ZLIB)
    assert parse_compress("deflate:9", ZLIB) == (DEFLATE, 9)


@pytest.mark.parametrize("level", [None, *range(10)])
def test_deflate_keeps_to_a_window_of_4_kib(level):
    stream = bytes(encoder(DEFLATE, level, 12)(UNIT))
    assert streamed(stream, -12) == UNIT


@pytest.mark.parametrize("level", [2, 3, 4, 6, 9])
def test_deflate_uses_a_window_of_32_kib_where_it_may(level):
    stream = bytes(encoder(DEFLATE, level, 15)(UNIT))
    assert len(stream) < len(encoder(DEFLATE, level, 12)(UNIT)) / 2
    assert streamed(stream, -15) == UNIT
    with pytest.raises(zlib.error, match="too far back"):
        streamed(stream, -12)


@pytest.mark.parametrize("level", [None, *range(10)])
def test_zlib_streams_are_whole(level):
    stream = bytes(encoder(ZLIB, level)(UNIT))
    assert zlib.decompress(stream) == UNIT
    assert decode(ZLIB, stream + b"behind", len(UNIT)) == UNIT


@pytest.mark.parametrize("codec", [DEFLATE, ZLIB, ZSTD])
def test_both_ways_of_decoding_agree_about_length_and_damage(codec):
    stream = bytes(encoder(codec, None)(UNIT))
    assert decode(codec, memoryview(stream + b"\xaa" * 600), len(UNIT)) == UNIT
    assert decode_exactly(codec, stream + b"\xaa" * 600, len(UNIT)) == (UNIT, len(stream))
    for length, found in ((len(UNIT) - 1, "more"), (len(UNIT) + 1, f"{len(UNIT)} bytes")):
        with pytest.raises(FormatError, match="wrong length") as caught:
            decode(codec, stream, length)
        assert caught.value.found == found
    for damaged in (stream[: len(stream) // 2], b"", bytes(len(stream))):
        with pytest.raises(FormatError):
            decode(codec, damaged, len(UNIT))


@pytest.mark.parametrize("distance", [4000, 4096, 4097, 5000, 20_000, 32_000])
def test_only_streams_that_every_reader_takes_may_pass(distance):
    unit = data(("distance", distance), distance) + data(("distance", distance), distance)[:300]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    stream = packer.compress(unit) + packer.flush()
    assert len(stream) < len(unit) - 200, "the repetition was found"
    assert decode_exactly(DEFLATE, stream + b"\xaa" * 99, len(unit)) == (unit, len(stream) if distance <= 4096 else 0)


def test_a_wide_window_goes_no_further(tmp_path):
    raw, wide = tmp_path / "a.raw", tmp_path / "wide.qcow2"
    raw.write_bytes(UNIT * 20)
    options = diskmorph.ConvertOptions(compress="deflate:6", format_options={"deflate_window": "32K"})
    diskmorph.convert(raw, wide, options=options)
    words = {"b.qcow2": {}, "c.vmdk": {"subformat": "streamOptimized"}}
    for name, asked in words.items():
        again = diskmorph.ConvertOptions(compress="default", format_options=asked, verify=True)
        assert diskmorph.convert(wide, tmp_path / name, options=again).bytes.passed == 0
        testkit.run("qemu-img", "compare", "-f", "raw", raw, tmp_path / name)


def test_a_wide_window_is_for_qemu_and_said_so(tmp_path):
    raw = tmp_path / "a.raw"
    raw.write_bytes(UNIT * 40 + bytes(MIB))
    sizes = {}
    for window in ("4K", "32K"):
        target = tmp_path / f"{window}.qcow2"
        options = diskmorph.ConvertOptions(compress="deflate:3", format_options={"deflate_window": window}, verify=True)
        diskmorph.convert(raw, target, options=options)
        testkit.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, target)
        testkit.run("qemu-img", "check", target)
        sizes[window] = target.stat().st_size
    assert sizes["32K"] < sizes["4K"] * 0.7


def test_a_wide_window_without_deflate_is_refused(tmp_path):
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(MIB))
    for compress in (None, "zstd"):
        options = diskmorph.ConvertOptions(compress=compress, format_options={"deflate_window": "32K"})
        with pytest.raises(OptionError, match="deflate alone"):
            diskmorph.convert(raw, tmp_path / "a.qcow2", options=options)
