"""What makes two rows the same work: the source as it is now, the target's name, the options that shape the result."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diskmorph.formats.docker_registry.reference import is_reference
from diskmorph.formats.errors import DiskmorphError
from diskmorph.formats.limits import Limits
from diskmorph.formats.remote import is_url, open_url
from diskmorph.formats.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diskmorph.convert.fleet.rows import Row
    from diskmorph.formats.source import ByteSource

_PREFIXES = ("oci-archive:", "docker-archive:", "oci:")
_WITHOUT_EFFECT = frozenset(
    {"force", "sync", "rate", "threads", "verify", "digest", "dry_run", "limits", "passphrase", "allow", "shared"}
)
"""Options that change how the work is done, not what comes out."""
_WITHOUT_EFFECT_AWS = frozenset({"workers", "max_rps"})


def token_of(row: Row) -> str:
    """Return the name of a row's work, 32 hexadecimal digits: another source, target or option makes another token.

    Local files count by inode, size and time of change, remote ones by size and ETag, images in registries by digest;
    parents and extents count too. Raises DiskmorphError where the source is not there.
    """
    said = [row.verb, row.source, row.target, _plain(row.options), source_state(row)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def source_state(row: Row) -> list[Any]:
    """Return what tells a source from a changed one. Raises SourceError where it is not there."""
    name = row.source
    if is_reference(name):
        from diskmorph.formats.oci.remote import image_digest  # noqa: PLC0415 - what is used is loaded

        return [image_digest(name, Limits())]
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            path = name.removeprefix(prefix)
            name = path if os.path.lexists(path) else path.partition(":")[0]
    if not is_url(name) and Path(name).is_dir():
        return list(_tree_state(name))
    if row.verb == "build":
        return [_state(name)]
    return _disk_state(row, name)


def _disk_state(row: Row, name: str) -> list[Any]:
    """Return the states of all files that a disk is read from; of one that cannot be opened, of its own file."""
    from diskmorph.convert.opening import open_source  # noqa: PLC0415 - loads the readers

    options: Any = getattr(row.options, "convert", row.options)
    try:
        with open_source(
            name,
            format=getattr(options, "source_format", None) or getattr(options, "format", None),
            parents=getattr(options, "parents", None),
            limits=getattr(options, "limits", None),
        ) as opened:
            return [_source_state(source) for source in opened.disk.files]
    except DiskmorphError:
        return [_state(name)]


def _state(name: str) -> Any:
    if is_url(name):
        with open_url(name) as source:
            return _source_state(source)
    with FileSource(name, shared=True) as file:
        return _source_state(file)


def _source_state(source: ByteSource) -> Any:
    if isinstance(source, FileSource):
        return [source.name, *source.identity[1:]]  # the device's number differs from machine to machine
    inner = getattr(source, "_source", None)
    if inner is not None:
        return [source.size, _source_state(inner)]
    mark = getattr(source, "_etag", None) or getattr(source, "_mark", None)
    return [source.name, source.size, mark]


def _tree_state(folder: str) -> Iterator[Any]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted([*names, *folders]):
            path = Path(place, name)
            status = path.lstat()
            yield [os.path.relpath(path, folder), status.st_mode, status.st_size, status.st_mtime_ns]


def _plain(value: object) -> Any:
    """Return options as JSON holds them, without those that have no effect; files count as they are now."""
    if is_dataclass(value) and not isinstance(value, type):
        skipped = _WITHOUT_EFFECT | (_WITHOUT_EFFECT_AWS if type(value).__name__ == "UploadOptions" else frozenset())
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value) if one.name not in skipped}
    if isinstance(value, Path):
        return [str(value), _file_state(value)]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in _mapping(value).items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _mapping(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return value


def _file_state(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns] if path.is_file() else None
