"""Connections to web servers, kept in pools, by way of the proxy that the environment names for a server.

HTTPS_PROXY, HTTP_PROXY and ALL_PROXY name one, NO_PROXY the servers that are asked directly; words in small letters go
before. Where a program runs as CGI, HTTP_PROXY is a header of a stranger's request, and says nothing.
"""

from __future__ import annotations

import ipaddress
import re
import threading
from typing import Any
from urllib.parse import unquote, urlsplit

from diskmorph.formats.errors import SourceError

_OBJECT = re.compile(r"^(?:<.*?>|HTTPS?Connection(?:Pool)?\(.*?\)): ")


class Pools:
    """urllib3's pools, one for each way to servers; `settings` are PoolManager's. Thread-safe."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._managers: dict[str | None, Any] = {}
        self._lock = threading.Lock()

    def request(self, method: str, url: str, **words: Any) -> Any:
        """See PoolManager.request. Raises SourceError for a proxy that cannot be used, and urllib3's errors."""
        return self._manager(proxy_for(url)).request(method, url, **words)

    def clear(self) -> None:
        """Close the connections."""
        for manager in list(self._managers.values()):
            manager.clear()

    def _manager(self, proxy: str | None) -> Any:
        with self._lock:
            if proxy not in self._managers:
                self._managers[proxy] = self._made(proxy)
            return self._managers[proxy]

    def _made(self, proxy: str | None) -> Any:
        import urllib3  # noqa: PLC0415 - heavy, and only for URLs

        if proxy is None:
            return urllib3.PoolManager(**self._settings)
        where, credentials = _told_apart(proxy)
        headers = urllib3.make_headers(proxy_basic_auth=credentials) if credentials else None
        try:
            return urllib3.ProxyManager(where, proxy_headers=headers, **self._settings)
        except (ValueError, urllib3.exceptions.HTTPError) as error:
            raise _unusable(where) from error


def proxy_for(url: str) -> str | None:
    """Return the proxy by way of which a URL is asked for; None: directly, as this machine's own names always are."""
    from urllib import request  # noqa: PLC0415 - only for URLs

    proxies = request.getproxies_environment()
    parts = urlsplit(url)
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    host = parts.netloc.rpartition("@")[2]
    if not proxy or is_local(host) or request.proxy_bypass(host, proxies):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def is_local(host: str) -> bool:
    """Return whether a host (with a port or without) is this machine by its name alone."""
    bare = host[1 : host.index("]")] if host.startswith("[") else host.rpartition(":")[0] or host
    if bare.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def reason(error: BaseException) -> str:
    """Return why a request failed, in urllib3's words without those that tell of its objects and retries."""
    from urllib3.exceptions import ProxyError  # noqa: PLC0415 - loaded by now

    by = ""
    while True:
        by = by or ("the proxy: " if isinstance(error, ProxyError) else "")
        inner = getattr(error, "reason", None) or getattr(error, "original_error", None)
        if not isinstance(inner, BaseException):
            return by + _OBJECT.sub("", str(error))[:200]
        error = inner


def _told_apart(proxy: str) -> tuple[str, str]:
    """Return a proxy's address without the credentials in it, and those. Raises SourceError."""
    try:
        parts = urlsplit(proxy)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError as error:
        raise _unusable("") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise _unusable(f"{parts.scheme}://{parts.hostname or ''}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    named = parts.username is not None
    credentials = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}" if named else ""
    return f"{parts.scheme}://{host}{port}", credentials


def _unusable(proxy: str) -> SourceError:
    return SourceError(
        "the proxy that the environment names cannot be used",
        file=proxy or None,
        expected="http://HOST:PORT or https://HOST:PORT in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY",
        hint="NO_PROXY names the servers that are asked directly",
    )
