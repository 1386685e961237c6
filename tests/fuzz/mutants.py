"""Structure-aware mutants of small images: seeded, so that number N of a subject is the same everywhere.

Mutations hit metadata: fields of 1 to 8 bytes get values that break readers (0, 1, all ones, sign bits, neighbours, sizes,
other fields' values), pieces of tables are copied, zeroed or swapped, files are cut and grown; text loses, doubles and
swaps words. Checksums are mended in most mutants, so that readers do not stop at the first of them.
"""

from __future__ import annotations

import random
import re

from subjects import Subject

_TEXT = (b"# Disk", b"<?xml", b"<Envelope", b"[", b"{")


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


class Places:
    """Where a subject is hit: mostly near metadata that is not zero, each range as likely as another."""

    def __init__(self, it: Subject) -> None:
        self._ranges = it.ranges
        self._used = []
        for start, stop in it.ranges:
            blob = it.blob[start:stop]
            words = [start + match.start() // 8 * 8 for match in re.finditer(rb"[^\0]{1,8}", blob[: 1 << 20])]
            self._used.append(words or [start])

    def some(self, rng: random.Random, blob: bytearray) -> tuple[int, int]:
        """A place, and how many bytes of metadata there are from it on."""
        number = rng.randrange(len(self._ranges))
        start, stop = self._ranges[number]
        at = rng.choice(self._used[number]) + rng.randrange(8) if rng.random() < 0.85 else rng.randrange(start, stop)
        at = max(min(at, len(blob) - 8, stop - 1), 0)
        return at, max(min(stop, len(blob)) - at, 0)


def _words(rng: random.Random, blob: bytearray) -> bytearray:
    """A text with a line or word lost, doubled or swapped, or a number made something else."""
    parts = re.split(rb"(\n|[ <>=\",:]|\d+)", bytes(blob))
    at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    kind = rng.randrange(5)
    if kind == 0:
        del parts[at : at + rng.choice((1, 2, 8))]
    elif kind == 1:
        parts[at:at] = parts[at : at + rng.choice((2, 9, 40))] * rng.choice((1, 2, 50))
    elif kind == 2:
        parts[at], parts[other] = parts[other], parts[at]
    else:
        numbers = [index for index, part in enumerate(parts) if part.isdigit()] or [at]
        wild = (b"0", b"-1", b"1e9", b"18446744073709551616", b"999999999999", b"4294967295", b"\xff\xfe", b"")
        parts[rng.choice(numbers)] = rng.choice(wild)
    return bytearray(b"".join(parts))


def mutant(it: Subject, places: Places, number: int) -> bytes:
    """Return mutant `number` of a subject."""
    rng = random.Random(f"{it.name}/{number}")
    blob = bytearray(it.blob)
    text = it.blob.lstrip()[:16].startswith(_TEXT)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        blob = _words(rng, blob) if text and rng.random() < 0.7 else _hit(rng, places, blob)
        if len(blob) < 16:
            break
    if rng.random() < 0.8:
        it.mend(blob)
    return bytes(blob)


def _hit(rng: random.Random, places: Places, blob: bytearray) -> bytearray:
    kind = rng.randrange(12)
    at, room = places.some(rng, blob)
    if kind < 7:
        size, ends = rng.choice((1, 2, 4, 4, 8, 8)), rng.choice("<>")
        at -= at % size if rng.random() < 0.9 else 0
        value = _value(rng, size, blob, at, ends).to_bytes(size, "little" if ends == "<" else "big")
        blob[at : at + min(size, room)] = value[:room]
    elif kind == 7:
        length = rng.choice((4, 8, 16, 64, 512))
        other, more = places.some(rng, blob)
        piece = bytes(blob[other : other + min(length, room, more)])
        blob[at : at + len(piece)] = piece
    elif kind == 8:
        length = min(rng.choice((4, 8, 64, 512)), room)
        blob[at : at + length] = bytes(length)
    elif kind == 9:
        del blob[rng.choice((at, at // 512 * 512, rng.randrange(len(blob)))) :]
    elif kind == 10:
        blob += rng.randbytes(rng.choice((1, 511, 512, 70000)))
    else:
        length = min(rng.choice((8, 64)), room)
        blob[at : at + length] = rng.randbytes(length)
    return blob


def patches(old: bytes, new: bytes, near: int = 8) -> list[tuple[int, bytes]]:
    """What distinguishes two versions of a file: (offset, bytes), a last one with nothing for a cut."""
    found: list[list[int]] = []
    for at in range(0, min(len(old), len(new)), 4096):
        if old[at : at + 4096] == new[at : at + 4096]:
            continue
        for index in range(at, min(at + 4096, len(old), len(new))):
            if old[index] != new[index]:
                if found and index - found[-1][1] <= near:
                    found[-1][1] = index + 1
                else:
                    found.append([index, index + 1])
    pieces = [(start, new[start:stop]) for start, stop in found]
    if len(new) < len(old):
        pieces.append((len(new), b""))
    elif len(new) > len(old):
        pieces.append((len(old), new[len(old) :]))
    return pieces
