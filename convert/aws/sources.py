"""What is uploaded: a disk of any format, a package's disk, or the disk built from a container; and its identity."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.opening import open_source
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Parents
from diskmorph.formats.source import ByteSource, BytesSource, FileSource, WindowSource
from diskmorph.formats.tree_names import IMAGE_PREFIXES, TREE_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.convert.bridge.options import BuildOptions
    from diskmorph.convert.opening import Opened
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.machine import Machine

_TREES = frozenset(TREE_FORMATS) - {"iso"}
_SMALL = 64 << 20


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How a source is read: as `ConvertOptions` says; `build` tells how disks are built from trees and containers."""

    format: str | None = None
    parents: Parents = field(default_factory=Parents)
    limits: Limits = field(default_factory=Limits)
    snapshot: str | None = None
    disk: int | None = None
    build: Callable[[], BuildOptions] | None = None


@dataclass(slots=True)
class Source:
    """An open source: its disk, its absolute name, what its package says of the machine, and what to tell the user."""

    name: str
    disk: Disk
    format: str
    machine: Machine | None = None
    opened: Opened | None = None
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def opened(what: str | os.PathLike[str] | Disk, options: SourceOptions) -> Iterator[Source]:
    """Lend an open source. Raises what `open_source` and `build` raise."""
    name = os.fspath(what) if isinstance(what, str | os.PathLike) else None
    tree = None if name is None else _tree_format(name, options)
    if name is not None and tree is not None:
        with _built(name, tree, options) as source:
            yield source
        return
    with open_source(
        what,
        format=options.format,
        parents=options.parents,
        limits=options.limits,
        snapshot=options.snapshot,
        disk=options.disk,
    ) as found:
        notes = found.info.warnings if found.info is not None else ()
        yield Source(_absolute(found.name), found.disk, found.format, _machine(name, found, options), found, notes)


def _absolute(name: str) -> str:
    return name if "://" in name or not Path(name).exists() else os.path.realpath(name)


def _tree_format(name: str, options: SourceOptions) -> str | None:
    """Return the kind of tree that a name stands for, None for disks and packages."""
    from diskmorph.formats.remote import is_url  # noqa: PLC0415

    if options.format in _TREES or name.startswith(IMAGE_PREFIXES) or Path(name).is_dir():
        from diskmorph.formats.trees import tree_format  # noqa: PLC0415

        return options.format or tree_format(name)
    if options.format is not None or name == "-" or is_url(name) or not Path(name).is_file():
        return None
    from diskmorph.formats.probe import signatures  # noqa: PLC0415
    from diskmorph.formats.trees import tree_format  # noqa: PLC0415

    with FileSource(name, shared=True) as source:
        if any(found.outer and found.format not in _TREES for found in signatures(source)):
            return None
    found = tree_format(name)
    return found if found in _TREES else None


@contextlib.contextmanager
def _built(name: str, tree_format: str, options: SourceOptions) -> Iterator[Source]:
    """Lend the disk built from a tree; reproducibly, so that the same command builds the same disk again."""
    from diskmorph.convert.bridge.build import built  # noqa: PLC0415 - most sources are disks
    from diskmorph.convert.bridge.options import BuildOptions  # noqa: PLC0415
    from diskmorph.formats.trees import open_tree  # noqa: PLC0415

    build = options.build() if options.build is not None else BuildOptions()
    build = replace(build, convert=replace(build.convert, reproducible=True, source_format=tree_format))
    with open_tree(name, format=options.format, platform=build.platform, limits=options.limits) as tree:
        disk, notes, lost = built(tree, build)
        disk.name = name
        yield Source(_absolute(name), disk, tree_format, None, None, (*notes, *(f"lost: {what}" for what in lost)))


def _machine(name: str | None, found: Opened, options: SourceOptions) -> Machine | None:
    """Return what a package says of its machine."""
    if name is None or found.format not in {"ova", "ovf"}:
        return None
    from diskmorph.formats.packages import open_package  # noqa: PLC0415

    with open_package(name, parents=options.parents, limits=options.limits) as package:
        return next(iter(package.machines), None)


def identity_of(disk: Disk) -> str:
    """Return a digest that changes when the disk may have: of its files' inode, size and mtime.

    Bytes that lie in memory are hashed themselves, and where they stand on the disk. A source that cannot be told from
    another one gets an identity of its own, so that nothing is ever resumed on it.
    """
    state = hashlib.sha256(json.dumps([disk.size, disk.sector_size]).encode())
    for source in disk.files:
        state.update(_source_identity(source).encode())
    if not all(isinstance(source, FileSource) for source in disk.files):
        for batch in disk.extents():
            state.update(batch.tobytes())
    return state.hexdigest()


def _source_identity(source: ByteSource) -> str:
    if isinstance(source, FileSource):
        return f"file {source.identity}"
    if isinstance(source, WindowSource):
        return f"window {source._offset} {source.size} {_source_identity(source._source)}"  # noqa: SLF001 - a view of it
    if isinstance(source, BytesSource) and source.size <= _SMALL:
        return f"bytes {hashlib.sha256(source.read(0, source.size)).hexdigest()}"
    mark = getattr(source, "_etag", None) or getattr(source, "_mark", None)
    if mark:
        return f"url {source.name} {source.size} {mark}"
    return f"unknown {secrets.token_hex(16)}"
