"""Checking qcow2: every table, every reference against its refcount, every flag that depends on it.

Corruptions and leaks are counted as `qemu-img check` counts them: a refcount above the references is a leak, one below
them a corruption.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.check import ERROR, LEAK, WARNING, CheckReport
from diskmorph.formats.errors import FormatError, OptionError, UnsupportedError
from diskmorph.formats.extents import PLAIN
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.extensions import read_snapshots
from diskmorph.formats.qcow2.flags import Singles, active_tables, wrong_flags
from diskmorph.formats.qcow2.header import read_header
from diskmorph.formats.qcow2.reader import open_image
from diskmorph.formats.qcow2.refcounts import stored_refcounts
from diskmorph.formats.qcow2.references import Counter, counted, data_references, metadata_counted
from diskmorph.formats.qcow2.repair import plan_repair
from diskmorph.formats.qcow2.survey import Survey, Surveyor, note

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

_U = np.uint64
_WINDOWS = 64


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule. `repair` "leaks" lowers refcounts that are too high; "all" mends refcounts and flags.

    Raises FormatError where the header, the L1 table or the refcount table cannot be read.
    """
    if repair not in {None, "leaks", "all"}:
        raise OptionError(f"qcow2 has no repair {repair!r}", hint="leaks or all")
    header = read_header(source, context.limits)
    report = CheckReport("qcow2")
    _check_bits(header, report)
    survey = Surveyor(source, header, context.limits, report).survey()
    windows, first = _first_pass(survey, report)
    singles = Singles(windows, survey)
    for base in windows:
        counter, first = (counted(survey, base) if first is None else first), None
        _check_window(survey, counter, singles, report)
        del counter
    _check_copied(survey, singles, report)
    _check_tail(survey, context, report)
    if repair is not None:
        plan_repair(survey, windows, singles, repair, report)
    return report


def _check_bits(header: Header, report: CheckReport) -> None:
    if header.incompatible & s.DIRTY:
        report.add("header", 72, "the dirty bit is set: the image was not closed, refcounts may be wrong", WARNING)
    if header.incompatible & s.CORRUPT:
        report.add("header", 72, "the corrupt bit is set: QEMU found this image corrupt", WARNING)
    unknown = header.autoclear & ~(s.AUTOCLEAR_BITMAPS | s.AUTOCLEAR_RAW)
    if unknown:
        report.add("header", 88, f"unknown autoclear features {unknown:#x}", WARNING)
    if header.extensions.bitmaps is not None and not header.autoclear & s.AUTOCLEAR_BITMAPS:
        report.add("header", 88, "the bitmaps are out of date: their autoclear bit is not set", WARNING)


def _check_tail(survey: Survey, context: OpenContext, report: CheckReport) -> None:
    """Report data that is missing where the file ends inside a cluster, which no count of clusters shows."""
    if survey.overhang and not survey.header.has_data_file:
        _check_overhang(survey, context, report)
    if survey.rebuild and survey.beyond:
        message = "refcounts are not built anew: what lies beyond the file's end is, or may be, referred to"
        message += "; restore the rest of the file first"
        report.add("refcount table", survey.header.refcount_offset, message, WARNING)


def _check_overhang(survey: Survey, context: OpenContext, report: CheckReport) -> None:
    contexts = [context]
    if survey.rebuild:  # the file would grow: what only snapshots have must not become zeroes either
        contexts += _of_snapshots(survey, context)
    for one in contexts:
        try:
            _read_last(survey.source, one)
        except FormatError as error:
            survey.beyond = True
            survey.unmended += 1
            if not report.corruptions:
                report.add(error.structure or "data cluster", error.offset, error.problem)
        except UnsupportedError:  # encrypted: where its data ends is not looked at
            survey.beyond = True


def _of_snapshots(survey: Survey, context: OpenContext) -> list[OpenContext]:
    try:
        snapshots = read_snapshots(survey.source, survey.header)
    except FormatError:  # reported by the survey
        return []
    return [replace(context, snapshot=entry.info.id) for entry in snapshots]


def _read_last(source: ByteSource, context: OpenContext) -> None:
    """Judge where all data lies, and decode the compressed clusters whose sectors reach the file's end."""
    disk = open_image(source, context)
    for rows in disk.extents():
        last = rows[(rows["codec"] != PLAIN) & (rows["offset"] + rows["stored"] >= source.size)]
        for start in last["start"].tolist():
            disk.read(start, 1)


