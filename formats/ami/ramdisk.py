"""Initial ramdisks (ari): cpio archives one behind the other, each plain or compressed, as Linux unpacks them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from diskmorph.formats.ami import schema
from diskmorph.formats.ami.streams import Stream, open_stream
from diskmorph.formats.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from diskmorph.formats.source import ByteSource

MOST_DECODED = 1 << 30
"""Decoded bytes of a whole ramdisk that are looked through."""
_MOST_SEGMENTS = 256
_MOST_ENTRIES = 1_000_000
_LONGEST_NAME = 4096
_STEP = 1 << 18
_MODULE = re.compile(rb"(?:^|/)([^/]+)\.ko(?:\.(?:gz|xz|zst|lz4|bz2))?$")
_RELEASE = re.compile(rb"(?:^|/)lib/modules/([^/]+)/")
_GENERATORS = (
    (b"conf/initramfs.conf", "initramfs-tools"),
    (b"conf/arch.conf", "initramfs-tools"),
    (b"usr/lib/initrd-release", "dracut"),
    (b"lib/dracut/", "dracut"),
    (b"hooks/", "mkinitcpio"),
)


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a ramdisk: where it begins and how long it is in the file (bytes), its codec ("none": plain).

    `decoded` is its size when unpacked, `entries` the files, folders and so on in it.
    """

    offset: int
    compression: str
    length: int
    decoded: int
    entries: int


