"""Everything in a qcow2 file that refers to a cluster, gathered for the check: tolerant, and told of what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.check import ERROR, CheckReport
from diskmorph.formats.errors import FormatError
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.extensions import read_bitmaps, read_snapshots
from diskmorph.formats.qcow2.refcounts import read_table
from diskmorph.formats.qcow2.tables import CHUNK, read_l1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.source import ByteSource

_U = np.uint64
_SHOWN = 50
_COMPACT = 1 << 22
_WINDOW_BYTES = 80 << 20
_NONE: NDArray[np.int64] = np.zeros(0, np.int64)


def note(
    report: CheckReport,
    structure: str,
    offsets: NDArray[np.int64],
    message: str | Callable[[int], str],
    severity: str = ERROR,
) -> int:
    """Report the same fault at several offsets of the file, the first few one by one; return how many they are.

    `message` may be a function of the position in `offsets`.
    """
    for number, offset in enumerate(offsets[:_SHOWN].tolist()):
        report.add(structure, offset, message if isinstance(message, str) else message(number), severity)
    rest = len(offsets) - _SHOWN
    if rest > 0:
        text = message if isinstance(message, str) else message(_SHOWN)
        report.add(structure, int(offsets[_SHOWN]), f"{text}, and {rest - 1} more like it", severity, rest)
    return len(offsets)


@dataclass
class Survey:
    """What refers to clusters, apart from the L2 entries. Clusters are numbered from the file's beginning.

    `fixed` are clusters of all metadata but L2 tables and refcounts, `refcounts` those of the refcount table and its
    blocks, with repetitions; `tables` the offsets of L2 tables in ascending order, `weights` how many L1 entries refer
    to each; `l1` the active L1 table and `blocks` the refcount table, faulty entries cleared. `structural` counts
    faults that leave it open what is referred to, `unmended` others that no repair mends; `rebuild` says whether the
    refcounts cannot be mended where they are. `overhang`: data passes the file's end, if only within its last cluster;
    `beyond`: something that is referred to lies behind the file's end, so the file must not grow over it. `shared` are
    the clusters of metadata that are used for something else too.
    """

    source: ByteSource
    header: Header
    l1: NDArray[np.uint64]
    blocks: NDArray[np.uint64]
    fixed: NDArray[np.int64]
    refcounts: NDArray[np.int64]
    tables: NDArray[np.uint64]
    weights: NDArray[np.int64]
    structural: int = 0
    rebuild: bool = False
    beyond: bool = False
    overhang: bool = False
    unmended: int = 0
    shared: list[int] = field(default_factory=list)
    clusters: int = field(init=False)
    window: int = field(init=False)
    """Clusters whose references are counted at once."""

    def __post_init__(self) -> None:
        self.clusters = -(-self.source.size // self.header.cluster)
        self.window = _WINDOW_BYTES // self.counter.itemsize

    @property
    def counter(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The type that counts references: as wide as a refcount, but 2 to 4 bytes."""
        return np.dtype(np.uint16 if self.header.refcount_bits <= 16 else np.uint32)


