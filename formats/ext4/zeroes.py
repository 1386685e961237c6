"""Finds blocks of files that hold only zeroes, so that they need not be stored.

Content is read in large windows, whatever number of files lies in one; everything after that is done on arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.source import ByteSource

# A piece of a file's content: `length` bytes of file number `owner` from its byte `start`, at `offset` of a source.
PIECE = np.dtype([("owner", "<i8"), ("start", "<i8"), ("length", "<i8"), ("offset", "<i8"), ("source", "<i8")])

_SECTOR = 512
_WINDOW = 8 << 20
_GAP = 64 << 10  # bytes between pieces that are read over rather than around


def without_zeroes(pieces: NDArray[np.void], sources: Sequence[ByteSource], block: int) -> NDArray[np.void]:
    """Return pieces (sorted by owner and start) with the whole blocks of zeroes cut out of them.

    A block is a whole one of its file's, or what the file's end leaves of it. Pieces whose place in the source is not
    on a sector, or which do not begin on a block of their file, stay as they are.
    """
    if not len(pieces):
        return pieces
    fit = (pieces["offset"] % _SECTOR == 0) & (pieces["start"] % block == 0)
    order = np.flatnonzero(fit)
    order = order[np.lexsort((pieces["offset"][order], pieces["source"][order]))]
    kept = [pieces[~fit]]
    at = 0
    while at < len(order):
        stop = _window_end(pieces, order, at)
        chosen = pieces[order[at:stop]]
        source = sources[int(chosen["source"][0])]
        kept.extend(_scan(chosen, source, block))
        at = stop
    out = np.concatenate(kept)
    ordered: NDArray[np.void] = out[np.lexsort((out["start"], out["owner"]))]
    return ordered


def _window_end(pieces: NDArray[np.void], order: NDArray[np.int64], at: int) -> int:
    """Return how far `order` goes from `at` in one source, within a window and without large gaps."""
    ahead = order[at : at + 65536]
    begins = pieces["offset"][ahead]
    ends = begins + pieces["length"][ahead]
    fits = (pieces["source"][ahead] == pieces["source"][ahead[0]]) & (ends <= begins[0] + _WINDOW)
    fits[1:] &= begins[1:] - ends[:-1] <= _GAP
    fits[0] = True
    misfit = np.flatnonzero(~fits)
    return at + (int(misfit[0]) if len(misfit) else len(ahead))


def _scan(chosen: NDArray[np.void], source: ByteSource, block: int) -> list[NDArray[np.void]]:
    base = int(chosen["offset"][0])
    length = int((chosen["offset"] + chosen["length"]).max()) - base
    if length > _WINDOW:  # one long piece
        return _scan_long(chosen, source, block)
    filled = _filled_sectors(source, base, length)
    counts = np.concatenate(([0], np.cumsum(filled, dtype=np.int64)))
    blocks = -(-chosen["length"] // block)
    row = np.repeat(np.arange(len(chosen)), blocks)
    number = np.arange(len(row)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    first = (chosen["offset"][row] - base + number * block) // _SECTOR
    ends = np.minimum((number + 1) * block, chosen["length"][row])
    last = -(-(chosen["offset"][row] - base + ends) // _SECTOR)
    data = counts[last] > counts[first]
    if data.all():
        return [chosen]
    return [_data_runs(chosen, row, number, data, block)]


def _data_runs(
    chosen: NDArray[np.void], row: NDArray[Any], number: NDArray[Any], data: NDArray[np.bool_], block: int
) -> NDArray[np.void]:
    """Return the runs of blocks that hold data as pieces; `row` and `number` say which piece's which block each is."""
    before = np.concatenate(([False], data[:-1])) & np.concatenate(([False], row[1:] == row[:-1]))
    after = np.concatenate((data[1:], [False])) & np.concatenate((row[1:] == row[:-1], [False]))
    heads, tails = np.flatnonzero(data & ~before), np.flatnonzero(data & ~after)
    out = chosen[row[heads]].copy()
    skip = number[heads] * block
    end = np.minimum((number[tails] + 1) * block, out["length"])
    out["start"] += skip
    out["offset"] += skip
    out["length"] = end - skip
    return np.asarray(out)


def _scan_long(chosen: NDArray[np.void], source: ByteSource, block: int) -> list[NDArray[np.void]]:
    out: list[NDArray[np.void]] = []
    for piece in chosen:
        for skip in range(0, int(piece["length"]), _WINDOW):
            part = np.array([piece], chosen.dtype)
            part["start"] += skip
            part["offset"] += skip
            part["length"] = min(_WINDOW, int(piece["length"]) - skip)
            out.extend(_scan(part, source, block))
    return [joined(np.concatenate(out))] if out else []


def joined(pieces: NDArray[np.void]) -> NDArray[np.void]:
    """Return sorted pieces with those merged that continue each other in the file and in the source."""
    if len(pieces) < 2:
        return pieces
    a, b = pieces[:-1], pieces[1:]
    same = (a["owner"] == b["owner"]) & (a["source"] == b["source"])
    same &= (a["start"] + a["length"] == b["start"]) & (a["offset"] + a["length"] == b["offset"])
    heads = np.concatenate(([0], np.flatnonzero(~same) + 1))
    out = pieces[heads].copy()
    out["length"] = np.add.reduceat(pieces["length"], heads)
    return out


def _filled_sectors(source: ByteSource, base: int, length: int) -> NDArray[np.bool_]:
    whole = -(-length // _SECTOR) * _SECTOR
    buffer = np.zeros(whole, np.uint8)
    source.read_into(base, buffer.data[:length])
    return np.asarray(np.any(buffer.view(np.uint64).reshape(-1, _SECTOR // 8), axis=1))
