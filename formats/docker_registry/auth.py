"""What a registry is told about the user: basic credentials or bearer tokens, as its challenges ask (RFC 7235, 6750).

Tokens come from a server that the registry names (the "realm"; distribution's docs/spec/auth/token.md). It is given the
user's credentials for this registry, so it must be reached by https; by http only where the registry itself is.
"""

from __future__ import annotations

import json
import re
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit, urlunsplit

from diskmorph.formats.docker_registry.credentials import Credentials, Found, credentials_for
from diskmorph.formats.docker_registry.transport import Origin, shown
from diskmorph.formats.errors import SourceError

if TYPE_CHECKING:
    from diskmorph.formats.docker_registry.reference import Reference
    from diskmorph.formats.docker_registry.transport import Answer, Transport

_CHALLENGE = re.compile(r"\s*(bearer|basic)\b", re.IGNORECASE)
_PARAMETER = re.compile(r'([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}")
_LARGEST = 1 << 20
_CLIENT = "diskmorph"


class Authorizer:
    """Holds the Authorization header for one repository; thread-safe. `actions`: "pull" or "pull,push"."""

    def __init__(self, reference: Reference, transport: Transport, actions: str) -> None:
        self._reference = reference
        self._transport = transport
        self._scope = f"repository:{reference.name}:{actions}"
        self._lock = threading.Lock()
        self._found: Found | None = None
        self.header: str | None = None

    def renew(self, refused: str | None, answer: Answer, home: str) -> str | None:
        """Return the header that answers a 401 to a request that had `refused`; None if there is no other.

        A challenge counts only if it comes from the registry itself (`home`), not from where it redirected to.
        """
        challenge = answer.header("WWW-Authenticate")
        if Origin.of(answer.url) != Origin.of(home):
            return None
        with self._lock:
            if self.header != refused:  # another thread has been here
                return self.header
            new = self._answer_to(challenge, home)
            if new is not None and new != refused:
                self.header = new
                return new
        return None

    def hint(self) -> str:
        """Return what the user can do about a refusal."""
        found = self._found
        if found is not None and found.failure:
            return found.failure
        if found is None or found.credentials is None:
            return f"log in with docker login {self._reference.host}, if the image exists"
        return "the credentials in docker's config.json do not suffice, or there is no such image"

    def _answer_to(self, challenge: str, home: str) -> str | None:
        kind = _CHALLENGE.match(challenge)
        if self._found is None:
            self._found = credentials_for(self._reference.host)
        credentials = self._found.credentials
        if kind is None:
            return None
        if kind[1].lower() == "basic":
            return credentials.basic() if credentials is not None and credentials.user else None
        parameters = {m[1].lower(): re.sub(r"\\(.)", r"\1", m[2]) if m[2] is not None else m[3] for m in
                      _PARAMETER.finditer(challenge, kind.end())}  # fmt: skip
        realm = parameters.get("realm", "")
        self._require_fit(realm, home)
        token = self._token(realm, parameters.get("service", ""), credentials)
        return None if token is None else f"Bearer {token}"

    def _require_fit(self, realm: str, home: str) -> None:
        here, there = Origin.of(home), Origin.of(realm)
        if there.scheme != "https" and (here.scheme == "https" or there.host != here.host):
            raise SourceError(
                "names a token server without encryption, which is not told any credentials",
                file=str(self._reference),
                found=shown(realm),
            )

    def _token(self, realm: str, service: str, credentials: Credentials | None) -> str | None:
        words = {"scope": self._scope, **({"service": service} if service else {})}
        if credentials is not None and credentials.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token,
                "client_id": _CLIENT,
                **words,
            }
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            body = urlencode(form).encode()
            answer = self._transport.attempt("POST", realm, headers, None, lambda: body)
        else:
            parts = urlsplit(realm)
            query = "&".join(filter(None, (parts.query, urlencode(words))))
            secret = None if credentials is None else credentials.basic()
            answer = self._transport.request("GET", urlunsplit(parts._replace(query=query)), {}, secret)
        if answer.status in {400, 401, 403}:
            answer.close()
            return None
        if answer.status != 200:
            answer.close()
            raise SourceError(
                f"its token server answers {answer.status}", file=str(self._reference), found=shown(realm)
            )
        return self._read(answer)

    def _read(self, answer: Answer) -> str:
        try:
            found = json.loads(answer.read(_LARGEST))
        except (ValueError, RecursionError):
            found = None
        token = (found.get("token") or found.get("access_token")) if isinstance(found, dict) else None
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise SourceError("its token server gives no token", file=str(self._reference), found=shown(answer.url))
        return token
