"""Any disk, read-only, over NBD: so that qemu, nbdkit, libnbd and the kernel's client can use it where it lies."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from typing import TYPE_CHECKING

import numpy as np
from construct import ConstructError

from diskmorph.formats.errors import DiskmorphError, TargetError
from diskmorph.formats.extents import DATA, HOLE
from diskmorph.formats.remote import nbd_schema as wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from diskmorph.formats.disk import Disk

_MOST_OPTION = 1 << 16
_MOST_ROWS = 4096
_FLAGS = wire.HAS_FLAGS | wire.READ_ONLY | wire.SEND_FLUSH | wire.CAN_MULTI_CONN
_CONTEXT = 1
_PASSING = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR))
"""Why a client is not accepted now, and may be in a moment: those who are served go on (accept(2))."""
_PAUSE = 0.1
"""Seconds until it is tried again."""


class _Gone(Exception):  # noqa: N818 - no error: the client has left
    pass


class Server:
    """Serves one disk to any number of clients, a thread each, until `stop`.

    Listens on a Unix socket (`path`) or a TCP port of the loopback address (`port`, 0: any). Raises TargetError where
    it cannot.
    """

    def __init__(self, disk: Disk, *, path: Path | None = None, port: int | None = None, name: str = "") -> None:
        self._disk = disk
        self._name = name.encode()
        self._path = path
        self._stopping = threading.Event()
        self._clients: set[socket.socket] = set()
        try:
            self._socket = _listening(path, port)
        except OSError as error:
            where = str(path) if path is not None else f"127.0.0.1:{port}"
            raise TargetError(f"cannot be listened on: {error.strerror}", file=where) from error

    @property
    def url(self) -> str:
        """The NBD URL under which the disk is served."""
        name = self._name.decode()
        if self._path is not None:
            return f"nbd+unix:///{name}?socket={self._path}"
        return f"nbd://127.0.0.1:{self._socket.getsockname()[1]}/{name}"

    def run(self) -> None:
        """Accept clients until `stop` is called from another thread or a signal handler raises."""
        try:
            while not self._stopping.is_set():
                try:
                    client, _ = self._socket.accept()
                except OSError as error:
                    if error.errno not in _PASSING:
                        break
                    self._stopping.wait(_PAUSE)
                    continue
                self._clients.add(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()
        finally:
            self.stop()

    def stop(self) -> None:
        """Hang up on everybody and remove the socket's name."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        for end in (self._socket, *list(self._clients)):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(_Gone, OSError), client:
            _Session(self._disk, client, self._name).run()
        self._clients.discard(client)


def _listening(path: Path | None, port: int | None) -> socket.socket:
    """Return a socket that listens. Raises OSError."""
    if path is None:
        return socket.create_server(("127.0.0.1", port or 0))
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(os.fspath(path))
        made.listen()
    except OSError:
        made.close()
        raise
    return made


