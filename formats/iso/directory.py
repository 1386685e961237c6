"""Directories of ISO 9660 as tables: every record of a directory is parsed at once.

A directory of 50,000 records takes a few NumPy operations and one small Python loop over record lengths; a Construct
for each record would take 30 us a record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import FormatError
from diskmorph.formats.iso.schema import RECORD, RECORD_SIZE, SECTOR

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one directory. `data` holds the directory's bytes; arrays have a value a record.

    `at`: where each record begins in `data`; `head`: its fixed part (schema.RECORD).
    """

    data: bytes
    at: NDArray[np.int64]
    head: NDArray[np.void]

    def names(self) -> list[bytes]:
        """Return the file identifiers as stored."""
        data = self.data
        starts = (self.at + RECORD_SIZE).tolist()
        return [data[a : a + n] for a, n in zip(starts, self.head["name_length"].tolist(), strict=True)]

    def system_use(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where each record's system use area begins and ends in `data` (ECMA-119 9.1.13)."""
        names = self.head["name_length"].astype(np.int64)
        begin = self.at + RECORD_SIZE + names + (1 - names % 2)
        end = self.at + self.head["length"]
        return np.minimum(begin, end), end


def parse_records(data: bytes, file: str, offset: int) -> Records:
    """Return the records of a directory's bytes, which lie at `offset` of `file`. Raises FormatError."""
    starts: list[int] = []
    add = starts.append
    at, size = 0, len(data)
    while at < size:
        length = data[at]
        if length == 0:
            at = (at // SECTOR + 1) * SECTOR
            continue
        add(at)
        at += length
    begins = np.array(starts, np.int64)
    _require_whole(data, begins, file, offset)
    cells = np.frombuffer(data, np.uint8)
    head = cells[begins[:, None] + np.arange(RECORD_SIZE)].reshape(-1).view(RECORD) if starts else np.zeros(0, RECORD)
    too_long = np.flatnonzero(head["name_length"] + RECORD_SIZE > head["length"])
    if len(too_long):
        raise _damaged("name_length", offset + starts[too_long[0]], "a name inside its record", file)
    return Records(data, begins, head)


def _require_whole(data: bytes, begins: NDArray[np.int64], file: str, offset: int) -> None:
    if not len(begins):
        raise _damaged("length", offset, "records", file)
    lengths = np.frombuffer(data, np.uint8)[begins]
    crossing = begins // SECTOR != (begins + lengths - 1) // SECTOR
    bad = np.flatnonzero((lengths < RECORD_SIZE + 1) | crossing | (begins + lengths > len(data)))
    if len(bad):
        raise _damaged("length", offset + int(begins[bad[0]]), "34 bytes or more, within a sector", file)


def _damaged(field: str, offset: int, expected: str, file: str) -> FormatError:
    return FormatError(
        "a directory is damaged",
        file=file,
        format="iso",
        structure="directory record",
        field=field,
        offset=offset,
        expected=expected,
    )


_DAYS_BEFORE = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)


def record_seconds(time: NDArray[np.uint8], zone: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return seconds since 1970 of 7-byte times (ECMA-119 9.1.5): `time` has six columns. A zeroed time is 0."""
    year, month, day, hour, minute, second = (time[:, i].astype(np.int64) for i in range(6))
    year = year + 1900
    before = np.array(_DAYS_BEFORE, np.int64)[np.clip(month, 1, 12) - 1]
    leap = ((year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0)) & (month > 2)).astype(np.int64)
    last = year - 1
    days = (year - 1970) * 365 + (last // 4 - last // 100 + last // 400) - (1969 // 4 - 1969 // 100 + 1969 // 400)
    total = ((days + before + leap + day - 1) * 24 + hour) * 3600 + minute * 60 + second - zone.astype(np.int64) * 900
    return np.where(month == 0, 0, total)
