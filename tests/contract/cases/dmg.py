"""UDIF images made byte by byte: every kind of chunk, tables out of order, the checksums that hdiutil records."""

from __future__ import annotations

import base64
import bz2
import lzma
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from testkit import KIB, AllocatorCase, DiskCase, data

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

ZERO, RAW, IGNORE, ADC, ZLIB, BZIP2, LZFSE, XZ = 0, 1, 2, 0x80000004, 0x80000005, 0x80000006, 0x80000007, 0x80000008
SECTOR = 512


def adc(unit: bytes) -> bytes:
    """ADC, plainly: runs become matches of each of the two kinds, the rest literals."""
    out, at, held = bytearray(), 0, bytearray()

    def flush() -> None:
        for start in range(0, len(held), 128):
            piece = held[start : start + 128]
            out.append(0x80 | len(piece) - 1)
            out.extend(piece)
        held.clear()

    while at < len(unit):
        best, where = 0, 0
        for distance in (1, 2, 7, 64, 1000, 5000, 40_000):
            if distance > at:
                break
            count = 0
            while count < 67 and at + count < len(unit) and unit[at + count] == unit[at + count - distance]:
                count += 1
            if count > best:
                best, where = count, distance
        if best >= 4 and (best > 18 or where > 1024):
            flush()
            out += bytes([0x40 | best - 4]) + struct.pack(">H", where - 1)
        elif best >= 3 and where <= 1024:
            flush()
            best = min(best, 18)
            out += bytes([(best - 3) << 2 | (where - 1) >> 8, (where - 1) & 0xFF])
        else:
            held.append(unit[at])
            best = 1
        at += best
    flush()
    return bytes(out)


def lzfse(unit: bytes) -> bytes:
    from imagecodecs import lzfse_encode

    return bytes(lzfse_encode(unit))


PACK: dict[int, Callable[[bytes], bytes]] = {
    RAW: bytes,
    ADC: adc,
    ZLIB: zlib.compress,
    BZIP2: bz2.compress,
    LZFSE: lzfse,
    XZ: lzma.compress,
}


class Part(NamedTuple):
    """A partition: its chunks as (kind, content, or for ZERO and IGNORE its sectors)."""

    name: str
    chunks: Sequence[tuple[int, bytes | int]]


