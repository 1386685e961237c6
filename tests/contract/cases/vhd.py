"""VHD: images made byte by byte for what other products do not write, and ways to write our own."""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING

import numpy as np

from testkit import KIB, MIB, AllocatorCase, DiskCase, data

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LARGE = (65535, 16, 255)


def uid(name: str) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, name)


def sealed(raw: bytes, at: int) -> bytes:
    clear = raw[:at] + bytes(4) + raw[at + 4 :]
    return clear[:at] + struct.pack(">I", ~sum(clear) & 0xFFFFFFFF) + clear[at + 4 :]


def footer(
    size: int,
    kind: int,
    *,
    creator: bytes = b"win ",
    chs: tuple[int, int, int] = LARGE,
    name: str = "disk",
    version: int = 0x10000,
    header_at: int = 512,
    saved: int = 0,
) -> bytes:
    """A footer written from the specification's table, not from the schema under test."""
    head = struct.pack(">8sIIQI", b"conectix", 2, version, (1 << 64) - 1 if kind == 2 else header_at, 0x2A000000)
    head += struct.pack(">4sI4sQQHBBI", creator, 0x60001, b"Wi2k", size, size, *chs, kind)
    return sealed(head + bytes(4) + uid(name).bytes + bytes([saved]) + bytes(427), 64)


def header(
    entries: int,
    block: int,
    table_at: int,
    *,
    parent: str | None = None,
    parent_name: str = "",
    locators: Sequence[tuple[bytes, int, int]] = (),
    version: int = 0x10000,
) -> bytes:
    """A dynamic header; locators are (platform code, length, offset)."""
    head = struct.pack(">8sQQIIII", b"cxsparse", (1 << 64) - 1, table_at, version, entries, block, 0)
    head += (uid(parent).bytes if parent else bytes(16)) + struct.pack(">II", 0x2A000000 if parent else 0, 0)
    head += parent_name.encode("utf-16-be").ljust(512, b"\0")
    for code, length, offset in locators:
        head += struct.pack(">4sIIIQ", code, 512, length, 0, offset)
    return sealed(head.ljust(1024, b"\0"), 36)


def bits(block: int, sectors: Sequence[int] | None) -> bytes:
    """A bitmap with these sectors' bits set (most significant first), all of them for None."""
    length = -(-block // 512 // 8 // 512) * 512
    if sectors is None:
        return b"\xff" * length
    flags = np.zeros(length * 8, np.uint8)
    flags[list(sectors)] = 1
    return np.packbits(flags).tobytes()


def dynamic(
    path: Path,
    size: int,
    blocks: Mapping[int, tuple[Sequence[int] | None, bytes]],
    *,
    block: int = 2 * MIB,
    kind: int = 3,
    order: Sequence[int] = (),
    header_at: int = 512,
    table_at: int = 1536,
    entries: int | None = None,
    parent: str | None = None,
    parent_name: str = "",
    locators: Sequence[tuple[bytes, bytes]] = (),
    **of_footer: object,
) -> bytes:
    """Write a dynamic or differencing VHD of (sectors present, block's bytes); return what its own sectors read as."""
    entries = -(-size // block) if entries is None else entries
    table = [0xFFFFFFFF] * entries
    foot = footer(size, kind, header_at=header_at, **of_footer)  # type: ignore[arg-type]
    want = bytearray(-(-size // block) * block)
    at = -(-max(table_at + 4 * entries, header_at + 1024) // 512) * 512
    placed = []
    with path.open("wb") as file:
        for code, raw in locators:
            placed.append((code, len(raw), at))
            file.seek(at)
            file.write(raw)
            at += -(-len(raw) // 512) * 512
        for index in order or list(blocks):
            sectors, piece = blocks[index]
            table[index] = at // 512
            bitmap = bits(block, sectors)
            file.seek(at)
            file.write(bitmap + piece)
            at += len(bitmap) + block
            for sector in range(block // 512) if sectors is None else sectors:
                here = index * block + sector * 512
                want[here : here + 512] = piece[sector * 512 : sector * 512 + 512]
        head = header(entries, block, table_at, parent=parent, parent_name=parent_name, locators=placed)
        for offset, raw in ((0, foot), (header_at, head), (table_at, struct.pack(f">{entries}I", *table)), (at, foot)):
            file.seek(offset)
            file.write(raw)
    return bytes(want[:size])


def fixed(path: Path, content: bytes, *, length: int = 512, **of_footer: object) -> bytes:
    path.write_bytes(content + footer(len(content), 2, **of_footer)[:length])  # type: ignore[arg-type]
    return content


def _permuted(folder: Path) -> tuple[Path, bytes]:
    blocks = {i: (None, data(("p", i), 512 * KIB)) for i in (0, 1, 3, 4, 7)}
    options = {"block": 512 * KIB, "order": (4, 0, 7, 3, 1), "header_at": 5 * KIB, "table_at": 2 * KIB}
    return folder / "d.vhd", dynamic(folder / "d.vhd", 8 * 512 * KIB - 1536, blocks, **options)  # type: ignore[arg-type]


def _partial(folder: Path) -> tuple[Path, bytes]:
    sectors: dict[int, Sequence[int] | None] = {0: (0, 2, 7, 8, 4095), 1: (), 2: None, 3: range(100, 300), 4: (0, 1, 2)}
    blocks = {i: (which, data(("b", i), 2 * MIB)) for i, which in sectors.items()}
    return folder / "d.vhd", dynamic(folder / "d.vhd", 8 * MIB + 1024, blocks, order=(4, 2, 0, 3, 1))


def _tiny_blocks(folder: Path) -> tuple[Path, bytes]:
    blocks = {i: (None if i % 3 else (0, 5), data(("t", i), 4096)) for i in range(0, 200, 2)}
    return folder / "d.vhd", dynamic(folder / "d.vhd", 200 * 4096 - 512, blocks, block=4096)


def _large_blocks(folder: Path) -> tuple[Path, bytes]:
    blocks = {0: (range(3000, 8000), data("large", 4 * MIB))}
    return folder / "d.vhd", dynamic(folder / "d.vhd", 5 * MIB, blocks, block=4 * MIB)


def _fixed(folder: Path) -> tuple[Path, bytes]:
    return folder / "d.vhd", fixed(folder / "d.vhd", data("fixed", MIB + 512))


def _fixed_511(folder: Path) -> tuple[Path, bytes]:
    return folder / "d.vhd", fixed(folder / "d.vhd", data("fixed", MIB + 512), length=511)


DISKS = [
    DiskCase("vhd-permuted", _permuted),
    DiskCase("vhd-partial-bitmaps", _partial),
    DiskCase("vhd-tiny-blocks", _tiny_blocks),
    DiskCase("vhd-large-blocks", _large_blocks),
    DiskCase("vhd-fixed", _fixed),
    DiskCase("vhd-fixed-511", _fixed_511),
]

ALLOCATORS = [
    AllocatorCase("vhd-dynamic", "vhd", {}, "vpc"),
    AllocatorCase("vhd-fixed", "vhd", {"subformat": "fixed"}, "vpc"),
    AllocatorCase("vhd-small-blocks", "vhd", {"block_size": "4K"}, "vpc"),
    AllocatorCase("vhd-large-blocks", "vhd", {"block_size": "8M"}, "vpc"),
]
