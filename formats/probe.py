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
    kind: str = "disk"
    """"disk"; "package": metadata with disks; "part": a kernel or ramdisk; "wrapper": an image is inside."""


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


def _dmg(source: ByteSource) -> Signature | None:
    """Find the trailer at the end, or a little before where bytes were appended; an encrypted image by its header."""
    if source.read_upto(0, 8) == b"encrcdsa":
        return Signature("dmg", 0, "encrypted UDIF header")
    low = max(source.size - 1023, 0)
    found = source.read_upto(low, 523).rfind(b"koly\0\0\0\4\0\0\2\0")
    return Signature("dmg", low + found, "UDIF trailer") if found >= 0 else None


def _cloop(source: ByteSource) -> Signature | None:
    """Find the script that names the format, before everything or, of the header at the end, behind it."""
    for place in (0, source.size - 136):
        if place >= 0 and source.read_upto(place, 12) == b"#!/bin/sh\n#V":
            named = source.read_upto(place + 11, 11)
            if named[:1] == b"V" and named[2:3] == b"." and named[4:] == b" Format":
                return Signature("cloop", place, "cloop header")
    return None


def _ewf(source: ByteSource) -> Signature | None:
    """Find the header of a segment file; relatives are found too, and refused by name when they are opened."""
    magic = source.read_upto(0, 8)
    kinds = {
        b"EVF\x09\x0d\x0a\xff\0",
        b"LVF\x09\x0d\x0a\xff\0",
        b"EVF2\x0d\x0a\x81\0",
        b"LEF2\x0d\x0a\x81\0",
        b"ADCRYPT\0",
    }
    return Signature("ewf", 0, "EWF segment file") if magic in kinds else None


def _marked(
    name: str, what: str, test: str, first: Callable[[bytes], bool]
) -> Callable[[ByteSource], Signature | None]:
    """Return a probe by a function of package_probe, which loads only where the first 512 bytes pass `first`."""

    def probe(source: ByteSource) -> Signature | None:
        if not first(source.read_upto(0, 512)):
            return None
        from diskmorph.formats import package_probe  # noqa: PLC0415 - most images are disks

        return Signature(name, 0, what) if getattr(package_probe, test)(source) else None

    return probe


def _compressed(source: ByteSource) -> Signature | None:
    """Find a compressed file that holds one image: what it holds is identified when it is opened."""
    if not source.read_upto(0, 6).startswith((b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh")):
        return None
    from diskmorph.formats.compressed.probe import is_compressed_image  # noqa: PLC0415 - most images are not

    return Signature("compressed", 0, "compressed stream") if is_compressed_image(source) else None


def _is_markup(head: bytes) -> bool:
    return head[:2] in {b"\xff\xfe", b"\xfe\xff"} or head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<"


def _may_be_tar(head: bytes) -> bool:
    return head[148:156].strip(b"\0 ").isdigit()


def _may_be_kernel(head: bytes) -> bool:
    return (
        head[0x1FE:] == b"\x55\xaa" or head[0x38:0x3C] == b"ARM\x64" or head[4:8] == b"zimg" or head[:2] == b"\x1f\x8b"
    )


def _may_be_ramdisk(head: bytes) -> bool:
    magics = (b"07070", b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18", b"BZh", b"\x5d\0\0")
    return head.startswith(magics)


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
    Format(
        "ewf",
        _DISKS + "ewf",
        _ewf,
        aliases=("e01",),
        suffixes=(".e01", ".s01", ".ex01", ".l01"),
        writes=False,
        title="Expert Witness, EnCase",
    ),
    Format(
        "asif",
        _DISKS + "asif",
        at(0, b"shdw\0\0", "asif", "ASIF header"),
        suffixes=(".asif",),
        writes=False,
        title="Apple sparse image, macOS 26",
    ),
    Format(
        "bochs",
        _DISKS + "bochs",
        at(0, b"Bochs Virtual HD Image\0", "bochs", "Bochs header"),
        writes=False,
        title="Bochs growing disk",
    ),
    Format("cloop", _DISKS + "cloop", _cloop, suffixes=(".cloop",), writes=False, title="compressed loopback image"),
    Format("dmg", _DISKS + "dmg", _dmg, aliases=("udif",), suffixes=(".dmg",), writes=False, title="Apple disk image"),
    Format(
        "ova",
        _DISKS + "ovf",
        _marked("ova", "tar archive with an OVF descriptor", "is_ova", _may_be_tar),
        suffixes=(".ova",),
        title="OVF package in one file",
        kind="package",
    ),
    Format(
        "ovf",
        _DISKS + "ovf",
        _marked("ovf", "OVF envelope", "is_ovf", _is_markup),
        suffixes=(".ovf",),
        title="OVF package in a folder",
        kind="package",
    ),
    Format(
        "ami",
        _DISKS + "ami",
        _marked("ami", "manifest of an EC2 bundle", "is_ami", _is_markup),
        title="EC2 bundle, Glance triple",
        kind="package",
    ),
    Format(
        "aki",
        _DISKS + "ami",
        _marked("aki", "Linux kernel", "is_kernel", _may_be_kernel),
        writes=False,
        title="Linux kernel",
        kind="part",
    ),
    Format(
        "ari",
        _DISKS + "ami",
        _marked("ari", "initial ramdisk", "is_ramdisk", _may_be_ramdisk),
        writes=False,
        title="initial ramdisk",
        kind="part",
    ),
)

_COMPRESSED = Format(
    "compressed",
    _DISKS + "compressed",
    _compressed,
    suffixes=(".gz", ".xz", ".zst", ".bz2"),
    writes=False,
    title="an image compressed as one file",
    kind="wrapper",
)

_ISO = Format(
    "iso",
    _DISKS + "iso",
    at(32769, b"CD001", "iso", "ISO 9660 volume descriptor"),
    suffixes=(".iso",),
    title="optical disc",
)
_LUKS = Format(
    "luks", _DISKS + "luks", lambda _: None, writes=False, title="encrypted volume, with -f luks", kind="wrapper"
)
FORMATS += (_LUKS, _COMPRESSED, _ISO)  # last: what lies in a container is not the outermost format

RAW = Format("raw", _DISKS + "raw", lambda _: None, suffixes=(".raw", ".img", ".dd", ".bin"), title="plain disk")


def _inside(source: ByteSource) -> list[Signature]:
    """Find marks that a disk may carry beside an outer format: they say what lies inside, not how it is stored."""
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
