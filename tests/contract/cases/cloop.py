"""cloop images: of create_compressed_fs, and put together byte by byte, V4.0 with its header at either end."""

from __future__ import annotations

import lzma
import struct
import zlib
from typing import TYPE_CHECKING

from testkit import KIB, AllocatorCase, DiskCase, content, data, little_disk, run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

ZLIB, PLAIN, XZ, LZ4, LZO = range(5)


def script(version: str) -> bytes:
    return f"#!/bin/sh\n#{version} Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n".encode()


def lz4(unit: bytes) -> bytes:
    from lz4.block import compress

    return bytes(compress(unit, store_size=False))


def lzo(unit: bytes) -> bytes:
    """LZO1X without a match: a run of literals longer than 238 bytes, and the end."""
    count = len(unit) - 18
    return bytes([0]) + bytes((count - 1) // 255) + bytes([(count - 1) % 255 + 1]) + unit + b"\x11\0\0"


PACK: dict[int, Callable[[bytes], bytes]] = {ZLIB: zlib.compress, PLAIN: bytes, XZ: lzma.compress, LZ4: lz4, LZO: lzo}


def image(
    path: Path,
    blocks: Sequence[tuple[int, bytes]],
    *,
    version: str = "V2.0",
    last: bool = False,
    spare: int = 0,
    change: Callable[[list[int]], None] = lambda _: None,
) -> bytes:
    """Write an image of (codec, content) blocks; `change` edits the index; return what it reads as."""
    size = len(blocks[0][1])
    stored = [PACK[kind](what) for kind, what in blocks]
    at = spare if last else 136 + 8 * (len(blocks) + 1) + spare
    index = []
    for (kind, _), piece in zip(blocks, stored, strict=True):
        index.append((kind << 60 if version == "V4.0" else 0) | at)
        at += len(piece)
    index.append(at)
    change(index)
    head = script(version).ljust(128, b"\0") + struct.pack(">II", size, len(blocks))
    table = struct.pack(f">{len(index)}Q", *index)
    body = bytes(spare) + b"".join(stored)
    path.write_bytes(body + table + head if last else head + table + body)
    return b"".join(what for _, what in blocks)


def peers(folder: Path) -> tuple[Path, bytes]:
    raw, path = folder / "disk.raw", folder / "disk.cloop"
    raw.write_bytes(want := content(little_disk(3 * 1024 * KIB)))
    run("create_compressed_fs", "-q", "-B", "65536", "-m", raw, path)
    return path, want


def blocks(size: int, kinds: Sequence[int]) -> list[tuple[int, bytes]]:
    found = []
    for number in range(3 * len(kinds)):
        what = data(("cloop", number), size) if number % 3 else (b"%05d text " % number * size)[:size]
        found.append((kinds[number % len(kinds)], bytes(size) if number == 4 else what))
    return found


def v4(size: int, last: bool) -> Callable[[Path], tuple[Path, bytes]]:
    def make(folder: Path) -> tuple[Path, bytes]:
        path = folder / "d.cloop"
        return path, image(path, blocks(size, (ZLIB, PLAIN, XZ, LZ4, LZO)), version="V4.0", last=last)

    return make


def v2(folder: Path) -> tuple[Path, bytes]:
    path = folder / "d.cloop"
    return path, image(path, blocks(512 * 7, [ZLIB]))


DISKS = [
    DiskCase("create_compressed_fs", peers),
    DiskCase("cloop-v2", v2),
    DiskCase("cloop-v4-first", v4(64 * KIB, last=False)),
    DiskCase("cloop-v4-last", v4(16 * KIB, last=True)),
]
ALLOCATORS: list[AllocatorCase] = []
