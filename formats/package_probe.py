"""How packages, kernels and ramdisks are recognised: by content, with nothing heavy loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource

_BLOCK = 512
_MEMBERS = 64
_HEAD = 64 << 10
_ENVELOPE = re.compile(rb"<(?:[\w.-]+:)?Envelope[\s>]")
_CPIO = re.compile(rb"07070[12][0-9A-Fa-f]{104}")
_BOMS = ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def is_ova(source: ByteSource) -> bool:
    """Whether a tar archive has an OVF descriptor among its first members."""
    at = 0
    for _ in range(_MEMBERS):
        block = source.read_upto(at, _BLOCK)
        size = _tar_size(block)
        if size is None:
            return False
        name = block[:100].split(b"\0", 1)[0]
        if name.lower().endswith(b".ovf") and block[156:157] in b"\x0007":
            return True
        at += _BLOCK + size + -size % _BLOCK
    return False


def is_tar_header(block: bytes) -> bool:
    """Whether a tar archive begins with this block."""
    return _tar_size(block) is not None


def _tar_size(block: bytes) -> int | None:
    """Return the bytes that follow a tar header; None if this is none."""
    digits = block[148:156].strip(b"\0 ")
    if len(block) < _BLOCK or not digits.isdigit() or digits.translate(None, b"01234567"):
        return None
    if int(digits, 8) != sum(block) - sum(block[148:156]) + 8 * 32:
        return None
    field = block[124:136]
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b"\0 ")
    return int(text, 8) if text.isdigit() and not text.translate(None, b"01234567") else None


def _text(source: ByteSource) -> bytes:
    """Return the beginning of a file that looks like XML, in UTF-8; empty if it does not."""
    head = source.read_upto(0, 512)
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return source.read_upto(2, _HEAD).decode(encoding, "replace").encode()
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"<":
        return b""
    return source.read_upto(0, _HEAD)


def is_ovf(source: ByteSource) -> bool:
    """Whether a file is an OVF descriptor."""
    text = _text(source)
    return _ENVELOPE.search(text) is not None and b"ovf" in text


def is_ami(source: ByteSource) -> bool:
    """Whether a file is the manifest of an EC2 bundle."""
    text = _text(source)
    return b"<manifest" in text and (b"<machine_configuration" in text or b"<ec2_encrypted_key" in text)


def is_kernel(source: ByteSource) -> bool:
    """Whether a file is a Linux kernel: bzImage, EFI zboot, arm64 Image, plain or gzip'd."""
    head = source.read_upto(0, 0x240)
    return is_kernel_head(head) or (head[:2] == b"\x1f\x8b" and is_kernel_head(_decoded(source, 64)))


def is_kernel_head(head: bytes) -> bool:
    """Whether a kernel begins with these bytes."""
    if head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS" and head[0x207:0x208] == b"\x02":
        return True
    return head[0x38:0x3C] == b"ARM\x64" or (head[:2] == b"MZ" and head[4:8] == b"zimg")


COMPRESSIONS = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
)
"""First bytes of the codecs that kernels and ramdisks are compressed with (lib/decompress.c of Linux)."""


def compression_of(head: bytes) -> str | None:
    """Return the codec whose magic a stream begins with."""
    return next((name for magic, name in COMPRESSIONS if head.startswith(magic)), None)


def is_ramdisk(source: ByteSource) -> bool:
    """Whether a file is an initial ramdisk: a cpio archive ("newc"), plain or compressed."""
    head = source.read_upto(0, 110)
    if _CPIO.fullmatch(head):
        return True
    return compression_of(head) is not None and _CPIO.fullmatch(_decoded(source, 110)) is not None


def _decoded(source: ByteSource, length: int) -> bytes:
    """Return the first decoded bytes of a compressed file; empty where it is damaged."""
    from diskmorph.formats.ami.streams import decode_head  # noqa: PLC0415 - only for files that may be one

    return decode_head(source, 0, length)
