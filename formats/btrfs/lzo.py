"""LZO1X decompression, and how btrfs frames it (fs/btrfs/lzo.c): lengths before segments of a sector each."""

from __future__ import annotations

from diskmorph.formats.errors import FormatError

_PAGE = 4096


def decode_frames(data: bytes, length: int, sector: int = _PAGE) -> bytes:
    """Return the bytes of an extent, `length` at most. Raises FormatError."""
    total = int.from_bytes(data[:4], "little")
    if total > len(data) or total < 4:
        raise _damaged()
    out = bytearray()
    at = 4
    while at < total and len(out) < length:
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if not size or at + size > len(data):
            raise _damaged()
        out += decompress(data[at : at + size], sector)
        at += size
        left = sector - at % sector
        if left < 4:  # a length does not cross a sector's end; behind the last segment, this is counted in `total`
            at += left
    return bytes(out[:length])


def _damaged() -> FormatError:
    return FormatError("data compressed by LZO are damaged", structure="compressed extent")


def decompress(data: bytes, most: int) -> bytes:
    """Return what an LZO1X stream decodes to, at most `most` bytes. Raises FormatError."""
    try:
        return _Decoder(data, most).run()
    except IndexError as error:
        raise _damaged() from error


class _Decoder:
    """One stream: runs of literals, and matches that copy what was decoded before."""

    def __init__(self, data: bytes, most: int) -> None:
        self._data = data
        self._most = most
        self._at = 0
        self._out = bytearray()

    def run(self) -> bytes:
        data = self._data
        first = data[0]
        state = 0
        if first > 17:  # a short or long run of literals comes first
            self._at = 1
            self._literals(first - 17)
            state = min(first - 17, 4) if first - 17 < 4 else 4
        while True:
            instruction = data[self._at]
            self._at += 1
            if instruction < 16 and state == 0:
                self._literals((instruction or 15 + self._length()) + 3)
                state = 4
                continue
            state_after = self._match(instruction, state)
            if state_after is None:
                return bytes(self._out)
            state = state_after
            if state:
                self._literals(state)

    def _length(self) -> int:
        """Return a length that runs on: 255 for each zero byte, and the byte behind them."""
        extra = 0
        while self._data[self._at] == 0:
            extra += 255
            self._at += 1
            if extra > self._most:
                raise _damaged()
        extra += self._data[self._at]
        self._at += 1
        return extra

    def _literals(self, count: int) -> None:
        piece = self._data[self._at : self._at + count]
        if len(piece) != count or len(self._out) + count > self._most:
            raise _damaged()
        self._out += piece
        self._at += count

    def _word(self) -> int:
        word = int.from_bytes(self._data[self._at : self._at + 2], "little")
        if self._at + 2 > len(self._data):
            raise _damaged()
        self._at += 2
        return word

    def _match(self, instruction: int, state: int) -> int | None:
        """Copy a match; return how many literals follow, None at the end of the stream."""
        if instruction >= 64:
            length = (instruction >> 5) + 1
            distance = (self._data[self._at] << 3) + (instruction >> 2 & 7) + 1
            self._at += 1
            trailing = instruction & 3
        elif instruction >= 32:
            length = (instruction & 31 or 31 + self._length()) + 2
            word = self._word()
            distance, trailing = (word >> 2) + 1, word & 3
        elif instruction >= 16:
            length = (instruction & 7 or 7 + self._length()) + 2
            word = self._word()
            distance, trailing = 16384 + ((instruction & 8) << 11) + (word >> 2), word & 3
            if distance == 16384:
                return None
        else:
            distance = (instruction >> 2) + (self._data[self._at] << 2) + 1
            self._at += 1
            trailing = instruction & 3
            length = 2
            if state == 4:
                length, distance = 3, distance + 2048
        self._copy(distance, length)
        return trailing

    def _copy(self, distance: int, length: int) -> None:
        start = len(self._out) - distance
        if start < 0 or len(self._out) + length > self._most:
            raise _damaged()
        if distance >= length:
            self._out += self._out[start : start + length]
            return
        piece = bytes(self._out[start:])
        self._out += (piece * (length // distance + 1))[:length]
