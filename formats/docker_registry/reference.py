"""Names of images in registries: `docker://HOST[:PORT]/NAME[:TAG][@DIGEST]`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from diskmorph.formats.errors import OptionError
from diskmorph.formats.tree_names import REGISTRY_PREFIXES

# OCI distribution-spec 1.1, "Pulling manifests": <name> and <reference>; host and port as in docker's references.
_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?")
_LONGEST_NAME = 255
_HUB = "docker.io"


def is_reference(name: str | os.PathLike[str]) -> bool:
    """Return whether a name that the user gave is that of an image in a registry."""
    return isinstance(name, str) and name.startswith(REGISTRY_PREFIXES)


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry.

    - `host`: as the user wrote it, "docker.io" where none was; `name`: of the repository.
    - `tag` or `digest`: which image; of both the digest decides. `plain`: by http, as the user said.
    """

    host: str
    name: str
    tag: str | None
    digest: str | None = None
    plain: bool = False

    @property
    def api_host(self) -> str:
        """The host that answers; Docker Hub's is not the one in its names."""
        return "registry-1.docker.io" if self.host == _HUB else self.host

    @property
    def wanted(self) -> str:
        """Digest or tag: the last word of the manifest's address."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        scheme = REGISTRY_PREFIXES[self.plain]
        tag = f":{self.tag}" if self.tag else ""
        return f"{scheme}{self.host}/{self.name}{tag}" + (f"@{self.digest}" if self.digest else "")


def parse_reference(text: str) -> Reference:
    """Return what a name says. Without a host Docker Hub is meant, without a tag `latest`, as docker has it.

    `docker+http://` asks for plain http. Raises OptionError.
    """
    scheme = next((one for one in REGISTRY_PREFIXES if text.startswith(one)), None)
    if scheme is None:
        raise OptionError(f"{text!r} names no image in a registry", hint="docker://HOST/NAME:TAG")
    rest, at, digest = text[len(scheme) :].partition("@")
    if at and not _DIGEST.fullmatch(digest):
        hint = "credentials are docker's: docker login HOST" if "/" in digest else "@sha256: and 64 hexadecimal digits"
        raise OptionError(f"what follows @ in {scheme}... is no digest", hint=hint)
    host, slash, name = rest.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, name = _HUB, rest
    if host in {"index.docker.io", "registry-1.docker.io"}:
        host = _HUB
    name, colon, tag = name.partition(":")
    if host == _HUB and "/" not in name:
        name = f"library/{name}"
    if not _HOST.fullmatch(host) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise OptionError(f"{text!r} names no image in a registry", hint="docker://HOST/NAME:TAG, NAME in lower case")
    if colon and not _TAG.fullmatch(tag):
        raise OptionError(f"{tag[:80]!r} is no tag", hint="letters, digits, '.', '_' and '-', 128 at most")
    return Reference(host, name, tag or (None if at else "latest"), digest or None, scheme == REGISTRY_PREFIXES[1])
