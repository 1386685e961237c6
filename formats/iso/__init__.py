"""ISO 9660 with Rock Ridge, Joliet, El Torito and UDF: as a disk it is plain bytes, as a tree its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.check import CheckReport
from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.errors import OptionError, UnsupportedError
from diskmorph.formats.extents import plain_runs
from diskmorph.formats.iso.reader import describe, open_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from diskmorph.formats.allocator import Allocator, NewImage, Option
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ()


class IsoDisk(ImageDisk):
    """An ISO as the plain disk that a firmware sees."""

    format = "iso"

    def __init__(self, source: ByteSource) -> None:
        volume, features = describe(source)
        self.size = source.size
        self.files = (source,)
        self.name = source.name
        self.identity = {}
        warnings: tuple[str, ...] = ()
        if volume.size > source.size:
            warnings = (f"the volume is {volume.size} bytes large, the file {source.size}: it is cut off",)
        self.info = ImageInfo("iso", None, self.size, 512, None, features, warnings=warnings)

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        return plain_runs(self.files[0].runs(start, stop))


def open_image(source: ByteSource, context: OpenContext) -> IsoDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(f"an ISO has no snapshot {context.snapshot!r}", feature="snapshots")
    return IsoDisk(source)


def new_allocator(image: NewImage) -> Allocator:
    """See FormatModule: an ISO is made from a tree, not from a disk."""
    raise OptionError(
        f"{image.name}: an ISO is made from a directory, a tar archive or a container, not from a disk",
        hint="copy the bytes of a disk as they are with -O raw",
    )


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """Read every directory; damage is reported as the first thing that cannot be read."""
    from diskmorph.formats.errors import FormatError  # noqa: PLC0415

    del repair
    report = CheckReport("iso")
    try:
        for _ in open_tree(source, context.limits).walk():
            pass
    except FormatError as error:
        report.add(error.structure or "volume", error.offset, str(error))
    return report


__all__ = ["OPTIONS", "SUBFORMATS", "IsoDisk", "check_image", "describe", "new_allocator", "open_image", "open_tree"]
