"""Bochs growing images: of bximage, and put together byte by byte, of both versions."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from testkit import KIB, AllocatorCase, DiskCase, content, data, little_disk, run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

FREE = 0xFFFFFFFF


def growing(
    path: Path,
    size: int,
    extents: Mapping[int, Sequence[bytes | None]],
    order: Sequence[int] = (),
    *,
    extent: int = 8 * KIB,
    entries: int = 0,
    bitmap: int = 0,
    version: int = 2,
    kind: bytes = b"Redolog",
    subtype: bytes = b"Growing",
    header: int = 512,
) -> bytes:
    """Write an image; `extents` are lists of sectors, None for one never written. Return what it reads as."""
    count = extent // 512
    entries = entries or -(-size // extent) + 3
    bitmap = bitmap or -(-count // 8)
    room = -(-bitmap // 512) * 512
    places = dict(zip(extents, order or range(len(extents)), strict=True))
    head = struct.pack(
        "<32s16s16sIIIII", b"Bochs Virtual HD Image", kind, subtype, version << 16, header, entries, bitmap, extent
    )
    head += struct.pack("<Q", size) if version == 1 else struct.pack("<IQ", 0x5A5A5A5A, size)
    catalog = [places.get(number, FREE) for number in range(entries)]
    want = bytearray(-(-size // extent) * extent if size < 1 << 30 else 0)
    with path.open("wb") as file:
        file.write(head.ljust(header, b"\0") + struct.pack(f"<{entries}I", *catalog))
        for number, sectors in extents.items():
            bits = sum(1 << i for i, sector in enumerate(sectors) if sector is not None)
            stored = b"".join(sector if sector is not None else b"\xee" * 512 for sector in sectors)
            file.seek(header + 4 * entries + places[number] * (room + extent))
            file.write(bits.to_bytes(count // 8 or 1, "little").ljust(room, b"\xff") + stored)
            for i, sector in enumerate(sectors):
                if sector is not None and want:
                    want[number * extent + i * 512 : number * extent + i * 512 + 512] = sector
    return bytes(want[:size])


def sectors(seed: object, count: int) -> list[bytes | None]:
    return [None if (i * 7 + len(str(seed))) % 5 == 0 else data((seed, i), 512) for i in range(count)]


def permuted(extent: int, version: int) -> Callable[[Path], tuple[Path, bytes]]:
    def make(folder: Path) -> tuple[Path, bytes]:
        path, count = folder / "d.img", extent // 512
        extents = {number: sectors((version, number), count) for number in (0, 2, 3, 4, 7)}
        return path, growing(
            path, 8 * extent - 1024 * (count > 2), extents, (3, 0, 4, 1, 2), extent=extent, version=version
        )

    return make


def peers(folder: Path) -> tuple[Path, bytes]:
    """bximage wants whole cylinders of 16 heads and 63 sectors."""
    raw, path = folder / "disk.raw", folder / "disk.img"
    raw.write_bytes(want := content(little_disk(4 * 16 * 63 * 512)))
    run("bximage", "-q", "-func=convert", "-imgmode=growing", raw, path)
    return path, want


DISKS = [
    DiskCase("bximage", peers),
    DiskCase("bochs-v1", permuted(16 * KIB, 1)),
    DiskCase("bochs-v2", permuted(16 * KIB, 2)),
    DiskCase("bochs-tiny", permuted(512, 2)),
    DiskCase("bochs-wide", permuted(64 * KIB, 2)),
]
ALLOCATORS: list[AllocatorCase] = []
