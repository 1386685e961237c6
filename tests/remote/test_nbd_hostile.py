"""NBD servers that answer wrongly: an error each, neither data that they did not send nor an endless wait."""

import contextlib
import socket
import struct
import threading

import pytest

from diskmorph.formats.errors import SourceError, TargetError
from diskmorph.formats.remote.nbd import NbdSource
from diskmorph.formats.remote.nbd_target import NbdMember

SIZE = 1 << 20
INFO = struct.pack(">HQH", 0, SIZE, 1)
DATA, HOLE, STATUS = 1, 2, 5


def chunk(kind: int, body: bytes, *, done: bool = True, length: int | None = None):
    """Return what makes a chunk of a structured reply for a cookie."""
    size = len(body) if length is None else length
    return lambda cookie: struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, size) + body


def bytes_at(offset: int, count: int, *, done: bool = True):
    return chunk(DATA, struct.pack(">Q", offset) + b"x" * count, done=done)


class Server:
    """Speaks NBD by a script: `infos` answer GO, `chunks` every request (repeated for ever where `endless`).

    It lets `clients` in (None: all) and hangs up on a request where it has no chunks.
    """

    def __init__(self, *chunks, infos=(INFO,), endless=False, clients=None) -> None:
        self.chunks, self.infos, self.endless, self.clients = chunks, infos, endless, clients
        self.requests = 0

    def __enter__(self) -> str:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._run, daemon=True).start()
        return f"nbd://127.0.0.1:{self._listener.getsockname()[1]}/"

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or its thread waits for ever
        self._listener.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while self.clients is None or self.clients > 0:
                client, _ = self._listener.accept()
                if self.clients is not None:
                    self.clients -= 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()
        self._listener.close()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, EOFError), client.makefile("rb") as stream:
            client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
            stream.read(4)
            while self._option(client, stream):
                pass
            while request := stream.read(28):
                kind, cookie, _, length = struct.unpack(">6xHQQI", request)
                if kind == 2 or not self.chunks:
                    return
                self.requests += 1
                stream.read(length if kind == 1 else 0)
                self._send(client, b"".join(make(cookie) for make in self.chunks))

    def _send(self, client: socket.socket, answer: bytes) -> None:
        client.sendall(answer)
        while self.endless:
            client.sendall(answer)

    def _option(self, client: socket.socket, stream) -> bool:
        option, length = struct.unpack(">8xII", stream.read(16))
        stream.read(length)
        replies = [(3, info) for info in self.infos] if option == 7 else []
        replies += [(4, struct.pack(">I", 1) + b"base:allocation")] if option == 10 else []
        answer = b"".join(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(d)) + d for kind, d in replies)
        if option == 7 and self.endless and not self.chunks:
            self._send(client, answer)
        client.sendall(answer + struct.pack(">QIII", 0x3E889045565A9, option, 1, 0))
        return option != 7


@pytest.mark.parametrize(
    "chunks",
    [
        (bytes_at(0, 2048),),
        (bytes_at(2048, 2048),),
        (bytes_at(0, 2048, done=False), bytes_at(0, 2048)),
        (chunk(0, b""),),
        (bytes_at(0, 4097),),
        (chunk(HOLE, b"abc"),),
        (chunk(HOLE, b"", length=0xFFFFFFF0),),
        (chunk(DATA, b"abc"),),
        (chunk(0, b"abc"),),
        (chunk(STATUS, bytes(12)),),
    ],
    ids=["head", "tail", "twice", "nothing", "more", "short hole", "long hole", "short data", "none", "status"],
)
def test_an_answer_that_is_not_what_was_asked_for(chunks):
    with Server(*chunks) as url, NbdSource(url) as source, pytest.raises(SourceError, match="the server"):
        source.read(0, 4096)


def test_pieces_in_any_order_are_an_answer():
    with (
        Server(bytes_at(2048, 2048, done=False), chunk(0, b"", done=False), bytes_at(0, 2048)) as url,
        NbdSource(url) as source,
    ):
        assert source.read(0, 4096) == b"x" * 4096


def test_an_answer_that_does_not_end():
    server = Server(chunk(0, b"", done=False), endless=True)
    with server as url, NbdSource(url) as source, pytest.raises(SourceError, match="end"):
        source.read(0, 4096)


@pytest.mark.parametrize("infos", [(), (INFO[:3],), (struct.pack(">HH", 3, 0),)])
def test_an_export_without_a_size(infos):
    with Server(infos=infos) as url, pytest.raises(SourceError, match="how large"):
        NbdSource(url)


def test_a_negotiation_that_does_not_end():
    with Server(infos=(struct.pack(">HH", 3, 0),), endless=True) as url, pytest.raises(SourceError, match="end"):
        NbdSource(url)


def test_status_byte_by_byte_is_not_asked_for_ever():
    server = Server(chunk(STATUS, struct.pack(">III", 1, 1, 3)))
    with server as url, NbdSource(url) as source:
        runs = list(source.runs(0, SIZE))
    assert sum(length for _, length, _ in runs) == SIZE
    assert sum(length for _, length, allocated in runs if not allocated) < 100
    assert server.requests < 100


def test_a_write_that_fails_in_the_last_chunk():
    failure = chunk(0x8001, struct.pack(">IH", 28, 0))
    with Server(chunk(0, b"", done=False), failure) as url:
        member = NbdMember(url, SIZE)
        with contextlib.closing(member), pytest.raises(TargetError, match="28"):
            member.write(0, bytes(4096))


def test_a_server_that_is_gone_ends_every_reader():
    with Server(clients=1) as url, NbdSource(url) as source:
        ended = []

        def read() -> None:
            for _ in range(2):
                with contextlib.suppress(SourceError):
                    source.read(0, 512)
            ended.append(True)

        readers = [threading.Thread(target=read, daemon=True) for _ in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(10)
        assert len(ended) == 3