@dataclass(frozen=True, slots=True)
class Ramdisk:
    """An initial ramdisk: its segments, the kernel modules inside and the kernel releases that they are for."""

    segments: tuple[Segment, ...]
    modules: tuple[str, ...]
    releases: tuple[str, ...]
    entries: int
    generator: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what `info --json` shows of it."""
        return {
            "segments": [asdict(segment) for segment in self.segments],
            "modules": list(self.modules),
            "releases": list(self.releases),
            "entries": self.entries,
            "generator": self.generator,
        }


class _Bytes(Protocol):
    """The bytes of archives, from front to back."""

    at: int

    def take(self, count: int) -> bytes: ...
    def skip(self, count: int) -> None: ...


class _Plain:
    def __init__(self, source: ByteSource, at: int) -> None:
        self._source, self.at = source, at

    def take(self, count: int) -> bytes:
        data = self._source.read_upto(self.at, count)
        self.at += len(data)
        return data

    def skip(self, count: int) -> None:
        self.at += count


class _Decoded:
    """The decoded bytes of a stream; `at` counts them."""

    def __init__(self, stream: Stream, budget: int) -> None:
        self._stream, self._budget = stream, budget
        self._held = b""
        self._next = 0
        self.at = 0

    def take(self, count: int) -> bytes:
        while len(self._held) - self._next < count and self._fill():
            pass
        data = self._held[self._next : self._next + count]
        self._next += len(data)
        self.at += len(data)
        return data

    def skip(self, count: int) -> None:
        while count:
            step = min(count, len(self._held) - self._next)
            self._next += step
            self.at += step
            count -= step
            if count and not self._fill():
                return

    def skip_zeroes(self) -> bool:
        """Pass over zeroes; return whether anything follows."""
        while True:
            rest = self._held[self._next :]
            zeroes = len(rest) - len(rest.lstrip(b"\0"))
            self._next += zeroes
            self.at += zeroes
            if zeroes < len(rest):
                return True
            if not self._fill():
                return False

    def _fill(self) -> bool:
        piece = self._stream.read(_STEP)
        self._budget -= len(piece)
        if self._budget < 0:
            raise UnsupportedError(
                f"expands to more than {MOST_DECODED >> 30} GiB, which is not looked through",
                feature="huge ramdisks",
                format="ari",
                offset=self._stream.start,
            )
        self._held = self._held[self._next :] + piece
        self._next = 0
        return bool(piece)


def read_ramdisk(source: ByteSource) -> Ramdisk:
    """Look through a ramdisk. Raises FormatError where it is none, damaged or cut off; UnsupportedError for codecs."""
    return _Reader(source).read()


class _Reader:
    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._segments: list[Segment] = []
        self._modules: dict[str, None] = {}
        self._releases: dict[str, None] = {}
        self._generator: str | None = None
        self._entries = 0
        self._decoded = 0

    def read(self) -> Ramdisk:
        """Walk over the segments; zeroes between them are padding."""
        at = self._padding(0)
        while at < self._source.size:
            if len(self._segments) >= _MOST_SEGMENTS:
                raise self._fault(f"has more than {_MOST_SEGMENTS} segments", at)
            at = self._padding(self._segment(at))
        if not self._segments:
            raise self._fault("is no initial ramdisk: it has no archive", 0)
        return Ramdisk(
            tuple(self._segments),
            tuple(sorted(self._modules)),
            tuple(sorted(self._releases)),
            self._entries,
            self._generator,
        )

    def _fault(self, problem: str, at: int, **place: Any) -> FormatError:
        return FormatError(problem, file=self._source.name, format="ari", structure="cpio", offset=at, **place)

    def _padding(self, at: int) -> int:
        """Return where the next byte that is not zero lies."""
        while at < self._source.size:
            block = self._source.read_upto(at, _STEP)
            rest = block.lstrip(b"\0")
            if rest:
                return at + len(block) - len(rest)
            at += len(block)
        return at

    def _segment(self, start: int) -> int:
        """Read one segment; return the offset behind it."""
        before = self._entries
        if self._source.read_upto(start, 6) in schema.CPIO_MAGICS:
            plain = _Plain(self._source, start)
            self._archive(plain, start)
            size = plain.at - start
            self._segments.append(Segment(start, "none", size, size, self._entries - before))
            return plain.at
        stream = open_stream(self._source, start)
        decoded = _Decoded(stream, MOST_DECODED - self._decoded)
        try:
            self._archives(decoded, start)
        except (FormatError, UnsupportedError) as error:
            raise error.located(file=self._source.name, format="ari", offset=start) from error.__cause__
        self._decoded += decoded.at
        stop = stream.end
        assert stop is not None  # noqa: S101 - everything was read
        self._segments.append(Segment(start, stream.codec, stop - start, decoded.at, self._entries - before))
        return stop

    def _archives(self, data: _Decoded, start: int) -> None:
        """Read all archives of a compressed segment, up to the stream's end."""
        found = 0
        while data.skip_zeroes():
            self._archive(data, start)
            found += 1
        if not found:
            raise self._fault("has a compressed part without an archive", start)

    def _archive(self, data: _Bytes, start: int) -> None:
        """Read one archive up to its trailer (buffer-format.rst)."""
        while True:
            raw = data.take(schema.CPIO_HEADER.sizeof())
            if len(raw) < schema.CPIO_HEADER.sizeof():
                raise self._fault("is cut off within an archive", start)
            header = schema.CPIO_HEADER.parse(raw)
            if header.magic not in schema.CPIO_MAGICS:
                raise self._fault("has a damaged archive", start, expected="cpio newc", found=bytes(header.magic))
            size, length = self._number(header.filesize, start), self._number(header.namesize, start)
            if not 0 < length <= _LONGEST_NAME:
                raise self._fault("has a name of an impossible length", start, field="namesize", found=length)
            name = data.take(length + -(schema.CPIO_HEADER.sizeof() + length) % 4)[:length].rstrip(b"\0")
            self._skip(data, size + -size % 4, start)
            if name == schema.CPIO_TRAILER:
                return
            self._note(name, start)

    def _number(self, field: bytes, start: int) -> int:
        try:
            found = int(field, 16)
        except ValueError:
            found = -1
        if found < 0:
            raise self._fault("has a damaged archive: a number is none", start, found=bytes(field))
        return found

    def _skip(self, data: _Bytes, count: int, start: int) -> None:
        before = data.at
        data.skip(count)
        if data.at - before < count or (isinstance(data, _Plain) and data.at > self._source.size):
            raise self._fault("is cut off within a file of an archive", start)

    def _note(self, name: bytes, start: int) -> None:
        self._entries += 1
        if self._entries > _MOST_ENTRIES:
            raise self._fault(f"has more than {_MOST_ENTRIES} entries", start)
        module = _MODULE.search(name)
        if module is not None:
            self._modules[module[1].decode("utf-8", "replace")] = None
        release = _RELEASE.search(name)
        if release is not None:
            self._releases[release[1].decode("utf-8", "replace")] = None
        if self._generator is None:
            plain = name.removeprefix(b"./")
            self._generator = next((word for mark, word in _GENERATORS if mark in plain), None)
