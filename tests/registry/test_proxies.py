"""The proxy that the environment names, for files on web servers and for registries; nobody else learns its password."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import threading
from typing import TYPE_CHECKING

import pytest
import urllib3
from clikit import dm
from ocikit import folder, oci_layout
from registrykit import Registry, content, login, proxy, put
from treekit import tar_entry, tar_file
from webservers import Handler, WebServer, server_side

from diskmorph.formats.errors import SourceError
from diskmorph.formats.pools import proxy_for, reason
from diskmorph.formats.remote.http import HttpSource

from testkit import MIB, data

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYERS = [tar_file(folder("etc"), tar_entry("etc/word", b"far away"))]
DISK = data("behind a proxy", MIB)
SECRET = "Basic " + base64.b64encode(b"me:p@ss word").decode()


class Gateway(WebServer):
    """A proxy with a password: it serves a file of any host itself, and leads every CONNECT to one port."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.far = 0
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://me:p%40ss%20word@127.0.0.1:{self.port}"


class _Handler(Handler):
    server: Gateway

    def _let_in(self) -> bool:
        self.server.asked.append((self.command, self.path))
        if self.headers.get("Proxy-Authorization") == SECRET:
            return True
        self.send_error(407)
        return False

    def do_GET(self) -> None:
        if not self._let_in():
            return
        assert "Authorization" not in self.headers
        first, last = (int(word) for word in self.headers["Range"].removeprefix("bytes=").split("-"))
        piece = DISK[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(piece) - 1}/{len(DISK)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)

    def do_CONNECT(self) -> None:
        if not self._let_in():
            return
        self.close_connection = True
        with socket.create_connection(("127.0.0.1", self.server.far)) as far:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pump, args=(far, self.connection), daemon=True)
            back.start()
            _pump(self.connection, far)
            back.join(10)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with Gateway() as server:
        yield server


def test_a_file_of_a_web_server(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("http_proxy", gateway.url)
    dm("convert", "-f", "raw", "http://disks.example/a.raw", tmp_path / "out.raw").ok()
    assert (tmp_path / "out.raw").read_bytes() == DISK
    assert set(gateway.asked) == {("GET", "http://disks.example/a.raw")}


def test_a_password_that_is_wrong_is_told(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", gateway.url.replace("me:", "you:"))
    with pytest.raises(SourceError, match="407"):
        HttpSource("http://disks.example/a.raw")
    monkeypatch.setenv("HTTPS_PROXY", gateway.url.replace("me:", "you:"))
    for found in (
        dm("info", "https://disks.example/a.raw").err,
        dm("ls", "docker://registry.example/app:1").err,
    ):
        assert "the proxy: Tunnel connection failed: 407" in found and "p%40ss" not in found and "p@ss" not in found


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """The server's side of https://registry.example, whose certificate is known."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
    return server_side(tmp_path, "registry.example")


def test_a_registry_is_reached_through_a_tunnel(
    gateway: Gateway, registry: Registry, far: ssl.SSLContext, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(oci_layout(home / "layout", LAYERS), f"docker://{registry.host}/app:1")
    login(home / "docker", "registry.example")
    monkeypatch.setenv("HTTPS_PROXY", gateway.url)
    with proxy(registry, far) as server:
        gateway.far = server.port
        assert b"etc/word" in content("docker://registry.example/app:1")
        dm("convert", home / "layout", "docker://registry.example/app:2").ok()
        assert "Proxy-Authorization" not in {name for one in server.requests for name in one.headers}
    assert set(gateway.asked) == {("CONNECT", "registry.example:443")}


@pytest.mark.parametrize(
    ("url", "words", "by"),
    [
        ("http://a.example/x", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("https://a.example/x", {"http_proxy": "http://p:1"}, None),
        ("https://a.example/x", {"HTTPS_PROXY": "p:1"}, "http://p:1"),
        ("https://a.example/x", {"ALL_PROXY": "http://p:1"}, "http://p:1"),
        ("https://a.example/x", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "b.example,.example"}, None),
        ("https://a.example/x", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "b.example"}, "http://p:1"),
        ("https://a.example/x", {"HTTPS_PROXY": "http://p:1", "no_proxy": "*"}, None),
        ("https://a.example/x", {"HTTPS_PROXY": ""}, None),
        ("http://localhost:5000/x", {"ALL_PROXY": "http://p:1"}, None),
        ("http://[::1]:5000/x", {"ALL_PROXY": "http://p:1"}, None),
        ("http://a.example/x", {"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"}, None),
    ],
)
def test_which_one(
    url: str, words: dict[str, str], by: str | None, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    del gateway
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(url) == by


@pytest.mark.parametrize("named", ["socks5://p:1", "http://", "http://p:x", "http://p:99999", "ftp://me:secret@p"])
def test_what_is_no_proxy(named: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", named)
    for words in (("info", "https://a.example/x"), ("ls", "docker://a.example/x")):
        found = dm(*words)
        assert found.status == 1 and "proxy that the environment names" in found.err and "secret" not in found.err
    assert not gateway.asked


def test_reasons_do_not_tell_of_objects() -> None:
    pool = urllib3.HTTPConnectionPool("a.example")
    late = urllib3.exceptions.ReadTimeoutError(pool, "/x", "Read timed out.")
    assert reason(urllib3.exceptions.MaxRetryError(pool, "/x", late)) == "Read timed out."
