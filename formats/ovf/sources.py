"""Byte sources of referenced files that are cut into chunks or compressed by gzip (DSP0243 7.1).

Both are read at any offset: nothing is unpacked into a file.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError
from diskmorph.formats.source import ByteSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskmorph.formats.limits import Limits

_STEP = 1 << 18  # compressed bytes read at once
_BLOCK = 1 << 20  # decoded bytes kept together
_BLOCKS = 12
_MARKS = 256  # saved states of the decoder, 40 KiB each
_GZIP = 31  # zlib's word for a gzip wrapper and a 32 KiB window


class JoinedSource(ByteSource):
    """Sources one behind the other, as one."""

    def __init__(self, parts: Sequence[ByteSource], name: str) -> None:
        self.name = name
        self._parts = tuple(parts)
        self._starts = [0]
        for part in self._parts:
            self._starts.append(self._starts[-1] + part.size)
        self.size = self._starts.pop()

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        if offset >= self.size:
            return 0
        index = bisect_right(self._starts, offset) - 1
        within = offset - self._starts[index]
        room = self._parts[index].size - within
        return self._parts[index].pread(within, buffer[:room])

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """See ByteSource."""
        for base, part in zip(self._starts, self._parts, strict=True):
            low, high = max(start - base, 0), min(stop - base, part.size)
            if low < high:
                for at, length, allocated in part.runs(low, high):
                    yield at + base, length, allocated

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        for part in self._parts:
            part.verify_unchanged()

    def close(self) -> None:
        """See ByteSource."""
        for part in self._parts:
            part.close()


class _Decoder:
    """A gzip stream being decoded: `at` decoded bytes so far, `read` the compressed bytes it was given.

    Members that follow one another are one stream (RFC 1952 2.2).
    """

    def __init__(self, at: int = 0, read: int = 0, state: Any = None, rest: bytes = b"") -> None:
        self.at, self.read, self.rest = at, read, rest
        self.state = zlib.decompressobj(_GZIP) if state is None else state
        self.ended = False

    def copy(self) -> _Decoder:
        return _Decoder(self.at, self.read, self.state.copy(), self.rest)

    def more(self, source: ByteSource, most: int) -> bytes:
        """Return the next decoded bytes, at most `most` and fewer only at the end. Raises zlib.error."""
        out = bytearray()
        while len(out) < most and not self.ended:
            if not self.rest:
                self.rest = source.read_upto(self.read, _STEP)
                self.read += len(self.rest)
            if self.state.eof and not self._next_member():
                continue
            if not self.rest:
                raise zlib.error("it is cut off")
            out += self.state.decompress(self.rest, most - len(out))
            self.rest = self.state.unused_data if self.state.eof else self.state.unconsumed_tail
        self.at += len(out)
        return bytes(out)

    def _next_member(self) -> bool:
        """Begin the member that follows; zeroes behind the last one are padding."""
        if not self.rest.strip(b"\0"):
            self.ended = not self.rest
            self.rest = b""
            return False
        self.state = zlib.decompressobj(_GZIP)
        return True


class GzipSource(ByteSource):
    """The decoded bytes of a gzip file, readable at any offset.

    Opening decodes it once, checks it and saves the decoder's state here and there; reads go on from the nearest one.
    Raises FormatError where the stream is damaged, cut off, or expands beyond `limits.expansion` or `most` bytes.
    """

    def __init__(self, source: ByteSource, limits: Limits, most: int | None = None) -> None:
        self.name = source.name
        self._source = source
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._most = min(source.size * limits.expansion, source.size * limits.expansion if most is None else most)
        spacing = max(16 * _BLOCK, source.size * 4 // _MARKS // _BLOCK * _BLOCK)
        self._marks: list[_Decoder] = []
        self.size = self._scan(spacing)
        self._live = self._marks[0].copy()

    def _scan(self, spacing: int) -> int:
        decoder = _Decoder()
        while not decoder.ended:
            if decoder.at % _BLOCK == 0 and decoder.at >= len(self._marks) * spacing and len(self._marks) < _MARKS:
                self._marks.append(decoder.copy())
            self._decode(decoder)
            if decoder.at > self._most:
                raise self._fault("expands beyond all measure", decoder)
        return decoder.at

    def _fault(self, problem: str, decoder: _Decoder) -> FormatError:
        return FormatError(
            f"its gzip stream {problem}", file=self.name, format="ovf", structure="gzip", offset=decoder.read
        )

    def _decode(self, decoder: _Decoder) -> bytes:
        try:
            return decoder.more(self._source, _BLOCK - decoder.at % _BLOCK)
        except zlib.error as error:
            raise self._fault(f"is damaged: {error}", decoder) from error

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        if offset >= self.size:
            return 0
        within = offset % _BLOCK
        piece = self._block(offset // _BLOCK)[within : within + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def _block(self, number: int) -> bytes:
        with self._lock:
            found = self._blocks.get(number)
            if found is not None:
                self._blocks.move_to_end(number)
                return found
            start = number * _BLOCK
            if not self._live.at <= start or start - self._live.at > 64 * _BLOCK:
                mark = max((m for m in self._marks if m.at <= start), key=lambda m: m.at)
                if not self._live.at <= start or mark.at > self._live.at:
                    self._live = mark.copy()
            while self._live.at <= start:
                at = self._live.at
                self._keep(at // _BLOCK, self._decode(self._live))
            return self._blocks[number]

    def _keep(self, number: int, block: bytes) -> None:
        self._blocks[number] = block
        while len(self._blocks) > _BLOCKS:
            self._blocks.popitem(last=False)

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self._source.verify_unchanged()

    def close(self) -> None:
        """See ByteSource."""
        self._source.close()
