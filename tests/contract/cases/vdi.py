"""VDI: images made byte by byte for what other products do not write, and ways to write our own."""

from __future__ import annotations

import random
import struct
import uuid
from typing import TYPE_CHECKING

from testkit import KIB, MIB, AllocatorCase, DiskCase, data

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FREE, ZERO = "free", "zero"


def uid(name: str | None) -> bytes:
    return bytes(16) if name is None else uuid.uuid5(uuid.NAMESPACE_OID, name).bytes_le


def header(
    size: int,
    block: int,
    blocks: int,
    stored: int,
    *,
    kind: int = 1,
    version: int = 0x10001,
    header_size: int = 400,
    flags: int = 0,
    extra: int = 0,
    map_offset: int = 512,
    data_offset: int = MIB,
    create: str | None = "create",
    modify: str | None = "modify",
    linkage: str | None = None,
    parent_modify: str | None = None,
) -> bytes:
    """Preheader and header, written from the offsets of VDICore.h, not from the schema under test."""
    head = b"<<< Sun VirtualBox Disk Image >>>\n".ljust(64, b"\0") + struct.pack("<II", 0xBEDA107F, version)
    sizes = struct.pack("<QI", size, block)
    counts = struct.pack("<II", blocks, stored)
    geometry = struct.pack("<IIII", 0, 0, 0, 512)
    if version >> 16 == 0:
        head += struct.pack("<II", kind, flags) + bytes(256) + geometry + sizes + counts
        return head + uid(create) + uid(modify) + uid(linkage)
    head += struct.pack("<III", header_size, kind, flags) + bytes(256) + struct.pack("<II", map_offset, data_offset)
    head += geometry + bytes(4) + sizes + struct.pack("<I", extra) + counts
    head += uid(create) + uid(modify) + uid(linkage) + uid(parent_modify)
    return head + (geometry if header_size >= 400 else b"")


def vdi(
    path: Path,
    size: int,
    blocks: Sequence[bytes | str],
    order: Sequence[int] = (),
    *,
    block: int = MIB,
    extra: int = 0,
    version: int = 0x10001,
    map_offset: int = 512,
    data_offset: int = MIB,
    stored: int | None = None,
    **fields: object,
) -> bytes:
    """Write a VDI whose guest block i is `blocks[i]` and stored at place `order[..]`; return what it reads as."""
    if version >> 16 == 0:
        map_offset, data_offset = 420, 420 + 4 * len(blocks)
    held = [i for i, piece in enumerate(blocks) if isinstance(piece, bytes)]
    places = dict(zip(held, order or range(len(held)), strict=True))
    table = [places.get(i, 0xFFFFFFFE if piece == ZERO else 0xFFFFFFFF) for i, piece in enumerate(blocks)]
    count = len(held) if stored is None else stored
    head = header(
        size,
        block,
        len(blocks),
        count,
        extra=extra,
        version=version,
        map_offset=map_offset,
        data_offset=data_offset,
        **fields,  # type: ignore[arg-type]
    )
    with path.open("wb") as file:
        file.write(head)
        file.seek(map_offset)
        file.write(struct.pack(f"<{len(table)}I", *table))
        for i, place in places.items():
            piece = blocks[i]
            assert isinstance(piece, bytes)
            file.seek(data_offset + place * (block + extra))
            file.write(b"\xee" * extra + piece)
        file.truncate(max(file.seek(0, 2), data_offset))
    return b"".join(piece if isinstance(piece, bytes) else bytes(block) for piece in blocks)[:size]


def _mixed(seed: str, count: int, block: int) -> tuple[list[bytes | str], list[int]]:
    rng = random.Random(seed)
    blocks: list[bytes | str] = [
        rng.choice((FREE, ZERO)) if rng.random() < 0.3 else data((seed, i), block) for i in range(count)
    ]
    order = list(range(sum(isinstance(piece, bytes) for piece in blocks)))
    rng.shuffle(order)
    return blocks, order


def _permuted(folder: Path) -> tuple[Path, bytes]:
    blocks, order = _mixed("permuted", 6, MIB)
    return folder / "d.vdi", vdi(folder / "d.vdi", 5 * MIB + 512 * 3, blocks, order)


def _tiny_blocks(folder: Path) -> tuple[Path, bytes]:
    blocks, order = _mixed("tiny", 300, 4 * KIB)
    return folder / "d.vdi", vdi(
        folder / "d.vdi", 299 * 4 * KIB + 7, blocks, order, block=4 * KIB, data_offset=64 * KIB
    )


def _extra(folder: Path) -> tuple[Path, bytes]:
    blocks, order = _mixed("extra", 5, 64 * KIB)
    options = {"block": 64 * KIB, "extra": 4096, "data_offset": 3 * KIB, "map_offset": 1000}
    return folder / "d.vdi", vdi(folder / "d.vdi", 5 * 64 * KIB, blocks, order, **options)  # type: ignore[arg-type]


def _version_0(folder: Path) -> tuple[Path, bytes]:
    blocks, order = _mixed("old", 5, 64 * KIB)
    return folder / "d.vdi", vdi(folder / "d.vdi", 5 * 64 * KIB, blocks, order, block=64 * KIB, version=1)


def _static(folder: Path) -> tuple[Path, bytes]:
    blocks = [data(("static", i), 64 * KIB) for i in range(4)]
    return folder / "d.vdi", vdi(folder / "d.vdi", 4 * 64 * KIB - 512, blocks, block=64 * KIB, kind=2)


DISKS = [
    DiskCase("vdi-permuted", _permuted),
    DiskCase("vdi-tiny-blocks", _tiny_blocks),
    DiskCase("vdi-extra", _extra),
    DiskCase("vdi-version-0", _version_0),
    DiskCase("vdi-static", _static),
]

ALLOCATORS = [
    AllocatorCase("vdi-dynamic", "vdi", {}, "vdi"),
    AllocatorCase("vdi-static", "vdi", {"static": "on"}, "vdi"),
    AllocatorCase("vdi-small-blocks", "vdi", {"block_size": "64K"}),
    AllocatorCase("vdi-static-small-blocks", "vdi", {"static": "on", "block_size": "4K"}),
]
