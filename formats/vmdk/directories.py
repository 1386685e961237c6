"""The two grain directories of a hosted extent: which entries can be relied on, and the tables to read by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import FormatError
from diskmorph.formats.vmdk.extent import load_directory, load_tables, require_tables
from diskmorph.formats.vmdk.schema import ENTRY, FLAG_REDUNDANT, SECTOR, SparseHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.source import ByteSource

PRIMARY, REDUNDANT = "grain directory", "redundant grain directory"
BATCH_TABLES = 256


@dataclass(frozen=True, slots=True)
class Directories:
    """What the reader goes by: the byte offset of each grain table, 0 where there is none."""

    tables: NDArray[np.uint64]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Directory:
    """One grain directory as it stands in the file at `sector`.

    `tables` holds the byte offsets that it names. `bad` are entries that cannot be: beyond the file, or over another
    table or a directory and not where the layout puts them; `problem` tells of the first. By the layout the tables lie
    in ascending order, one each `room` bytes, from byte `first`.
    """

    sector: int
    tables: NDArray[np.uint64]
    first: int
    room: int
    bad: NDArray[np.bool_]
    problem: FormatError | None = None

    @property
    def homes(self) -> NDArray[np.uint64]:
        """Byte offset of where the layout puts each table."""
        return np.uint64(self.first) + np.arange(len(self.tables), dtype=np.uint64) * np.uint64(self.room)

    @property
    def settled(self) -> NDArray[np.bool_]:
        """Which tables are where the layout puts them."""
        found: NDArray[np.bool_] = self.tables == self.homes
        return found


def tables_of(header: SparseHeader) -> int:
    """Return how many grain tables the capacity needs."""
    return -(-header.capacity // (header.grain_size * header.table_entries))


def directory_sectors(header: SparseHeader) -> int:
    """Return how many sectors a directory takes."""
    return -(-tables_of(header) * ENTRY.itemsize // SECTOR)


def table_sectors(header: SparseHeader) -> int:
    """Return how many sectors a grain table takes."""
    return -(-header.table_entries * ENTRY.itemsize // SECTOR)


def has_redundant(header: SparseHeader) -> bool:
    """Whether the extent has a redundant directory."""
    return bool(header.flags & FLAG_REDUNDANT) and header.rgd_offset != 0


def load(source: ByteSource, header: SparseHeader, sector: int, structure: str) -> Directory:
    """Return the directory at `sector`. Raises FormatError if it is not all in the file."""
    count, room = tables_of(header), table_sectors(header) * SECTOR
    if not count:
        return Directory(sector, np.zeros(0, np.uint64), 0, room, np.zeros(0, np.bool_))
    tables = load_directory(source, sector, count, ENTRY, structure).astype(np.uint64) * np.uint64(SECTOR)
    first = _first(tables, (sector + directory_sectors(header)) * SECTOR, room)
    found = Directory(sector, tables, first, room, np.zeros(0, np.bool_))
    size = header.table_entries * ENTRY.itemsize
    beyond = tables + np.uint64(size) > np.uint64(source.size)
    bad = (tables != 0) & (beyond | _over_another(found, size, ~beyond) | _over_directory(found, size, header))
    problem = _problem(source, found, beyond, int(np.argmax(bad)), structure) if bad.any() else None
    return Directory(sector, tables, first, room, bad, problem)


def _first(tables: NDArray[np.uint64], behind: int, room: int) -> int:
    """Return where the layout puts the first table: right `behind` the directory, or where most tables agree."""
    used = np.flatnonzero(tables)
    bases = tables[used].astype(np.int64) - used * room
    if len(used) < 3 or (bases == behind).any():
        return behind
    values, counts = np.unique(bases, return_counts=True)
    best = int(np.argmax(counts))
    agreed = values[best] > 0 and int(counts[best]) * 2 > len(used)
    return int(values[best]) if agreed else behind


def _over_another(found: Directory, size: int, among: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which tables overlap another one; where one of the two is where the layout puts it, the other only."""
    over = np.zeros(len(found.tables), np.bool_)
    used = np.flatnonzero((found.tables != 0) & among)
    order = used[np.argsort(found.tables[used], kind="stable")]
    close = np.flatnonzero(np.diff(found.tables[order]) < np.uint64(size))
    if not len(close):
        return over
    over[order[close]] = over[order[close + 1]] = True
    return over & ~found.settled


def _over_directory(found: Directory, size: int, header: SparseHeader) -> NDArray[np.bool_]:
    """Return which tables overlap a directory; where the layout puts one, it is the directory's place that is wrong."""
    over = np.zeros(len(found.tables), np.bool_)
    for sector in (header.gd_offset, header.rgd_offset) if has_redundant(header) else (header.gd_offset,):
        if 0 < sector < 1 << 54:
            start, end = sector * SECTOR, (sector + directory_sectors(header)) * SECTOR
            over |= (found.tables + np.uint64(size) > np.uint64(start)) & (found.tables < np.uint64(end))
    return over & ~found.settled


