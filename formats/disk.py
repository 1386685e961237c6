"""`Disk`: a sequence of bytes as a guest sees it, sparse. Every format, view and built disk is one."""

from __future__ import annotations

import io
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from diskmorph.formats.codecs import decode, decode_exactly
from diskmorph.formats.errors import DiskmorphError, FormatError, OptionError, PolicyError
from diskmorph.formats.extents import ABSENT, DATA, EXTENT, HOLE, PLAIN, coalesced, stops

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.bitmaps import DirtyBitmap
    from diskmorph.formats.source import Buffer, ByteSource

_CACHED_UNITS = 16


class Disk(ABC):
    """The bytes 0..size as a guest sees them. Thread-safe for reading.

    `size` is in bytes, any number; `sector_size` is the logical sector's, a property of the disk; `files` are the
    sources that extents point into by index; `format` and `name` stand in messages.
    """

    size: int
    sector_size: int = 512
    files: Sequence[ByteSource] = ()
    format: str = "disk"
    name: str = "disk"

    @abstractmethod
    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        """Yield sorted, gapless batches of EXTENT rows that cover exactly start..stop (already checked)."""

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.void]]:
        """Yield what start..stop (bytes) consists of, in batches of EXTENT rows: sorted, gapless, coalesced, bounded.

        Raises FormatError where tables are damaged or point beyond their file.
        """
        stop = self.size if stop is None else stop
        self._require_range(start, stop)
        if start == stop:
            return iter(())
        return coalesced(self._extents(start, stop))

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the disk's bytes from `start`, or raise; never fewer, never beyond the end."""
        buffer = buffer.cast("B")
        self._require_range(start, start + len(buffer))
        for batch in self.extents(start, start + len(buffer)):
            self.read_rows(batch, start, buffer)

    def read_rows(self, rows: NDArray[np.void], base: int, buffer: memoryview) -> None:
        """Fill `buffer`, whose first byte is the disk's byte `base`, with what rows (of this disk) say."""
        fields = [
            rows[name].tolist() for name in ("start", "length", "offset", "stored", "skip", "file", "kind", "codec")
        ]
        for start, length, offset, stored, skip, file, kind, codec in zip(*fields, strict=True):
            piece = buffer[start - base : start - base + length]
            if kind != DATA:
                self._fill(kind, start, piece)
            elif codec == PLAIN:
                self._plain(file, offset, piece)
            else:
                piece[:] = self._decoded(file, offset, stored, codec, skip + length)[skip : skip + length]

    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start`; for small reads.

        Raises OptionError (a number below zero), FormatError (beyond the end), and what reading raises.
        """
        if start < 0 or length < 0:
            raise OptionError(f"{length} bytes from {start} on cannot be read", file=self.name)
        self._require_range(start, start + length)
        buffer = bytearray(length)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def open_stream(self) -> io.BufferedReader:
        """Return the disk as a seekable, read-only binary file object."""
        return io.BufferedReader(DiskStream(self), 1 << 16)

    def verify_unchanged(self) -> None:
        """Raise IntegrityError if a file of the disk changed since it was opened."""
        for source in self.files:
            source.verify_unchanged()

    def close(self) -> None:
        """Close the disk's files."""
        for source in self.files:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Decoded bytes of one unit, by (file, offset): sequential small reads decode each unit once.
    def _decoded(self, file: int, offset: int, stored: int, codec: int, least: int) -> bytes | bytearray:
        cache = self.__dict__.setdefault("_units", OrderedDict())
        lock = self.__dict__.setdefault("_units_lock", threading.Lock())
        with lock:
            found: bytes | bytearray | None = cache.get((file, offset))
        if found is not None and len(found) >= least:
            return found
        unit = self.decode_unit(file, offset, stored, codec, least)
        with lock:
            cache[(file, offset)] = unit
            while len(cache) > _CACHED_UNITS:
                cache.popitem(last=False)
        return unit

    def decode_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> bytes | bytearray:
        """Return one encoded unit decoded: `unit_size()` bytes, or `least` where that is unknown.

        `held` stands for the file where parts of it have been read already.
        """
        source = held or self.files[file]
        data = source.view(offset, stored)
        try:
            return decode(codec, data, max(self.unit_size(), least))
        except DiskmorphError as error:
            error.structure = error.structure or "compressed data"
            raise error.located(file=source.name, format=self.format, offset=offset) from error.__cause__

    def encoded_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> tuple[bytes | bytearray, Buffer]:
        """Return what `decode_unit` does, and the bytes that encode it, exactly; none where they can't be passed on."""
        return self.decode_unit(file, offset, stored, codec, least, held), b""

    def _encoded(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> tuple[bytes | bytearray, Buffer]:
        """Return what `encoded_unit` does, for formats that keep nothing but the stream."""
        source = held or self.files[file]
        data = source.view(offset, stored)
        try:
            unit, taken = decode_exactly(codec, data, max(self.unit_size(), least))
        except DiskmorphError as error:
            error.structure = error.structure or "compressed data"
            raise error.located(file=source.name, format=self.format, offset=offset) from error.__cause__
        return unit, memoryview(data)[:taken]

    def unit_size(self) -> int:
        """Return the decoded size of an encoded unit; 0 where there are none."""
        return 0

    def _plain(self, file: int, offset: int, piece: memoryview) -> None:
        try:
            self.files[file].read_into(offset, piece)
        except DiskmorphError as error:
            raise error.located(format=self.format) from error.__cause__

    def _fill(self, kind: int, start: int, piece: memoryview) -> None:
        if kind == ABSENT:
            raise PolicyError(
                f"the range at {start} belongs to the parent, which is not open",
                option="--allow-parent",
                file=self.name,
                format=self.format,
                hint="allow its directory with --allow-parent DIR, or name it with --backing FILE",
            )
        zeroes = np.frombuffer(piece, np.uint8)
        zeroes[:] = 0

    def _require_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.size:
            raise FormatError(
                "a read beyond the end of the disk",
                file=self.name,
                format=self.format,
                offset=max(start, 0),
                expected=f"at most {self.size} bytes",
                found=f"{start}..{stop}",
            )


class DiskStream(io.RawIOBase):
    """A Disk as a raw binary file object."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io.RawIOBase."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._disk.size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """See io.RawIOBase."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._disk.size - self._at))
        if count:
            self._disk.read_into(self._at, view[:count])
            self._at += count
        return count


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An internal snapshot: names, the disk's size then (bytes), when (seconds since 1970), VM state (bytes)."""

    id: str
    name: str
    virtual_size: int
    created: float | None = None
    vm_state_size: int = 0


@dataclass(frozen=True, slots=True)
class ParentRef:
    """What an image says of its parent.

    `names` are file names as recorded, the most trustworthy first; `format` is the recorded format, if any; `expects`
    maps keys of the parent's `identity` to the values that are accepted.
    """

    names: tuple[str, ...]
    format: str | None = None
    expects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What `info` tells of an image, gathered from its headers alone. Sizes in bytes."""

    format: str
    subformat: str | None
    virtual_size: int
    sector_size: int
    allocation_unit: int | None
    features: Mapping[str, Any] = field(default_factory=dict)
    snapshots: tuple[Snapshot, ...] = ()
    parent: ParentRef | None = None
    bitmaps: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What a user should know: dirty flags, a damaged copy that was passed over."""

    @property
    def encrypted(self) -> bool:
        """Whether the image holds its data encrypted; `features["encryption"]` names how."""
        return "encryption" in self.features


class ImageDisk(Disk):
    """A Disk read from an image file. ABSENT rows ask the parent, where `info.parent` names one."""

    info: ImageInfo
    identity: Mapping[str, str]
    """What a child records of its parent: `{"cid": ...}`, `{"uuid": ...}`; keys are the format's own."""

    @property
    def dirty_bitmaps(self) -> Sequence[DirtyBitmap]:
        """Return the dirty bitmaps that can be relied on. Raises FormatError."""
        return ()


def checked(disk: Disk) -> Disk:
    """Return the disk wrapped so that every call asserts the contract of `extents`; for tests."""
    return _Checked(disk)


class _Checked(Disk):
    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.size, self.sector_size, self.files = disk.size, disk.sector_size, disk.files
        self.format, self.name = disk.format, disk.name

    def unit_size(self) -> int:
        return self._disk.unit_size()

    def decode_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> bytes | bytearray:
        return self._disk.decode_unit(file, offset, stored, codec, least, held)

    def encoded_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> tuple[bytes | bytearray, Buffer]:
        return self._disk.encoded_unit(file, offset, stored, codec, least, held)

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        at = start
        for batch in self._disk.extents(start, stop):
            assert batch.dtype == EXTENT, batch.dtype  # noqa: S101 - this class is made of assertions
            assert 0 < len(batch) <= 1 << 20, len(batch)  # noqa: S101
            assert int(batch["start"][0]) == at, (int(batch["start"][0]), at)  # noqa: S101
            assert (batch["length"] > 0).all()  # noqa: S101
            assert (stops(batch)[:-1] == batch["start"][1:]).all()  # noqa: S101
            assert (batch["kind"] <= ABSENT).all()  # noqa: S101
            data = batch[batch["kind"] == DATA]
            assert not len(data) or int(data["file"].max()) < len(self.files)  # noqa: S101
            assert ((data["codec"] == PLAIN) | (data["stored"] > 0)).all()  # noqa: S101
            rest = batch[batch["kind"] != DATA]
            assert not rest["offset"].any()  # noqa: S101
            assert not rest["codec"].any()  # noqa: S101
            at = int(stops(batch)[-1])
            yield batch
        assert at == stop, (at, stop)  # noqa: S101


__all__ = [
    "ABSENT",
    "DATA",
    "EXTENT",
    "HOLE",
    "Disk",
    "DiskStream",
    "ImageDisk",
    "ImageInfo",
    "ParentRef",
    "Snapshot",
    "checked",
]
