"""Apple disk images (UDIF, .dmg), read only: a trailer, a property list of chunk tables, chunks that are compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from diskmorph.formats.dmg.reader import open_image
from diskmorph.formats.errors import OptionError

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewImage, Option
    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ()


def new_allocator(image: NewImage) -> NoReturn:
    """Refuse: UDIF is not written."""
    raise OptionError(f"dmg is read, but not written: {image.name}", hint="`diskmorph formats` lists what is written")


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: every chunk must decode, and every checksum agree. Nothing is repaired."""
    del repair
    from diskmorph.formats.dmg import check  # noqa: PLC0415 - readers do without

    return check.check_image(source, context)


__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
