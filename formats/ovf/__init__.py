"""OVF packages: .ovf with its folder, .ova (DSP0243 0.9 to 2.x). Opened as a disk, a package is one of its disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.allocator import Option
from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.ovf.check import check_package
from diskmorph.formats.ovf.package import MemberDisk, OvfPackage, open_package

if TYPE_CHECKING:
    from diskmorph.formats.allocator import Allocator, NewImage
    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = (
    Option("cpus", "NUMBER", "1", "processors"),
    Option("memory", "SIZE", "1G", "memory, in whole MiB"),
    Option("name", "TEXT", "the target's name", "the machine's name"),
    Option("firmware", "bios|efi", "bios", "what the machine boots by; efi where the disk boots by nothing else"),
    Option("secureboot", "on|off", "off", "boot signed code only; with firmware=efi"),
    Option("nics", "NUMBER", "1", "network cards"),
    Option("network", "TEXT", "VM Network", "the network that they are plugged into"),
    Option("os", "ID", "other, 64-bit", "VMware's word for the system, such as debian12_64"),
    Option("hwversion", "NUMBER", "13", "the virtual hardware: vmx-NUMBER"),
    Option("controller", "lsilogic|pvscsi|ahci", "lsilogic", "the one controller that all disks hang on"),
    Option("manifest", "sha1|sha256|sha512", "sha256", "the digests of the manifest"),
)
SUBFORMATS: tuple[str, ...] = ()


def open_image(source: ByteSource, context: OpenContext) -> MemberDisk:
    """See FormatModule: the disk of the package that `context.disk` names, or its only one."""
    if context.snapshot is not None:
        raise UnsupportedError(f"a package has no snapshot {context.snapshot!r}", feature="snapshots")
    package = open_package(source, _kind(source), context.opener, context.limits)
    return package.open_disk(context.disk).owning(package)


def new_allocator(image: NewImage) -> Allocator:
    """See FormatModule; packages are written by `convert` only, which makes their disks by the disk's own format."""
    raise UnsupportedError(
        "a package is written round a disk that there is",
        feature="packages",
        file=image.name,
        hint="make the disk first, then `diskmorph convert DISK PACKAGE`",
    )


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: the manifest and every disk; what importers want is `lint`'s."""
    return check_package(source, _kind(source), context, repair)


def _kind(source: ByteSource) -> str:
    """Return "ovf" where the file is XML, else "ova"."""
    return "ovf" if source.read_upto(0, 512).lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0")[:1] == b"<" else "ova"


__all__ = ["OPTIONS", "SUBFORMATS", "OvfPackage", "check_image", "new_allocator", "open_image", "open_package"]
