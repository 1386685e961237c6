"""An NBD export as a target: the disk's plain bytes, written in place. A failure leaves its content undefined."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diskmorph.formats.errors import SourceError, TargetError
from diskmorph.formats.output_in_place import InPlaceMember, InPlaceTarget
from diskmorph.formats.remote import nbd_schema as wire
from diskmorph.formats.remote.nbd import Connection, NbdSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.source import Buffer, ByteSource

_CONNECTIONS = 4
_PIECE = 4 << 20
_SPAN = 128 << 20
"""Bytes zeroed by one request: servers that must write them answer before they time out."""


class NbdMember(InPlaceMember):
    """The export: zeroes by WRITE_ZEROES, else by TRIM where block status then says that they read so, else written."""

    def __init__(self, url: str, size: int) -> None:
        self.name = url
        try:
            first = Connection(url)
        except SourceError as error:
            raise TargetError(error.problem, file=error.file) from error
        self._free = [first]
        self._count = 1
        self._ready = threading.Condition()
        self._flags = first.flags
        self._many = bool(first.flags & wire.CAN_MULTI_CONN)
        self.capacity = first.size
        problem = None
        if first.flags & wire.READ_ONLY:
            problem = TargetError("is exported read-only", file=url)
        elif first.size < size:
            problem = TargetError("is too small", file=url, expected=f"{size} bytes", found=first.size)
        if problem is not None:
            self.close()
            raise problem

    @property
    def ordered(self) -> bool:
        """Return False: an export is written at any offset."""
        return False

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with self._ready:
            while not self._free and not (self._many and self._count < _CONNECTIONS):
                self._ready.wait()
            connection = self._free.pop() if self._free else None
            self._count += connection is None
        try:
            connection = connection or Connection(self.name)
            yield connection
        except SourceError as error:
            raise _as_target(error) from error
        finally:
            with self._ready:
                if connection is not None:
                    self._free.append(connection)
                else:
                    self._count -= 1
                self._ready.notify()

    def write(self, offset: int, data: Buffer) -> None:
        """See Member."""
        view = memoryview(data).cast("B")
        with self._connection() as connection:
            while view:
                count = min(len(view), _PIECE)
                connection.command(wire.CMD_WRITE, offset, count, view[:count])
                offset, view = offset + count, view[count:]

    def zero(self, offset: int, length: int) -> None:
        """See Member; the server may make a hole of it."""
        for at in range(offset, offset + length, _SPAN):
            self._zero(at, min(_SPAN, offset + length - at))

    def _zero(self, offset: int, length: int) -> None:
        if self._flags & wire.SEND_WRITE_ZEROES:
            with self._connection() as connection:
                connection.command(wire.CMD_WRITE_ZEROES, offset, length)
            return
        for at, count in self._not_zero(offset, length):
            super().zero(at, count)

    def _not_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Trim a range; return what of it is not known to read as zeroes now (TRIM promises nothing by itself)."""
        if not self._flags & wire.SEND_TRIM:
            return [(offset, length)]
        with self._connection() as connection:
            if not connection.allocation:
                return [(offset, length)]
            connection.command(wire.CMD_TRIM, offset, length)
            left = []
            at, stop = offset, offset + length
            while at < stop:
                rows = connection.status(at, stop - at)
                before = at
                for told, flags in rows:
                    count = min(told, stop - at)
                    if count and not flags & wire.STATE_ZERO:
                        left.append((at, count))
                    at += count
                if at == before:
                    left.append((at, stop - at))
                    break
            return left

    def sync(self) -> None:
        """Wait until the bytes are on the server's storage, if it can say; one FLUSH holds for all connections."""
        if not self._flags & wire.SEND_FLUSH:
            return
        with self._connection() as connection:
            connection.command(wire.CMD_FLUSH, 0, 0)

    def reread(self) -> ByteSource:
        """See Member."""
        self.sync()
        return NbdSource(self.name)

    def close(self) -> None:
        """Hang up."""
        for connection in self._free:
            connection.close()
        self._free = []


class NbdTarget(InPlaceTarget):
    """An export of at least `size` bytes; what is beyond them stays as it is. Raises TargetError, OptionError."""

    def __init__(self, url: str, size: int, *, sync: bool = True) -> None:
        super().__init__(NbdMember(url, size), sync=sync)


def _as_target(error: SourceError) -> TargetError:
    return TargetError(error.problem, file=error.file, offset=error.offset, hint="its content is undefined now")
