"""Debian's docker-registry for tests, and a proxy before it that counts, damages, breaks off and asks for credentials."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from treekit import Snapshot, told
from webservers import Handler, WebServer

from diskmorph.formats.trees import open_tree

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

USER, PASSWORD = "me", "open sesame"
_HTPASSWD = f"{USER}:$2y$04$abcdefghijklmnopqrstuu/LVz6MZlItEy42I2juLihZ66HnQx/cy\n"
_LISTENING = re.compile(r"listening on 127\.0\.0\.1:(\d+)")
_LINE = re.compile(r'"([A-Z]+) (/v2/\S*) HTTP/1\.1" (\d+)')


class Seen(NamedTuple):
    """A request as the registry's log has it."""

    method: str
    path: str
    status: int


class Registry:
    """A running registry; `seen()` gives what it was asked since the last call."""

    def __init__(self, folder: Path, *, password: bool = False) -> None:
        folder.mkdir(parents=True)
        self._log = folder / "log"
        settings: dict[str, Any] = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
            "http": {"addr": "127.0.0.1:0"},
        }
        if password:
            (folder / "htpasswd").write_text(_HTPASSWD)
            settings["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
        (folder / "config.yml").write_text(json.dumps(settings))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=subprocess.STDOUT
            )
        self.port = self._wait()
        self.host = f"localhost:{self.port}"
        self._read = 0

    def _wait(self) -> int:
        for _ in range(300):
            found = _LISTENING.search(self._log.read_text())
            if found:
                return int(found[1])
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.05)
        raise AssertionError(self._log.read_text())

    def seen(self) -> list[Seen]:
        time.sleep(0.05)  # the line is written after the answer
        text = self._log.read_text()
        fresh, self._read = text[self._read :], len(text)
        return [Seen(method, path, int(status)) for method, path, status in _LINE.findall(fresh)]

    def blobs_fetched(self) -> list[str]:
        """Digests of the blobs whose bytes were asked for since the last look."""
        return [one.path.rpartition("/")[2] for one in self.seen() if one.method == "GET" and "/blobs/" in one.path]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


class Request(NamedTuple):
    """A request as the proxy got it."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def secret(self) -> str | None:
        return self.headers.get("Authorization")


class Reply(NamedTuple):
    """What a rule answers instead of the registry."""

    status: int
    headers: dict[str, str] = {}  # noqa: RUF012
    body: bytes = b""


class Proxy(WebServer):
    """Stands before a registry. `rule(request)` may answer by itself; `mend(request, body)` changes what is passed on.

    `cut` bytes of a blob's body pass, then the connection is reset, `cuts` times; `drops` uploads break off.
    `ranges`: whether it knows of them.
    """

    def __init__(self, registry: Registry | None = None, context: ssl.SSLContext | None = None) -> None:
        super().__init__(_Handler, context)
        self.scheme = "http" if context is None else "https"
        self.registry = registry
        self.requests: list[Request] = []
        self.rule: Callable[[Request], Reply | None] = lambda _: None
        self.mend: Callable[[Request, bytes], bytes] = lambda _, body: body
        self.cut = self.cuts = self.drops = 0
        self.ranges = True
        self.host = f"localhost:{self.port}"

    def handle_error(self, *_: object) -> None:
        """Clients hang up, as they should."""

    def asked(self, what: str, method: str = "GET") -> list[Request]:
        return [one for one in self.requests if one.method == method and what in one.path]


class _Handler(Handler):
    server: Proxy

    def _do(self) -> None:
        server = self.server
        request = Request(self.command, self.path, dict(self.headers.items()))
        server.requests.append(request)
        if self.command == "PUT" and "/blobs/" in self.path and server.drops:
            server.drops -= 1
            self._break_off()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        own = server.rule(Request(self.command, self.path, {**request.headers, "body": body.decode("latin-1")}))
        if own is not None:
            self._answer(own)
            return
        assert server.registry is not None, self.path
        self._answer(self._passed_on(request, body))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _do

    def _passed_on(self, request: Request, body: bytes) -> Reply:
        server = self.server
        assert server.registry is not None
        headers = {k: v for k, v in request.headers.items() if server.ranges or k != "Range"}
        headers["X-Forwarded-Proto"] = server.scheme  # or the registry sends us on without encryption
        if headers.get("Authorization", "").startswith("Bearer"):
            del headers["Authorization"]
        connection = http.client.HTTPConnection("127.0.0.1", server.registry.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(request.method, request.path, body, headers)
            answer = connection.getresponse()
            data = server.mend(request, answer.read())
            kept = {k: v for k, v in answer.getheaders() if k not in {"Content-Length", "Connection", "Date"}}
            if request.method == "HEAD":
                kept["Content-Length"] = answer.getheader("Content-Length", "0")
            return Reply(answer.status, kept, data)

    def _answer(self, reply: Reply) -> None:
        server = self.server
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if server.cuts and "/blobs/" in self.path and self.command == "GET" and len(reply.body) > server.cut:
            server.cuts -= 1
            self.wfile.write(reply.body[: server.cut])
            self._break_off()
        elif self.command != "HEAD":
            self.wfile.write(reply.body)

    def _break_off(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxy(registry: Registry | None = None, context: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    server = Proxy(registry, context)
    with server:
        yield server


def behind(server: Proxy, image: str) -> str:
    """The same image by way of a proxy."""
    return f"docker://{server.host}/{image.split('/', 3)[3]}"


def skopeo(*argv: Any) -> str:
    """Run the independent peer."""
    done = subprocess.run(["skopeo", *map(str, argv)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def put(layout: Path, image: str, *words: str) -> None:
    """Push an OCI layout by skopeo, its layers as they are."""
    kept = () if "--format" in words else ("--preserve-digests",)
    skopeo("copy", "-q", "--dest-tls-verify=false", *kept, *words, f"oci:{layout}", image)


def get(image: str, layout: Path, *words: str) -> Path:
    """Pull an image by skopeo into a layout."""
    skopeo("copy", "-q", "--src-tls-verify=false", *words, image, f"oci:{layout}:latest")
    return layout


def content(name: str | Path, **more: Any) -> Snapshot:
    with open_tree(name, **more) as tree:
        return told(tree)


def login(folder: Path, host: str, user: str = USER, password: str = PASSWORD) -> None:
    """Leave credentials as `docker login` does; DOCKER_CONFIG is `folder`."""
    folder.mkdir(exist_ok=True)
    secret = base64.b64encode(f"{user}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": secret}}}))


def helper(folder: Path, name: str, script: str) -> None:
    """Put a credential helper into a folder of PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
