"""Buffers: how a window's bytes lie in memory, what in them is zero, and which ranges meet where they are written."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.convert.windows import READ
from diskmorph.formats.allocator import RUN
from diskmorph.formats.extents import ABSENT, DATA, ZERO
from diskmorph.formats.rows import chosen, distinct
from diskmorph.formats.rows import joined as all_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.convert.windows import Window

FINE = 4096
"""Unit of zero detection within what is read, unless a smaller one is asked for."""

# A range of the disk that lies at `at` in a buffer.
PIECE = np.dtype([("start", "<u8"), ("length", "<u8"), ("at", "<u8")], align=True)


def new_buffer(size: int) -> memoryview:
    """Return page-aligned memory of `size` bytes, reading zero."""
    return memoryview(mmap.mmap(-1, size))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the READ ranges of a window lie in its buffer: `pieces`, each at a multiple of some pad; `size` in all."""

    pieces: NDArray[np.void]
    size: int


def layout(segments: NDArray[np.void], pad: int) -> Layout:
    """Lay out the READ segments one after another, neighbours joined."""
    if len(segments) == 1:
        return _one_piece(segments, pad)
    reads = chosen(segments, segments["mode"] == READ)
    start, stop = reads["start"], reads["start"] + reads["length"]
    heads = np.concatenate(([True], start[1:] != stop[:-1]))
    first = np.flatnonzero(heads)
    pieces = np.zeros(len(first), PIECE)
    pieces["start"] = start[first]
    pieces["length"] = stop[np.append(first[1:], len(reads)) - 1] - pieces["start"]
    padded = (pieces["length"] + np.uint64(pad - 1)) // np.uint64(pad) * np.uint64(pad)
    pieces["at"] = np.cumsum(padded) - padded
    return Layout(pieces, int(padded.sum()))


