"""Which format an image has: known by content and position, never by its name. Raw is the last resort, a guess.

This module loads nothing heavy: it runs before any format's own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.source import ByteSource


@dataclass(frozen=True, slots=True)
class Signature:
    """A format's mark found at `offset` (bytes) of a file. `outer` ones decide; others only tell what lies inside."""

    format: str
    offset: int
    what: str
    outer: bool = True


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table: names, suffixes, the module that reads and writes, and how it is recognised.

    `module` is imported when the format is used; it exports what `registry.FormatModule` says.
    """

    name: str
    module: str
    probe: Callable[[ByteSource], Signature | None]
    aliases: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    writes: bool = True
    title: str = ""


def at(offset: int, magic: bytes, name: str, what: str) -> Callable[[ByteSource], Signature | None]:
    """Return a probe for `magic` at `offset`."""

    def probe(source: ByteSource) -> Signature | None:
        return Signature(name, offset, what) if source.read_upto(offset, len(magic)) == magic else None

    return probe


def _qcow(version: tuple[int, ...], name: str) -> Callable[[ByteSource], Signature | None]:
    def probe(source: ByteSource) -> Signature | None:
        head = source.read_upto(0, 8)
        if head[:4] != b"QFI\xfb" or (int.from_bytes(head[4:8], "big") == 1) != (1 in version):
            return None
        return Signature(name, 0, f"{name} header")

    return probe


def _vmdk(source: ByteSource) -> Signature | None:
    head = source.read_upto(0, 512)
    if head[:4] in {b"KDMV", b"COWD"} or head[:8] == b"\xbe\xba\xfe\xca\0\0\0\0":
        return Signature(
            "vmdk", 0, {b"K": "VMDK sparse extent", b"C": "VMDK COWD extent"}.get(head[:1], "VMDK seSparse extent")
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:21].lower() == b"# disk descriptorfile":
        return Signature("vmdk", 0, "VMDK descriptor")
    return None


def _vhd(source: ByteSource) -> Signature | None:
    """Find a footer at the end (512 or 511 bytes), or its copy at the start of a dynamic disk."""
    for size in (512, 511):
        at_end = source.size - size
        if at_end >= 0 and source.read_upto(at_end, 8) == b"conectix":
            return Signature("vhd", at_end, "VHD footer")
    if source.read_upto(0, 8) == b"conectix":
        return Signature("vhd", 0, "VHD footer copy")
    return None


def _parallels(source: ByteSource) -> Signature | None:
    magic = source.read_upto(0, 16)
    return (
        Signature("parallels", 0, "Parallels header") if magic in {b"WithoutFreeSpace", b"WithouFreSpacExt"} else None
    )


_DISKS = "diskmorph.formats."

FORMATS: tuple[Format, ...] = (
    Format("qcow2", _DISKS + "qcow2", _qcow((2, 3), "qcow2"), suffixes=(".qcow2", ".qcow"), title="QEMU copy-on-write"),
    Format(
        "qcow", _DISKS + "qcow", _qcow((1,), "qcow"), aliases=("qcow1",), writes=False, title="QEMU copy-on-write 1"
    ),
    Format("vmdk", _DISKS + "vmdk", _vmdk, suffixes=(".vmdk",), title="VMware virtual disk"),
    Format(
        "vdi",
        _DISKS + "vdi",
        at(64, b"\x7f\x10\xda\xbe", "vdi", "VDI signature"),
        suffixes=(".vdi",),
        title="VirtualBox",
    ),
    Format(
        "vhdx",
        _DISKS + "vhdx",
        at(0, b"vhdxfile", "vhdx", "VHDX file identifier"),
        suffixes=(".vhdx", ".avhdx"),
        title="Hyper-V 2012",
    ),
    Format(
        "vhd", _DISKS + "vhd", _vhd, aliases=("vpc",), suffixes=(".vhd", ".vpc", ".avhd"), title="Virtual PC, Azure"
    ),
    Format(
        "parallels", _DISKS + "parallels", _parallels, suffixes=(".hds", ".hdd"), writes=False, title="Parallels HDD"
    ),
)

_ISO = Format(
    "iso",
    _DISKS + "iso",
    at(32769, b"CD001", "iso", "ISO 9660 volume descriptor"),
    suffixes=(".iso",),
    title="optical disc",
)
FORMATS += (_ISO,)  # last: what lies in a container is not the outermost format

RAW = Format("raw", _DISKS + "raw", lambda _: None, suffixes=(".raw", ".img", ".dd", ".bin"), title="plain disk")


def _inside(source: ByteSource) -> list[Signature]:
    """Find marks that a disk may carry at once with an outer format: they say what lies inside, not how it is stored."""
    found = []
    head = source.read_upto(0, 1024)
    if head[510:512] == b"\x55\xaa" and any(head[446 + 16 * i + 4] for i in range(4)):
        found.append(Signature("mbr", 510, "MBR boot signature", outer=False))
    found.extend(
        Signature("gpt", sector, "GPT header", outer=False)
        for sector in (512, 4096)
        if source.read_upto(sector, 8) == b"EFI PART"
    )
    return found


def signatures(source: ByteSource) -> list[Signature]:
    """Return every mark found, the one that decides first: the outermost container, by order of the table."""
    found = [signature for entry in FORMATS if (signature := entry.probe(source)) is not None]
    return found + _inside(source)


def format_named(name: str) -> Format | None:
    """Return the format with this name or alias."""
    word = name.lower()
    return next((entry for entry in (*FORMATS, RAW) if word == entry.name or word in entry.aliases), None)


def format_of_suffix(path: str) -> Format | None:
    """Return the format that the name's suffix stands for."""
    word = path.lower()
    return next((entry for entry in (*FORMATS, RAW) if word.endswith(entry.suffixes)), None)
