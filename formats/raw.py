"""raw: the disk's bytes and nothing else. Any byte size; holes are the file system's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.allocator import PLACED, Allocator, NewImage, Option, OptionReader, Write
from diskmorph.formats.check import CheckReport
from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.errors import OptionError, UnsupportedError
from diskmorph.formats.extents import DATA, PLAIN, plain_runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS = (Option("preallocation", "off|falloc|full", "off", "reserve the target's room, or write it all"),)
SUBFORMATS: tuple[str, ...] = ()


class RawDisk(ImageDisk):
    """A plain disk."""

    format = "raw"

    def __init__(self, source: ByteSource) -> None:
        self.size = source.size
        self.files = (source,)
        self.name = source.name
        self.identity = {}
        self.info = ImageInfo("raw", None, self.size, self.sector_size, None)

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        return plain_runs(self.files[0].runs(start, stop))


def open_image(source: ByteSource, context: OpenContext) -> RawDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(f"raw has no snapshot {context.snapshot!r}", feature="snapshots")
    return RawDisk(source)


class RawAllocator(Allocator):
    """Every byte of the disk at its own offset."""

    unit = 4096
    grain = 4096
    sequential = True
    alignment = 4096

    def __init__(self, image: NewImage) -> None:
        options = OptionReader("raw", image.options)
        self.preallocation = options.text("preallocation", "off", ("off", "falloc", "full"))
        options.done()
        if image.parent is not None:
            raise OptionError("raw has no parent", hint="write an overlay as qcow2, vmdk, vdi, vhd or vhdx")
        if image.codec is not None:
            raise OptionError("raw cannot be compressed", hint="use qcow2 or vmdk")
        self.size = image.size
        self.sector_size = image.sector_size
        self.members = (image.name,)

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator."""
        placed = np.zeros(len(runs), PLACED)
        placed["start"] = placed["offset"] = runs["start"]
        placed["length"] = runs["length"]
        placed["kind"] = np.where(runs["kind"] == DATA, DATA, 1)
        placed["codec"] = PLAIN
        return placed

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        return iter(())

    def sizes(self) -> Sequence[int]:
        """See Allocator."""
        return (self.size,)


def new_allocator(image: NewImage) -> RawAllocator:
    """See FormatModule."""
    return RawAllocator(image)


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: a plain disk has no structure that could be damaged."""
    del source, context, repair
    return CheckReport("raw")
