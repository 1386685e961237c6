"""Compressed clusters side by side, byte by byte, and how many of them each host cluster holds a part of."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

_U = np.uint64


class Packer:
    """Gives places to compressed clusters and counts, for each host cluster that they touch, how many touch it.

    No host cluster is touched by more of them than a refcount of `refcount_bits` can count.
    """

    def __init__(self, cluster: int, refcount_bits: int) -> None:
        self._cluster = cluster
        self._most = (1 << refcount_bits) - 1
        self._at = 0  # where the next one may begin, if its cluster has room left
        self._starts: list[int] = []  # host clusters counted: first of each run, in ascending order
        self._counts: list[NDArray[np.uint32]] = []
        self._tail = 0  # how many touch the cluster of `_at`

    def pack(self, sizes: NDArray[np.uint64], end: int) -> tuple[NDArray[np.uint64], int]:
        """Return offsets for clusters of `sizes` bytes, and the file's new end; `end` is where free room begins."""
        offsets = self._try(sizes, end)
        if offsets is None:
            offsets = self._one_by_one(sizes, end)
        after = int(offsets[-1] + sizes[-1])
        end = max(end, -(-after // self._cluster) * self._cluster)
        self._count(offsets, sizes)
        self._at = after
        return offsets, end

    def _room(self) -> int:
        return -self._at % self._cluster

    def _try(self, sizes: NDArray[np.uint64], end: int) -> NDArray[np.uint64] | None:
        """Return places without regard to how often a cluster is touched; None if that may matter."""
        if int(sizes.min()) * (self._most - self._tail - 2) < self._cluster:
            return None
        ends = np.cumsum(sizes)
        offsets = ends - sizes
        if self._at + self._room() == end and self._room():
            return offsets + _U(self._at)
        fits = int(np.searchsorted(ends, self._room(), side="right"))
        if not fits:
            return offsets + _U(end)
        out = offsets + _U(self._at)
        out[fits:] = offsets[fits:] - (offsets[fits] if fits < len(offsets) else _U(0)) + _U(end)
        return out

    def _one_by_one(self, sizes: NDArray[np.uint64], end: int) -> NDArray[np.uint64]:
        """Return places so that no cluster is touched too often; for narrow refcounts."""
        cluster, at, tail = self._cluster, self._at, self._tail
        out = np.zeros(len(sizes), _U)
        for index, size in enumerate(sizes.tolist()):
            room = -at % cluster
            joined = room and tail < self._most and (size <= room or at + room == end)
            if not joined:
                at, tail, room = end, 0, cluster
            out[index] = at
            tail = tail + 1 if size <= room else 1
            at += size
            end = max(end, -(-at // cluster) * cluster)
        return out

    def _count(self, offsets: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> None:
        """Count the clusters touched. Offsets ascend; a gap begins a new run of counted clusters."""
        first = (offsets // _U(self._cluster)).astype(np.int64)
        last = ((offsets + sizes - _U(1)) // _U(self._cluster)).astype(np.int64)
        breaks = np.flatnonzero(first[1:] > last[:-1] + 1) + 1
        bounds = [0, *breaks.tolist(), len(first)]
        for low, high in itertools.pairwise(bounds):
            base = int(first[low])
            # A compressed cluster is smaller than a cluster, so it touches two at most.
            touched = np.bincount(first[low:high] - base, minlength=int(last[high - 1]) - base + 1)
            crossing = last[low:high] != first[low:high]
            touched += np.bincount(last[low:high][crossing] - base, minlength=len(touched))
            self._add(base, touched.astype(np.uint32))
        self._tail = int(self._counts[-1][-1])

    def _add(self, base: int, touched: NDArray[np.uint32]) -> None:
        if self._starts and self._starts[-1] + len(self._counts[-1]) - 1 == base:
            self._counts[-1][-1] += touched[0]
            base, touched = base + 1, touched[1:]
        if len(touched):
            self._starts.append(base)
            self._counts.append(touched)

    def apply(self, first: int, counts: NDArray[np.uint64]) -> None:
        """Put what was counted in place of the refcounts `counts`, which are of the clusters from number `first` on."""
        stop = first + len(counts)
        at = max(int(np.searchsorted(self._starts, first, side="right")) - 1, 0)
        for base, touched in zip(self._starts[at:], self._counts[at:], strict=True):
            if base >= stop:
                break
            low, high = max(base, first), min(base + len(touched), stop)
            if low < high:
                counts[low - first : high - first] = touched[low - base : high - base]
