"""Compressed streams inside kernels and ramdisks: gzip, xz, lzma, bzip2, zstd and legacy lz4, with their exact ends."""

from __future__ import annotations

import io
import zlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.package_probe import compression_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.source import ByteSource

_STEP = 1 << 17
_WINDOW = 1 << 27  # bytes of the largest window that a stream may use: that of zstd in Linux
_MEMORY = _WINDOW + (16 << 20)  # what xz may take for one
_LZ4_MAGIC = 0x184C2102
_LZ4_BLOCK = 8 << 20
_LZ4_BOUND = _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16
_UNSUPPORTED = {b"\x89LZO": "lzo"}


class Stream(ABC):
    """A compressed stream of a source from `start`, decoded from front to back.

    `end` is the offset behind it, known once `read` has returned nothing.
    """

    codec: str

    def __init__(self, source: ByteSource, start: int) -> None:
        self._source, self.start = source, start
        self.end: int | None = None
        self._at = start

    @abstractmethod
    def read(self, most: int) -> bytes:
        """Return the next decoded bytes, at most `most`; none at the end. Raises FormatError."""

    def fault(self, problem: str) -> FormatError:
        """Return the error of a damaged stream."""
        return FormatError(
            f"its {self.codec} stream {problem}", file=self._source.name, structure=self.codec, offset=self._at
        )

    def _more(self) -> bytes:
        """Return the next encoded bytes. Raises FormatError at the source's end."""
        data = self._source.read_upto(self._at, _STEP)
        if not data:
            raise self.fault("is cut off")
        self._at += len(data)
        return data


class _Incremental(Stream):
    """A codec of the standard library: gzip through zlib's interface, the others through lzma's."""

    def __init__(self, source: ByteSource, start: int, codec: str) -> None:
        super().__init__(source, start)
        self.codec = codec
        self._decoder, self._errors = _standard(codec)
        self._rest = b""

    def read(self, most: int) -> bytes:
        """See Stream."""
        while self.end is None:
            if not self._rest and getattr(self._decoder, "needs_input", True):
                self._rest = self._more()
            try:
                out: bytes = self._decoder.decompress(self._rest, most)
            except self._errors as error:
                raise self.fault(f"is damaged: {error}") from error
            self._rest = getattr(self._decoder, "unconsumed_tail", b"")
            if self._decoder.eof:
                self.end = self._at - len(self._decoder.unused_data)
            if out:
                return out
        return b""


def _standard(codec: str) -> tuple[Any, tuple[type[Exception], ...]]:
    if codec == "gzip":
        return zlib.decompressobj(31), (zlib.error,)
    if codec == "bzip2":
        import bz2  # noqa: PLC0415

        return bz2.BZ2Decompressor(), (OSError, ValueError)
    import lzma  # noqa: PLC0415

    form = lzma.FORMAT_ALONE if codec == "lzma" else lzma.FORMAT_XZ
    return lzma.LZMADecompressor(form, _MEMORY), (lzma.LZMAError, EOFError)


class _Zstd(Stream):
    """One zstd frame; its end is found by its block headers (RFC 8878 3.1.1)."""

    codec = "zstd"

    def __init__(self, source: ByteSource, start: int) -> None:
        super().__init__(source, start)
        import zstandard  # noqa: PLC0415

        self._error = zstandard.ZstdError
        frame = _Frame(self, source, start)
        self._stop = frame.stop
        decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        self._reader = decoder.stream_reader(io.BufferedReader(_Window(source, start, frame.stop), _STEP))

    def read(self, most: int) -> bytes:
        """See Stream."""
        try:
            out: bytes = self._reader.read(most)
        except self._error as error:
            raise self.fault(f"is damaged: {error}") from error
        if not out:
            self.end = self._stop
        return out


class _Frame:
    """Finds where a zstd frame ends."""

    def __init__(self, stream: Stream, source: ByteSource, start: int) -> None:
        import zstandard  # noqa: PLC0415

        head = source.read_upto(start, 18)
        try:
            parameters = zstandard.get_frame_parameters(head)
            at = start + zstandard.frame_header_size(head)
        except zstandard.ZstdError as error:
            raise stream.fault(f"is damaged: {error}") from error
        last = False
        while not last:
            header = int.from_bytes(source.read_upto(at, 3), "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            if at + 3 > source.size or kind == 3:
                raise stream.fault("is cut off or damaged")
            at += 3 + (1 if kind == 1 else size)
        self.stop = at + (4 if parameters.has_checksum else 0)
        if self.stop > source.size:
            raise stream.fault("is cut off")


class _Window(io.RawIOBase):
    """A range of a source as a file that is read once."""

    def __init__(self, source: ByteSource, start: int, stop: int) -> None:
        self._source, self._at, self._stop = source, start, stop

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), self._stop - self._at)
        if count:
            self._source.read_into(self._at, view[:count])
            self._at += count
        return count


class _Lz4(Stream):
    """The legacy format, Linux's own: blocks of at most 8 MiB behind their sizes, ended by no size that can be one."""

    codec = "lz4"

    def __init__(self, source: ByteSource, start: int) -> None:
        super().__init__(source, start)
        self._held = memoryview(b"")
        self._at += 4

    def read(self, most: int) -> bytes:
        """See Stream."""
        while not self._held and self.end is None:
            self._block()
        out = bytes(self._held[:most])
        self._held = self._held[most:]
        return out

    def _block(self) -> None:
        field = self._source.read_upto(self._at, 4)
        size = int.from_bytes(field, "little")
        if size == _LZ4_MAGIC:
            self._at += 4
            return
        if len(field) < 4 or size == 0 or size > _LZ4_BOUND:
            self.end = self._at
            return
        if self._at + 4 + size > self._source.size:
            raise self.fault("is cut off")
        import lz4.block  # type: ignore[import-untyped]  # noqa: PLC0415

        try:
            data = lz4.block.decompress(self._source.read(self._at + 4, size), uncompressed_size=_LZ4_BLOCK)
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise self.fault(f"is damaged: {error}") from error
        self._held = memoryview(data)
        self._at += 4 + size


def open_stream(source: ByteSource, start: int, codec: str | None = None) -> Stream:
    """Open the compressed stream that begins at `start`. Raises FormatError where there is none, UnsupportedError."""
    head = source.read_upto(start, 16)
    found = codec or compression_of(head)
    if found is None:
        if head[:4] in _UNSUPPORTED:
            word = _UNSUPPORTED[head[:4]]
            raise UnsupportedError(
                f"has a part compressed by {word}, which is not supported",
                feature=word,
                file=source.name,
                offset=start,
            )
        raise FormatError("has no compressed stream where one should be", file=source.name, offset=start)
    special: dict[str, Callable[[ByteSource, int], Stream]] = {"zstd": _Zstd, "lz4": _Lz4}
    return special[found](source, start) if found in special else _Incremental(source, start, found)


def decode_head(source: ByteSource, start: int, length: int) -> bytes:
    """Return up to `length` decoded bytes of the stream at `start`; what is damaged gives fewer, or none."""
    out = b""
    try:
        stream = open_stream(source, start)
        while len(out) < length and (piece := stream.read(length - len(out))):
            out += piece
    except (FormatError, UnsupportedError):
        return out
    return out
