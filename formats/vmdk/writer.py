"""New VMDKs: the layout that was asked for, and that of the flat kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.allocator import PLACED, Allocator, Write
from diskmorph.formats.errors import TargetError
from diskmorph.formats.extents import DATA, ZERO
from diskmorph.formats.limits import Limits
from diskmorph.formats.vmdk.schema import SECTOR
from diskmorph.formats.vmdk.settings import EXTENT_SECTORS, FLAT, STREAM, Settings, read_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.allocator import NewImage


def new_allocator(image: NewImage) -> Allocator:
    """See FormatModule."""
    settings = read_settings(image)
    if settings.subformat in FLAT:
        return FlatAllocator(settings)
    if settings.subformat == STREAM:
        from diskmorph.formats.vmdk.stream_writer import StreamAllocator  # noqa: PLC0415 - one of three is needed

        return StreamAllocator(settings)
    from diskmorph.formats.vmdk.sparse_writer import SparseAllocator  # noqa: PLC0415 - one of three is needed

    return SparseAllocator(settings)


def split_sizes(settings: Settings) -> list[int]:
    """Return the bytes of each extent: one, or pieces of EXTENT_SECTORS for the twoGbMax kinds."""
    if not settings.subformat.startswith("twoGbMax"):
        return [settings.size]
    whole = EXTENT_SECTORS * SECTOR
    count = max(1, -(-settings.size // whole))
    if count > Limits().members:
        raise TargetError(
            "has too many extents for a split VMDK",
            file=settings.image.name,
            expected=f"at most {Limits().members * whole} bytes",
            found=settings.size,
            hint="use -o subformat=monolithicSparse or monolithicFlat",
        )
    return [min(whole, settings.size - number * whole) for number in range(count)]


def cut_runs(runs: NDArray[np.void], size: int) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Return the runs cut at multiples of `size`, and the number of the extent that each piece lies in."""
    first = (runs["start"] // np.uint64(size)).astype(np.int64)
    last = ((runs["start"] + runs["length"] - np.uint64(1)) // np.uint64(size)).astype(np.int64)
    counts = last - first + 1
    if (counts == 1).all():
        return runs, first
    out = np.repeat(runs, counts)
    step = np.arange(len(out)) - np.repeat(np.cumsum(counts) - counts, counts)
    number = np.repeat(first, counts) + step
    ends = out["start"] + out["length"]
    out["start"] = np.maximum(out["start"], number.astype(np.uint64) * np.uint64(size))
    out["length"] = np.minimum(ends, (number + 1).astype(np.uint64) * np.uint64(size)) - out["start"]
    return out, number


class FlatAllocator(Allocator):
    """A descriptor, and the disk's bytes as they are in one file or in pieces of 2047 MiB."""

    unit = grain = alignment = 4096

    def __init__(self, settings: Settings) -> None:
        self.size = settings.size
        self.preallocation = settings.preallocation
        self._settings = settings
        self._extents = split_sizes(settings)
        if settings.subformat == "twoGbMaxExtentFlat":
            names = [settings.member(f"-f{number:03}") for number in range(1, len(self._extents) + 1)]
        else:
            names = [settings.member("-flat")]
        self.members = (settings.image.name, *names)
        kind = "VMFS" if settings.subformat.startswith("vmfs") else "FLAT"
        tail = "" if kind == "VMFS" else " 0"
        lines = tuple(
            f'RW {size // SECTOR} {kind} "{name}"{tail}' for size, name in zip(self._extents, names, strict=True)
        )
        self._descriptor = settings.descriptor(lines)

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator: every range has a place in the file, zeroes and holes too."""
        pieces, number = cut_runs(runs, max(self._extents[0], SECTOR))
        placed = np.zeros(len(pieces), PLACED)
        placed["start"], placed["length"] = pieces["start"], pieces["length"]
        placed["offset"] = pieces["start"] - number.astype(np.uint64) * np.uint64(self._extents[0])
        placed["member"] = number + 1
        placed["kind"] = np.where(pieces["kind"] == DATA, DATA, ZERO)
        return placed

    def finish(self) -> Iterator[Write]:
        """See Allocator."""
        yield Write(0, 0, self._descriptor)

    def sizes(self) -> Sequence[int]:
        """See Allocator."""
        return (len(self._descriptor), *self._extents)
