"""Checking EWF: tables and their copies, the checksum of every chunk, MD5 and SHA-1 of the whole."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.errors import FormatError
from diskmorph.formats.ewf import schema as s
from diskmorph.formats.ewf.reader import EwfDisk, open_image
from diskmorph.formats.ewf.segments import checked
from diskmorph.formats.extents import PLAIN

if TYPE_CHECKING:
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource


def check_image(source: ByteSource, context: OpenContext) -> CheckReport:
    """Return what is wrong with an image that can be opened. Raises FormatError, UnsupportedError, PolicyError."""
    disk = open_image(source, context)
    try:
        return _checked(disk)
    finally:
        for other in disk.files[1:]:
            other.close()


def _checked(disk: EwfDisk) -> CheckReport:
    report = CheckReport("ewf")
    for warning in disk.info.warnings:
        report.add("section error2", None, warning, WARNING)
    _check_tables(disk, report)
    _check_copies(disk, report)
    sums: dict[str, Any] = {name: hashlib.new(name, usedforsecurity=False) for name in disk.contents.hashes}
    whole = _check_chunks(disk, report, list(sums.values()))
    for name, value in disk.contents.hashes.items():
        if whole and sums[name].digest() != value:
            file, place = disk.contents.hash_places[name]
            found = f"the disk's {name.upper()} is {sums[name].hexdigest()}, not {value.hex()} as recorded"
            report.add("section hash", place, _named(disk, file, found))
    return report


def _named(disk: EwfDisk, file: int, message: str) -> str:
    return f"{disk.files[file].name}: {message}" if len(disk.files) > 1 else message


def _check_tables(disk: EwfDisk, report: CheckReport) -> None:
    for table in disk.contents.tables:
        found = []
        for place in (table.place, table.mirror):
            try:
                if place is not None:
                    disk.parsed(table, place)
                    found.append(disk.entries(table, place))
            except FormatError as error:
                report.add("section table", error.offset, _named(disk, table.file, error.problem))
        if len(found) == 2 and not np.array_equal(found[0], found[1]):
            report.add("section table2", table.mirror, _named(disk, table.file, "the copy of a table differs from it"))


def _check_copies(disk: EwfDisk, report: CheckReport) -> None:
    """Check the copies of the volume; Logicube's products leave their checksum out."""
    for file, section in disk.contents.copies:
        source = disk.files[file]
        if disk.contents.old or section.end - section.data < s.VOLUME_SIZE:
            continue
        copy = s.VOLUME.parse(source.read(section.data, s.VOLUME_SIZE))
        try:
            if copy.checksum:
                checked(source, section, s.VOLUME_SIZE)
        except FormatError as error:
            report.add("section data", error.offset, _named(disk, file, error.problem))
        volume = disk.contents.volume
        if (copy.sector, copy.chunk_sectors, copy.sectors) != (volume.sector, volume.chunk_sectors, volume.sectors):
            report.add("section data", section.data, _named(disk, file, "says another size than the volume"), WARNING)


def _check_chunks(disk: EwfDisk, report: CheckReport, sums: list[Any]) -> bool:
    """Decode every chunk, verify plain ones by their Adler-32, feed `sums`; return whether all were well."""
    whole = True
    for index in range(len(disk.contents.tables)):
        try:
            rows = disk.rows(index)
        except FormatError:  # told above
            whole = False
            continue
        for row in rows:
            start, length, file, offset = (int(row[name]) for name in ("start", "length", "file", "offset"))
            try:
                unit = disk.read(start, length)
            except FormatError as error:
                report.add(error.structure or "chunk", error.offset, _named(disk, file, error.problem))
                whole = False
                continue
            if row["codec"] == PLAIN:
                stored = int.from_bytes(disk.files[file].read(offset + length, s.CHECKSUM), "little")
                if stored != zlib.adler32(unit):
                    message = f"a chunk's Adler-32 is {zlib.adler32(unit):08x}, not {stored:08x} as recorded"
                    report.add("chunk", offset, _named(disk, file, message))
            for one in sums if whole else ():
                one.update(unit)
    return whole
