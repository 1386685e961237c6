"""Expert Witness images (EnCase .E01, SMART .s01), read only: segment files of sections, chunks packed by zlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from diskmorph.formats.errors import OptionError
from diskmorph.formats.ewf.reader import open_image

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewImage, Option
    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ()


def new_allocator(image: NewImage) -> NoReturn:
    """Refuse: EWF is not written."""
    raise OptionError(f"ewf is read, but not written: {image.name}", hint="`diskmorph formats` lists what is written")


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: every checksum and the recorded hashes must agree. Nothing is repaired."""
    del repair
    from diskmorph.formats.ewf import check  # noqa: PLC0415 - readers do without

    return check.check_image(source, context)


__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
