"""The files of a container image by name, whether they lie in a directory or in a tar archive."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import DiskmorphError, FormatError, IntegrityError, UnsupportedError
from diskmorph.formats.source import ByteSource, FileSource
from diskmorph.formats.tar import members, read_tar

if TYPE_CHECKING:
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.tree import Node, Tree

# What may stand in an image archive: index and manifest, blobs, and the older one directory a layer.
_NAMES = re.compile(
    rb"(?:\./)?(?:|manifest\.json|repositories|oci-layout|index\.json|blobs(?:/.*)?|(?:sha256:)?[0-9a-f]{64}(?:[./].*)?)/?"
)
_MOST = 10_000
_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_STEP = 1 << 20


def may_be_image(head: bytes) -> bool:
    """Return whether an archive whose first header is `head` may hold an image: by its first name alone."""
    name = head[:100].split(b"\0", 1)[0]
    return bool(name) and name not in (b"./", b".") and _NAMES.fullmatch(name) is not None


def archive_format(source: ByteSource) -> str | None:
    """Return "docker-archive" or "oci-archive" if this plain tar archive holds a container image, else None.

    An archive with both kinds of index (docker save since version 25) counts as a docker-archive.
    """
    names = set()
    try:
        for count, member in enumerate(members(source)):
            if count > _MOST or not _NAMES.fullmatch(member.name):
                return None
            names.add(member.name.removeprefix(b"./"))
    except DiskmorphError:
        pass  # a damaged archive is what its sound part says
    if b"manifest.json" in names:
        return "docker-archive"
    return "oci-archive" if {b"index.json", b"oci-layout"} & names else None


class ImageFiles:
    """Opens the files of an image by name. Names come from JSON in the image: they are checked before they are used."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits

    def open(self, name: str) -> ByteSource:
        """Return a file's bytes. Raises FormatError if there is none."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Return whether there is a file of that name."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what is held."""

    def verify_unchanged(self) -> None:
        """Raise IntegrityError if the archive changed since it was opened."""

    def json(self, name: str, digest: str | None = None) -> Any:
        """Return a file parsed as JSON, its digest verified if one is given."""
        with self.open(name) as source:
            if source.size > self.limits.descriptor:
                raise FormatError(f"{name} is too large", file=self.name, found=f"{source.size} bytes")
            data = source.read(0, source.size)
        if digest is not None:
            require_digest(digest, data, f"{self.name}: {name}")
        return parse_json(data, self.name, name)

    def missing(self, name: str) -> FormatError:
        """Return the error that says which file is missing."""
        return FormatError(f"the image lacks {name}", file=self.name, structure="image")


def parse_json(data: bytes, file: str, name: str) -> Any:
    """Return untrusted JSON. Raises FormatError for what is none."""
    try:
        return json.loads(data, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} is not JSON: {error}", file=file) from error


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


class DirectoryFiles(ImageFiles):
    """An image in a directory: an OCI layout."""

    def open(self, name: str) -> ByteSource:
        """See ImageFiles; never through a symbolic link."""
        path = self._path(name)
        if not self.has(name) or path.is_symlink():
            raise self.missing(name)
        return FileSource(path, devices=False, follow=False)

    def has(self, name: str) -> bool:
        """See ImageFiles."""
        return os.path.isfile(self._path(name))  # noqa: PTH113 - Path.is_file raises for names that are too long

    def _path(self, name: str) -> Path:
        words = name.split("/")
        if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", word) for word in words):
            raise FormatError(f"the image names the file {name!r}", file=self.name, structure="image")
        return Path(self.name, *words)


class ArchiveFiles(ImageFiles):
    """An image in a tar archive; files are read where they lie."""

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        super().__init__(source.name, limits)
        self._tree: Tree = read_tar(source, limits=limits)

    def open(self, name: str) -> ByteSource:
        """See ImageFiles; links inside the archive are followed within it."""
        node = self._find(name)
        if node is None or node.kind != 0o100000:
            raise self.missing(name)
        return node.source(f"{self.name}: {name}")

    def has(self, name: str) -> bool:
        """See ImageFiles."""
        return self._find(name) is not None

    def _find(self, name: str) -> Node | None:
        try:
            return self._tree.find(name.encode())
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON can have it
            return None

    def close(self) -> None:
        """See ImageFiles."""
        self._tree.close()

    def verify_unchanged(self) -> None:
        """See ImageFiles."""
        self._tree.verify_unchanged()


def blob_name(digest: str, file: str) -> str:
    """Return the name of a blob in a layout. Raises FormatError for what is no digest, UnsupportedError for others."""
    if not _DIGEST.fullmatch(digest):
        if re.fullmatch(r"[a-z0-9+._-]+:[A-Za-z0-9=_-]+", digest):
            raise UnsupportedError(f"the digest {digest[:80]} is of an unknown kind", feature="digest", file=file)
        raise FormatError(f"{digest[:80]!r} is no digest", file=file, structure="descriptor", field="digest")
    return "blobs/" + digest.replace(":", "/")


def new_hash(digest: str) -> Any:
    """Return a fresh hash of a digest's kind."""
    return hashlib.new(digest.split(":", 1)[0])


def require_digest(digest: str, data: bytes, name: str) -> None:
    """Raise IntegrityError unless `data` has that digest."""
    found = new_hash(digest)
    found.update(data)
    compare_digest(digest, found, name)


def compare_digest(digest: str, found: Any, name: str) -> None:
    """Raise IntegrityError unless a hash is that of the digest."""
    kind, _, wanted = digest.partition(":")
    if found.hexdigest() != wanted:
        raise IntegrityError(
            "its digest is wrong: it is damaged or not what the image names",
            file=name,
            expected=digest,
            found=f"{kind}:{found.hexdigest()}",
        )


def hash_source(source: ByteSource, *hashes: Any) -> None:
    """Let hashes see all of a source."""
    for at in range(0, source.size, _STEP):
        data = source.read(at, min(_STEP, source.size - at))
        for one in hashes:
            one.update(data)
