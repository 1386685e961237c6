"""The copied flag of L1 and L2 entries: it stands exactly where the refcount is 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.refcounts import refcounts_at
from diskmorph.formats.qcow2.survey import chunks_of
from diskmorph.formats.qcow2.tables import L2Reader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.qcow2.survey import Survey

_U = np.uint64


class Singles:
    """Whether a cluster's refcount is 1, one bit a cluster, for the survey's windows that begin at `windows`."""

    def __init__(self, windows: list[int], survey: Survey) -> None:
        sizes = [min(survey.window, survey.clusters - base) for base in windows]
        rooms = [-(-size // 8) * 8 for size in sizes]
        self._bases = np.array(windows, np.int64)
        self._sizes = np.array(sizes, np.int64)
        self._starts = np.cumsum(rooms) - rooms
        self._bits = np.zeros(sum(rooms) // 8, np.uint8)

    def put(self, first: int, single: NDArray[np.bool_]) -> None:
        """Set what is known of the clusters from number `first` (a multiple of 8) on, all in one window."""
        slot = int(np.searchsorted(self._bases, first, side="right")) - 1
        at = (int(self._starts[slot]) + first - int(self._bases[slot])) // 8
        bits = np.packbits(single, bitorder="little")
        self._bits[at : at + len(bits)] = bits

    def of(self, clusters: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return for each cluster whether it lies in a window, and whether its refcount is 1."""
        if len(self._bases) == 1:
            known = clusters < self._sizes[0]
            at = clusters if known.all() else np.where(known, clusters, 0)
            return known, known & ((self._bits[at >> 3] >> (at & 7).astype(np.uint8) & np.uint8(1)) != 0)
        slot = np.maximum(np.searchsorted(self._bases, clusters, side="right") - 1, 0)
        within = clusters - self._bases[slot]
        known = (within >= 0) & (within < self._sizes[slot])
        at = np.where(known, self._starts[slot] + within, 0)
        return known, known & ((self._bits[at >> 3] >> (at & 7).astype(np.uint8) & np.uint8(1)) != 0)


def active_tables(survey: Survey) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    """Yield offsets of active L2 tables and their words, one row a table, as many as may be held at once."""
    reader = L2Reader(survey.source, survey.header)
    tables = np.unique(survey.l1[survey.l1 != 0] & _U(s.OFFSET_MASK))
    for low, high in chunks_of(tables, survey.header.cluster):
        yield tables[low:high], reader.many(tables[low:high])


def wrong_flags(survey: Survey, entries: NDArray[np.uint64], singles: Singles, *, data_file: bool) -> NDArray[np.bool_]:
    """Return which plain entries have the flag without a refcount of 1, or the other way round.

    `data_file`: the entries point into a data file, where all that is allocated counts as having a refcount of 1.
    """
    places = entries & _U(s.OFFSET_MASK)
    plain = ((entries & _U(s.COMPRESSED)) == 0) & (places != 0)
    copied = (entries & _U(s.COPIED)) != 0
    if data_file:
        unflagged: NDArray[np.bool_] = plain & ~copied
        return unflagged
    clusters = (places >> _U(survey.header.cluster_bits)).astype(np.int64)
    known, single = singles.of(clusters)
    beyond = plain & ~known
    if beyond.any():
        single[beyond] = refcounts_at(survey.source, survey.header, survey.blocks, clusters[beyond]) == 1
    wrong: NDArray[np.bool_] = plain & (single != copied)
    return wrong