class Surveyor:
    """Reads all first-level structures; see `survey`."""

    def __init__(self, source: ByteSource, header: Header, limits: Limits, report: CheckReport) -> None:
        self._source, self._header, self._limits, self._report = source, header, limits, report
        self._fixed: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._tables: list[NDArray[np.uint64]] = []
        self._weights: list[NDArray[np.int64]] = []
        self._held = 0
        self.structural = 0
        self.rebuild = False
        self.beyond = False

    def survey(self) -> Survey:
        """Return the survey. Raises FormatError only where the file cannot be read."""
        header = self._header
        self._fixed.append(self._range("L1 table", header.l1_offset, header.l1_size * 8))
        l1 = self._l1(header.l1_offset, header.l1_size)
        self._snapshots()
        self._bitmaps()
        if header.extensions.crypto is not None:
            self._fixed.append(self._range("encryption header", *header.extensions.crypto))
        blocks, refcounts = self._refcount_table()
        self._compact()
        tables, weights = self._tables[0], self._weights[0]
        fixed = np.concatenate(self._fixed)
        return Survey(
            self._source,
            header,
            l1,
            blocks,
            fixed,
            refcounts,
            tables,
            weights,
            self.structural,
            self.rebuild,
            self.beyond,
        )

    def _passes(self, offset: int, length: int) -> bool:
        """Return whether a range passes the file's end, and remember that one does."""
        passes = offset + length > self._source.size
        self.beyond |= passes
        return passes

    def _range(self, structure: str, offset: int, length: int) -> NDArray[np.int64]:
        """Return the clusters of a range, cut where the file ends; a range beyond it by a cluster is reported."""
        if length <= 0:
            return _NONE
        cluster, end = self._header.cluster, self._source.size
        if self._passes(offset, length) and offset + length - end >= cluster:
            self.structural += note(
                self._report,
                structure,
                np.array([offset], np.int64),
                f"the {structure} lies beyond the end of the file",
            )
        last = min(offset + length - 1, end - 1) // cluster
        return np.arange(offset // cluster, max(last + 1, offset // cluster), dtype=np.int64)

    def _l1(self, offset: int, entries: int) -> NDArray[np.uint64]:
        """Judge an L1 table and remember its L2 tables; return its entries, those that lead nowhere cleared."""
        l1 = read_l1(self._source, offset, entries)
        offsets = l1 & _U(s.OFFSET_MASK)
        aligned = offsets % _U(self._header.cluster) == 0
        inside = offsets + _U(self._header.cluster) <= _U(self._source.size)
        self.beyond |= bool((~inside & (offsets != 0)).any())
        faults = (
            ((l1 & _U(s.L1_RESERVED)) != 0, "an L1 entry has reserved bits set"),
            (~aligned, "an L2 table does not begin on a cluster"),
            (aligned & ~inside & (offsets != 0), "an L2 table lies beyond the end of the file"),
        )
        for wrong, message in faults:
            self.structural += note(self._report, "L1 table", offset + 8 * np.flatnonzero(wrong), message)
        l1[~(aligned & inside)] = 0
        found = offsets[aligned & inside & (offsets != 0)]
        self._tables.append(found)
        self._weights.append(np.ones(len(found), np.int64))
        self._held += len(found)
        if self._held > _COMPACT:
            self._compact()
        return l1

    def _compact(self) -> None:
        """Put equal tables together: snapshots share most of theirs."""
        every, weights = np.concatenate(self._tables), np.concatenate(self._weights)
        unique, index = np.unique(every, return_inverse=True)
        total = np.zeros(len(unique), np.int64)
        np.add.at(total, index, weights)
        self._tables, self._weights, self._held = [unique], [total], 0

    def _snapshots(self) -> None:
        header = self._header
        try:
            entries = read_snapshots(self._source, header)
        except FormatError as error:
            self.beyond = True
            self._fault("snapshot table", error)
            return
        if entries:
            last = entries[-1]
            length = last.offset + last.length - header.snapshot_offset
            self._fixed.append(self._range("snapshot table", header.snapshot_offset, length))
        for entry in entries:
            length = entry.l1_size * 8
            within = not self._passes(entry.l1_offset, length) and length <= self._limits.resident_table
            if entry.l1_offset % header.cluster or not within:
                self.structural += note(
                    self._report,
                    "snapshot table",
                    np.array([entry.offset], np.int64),
                    f"the L1 table of snapshot {entry.info.name!r} is not on a cluster, too large or beyond the file",
                )
                continue
            self._fixed.append(self._range("L1 table", entry.l1_offset, length))
            self._l1(entry.l1_offset, entry.l1_size)

    def _fault(self, structure: str, error: FormatError) -> None:
        self._report.add(structure, error.offset, error.problem)
        self.structural += 1

    def _bitmaps(self) -> None:
        header = self._header
        try:
            entries = read_bitmaps(self._source, header, self._limits)
        except FormatError as error:
            self._passes(*(header.extensions.bitmaps or (0, 0)))
            self._fault("bitmap directory", error)
            return
        if not entries:
            return
        offset, size = header.extensions.bitmaps or (0, 0)
        self._fixed.append(self._range("bitmap directory", offset, size))
        for entry in entries:
            length = entry.table_size * 8
            within = not self._passes(entry.table_offset, length) and length <= self._limits.resident_table
            if entry.table_offset % header.cluster or not within:
                note(
                    self._report,
                    "bitmap directory",
                    np.array([entry.offset], np.int64),
                    f"the table of bitmap {entry.name!r} is not on a cluster, too large or beyond the file",
                )
                self.structural += 1
                continue
            self._fixed.append(self._range("bitmap table", entry.table_offset, length))
            self._bitmap_table(entry.table_offset, entry.table_size)

    def _bitmap_table(self, offset: int, entries: int) -> None:
        table = np.frombuffer(self._source.read(offset, entries * 8), s.ENTRY).astype(_U)
        places = table & _U(s.OFFSET_MASK)
        wrong = ((table & _U(s.BITMAP_TABLE_RESERVED)) != 0) | ((places != 0) & ((table & _U(1)) != 0))
        wrong |= places % _U(self._header.cluster) != 0
        beyond = (places != 0) & (places + _U(self._header.cluster) > _U(self._source.size))
        self.beyond |= bool(beyond.any())
        wrong |= beyond
        self.structural += note(
            self._report, "bitmap table", offset + 8 * np.flatnonzero(wrong), "a bitmap table entry is damaged"
        )
        good = places[(places != 0) & ~wrong]
        self._fixed.append((good // _U(self._header.cluster)).astype(np.int64))

    def _refcount_table(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the refcount table, faulty entries cleared, and the clusters that it and its blocks take."""
        header = self._header
        table = read_table(self._source, header)
        places = table & ~_U(s.TABLE_RESERVED)
        cluster = _U(header.cluster)
        aligned = places % cluster == 0
        inside = places // cluster < _U(-(-self._source.size // header.cluster))
        faults = (
            ((table & _U(s.TABLE_RESERVED)) != 0, "a refcount table entry has reserved bits set"),
            (~aligned, "a refcount block does not begin on a cluster"),
            (aligned & ~inside & (places != 0), "a refcount block lies beyond the end of the file"),
        )
        for wrong, message in faults:
            where = header.refcount_offset + 8 * np.flatnonzero(wrong)
            self.rebuild |= bool(note(self._report, "refcount table", where, message))
        # A block in the file's last, partial cluster has lost its end.
        whole = places + cluster <= _U(self._source.size)
        cut = np.flatnonzero(aligned & inside & ~whole & (places != 0))
        where = header.refcount_offset + 8 * cut
        self.rebuild |= bool(note(self._report, "refcount table", where, "a refcount block is cut off"))
        places[~(aligned & inside & whole)] = 0
        own = self._range("refcount table", header.refcount_offset, header.refcount_clusters << header.cluster_bits)
        blocks = (places[places != 0] // cluster).astype(np.int64)
        return places, np.concatenate((own, blocks))


def chunks_of(tables: NDArray[np.uint64], cluster: int) -> Iterator[tuple[int, int]]:
    """Yield (first, stop) of pieces of a list of L2 tables that may be held at once."""
    step = max(CHUNK // cluster, 1)
    for low in range(0, len(tables), step):
        yield low, min(low + step, len(tables))
