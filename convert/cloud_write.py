"""Tarballs that importers take: members written one after the other into a file, compressed or not, and hashed."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.formats.errors import IntegrityError
from diskmorph.formats.output import FileMember, FileTarget, Target
from diskmorph.formats.source import FileSource
from diskmorph.formats.tar import schema as s
from diskmorph.formats.tarheader import LARGEST_OCTAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diskmorph.formats.output import Member
    from diskmorph.formats.source import Buffer, ByteSource

_STEP = 1 << 20
_ZEROES = bytes(_STEP)
_GZIP = 31  # wbits: a gzip wrapper, whose time is 0
_LEVEL = 1

DIRECTORY = b"5"
REGULAR = b"0"
SPARSE = b"S"


class Sink(ABC):
    """Takes a stream of bytes. `size`: bytes as they came in; `sha256`: their digest, after `close`."""

    def __init__(self) -> None:
        self.size = 0
        self._hash = hashlib.sha256()

    def write(self, data: Buffer) -> None:
        """Take bytes."""
        self._hash.update(data)
        self.size += memoryview(data).nbytes
        self._put(data)

    def zeroes(self, count: int) -> None:
        """Take so many zero bytes."""
        while count:
            step = min(count, _STEP)
            self.write(memoryview(_ZEROES)[:step])
            count -= step

    @property
    def sha256(self) -> str:
        """The digest of what was written, in hex."""
        return self._hash.hexdigest()

    @abstractmethod
    def _put(self, data: Buffer) -> None: ...

    def close(self) -> None:  # noqa: B027 - most sinks hold nothing back
        """Write what is held back."""


class FileSink(Sink):
    """Writes to a member of a target from `base` on; None: nowhere, to measure. `stored`: bytes written."""

    def __init__(self, member: Member | None, base: int = 0) -> None:
        super().__init__()
        self._member, self._base = member, base
        self.stored = 0

    def _put(self, data: Buffer) -> None:
        if self._member is not None:
            self._member.write(self._base + self.stored, data)
        self.stored += memoryview(data).nbytes


class GzipSink(Sink):
    """Compresses into another sink: one gzip member without name and time, the same bytes for the same content."""

    def __init__(self, below: Sink) -> None:
        super().__init__()
        from isal import isal_zlib  # noqa: PLC0415 - loads when first used

        self.below = below
        self._stream = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, _GZIP)

    def _put(self, data: Buffer) -> None:
        out = self._stream.compress(data)
        if out:
            self.below.write(out)

    def close(self) -> None:
        """See Sink."""
        self.below.write(self._stream.flush())
        self.below.close()


def tar_header(
    name: str, size: int, mtime: int, *, mode: int = 0o644, owner: int = 0, flag: bytes = REGULAR, gnu: bytes = b""
) -> bytes:
    """Return a header, `name` of at most 100 bytes; from 8 GiB on the size is base-256 (GNU), never PAX.

    `gnu`: the rest of an old GNU header from byte 386, whose magic it then has.
    """
    fields = {
        "name": name.encode().ljust(100, b"\0"),
        "mode": octal(mode, 8),
        "uid": octal(owner, 8),
        "gid": octal(owner, 8),
        "size": octal(size, 12),
        "mtime": octal(max(mtime, 0), 12),
        "chksum": b" " * 8,
        "typeflag": flag,
        "linkname": bytes(100),
        "magic": b"ustar " if gnu else b"ustar\0",
        "version": b" \0" if gnu else b"00",
        "uname": bytes(32),
        "gname": bytes(32),
        "devmajor": bytes(8),
        "devminor": bytes(8),
        "prefix": bytes(155),
        "padding": bytes(12),
    }
    block = bytearray(s.HEADER.build(fields))
    if gnu:
        block[s.GNU_SPARSE_OFFSET : s.GNU_SPARSE_OFFSET + len(gnu)] = gnu
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(value: int, width: int) -> bytes:
    """Return a number field: octal digits and a NUL, or GNU's base-256 where they do not do."""
    if width == 12 and value > LARGEST_OCTAL:
        return b"\x80" + value.to_bytes(width - 1, "big")
    return b"%0*o\0" % (width - 1, value)


def add_file(sink: Sink, name: str, data: bytes, mtime: int) -> None:
    """Write a small member."""
    sink.write(tar_header(name, len(data), mtime) + data + bytes(-len(data) % s.BLOCK))


def add_source(sink: Sink, header: bytes, source: ByteSource, tell: Callable[[int], None]) -> None:
    """Write a member whose content is a source's; `tell` gets the bytes done."""
    sink.write(header)
    pump(sink, source, tell)
    sink.zeroes(-source.size % s.BLOCK)


def pump(sink: Sink, source: ByteSource, tell: Callable[[int], None]) -> None:
    """Write all of a source into a sink; its holes are not read."""
    buffer = memoryview(bytearray(_STEP))
    for start, length, allocated in source.runs(0, source.size):
        if not allocated:
            sink.zeroes(length)
        for at in range(start, start + length if allocated else start, _STEP):
            piece = buffer[: min(_STEP, start + length - at)]
            source.read_into(at, piece)
            sink.write(piece)
            tell(at + len(piece))
    tell(source.size)


def end_archive(sink: Sink) -> None:
    """Write the end of an archive and close the sink."""
    sink.write(bytes(2 * s.BLOCK))
    sink.close()


class Part(Target):
    """One member of a target, for the pipeline; who opened the target commits it."""

    def __init__(self, member: Member) -> None:
        self.members = (member,)

    def commit(self, sizes: Sequence[int]) -> None:
        """See Target."""

    def close(self) -> None:
        """See Target."""


@contextlib.contextmanager
def unnamed(folder: Path, name: str) -> Iterator[FileTarget]:
    """Lend a target in `folder` for one file that never gets a name; what is written is read by `content_of`."""
    with FileTarget(folder, [f".{name[:100]}.{secrets.token_hex(4)}"], sync=False) as target:
        yield target


def content_of(target: FileTarget, sizes: Sequence[int]) -> ByteSource:
    """Return what was written to an unnamed target, as long as the target is open."""
    member = target.members[0]
    assert isinstance(member, FileMember)  # noqa: S101 - what FileTarget makes
    member.resize(sizes[0])
    return FileSource(f"/proc/self/fd/{member.fileno()}", shared=True)


def require_readable(member: Member, size: int, digest: str, codec: str = "gzip") -> None:
    """Raise IntegrityError unless a written, compressed file of `size` bytes decodes to bytes of this SHA-256."""
    from diskmorph.formats.spool import decode_stream  # noqa: PLC0415 - only with --verify

    found = hashlib.sha256()
    with FileSource(f"/proc/self/fd/{member.fileno()}", shared=True) as source:
        for chunk in decode_stream(source.window(0, size, member.name), codec):
            found.update(chunk)
    if found.hexdigest() != digest:
        raise IntegrityError("what was written does not read back", file=member.name)
