"""What btrfs files hold: plain extents where they lie, compressed ones decoded when they are read."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING

import zstandard

from diskmorph.formats.btrfs import schema as s
from diskmorph.formats.btrfs.lzo import decode_frames
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.source import ByteSource, BytesSource
from diskmorph.formats.tree import Piece

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.btrfs.volume import Item, Volume

_KEPT = 64  # decoded extents, 8 MiB


class Decoded:
    """Decoded extents of one file system, the last few kept."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self._kept: OrderedDict[tuple[int, int, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, logical: int, stored: int, length: int, codec: int) -> bytes:
        """Return the `length` bytes that `stored` bytes at a logical address decode to. Raises FormatError."""
        key = (logical, stored, length, codec)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        parts = [self.volume.source.read(*one) for one in self.volume.places(logical, stored, "extent")]
        found = decode(self.volume, b"".join(parts), length, codec)
        with self._lock:
            self._kept[key] = found
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found


def decode(volume: Volume, data: bytes, length: int, codec: int) -> bytes:
    """Return data decoded to `length` bytes; a stream may end before, the rest of its last sector being zeroes.

    Raises FormatError where it is damaged, or ends more than a sector before.
    """
    decoder = _DECODERS.get(codec)
    if decoder is None:
        raise UnsupportedError(f"uses compression {codec}", feature=f"compression {codec}", file=volume.source.name)
    sector = volume.super.sectorsize
    try:
        found = decoder(data, length, sector)
    except (zlib.error, zstandard.ZstdError) as error:
        raise _damaged_stream(volume, str(error)) from error
    except FormatError as error:
        raise error.located(file=volume.source.name, format="btrfs") from error.__cause__
    if length - len(found) >= sector:
        raise _damaged_stream(volume, f"{len(found)} bytes instead of {length}")
    return found + bytes(length - len(found))


def _inflate(data: bytes, length: int, _: int) -> bytes:
    return zlib.decompressobj().decompress(data, length)


def _zstd(data: bytes, length: int, _: int) -> bytes:
    with zstandard.ZstdDecompressor(max_window_size=s.LARGEST_WINDOW).stream_reader(data) as reader:
        return reader.read(length)


_DECODERS: dict[int, Callable[[bytes, int, int], bytes]] = {s.ZLIB: _inflate, s.LZO: decode_frames, s.ZSTD: _zstd}


def _damaged_stream(volume: Volume, why: str) -> FormatError:
    return FormatError(
        f"compressed data are damaged: {why}",
        file=volume.source.name,
        format="btrfs",
        structure="compressed extent",
    )


class CompressedSource(ByteSource):
    """One compressed extent, decoded when it is read."""

    def __init__(self, decoded: Decoded, logical: int, stored: int, length: int, codec: int) -> None:
        self.name = decoded.volume.source.name
        self.size = length
        self._decoded = decoded
        self._place = (logical, stored, length, codec)

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        piece = self._decoded.get(*self._place)[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


def pieces_of(decoded: Decoded, items: list[Item], size: int, number: int) -> tuple[Piece, ...]:
    """Return the content of a file of `size` bytes from its EXTENT_DATA items. Raises FormatError."""
    volume = decoded.volume
    found: list[Piece] = []
    reach = 0
    for item in items:
        if item.key < reach:
            raise _damaged(volume, number, "has extents that overlap")
        reach = _add(decoded, item, size, number, found)
    return tuple(found)


def _damaged(volume: Volume, number: int, problem: str) -> FormatError:
    return volume.error(f"inode {number} {problem}", "extent data", 0)


def _add(decoded: Decoded, item: Item, size: int, number: int, found: list[Piece]) -> int:
    """Append an extent's pieces, cut at the file's size; return where it ends."""
    volume = decoded.volume
    data, start = item.data, item.key
    if len(data) < s.EXTENT_HEAD.size:
        raise _damaged(volume, number, "has a damaged extent")
    _, ram, codec, encryption, other, kind = s.EXTENT_HEAD.unpack_from(data)
    if encryption or other or kind > s.PREALLOCATED:
        raise _damaged(volume, number, "has an extent of an unknown kind")
    if kind == s.INLINE:
        content = data[s.EXTENT_HEAD.size :]
        if not 0 < ram <= s.LARGEST_COMPRESSED or start:
            raise _damaged(volume, number, "has an inline extent of a wrong length")
        if codec:
            content = decode(volume, content, ram, codec)
        length = min(len(content), size - start)
        if length > 0:
            found.append(Piece(start, length, BytesSource(content), 0))
        return int(start) + len(content)
    if len(data) < s.EXTENT_HEAD.size + s.EXTENT_PLACE.size:
        raise _damaged(volume, number, "has a damaged extent")
    logical, stored, skip, length = s.EXTENT_PLACE.unpack_from(data, s.EXTENT_HEAD.size)
    end = int(start + length)
    length = min(length, size - start)
    if not logical or kind == s.PREALLOCATED or length <= 0:
        return end
    if codec:
        if ram > s.LARGEST_COMPRESSED or stored > 2 * s.LARGEST_COMPRESSED or skip + length > ram:
            raise _damaged(volume, number, "has a compressed extent of a wrong length")
        source = CompressedSource(decoded, logical, stored, ram, codec)
        found.append(Piece(start, length, source, skip))
        return end
    if skip + length > stored:
        raise _damaged(volume, number, "has an extent of a wrong length")
    for place, part in volume.places(logical + skip, length, "extent"):
        found.append(Piece(start, part, volume.source, place))
        start += part
    return end
