"""The JSON of container images: media types and the fields that are read and written (OCI image-spec 1.1)."""

from __future__ import annotations

from typing import Any

from diskmorph.formats.errors import FormatError

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
INDEXES = frozenset((OCI_INDEX, DOCKER_INDEX))
MANIFESTS = frozenset((OCI_MANIFEST, DOCKER_MANIFEST))
REF_NAME = "org.opencontainers.image.ref.name"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


class Fields:
    """An object of untrusted JSON: every value is asked for with its type.

    Raises FormatError naming the field where the type is another.
    """

    def __init__(self, value: Any, file: str, what: str) -> None:
        self._file, self._what = file, what
        if not isinstance(value, dict):
            raise self._wrong("", "an object", value)
        self.value: dict[str, Any] = value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string; `default` where it is missing, if there is one."""
        return str(self._get(name, str, "a string", default))

    def number(self, name: str) -> int:
        """Return a whole number that is not negative."""
        found: int = self._get(name, int, "a number", None)
        if found < 0:
            raise self._wrong(name, "a size", found)
        return found

    def objects(self, name: str) -> list[Fields]:
        """Return an array of objects; empty where it is missing."""
        return [Fields(item, self._file, f"{self._what}.{name}") for item in self._get(name, list, "an array", [])]

    def texts(self, name: str) -> list[str]:
        """Return an array of strings; empty where it is missing or null."""
        found = self.value.get(name) or []
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise self._wrong(name, "an array of strings", found)
        return found

    def inner(self, name: str) -> Fields:
        """Return an object; an empty one where it is missing or null."""
        return Fields(self.value.get(name) or {}, self._file, f"{self._what}.{name}")

    def _get(self, name: str, kind: type, words: str, default: Any) -> Any:
        found = self.value.get(name, default)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise self._wrong(name, words, found)
        return found

    def _wrong(self, name: str, words: str, found: Any) -> FormatError:
        return FormatError(
            "the image's JSON is damaged",
            file=self._file,
            structure=self._what,
            field=name or None,
            expected=words,
            found=repr(found)[:80],
        )
