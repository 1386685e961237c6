"""What L2 entries refer to, counted cluster by cluster in windows of bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.survey import chunks_of, note
from diskmorph.formats.qcow2.tables import L2Reader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.qcow2.survey import Survey

_U = np.uint64
_BEYOND = "a data cluster lies beyond the end of the file"


def compressed_ranges(entries: NDArray[np.uint64], cluster_bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return offset and length in bytes of compressed clusters, whole sectors at their end."""
    x = 62 - (cluster_bits - 8)
    word = entries & _U(s.COMPRESSED - 1)
    offsets = (word & _U((1 << x) - 1)).astype(np.int64)
    sectors = (word >> _U(x)).astype(np.int64) + 1
    return offsets, sectors * 512 - (offsets & 511)


class Entries:
    """The L2 entries of several tables: `entries` and, where extended, `bitmaps`; one row a table in the file."""

    def __init__(self, header: Header, offsets: NDArray[np.uint64], words: NDArray[np.uint64]) -> None:
        self._header, self._offsets = header, offsets
        self._per_table = header.l2_entries
        flat = words.reshape(-1, 2 if header.extended else 1)
        self.entries = flat[:, 0]
        self.bitmaps = flat[:, 1] if header.extended else None
        every = int(np.bitwise_or.reduce(self.entries)) if len(self.entries) else 0
        self.packed: NDArray[np.bool_] | None = None
        if every & s.COMPRESSED:
            self.packed = (self.entries & _U(s.COMPRESSED)) != 0
        suspicious = s.COMPRESSED | s.L2_RESERVED | (s.OFFSET_MASK & (header.cluster - 1))
        suspicious |= s.ZERO_FLAG if header.version < 3 or header.extended else 0
        self.plain = not every & suspicious
        """Whether no entry is compressed or has a bit that needs judging."""

    def where(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the offsets in the file of entries by their number."""
        width = 16 if self._header.extended else 8
        tables = self._offsets[index // self._per_table].astype(np.int64)
        offsets: NDArray[np.int64] = tables + index % self._per_table * width
        return offsets

    def active(self, survey: Survey, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which entries, by their number, stand in tables of the active L1 table."""
        return np.isin(self._offsets[index // self._per_table], survey.l1 & _U(s.OFFSET_MASK))


def judge_entries(survey: Survey, part: Entries, weights: NDArray[np.int64] | None, report: CheckReport) -> None:
    """Report what the specification does not allow in L2 entries; `weights` as in `entry_clusters`."""
    header, entries = survey.header, part.entries
    room = survey.source.size - (survey.source.size % header.cluster or header.cluster)
    simple = part.plain and part.bitmaps is None and not header.has_data_file
    most = int((entries & _U(s.OFFSET_MASK)).max(initial=0)) if simple else 0
    if simple and most <= room:
        survey.overhang |= most == room and survey.source.size % header.cluster != 0
        return
    packed = np.zeros(len(entries), np.bool_) if part.packed is None else part.packed
    for wrong, message, structural in _faults(survey, entries, packed) + _bitmap_faults(survey, part, packed):
        found = np.flatnonzero(wrong)
        if len(found):
            count = note(report, "L2 table", part.where(found), message)
            survey.structural += count if structural else 0
            survey.unmended += 0 if structural else int((~part.active(survey, found)).sum())
        if weights is not None and message is _BEYOND and len(found):
            again = int(weights[found].sum()) - len(found)  # QEMU counts these once for each L1 table
            if again:
                report.add("L2 table", int(part.where(found[:1])[0]), f"{_BEYOND}, in snapshots too", count=again)


def faulty_tables(survey: Survey, offsets: NDArray[np.uint64], words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which L2 tables, one row of `words` each, have an entry that no repair mends: they may be none."""
    part = Entries(survey.header, offsets, words)
    packed = np.zeros(len(part.entries), np.bool_) if part.packed is None else part.packed
    faults = _faults(survey, part.entries, packed) + _bitmap_faults(survey, part, packed)
    every = np.logical_or.reduce([wrong for wrong, _, structural in faults if structural])
    faulty: NDArray[np.bool_] = every.reshape(len(offsets), -1).any(axis=1)
    return faulty


def _faults(
    survey: Survey, entries: NDArray[np.uint64], packed: NDArray[np.bool_]
) -> list[tuple[NDArray[np.bool_], str, bool]]:
    """Return what may be wrong with entries: where it is, in words, and whether no repair mends it."""
    header = survey.header
    places = entries & _U(s.OFFSET_MASK)
    start, length = compressed_ranges(entries, header.cluster_bits)
    begin = np.where(packed, start, places.astype(np.int64))
    over = begin + np.where(packed, length, header.cluster) - survey.source.size
    if header.has_data_file:
        over[~packed] = 0
    used = packed | (places != 0)
    survey.overhang |= bool((used & (over > 0)).any())
    survey.beyond |= bool((used & (over > survey.clusters * header.cluster - survey.source.size)).any())
    beyond = over >= header.cluster
    faults = [
        (packed & ((entries & _U(s.COPIED)) != 0), "the copied flag is set on a compressed cluster", False),
        (~packed & ((entries & _U(s.L2_RESERVED)) != 0), "an L2 entry has reserved bits set", True),
        (~packed & (places % _U(header.cluster) != 0), "a data cluster does not begin on a cluster", True),
        (beyond & used, _BEYOND, True),
    ]
    if header.has_data_file:
        faults.append((packed, "a compressed cluster in an image with a data file", True))
    if header.version < 3 or header.extended:
        flagged = ~packed & ((entries & _U(s.ZERO_FLAG)) != 0)
        faults.append((flagged, "the zero flag is set where it is not allowed", True))
    return faults


def _bitmap_faults(
    survey: Survey, part: Entries, packed: NDArray[np.bool_]
) -> list[tuple[NDArray[np.bool_], str, bool]]:
    if part.bitmaps is None:
        return []
    allocated, zero = part.bitmaps & _U(s.ALL_ALLOCATED), part.bitmaps >> _U(32)
    homeless = ~packed & (allocated != 0) & ((part.entries & _U(s.OFFSET_MASK)) == 0)
    if survey.header.has_data_file:
        homeless &= (part.entries & _U(s.COPIED)) == 0
    return [
        (packed & (part.bitmaps != 0), "a compressed cluster has a subcluster bitmap", True),
        (~packed & ((allocated & zero) != 0), "a subcluster is marked as allocated and as zero at once", True),
        (homeless, "subclusters are allocated in a cluster that has no place", True),
    ]


def entry_clusters(
    survey: Survey, part: Entries, weights: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return the clusters that L2 entries refer to, with repetitions, and their weights (None: 1 each).

    What lies beyond the end of the file is left out.
    """
    header, entries = survey.header, part.entries
    offsets = (entries & _U(s.OFFSET_MASK)).astype(np.int64)
    if header.has_data_file:
        offsets[:] = 0
    lengths = None
    if part.packed is not None:
        lengths = np.full(len(entries), header.cluster, np.int64)
        offsets[part.packed], lengths[part.packed] = compressed_ranges(entries[part.packed], header.cluster_bits)
    used = np.flatnonzero(offsets)
    if len(used) < len(offsets):
        offsets = offsets[used]
        lengths = None if lengths is None else lengths[used]
        weights = None if weights is None else weights[used]
    clusters = offsets >> header.cluster_bits
    if not part.plain:
        end = offsets + (header.cluster if lengths is None else lengths) - 1
        counts = (end >> header.cluster_bits) - clusters + 1
        index = np.repeat(np.arange(len(clusters)), counts)
        clusters = clusters[index] + np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        weights = None if weights is None else weights[index]
    if len(clusters) and int(clusters.max()) >= survey.clusters:
        inside = clusters < survey.clusters
        clusters, weights = clusters[inside], None if weights is None else weights[inside]
    return clusters, weights


def data_references(
    survey: Survey, report: CheckReport | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64] | None]]:
    """Yield clusters that all L2 entries refer to, with weights; with `report` the entries are judged as well."""
    reader = L2Reader(survey.source, survey.header)
    for low, high in chunks_of(survey.tables, survey.header.cluster):
        offsets = survey.tables[low:high]
        part = Entries(survey.header, offsets, reader.many(offsets))
        weights = survey.weights[low:high]
        spread = None if (weights == 1).all() else np.repeat(weights, survey.header.l2_entries)
        if report is not None:
            judge_entries(survey, part, spread, report)
        yield entry_clusters(survey, part, spread)


class Counter:
    """References of the clusters base..base + the survey's window. Counts that would overflow stay at their most."""

    def __init__(self, survey: Survey, base: int) -> None:
        self.base = base
        self.counts = np.zeros(max(min(survey.window, survey.clusters - base), 0), survey.counter)
        self.overflown = False

    def add(self, clusters: NDArray[np.int64], weights: NDArray[np.int64] | None = None) -> None:
        """Count clusters, repetitions included; those outside the window are passed over."""
        if not len(clusters):
            return
        index = clusters - self.base if self.base else clusters
        if int(index.min()) < 0 or int(index.max()) >= len(self.counts):
            inside = (index >= 0) & (index < len(self.counts))
            index, weights = index[inside], None if weights is None else weights[inside]
        if weights is None and (index[1:] > index[:-1]).all():
            more: NDArray[np.int64] | int = 1
        else:
            index, inverse = np.unique(index, return_inverse=True)
            more = np.zeros(len(index), np.int64)
            np.add.at(more, inverse, 1 if weights is None else weights)
        most = np.iinfo(self.counts.dtype).max
        total = self.counts[index].astype(np.int64) + more
        if len(total) and int(total.max()) > most:
            self.overflown = True
            total = np.minimum(total, most)
        self.counts[index] = total.astype(self.counts.dtype)


def metadata_counted(survey: Survey, base: int, *, refcounts: bool = True) -> Counter:
    """Return a counter of the window at `base` with all metadata counted, with or without the refcounts' own."""
    counter = Counter(survey, base)
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
