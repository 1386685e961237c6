"""An NBD export as a source: nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH.

Block status (base:allocation) tells holes where the server can. Several connections are used where it allows that.
"""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from construct import ConstructError

from diskmorph.formats.errors import OptionError, SourceError
from diskmorph.formats.remote import nbd_schema as wire
from diskmorph.formats.source import ByteSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.source import Buffer

_TIMEOUT = 60.0
_CONNECTIONS = 4
_STATUS_SPAN = 1 << 30
_PIECE = 4 << 20
_LEAST_SPAN = 64 << 10  # what one answer to block status decides at the least: of the rest of it, that it is data
_MOST_REPLIES = 1 << 10  # to one option
_MOST_CHUNKS = 1 << 16  # of one structured reply


def address(url: str) -> tuple[Any, str]:
    """Return (socket address, export name) of an NBD URL. Raises OptionError."""
    try:
        parts = urlsplit(url)
        port = parts.port or wire.DEFAULT_PORT
    except ValueError as error:
        raise OptionError(f"{url} is no address: {error}", hint="write nbd://HOST:PORT/EXPORT") from error
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        path = parse_qs(parts.query).get("socket", [""])[0]
        if not path:
            raise OptionError(f"{url} names no socket", hint="write nbd+unix:///EXPORT?socket=PATH")
        return path, export
    if not parts.hostname:
        raise OptionError(f"{url} names no host", hint="write nbd://HOST:PORT/EXPORT")
    return (parts.hostname, port), export


