"""Expert Witness images: of ewfacquire, and put together byte by byte, with small chunks and many tables."""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import TYPE_CHECKING

from testkit import KIB, AllocatorCase, DiskCase, content, data, little_disk, run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.adler32(body))


def section(kind: bytes, at: int, body: bytes, *, size: int | None = None) -> bytes:
    """A section that begins at `at`: "next" and "done" point to themselves."""
    last = kind in {b"next", b"done"}
    length = 76 + len(body)
    head = struct.pack(
        "<16sQQ40x", kind, at if last else at + length, (0 if last else length) if size is None else size
    )
    return sealed(head) + body


def volume(chunks: int, sectors: int, per_chunk: int, sector: int, set_id: bytes = bytes(range(16))) -> bytes:
    head = struct.pack("<B3xIIIQ12xB3x", 1, chunks, per_chunk, sector, sectors, 3) + bytes(24)
    return sealed((head + set_id).ljust(1048, b"\0"))


def old_volume(chunks: int, sectors: int, per_chunk: int, sector: int) -> bytes:
    return sealed(struct.pack("<IIIII65x5s", 1, chunks, per_chunk, sector, sectors, b"SMART"))


class Made:
    """An image of `disk` in chunks; `fields` change what it says.

    `packed` tells which chunks are packed; `per_table` and `per_file` are chunks of a table and of a segment file.
    """

    def __init__(
        self,
        disk: bytes,
        *,
        per_chunk: int = 8,
        sector: int = 512,
        per_table: int = 5,
        per_file: int = 1 << 30,
        packed: Callable[[int], bool] = lambda number: number % 3 != 1,
        base: int = 0,
        old: bool = False,
        mirror: bool = True,
        extra: Sequence[tuple[bytes, bytes]] = (),
        **fields: bytes | int,
    ) -> None:
        self.disk, self.per_chunk, self.sector, self.chunk = disk, per_chunk, sector, per_chunk * sector
        self.per_table, self.per_file, self.packed, self.base = per_table, per_file, packed, base
        self.old, self.mirror, self.extra, self.fields = old, mirror, extra, fields
        self.chunks = [disk[at : at + self.chunk] for at in range(0, len(disk), self.chunk)]

    def write(self, path: Path) -> Path:
        """Write the segment files beside `path`, which ends like .E01."""
        pieces = [self.chunks[at : at + self.per_file] for at in range(0, len(self.chunks), self.per_file)] or [[]]
        for number, chunks in enumerate(pieces):
            name = path.with_name(path.name[:-2] + f"{number + 1:02d}")
            name.write_bytes(self._file(number, chunks, last=number == len(pieces) - 1))
        return path

    def _file(self, number: int, chunks: Sequence[bytes], *, last: bool) -> bytes:
        out = bytearray(struct.pack("<8sBHH", b"EVF\x09\x0d\x0a\xff\0", 1, number + 1, 0))

        def add(kind: bytes, body: bytes) -> None:
            out.extend(section(kind, len(out), body))

        words = (len(self.chunks), len(self.disk) // self.sector, self.per_chunk, self.sector)
        if number == 0:
            add(b"header", zlib.compress(b"1\nmain\nc\tn\ta\ne\t\t\n"))
            if not self.fields.get("no_volume"):
                add(b"volume", self.fields.get("volume") or (old_volume(*words) if self.old else volume(*words)))
        elif not self.old:
            add(b"data", self.fields.get("data") or volume(*words))
        for at in range(0, len(chunks), self.per_table):
            first = number * self.per_file + at
            self._table(out, first, chunks[at : at + self.per_table])
        if last:
            for kind, body in self.extra:
                add(kind, body)
            add(b"hash", sealed(hashlib.md5(self.disk).digest() + bytes(16)))
            if not self.old:
                digest = hashlib.md5(self.disk).digest() + hashlib.sha1(self.disk).digest()
                add(b"digest", sealed(digest + bytes(40)))
        add(b"done" if last else b"next", b"")
        return bytes(out)

    def _table(self, out: bytearray, first: int, chunks: Sequence[bytes]) -> None:
        head = 76 + 24 + 4 * len(chunks) if self.old else 76
        at, entries, stored = len(out) + head, b"", b""
        for number, chunk in enumerate(chunks, first):
            pack = self.old or self.packed(number)
            entries += struct.pack("<I", (at + len(stored) - self.base) | (pack << 31))
            stored += zlib.compress(chunk) if pack else sealed(chunk)
        top = sealed(struct.pack("<I4xQ4x", len(chunks), self.base))
        if self.old:
            out.extend(section(b"table", len(out), top + entries + stored))
            return
        out.extend(section(b"sectors", len(out), stored))
        out.extend(section(b"table", len(out), top + sealed(entries)))
        if self.mirror:
            out.extend(section(b"table2", len(out), top + sealed(entries)))


def disk(size: int) -> bytes:
    """Text, what does not compress, zeroes."""
    return b"".join(
        (data(("ewf", at), 4 * KIB), (b"%08d text " % at * 300)[: 4 * KIB], bytes(4 * KIB))[at % 3]
        for at in range(-(-size // (4 * KIB)))
    )[:size]


def handmade(**words: object) -> Callable[[Path], tuple[Path, bytes]]:
    def make(folder: Path) -> tuple[Path, bytes]:
        want = disk(92 * KIB + 1024)
        return Made(want, **words).write(folder / "d.E01"), want  # type: ignore[arg-type]

    return make


def peers(folder: Path) -> tuple[Path, bytes]:
    """Three segment files, as EnCase 6 writes them."""
    raw = folder / "disk.raw"
    raw.write_bytes(want := content(little_disk(7 * 1024 * KIB)))
    run("sh", "-c", f"ewfacquirestream -q -t {folder}/disk -f encase6 -c none -S 1048576 < {raw}")
    raw.unlink()
    return folder / "disk.E01", want


DISKS = [
    DiskCase("ewfacquirestream", peers),
    DiskCase("ewf-tables", handmade()),
    DiskCase("ewf-segments", handmade(per_file=7, per_chunk=3)),
    DiskCase("ewf-old", handmade(old=True, per_file=11)),
    DiskCase("ewf-base", handmade(base=50, mirror=False, per_chunk=16)),
]
ALLOCATORS: list[AllocatorCase] = []
