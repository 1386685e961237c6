"""Linux kernels (aki), initial ramdisks (ari) and EC2 bundles (ami): `info` tells of them, none is a disk in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.allocator import Option
from diskmorph.formats.ami.kernel import Kernel, read_kernel
from diskmorph.formats.ami.package import BundlePackage, open_package
from diskmorph.formats.ami.ramdisk import Ramdisk, read_ramdisk
from diskmorph.formats.check import CheckReport
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.package_probe import is_ami, is_kernel

if TYPE_CHECKING:
    from diskmorph.formats.allocator import Allocator, NewImage
    from diskmorph.formats.disk import ImageDisk
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = (
    Option("kernel", "FILE", "none", "the Linux kernel of the triple (aki)"),
    Option("ramdisk", "FILE", "none", "its initial ramdisk (ari)"),
    Option("cmdline", "TEXT", "none", "the kernel's command line"),
    Option("name", "TEXT", "the target's name", "the image's name in Glance"),
)
SUBFORMATS: tuple[str, ...] = ()


def open_image(source: ByteSource, context: OpenContext) -> ImageDisk:
    """See FormatModule: always raises UnsupportedError that says what to do instead."""
    del context
    if is_ami(source):
        what, hint = "the manifest of an encrypted bundle", "`diskmorph unbundle MANIFEST DST --key PEM` opens it"
    else:
        what = "a Linux kernel" if is_kernel(source) else "an initial ramdisk"
        hint = "say -f raw to take it as plain bytes"
    raise UnsupportedError(f"is {what}, not a disk", feature="disks", file=source.name, hint=hint)


def new_allocator(image: NewImage) -> Allocator:
    """See FormatModule: triples are written by `convert` into a folder, bundles by `bundle`."""
    raise UnsupportedError(
        "is no disk format", feature="ami", file=image.name, hint="write it with `convert DISK DIR/`"
    )


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: kernels and ramdisks are read whole, a bundle's manifest is parsed."""
    if repair is not None:
        raise UnsupportedError("is not repaired", feature="repair", file=source.name)
    if is_ami(source):
        BundlePackage(source, context.limits)
        return CheckReport("ami")
    kernel = is_kernel(source)
    report = CheckReport("aki" if kernel else "ari")
    try:
        if kernel:
            read_kernel(source)
        else:
            read_ramdisk(source)
    except FormatError as error:
        report.add(error.structure or report.format, error.offset, error.problem)
    return report


__all__ = [
    "OPTIONS",
    "SUBFORMATS",
    "BundlePackage",
    "Kernel",
    "Ramdisk",
    "check_image",
    "new_allocator",
    "open_image",
    "open_package",
    "read_kernel",
    "read_ramdisk",
]
