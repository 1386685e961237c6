"""Web servers for tests: on a port of their own, at work until they are closed."""

from __future__ import annotations

import http.server
import ssl
import threading
from typing import TYPE_CHECKING

from testkit import run

if TYPE_CHECKING:
    from pathlib import Path


class WebServer(http.server.ThreadingHTTPServer):
    """Answers by its handler, a thread each request; `context`: over TLS."""

    daemon_threads = True

    def __init__(self, handler: type[Handler], context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def server_close(self) -> None:
        """Close it; its thread ends first, or it goes on asking a descriptor that is another server's by then."""
        self.shutdown()
        super().server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    """Keeps connections, and its silence."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass


def server_side(folder: Path, name: str) -> ssl.SSLContext:
    """A server's side of TLS, with a certificate of its own for a name: `folder`/certificate."""
    words = ("-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", f"/CN={name}")
    files = ("-keyout", folder / "key", "-out", folder / "certificate", "-addext", f"subjectAltName=DNS:{name}")
    run("openssl", "req", "-x509", *words, *files, "-days", "2")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    return context