def udif(
    path: Path,
    parts: Sequence[Part],
    *,
    front: bytes = b"",
    order: Callable[[list[tuple[str, bytes, bytes]]], list[tuple[str, bytes, bytes]]] = list,
    fork: bool = False,
    sums: bool = True,
    sectors: int | None = None,
    change: Callable[[int, list[tuple[int, ...]]], None] = lambda _n, _rows: None,
    xml: Callable[[bytes], bytes] = bytes,
    tail: bytes = b"",
    segments: int = 1,
    version: int = 4,
) -> bytes:
    """Write an image; `front` are bytes before the data fork, `order` permutes the tables' list, `change` edits chunks."""
    store, want = bytearray(), bytearray()
    tables: list[tuple[str, bytes, bytes]] = []
    for number, (name, chunks) in enumerate(parts):
        first, rows, crc = len(want) // SECTOR, [], 0
        for kind, what in chunks:
            content = bytes(what * SECTOR) if isinstance(what, int) else what
            packed = b"" if isinstance(what, int) else PACK[kind](content)
            start = len(want) // SECTOR - first
            rows.append((kind, 0, start, len(content) // SECTOR, len(store), len(packed)))
            crc = crc if kind == IGNORE else zlib.crc32(content, crc)
            store += packed
            want += content
        count = len(want) // SECTOR - first
        rows.insert(1, (0x7FFFFFFE, 0x2B626567, rows[0][3], 0, 0, 0))  # a comment, as old versions write them
        rows.append((0xFFFFFFFF, 0, count, 0, len(store), 0))
        change(number, rows)
        checksum = struct.pack(">III", 2, 32, crc).ljust(136, b"\0") if sums else bytes(136)
        head = struct.pack(">4sIQQQII24x", b"mish", 1, first, count, 0, 520, number) + checksum
        table = head + struct.pack(">I", len(rows)) + b"".join(struct.pack(">IIQQQQ", *r) for r in rows)
        tables.append((name, table, struct.pack(">I", crc)))
    tables = order(tables)
    body = front + bytes(store)
    extra = _fork([t[1] for t in tables]) if fork else xml(_plist([_entry(*t[:2]) for t in tables]))
    marks = b"".join(t[2] for t in tables)
    total = len(want) // SECTOR if sectors is None else sectors

    def crc_of(what: bytes) -> bytes:
        return struct.pack(">III", 2, 32, zlib.crc32(what)).ljust(136, b"\0") if sums else bytes(136)

    place = (len(body), len(extra))
    koly = struct.pack(">4sIIIQQQ", b"koly", version, 512, 1, 0, len(front), len(store))
    koly += struct.pack(">QQ", *(place if fork else (0, 0))) + struct.pack(">II16s", 1, segments, bytes(range(16)))
    koly += crc_of(bytes(store)) + struct.pack(">QQ120x", *((0, 0) if fork else place))
    koly += crc_of(marks) + struct.pack(">IQ12x", 1, total)
    path.write_bytes(body + extra + koly + tail)
    return bytes(want)


def _entry(name: str, table: bytes) -> bytes:
    text = base64.encodebytes(table).decode().replace("\n", "\n\t\t\t\t")
    return (
        "\t\t\t<dict>\n\t\t\t\t<key>Attributes</key>\n\t\t\t\t<string>0x0050</string>\n"
        f"\t\t\t\t<key>CFName</key>\n\t\t\t\t<string>{name}</string>\n"
        f"\t\t\t\t<key>Data</key>\n\t\t\t\t<data>\n\t\t\t\t{text}</data>\n"
        f"\t\t\t\t<key>ID</key>\n\t\t\t\t<string>0</string>\n\t\t\t\t<key>Name</key>\n\t\t\t\t<string>{name}</string>\n"
        "\t\t\t</dict>\n"
    ).encode()


def _plist(entries: Sequence[bytes]) -> bytes:
    return (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" '
        b'"http://www.apple.com/DTDs/PropertyList-1.0.dtd">\n<plist version="1.0">\n<dict>\n'
        b"\t<key>resource-fork</key>\n\t<dict>\n\t\t<key>blkx</key>\n\t\t<array>\n"
        + b"".join(entries)
        + b"\t\t</array>\n\t\t<key>plst</key>\n\t\t<array>\n\t\t\t<dict>\n\t\t\t\t<key>Data</key>\n"
        b"\t\t\t\t<data>\n\t\t\t\tAAAAAAAAAAA=\n\t\t\t\t</data>\n\t\t\t</dict>\n\t\t</array>\n\t</dict>\n</dict>\n</plist>\n"
    )


def _fork(tables: Sequence[bytes]) -> bytes:
    held = b"".join(struct.pack(">I", len(table)) + table for table in tables)
    return struct.pack(">IIII", 256, 256 + len(held), len(held), 50).ljust(256, b"\0") + held + bytes(50)


def text(seed: int, length: int) -> bytes:
    return b"".join(b"%d line %d\n" % (seed, i) for i in range(length // 8))[:length]


def parts(kind: int, unit: int = 64 * KIB) -> list[Part]:
    """Partitions with chunks of a kind, of different lengths, and all that stands for zeroes between them."""
    half = bytes(unit // 2)
    return [
        Part("MBR", [(kind, data(("mbr", kind), SECTOR))]),
        Part("free", [(IGNORE, 39)]),
        Part(
            "disk image (Apple_HFS : 2)",
            [
                (kind, text(kind, unit)),
                (kind, data((kind, 1), unit // 2) + half),
                (ZERO, 2 * unit // SECTOR),
                (RAW, data((kind, 2), unit)),
                (kind, half + text(7, unit // 2)),
                (IGNORE, 8),
                (kind, text(8, 3 * SECTOR)),
            ],
        ),
        Part("tail", [(kind, data((kind, "tail"), 7 * SECTOR))]),
    ]


NAMES = {RAW: "raw", ADC: "adc", ZLIB: "zlib", BZIP2: "bzip2", LZFSE: "lzfse", XZ: "xz"}


def of_kind(kind: int) -> Callable[[Path], tuple[Path, bytes]]:
    def make(folder: Path) -> tuple[Path, bytes]:
        path = folder / "d.dmg"
        return path, udif(path, parts(kind, 32 * KIB if kind == ADC else 64 * KIB))

    return make


def mixed(folder: Path) -> tuple[Path, bytes]:
    """Every codec in one image, tables in reverse, bytes before the data fork and behind the trailer."""
    path = folder / "d.dmg"
    whole = [part for kind in (ZLIB, BZIP2, XZ, ADC, RAW) for part in parts(kind, 16 * KIB)]
    return path, udif(path, whole, order=lambda t: t[::-1], front=b"front" * 99, tail=bytes(300))


def forked(folder: Path) -> tuple[Path, bytes]:
    path = folder / "d.dmg"
    return path, udif(path, parts(ZLIB, 16 * KIB), fork=True)


DISKS = [
    *(DiskCase(f"dmg-{name}", of_kind(kind)) for kind, name in NAMES.items()),
    DiskCase("dmg-mixed", mixed),
    DiskCase("dmg-resource-fork", forked),
]
ALLOCATORS: list[AllocatorCase] = []
