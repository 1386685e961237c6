"""cloop, compressed loopback images of Knoppix and others, read only: one index of blocks, each compressed for itself.

Facts are those of cloop's cloop.h (format V2.0, and V4.0 with its header at either end) and of QEMU's block/cloop.c.
All numbers are big-endian.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from construct import Bytes, Int32ub, Int64ub, Struct

from diskmorph.formats.check import WARNING, CheckReport
from diskmorph.formats.disk import ImageDisk, ImageInfo
from diskmorph.formats.errors import FormatError, OptionError, UnsupportedError
from diskmorph.formats.extents import BATCH, CODEC_NAMES, DATA, EXTENT, LZ4, LZMA, LZO, PLAIN, ZLIB, clip
from diskmorph.formats.rows import distinct

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.allocator import NewImage, Option
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

OPTIONS: tuple[Option, ...] = ()
SUBFORMATS: tuple[str, ...] = ()

# struct cloop_head. The preamble is a shell script whose second line names the format.
HEADER = Struct("preamble" / Bytes(128), "block_size" / Int32ub, "blocks" / Int32ub)
HEADER_SIZE = HEADER.sizeof()
SCRIPT = b"#!/bin/sh\n#V"
_VERSION = slice(len(SCRIPT) - 1, len(SCRIPT) + 3)

# The index: where each block begins, and behind the last one its end. V4.0 keeps the codec in the top 4 bits.
ENTRY = np.dtype(">u8")
ENTRY_STRUCT = Int64ub
_CODECS = (ZLIB, PLAIN, LZMA, LZ4, LZO)
_OFFSET_BITS = 60

_U = np.uint64


def _bad(problem: str, structure: str, **place: Any) -> FormatError:
    return FormatError(problem, structure=structure, **place)


def _find_header(source: ByteSource) -> tuple[int, str]:
    """Return where the header begins, and the version that it names. Raises FormatError, UnsupportedError."""
    for place in (0, source.size - HEADER_SIZE):
        head = source.read_upto(place, 32) if place >= 0 else b""
        if not head.startswith(SCRIPT):
            continue
        version = head[_VERSION].decode("ascii", "replace")
        if version not in {"V2.0", "V4.0"}:
            raise UnsupportedError(
                f"is of cloop's format {version}: only V2.0 and V4.0 are read, older ones depend on the machine",
                feature=f"cloop {version}",
                structure="header",
                field="preamble",
                offset=place + _VERSION.start,
            )
        if source.size - place < HEADER_SIZE:
            raise _bad("the file ends inside its header", "header", offset=source.size, expected=f"{HEADER_SIZE} bytes")
        return place, version
    raise _bad("has no cloop header", "header", field="preamble", offset=0, expected=SCRIPT.decode().strip())


class CloopDisk(ImageDisk):
    """One cloop file. `places` are where blocks begin and the last one ends, `codecs` what encodes each."""

    format = "cloop"

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        self.header_place, version = _find_header(source)
        header = HEADER.parse(source.read(self.header_place, HEADER_SIZE))
        self.block_size: int = header.block_size
        if not 0 < self.block_size <= limits.decoded_unit or self.block_size % 512:
            raise _bad(
                "the header is damaged",
                "header",
                field="block_size",
                offset=self.header_place + 128,
                expected=f"a multiple of 512, at most {limits.decoded_unit}",
                found=self.block_size,
            )
        self.blocks: int = header.blocks
        self.index_place, self.data = self._index_room(source, limits)
        self.places = np.frombuffer(source.read(self.index_place, (self.blocks + 1) * ENTRY.itemsize), ENTRY).astype(_U)
        kinds = np.zeros(self.blocks, np.uint8)
        if version == "V4.0":
            kinds = (self.places[:-1] >> _U(_OFFSET_BITS)).astype(np.uint8)
            self.places &= _U((1 << _OFFSET_BITS) - 1)
        self.size = self.blocks * self.block_size
        self.files = (source,)
        self.name = source.name
        self.identity = {}
        self.codecs = self._codecs(kinds)
        self._require_places()
        names = [CODEC_NAMES[codec] for codec in distinct(self.codecs).tolist()]
        features = {"version": version, "header": "last" if self.header_place else "first", "codecs": names}
        self.info = ImageInfo("cloop", version, self.size, self.sector_size, self.block_size, features)

    def _index_room(self, source: ByteSource, limits: Limits) -> tuple[int, tuple[int, int]]:
        """Return where the index begins, and the range of the file that is left for blocks."""
        length = (self.blocks + 1) * ENTRY.itemsize
        room = self.header_place or source.size - HEADER_SIZE
        if length > min(room, limits.resident_table):
            raise _bad(
                "the index is too large, or lies beyond the end of the file",
                "header",
                field="blocks",
                offset=self.header_place + 132,
                expected=f"at most {min(room, limits.resident_table) // ENTRY.itemsize - 1}",
                found=self.blocks,
            )
        if self.header_place:
            return self.header_place - length, (0, self.header_place - length)
        return HEADER_SIZE, (HEADER_SIZE + length, source.size)

    def _codecs(self, kinds: NDArray[np.uint8]) -> NDArray[np.uint8]:
        unknown = np.flatnonzero(kinds >= len(_CODECS))
        if len(unknown):
            raise UnsupportedError(
                f"has blocks compressed in a way that is not known, {int(kinds[unknown[0]])}",
                feature="cloop compression",
                structure="index",
                field=f"entry {int(unknown[0])}",
                offset=self.index_place + int(unknown[0]) * ENTRY.itemsize,
            )
        return np.array(_CODECS, np.uint8)[kinds]

    def _require_places(self) -> None:
        """Refuse an index that is not in order, leaves the file, or holds blocks of impossible lengths."""
        low, high = self.data
        begins, ends = self.places[:-1], self.places[1:]
        stored = ends - np.minimum(begins, ends)
        # Whatever the codec, incompressible blocks grow but little.
        most = _U(self.block_size + self.block_size // 8 + 1024)
        wrong = (begins < _U(low)) | (ends > _U(high)) | (ends <= begins) | (stored > most)
        wrong |= (self.codecs == PLAIN) & (stored != _U(self.block_size))
        bad = np.flatnonzero(wrong)
        if not len(bad):
            return
        at = int(bad[0])
        raise _bad(
            f"block {at} lies beyond the end of the file, over something else or is of an impossible length",
            "index",
            field=f"entry {at}",
            offset=self.index_place + at * ENTRY.itemsize,
            expected=f"1 to {int(most)} bytes from {low} to {high}",
            found=f"{int(begins[at])} to {int(ends[at])}",
        )

    def unit_size(self) -> int:
        """See Disk: the block's size."""
        return self.block_size

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        first, last = start // self.block_size, -(-stop // self.block_size)
        for at in range(first, last, BATCH):
            high = min(at + BATCH, last)
            rows = np.zeros(high - at, EXTENT)
            rows["start"] = np.arange(at, high, dtype=_U) * _U(self.block_size)
            rows["length"] = self.block_size
            rows["kind"], rows["codec"] = DATA, self.codecs[at:high]
            rows["offset"] = self.places[at:high]
            stored = self.places[at + 1 : high + 1] - self.places[at:high]
            rows["stored"] = np.where(rows["codec"] == PLAIN, _U(0), stored)
            yield clip(rows, start, stop)


def open_image(source: ByteSource, context: OpenContext) -> CloopDisk:
    """See FormatModule."""
    if context.snapshot is not None:
        raise UnsupportedError(f"a cloop image has no snapshot {context.snapshot!r}", feature="internal snapshots")
    return CloopDisk(source, context.limits)


def new_allocator(image: NewImage) -> NoReturn:
    """Refuse: cloop is not written."""
    raise OptionError(f"cloop is read, but not written: {image.name}", hint="`diskmorph formats` lists what is written")


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule: every block must decode. Nothing is repaired."""
    del repair
    disk = open_image(source, context)
    report = CheckReport("cloop")
    for at in range(0, disk.size, disk.block_size):
        try:
            disk.read(at, disk.block_size)
        except FormatError as error:
            report.add(error.structure or "compressed data", error.offset, error.problem)
    low, high = disk.data
    spare = (int(disk.places[0]) - low) + (high - int(disk.places[-1]))
    if spare:
        report.add("file", low, f"{spare} bytes of the file belong to no block", WARNING)
    return report