class Connection:
    """One connection in the transmission phase; used by one thread at a time. Raises SourceError."""

    def __init__(self, url: str) -> None:
        self.url = url
        where, export = address(url)
        try:
            self._socket = _connected(where)
        except OSError as error:
            raise self._failed(f"cannot be reached: {error}") from error
        self._cookie = 0
        self.size = 0
        self.flags = 0
        self.structured = self.allocation = False
        self._negotiate(export.encode())

    def _negotiate(self, export: bytes) -> None:
        greeting = self._parse(wire.GREETING)
        flags = greeting.flags & (wire.FIXED_NEWSTYLE | wire.NO_ZEROES)
        if not flags & wire.FIXED_NEWSTYLE:
            raise self._failed("the server knows no fixed newstyle negotiation")
        self.send(wire.CLIENT_FLAGS.build(flags))
        self.structured = self._simple_option(wire.OPT_STRUCTURED_REPLY, b"")
        if self.structured:
            name = wire.NAME.build({"length": len(export), "name": export})
            query = wire.NAME.build({"length": len(wire.ALLOCATION), "name": wire.ALLOCATION})
            self.allocation = self._simple_option(
                wire.OPT_SET_META, name + (1).to_bytes(4, "big") + query, wire.REP_META
            )
        payload = wire.NAME.build({"length": len(export), "name": export}) + bytes(2)
        self._option(wire.OPT_GO, payload)
        told = False
        for kind, data in self._option_replies():
            if kind & wire.REP_ERROR:
                raise self._failed(f"the server refuses the export {export.decode(errors='replace')!r}: {_text(data)}")
            if kind == wire.REP_INFO and data[:2] == b"\0\0" and len(data) == wire.EXPORT_INFO.sizeof():
                info = wire.EXPORT_INFO.parse(data)
                self.size, self.flags, told = info.size, info.flags, True
        if not told:
            raise self._failed("the server does not say how large the export is")

    def _simple_option(self, option: int, payload: bytes, wanted: int | None = None) -> bool:
        """Send an option and return whether it was granted (and, if so asked, a reply of that type came)."""
        self._option(option, payload)
        kinds = {kind for kind, _ in self._option_replies()}
        refused = any(kind & wire.REP_ERROR for kind in kinds)
        return not refused and (wanted is None or wanted in kinds)

    def _option(self, option: int, payload: bytes) -> None:
        self.send(wire.OPTION.build({"option": option, "length": len(payload)}) + payload)

    def _option_replies(self) -> Iterator[tuple[int, bytes]]:
        """Yield (type, data) of the replies to an option, up to the acknowledgement, which is left out, or an error."""
        for _ in range(_MOST_REPLIES):
            kind, data = self._option_reply()
            if kind == wire.REP_ACK:
                return
            yield kind, data
            if kind & wire.REP_ERROR:
                return
        raise self._failed("the server does not end its answer")

    def _option_reply(self) -> tuple[int, bytes]:
        reply = self._parse(wire.OPTION_REPLY)
        if reply.length > 1 << 16:
            raise self._failed("the server's answer is too long")
        return reply.type, self.receive(reply.length)

    def send(self, data: Buffer) -> None:
        """Send all of it."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._failed(f"the connection is lost: {error}") from error

    def receive(self, length: int) -> bytes:
        """Return exactly `length` bytes."""
        buffer = bytearray(length)
        self.receive_into(memoryview(buffer))
        return bytes(buffer)

    def receive_into(self, view: memoryview) -> None:
        """Fill the buffer."""
        try:
            while len(view):
                count = self._socket.recv_into(view)
                if not count:
                    raise self._failed("the server hangs up")
                view = view[count:]
        except OSError as error:
            raise self._failed(f"the connection is lost: {error}") from error

    def _parse(self, schema: Any) -> Any:
        return self._completed(schema, b"")

    def _failed(self, what: str) -> SourceError:
        return SourceError(what, file=self.url)

    def request(self, kind: int, offset: int, length: int, *, flags: int = 0, data: Buffer = b"") -> int:
        """Send a request; return its cookie."""
        self._cookie += 1
        fields = {"flags": flags, "type": kind, "cookie": self._cookie, "offset": offset, "length": length}
        self.send(wire.REQUEST.build(fields))
        if data:
            self.send(data)
        return self._cookie

    def read(self, offset: int, view: memoryview) -> None:
        """Fill the buffer from `offset`: every byte of it, or it raises."""
        cookie = self.request(wire.CMD_READ, offset, len(view))
        if not self.structured:
            self._simple(cookie, offset)
            self.receive_into(view)
            return
        filled: list[tuple[int, int]] = []
        for kind, length in self._chunks(cookie, offset):
            if kind == wire.CHUNK_DATA and length > 8:
                at = int.from_bytes(self.receive(8), "big") - offset
                self.receive_into(self._piece(view, at, length - 8))
                filled.append((at, length - 8))
            elif kind == wire.CHUNK_HOLE and length == wire.HOLE_CHUNK.sizeof():
                hole = wire.HOLE_CHUNK.parse(self.receive(length))
                piece = self._piece(view, hole.offset - offset, hole.length)
                piece[:] = bytes(len(piece))
                filled.append((hole.offset - offset, hole.length))
            else:
                raise self._failed(f"the server answers with a chunk of the type {kind}, which does not belong here")
            if len(filled) > len(view):
                break  # pieces of nothing, or the same ones again
        self._require_whole(filled, offset, len(view))

    def _piece(self, view: memoryview, at: int, length: int) -> memoryview:
        if not 0 <= at <= at + length <= len(view):
            raise self._failed("the server answers with bytes that were not asked for")
        return view[at : at + length]

    def _require_whole(self, filled: list[tuple[int, int]], offset: int, length: int) -> None:
        """Raise SourceError unless the pieces of an answer, in any order, are all that was asked for."""
        done = 0
        for at, count in sorted(filled):
            if at != done:
                break
            done += count
        if done != length:
            raise SourceError(
                "the server leaves out bytes that were asked for",
                file=self.url,
                offset=offset + done,
                expected=f"{length} bytes from {offset}",
                found=done,
            )

    def status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return (bytes, flags) descriptors of base:allocation from `offset`."""
        cookie = self.request(wire.CMD_BLOCK_STATUS, offset, length)
        found: list[tuple[int, int]] = []
        for kind, size in self._chunks(cookie, offset):
            if kind == wire.CHUNK_STATUS and size >= 4 and (size - 4) % 8 == 0 and size <= 1 << 24:
                rows = np.frombuffer(self.receive(size)[4:], wire.STATUS)
                found += list(zip(rows["length"].tolist(), rows["flags"].tolist(), strict=True))
            else:
                raise self._failed("the server answers block status in another form")
        return found

    def _chunks(self, cookie: int, offset: int, first: Any = None) -> Iterator[tuple[int, int]]:
        """Yield (type, bytes) of each chunk of a structured reply; the caller receives the bytes.

        `first`: the header of the first one, where it was received already.
        """
        chunk = self._parse(wire.CHUNK) if first is None else first
        for _ in range(_MOST_CHUNKS):
            if chunk.cookie != cookie:
                raise self._failed("the server answers another request")
            if chunk.type & wire.CHUNK_ERROR:
                body = self.receive(min(chunk.length, 1 << 16))
                raise self._refused(int.from_bytes(body[:4], "big"), offset, body[6:])
            if chunk.type != wire.CHUNK_NONE or chunk.length:
                yield chunk.type, chunk.length
            if chunk.flags & wire.REPLY_DONE:
                return
            chunk = self._parse(wire.CHUNK)
        raise self._failed("the server does not end its answer")

    def _simple(self, cookie: int, offset: int) -> None:
        self._judge(self._parse(wire.SIMPLE_REPLY), cookie, offset)

    def _judge(self, reply: Any, cookie: int, offset: int) -> None:
        """Raise SourceError where a simple reply is another request's or tells of an error."""
        if reply.cookie != cookie:
            raise self._failed("the server answers another request")
        if reply.error:
            raise self._refused(reply.error, offset, b"")

    def command(self, kind: int, offset: int, length: int, data: Buffer = b"") -> None:
        """Write, write zeroes or flush, and wait for the answer."""
        cookie = self.request(kind, offset, length, data=data)
        if not self.structured:
            self._simple(cookie, offset)
            return
        head = self.receive(4)
        if head == b"\x67\x44\x66\x98":  # allowed where there is nothing to tell
            self._judge(self._completed(wire.SIMPLE_REPLY, head), cookie, offset)
            return
        for other, _ in self._chunks(cookie, offset, self._completed(wire.CHUNK, head)):
            raise self._failed(f"the server answers with a chunk of the type {other}, which does not belong here")

    def _completed(self, schema: Any, head: bytes) -> Any:
        """Return a header whose first four bytes are known."""
        try:
            return schema.parse(head + self.receive(schema.sizeof() - len(head)))
        except ConstructError as error:
            raise self._failed("the server speaks another protocol") from error

    def _refused(self, number: int, offset: int, text: bytes) -> SourceError:
        words = f": {_text(text)}" if text else ""
        return SourceError(f"the server answers with error {number}{words}", file=self.url, offset=offset)

    def close(self) -> None:
        """Say goodbye and close."""
        try:
            self.request(wire.CMD_DISC, 0, 0)
        except SourceError:
            pass
        finally:
            self._socket.close()


