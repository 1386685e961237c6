"""Repairing qcow2: refcounts and the flags that depend on them, as patches that the caller journals and writes.

Nothing here touches data or where tables lead. No new cluster is taken while anything behind the file's end is referred
to: it would be taken for what was lost. Where structural faults leave it open what is referred to, refcounts
are raised but never lowered, so that nothing is given away that may be in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from diskmorph.formats.check import Patch
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.building import RefcountLayout
from diskmorph.formats.qcow2.flags import Singles, active_tables, wrong_flags
from diskmorph.formats.qcow2.refcounts import PIECE, pack, stored_refcounts
from diskmorph.formats.qcow2.references import counted, faulty_tables
from diskmorph.formats.qcow2.tables import read_l1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.qcow2.survey import Survey

    _Wanted = Callable[[Survey, NDArray[np.uint64], NDArray[np.uint32]], NDArray[np.uint64]]

_U = np.uint64


class _Wrong(Protocol):
    def __call__(self, entries: NDArray[np.uint64], *, data_file: bool) -> NDArray[np.bool_]:
        """Return which entries' copied flags to turn; see `wrong_flags`."""


def plan_repair(survey: Survey, windows: list[int], before: Singles, repair: str, report: CheckReport) -> None:
    """Add the patches for `repair` ("leaks" or "all") to the report of a finished check.

    `before` knows the refcounts as they are.
    """
    if repair == "leaks":
        _plan_leaks(survey, windows, before, report)
    else:
        _plan_all(survey, windows, report)


def _plan_leaks(survey: Survey, windows: list[int], before: Singles, report: CheckReport) -> None:
    """Lower refcounts, and set the copied flags that this makes wrong; those that were wrong stay."""
    singles = Singles(windows, survey)
    if not survey.structural and not survey.rebuild:
        for base in windows:
            report.patches += _refcounts_in_place(survey, base, singles, _lowered)

    def wrong(entries: NDArray[np.uint64], *, data_file: bool) -> NDArray[np.bool_]:
        was = wrong_flags(survey, entries, before, data_file=data_file)
        now: NDArray[np.bool_] = wrong_flags(survey, entries, singles, data_file=data_file) & ~was
        return now

    if report.patches:
        report.patches += _flag_patches(survey, wrong, wrong)
    report.patches += _header_patches(survey, 0 if report.patches else None, None)


def _plan_all(survey: Survey, windows: list[int], report: CheckReport) -> None:
    layout = None
    singles = Singles(windows, survey)
    if survey.rebuild:
        if survey.beyond:
            return  # new clusters would be taken for those that are lost
        layout = RefcountLayout.after(_first_new(survey) * survey.header.cluster, survey.header)
        if layout.table_clusters * survey.header.cluster > s.REFCOUNT_TABLE_MOST:
            return  # larger than QEMU opens: what was found stays
        report.patches += _refcounts_anew(survey, windows, layout, singles)
    else:
        for base in windows:
            report.patches += _refcounts_in_place(survey, base, singles, _wanted)

    def wrong(entries: NDArray[np.uint64], *, data_file: bool) -> NDArray[np.bool_]:
        return wrong_flags(survey, entries, singles, data_file=data_file)

    def wrong_l2(entries: NDArray[np.uint64], *, data_file: bool) -> NDArray[np.bool_]:
        both = _U(s.COMPRESSED | s.COPIED)
        found: NDArray[np.bool_] = wrong(entries, data_file=data_file) | ((entries & both) == both)
        return found

    report.patches += _flag_patches(survey, wrong, wrong_l2)
    mended = not survey.structural and not survey.unmended
    report.patches += _header_patches(survey, s.DIRTY | s.CORRUPT if mended else 0, layout)


