"""Compressed streams decoded once into an unlinked file, so that their content can be read at any offset.

The file lies in `$TMPDIR` and never has a name; its size is bounded by `Limits`.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from diskmorph.formats.errors import FormatError, TargetError
from diskmorph.formats.source import ByteSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.formats.limits import Limits

_FEED = 32 << 10  # encoded bytes given to a decoder at once
_OUT = 1 << 20  # decoded bytes taken at once
_LEAST = 64 << 20  # what any stream may expand to
_MEMORY = 160 << 20  # window or dictionary of a decoder: xz -9 needs 65 MiB, zstd --long 128 MiB

_MAGICS = (
    (b"\x1f\x8b\x08", "gzip"),  # RFC 1952, 2.3.1
    (b"\x28\xb5\x2f\xfd", "zstd"),  # RFC 8878, 3.1.1
    (b"\xfd7zXZ\0", "xz"),  # The .xz File Format, 2.1.1.1
    (b"BZh", "bzip2"),
)


class Hash(Protocol):
    """What hashlib's objects are."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes in."""


def codec_of(source: ByteSource) -> str | None:
    """Return the compression of a stream by its first bytes: gzip, zstd, xz or bzip2; None if it has none."""
    head = source.read_upto(0, 6)
    return next((name for magic, name in _MAGICS if head.startswith(magic)), None)


def head_of(source: ByteSource, length: int) -> bytes:
    """Return the first decoded bytes of a stream that may be compressed; fewer where it ends or is damaged."""
    codec = codec_of(source)
    if codec is None:
        return source.read_upto(0, length)
    head = b""
    try:
        for chunk in _chunks(source, codec, None):
            head += chunk
            if len(head) >= length:
                break
    except FormatError:
        return head[:length]
    return head[:length]


def decode_stream(source: ByteSource, codec: str, encoded: Hash | None = None) -> Iterator[bytes]:
    """Yield a compressed source decoded, in chunks of a few MiB at most; `encoded` sees the bytes as stored.

    Members and frames that follow each other are one stream. Raises FormatError where it is damaged or cut off.
    """
    if codec == "zstd":
        _require_whole_frames(source)
    yield from _chunks(source, codec, encoded)


def _chunks(source: ByteSource, codec: str, encoded: Hash | None) -> Iterator[bytes]:
    """Yield what `decode_stream` does; where a zstd frame is cut off what is there, and then no error."""
    feed = _feed(source, encoded)
    try:
        if codec == "zstd":
            yield from _zstd(feed)
        else:
            yield from _members(feed, _makers()[codec], source, codec)
    except FormatError:
        raise
    except Exception as error:
        # Decoders raise errors of their own kinds (zlib.error, LZMAError, OSError, ZstdError): all mean damage.
        raise FormatError(f"its {codec} stream is damaged: {error}", file=source.name, format=codec) from error


def _feed(source: ByteSource, encoded: Hash | None) -> Iterator[bytes]:
    for at in range(0, source.size, _FEED):
        data = source.read(at, min(_FEED, source.size - at))
        if encoded is not None:
            encoded.update(data)
        yield data


def _makers() -> dict[str, Callable[[], Any]]:
    import bz2  # noqa: PLC0415 - loaded where a stream is compressed
    import lzma  # noqa: PLC0415

    from isal import isal_zlib  # noqa: PLC0415

    return {
        "gzip": lambda: isal_zlib.decompressobj(31),
        "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY),
        "bzip2": bz2.BZ2Decompressor,
    }


def _members(feed: Iterator[bytes], make: Callable[[], Any], source: ByteSource, codec: str) -> Iterator[bytes]:
    decoder = make()
    fresh = True
    for data in feed:
        rest = data
        while rest:
            if fresh and not rest.strip(b"\0"):
                break  # padding behind the last member
            yield from _outputs(decoder, rest, codec)
            fresh = False
            rest = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder, fresh = make(), True
    if not fresh:
        raise FormatError(f"its {codec} stream is cut off", file=source.name, format=codec, offset=source.size)


def _outputs(decoder: Any, data: bytes, codec: str) -> Iterator[bytes]:
    if codec == "gzip":  # expands 1032 times at most: a feed gives 33 MB
        out = decoder.decompress(data)
        if out:
            yield out
        return
    out = decoder.decompress(data, _OUT)
    while True:
        if out:
            yield out
        if decoder.eof or decoder.needs_input:
            return
        out = decoder.decompress(b"", _OUT)


class _Feed:
    """The encoded bytes as the file object that zstandard reads from."""

    def __init__(self, feed: Iterator[bytes]) -> None:
        self._feed = feed

    def read(self, size: int = -1) -> bytes:
        del size  # a feed is as large as is asked for
        return next(self._feed, b"")


