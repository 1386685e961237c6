"""The moves themselves: filling buffers from a disk's files, writing pieces of buffers to a target's members."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Self

import numpy as np

from diskmorph.convert.ahead import read_ahead
from diskmorph.convert.buffers import meet
from diskmorph.convert.clone import clone_range
from diskmorph.convert.passing import Stream
from diskmorph.formats.errors import DiskmorphError, SourceError
from diskmorph.formats.extents import DATA, PLAIN, stops
from diskmorph.formats.rows import chosen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.allocator import Write
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.output import Member
    from diskmorph.formats.source import Buffer

_HELD = 96
"""Descriptors of source files that are held for a whole run; more files are read through their pool."""


class Reader:
    """Fills buffers from a disk's files, through their descriptors where they have one. Thread-safe."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._stack = contextlib.ExitStack()
        self._lent: dict[int, tuple[int, int] | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def descriptor(self, file: int) -> int | None:
        """Return the descriptor of file number `file`, if it has one."""
        lent = self._lend(file)
        return None if lent is None else lent[0]

    def base(self, file: int) -> int:
        """Return the offset within the descriptor of the file's byte 0."""
        lent = self._lend(file)
        return 0 if lent is None else lent[1]

    def _lend(self, file: int) -> tuple[int, int] | None:
        if file not in self._lent:
            full = len(self._lent) >= _HELD
            self._lent[file] = None if full else self._stack.enter_context(self.disk.files[file].descriptor())
        return self._lent[file]

    def fill(
        self,
        rows: NDArray[np.void],
        pieces: NDArray[np.void],
        buffer: memoryview,
        streams: dict[int, Stream] | None = None,
    ) -> None:
        """Fill `buffer`, laid out by `pieces`, with what the extents hold there; zeroes where they hold no data.

        `streams` takes what encodes whole units, by their place in the buffer.
        """
        data = chosen(rows, rows["kind"] == DATA)
        if (
            len(data) == 1
            and len(pieces) == 1
            and data["codec"][0] == PLAIN
            and self._whole(data[0], pieces[0], buffer)
        ):
            return
        row, piece, start, stop = meet(data["start"], stops(data), pieces["start"], pieces["start"] + pieces["length"])
        length = stop - start
        if int(length.sum()) != len(buffer):
            np.frombuffer(buffer, np.uint64)[:] = 0
        at = pieces["at"][piece] + start - pieces["start"][piece]
        ahead = start - data["start"][row]
        met = data.take(row)
        plain = met["codec"] == PLAIN
        if plain.all():
            self._read_plain(met, ahead, at, length, buffer)
            return
        self._read_plain(chosen(met, plain), ahead[plain], at[plain], length[plain], buffer)
        self._decode(chosen(met, ~plain), ahead[~plain], at[~plain], length[~plain], buffer, streams)

    def _whole(self, row: np.void, piece: np.void, buffer: memoryview) -> bool:
        """Read a buffer that one extent covers; False if it does not."""
        start, length = int(piece["start"]), int(piece["length"])
        ahead = start - int(row["start"])
        if ahead < 0 or ahead + length > int(row["length"]):
            return False
        self.read_plain(int(row["file"]), int(row["offset"]) + ahead, buffer[:length])
        if length < len(buffer):
            buffer[length:] = bytes(len(buffer) - length)
        return True

    def _read_plain(
        self,
        rows: NDArray[np.void],
        ahead: NDArray[np.uint64],
        at: NDArray[np.uint64],
        length: NDArray[np.uint64],
        buffer: memoryview,
    ) -> None:
        offsets = (rows["offset"] + ahead).tolist()
        for file, offset, place, count in zip(
            rows["file"].tolist(), offsets, at.tolist(), length.tolist(), strict=True
        ):
            self.read_plain(file, offset, buffer[place : place + count])

    def read_plain(self, file: int, offset: int, view: memoryview) -> None:
        """Fill `view` from file number `file`. Raises SourceError or FormatError."""
        lent = self._lend(file)
        done = 0
        if lent is not None:
            try:
                done = os.preadv(lent[0], (view,), lent[1] + offset)
            except OSError as error:
                name = self.disk.files[file].name
                problem = f"cannot be read: {os.strerror(error.errno or 0)}"
                raise SourceError(problem, file=name, offset=offset) from error
        if done < len(view):
            try:
                self.disk.files[file].read_into(offset + done, view[done:])
            except DiskmorphError as error:
                raise error.located(format=self.disk.format) from error.__cause__

    def _decode(
        self,
        rows: NDArray[np.void],
        ahead: NDArray[np.uint64],
        at: NDArray[np.uint64],
        length: NDArray[np.uint64],
        buffer: memoryview,
        streams: dict[int, Stream] | None,
    ) -> None:
        disk = self.disk
        names = ("file", "offset", "stored", "codec")
        skips = (rows["skip"] + ahead).tolist()
        held_of = read_ahead(disk.files, rows)
        for file, offset, stored, codec, skip, place, count, held in zip(
            *(rows[name].tolist() for name in names), skips, at.tolist(), length.tolist(), held_of, strict=True
        ):
            if streams is None:
                unit = disk.decode_unit(file, offset, stored, codec, skip + count, held)
            else:
                unit, stream = disk.encoded_unit(file, offset, stored, codec, skip + count, held)
                if len(stream) and count == len(unit):
                    streams[place] = Stream(codec, stream, count)
            buffer[place : place + count] = unit[skip : skip + count] if len(unit) != count else unit


class Writer:
    """Writes to a target's members. Thread-safe where they are."""

    def __init__(self, members: Sequence[Member], seal: Callable[[int, Buffer], Buffer] | None = None) -> None:
        self.members = members
        self._seal = seal
        self.fresh = all(member.fresh for member in members)

    def tables(self, writes: Iterable[Write]) -> None:
        """Write what an allocator yields."""
        for member, offset, data in writes:
            self.members[member].write(offset, data)

    def pieces(
        self,
        member: NDArray[np.uint32],
        offset: NDArray[np.uint64],
        at: NDArray[np.uint64],
        length: NDArray[np.uint64],
        buffer: memoryview,
    ) -> None:
        """Write pieces of a buffer; those that continue each other on both sides go as one."""
        if len(at) > 1:
            follows = (at[1:] == at[:-1] + length[:-1]) & (offset[1:] == offset[:-1] + length[:-1])
            follows &= member[1:] == member[:-1]
            heads = np.concatenate(([0], np.flatnonzero(~follows) + 1))
            length = np.add.reduceat(length, heads)
            member, offset, at = member[heads], offset[heads], at[heads]
        for number, to, begin, count in zip(
            member.tolist(), offset.tolist(), at.tolist(), length.tolist(), strict=True
        ):
            data: Buffer = buffer[begin : begin + count]
            self.members[number].write(to, data if self._seal is None else self._seal(to, data))

    def strings(self, member: Sequence[int], offset: Sequence[int], data: Sequence[Buffer]) -> None:
        """Write byte strings; those that continue each other go as one."""
        index = 0
        while index < len(data):
            last = index + 1
            end = offset[index] + len(data[index])
            while last < len(data) and offset[last] == end and member[last] == member[index]:
                end += len(data[last])
                last += 1
            joined = data[index] if last == index + 1 else b"".join(data[index:last])
            self.members[member[index]].write(offset[index], joined)
            index = last

    def zeroes(self, placed: NDArray[np.void], preallocation: str) -> None:
        """Make places read as zeroes, in the way that `preallocation` asks for."""
        for number, offset, length in zip(
            placed["member"].tolist(), placed["offset"].tolist(), placed["length"].tolist(), strict=True
        ):
            member = self.members[number]
            if preallocation == "full":
                write_zeroes(member, offset, length)
            elif preallocation == "falloc" and hasattr(member, "reserve"):
                member.reserve(offset, length)
            else:
                member.zero(offset, length)

    def clone(self, source: int, offset: int, number: int, to: int, length: int) -> bool:
        """Clone a range of a descriptor into a member; False where the file system refuses."""
        fd = self.members[number].fileno()
        if fd is None:
            return False
        try:
            clone_range(source, offset, fd, to, length)
        except OSError:
            return False
        return True


_ZEROES = bytes(1 << 20)


def write_zeroes(member: Member, offset: int, length: int) -> None:
    """Store zeroes, although the member would read as zeroes without."""
    while length:
        count = min(length, len(_ZEROES))
        member.write(offset, _ZEROES if count == len(_ZEROES) else _ZEROES[:count])
        offset, length = offset + count, length - count