def _wanted(survey: Survey, stored: NDArray[np.uint64], counts: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return the refcounts to write: the references, but no less than before where faults may hide some of them."""
    wanted = np.minimum(counts.astype(_U), _U((1 << survey.header.refcount_bits) - 1))
    return np.maximum(wanted, stored) if survey.structural else wanted


def _lowered(survey: Survey, stored: NDArray[np.uint64], counts: NDArray[np.uint32]) -> NDArray[np.uint64]:
    return np.minimum(stored, _wanted(survey, stored, counts))


def _refcounts_in_place(survey: Survey, base: int, singles: Singles, wanted_of: _Wanted) -> Iterator[Patch]:
    """Yield patches of the blocks for one window."""
    counts = counted(survey, base).counts
    for low, stored in stored_refcounts(survey.source, survey.header, survey.blocks, base, len(counts)):
        wanted = wanted_of(survey, stored, counts[low : low + len(stored)])
        singles.put(base + low, wanted == 1)
        changed = np.flatnonzero(wanted != stored)
        if len(changed):
            yield from _block_patches(survey, base + low, wanted, changed)


def _block_patches(
    survey: Survey, base: int, wanted: NDArray[np.uint64], changed: NDArray[np.int64]
) -> Iterator[Patch]:
    """Yield one patch for each refcount block with changes, from the first changed byte to the last."""
    per_block, bits = survey.header.block_entries, survey.header.refcount_bits
    group = max(8 // bits, 1)  # refcounts that share a byte
    blocks = (changed + base) // per_block
    for block in np.unique(blocks).tolist():
        some = changed[blocks == block]
        first = int(some[0]) // group * group
        last = min((int(some[-1]) // group + 1) * group, len(wanted))
        data = pack(np.pad(wanted[first:last], (0, -(last - first) % group)), bits)
        index = base + first - block * per_block
        yield Patch(int(survey.blocks[block]) + index * bits // 8, data, "refcounts set to the references")


def _refcounts_anew(survey: Survey, windows: list[int], layout: RefcountLayout, singles: Singles) -> Iterator[Patch]:
    """Yield new refcount blocks and their table, behind the end of the file; the old ones become free room."""
    header = survey.header
    total = layout.end // header.cluster
    for base in windows:
        counts = counted(survey, base, refcounts=False).counts
        for low, stored in stored_refcounts(survey.source, header, survey.blocks, base, len(counts)):
            wanted = _wanted(survey, stored, counts[low : low + len(stored)])
            singles.put(base + low, wanted == 1)
            if wanted.any():
                yield _new_refcounts(survey, layout, base + low, wanted)
    for low in range(_first_new(survey), total, PIECE):
        yield _new_refcounts(survey, layout, low, np.ones(min(PIECE, total - low), _U))
    table = np.arange(layout.blocks, dtype=_U) * _U(header.cluster) + _U(layout.offset)
    room = bytes(layout.table_clusters * header.cluster - len(table) * 8)
    yield Patch(layout.table_offset(header.cluster), table.astype(s.ENTRY).tobytes() + room, "a new refcount table")


def _first_new(survey: Survey) -> int:
    """Return the cluster behind the file's end from which new ones are taken: its refcount begins a byte."""
    return -(-survey.clusters // 8) * 8


def _new_refcounts(survey: Survey, layout: RefcountLayout, first: int, counts: NDArray[np.uint64]) -> Patch:
    """Return the patch of new blocks, which lie side by side, for clusters from `first` (a multiple of 8) on."""
    bits = survey.header.refcount_bits
    data = pack(np.pad(counts, (0, -len(counts) % 8)), bits)
    return Patch(layout.offset + first * bits // 8, data, "refcounts built anew")


def _flag_patches(survey: Survey, l1_wrong: _Wrong, l2_wrong: _Wrong) -> list[Patch]:
    """Return patches that turn wrong copied flags; they are for the refcounts written before.

    Where a table may be something else, which then would be changed, its flags stay.
    """
    patches = [*_l1_flags(survey, l1_wrong), *_l2_flags(survey, l2_wrong)]
    return [patches[0]._replace(sync=True), *patches[1:]] if patches else []


def _l1_flags(survey: Survey, wrong_of: _Wrong) -> Iterator[Patch]:
    header = survey.header
    wrong = np.flatnonzero(wrong_of(survey.l1, data_file=False))
    if not len(wrong):
        return
    own = range(header.l1_offset >> header.cluster_bits, -(-(header.l1_offset + header.l1_size * 8) // header.cluster))
    if not set(own).isdisjoint(survey.shared):
        survey.unmended += 1
        return
    l1 = read_l1(survey.source, header.l1_offset, header.l1_size)
    l1[wrong] ^= _U(s.COPIED)
    first, last = int(wrong[0]), int(wrong[-1]) + 1
    data = l1[first:last].astype(s.ENTRY).tobytes()
    yield Patch(header.l1_offset + 8 * first, data, "copied flags of the L1 table set by the refcounts")


def _l2_flags(survey: Survey, wrong_of: _Wrong) -> Iterator[Patch]:
    """Yield one patch for each active L2 table with wrong flags, from the first of them to the last."""
    header = survey.header
    width = 2 if header.extended else 1
    for offsets, words in active_tables(survey):
        entries = words[:, ::width]
        wrong = wrong_of(entries, data_file=header.has_data_file)
        if not wrong.any():
            continue
        doubtful = np.isin(offsets >> _U(header.cluster_bits), np.array(survey.shared, _U))
        doubtful |= faulty_tables(survey, offsets, words)
        survey.unmended += int((wrong.any(axis=1) & doubtful).sum())
        wrong[doubtful] = False
        entries ^= np.where(wrong, _U(s.COPIED), _U(0))
        for row in np.flatnonzero(wrong.any(axis=1)).tolist():
            some = np.flatnonzero(wrong[row]) * width
            first, last = int(some[0]), int(some[-1]) + 1
            data = words[row, first:last].astype(s.ENTRY).tobytes()
            yield Patch(int(offsets[row]) + 8 * first, data, "copied flags of an L2 table set by the refcounts")


def _header_patches(survey: Survey, clear: int | None, layout: RefcountLayout | None) -> Iterator[Patch]:
    """Yield the header's patches: where the refcounts are, then the bits; None clears nothing.

    Autoclear bits that are not known here are cleared by every program that writes to the file.
    """
    header = survey.header
    if layout is not None:
        place = layout.table_offset(header.cluster).to_bytes(8, "big") + layout.table_clusters.to_bytes(4, "big")
        yield Patch(48, place, "the header points to the new refcount table", sync=True)
    if clear is None or header.version < 3:
        return
    autoclear = header.autoclear & (s.AUTOCLEAR_BITMAPS | s.AUTOCLEAR_RAW)
    if autoclear != header.autoclear:
        yield Patch(88, autoclear.to_bytes(8, "big"), "unknown autoclear bits cleared", sync=True)
    incompatible = header.incompatible & ~clear
    if incompatible != header.incompatible:
        yield Patch(72, incompatible.to_bytes(8, "big"), "dirty and corrupt bits cleared", sync=True)