def _first_pass(survey: Survey, report: CheckReport) -> tuple[list[int], Counter | None]:
    """Judge every L2 entry; return the windows in which anything is used, and the first one, counted."""
    counter = metadata_counted(survey, 0)
    window = survey.window
    tables = (survey.tables >> _U(survey.header.cluster_bits)).astype(np.int64)
    blocks = np.flatnonzero(survey.blocks) * survey.header.block_entries
    ends = blocks + survey.header.block_entries - 1
    seen = {0}
    for part in (survey.fixed, survey.refcounts, tables, blocks, ends):
        seen |= set(np.unique(part // window).tolist())
    for clusters, weights in data_references(survey, report):
        counter.add(clusters, weights)
        if survey.clusters > window and len(clusters):
            seen |= set(np.unique(clusters // window).tolist())
        if len(seen) > _WINDOWS:
            break
    windows = sorted(number * window for number in seen if number * window < survey.clusters)
    if len(windows) > _WINDOWS:
        raise UnsupportedError(
            f"is too large to check: its clusters lie in more than {_WINDOWS} windows of {window}",
            feature="checks of such files",
            file=survey.source.name,
            format="qcow2",
        )
    return windows, counter


def _check_window(survey: Survey, counter: Counter, singles: Singles, report: CheckReport) -> None:
    overlaps, lasting = _overlaps(survey, counter)
    survey.structural += lasting
    survey.shared += (overlaps + counter.base).tolist()
    header = survey.header
    if counter.overflown:
        report.add("refcount", None, "a cluster has more references than a refcount can hold")
        survey.structural += 1
    for low, stored in stored_refcounts(survey.source, header, survey.blocks, counter.base, len(counter.counts)):
        counts = counter.counts[low : low + len(stored)].astype(_U)
        singles.put(counter.base + low, stored == 1)
        _compare(survey, counter.base + low, stored, counts, report)
        # An overlap whose refcount agrees is none of the mismatches above, but no less wrong.
        inside = overlaps[(overlaps >= low) & (overlaps < low + len(stored))]
        hidden = inside[stored[inside - low] >= counts[inside - low]]
        offsets = (hidden + counter.base) << header.cluster_bits
        note(report, "metadata", offsets, "a cluster of metadata is used for something else too")
    _check_blocks(survey, counter, report)


def _check_blocks(survey: Survey, counter: Counter, report: CheckReport) -> None:
    """Report refcount blocks that are used for something else too; then all refcounts must be built anew elsewhere."""
    index = survey.refcounts - counter.base
    index = index[(index >= 0) & (index < len(counter.counts))]
    survey.rebuild |= bool((counter.counts[index] != 1).any())
    where = np.flatnonzero(survey.blocks)
    places = (survey.blocks[where] >> _U(survey.header.cluster_bits)).astype(np.int64) - counter.base
    inside = (places >= 0) & (places < len(counter.counts))
    wrong = where[inside][counter.counts[places[inside]] != 1]
    offsets = survey.header.refcount_offset + 8 * wrong
    note(report, "refcount table", offsets, "a refcount block is used for something else too")


def _overlaps(survey: Survey, counter: Counter) -> tuple[NDArray[np.int64], int]:
    """Return the clusters of metadata (numbers within the window) with more references than their own.

    And how many of them stay so when the refcounts are built anew elsewhere. Refcount blocks are judged by themselves.
    """
    tables = (survey.tables >> _U(survey.header.cluster_bits)).astype(np.int64)
    table = (survey.header.refcount_offset >> survey.header.cluster_bits) + np.arange(survey.header.refcount_clusters)
    own = np.unique(np.concatenate((survey.fixed, table, tables))) - counter.base
    due = np.ones(len(own), np.int64)
    due[np.searchsorted(own, tables - counter.base)] = survey.weights
    inside = (own >= 0) & (own < len(counter.counts))
    own, due = own[inside], due[inside]
    more = counter.counts[own] > due
    own, due = own[more], due[more]
    refcounts = survey.refcounts[np.isin(survey.refcounts, own + counter.base)] - counter.base
    rest = counter.counts[own] - due - np.bincount(np.searchsorted(own, refcounts), minlength=len(own))
    lasting = np.isin(own + counter.base, np.concatenate((survey.fixed, tables))) & (rest > 0)
    return own, int(lasting.sum())


def _compare(
    survey: Survey, base: int, stored: NDArray[np.uint64], counts: NDArray[np.uint64], report: CheckReport
) -> None:
    for found, severity in ((np.flatnonzero(stored > counts), LEAK), (np.flatnonzero(stored < counts), ERROR)):
        if not len(found):
            continue
        offsets = (found + base) << survey.header.cluster_bits
        structure = "refcount"

        def message(number: int, found: NDArray[np.int64] = found) -> str:
            index = int(found[number])
            return f"cluster {base + index} has refcount {int(stored[index])} but {int(counts[index])} references"

        note(report, structure, offsets, message, severity)
        if severity == ERROR:
            _judge_mend(survey, (found + base) // survey.header.block_entries, int(counts[found].max()))


def _judge_mend(survey: Survey, blocks: NDArray[np.int64], most: int) -> None:
    """Note whether refcounts that are too low can be raised where they are."""
    if most >> survey.header.refcount_bits:
        survey.structural += 1
    if int(blocks[-1]) >= len(survey.blocks) or not survey.blocks[blocks].all():
        survey.rebuild = True


def _check_copied(survey: Survey, singles: Singles, report: CheckReport) -> None:
    header = survey.header
    wrong = np.flatnonzero(wrong_flags(survey, survey.l1, singles, data_file=False))
    message = "the copied flag does not agree with the refcount"
    note(report, "L1 table", header.l1_offset + 8 * wrong, message)
    width = 2 if header.extended else 1
    for offsets, words in active_tables(survey):
        flags = wrong_flags(survey, words[:, ::width], singles, data_file=header.has_data_file)
        if flags.any():
            rows, columns = np.nonzero(flags)
            note(report, "L2 table", offsets[rows].astype(np.int64) + 8 * width * columns, message)
