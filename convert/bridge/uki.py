"""Unified kernel images: systemd's EFI stub with the kernel, its ramdisk and its command line as sections.

The Unified Kernel Image specification (UAPI.5) names the sections; PE/COFF 8.3 lays the file out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from construct import Bytes, Int16ul, Int32ul, Int64ul, Struct

from diskmorph.formats.errors import FormatError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.convert.bridge.shelf import Shelf

_PE_POINTER = 0x3C
_COFF = Struct(
    "signature" / Bytes(4),
    "machine" / Int16ul,
    "sections" / Int16ul,
    "time" / Int32ul,
    "symbols" / Int32ul,
    "symbol_count" / Int32ul,
    "optional_size" / Int16ul,
    "characteristics" / Int16ul,
)
# The beginning of the optional header of PE32+; what follows is kept as it is.
_OPTIONAL = Struct(
    "magic" / Int16ul,
    "linker" / Bytes(2),
    "code_size" / Int32ul,
    "data_size" / Int32ul,
    "bss_size" / Int32ul,
    "entry" / Int32ul,
    "code_base" / Int32ul,
    "image_base" / Int64ul,
    "section_alignment" / Int32ul,
    "file_alignment" / Int32ul,
    "versions" / Bytes(12),
    "win32_version" / Int32ul,
    "image_size" / Int32ul,
    "headers_size" / Int32ul,
    "checksum" / Int32ul,
)
_SECTION = Struct(
    "name" / Bytes(8),
    "virtual_size" / Int32ul,
    "address" / Int32ul,
    "raw_size" / Int32ul,
    "offset" / Int32ul,
    "relocations" / Int32ul,
    "lines" / Int32ul,
    "relocation_count" / Int16ul,
    "line_count" / Int16ul,
    "flags" / Int32ul,
)
_PE32_PLUS = 0x20B
_READ_DATA = 0x40000040  # IMAGE_SCN_CNT_INITIALIZED_DATA, IMAGE_SCN_MEM_READ
_PAGE = 4096
_MOST_SECTIONS = 96
# OCI's architecture -> the stub's suffix, the file in /EFI/BOOT
STUBS = {"amd64": ("x64", "BOOTX64.EFI"), "arm64": ("aa64", "BOOTAA64.EFI"), "386": ("ia32", "BOOTIA32.EFI")}


def find_stub(shelf: Shelf, architecture: str) -> tuple[str, bytes]:
    """Return the file name in /EFI/BOOT and systemd's stub. Raises OptionError naming the package that has it."""
    if architecture not in STUBS:
        raise OptionError(f"there is no EFI stub for {architecture}", hint="choose another --boot")
    suffix, name = STUBS[architecture]
    folders = ("usr/lib/systemd/boot/efi", "lib/systemd/boot/efi")
    node = shelf.find(f"{folder}/linux{suffix}.efi.stub" for folder in folders)
    if node is None:
        raise OptionError(
            f"systemd's EFI stub linux{suffix}.efi.stub is neither in the tree nor on this machine",
            hint="install the package systemd-boot-efi here or in the tree, or name its file with --part "
            "systemd-boot-efi_*.deb",
        )
    return name, node.read()


def make_uki(stub: bytes, sections: Sequence[tuple[str, bytes]]) -> bytes:
    """Return the stub with sections added, each on its own pages, in this order. Raises FormatError for a bad stub."""
    start = int.from_bytes(stub[_PE_POINTER : _PE_POINTER + 4], "little")
    coff, optional, table = _headers(stub, start)
    old = [_SECTION.parse(stub[table + i * _SECTION.sizeof() :]) for i in range(coff.sections)]
    end = table + (len(old) + len(sections)) * _SECTION.sizeof()
    first = min((s.offset for s in old if s.raw_size), default=len(stub))
    if end > first:
        raise FormatError("the EFI stub has no room for more section headers", expected=end, found=first)
    image = bytearray(stub) + bytes(-len(stub) % optional.file_alignment)
    address = max((s.address + max(s.virtual_size, s.raw_size) for s in old), default=0)
    align = max(_PAGE, optional.section_alignment)
    for number, (name, content) in enumerate(sections, len(old)):
        address = -(-address // align) * align
        raw = -(-len(content) // optional.file_alignment) * optional.file_alignment
        entry = {
            "name": name.encode().ljust(8, b"\0"), "virtual_size": len(content), "address": address, "raw_size": raw,
            "offset": len(image), "relocations": 0, "lines": 0, "relocation_count": 0, "line_count": 0,
            "flags": _READ_DATA,
        }  # fmt: skip
        at = table + number * _SECTION.sizeof()
        image[at : at + _SECTION.sizeof()] = _SECTION.build(entry)
        image += content + bytes(raw - len(content))
        address += len(content)
    coff.sections = len(old) + len(sections)
    optional.image_size = -(-address // optional.section_alignment) * optional.section_alignment
    optional.data_size = optional.data_size + len(image) - len(stub)
    optional.checksum = 0  # UEFI does not look at it
    image[start : start + _COFF.sizeof()] = _COFF.build(coff)
    at = start + _COFF.sizeof()
    image[at : at + _OPTIONAL.sizeof()] = _OPTIONAL.build(optional)
    return bytes(image)


def _headers(stub: bytes, start: int) -> tuple[Any, Any, int]:
    size = _COFF.sizeof() + _OPTIONAL.sizeof()
    if stub[:2] != b"MZ" or start + size > len(stub):
        raise FormatError("the EFI stub is no PE file")
    coff = _COFF.parse(stub[start:])
    optional = _OPTIONAL.parse(stub[start + _COFF.sizeof() :])
    if coff.signature != b"PE\0\0" or optional.magic != _PE32_PLUS or coff.sections > _MOST_SECTIONS:
        raise FormatError("the EFI stub is no PE32+ file")
    if not optional.file_alignment or not optional.section_alignment:
        raise FormatError("the EFI stub has no alignment")
    return coff, optional, start + _COFF.sizeof() + coff.optional_size
