"""Ramdisks: concatenated archives, each codec, modules inside; bombs and cuts."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import random
import struct
import time

import lz4.block
import pytest
import zstandard

from diskmorph.formats.ami import ramdisk
from diskmorph.formats.ami.ramdisk import read_ramdisk
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.probe import signatures
from diskmorph.formats.source import BytesSource


def cpio(*entries: tuple[str, bytes], trailer: bool = True, magic: bytes = b"070701") -> bytes:
    out = b""
    for number, (name, data) in enumerate((*entries, *((("TRAILER!!!", b""),) if trailer else ())), 1):
        raw = name.encode() + b"\0"
        numbers = (number, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        out += magic + b"".join(b"%08x" % value for value in numbers) + raw
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return out


def lz4_legacy(data: bytes) -> bytes:
    out = struct.pack("<I", 0x184C2102)
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


CODECS = {
    "none": bytes,
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    "lz4": lz4_legacy,
}
MODULES = (
    ("lib/modules/6.1.0-18-amd64/kernel/fs/ext4/ext4.ko", b"m" * 5000),
    ("usr/lib/modules/6.1.0-18-amd64/kernel/virtio.ko.xz", b"m" * 100),
    ("lib/modules/6.1.0-18-amd64/kernel/nvme.ko.zst", b"m"),
    ("lib/modules/6.1.0-18-amd64/modules.dep", b"m"),
)
BODY = cpio(("init", b"#!/bin/sh\n" * 300), ("conf/initramfs.conf", b""), *MODULES)
FIRST = cpio(("kernel/x86/microcode/GenuineIntel.bin", random.Random(1).randbytes(700)))


def read(data: bytes):
    return read_ramdisk(BytesSource(data, "r"))


@pytest.mark.parametrize("codec", CODECS)
def test_one_segment(codec):
    data = CODECS[codec](BODY)
    found = read(data)
    assert [(s.offset, s.compression, s.length) for s in found.segments] == [(0, codec, len(data))]
    assert found.segments[0].decoded == len(BODY)
    assert found.modules == ("ext4", "nvme", "virtio")
    assert (found.releases, found.entries, found.generator) == (("6.1.0-18-amd64",), 6, "initramfs-tools")
    assert next(s.format for s in signatures(BytesSource(data)) if s.outer) == "ari"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("align", [1, 4, 512])
def test_segments_behind_an_early_archive(codec, align):
    start = len(FIRST) + -len(FIRST) % align
    tail = CODECS[codec](cpio(("late", b"x")))
    data = FIRST.ljust(start, b"\0") + CODECS[codec](BODY)
    data += bytes(-len(data) % 4)
    third = len(data)
    found = read(data + tail + bytes(300))
    assert [(s.offset, s.compression) for s in found.segments] == [(0, "none"), (start, codec), (third, codec)]
    assert [s.entries for s in found.segments] == [1, 6, 1]


def test_two_archives_in_one_stream_and_the_crc_form():
    both = cpio(("a", b"x"), magic=b"070702") + bytes(100) + cpio(("b", b"y"))
    found = read(gzip.compress(both + bytes(-len(both) % 4) + bytes(5000)))
    assert [(s.compression, s.entries) for s in found.segments] == [("gzip", 2)]


@pytest.mark.parametrize("codec", CODECS)
def test_cuts_are_errors_wherever_they_are(codec):
    data = CODECS[codec](BODY)
    for stop in {1, 5, 50, len(data) // 3, len(data) // 2, len(data) - 20, len(data) - 5}:
        with pytest.raises((FormatError, UnsupportedError)):
            read(data[:stop])


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "none"])
def test_damage_inside_a_stream(codec):
    data = bytearray(CODECS[codec](random.Random(2).randbytes(20_000) + BODY))
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    with pytest.raises((FormatError, UnsupportedError)):
        read(bytes(data))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no archive"),
        (bytes(5000), "no archive"),
        (gzip.compress(b"text, no archive" * 50, mtime=0), "damaged archive"),
        (gzip.compress(bytes(5000), mtime=0), "without an archive"),
        (cpio(("a", b"x"), trailer=False), "cut off"),
        (FIRST + b"junk", "no compressed stream"),
        (b"070707" + BODY[6:], "no compressed stream"),
        (BODY.replace(b"00000bb8", b"xxxxxxxx", 1), "number is none"),
        (BODY.replace(b"00000bb8", b"-0000076", 1), "number is none"),
        (BODY.replace(b"0000000500000000init", b"0000ffff00000000init", 1), "impossible length"),
    ],
)
def test_what_is_no_ramdisk(data, says):
    with pytest.raises(FormatError, match=says):
        read(data)


def test_lzo_is_named():
    with pytest.raises(UnsupportedError, match="lzo"):
        read(FIRST + b"\x89LZO\0\r\n\x1a\n")


@pytest.mark.parametrize("codec", ["gzip", "bzip2", "xz", "zstd", "lz4"])
def test_bombs_end_soon(codec, monkeypatch):
    monkeypatch.setattr(ramdisk, "MOST_DECODED", 64 << 20)
    bomb = CODECS[codec](cpio(("zero", bytes(100 << 20))))
    begun = time.monotonic()
    with pytest.raises(UnsupportedError, match="expands"):
        read(bomb)
    assert time.monotonic() - begun < 10


def test_zeroes_behind_an_archive_are_passed_over_quickly():
    begun = time.monotonic()
    assert read(gzip.compress(cpio(("a", b"")) + bytes(50 << 20))).entries == 1
    assert time.monotonic() - begun < 5


def test_too_many_segments():
    with pytest.raises(FormatError, match="segments"):
        read(cpio(("a", b"")) * 300)


def test_mutants():
    rng = random.Random(4)
    good = [pack(BODY) for pack in CODECS.values()] + [FIRST + gzip.compress(BODY)]
    for _ in range(600):
        bad = bytearray(rng.choice(good))
        for _ in range(3):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        with contextlib.suppress(DiskmorphError):
            read(bytes(bad[: rng.choice((len(bad), rng.randrange(len(bad))))]))