class _Session:
    """One client's connection."""

    def __init__(self, disk: Disk, client: socket.socket, name: bytes) -> None:
        self._disk, self._client, self._name = disk, client, name
        self._structured = self._allocation = False

    def run(self) -> None:
        """Negotiate, then answer requests until the client leaves."""
        self._send(wire.GREETING.build({"flags": wire.FIXED_NEWSTYLE | wire.NO_ZEROES}))
        flags = wire.CLIENT_FLAGS.parse(self._receive(4))
        while self._option(no_zeroes=bool(flags & wire.NO_ZEROES)):
            pass
        while True:
            self._request()

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self._client.recv(length - len(data))
            if not piece:
                raise _Gone
            data += piece
        return data

    def _send(self, *pieces: bytes | bytearray | memoryview) -> None:
        self._client.sendall(b"".join(pieces))

    def _option(self, *, no_zeroes: bool) -> bool:
        """Answer one option; return whether more may follow."""
        try:
            option = wire.OPTION.parse(self._receive(wire.OPTION.sizeof()))
        except ConstructError as error:
            raise _Gone from error
        if option.length > _MOST_OPTION:
            raise _Gone
        payload = self._receive(option.length)
        if option.option == wire.OPT_EXPORT_NAME:
            self._require_name(payload)
            reply = wire.EXPORT_NAME_REPLY.build({"size": self._disk.size, "flags": _FLAGS})
            self._send(reply, b"" if no_zeroes else bytes(124))
            return False
        if option.option == wire.OPT_ABORT:
            self._reply(option.option, wire.REP_ACK)
            raise _Gone
        handler = self._handlers().get(option.option)
        if handler is None:
            self._reply(option.option, wire.REP_ERR_UNSUP)
            return True
        return handler(option.option, payload)

    def _handlers(self) -> dict[int, Callable[[int, bytes], bool]]:
        return {
            wire.OPT_LIST: self._list,
            wire.OPT_INFO: self._go,
            wire.OPT_GO: self._go,
            wire.OPT_STRUCTURED_REPLY: self._structured_reply,
            wire.OPT_LIST_META: self._meta,
            wire.OPT_SET_META: self._meta,
        }

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._send(wire.OPTION_REPLY.build({"option": option, "type": kind, "length": len(data)}), data)

    def _require_name(self, name: bytes) -> None:
        if name not in (self._name, b""):
            raise _Gone

    def _list(self, option: int, _payload: bytes) -> bool:
        self._reply(option, wire.REP_SERVER, wire.NAME.build({"length": len(self._name), "name": self._name}))
        self._reply(option, wire.REP_ACK)
        return True

    def _go(self, option: int, payload: bytes) -> bool:
        try:
            name = wire.NAME.parse(payload).name
        except ConstructError:
            self._reply(option, wire.REP_ERR_INVALID)
            return True
        if name not in (self._name, b""):
            self._reply(option, wire.REP_ERR_UNKNOWN, b"no such export")
            return True
        export = {"type": wire.INFO_EXPORT, "size": self._disk.size, "flags": _FLAGS}
        self._reply(option, wire.REP_INFO, wire.EXPORT_INFO.build(export))
        block = {"type": wire.INFO_BLOCK_SIZE, "minimum": 1, "preferred": 65536, "maximum": wire.MAX_REQUEST}
        self._reply(option, wire.REP_INFO, wire.BLOCK_INFO.build(block))
        self._reply(option, wire.REP_ACK)
        return option != wire.OPT_GO

    def _structured_reply(self, option: int, _payload: bytes) -> bool:
        self._structured = True
        self._reply(option, wire.REP_ACK)
        return True

    def _meta(self, option: int, payload: bytes) -> bool:
        """Grant base:allocation where it is asked for, or everything (a query of nothing) is listed."""
        try:
            name = wire.NAME.parse(payload).name
            queries = payload[4 + len(name) :]
            count = int.from_bytes(queries[:4], "big")
            at = 4
            wanted = [] if count else [wire.ALLOCATION]
            for _ in range(min(count, 64)):
                query = wire.NAME.parse(queries[at:]).name
                wanted.append(query)
                at += 4 + len(query)
        except ConstructError:
            self._reply(option, wire.REP_ERR_INVALID)
            return True
        granted = self._structured and bool({wire.ALLOCATION, b"base:"} & set(wanted))
        if option == wire.OPT_SET_META:
            self._allocation = granted
        if granted:
            self._reply(option, wire.REP_META, _CONTEXT.to_bytes(4, "big") + wire.ALLOCATION)
        self._reply(option, wire.REP_ACK)
        return True

    def _request(self) -> None:
        try:
            request = wire.REQUEST.parse(self._receive(wire.REQUEST.sizeof()))
        except ConstructError as error:
            raise _Gone from error
        kind, cookie, offset, length = request.type, request.cookie, request.offset, request.length
        if kind == wire.CMD_DISC:
            raise _Gone
        if kind == wire.CMD_WRITE:
            self._discard(length)
            self._error(cookie, wire.EPERM)
        elif kind == wire.CMD_FLUSH:
            self._done(cookie)
        elif kind == wire.CMD_WRITE_ZEROES:
            self._error(cookie, wire.EPERM)
        elif offset + length > self._disk.size or not length:
            self._error(cookie, wire.EINVAL)
        elif kind == wire.CMD_READ and length <= wire.MAX_REQUEST:
            self._read(cookie, offset, length)
        elif kind == wire.CMD_BLOCK_STATUS and self._allocation:
            self._status(cookie, offset, length, one=bool(request.flags & wire.REQ_ONE))
        else:
            self._error(cookie, wire.EINVAL)

    def _discard(self, length: int) -> None:
        while length:
            length -= len(self._receive(min(length, 1 << 20)))

    def _read(self, cookie: int, offset: int, length: int) -> None:
        buffer = bytearray(length)
        try:
            self._disk.read_into(offset, memoryview(buffer))
        except DiskmorphError:
            self._error(cookie, wire.EIO)
            return
        if not self._structured:
            self._send(wire.SIMPLE_REPLY.build({"error": 0, "cookie": cookie}), buffer)
            return
        self._send(_chunk(wire.CHUNK_DATA, cookie, 8 + length), offset.to_bytes(8, "big"), buffer)

    def _status(self, cookie: int, offset: int, length: int, *, one: bool) -> None:
        try:
            rows = _descriptors(self._disk, offset, offset + length, 1 if one else _MOST_ROWS)
        except DiskmorphError:
            self._error(cookie, wire.EIO)
            return
        payload = _CONTEXT.to_bytes(4, "big") + b"".join(part.tobytes() for part in rows)
        self._send(_chunk(wire.CHUNK_STATUS, cookie, len(payload)), payload)

    def _done(self, cookie: int) -> None:
        self._send(wire.SIMPLE_REPLY.build({"error": 0, "cookie": cookie}))

    def _error(self, cookie: int, number: int) -> None:
        if not self._structured:
            self._send(wire.SIMPLE_REPLY.build({"error": number, "cookie": cookie}))
            return
        payload = number.to_bytes(4, "big") + bytes(2)
        self._send(_chunk(wire.CHUNK_ERROR | 1, cookie, len(payload)), payload)


def _chunk(kind: int, cookie: int, length: int) -> bytes:
    fields = {"flags": wire.REPLY_DONE, "type": kind, "cookie": cookie, "length": length}
    return bytes(wire.CHUNK.build(fields))


def _descriptors(disk: Disk, start: int, stop: int, most: int) -> list[NDArray[np.void]]:
    """Return block status rows from `start`, at the most `most`: holes and zeroes told apart."""
    found: list[NDArray[np.void]] = []
    count = 0
    for batch in disk.extents(start, stop):  # a request's length has 32 bits, so has every row's
        rows = np.zeros(len(batch), wire.STATUS)
        rows["length"] = batch["length"]
        zero = batch["kind"] != DATA
        rows["flags"] = np.where(zero, wire.STATE_ZERO, 0) | np.where(batch["kind"] == HOLE, wire.STATE_HOLE, 0)
        found.append(rows[: most - count])  # never concatenated: that would take the machine's byte order
        count += len(rows)
        if count >= most:
            break
    return found
