"""Images compressed as one file (gzip, xz, zstd, bzip2), as distributions ship them, and the tarballs of clouds.

The wrapper is known by its content; what lies in it is identified anew. It is decoded once into a sparse file without a
name in `$TMPDIR`, since none of these streams can be read at any offset in general.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diskmorph.formats.allocator import Option
from diskmorph.formats.compressed.decoded import decoded_image
from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.registry import identify, load
from diskmorph.formats.spool import codec_of

if TYPE_CHECKING:
    from diskmorph.formats.allocator import Allocator, NewImage
    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.disk import ImageDisk
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ("gzip", "xz", "zstd", "bzip2")


def open_image(source: ByteSource, context: OpenContext) -> ImageDisk:
    """See FormatModule: the image inside; its features say `compressed_by`."""
    codec = codec_of(source)
    inner = decoded_image(source, context.limits)
    try:
        entry, _ = identify(inner)
        if entry.module == __name__:
            raise UnsupportedError("is compressed twice", feature="compression in compression", file=source.name)
        disk = load(entry).open_image(inner, context)
        features = {**disk.info.features, "compressed_by": codec}
        disk.info = replace(disk.info, features=features)
    except BaseException:
        inner.close()
        raise
    source.verify_unchanged()
    source.close()
    return disk


def new_allocator(image: NewImage) -> Allocator:
    """See FormatModule: compressed files are written by the suffix of the target's name."""
    raise UnsupportedError(
        "is no format of disks", feature="compressed", file=image.name, hint="call the target NAME.raw.xz, NAME.vmdk.gz"
    )


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: the image inside is checked, never repaired."""
    if repair is not None:
        raise UnsupportedError(
            "is compressed, so that it cannot be repaired",
            feature="repair",
            file=source.name,
            hint="decompress it first",
        )
    with decoded_image(source, context.limits) as inner:
        entry, _ = identify(inner)
        return load(entry).check_image(inner, context, None)


__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
