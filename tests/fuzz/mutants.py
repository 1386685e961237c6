"""Structure-aware mutants of small images: seeded, so that number N of a format is the same everywhere.

Data is told from metadata by the extents of the good image; mutations hit metadata: fields of 1 to 8 bytes get values that
break readers (0, 1, all ones, sign bits, neighbours, sizes, other fields' values), pieces of tables are copied, zeroed or
swapped, files are cut and grown. Checksums are mended in most mutants, so that readers do not stop at the first of them.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from diskmorph.formats.crc32c import crc32c
from diskmorph.formats.extents import DATA
from diskmorph.formats.registry import open_disk

FIXTURES = Path(__file__).parents[2] / "fixtures"


class Subject(NamedTuple):
    """An image to be mutated: its bytes, the ranges of it that are metadata, and how checksums are mended."""

    name: str
    format: str
    suffix: str
    blob: bytes
    ranges: list[tuple[int, int]]
    mend: Callable[[bytearray], None]
    content: bytes


def _nothing(_: bytearray) -> None:
    pass


def _mend_vhd(blob: bytearray) -> None:
    """Make the sums of footers and dynamic header right again."""
    places = [(len(blob) - 512, 512, 64), (0, 512, 64), (512, 1024, 36)]
    for at, size, field in places:
        if at < 0 or blob[at : at + 8] not in (b"conectix", b"cxsparse"):
            continue
        blob[at + field : at + field + 4] = bytes(4)
        total = ~sum(blob[at : at + size]) & 0xFFFFFFFF
        struct.pack_into(">I", blob, at + field, total)


def _mend_vhdx(blob: bytearray) -> None:
    """Make the CRCs of headers and region tables right again."""
    for at, size in ((0x10000, 4096), (0x20000, 4096), (0x30000, 0x10000), (0x40000, 0x10000)):
        if blob[at : at + 4] in (b"head", b"regi") and len(blob) >= at + size:
            blob[at + 4 : at + 8] = bytes(4)
            struct.pack_into("<I", blob, at + 4, crc32c(bytes(blob[at : at + size])))


MENDERS: dict[str, Callable[[bytearray], None]] = {"vhd": _mend_vhd, "vhdx": _mend_vhdx}


def subject(path: Path, format: str) -> Subject:
    blob = path.read_bytes()
    data: list[tuple[int, int]] = []
    with open_disk(path, format=format) as disk:
        content = disk.read(0, disk.size)
        for batch in disk.extents():
            for row in batch[batch["kind"] == DATA]:
                start = int(row["offset"])
                length = int(row["length"]) if not row["codec"] else min(int(row["stored"]), 4096)
                data.append((start, start + length))
    ranges = []
    at = 0
    for start, stop in [*sorted(data), (len(blob), len(blob))]:
        if start > at:
            ranges.append((at, min(start, len(blob))))
        at = max(at, stop)
    used = [(a, b) for a, b in ranges if any(blob[a:b])]
    return Subject(
        path.name, format, path.suffix, blob, used or [(0, len(blob))], MENDERS.get(format, _nothing), content
    )


def _value(rng: random.Random, size: int, blob: bytearray, at: int, ends: str) -> int:
    top = (1 << 8 * size) - 1
    old = int.from_bytes(blob[at : at + size], "little" if ends == "<" else "big")
    file = len(blob)
    choices = (
        0,
        1,
        top,
        top >> 1,
        (top >> 1) + 1,
        old + 1,
        old - 1,
        old ^ (1 << rng.randrange(8 * size)),
        old << 8,
        old >> 8,
        file,
        file // 512,
        file - 1,
        rng.randrange(top + 1),
        old * 2,
        rng.choice((2, 3, 7, 8, 9, 63, 64, 255, 256, 511, 513, 4096, 65536)),
    )
    return rng.choice(choices) & top


def _some_place(rng: random.Random, it: Subject, blob: bytearray) -> int:
    """A metadata byte, mostly one near others that are not zero."""
    start, stop = rng.choice(it.ranges)
    stop = min(stop, len(blob) - 8)
    if stop <= start:
        return 0
    for _ in range(8):
        at = rng.randrange(start, stop)
        if any(blob[max(at - 8, start) : at + 8]):
            return at
    return start + min(rng.randrange(512), stop - start - 1)


def mutant(it: Subject, number: int) -> bytes:
    """Return mutant `number` of a subject."""
    rng = random.Random(f"{it.name}/{number}")
    blob = bytearray(it.blob)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        kind = rng.randrange(12)
        at = _some_place(rng, it, blob)
        if kind < 7:
            size, ends = rng.choice((1, 2, 4, 4, 8, 8)), rng.choice("<>")
            at -= at % size if rng.random() < 0.9 else 0
            value = _value(rng, size, blob, at, ends)
            blob[at : at + size] = value.to_bytes(size, "little" if ends == "<" else "big")
        elif kind == 7:
            length = rng.choice((4, 8, 16, 64, 512))
            other = _some_place(rng, it, blob)
            blob[at : at + length] = blob[other : other + length].ljust(length, b"\0")
        elif kind == 8:
            length = rng.choice((4, 8, 64, 512, 4096))
            blob[at : at + length] = bytes(min(length, len(blob) - at))
        elif kind == 9:
            del blob[rng.choice((at, at // 512 * 512, rng.randrange(len(blob)))) :]
        elif kind == 10:
            blob += rng.randbytes(rng.choice((1, 511, 512, 70000)))
        else:
            length = rng.choice((8, 64))
            blob[at : at + length] = rng.randbytes(min(length, max(len(blob) - at, 0)))
        if len(blob) < 16:
            break
    if rng.random() < 0.8:
        it.mend(blob)
    return bytes(blob)
