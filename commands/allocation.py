"""How much of each part of a disk is data, compressed data, zeroes or nothing; and a drawing of it in characters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.commands.output import printable
from diskmorph.commands.text import size_text
from diskmorph.formats.extents import DATA, PLAIN, ZERO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.disk import Disk

PLAIN_DATA, BELOW, ENCODED, ZEROES, NOTHING = range(5)
CLASSES = ("data", "data of a layer below", "compressed data", "zeroes", "not allocated")
"""What a byte of a disk can be; the index is its class."""


@dataclass(frozen=True, slots=True)
class Tally:
    """`size` bytes in equal cells (the last may be shorter); `share[class, cell]` is a cell's part of each class."""

    size: int
    share: NDArray[np.float64]
    totals: tuple[int, ...]
    extents: int

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return int(self.share.shape[1])


def tally(disk: Disk, cells: int) -> Tally:
    """Count a disk into at most `cells` cells. Raises FormatError where the map is damaged."""
    size = disk.size
    step = max(-(-size // cells), 1)
    count = -(-size // step)
    amount = np.zeros((len(CLASSES), count), np.float64)  # bytes of each class in each cell
    totals = np.zeros(len(CLASSES), np.uint64)
    extents = 0
    for batch in disk.extents():
        extents += len(batch)
        kinds = _classes(batch)
        for kind in range(len(CLASSES)):
            rows = batch[kinds == kind]
            if len(rows):
                totals[kind] += rows["length"].sum(dtype=np.uint64)
                _spread(amount[kind], rows["start"], rows["start"] + rows["length"], step)
    filled = np.minimum(np.arange(1, count + 1) * float(step), float(size)) - np.arange(count) * float(step)
    return Tally(size, amount / filled, tuple(int(total) for total in totals), extents)


def _classes(rows: NDArray[np.void]) -> NDArray[np.int64]:
    data = np.where(rows["codec"] != PLAIN, ENCODED, np.where(rows["depth"] > 0, BELOW, PLAIN_DATA))
    rest = np.where(rows["kind"] == ZERO, ZEROES, NOTHING)
    return np.where(rows["kind"] == DATA, data, rest)


def _spread(amount: NDArray[np.float64], starts: NDArray[np.uint64], stops: NDArray[np.uint64], step: int) -> None:
    """Add the bytes of ranges to the cells that they cover: whole cells by differences, edges by themselves."""
    first, last = (
        (starts // np.uint64(step)).astype(np.int64),
        ((stops - np.uint64(1)) // np.uint64(step)).astype(np.int64),
    )
    one = first == last
    np.add.at(amount, first[one], (stops[one] - starts[one]).astype(np.float64))
    many = ~one
    first, last, starts, stops = first[many], last[many], starts[many], stops[many]
    np.add.at(amount, first, (first + 1) * float(step) - starts.astype(np.float64))
    np.add.at(amount, last, stops.astype(np.float64) - last * float(step))
    for a, b in zip(first.tolist(), last.tolist(), strict=True):  # at most one range a cell begins here
        amount[a + 1 : b] += step


# --- in characters

_GLYPHS = ("#", "b", "c", "0", ".")
_COLOURS = ("32", "34", "35", "36", "90")


def drawing(found: Tally, name: str, *, width: int, colour: bool) -> Iterator[str]:
    """Yield the lines of a drawing: a row of cells after the disk offset where it begins, then a legend with sums.

    A cell shows the class that matters most in it: data wherever there is any.
    """
    label = max(len(size_text(found.size)), 8)
    across = max(16, (width - label - 2) // 8 * 8)
    yield f"{printable(name)}: {size_text(found.size)}, {found.extents} extents"
    if not found.size:
        return
    shown = _regrouped(found, across * 16)
    step = -(-found.size // shown.shape[1])
    best = np.argmax(shown > 0, axis=0)  # the first class that is there at all
    rows = [best[at : at + across].tolist() for at in range(0, len(best), across)]
    at = 0
    while at < len(rows):
        yield f"{size_text(at * across * step):>{label}}  " + _paint(rows[at], colour=colour)
        like = next((i for i in range(at + 1, len(rows)) if rows[i] != rows[at]), len(rows)) - at - 1
        if like > 2:
            yield f"{'...':>{label}}  {like} more rows like that"
        at += like + 1 if like > 2 else 1
    yield ""
    yield f"one character is {size_text(step)}"
    for kind, word in enumerate(CLASSES):
        if found.totals[kind]:
            share = found.totals[kind] / found.size
            yield f"  {_paint([kind], colour=colour)} {word:<22} {size_text(found.totals[kind]):>10}  {share:7.2%}"


def _paint(classes: list[int], *, colour: bool) -> str:
    text = "".join(_GLYPHS[kind] for kind in classes)
    if not colour:
        return text
    parts: list[str] = []
    start = 0
    for at in range(1, len(classes) + 1):
        if at == len(classes) or classes[at] != classes[start]:
            parts.append(f"\x1b[{_COLOURS[classes[start]]}m{text[start:at]}")
            start = at
    return "".join(parts) + "\x1b[0m"


def _regrouped(found: Tally, most: int) -> NDArray[np.float64]:
    """Return the shares of fewer, larger cells: at most `most`."""
    group = max(-(-found.cells // most), 1)
    pad = -found.cells % group
    share = np.pad(found.share, ((0, 0), (0, pad)))
    grouped: NDArray[np.float64] = share.reshape(len(CLASSES), -1, group).mean(axis=2)
    return grouped
