"""The user's credentials for a registry, where docker keeps them: its config.json and its credential helpers."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from diskmorph.formats.errors import SourceError

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_KEY = "https://index.docker.io/v1/"
_LARGEST = 4 << 20
_PATIENCE = 60.0
_TOKEN_USER = "<token>"  # noqa: S105 - the name that helpers give to identity tokens


class Credentials(NamedTuple):
    """A user and a password, or an identity token (OAuth2 refresh token)."""

    user: str
    password: str
    identity_token: str | None = None

    def basic(self) -> str:
        """Return the value of the Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class Found(NamedTuple):
    """What was found for a host; `failure` says why a helper gave nothing."""

    credentials: Credentials | None
    failure: str | None = None


def credentials_for(host: str) -> Found:
    """Return the credentials for a registry's host, as `docker login` left them.

    The file is `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`. A helper named for the host (`credHelpers`)
    or for all (`credsStore`) decides, else `auths`. Raises SourceError where the file is damaged.
    """
    config = _config()
    key = _HUB_KEY if host == "docker.io" else host
    helpers = config.get("credHelpers")
    helper = (helpers.get(host) or helpers.get(key)) if isinstance(helpers, dict) else None
    helper = helper or config.get("credsStore")
    if helper:
        return _from_helper(str(helper), key)
    return Found(_from_file(config.get("auths"), host, key))


def config_path() -> Path:
    """Return where docker's configuration is."""
    folder = os.environ.get("DOCKER_CONFIG")
    return Path(folder) / "config.json" if folder else Path.home() / ".docker" / "config.json"


def _config() -> dict[str, Any]:
    path = config_path()
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise SourceError(f"docker's configuration cannot be read: {error.strerror}", file=str(path)) from error
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"docker's configuration is not JSON: {error}", file=str(path)) from error
    if not isinstance(found, dict):
        raise SourceError("docker's configuration is no JSON object", file=str(path))
    return found


def _from_file(auths: Any, host: str, key: str) -> Credentials | None:
    if not isinstance(auths, dict):
        return None
    entry = auths.get(key) or auths.get(host)
    if entry is None:  # older versions of docker wrote addresses
        entry = next((value for name, value in auths.items() if _host_of(name) == host), None)
    if not isinstance(entry, dict):
        return None
    token = entry.get("identitytoken")
    user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if isinstance(entry.get("auth"), str) and entry["auth"]:
        try:
            text = base64.b64decode(entry["auth"], validate=True).decode().rstrip("\0")
        except ValueError as error:
            raise SourceError(f"the entry of {host} is damaged", file=str(config_path()), field="auth") from error
        user, _, password = text.partition(":")
    if not user and not token:
        return None
    return Credentials(user, password, token if isinstance(token, str) and token else None)


def _host_of(name: str) -> str:
    return name.partition("://")[2].partition("/")[0] if "://" in name else name.partition("/")[0]


def _from_helper(name: str, key: str) -> Found:
    """Ask `docker-credential-NAME get` (docker-credential-helpers): the key on its input, JSON on its output."""
    if not _HELPER.fullmatch(name):
        return Found(None, f"{name[:80]!r} is no name of a credential helper")
    program = f"docker-credential-{name}"
    try:
        done = subprocess.run(  # noqa: S603 - the user's own configuration names it
            [program, "get"], input=key.encode(), capture_output=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found(None, f"{program} cannot be run: {error}")
    if done.returncode:
        said = (done.stdout or done.stderr).decode("utf-8", "replace").strip()[:200]
        known = "credentials not found" in said.lower()
        return Found(None, None if known else f"{program} fails: {said}")
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return Found(None, f"{program} answers what is no credential")
    if user == _TOKEN_USER:
        return Found(Credentials("", "", secret))
    return Found(Credentials(user, secret) if user else None)
