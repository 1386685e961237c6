"""Sources: paths, `-`, or disks that are open already; with what their headers tell."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from diskmorph.formats.disk import Disk, ImageDisk, ImageInfo
from diskmorph.formats.errors import SourceError, TargetError
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import OpenContext, identify, open_layers
from diskmorph.formats.source import ByteSource, FilePool, FileSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diskmorph.convert.options import ConvertOptions
    from diskmorph.formats.policy import Allowed
    from diskmorph.formats.probe import Signature

_BLOCK = 1 << 20
_PAGE = 4096


@dataclass(slots=True)
class Opened:
    """An open source: the disk with its parents, what its own headers say, its layers from the top."""

    name: str
    disk: Disk
    format: str
    info: ImageInfo | None = None
    layers: Sequence[ImageDisk] = ()
    signatures: Sequence[Signature] = ()
    owned: bool = True
    origins: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """The local files that were opened for it: names by (device, inode)."""

    @property
    def files(self) -> list[FileSource]:
        """Return the local files that the disk is read from."""
        return [source for source in self.disk.files if isinstance(source, FileSource)]

    def refuse_to_write(self, path: Path, *, device: bool = False) -> None:
        """Raise TargetError where `path` is one of the files that are read; see `refuse_same`."""
        refuse_same(path, self.every_origin(), device=device)

    def every_origin(self) -> dict[tuple[int, int], str]:
        """Return `origins`, and those of files that came with an open disk."""
        found = dict(self.origins)
        for source in self.disk.files:
            found.update(source.origins())
        return found

    def close(self) -> None:
        """Close the disk, unless the caller brought it open."""
        if self.owned:
            self.disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def origin_of(name: str | os.PathLike[str]) -> dict[tuple[int, int], str]:
    """Return a file that the user named as `origins` have it; nothing for directories, and for what is no file."""
    try:
        status = Path(name).stat()
    except (OSError, ValueError):  # ValueError: no file has such a name
        return {}
    return {} if stat.S_ISDIR(status.st_mode) else {(status.st_dev, status.st_ino): os.fspath(name)}


def refuse_same(path: Path, origins: Mapping[tuple[int, int], str], *, device: bool = False) -> None:
    """Raise TargetError where `path` is one of the files in `origins`; a symbolic link to one may be replaced.

    `device`: a link is followed, as it is when a device is written.
    """
    try:
        status = path.stat() if device else path.lstat()
    except OSError:
        return
    name = origins.get((status.st_dev, status.st_ino))
    if name is not None and not stat.S_ISLNK(status.st_mode):
        raise same_file(path, name)


def same_file(path: Path, name: str) -> TargetError:
    """Return what tells that a target is a file that is read."""
    return TargetError(f"is the same file as {name}, which is read", file=str(path), hint="write to another name")


def open_asked(what: str | os.PathLike[str] | Disk, options: ConvertOptions) -> Opened:
    """Open a source as a conversion's options say. Raises what `open_source` raises."""
    return open_source(
        what,
        format=options.source_format,
        parents=options.parents,
        limits=options.limits,
        snapshot=options.snapshot,
        disk=options.disk,
    )


def open_source(
    what: str | os.PathLike[str] | Disk,
    *,
    format: str | None = None,
    parents: Allowed = None,
    limits: Limits | None = None,
    snapshot: str | None = None,
    disk: int | None = None,
    opener: Opener | None = None,
    source: ByteSource | None = None,
) -> Opened:
    """Open a disk image with its parents, standard input (`-`), or take a Disk as it is.

    `disk` is the number of one of a package's disks. `source`: the bytes of the image, where they are open already;
    `what` is then not looked at. Raises what `formats.registry.open_disk` raises.
    """
    if isinstance(what, Disk):
        return Opened(what.name, what, what.format, owned=False)
    limits = limits or Limits()
    opener = opener or Opener(Parents.of(parents), limits, FilePool(limits.open_files))
    if source is None:
        source = spooled() if os.fspath(what) == "-" else opener.user_source(what)
    origins = opener.pool.origins
    origins.update(source.origins())
    try:
        entry, found = identify(source, format)
        layers = open_layers(source, entry, OpenContext(opener, limits, snapshot, disk))
    except BaseException:
        source.close()
        raise
    whole: Disk = layers[-1]
    if len(layers) > 1:
        from diskmorph.formats.views import Overlay  # noqa: PLC0415 - most images stand alone

        for layer in reversed(layers[:-1]):
            whole = Overlay(layer, whole)
    kind = layers[0].info.format if entry.kind == "wrapper" else entry.name
    return Opened(source.name, whole, kind, layers[0].info, layers, found, origins=origins)


