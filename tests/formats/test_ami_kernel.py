"""Kernels: every field of the boot header, and files that only look like kernels."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import random
import struct

import pytest

from diskmorph.formats.ami import schema
from diskmorph.formats.ami.kernel import read_kernel
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.probe import signatures
from diskmorph.formats.registry import open_disk
from diskmorph.formats.source import BytesSource

VERSION = "6.1.0-18-amd64"
BANNER = f"{VERSION} (debian-kernel@lists.debian.org) #1 SMP"


def bzimage(
    *,
    protocol: int = 0x20F,
    payload: bytes = b"\x1f\x8b" + b"p" * 3000,
    efi: int | None = 0x8664,
    long: bool = True,
    high: bool = True,
    version: str | None = BANNER,
    setup_sects: int = 5,
    **fields: int,
) -> bytes:
    """A bzImage laid out by hand from boot.rst's offsets."""
    setup = bytearray((setup_sects + 1) * 512)
    code = b"c" * 512 + payload
    code += bytes(-len(code) % 16)
    setup[0x1F1] = setup_sects
    struct.pack_into("<I", setup, 0x1F4, len(code) // 16)
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    if version is not None:
        struct.pack_into("<H", setup, 0x20E, 0x400)
        setup[0x600 : 0x600 + len(version) + 1] = version.encode() + b"\0"
    setup[0x211] = int(high)
    struct.pack_into("<I", setup, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<H", setup, 0x236, int(long))
    struct.pack_into("<I", setup, 0x238, 2047)
    struct.pack_into("<II", setup, 0x248, 512, len(payload))
    struct.pack_into("<QI", setup, 0x258, 0x1000000, 0x2000000)
    if efi is not None:
        setup[:2] = b"MZ"
        struct.pack_into("<I", setup, 0x3C, 0x80)
        setup[0x80:0x86] = b"PE\0\0" + struct.pack("<H", efi)
    for name, value in fields.items():
        at, form = {"kernel_version": (0x20E, "<H"), "payload_offset": (0x248, "<I"), "syssize": (0x1F4, "<I")}[name]
        struct.pack_into(form, setup, at, value)
    return bytes(setup) + code


def read(data: bytes):
    return read_kernel(BytesSource(data, "k"))


def test_every_field_by_its_offset():
    kernel = read(bzimage())
    assert (kernel.kind, kernel.version, kernel.banner) == ("bzImage", VERSION, BANNER)
    assert (kernel.architecture, kernel.protocol, kernel.cmdline_size) == ("x86_64", "2.15", 2047)
    assert (kernel.compression, kernel.efi_stub) == ("gzip", True)
    assert (kernel.payload_offset, kernel.payload_size) == (6 * 512 + 512, 3002)
    header = kernel.header
    assert (header["setup_sects"], header["boot_flag"], header["header"]) == (5, 0xAA55, "HdrS")
    assert (header["initrd_addr_max"], header["pref_address"], header["init_size"]) == (
        0x7FFFFFFF,
        0x1000000,
        0x2000000,
    )
    assert len(header) == len(schema.BOOT_HEADER.subcons)


def test_offsets_of_the_schema_are_those_of_the_document():
    at = schema.BOOT_HEADER_OFFSET
    found = {}
    for field in schema.BOOT_HEADER.subcons:
        found[field.name] = at
        at += field.sizeof()
    assert at == schema.BOOT_HEADER_END
    for name, offset in {
        "boot_flag": 0x1FE, "header": 0x202, "version": 0x206, "kernel_version": 0x20E, "loadflags": 0x211,
        "code32_start": 0x214, "heap_end_ptr": 0x224, "cmd_line_ptr": 0x228, "initrd_addr_max": 0x22C,
        "kernel_alignment": 0x230, "xloadflags": 0x236, "cmdline_size": 0x238, "hardware_subarch_data": 0x240,
        "payload_offset": 0x248, "payload_length": 0x24C, "setup_data": 0x250, "pref_address": 0x258,
        "init_size": 0x260, "handover_offset": 0x264, "kernel_info_offset": 0x268,
    }.items():  # fmt: skip
        assert found[name] == offset, name


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"long": False, "efi": None}, "i386"),
        ({"long": False, "efi": 0x014C}, "i386"),
        ({"long": False, "efi": 0x8664}, "x86_64"),
        ({"long": True, "efi": None}, "x86_64"),
    ],
)
def test_architectures(form, expected):
    assert read(bzimage(**form)).architecture == expected


