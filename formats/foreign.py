"""Files that are no disks in themselves, by their marks: containers that are not read, archives, compressed archives.

Raw is the last resort: a file with one of these marks is refused instead, unless `-f raw` takes it as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.errors import UnsupportedError

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource

_HEAD = 512
_AS_IT_IS = "-f raw takes it as it is"
_CONVERT = f"`qemu-img convert` reads it; {_AS_IT_IS}"
_UNPACK = f"unpack it first; {_AS_IT_IS}"

# What it is, its first bytes, what to do about it.
_MARKS: tuple[tuple[str, bytes, str], ...] = (
    ("a QED image", b"QED\0", _CONVERT),
    ("a QEMU or User-mode Linux COW image", b"OOOM\0\0\0", _AS_IT_IS),
    ("an Android sparse image", b"\x3a\xff\x26\xed", f"simg2img makes a plain disk of it; {_AS_IT_IS}"),
    ("an Apple sparse image (UDSP)", b"sprs", f"hdiutil converts it; {_AS_IT_IS}"),
    ("a WIM archive", b"MSWIM\0\0\0", f"wimapply writes it to a disk; {_AS_IT_IS}"),
    ("a partclone image", b"partclone-image", f"partclone.restore makes a plain disk of it; {_AS_IT_IS}"),
    ("a Partimage volume", b"PaRtImAgE-VoLuMe", _AS_IT_IS),
    ("an Acronis True Image backup", b"\xb4\x6e\x68\x44", _AS_IT_IS),
    ("an AFF image", b"AFF10\r\n\0", f"affconvert makes a plain disk of it; {_AS_IT_IS}"),
    ("a MAME CHD image", b"MComprHD", f"chdman extracts it; {_AS_IT_IS}"),
    ("a compressed ISO (CSO)", b"CISO", _UNPACK),
    ("a compressed ISO (DAA)", b"DAA\0", _UNPACK),
    ("a compressed ISO (ISZ)", b"IsZ!", _UNPACK),
    ("a btrfs send stream", b"btrfs-stream\0", _AS_IT_IS),
    ("an XML document", b"<?xml", _AS_IT_IS),
    ("a zip archive", b"PK\x03\x04", _UNPACK),
    ("a 7z archive", b"7z\xbc\xaf\x27\x1c", _UNPACK),
    ("a RAR archive", b"Rar!\x1a\x07", _UNPACK),
    ("a cabinet", b"MSCF\0\0\0\0", _UNPACK),
    ("a xar archive", b"xar!", _UNPACK),
    ("an ar archive", b"!<arch>\n", _UNPACK),
    ("an RPM package", b"\xed\xab\xee\xdb", _UNPACK),
    ("compressed by lz4", b"\x04\x22\x4d\x18", _UNPACK),
    ("compressed by lz4", b"\x02\x21\x4c\x18", _UNPACK),
    ("compressed by lzip", b"LZIP\1", _UNPACK),
    ("compressed by lzop", b"\x89LZO\0\r\n\x1a\n", _UNPACK),
    ("compressed by lzma", b"\x5d\0\0\x80\0" + b"\xff" * 8, _UNPACK),
    # What these four hold is looked for before: it is an archive of files, or damaged.
    ("compressed by gzip and holds no image", b"\x1f\x8b\x08", _UNPACK),
    ("compressed by zstd and holds no image", b"\x28\xb5\x2f\xfd", _UNPACK),
    ("compressed by xz and holds no image", b"\xfd7zXZ\0", _UNPACK),
    ("compressed by bzip2 and holds no image", b"BZh91AY&SY", _UNPACK),
)


def refuse_foreign(source: ByteSource) -> None:
    """Raise UnsupportedError, naming what it is, for a file with the mark of something that is no disk in itself."""
    head = source.read_upto(0, _HEAD)
    if head.startswith(b"<?xml") and b"<Parallels_disk_image" in head:
        raise _refusal(source, "the descriptor of a Parallels disk", f"name its .hds file instead; {_AS_IT_IS}")
    for what, magic, hint in _MARKS:
        if head.startswith(magic):
            raise _refusal(source, what, hint)
    if head[148:156].strip(b"\0 ").isdigit():
        _refuse_tar(source)


def _refuse_tar(source: ByteSource) -> None:
    from diskmorph.formats.package_probe import is_tar_header  # noqa: PLC0415 - only files that may be one

    if is_tar_header(source.read_upto(0, _HEAD)):
        hint = f"`diskmorph build` makes a disk of what it holds; {_AS_IT_IS}"
        raise _refusal(source, "a tar or container archive", hint)


def _refusal(source: ByteSource, what: str, hint: str) -> UnsupportedError:
    return UnsupportedError(
        f"is {what}, which is not read as a disk", feature=what, file=source.name, structure="signature", hint=hint
    )
