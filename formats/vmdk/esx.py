"""ESX's sparse extents: vmfsSparse (COWD; VDF "ESX Server Sparse Extents") and seSparse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from construct import ConstError

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE, ZERO
from diskmorph.formats.vmdk import schema
from diskmorph.formats.vmdk.extent import GrainTables, load_directory, require_tables
from diskmorph.formats.vmdk.schema import COWD_TABLE_ENTRIES, ENTRY, SECTOR, WIDE_ENTRY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.vmdk.schema import CowdHeader, SeSparseHeader

_MAX_COWD_GRAIN = 1 << 16


def _wrong(
    source: ByteSource, structure: str, field: str, expected: object, found: object, offset: int = 0
) -> FormatError:
    return FormatError(
        f"the {structure} makes no sense",
        file=source.name,
        format="vmdk",
        structure=structure,
        field=field,
        offset=offset,
        expected=expected,
        found=found,
    )


class CowdExtent(GrainTables):
    """A vmfsSparse extent: tables of 4096 sector numbers."""

    kind = "VMFSSPARSE"
    dtype = ENTRY

    def __init__(self, source: ByteSource, limits: Limits, size: int | None = None, empty: int = HOLE) -> None:
        header = self.header = _cowd_header(source, limits)
        tables = load_directory(source, header.gd_offset, header.gd_entries, ENTRY)
        need = -(-header.capacity // (header.grain_size * COWD_TABLE_ENTRIES))
        offsets = tables[:need].astype(np.uint64) * np.uint64(SECTOR)
        require_tables(source, offsets, COWD_TABLE_ENTRIES * ENTRY.itemsize)
        self.warnings = ("was not closed cleanly when it was last written",) if header.unclean else ()
        super().__init__(
            source,
            header.capacity * SECTOR if size is None else size,
            grain=header.grain_size * SECTOR,
            entries=COWD_TABLE_ENTRIES,
            tables=offsets,
            empty=empty,
        )

    def resolve(self, first: int, entries: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """See GrainTables."""
        del first
        kinds = np.where(entries == 0, self.empty, DATA).astype(np.uint8)
        return kinds, entries.astype(np.uint64) * np.uint64(SECTOR)


def _cowd_header(source: ByteSource, limits: Limits) -> CowdHeader:
    header = schema.COWD_HEADER.parse(source.read(0, schema.COWD_HEADER.sizeof()))
    name = "COWD header"
    if header.version != 1:
        raise UnsupportedError(
            f"COWD version {header.version} is not supported",
            feature=f"COWD version {header.version}",
            file=source.name,
            format="vmdk",
            structure=name,
            field="version",
        )
    grain = header.grain_size
    if not 1 <= grain <= _MAX_COWD_GRAIN or grain & (grain - 1):
        raise _wrong(source, name, "grain_size", f"a power of two up to {_MAX_COWD_GRAIN}", grain)
    need = -(-header.capacity // (grain * COWD_TABLE_ENTRIES))
    if header.gd_entries < need or header.gd_entries * 16 > limits.resident_table:
        raise _wrong(source, name, "gd_entries", f"{need} or a few more", header.gd_entries)
    return header


class SeSparseExtent(GrainTables):
    """An seSparse extent: 64-bit entries with a state in the top 4 bits."""

    kind = "SESPARSE"
    dtype = WIDE_ENTRY

    def __init__(self, source: ByteSource, limits: Limits, size: int | None = None, empty: int = HOLE) -> None:
        header = self.header = _sesparse_header(source, limits)
        entries = header.table_size * SECTOR // WIDE_ENTRY.itemsize
        super().__init__(
            source,
            header.capacity * SECTOR if size is None else size,
            grain=header.grain_size * SECTOR,
            entries=entries,
            tables=_sesparse_tables(source, header, entries),
            empty=empty,
        )

    def resolve(self, first: int, entries: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """See GrainTables. An allocated entry keeps the low 12 bits of the grain's number above the high 48."""
        states = (entries >> np.uint64(60)).astype(np.uint8)
        bad = np.flatnonzero((states > schema.ALLOCATED) | ((states == schema.UNALLOCATED) & (entries != 0)))
        if bad.size:
            raise _wrong(
                self.source,
                "grain table",
                f"entry of grain {first + int(bad[0])}",
                "a known state",
                hex(int(entries[bad[0]])),
            )
        kinds = np.array([self.empty, ZERO, ZERO, DATA], np.uint8)[states]
        numbers = ((entries >> np.uint64(48)) & np.uint64(0xFFF)) | (
            (entries & np.uint64(0x0000FFFFFFFFFFFF)) << np.uint64(12)
        )
        far = np.flatnonzero((kinds == DATA) & (numbers > np.uint64(self.source.size // self.grain)))
        if far.size:
            raise FormatError(
                "the image is truncated: a grain lies beyond its end",
                file=self.source.name,
                format="vmdk",
                structure="grain table",
                field=f"entry of grain {first + int(far[0])}",
                offset=self.header.grains_offset * SECTOR + int(numbers[far[0]]) * self.grain,
                found=f"the end at {self.source.size}",
            )
        return kinds, numbers * np.uint64(self.grain) + np.uint64(self.header.grains_offset * SECTOR)


def _sesparse_header(source: ByteSource, limits: Limits) -> SeSparseHeader:
    header = schema.SESPARSE_HEADER.parse(source.read(0, SECTOR))
    name = "seSparse header"
    if header.version != schema.SESPARSE_VERSION or header.flags or any(header.reserved):
        raise UnsupportedError(
            f"seSparse version {header.version:#x} with flags {header.flags:#x} is not supported",
            feature="seSparse version",
            file=source.name,
            format="vmdk",
            structure=name,
            field="version",
        )
    for field, expected in (("grain_size", 8), ("table_size", 64)):
        if getattr(header, field) != expected:
            raise _wrong(source, name, field, expected, getattr(header, field))
    count = header.gd_size * SECTOR // WIDE_ENTRY.itemsize
    need = -(-header.capacity // (header.grain_size * header.table_size * SECTOR // WIDE_ENTRY.itemsize))
    if need > count or need * 24 > limits.resident_table:
        raise _wrong(source, name, "capacity", f"at most {count} grain tables", need)
    if max(header.grains_offset, header.tables_offset) * SECTOR > source.size or not header.tables_offset:
        raise _wrong(source, name, "grains_offset", f"at most {source.size // SECTOR}", header.grains_offset)
    _require_clean(source, header)
    return header


def _require_clean(source: ByteSource, header: SeSparseHeader) -> None:
    at = header.volatile_offset * SECTOR
    try:
        volatile = schema.SESPARSE_VOLATILE.parse(source.read(at, SECTOR))
    except ConstError as error:
        raise _wrong(source, "seSparse volatile header", "magic", "0xcafecafe", "another", at) from error
    if volatile.replay_journal:
        raise UnsupportedError(
            "its journal holds changes that must be replayed first",
            feature="seSparse journal",
            file=source.name,
            format="vmdk",
            structure="seSparse volatile header",
            field="replay_journal",
            offset=at,
            found=volatile.replay_journal,
            hint="open and close the disk once where it was made",
        )


def _sesparse_tables(source: ByteSource, header: SeSparseHeader, entries: int) -> NDArray[np.uint64]:
    """Return the byte offsets of the grain tables; a directory entry counts tables within the tables' area."""
    need = -(-header.capacity // (header.grain_size * entries))
    raw = load_directory(source, header.gd_offset, need, WIDE_ENTRY) if need else np.zeros(0, WIDE_ENTRY)
    numbers = raw & np.uint64(0xFFFFFFFF)
    most = header.tables_size // header.table_size
    used = raw != 0
    bad = np.flatnonzero(used & (((raw >> np.uint64(32)) != 0x10000000) | (numbers >= most)))
    if bad.size:
        at = header.gd_offset * SECTOR + int(bad[0]) * WIDE_ENTRY.itemsize
        raise _wrong(
            source, "grain directory", f"entry {int(bad[0])}", f"a table below {most}", hex(int(raw[bad[0]])), at
        )
    offsets = numbers * np.uint64(header.table_size * SECTOR) + np.uint64(header.tables_offset * SECTOR)
    tables = np.where(used, offsets, np.uint64(0))
    require_tables(source, tables, header.table_size * SECTOR)
    return tables
