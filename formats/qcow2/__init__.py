"""qcow2, QEMU's copy-on-write format, versions 2 and 3 (docs/formats/qcow2.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.qcow2.options import OPTIONS, SUBFORMATS
from diskmorph.formats.qcow2.reader import open_image

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewImage
    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.qcow2.writer import Qcow2Allocator
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource


def new_allocator(image: NewImage) -> Qcow2Allocator:
    """See FormatModule. Raises OptionError and TargetError."""
    from diskmorph.formats.qcow2 import writer  # noqa: PLC0415 - readers do without

    return writer.new_allocator(image)


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule. Raises FormatError, UnsupportedError, OptionError."""
    from diskmorph.formats.qcow2 import check  # noqa: PLC0415 - readers do without

    return check.check_image(source, context, repair)


__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
