"""Which compressed files are images: those that are no archive of files, kernel or ramdisk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.spool import codec_of, head_of

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource

DISK_MEMBERS = (b"disk.raw", b"box.img", b"rootfs.img")
"""The disk in the tarballs of Compute Engine, Vagrant (libvirt) and Incus."""
_HEAD = 8192
_FIRST = frozenset((*DISK_MEMBERS, b"metadata.json", b"metadata.yaml", b"Vagrantfile"))


def is_compressed_image(source: ByteSource) -> bool:
    """Whether a file is a compressed stream, and no archive but that of a cloud."""
    if codec_of(source) is None:
        return False
    from diskmorph.formats.tar.schema import is_tar  # noqa: PLC0415 - loads NumPy; only for compressed files

    head = head_of(source, _HEAD)
    return bool(head) and (not is_tar(head[:512]) or is_cloud_head(head))


def is_cloud_head(head: bytes) -> bool:
    """Whether a tar archive that begins so is a cloud's: by its first file, behind PAX headers and directories."""
    at = 0
    while len(block := head[at : at + 512]) == 512:
        if block[156:157] not in {b"x", b"g", b"5"}:
            return block[:100].split(b"\0", 1)[0].removeprefix(b"./") in _FIRST
        digits = block[124:136].strip(b"\0 ")
        size = int(digits, 8) if digits.isdigit() and not digits.translate(None, b"01234567") else 0
        at += 512 + size + -size % 512
    return False