def test_old_protocols_lack_fields():
    kernel = read(bzimage(protocol=0x204, efi=None))
    assert kernel.cmdline_size == 255
    assert "payload_offset" not in kernel.header
    assert "syssize" in kernel.header
    assert kernel.payload_offset is None
    assert read(bzimage(protocol=0x200, high=False, efi=None)).kind == "zImage"
    assert read(bzimage(version=None)).version is None


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (bzimage()[:-20], "cut off"),
        (bzimage()[:0x220], "cut off"),
        (bzimage(kernel_version=0x2000), "version outside"),
        (bzimage(payload_offset=0x7FFFFFFF), "payload"),
        (bzimage(syssize=0x7FFFFFFF), "cut off"),
        (b"nothing", "no Linux kernel"),
        (b"", "no Linux kernel"),
        (gzip.compress(b"no kernel" * 100, mtime=0), "no Linux kernel"),
    ],
)
def test_damage(data, says):
    with pytest.raises(FormatError, match=says):
        read(data)


def arm64(banner: bytes = b"Linux version 6.6.9-arm64 (b@h) #1\n\0", at: int = 2_000_000) -> bytes:
    body = bytearray(at + 5000)
    body[:2] = b"MZ"
    struct.pack_into("<QQQ", body, 8, 0, 0x2000000, 0xA)
    body[0x38:0x3C] = b"ARM\x64"
    struct.pack_into("<I", body, 0x3C, 0x40)
    body[0x40:0x46] = b"PE\0\0" + struct.pack("<H", 0xAA64)
    body[at : at + len(banner)] = banner
    return bytes(body)


@pytest.mark.parametrize("at", [1000, (1 << 20) - 10, (1 << 20) - 30, 2_000_000])
def test_arm64_images_wherever_the_banner_is(at):
    kernel = read(arm64(at=at))
    assert (kernel.kind, kernel.architecture, kernel.version) == ("Image", "arm64", "6.6.9-arm64")
    assert (kernel.header["image_size"], kernel.efi_stub) == (0x2000000, True)
    packed = read(gzip.compress(arm64(at=at)))
    assert (packed.kind, packed.version, packed.compression) == ("Image", "6.6.9-arm64", "gzip")


def zboot(payload: bytes, word: bytes, machine: int = 0xAA64) -> bytes:
    head = bytearray(512)
    head[:2], head[4:8] = b"MZ", b"zimg"
    struct.pack_into("<II", head, 8, 512, len(payload))
    head[24 : 24 + len(word)] = word
    head[0x38:0x3C] = b"\xcd\x23\x82\x81"
    struct.pack_into("<I", head, 0x3C, 0x40)
    head[0x40:0x46] = b"PE\0\0" + struct.pack("<H", machine)
    return bytes(head) + payload


@pytest.mark.parametrize(
    ("codec", "pack"),
    [("gzip", gzip.compress), ("xz", lzma.compress), ("lzma", lambda d: lzma.compress(d, lzma.FORMAT_ALONE))],
)
def test_zboot(codec, pack):
    kernel = read(zboot(pack(arm64()), codec.encode()))
    assert (kernel.kind, kernel.architecture, kernel.version) == ("zboot", "arm64", "6.6.9-arm64")
    assert (kernel.compression, kernel.efi_stub) == (codec, True)
    for bad in (zboot(pack(arm64()), codec.encode())[:-100], zboot(b"", b"gzip")):
        with pytest.raises(FormatError):
            read(bad)


@pytest.mark.parametrize(
    "data", [bzimage(), arm64(), gzip.compress(arm64(), mtime=0), zboot(gzip.compress(arm64(), mtime=0), b"gzip")]
)
def test_kernels_are_known_by_content_and_are_no_disks(tmp_path, data):
    path = tmp_path / "vmlinuz"
    path.write_bytes(data)
    assert next(s.format for s in signatures(BytesSource(data)) if s.outer) == "aki"
    with pytest.raises(UnsupportedError, match=r"Linux kernel.*-f raw"):
        open_disk(path)
    with open_disk(path, format="raw") as disk:
        assert disk.size == len(data)


def test_disks_are_not_taken_for_kernels():
    mbr = bytearray(4096)
    mbr[510:512] = b"\x55\xaa"
    for data in (bytes(mbr), b"MZ" + bytes(4096), gzip.compress(bytes(100_000)), bytes(1000)):
        assert not [s for s in signatures(BytesSource(data)) if s.format in {"aki", "ari"}]


def test_mutants():
    rng = random.Random(3)
    good = [bzimage(), arm64(at=3000), zboot(gzip.compress(arm64(at=3000)), b"gzip")]
    for _ in range(600):
        bad = bytearray(rng.choice(good))
        for _ in range(3):
            bad[rng.randrange(min(len(bad), 0x280))] = rng.randrange(256)
        with contextlib.suppress(DiskmorphError):
            read(bytes(bad[: rng.choice((len(bad), rng.randrange(len(bad))))]))
