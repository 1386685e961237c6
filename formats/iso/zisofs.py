"""zisofs: files that are compressed block by block inside an ISO (format version 1, zlib)."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from construct import ConstructError

from diskmorph.formats.errors import FormatError
from diskmorph.formats.iso.schema import ZisofsHeader
from diskmorph.formats.source import ByteSource

if TYPE_CHECKING:
    from collections.abc import Iterator


class ZisofsSource(ByteSource):
    """The decoded content of a zisofs file; the last block is kept, so sequential reads decode each block once.

    Raises FormatError where the header or the block pointers contradict the file.
    """

    def __init__(self, stored: ByteSource) -> None:
        self.name = stored.name
        self._stored = stored
        try:
            header = ZisofsHeader.parse(stored.read_upto(0, 16))
        except ConstructError as error:
            raise self._damaged("header", 0) from error
        self._block = 1 << header.block_log2
        count = -(-header.size // self._block)
        table = header.header_words * 4
        if not 15 <= header.block_log2 <= 17 or table < 16 or table + 4 * (count + 1) > stored.size:
            raise self._damaged("header", 0)
        self.size = header.size
        self._pointers = np.frombuffer(stored.read(table, 4 * (count + 1)), "<u4").astype(np.int64)
        if (np.diff(self._pointers) < 0).any() or (count and int(self._pointers[-1]) > stored.size):
            raise self._damaged("block pointer", table)
        self._held: tuple[int, bytes] = (-1, b"")

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        if offset >= self.size:
            return 0
        index, skip = divmod(offset, self._block)
        piece = self._decoded(index)[skip : skip + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """See ByteSource: blocks that store nothing are holes, so a file of zeroes costs what it costs here."""
        empty = np.diff(self._pointers) == 0
        changes = (np.flatnonzero(np.diff(empty)) + 1) * self._block
        bounds = [start, *(int(at) for at in changes if start < at < stop), stop]
        for low, high in pairwise(bounds):
            if high > low:
                yield low, high - low, not empty[low // self._block]

    def _decoded(self, index: int) -> bytes:
        number, data = self._held
        if number == index:
            return data
        begin, end = int(self._pointers[index]), int(self._pointers[index + 1])
        length = min(self._block, self.size - index * self._block)
        if begin == end:
            data = bytes(length)  # an empty block stands for zeroes
        else:
            try:
                data = zlib.decompressobj().decompress(self._stored.read(begin, end - begin), length + 1)
            except zlib.error as error:
                raise self._damaged("block", begin) from error
        if len(data) != length:
            raise self._damaged("block", begin)
        self._held = (index, data)
        return data

    def _damaged(self, structure: str, offset: int) -> FormatError:
        return FormatError("a zisofs file is damaged", file=self.name, format="iso", structure=structure, offset=offset)
