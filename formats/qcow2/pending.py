"""Runs that were placed, kept until their L2 tables are written: a few bytes a run, never one entry a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.extents import ZERO
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.rows import copied, joined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_U = np.uint64

PENDING = np.dtype(
    [
        ("start", "<u8"),  # number of the first grain
        ("count", "<u8"),  # grains
        ("offset", "<u8"),  # where the first grain lies in the file, 0 if nowhere; or a compressed entry whole
        ("kind", "u1"),  # DATA or ZERO
    ]
)


class Pending:
    """Placed runs in ascending order, taken out again from the front."""

    def __init__(self, grain: int) -> None:
        self._grain = grain
        self._parts: list[NDArray[np.void]] = []

    def add(self, rows: NDArray[np.void]) -> None:
        """Add the rows of one `place` call; they lie behind all that was added by earlier calls."""
        if len(rows):
            self._parts.append(rows)

    def _all(self) -> NDArray[np.void]:
        if not self._parts:
            return np.zeros(0, PENDING)
        rows = joined(self._parts)
        starts = rows["start"]
        if (starts[1:] < starts[:-1]).any():
            rows = rows.take(np.argsort(starts, kind="stable"))
        self._parts = [rows]
        return rows

    def take(self, upto: int) -> NDArray[np.void]:
        """Remove and return what lies before grain `upto`, the last run cut there."""
        rows = self._all()
        count = int(np.searchsorted(rows["start"], _U(upto)))
        out = rows[:count]
        rest = rows[count:]
        over = int(out["start"][-1] + out["count"][-1]) - upto if count else 0
        if over > 0:
            out = copied(out)
            tail = out[-1:].copy()
            kept = int(tail["count"][0]) - over
            tail["start"], tail["count"] = upto, over
            tail["offset"] += np.where(tail["offset"] != 0, _U(kept * self._grain), _U(0))
            out["count"][-1] = kept
            rest = joined((tail, rest))
        self._parts = [rest] if len(rest) else []
        return out

    def touched(self, first: int, stop: int, per_group: int, per_table: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield, of groups first..stop that hold anything, the number and which tables in it are touched.

        `per_group` and `per_table` are in grains; no run crosses a group.
        """
        rows = self._all()
        groups = rows["start"] // _U(per_group)
        low = int(np.searchsorted(groups, _U(first)))
        while low < len(rows) and (group := int(groups[low])) < stop:
            high = int(np.searchsorted(groups, _U(group), side="right"))
            part = rows[low:high]
            begin = part["start"].astype(np.int64) - group * per_group
            marks = np.zeros(per_group // per_table + 1, np.int64)
            np.add.at(marks, begin // per_table, 1)
            np.add.at(marks, (begin + part["count"].astype(np.int64) - 1) // per_table + 1, -1)
            yield group, np.flatnonzero(np.cumsum(marks))
            low = high


def standard_entries(rows: NDArray[np.void], first: int, count: int, cluster: int) -> NDArray[np.uint64]:
    """Return `count` L2 entries from cluster number `first` on, as the rows say ("Standard Cluster Descriptor")."""
    words = np.zeros(count, _U)
    if not len(rows):
        return words
    counts = rows["count"].astype(np.int64)
    index, step = _spread(counts)
    offsets = rows["offset"]
    packed = (offsets & _U(s.COMPRESSED)) != 0
    placed = (offsets != 0) & ~packed
    base = offsets | np.where(placed, _U(s.COPIED), _U(0)) | np.where(rows["kind"] == ZERO, _U(s.ZERO_FLAG), _U(0))
    where = (rows["start"].astype(np.int64) - first)[index] + step
    words[where] = base[index] + np.where(placed[index], step.astype(_U) * _U(cluster), _U(0))
    return words


def extended_entries(rows: NDArray[np.void], first: int, count: int, cluster: int) -> NDArray[np.uint64]:
    """Return the two words each of L2 entries of `count` subclusters from number `first` on ("Extended L2 Entries")."""
    clusters = count // s.SUBCLUSTERS
    words = np.zeros((clusters, 2), _U)
    if not len(rows):
        return words.reshape(-1)
    start = rows["start"].astype(np.int64) - first
    stop = start + rows["count"].astype(np.int64)
    low = start // s.SUBCLUSTERS
    index, step = _spread((stop - 1) // s.SUBCLUSTERS - low + 1)
    where = low[index] + step
    begin = np.maximum(start[index] - where * s.SUBCLUSTERS, 0)
    end = np.minimum(stop[index] - where * s.SUBCLUSTERS, s.SUBCLUSTERS)
    masks = ((_U(1) << (end - begin).astype(_U)) - _U(1)) << begin.astype(_U)
    masks <<= np.where(rows["kind"] == ZERO, _U(32), _U(0))[index]
    offsets = rows["offset"]
    packed = (offsets & _U(s.COMPRESSED)) != 0
    masks[packed[index]] = 0
    placed = (offsets != 0) & ~packed
    host = offsets - np.where(placed, (start % s.SUBCLUSTERS).astype(_U) * _U(cluster // s.SUBCLUSTERS), _U(0))
    host |= np.where(placed, _U(s.COPIED), _U(0))
    entries = host[index] + np.where(placed[index], step.astype(_U) * _U(cluster), _U(0))
    heads = np.concatenate(([0], np.flatnonzero(np.diff(where)) + 1))
    words[where[heads], 0] = np.maximum.reduceat(entries, heads)  # zero rows have no place: 0 yields to the data's
    words[where[heads], 1] = np.bitwise_or.reduceat(masks, heads)
    return words.reshape(-1)


def _spread(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for rows of so many elements each: every element's row, and its number within that row."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