def _problem(
    source: ByteSource, found: Directory, beyond: NDArray[np.bool_], index: int, structure: str
) -> FormatError:
    return FormatError(
        "a grain table lies beyond the end of the file"
        if beyond[index]
        else "two grain tables, or one and a directory, lie at one place",
        file=source.name,
        format="vmdk",
        structure=structure,
        field=f"entry {index}",
        offset=found.sector * SECTOR + index * ENTRY.itemsize,
        found=int(found.tables[index]) // SECTOR,
    )


def gaps(one: Directory, other: Directory) -> NDArray[np.bool_]:
    """Return for which entries `one` lacks a table that `other` has.

    Where `other` has entries that cannot be, only those of its tables count that are where the layout puts them.
    """
    named = (other.tables != 0) & ~other.bad
    if other.bad.any():
        named &= other.settled
    found: NDArray[np.bool_] = (one.tables == 0) & named
    return found


def misplaced(source: ByteSource, header: SparseHeader, one: Directory, other: Directory) -> NDArray[np.bool_]:
    """Return which tables of `one` are not where the layout puts them and differ from those of `other`, which are."""
    odd = (one.tables != 0) & ~one.bad & (one.tables != other.tables) & ~one.settled & other.settled & ~other.bad
    return differing(source, header, one.tables, other.tables, odd)


def differing(
    source: ByteSource,
    header: SparseHeader,
    ours: NDArray[np.uint64],
    theirs: NDArray[np.uint64],
    among: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Return which of the tables `among` those at byte offsets `ours` and `theirs` differ; they are in the file."""
    found = np.zeros(len(ours), np.bool_)
    where, entries = np.flatnonzero(among), header.table_entries
    for low in range(0, len(where), BATCH_TABLES):
        part = where[low : low + BATCH_TABLES]
        one, other = (load_tables(source, tables[part], entries, ENTRY) for tables in (ours, theirs))
        found[part] = (one != other).reshape(-1, entries).any(axis=1)
    return found


def directories(source: ByteSource, header: SparseHeader) -> Directories:
    """Return the tables to go by: the primary directory's, and the redundant one's where the primary's are damaged.

    Damaged: beyond the file, over each other, missing though the redundant directory has them, or neither where the
    layout puts them nor equal to redundant ones that are. Raises FormatError where both directories are damaged.
    """
    primary, failure = _try(source, header, header.gd_offset, PRIMARY)
    redundant = _try(source, header, header.rgd_offset, REDUNDANT)[0] if has_redundant(header) else None
    if primary is not None and redundant is not None:
        return _merged(source, header, primary, redundant)
    alone = primary or redundant
    failure = failure or (alone.problem if alone else None)
    if failure is None and alone is not None:
        return Directories(alone.tables)
    if redundant is None or redundant.problem is not None:
        raise failure or FormatError("there is no grain directory", format="vmdk", structure=PRIMARY)
    return Directories(redundant.tables, (f"the redundant grain directory is used: {failure}",))


def _try(
    source: ByteSource, header: SparseHeader, sector: int, structure: str
) -> tuple[Directory | None, FormatError | None]:
    try:
        return load(source, header, sector, structure), None
    except FormatError as error:
        return None, error


def _merged(source: ByteSource, header: SparseHeader, primary: Directory, redundant: Directory) -> Directories:
    lost, astray = gaps(primary, redundant), misplaced(source, header, primary, redundant)
    taken = primary.bad | lost | astray
    if not taken.any():
        return Directories(primary.tables)
    if primary.problem is not None and redundant.problem is not None:
        raise primary.problem
    _require_other(source, primary, redundant, lost)
    reasons = [str(primary.problem)] if primary.problem is not None else []
    if lost.any():
        reasons.append(f"the primary lacks {int(lost.sum())} grain tables")
    if astray.any():
        reasons.append(f"{int(astray.sum())} of the primary are neither where the layout puts them nor equal to it")
    both = ~taken & (primary.tables != 0) & (redundant.tables != 0) & ~redundant.bad
    apart = int(differing(source, header, primary.tables, redundant.tables, both).sum())
    if apart:
        reasons.append(f"{apart} other tables of the two differ, so what it gives may be out of date")
    tables = np.where(taken, redundant.tables, primary.tables)
    require_tables(source, tables, header.table_entries * ENTRY.itemsize, PRIMARY)
    text = f"the redundant grain directory is used for {int(taken.sum())} grain tables: {'; '.join(reasons)}"
    return Directories(tables, (text,))


def _require_other(source: ByteSource, primary: Directory, redundant: Directory, lost: NDArray[np.bool_]) -> None:
    """Raise FormatError where the redundant directory is damaged too, so that it cannot stand in for the primary."""
    missing = (redundant.tables == 0) & (primary.tables != 0)
    if not lost.any():
        # A directory whose other tables follow the layout has all of them: one that it lacks is lost.
        whole = int(redundant.settled.sum()) * 2 > int(np.count_nonzero(redundant.tables))
        missing &= primary.bad & whole
    elif redundant.bad.any():
        missing |= redundant.bad
    if not missing.any():
        return
    entry = int(np.argmax(lost if lost.any() else missing))
    raise FormatError(
        "both grain directories have gaps that the other lacks",
        file=source.name,
        format="vmdk",
        structure=PRIMARY,
        field=f"entry {entry}",
        offset=primary.sector * SECTOR + entry * ENTRY.itemsize,
    )
