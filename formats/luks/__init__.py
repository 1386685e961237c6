"""LUKS volumes, versions 1 and 2: read with a passphrase and `-f luks`; as they are they are plain disks too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.allocator import Option
from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, row
from diskmorph.formats.luks.cipher import DecryptedSource
from diskmorph.formats.luks.unlock import Volume, unlock

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from diskmorph.formats.allocator import Allocator, NewImage
    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ("LUKS1", "LUKS2")


class LuksDisk(ImageDisk):
    """What an encrypted volume holds; all of it is data, since encrypted zeroes are not zeroes."""

    format = "luks"

    def __init__(self, source: ByteSource, volume: Volume) -> None:
        room = source.size - volume.offset
        self.size = room // volume.cipher.sector * volume.cipher.sector if volume.size is None else volume.size
        if room < 0 or self.size > room:
            raise FormatError("the encrypted data lies beyond the end", structure="LUKS header", offset=volume.offset)
        payload = source.window(volume.offset, self.size)
        self._owner = source
        self.files = (DecryptedSource(payload, volume.cipher, volume.first),)
        self.name = source.name
        self.identity = {}
        features = {"encryption": volume.algorithm}
        self.info = ImageInfo("luks", f"LUKS{volume.version}", self.size, self.sector_size, None, features)

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        yield row(start, stop - start, DATA, offset=start)

    def close(self) -> None:
        """See Disk."""
        self._owner.close()


def open_image(source: ByteSource, context: OpenContext) -> LuksDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(f"LUKS has no snapshot {context.snapshot!r}", feature="snapshots")
    return LuksDisk(source, unlock(source, context.opener.parents.passphrase))


def new_allocator(image: NewImage) -> Allocator:
    """See FormatModule: nothing is encrypted here."""
    raise UnsupportedError("LUKS is read but not written", feature="luks", file=image.name)


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule."""
    del context, repair
    raise UnsupportedError("LUKS is not checked", feature="check", file=source.name)


__all__ = ["OPTIONS", "SUBFORMATS", "check_image", "new_allocator", "open_image"]
