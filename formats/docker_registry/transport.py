"""Requests to a registry and to where it sends us: retries, redirects, and what may be told to whom.

What a server says is hostile input: how long to wait, where to go, how much follows. Credentials go to the host that
they are for and to no other; what began by https never goes on by http.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from diskmorph.formats.errors import SourceError
from diskmorph.formats.pools import Pools, is_local, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Body = Callable[[], Any]

ATTEMPTS = 6
RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
_REDIRECTS = 5
_TIMEOUT = 30.0
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 30.0
_LONGEST_URL = 16 << 10


class BrokenOffError(SourceError):
    """A connection was lost; trying again may help."""


class Answer(NamedTuple):
    """A server's answer, its body not yet read, and the URL that it came from after redirects."""

    response: Any
    url: str

    @property
    def status(self) -> int:
        """The status code."""
        return int(self.response.status)

    def header(self, name: str) -> str:
        """Return a header's value; empty where there is none."""
        return str(self.response.headers.get(name, ""))

    def read(self, most: int) -> bytes:
        """Return the whole body and give the connection back. Raises SourceError if it is longer than `most`."""
        with _translated(self.url):
            data = self.response.read(most + 1, decode_content=False) if most else b""
        if len(data) > most:
            self.close()
            raise SourceError("the answer is too long", file=shown(self.url), expected=f"{most} bytes at the most")
        self.response.release_conn()
        return bytes(data)

    def chunk(self, most: int) -> bytes:
        """Return the next bytes of the body; none at its end. Raises BrokenOffError where it breaks off."""
        with _translated(self.url):
            return bytes(self.response.read(most, decode_content=False))

    def close(self) -> None:
        """Drop the connection."""
        self.response.close()


class Origin(NamedTuple):
    """Scheme, host and port: to whom a request goes (RFC 6454, 4)."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Return the origin of a URL. Raises SourceError for what is no http or https URL, or holds credentials."""
        try:
            parts = urlsplit(url)
            port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
        except ValueError:
            port = 0
        if not port or not parts.hostname or parts.username or parts.password or len(url) > _LONGEST_URL:
            raise SourceError(f"the registry names an address that is not taken: {url[:200]!r}")
        return cls(parts.scheme, parts.hostname, port)


class Transport:
    """Sends requests; thread-safe. `plain`: the user allows http to any host, not only to this machine's own."""

    def __init__(self, *, plain: bool) -> None:
        import urllib3  # noqa: PLC0415 - heavy, and only for registries

        timeout = urllib3.Timeout(connect=_TIMEOUT, read=_TIMEOUT)
        self._http = Pools(maxsize=8, retries=False, timeout=timeout)
        self._plain = plain
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let no pause and no transfer go on."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections."""
        self.stop()
        self._http.clear()

    def request(self, method: str, url: str, headers: Mapping[str, str], secret: str | None = None) -> Answer:
        """Send a request without a body; try again where that may help. Raises SourceError.

        `secret` is the Authorization header: it goes to the URL's own origin alone, whatever redirects say.
        """
        refusal: SourceError | None = None
        for attempt in range(ATTEMPTS):
            try:
                answer = self.attempt(method, url, headers, secret)
            except BrokenOffError as error:
                refusal, wait = error, ""
                if attempt >= ATTEMPTS // 2:  # a server that refuses to talk is told soon
                    break
            else:
                if answer.status not in RETRIED:
                    return answer
                wait = answer.header("Retry-After")
                answer.close()
                refusal = SourceError(f"the registry answers {answer.status}", file=shown(answer.url))
            if attempt + 1 < ATTEMPTS:
                self.pause(attempt, wait)
        assert refusal is not None  # noqa: S101 - every way to here sets it
        raise refusal

    def pause(self, attempt: int, wait: str = "") -> None:
        """Wait before the next attempt, as long as the server asks (Retry-After in seconds, within bounds)."""
        seconds = min(float(wait[:9]), _LONGEST_PAUSE) if wait.isascii() and wait.isdigit() else 0.0
        self._stopped.wait(max(seconds, _FIRST_PAUSE * 2**attempt))
        self.require_running()

    def require_running(self) -> None:
        """Raise SourceError after `stop`."""
        if self._stopped.is_set():
            raise SourceError("the transfer was stopped")

    def attempt(
        self, method: str, url: str, headers: Mapping[str, str], secret: str | None, body: Body | None = None
    ) -> Answer:
        """Send a request once, through redirects; `body` returns what is sent, from its beginning each time.

        Raises BrokenOffError where the connection fails, SourceError for redirects that are not followed.
        """
        home = Origin.of(url)
        for _ in range(_REDIRECTS + 1):
            origin = Origin.of(url)
            self._require_safe(home, origin, url)
            sent = {"User-Agent": "diskmorph", "Accept-Encoding": "identity", **headers}
            if secret is not None and origin == home:
                sent["Authorization"] = secret
            answer = Answer(self._send(method, url, sent, None if body is None else body()), url)
            target = answer.header("Location")
            if answer.status not in {301, 302, 303, 307, 308} or not target:
                return answer
            answer.close()
            if answer.status < 304 and method not in {"GET", "HEAD"}:
                raise SourceError(f"the registry redirects a {method} by {answer.status}", file=shown(url))
            url = joined(url, target)
        raise SourceError("the registry redirects too often", file=shown(url))

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: Any) -> Any:
        with _translated(url):
            return self._http.request(
                method, url, headers=headers, body=body, preload_content=False, redirect=False, retries=False
            )

    def _require_safe(self, home: Origin, origin: Origin, url: str) -> None:
        if origin.scheme == "https":
            return
        if home.scheme == "https":
            raise SourceError("is told to go on without encryption, which is refused", file=shown(url))
        if not self._plain and not is_local(origin.host):
            raise SourceError(
                "would be asked without encryption, which is refused",
                file=shown(url),
                hint="docker+http:// allows it",
            )


class _Translated:
    """Turns urllib3's errors into ours."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        from urllib3.exceptions import HTTPError, SSLError  # noqa: PLC0415 - loaded by now

        if isinstance(error, SSLError) and "CERTIFICATE" in str(error):
            raise SourceError(f"its certificate is refused: {reason(error)}", file=shown(self._url)) from error
        if isinstance(error, HTTPError | OSError):
            raise BrokenOffError(f"cannot be reached: {reason(error)}", file=shown(self._url)) from error
        if isinstance(error, ValueError):  # http.client on headers and addresses that are none
            raise SourceError(f"the registry's answer cannot be used: {error}", file=shown(self._url)) from error


def _translated(url: str) -> _Translated:
    return _Translated(url)


def joined(url: str, target: str) -> str:
    """Return where a Location header leads (RFC 9110, 10.2.2). Raises SourceError for what is no address."""
    try:
        return urljoin(url, target)
    except ValueError as error:
        raise SourceError(f"the registry names an address that is not taken: {target[:200]!r}") from error


def shown(url: str) -> str:
    """Return a URL as messages show it: without its query, which may hold a signature."""
    return url.partition("?")[0][:300]
