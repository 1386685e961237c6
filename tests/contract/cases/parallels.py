"""Parallels: images made byte by byte, of both magics."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from testkit import KIB, AllocatorCase, DiskCase, data

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OLD, NEW = b"WithoutFreeSpace", b"WithouFreSpacExt"


def hds(
    path: Path,
    sectors: int,
    clusters: Sequence[bytes | None],
    order: Sequence[int] = (),
    *,
    magic: bytes = NEW,
    tracks: int = 128,
    version: int = 2,
    in_use: int = 0x312E3276,
    upper: int = 0,
    first: int = 0,
) -> bytes:
    """Write an image of these clusters, None for one never written; `order` gives the places of those that are.

    `first` is where place 0 begins, in sectors. Return what it reads as.
    """
    size = tracks * 512
    first = first or -(-(64 + 4 * len(clusters)) // size) * tracks
    held = [i for i, piece in enumerate(clusters) if piece is not None]
    places = dict(zip(held, order or range(len(held)), strict=True))
    unit = 1 if magic == OLD else tracks
    table = [(first + places[i] * tracks) // unit if i in places else 0 for i in range(len(clusters))]
    head = magic + struct.pack("<IIIII", version, 16, 100, tracks, len(clusters)) + struct.pack("<II", sectors, upper)
    head += struct.pack("<IIIQ", in_use, first, 0, 0)
    with path.open("wb") as file:
        file.write(head + struct.pack(f"<{len(table)}I", *table))
        for i, place in places.items():
            file.seek((first + place * tracks) * 512)
            file.write(clusters[i] or b"")
    return b"".join(piece or bytes(size) for piece in clusters)[: sectors * 512]


def _permuted(magic: bytes, tracks: int) -> DiskCase:
    def make(folder: Path) -> tuple[Path, bytes]:
        clusters = [None if i in {1, 4} else data((tracks, i), tracks * 512) for i in range(7)]
        path = folder / "d.hds"
        first = 5 if magic == OLD else 0
        return path, hds(path, 7 * tracks - 5, clusters, (3, 0, 4, 2, 1), magic=magic, tracks=tracks, first=first)

    return DiskCase(f"parallels-{magic.decode()}-{tracks}", make)


DISKS = [_permuted(magic, tracks) for magic in (OLD, NEW) for tracks in (63, 128)]
ALLOCATORS: list[AllocatorCase] = []
CLUSTER = 64 * KIB
