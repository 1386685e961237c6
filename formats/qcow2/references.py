"""What L2 entries refer to, counted cluster by cluster in windows of bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.survey import chunks_of, entry_words, note
from diskmorph.formats.qcow2.tables import L2Reader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.qcow2.survey import Survey

_U = np.uint64
WINDOW = 1 << 24
"""Clusters whose references are counted at once (64 MiB of counters)."""


def compressed_ranges(entries: NDArray[np.uint64], cluster_bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return offset and length in bytes of compressed clusters, whole sectors at their end."""
    x = 62 - (cluster_bits - 8)
    word = entries & _U(s.COMPRESSED - 1)
    offsets = (word & _U((1 << x) - 1)).astype(np.int64)
    sectors = (word >> _U(x)).astype(np.int64) + 1
    return offsets, sectors * 512 - (offsets & 511)


def judge_entries(
    survey: Survey,
    entries: NDArray[np.uint64],
    bitmaps: NDArray[np.uint64],
    where: NDArray[np.uint64],
    report: CheckReport,
) -> None:
    """Report what the specification does not allow in L2 entries."""
    header = survey.header
    packed = (entries & _U(s.COMPRESSED)) != 0
    places = entries & _U(s.OFFSET_MASK)
    if header.has_data_file:
        inside = np.ones(len(entries), np.bool_)
    else:
        start, length = compressed_ranges(entries, header.cluster_bits)
        begin = np.where(packed, start, places.astype(np.int64))
        inside = begin + np.where(packed, length, header.cluster) - survey.source.size < header.cluster
    faults = [
        (packed & ((entries & _U(s.COPIED)) != 0), "the copied flag is set on a compressed cluster", False),
        (~packed & ((entries & _U(s.L2_RESERVED)) != 0), "an L2 entry has reserved bits set", True),
        (~packed & (places % _U(header.cluster) != 0), "a data cluster does not begin on a cluster", True),
        (~inside & (packed | (places != 0)), "a data cluster lies beyond the end of the file", True),
    ]
    if header.has_data_file:
        faults.append((packed, "a compressed cluster in an image with a data file", True))
    if header.version < 3 or header.extended:
        flagged = ~packed & ((entries & _U(s.ZERO_FLAG)) != 0)
        faults.append((flagged, "the zero flag is set where it is not allowed", True))
    if header.extended:
        allocated, zero = bitmaps & _U(s.ALL_ALLOCATED), bitmaps >> _U(32)
        homeless = ~packed & (allocated != 0) & (places == 0)
        if header.has_data_file:
            homeless &= (entries & _U(s.COPIED)) == 0
        faults += [
            (packed & (bitmaps != 0), "a compressed cluster has a subcluster bitmap", True),
            (~packed & ((allocated & zero) != 0), "a subcluster is marked as allocated and as zero at once", True),
            (homeless, "subclusters are allocated in a cluster that has no place", True),
        ]
    for wrong, message, structural in faults:
        found = np.flatnonzero(wrong)
        if len(found):
            count = note(report, "L2 table", where[found].astype(np.int64), message)
            survey.structural += count if structural else 0


def entry_clusters(
    survey: Survey, entries: NDArray[np.uint64], weights: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return the clusters that L2 entries refer to, with repetitions, and their weights (None: 1 each).

    What lies beyond the end of the file is left out.
    """
    header = survey.header
    packed = (entries & _U(s.COMPRESSED)) != 0
    offsets = (entries & _U(s.OFFSET_MASK)).astype(np.int64)
    lengths = np.full(len(entries), header.cluster, np.int64)
    if packed.any():
        start, length = compressed_ranges(entries[packed], header.cluster_bits)
        offsets[packed], lengths[packed] = start, length
    used = packed if header.has_data_file else packed | (offsets != 0)
    offsets, lengths = offsets[used], lengths[used]
    picked = None if weights is None else weights[used]
    first = offsets >> header.cluster_bits
    counts = ((offsets + lengths - 1) >> header.cluster_bits) - first + 1
    if (counts == 1).all():
        clusters = first
    else:
        index = np.repeat(np.arange(len(first)), counts)
        clusters = first[index] + np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        picked = None if picked is None else picked[index]
    inside = clusters < survey.clusters
    if not inside.all():
        clusters, picked = clusters[inside], None if picked is None else picked[inside]
    return clusters, picked


def data_references(
    survey: Survey, report: CheckReport | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64] | None]]:
    """Yield clusters that all L2 entries refer to, with weights; with `report` the entries are judged as well."""
    reader = L2Reader(survey.source, survey.header)
    for low, high in chunks_of(survey.tables, survey.header.cluster):
        entries, bitmaps, where = entry_words(survey, reader, survey.tables[low:high])
        used = np.flatnonzero(entries | bitmaps) if len(bitmaps) else np.flatnonzero(entries)
        if len(used) < len(entries):
            entries, where = entries[used], where[used]
            bitmaps = bitmaps[used] if len(bitmaps) else bitmaps
        if report is not None:
            judge_entries(survey, entries, bitmaps, where, report)
        weights = survey.weights[low:high]
        spread = None if (weights == 1).all() else np.repeat(weights, survey.header.l2_entries)[used]
        yield entry_clusters(survey, entries, spread)


class Counter:
    """References of the clusters base..base + WINDOW."""

    def __init__(self, base: int, clusters: int) -> None:
        self.base = base
        self.counts = np.zeros(max(min(WINDOW, clusters - base), 0), np.uint32)

    def add(self, clusters: NDArray[np.int64], weights: NDArray[np.int64] | None = None) -> None:
        """Count clusters, repetitions included; those outside the window are passed over."""
        index = clusters - self.base if self.base else clusters
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self.counts)):
            inside = (index >= 0) & (index < len(self.counts))
            index, weights = index[inside], None if weights is None else weights[inside]
        if weights is None and (index[1:] > index[:-1]).all():
            self.counts[index] += np.uint32(1)
        else:
            np.add.at(self.counts, index, np.uint32(1) if weights is None else weights.astype(np.uint32))


def metadata_counted(survey: Survey, base: int, *, refcounts: bool = True) -> Counter:
    """Return a counter of the window at `base` with all metadata counted, with or without the refcounts' own."""
    counter = Counter(base, survey.clusters)
    counter.add(survey.fixed)
    counter.add((survey.tables >> _U(survey.header.cluster_bits)).astype(np.int64), survey.weights)
    if refcounts:
        counter.add(survey.refcounts)
    return counter


def counted(survey: Survey, base: int, *, refcounts: bool = True) -> Counter:
    """Return a counter of the window at `base` with everything counted."""
    counter = metadata_counted(survey, base, refcounts=refcounts)
    for clusters, weights in data_references(survey):
        counter.add(clusters, weights)
    return counter