def _one_piece(segments: NDArray[np.void], pad: int) -> Layout:
    pieces = np.zeros(1, PIECE)
    pieces["start"], pieces["length"] = segments["start"], segments["length"]
    return Layout(pieces, -(-int(segments["length"][0]) // pad) * pad)


def meet(
    a_start: NDArray[np.uint64], a_stop: NDArray[np.uint64], b_start: NDArray[np.uint64], b_stop: NDArray[np.uint64]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the overlaps of two lists of sorted, disjoint ranges: index into a, index into b, start, stop."""
    if len(a_start) == 1 and len(b_start) == 1:
        zero = np.zeros(1 if a_start[0] < b_stop[0] and b_start[0] < a_stop[0] else 0, np.intp)
        count = len(zero)
        return zero, zero, np.maximum(a_start, b_start)[:count], np.minimum(a_stop, b_stop)[:count]
    first = np.searchsorted(b_stop, a_start, side="right")
    counts = np.searchsorted(b_start, a_stop, side="left") - first
    np.maximum(counts, 0, out=counts)
    index_a = np.repeat(np.arange(len(a_start)), counts)
    turn = np.arange(len(index_a)) - np.repeat(np.cumsum(counts) - counts, counts)
    index_b = first[index_a] + turn
    return (
        index_a,
        index_b,
        np.maximum(a_start[index_a], b_start[index_b]),
        np.minimum(a_stop[index_a], b_stop[index_b]),
    )


def nonzero(buffer: memoryview, fine: int) -> NDArray[np.bool_]:
    """Return for each `fine` bytes of the buffer whether any is not zero; the length is a multiple of `fine`."""
    words = np.frombuffer(buffer, np.uint64).reshape(-1, fine // 8)
    flags: NDArray[np.bool_] = (words[:, 0] | words[:, -1] | words[:, words.shape[1] // 2]) != 0
    if flags.all():  # most data shows in three words of a page: the rest need not be touched
        return flags
    unsure = np.flatnonzero(~flags)
    if len(unsure) * 4 > len(flags):
        return np.bitwise_or.reduce(words, axis=1) != 0  # type: ignore[no-any-return]
    flags[unsure] = np.bitwise_or.reduce(words[unsure], axis=1) != 0
    return flags


def differing(a: memoryview, b: memoryview, step: int) -> NDArray[np.bool_]:
    """Return for each `step` bytes of two buffers whether they differ."""
    words_a, words_b = np.frombuffer(a, np.uint64), np.frombuffer(b, np.uint64)
    flags: NDArray[np.bool_] = (words_a != words_b).reshape(-1, step // 8).any(axis=1)
    return flags


def heads_of(flags: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the indices at which a run of equal values begins."""
    return np.concatenate(([0], np.flatnonzero(flags[1:] != flags[:-1]) + 1))


def without_short_zeroes(flags: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """Return the flags with zero runs of fewer than `least` set to non-zero."""
    heads = heads_of(flags)
    lengths = np.diff(np.append(heads, len(flags)))
    return np.repeat(flags[heads] | (lengths < least), lengths)


def ranges(pieces: NDArray[np.void], flags: NDArray[np.bool_], granule: int) -> NDArray[np.void]:
    """Return PIECE rows of the runs in which flags are set; flag i stands for `granule` bytes of the buffer."""
    starts, stops_, at, on = _runs(pieces, flags, granule)
    out = np.zeros(int(on.sum()), PIECE)
    out["start"], out["length"], out["at"] = starts[on], (stops_ - starts)[on], at[on]
    return out


def _runs(
    pieces: NDArray[np.void], values: NDArray[np.generic], granule: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.generic]]:
    """Cut the pieces where values change: return disk start, disk stop, buffer position and value of each run."""
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    if len(pieces) == 1:
        heads = np.concatenate(([0], changes)).astype(np.uint64)
    else:
        heads = distinct(np.concatenate([changes, (pieces["at"] // np.uint64(granule)).astype(np.intp)])).astype(
            np.uint64
        )
    at = heads * np.uint64(granule)
    owner = np.searchsorted(pieces["at"], at, side="right") - 1
    starts = pieces["start"][owner] + at - pieces["at"][owner]
    ends = pieces["start"][owner] + pieces["length"][owner]
    span = np.append(heads[1:], len(values)).astype(np.uint64) * np.uint64(granule) - at
    return starts, np.minimum(starts + span, ends), at, values[heads.astype(np.intp)]


def runs_of(pieces: NDArray[np.void], kinds: NDArray[np.uint8], granule: int) -> NDArray[np.void]:
    """Return RUN rows for the pieces, kind i standing for `granule` bytes of the buffer."""
    if len(kinds) == 1 or (len(pieces) == 1 and (kinds == kinds[0]).all()):
        runs = np.zeros(1, RUN)
        runs["start"], runs["length"], runs["kind"] = pieces["start"], pieces["length"], kinds[0]
        return runs
    starts, ends, _, values = _runs(pieces, kinds, granule)
    runs = np.zeros(len(starts), RUN)
    runs["start"], runs["length"], runs["kind"] = starts, ends - starts, values
    return runs


def with_segments(window: Window, runs: NDArray[np.void] | None) -> NDArray[np.void]:
    """Return the RUN rows of a whole window: those that were read, and the segments that were not, in order."""
    if runs is not None and window.read == window.stop - window.start:
        return runs
    rest = window.segments if runs is None else chosen(window.segments, window.segments["mode"] != READ)
    if not len(rest) and runs is not None:
        return runs
    out = np.zeros(len(rest), RUN)
    out["start"], out["length"], out["kind"] = rest["start"], rest["length"], rest["kind"]
    if runs is None:
        return out
    whole = all_of([out, runs])
    return whole.take(np.argsort(whole["start"], kind="stable"))


def joined(runs: NDArray[np.void]) -> NDArray[np.void]:
    """Return plain RUN rows with those of one kind merged that touch each other."""
    if len(runs) < 2:
        return runs
    apart = runs["start"][1:] != runs["start"][:-1] + runs["length"][:-1]
    heads = np.concatenate(([0], np.flatnonzero(apart | (runs["kind"][1:] != runs["kind"][:-1])) + 1))
    if len(heads) == len(runs):
        return runs
    out = runs.take(heads)
    out["length"] = np.add.reduceat(runs["length"], heads)
    return out


__all__ = ["ABSENT", "DATA", "FINE", "PIECE", "ZERO"]
