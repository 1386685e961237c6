"""A compressed file's content as a sparse, nameless file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.compressed.probe import DISK_MEMBERS
from diskmorph.formats.errors import FormatError, TargetError, UnsupportedError
from diskmorph.formats.source import ByteSource, FileSource
from diskmorph.formats.spool import codec_of, decode_stream

if TYPE_CHECKING:
    from diskmorph.formats.limits import Limits

_PAGE = 4096
_LEAST_DATA = 64 << 20  # what any stream may expand to, zeroes not counted
_LEAST_SIZE = 16 << 30  # zeroes counted, which take time but no room


class Decoded(FileSource):
    """The content of a compressed file, kept in a file without a name. `stored_size`: bytes as compressed."""

    def __init__(self, fd: int, name: str, stored_size: int) -> None:
        super().__init__(Path(f"/proc/self/fd/{fd}"), shared=True)
        self.name = name
        self.stored_size = stored_size
        self._fd = fd

    @property
    def path(self) -> Path | None:
        """Return None: nothing lies beside it."""
        return None

    def close(self) -> None:
        """See ByteSource."""
        super().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def decoded_image(source: ByteSource, limits: Limits) -> ByteSource:
    """Return what a compressed file holds: the image, or the one disk of a cloud's tarball.

    Raises FormatError for damage and for streams that expand beyond the limits, TargetError where `$TMPDIR` has no
    room, UnsupportedError for archives without a disk.
    """
    content = _decode(source, limits)
    try:
        from diskmorph.formats.tar.schema import is_tar  # noqa: PLC0415 - most are no archives

        return _member(content, limits) if is_tar(content.read_upto(0, 512)) else content
    except BaseException:
        content.close()
        raise


def _decode(source: ByteSource, limits: Limits) -> Decoded:
    codec = codec_of(source)
    if codec is None:
        raise FormatError(
            "is not compressed by gzip, xz, zstd or bzip2", file=source.name, format="compressed", offset=0
        )
    try:
        with tempfile.TemporaryFile(prefix="diskmorph-", buffering=0) as file:
            writer = _SparseWriter(file.fileno(), source, limits)
            for chunk in decode_stream(source, codec):
                writer.append(chunk)
            os.ftruncate(file.fileno(), writer.size)
            return Decoded(os.dup(file.fileno()), source.name, source.size)
    except OSError as error:
        raise TargetError(
            f"a temporary file cannot be written: {os.strerror(error.errno or 0)}",
            file=tempfile.gettempdir(),
            hint="name a larger place with TMPDIR",
        ) from error


class _SparseWriter:
    """Appends to a file; pages of zeroes become holes."""

    def __init__(self, fd: int, source: ByteSource, limits: Limits) -> None:
        self._fd = fd
        self._source, self._times = source, limits.expansion
        self._most_data = max(_LEAST_DATA, source.size * limits.expansion)
        self._most_size = max(_LEAST_SIZE, source.size * limits.expansion)
        self._data = 0
        self.size = 0

    def append(self, chunk: bytes) -> None:
        """Add decoded bytes. Raises FormatError where they are too many."""
        if self.size + len(chunk) > self._most_size:
            raise self._too_large()
        view = memoryview(chunk)
        head = min(-self.size % _PAGE, len(view))
        self._put(view[:head])
        pages = (len(view) - head) // _PAGE
        body = view[head : head + pages * _PAGE]
        filled = np.frombuffer(body, np.uint64).reshape(pages, -1).any(axis=1) if pages else np.zeros(0, np.bool_)
        edges = np.flatnonzero(np.diff(filled.astype(np.int8), prepend=0, append=0)).tolist()
        base = self.size
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            self.size = base + first * _PAGE
            self._put(body[first * _PAGE : last * _PAGE])
        self.size = base + len(body)
        self._put(view[head + len(body) :])

    def _put(self, view: memoryview) -> None:
        self._data += len(view)
        if self._data > self._most_data:
            raise self._too_large()
        while view:
            count = os.pwrite(self._fd, view, self.size)
            self.size, view = self.size + count, view[count:]

    def _too_large(self) -> FormatError:
        return FormatError(
            f"its stream expands more than {self._times} times", file=self._source.name, format="compressed"
        )


def _member(content: Decoded, limits: Limits) -> ByteSource:
    """Return the disk in an archive; the whole file is closed with it."""
    from diskmorph.formats.tar import read_tar  # noqa: PLC0415

    tree = read_tar(content, limits=limits, name=content.name)
    for name in DISK_MEMBERS:
        node = tree.find(name, follow=False)
        if node is not None and not node.is_dir:
            return _Inside(node.source(content.name), content)
    raise UnsupportedError(
        "is an archive without disk.raw, box.img or rootfs.img",
        feature="archives as disks",
        file=content.name,
        hint="`diskmorph build` makes a disk of an archive of files",
    )


class _Inside(ByteSource):
    """A member of an archive; closing it closes the archive."""

    def __init__(self, member: ByteSource, archive: Decoded) -> None:
        self.name, self.size = archive.name, member.size
        self.stored_size = archive.stored_size
        self._archive, self._member = archive, member
        self.pread = member.pread  # type: ignore[method-assign]
        self.runs = member.runs  # type: ignore[method-assign]
        self.descriptor = member.descriptor  # type: ignore[method-assign]
        self.verify_unchanged = member.verify_unchanged  # type: ignore[method-assign]

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource; the member's own takes its place."""
        raise NotImplementedError

    def close(self) -> None:
        """See ByteSource."""
        self._archive.close()