def _zstd(feed: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard  # noqa: PLC0415

    decoder = zstandard.ZstdDecompressor(max_window_size=128 << 20)
    with decoder.stream_reader(_Feed(feed), read_size=_FEED, read_across_frames=True) as reader:  # type: ignore[arg-type]
        while data := reader.read(_OUT):
            yield data


def _require_whole_frames(source: ByteSource) -> None:
    """Raise FormatError where the last frame is cut off, which zstandard's reader takes for an end.

    Only headers of frames and blocks are read (RFC 8878, 3.1.1 and 3.1.2).
    """
    import zstandard  # noqa: PLC0415

    try:
        at = _frames_end(source)
    except zstandard.ZstdError as error:
        raise FormatError(f"its zstd stream is damaged: {error}", file=source.name, format="zstd") from error
    if at != source.size:
        raise FormatError("its zstd stream is cut off", file=source.name, format="zstd", offset=source.size)


def _frames_end(source: ByteSource) -> int:
    """Return where the last frame ends, which is cut off if that lies behind the file's end."""
    import zstandard  # noqa: PLC0415

    at = 0
    while at < source.size:
        head = source.read_upto(at, 18)
        if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a skippable frame
            at += 8 + int.from_bytes(head[4:8], "little")
        else:
            parameters = zstandard.get_frame_parameters(head)
            at += zstandard.frame_header_size(head)
            last = False
            while not last and at < source.size:
                header = int.from_bytes(source.read_upto(at, 3), "little")
                last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
                at += 3 + (1 if kind == 1 else size)
            at += 4 if parameters.has_checksum else 0
            at += 0 if last else 1
    return at


class Spool(ByteSource):
    """A file without a name in `$TMPDIR` that can be appended to and read at any offset."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = 0
        try:
            self._file = tempfile.TemporaryFile(prefix="diskmorph-", buffering=0)  # noqa: SIM115 - closed by close
        except OSError as error:
            raise TargetError(
                f"no temporary file can be made: {os.strerror(error.errno or 0)}", file=tempfile.gettempdir()
            ) from error

    def append(self, data: bytes | memoryview) -> None:
        """Add bytes at the end. Raises TargetError where there is no room."""
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._file.fileno(), view, self.size)
                self.size, view = self.size + count, view[count:]
        except OSError as error:
            raise TargetError(
                f"a temporary file cannot be written: {os.strerror(error.errno or 0)}",
                file=tempfile.gettempdir(),
                hint="name a larger place with TMPDIR",
            ) from error

    def require_room(self, length: int) -> None:
        """Raise TargetError if the file system has not so many bytes left."""
        room = os.fstatvfs(self._file.fileno())
        if length > room.f_bavail * room.f_frsize:
            raise TargetError(
                "has no room for a decoded stream",
                file=tempfile.gettempdir(),
                expected=f"{length} bytes",
                found=room.f_bavail * room.f_frsize,
                hint="name a larger place with TMPDIR",
            )

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        return os.preadv(self._file.fileno(), [buffer], offset)

    def descriptor(self) -> AbstractContextManager[tuple[int, int] | None]:
        """See ByteSource."""
        return nullcontext((self._file.fileno(), 0))

    def close(self) -> None:
        """See ByteSource."""
        self._file.close()


def decoded(
    source: ByteSource, limits: Limits, *, encoded: Hash | None = None, content: Hash | None = None
) -> ByteSource:
    """Return the source itself if it is not compressed, else its content in a `Spool`, and close it.

    `encoded` and `content` see the bytes as stored and as decoded. Raises FormatError for damage and for streams that
    expand beyond `limits.expansion`, TargetError where `$TMPDIR` has no room.
    """
    codec = codec_of(source)
    if codec is None:
        return source
    spool = Spool(source.name)
    most = max(_LEAST, source.size * limits.expansion)
    try:
        spool.require_room(_declared_size(source, codec))
        for chunk in decode_stream(source, codec, encoded):
            if spool.size + len(chunk) > most:
                raise FormatError(
                    f"its {codec} stream expands more than {limits.expansion} times", file=source.name, format=codec
                )
            if content is not None:
                content.update(chunk)
            spool.append(chunk)
    except BaseException:
        spool.close()
        raise
    source.close()
    return spool


def _declared_size(source: ByteSource, codec: str) -> int:
    """Return what a stream says of its decoded size, as far as it does: a lower bound of the room it needs."""
    if codec == "gzip" and source.size >= 18:  # ISIZE, modulo 2^32 (RFC 1952, 2.3.1)
        return int.from_bytes(source.read(source.size - 4, 4), "little") if source.size < 1 << 30 else 0
    if codec == "zstd":
        import zstandard  # noqa: PLC0415

        try:
            size: int = zstandard.frame_content_size(source.read_upto(0, 18))
        except zstandard.ZstdError:
            return 0
        return max(size, 0)
    return 0