class _Spool(FileSource):
    """Standard input, kept in a file without a name."""

    def __init__(self, fd: int) -> None:
        super().__init__(Path(f"/proc/self/fd/{fd}"))
        self.name = "standard input"
        self._fd = fd

    @property
    def path(self) -> Path | None:
        """Return None: nothing lies beside standard input."""
        return None

    def origins(self) -> Mapping[tuple[int, int], str]:
        """See ByteSource: standard input itself, which may be a file with a name."""
        status = os.fstat(sys.stdin.buffer.fileno())
        return {(status.st_dev, status.st_ino): self.name}

    def close(self) -> None:
        """See ByteSource."""
        super().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def spooled() -> FileSource:
    """Copy standard input into a nameless sparse file (in TMPDIR) and return that. Raises SourceError."""
    try:
        import tempfile  # noqa: PLC0415 - standard input only

        with tempfile.TemporaryFile(prefix="diskmorph-") as spool:
            size = _copy_sparse(sys.stdin.buffer.fileno(), spool.fileno())
            os.ftruncate(spool.fileno(), size)
            return _Spool(os.dup(spool.fileno()))
    except OSError as error:
        raise SourceError(
            f"cannot be kept: {os.strerror(error.errno or 0)}",
            file="standard input",
            hint="set TMPDIR to a folder with room",
        ) from error


def _copy_sparse(source: int, target: int) -> int:
    """Copy a pipe into a file, pages of zeroes as holes; return the bytes read."""
    buffer = bytearray(_BLOCK)
    view, zeroes = memoryview(buffer), bytes(_BLOCK)
    at = 0
    while True:
        filled = 0
        while filled < _BLOCK and (count := os.readv(source, [view[filled:]])):
            filled += count
        if not buffer.startswith(zeroes[:filled]):
            _write_pages(target, view[:filled], at)
        at += filled
        if filled < _BLOCK:
            return at


def _write_pages(target: int, view: memoryview, at: int) -> None:
    """Write the pages of a block that are not zero."""
    zero = bytes(_PAGE)
    begin: int | None = None
    for start in range(0, len(view) + _PAGE, _PAGE):
        page = view[start : start + _PAGE]
        filled = len(page) > 0 and page != zero[: len(page)]
        if filled and begin is None:
            begin = start
        if not filled and begin is not None:
            _write_all(target, view[begin : min(start, len(view))], at + begin)
            begin = None


def _write_all(target: int, view: memoryview, at: int) -> None:
    while view:
        count = os.pwrite(target, view, at)
        view, at = view[count:], at + count


class Probed(str):
    """A format's name, with the marks that were found: `signatures`."""

    __slots__ = ("signatures",)
    signatures: tuple[Signature, ...]


def probe(path: str | os.PathLike[str] | ByteSource) -> Probed:
    """Return the name of an image's format by its content ("raw" is a guess), carrying every `signatures` found.

    Raises FormatError where content says raw and the name another format, SourceError where it cannot be read.
    """
    source = path if isinstance(path, ByteSource) else FileSource(path)
    try:
        entry, found = identify(source)
    finally:
        if source is not path:
            source.close()
    probed = Probed(entry.name)
    probed.signatures = tuple(found)
    return probed
