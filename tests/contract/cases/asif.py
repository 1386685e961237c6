"""ASIF images put together byte by byte, from the public description of the layout alone."""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING

from testkit import KIB, AllocatorCase, DiskCase, data

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

NEVER, WHOLE, UNMAPPED, PARTLY = range(4)


class Made:
    """An image of chunks: what is not in `chunks` was never written; a list of blocks is PARTLY, None not written."""

    def __init__(
        self,
        size: int,
        chunks: Mapping[int, bytes | Sequence[bytes | None] | int],
        *,
        chunk: int = 32 * KIB,
        block: int = 512,
        most: int = 0,
        order: Callable[[list[int]], list[int]] = list,
        **fields: int,
    ) -> None:
        self.size, self.chunks, self.chunk, self.block = size, chunks, chunk, block
        self.most = most or max(size, 1) * 3
        self.group = 4 * block
        self.per_table = chunk // (8 * (self.group + 1)) * self.group
        self.order, self.fields = order, fields

    def build(self) -> tuple[bytes, bytes]:
        """Return the file and what it reads as. The older directory names tables that hold nonsense."""
        chunk, per_table = self.chunk, self.per_table
        held = [n for n, what in self.chunks.items() if not isinstance(what, int)]
        tables = sorted({n // per_table for n in self.chunks})
        groups = sorted({n // self.group for n in held if not isinstance(self.chunks[n], bytes)})
        count = -(-self.most // (per_table * chunk))
        parts = [("table", t) for t in tables] + [("bitmap", g) for g in groups] + [("data", n) for n in held]
        first = -(-(1024 + 16 * (count + 1)) // chunk)  # behind header and directories
        places = dict(zip(parts, self.order([first + i for i in range(len(parts))]), strict=True))
        file = bytearray(chunk * (first + len(parts)))
        want = bytearray(-(-self.size // chunk) * chunk + chunk * 4)
        for n, what in self.chunks.items():
            at = places.get(("data", n), 0)
            status = WHOLE
            if isinstance(what, int):
                status = what
            elif isinstance(what, bytes):
                file[at * chunk : at * chunk + len(what)] = what
                want[n * chunk : n * chunk + len(what)] = what
            else:
                status = PARTLY
                self._partly(file, want, n, at, what, places[("bitmap", n // self.group)])
            group, index = divmod(n % per_table, self.group)
            table = places[("table", n // per_table)] * chunk
            struct.pack_into(">Q", file, table + (group * (self.group + 1) + index) * 8, status << 62 | at)
        for g in groups:
            table = places[("table", g * self.group // per_table)] * chunk
            group = g % (per_table // self.group)
            at = table + (group * (self.group + 1) + self.group) * 8
            struct.pack_into(">Q", file, at, places[("bitmap", g)])
        self._heads(file, count, {t: places[("table", t)] for t in tables})
        return bytes(file), bytes(want[: self.size])

    def _partly(
        self, file: bytearray, want: bytearray, n: int, at: int, blocks: Sequence[bytes | None], bitmap: int
    ) -> None:
        per_chunk = self.chunk // self.block
        for i, what in enumerate(blocks):
            start = at * self.chunk + i * self.block
            file[start : start + self.block] = what if what is not None else b"\xee" * self.block
            if what is not None:
                want[n * self.chunk + i * self.block : n * self.chunk + (i + 1) * self.block] = what
                sector = n % self.group * per_chunk + i
                file[bitmap * self.chunk + sector // 4] |= 1 << sector % 4 * 2

    def _heads(self, file: bytearray, count: int, tables: Mapping[int, int]) -> None:
        first, second = 512, 512 + 8 * (count + 1)
        fields = {"version": 1, "size": 512, "segments": 0, "meta": self.most // self.chunk, **self.fields}
        head = struct.pack(
            ">4sIIIQQ16sQQIHHQ",
            b"shdw",
            fields["version"],
            fields["size"],
            0,
            first,
            second,
            uuid.UUID(int=7).bytes,
            self.size // self.block,
            self.most // self.block,
            self.chunk,
            self.block,
            fields["segments"],
            fields["meta"],
        )
        file[: len(head)] = head
        struct.pack_into(">Q", file, first, 4)
        struct.pack_into(f">{count}Q", file, first + 8, *[1 << 40] * count)
        struct.pack_into(">Q", file, second, 5)
        for number, place in tables.items():
            struct.pack_into(">Q", file, second + 8 + 8 * number, place)


def blocks(seed: object, count: int, block: int = 512) -> list[bytes | None]:
    return [None if (i * 5 + len(str(seed))) % 7 < 3 else data((seed, i), block) for i in range(count)]


def states(folder: Path) -> tuple[Path, bytes]:
    """Every state, chunks and tables in reverse order, a disk that ends inside a chunk."""
    chunk = 32 * KIB
    what = {0: data(0, chunk), 1: blocks(1, 64), 2: UNMAPPED, 3: data(3, chunk), 5: blocks(5, 64), 6: data(6, chunk)}
    file, want = Made(7 * chunk - 1536, what, order=lambda places: places[::-1]).build()
    path = folder / "d.asif"
    path.write_bytes(file)
    return path, want


def tables(folder: Path) -> tuple[Path, bytes]:
    """Two tables of three, each describes 64 MiB: too large a disk for every test of the contract."""
    chunk = 32 * KIB
    what: dict[int, bytes | list[bytes | None]]
    what = {2047: data(1, chunk), 4096: data(2, chunk), 4098: blocks(3, 64)}
    file, want = Made(4100 * chunk, what).build()
    path = folder / "d.asif"
    path.write_bytes(file)
    return path, want


def wide(folder: Path) -> tuple[Path, bytes]:
    """Sectors of 4096 bytes."""
    chunk = 256 * KIB
    what = {0: blocks("wide", 64, 4096), 2: data(2, chunk)}
    file, want = Made(3 * chunk, what, chunk=chunk, block=4096).build()
    path = folder / "d.asif"
    path.write_bytes(file)
    return path, want


DISKS = [DiskCase("asif-states", states), DiskCase("asif-4096", wide)]
ALLOCATORS: list[AllocatorCase] = []