def _connected(where: Any) -> socket.socket:
    if isinstance(where, str):
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            found.settimeout(_TIMEOUT)
            found.connect(where)
        except BaseException:
            found.close()
            raise
        return found
    found = socket.create_connection(where, _TIMEOUT)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip() or "no reason given"


class NbdSource(ByteSource):
    """An NBD export, read only. Raises SourceError, OptionError (the URL)."""

    def __init__(self, url: str) -> None:
        self.name = url
        first = Connection(url)
        self.size = first.size
        self._many = bool(first.flags & wire.CAN_MULTI_CONN)
        self._free = [first]
        self._count = 1
        self._ready = threading.Condition()

    def _borrow(self) -> Connection:
        with self._ready:
            # With none at all a new one is made, whatever the server allows: the last one may have been lost.
            while not self._free and self._count and not (self._many and self._count < _CONNECTIONS):
                self._ready.wait()
            if self._free:
                return self._free.pop()
            self._count += 1
        try:
            return Connection(self.name)
        except BaseException:
            self._dropped()
            raise

    def _give_back(self, connection: Connection) -> None:
        with self._ready:
            self._free.append(connection)
            self._ready.notify()

    def _dropped(self) -> None:
        with self._ready:
            self._count -= 1
            self._ready.notify()

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource; a lost connection is replaced once."""
        count = max(0, min(len(buffer), self.size - offset, _PIECE))
        if not count:
            return 0
        self._twice(lambda connection: connection.read(offset, buffer[:count]))
        return count

    def _twice(self, action: Any) -> Any:
        for turn in (0, 1):
            connection = self._borrow()
            try:
                result = action(connection)
            except SourceError:
                connection.close()
                self._dropped()
                if turn:
                    raise
                continue
            self._give_back(connection)
            return result
        return None

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """See ByteSource: what block status tells; all is data where the server cannot tell."""
        at = start
        while at < stop:
            span = min(stop - at, _STATUS_SPAN)
            rows = self._twice(lambda c, at=at, span=span: c.status(at, span) if c.allocation else [])
            moved = at
            for length, flags in rows:
                length = min(length, stop - moved)  # noqa: PLW2901 - a server may tell of more than was asked
                if length:
                    yield moved, length, not flags & wire.STATE_ZERO
                moved += length
            if moved == at:
                break
            least = min(stop, at + _LEAST_SPAN)
            if moved < least:  # or a server that tells of single bytes would be asked for ever
                yield moved, least - moved, True
            at = max(moved, least)
        if at < stop:
            yield at, stop - at, True

    def close(self) -> None:
        """See ByteSource."""
        for connection in self._free:
            connection.close()
        self._free = []
