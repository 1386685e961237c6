"""Headers of plain files for new tar archives: OVAs, bundles, cloud tarballs."""

from __future__ import annotations

from diskmorph.formats.tar.schema import BLOCK, HEADER

LARGEST_OCTAL = (1 << 33) - 1
"""Bytes of the largest member whose size a ustar header holds in octal."""
END = bytes(2 * BLOCK)
"""What ends an archive."""


def build_header(name: str, size: int, mtime: int) -> bytes:
    """Return the header of a regular file of mode 0644: ustar, with a base-256 size (GNU) from 8 GiB on, never PAX.

    `name` is of at most 100 bytes in UTF-8.
    """
    length = _octal(size, 12) if size <= LARGEST_OCTAL else b"\x80" + size.to_bytes(11, "big")
    fields = {
        "name": name.encode().ljust(100, b"\0"),
        "mode": _octal(0o644, 8),
        "uid": _octal(0, 8),
        "gid": _octal(0, 8),
        "size": length,
        "mtime": _octal(max(mtime, 0), 12),
        "chksum": b" " * 8,
        "typeflag": b"0",
        "linkname": bytes(100),
        "magic": b"ustar\0",
        "version": b"00",
        "uname": bytes(32),
        "gname": bytes(32),
        "devmajor": _octal(0, 8),
        "devminor": _octal(0, 8),
        "prefix": bytes(155),
        "padding": bytes(12),
    }
    total = sum(HEADER.build(fields))
    return bytes(HEADER.build({**fields, "chksum": b"%06o\0 " % total}))


def _octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def padding(size: int) -> int:
    """Return the zeroes that follow `size` bytes of data up to the next block."""
    return -size % BLOCK
