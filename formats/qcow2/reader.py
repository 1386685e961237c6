"""qcow2 images, versions 2 and 3, as disks."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.disk import ImageDisk, ImageInfo, ParentRef
from diskmorph.formats.errors import DiskmorphError, FormatError, PolicyError, SourceError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, HOLE, PLAIN, clip, row
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.bitmaps import usable
from diskmorph.formats.qcow2.extensions import read_bitmaps, read_snapshots
from diskmorph.formats.qcow2.header import Header, Place, bad, read_header, require_table
from diskmorph.formats.qcow2.tables import Judge, L2Reader, chunks, l2_offsets, read_l1
from diskmorph.formats.rows import copied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.bitmaps import DirtyBitmap
    from diskmorph.formats.qcow2.extensions import SnapshotEntry
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import Buffer, ByteSource


class Qcow2Disk(ImageDisk):
    """One qcow2 file, its active state or an internal snapshot, without its backing file.

    `files` are the image and, where it has one that may be opened, its data file.
    """

    format = "qcow2"

    def __init__(self, source: ByteSource, context: OpenContext) -> None:
        self._source = source
        self._header = header = read_header(source, context.limits)
        snapshots = read_snapshots(source, header)
        chosen = _choose(snapshots, context.snapshot, source)
        self._snapshot = chosen is not None
        self.size = header.size if chosen is None else chosen.info.virtual_size
        self.name = source.name
        self.identity = {}
        self._limits = context.limits
        self._l1_place = (header.l1_offset, header.l1_size) if chosen is None else _snapshot_l1(chosen, self, context)
        self._refusal: DiskmorphError | None = None
        self.info = _info(header, snapshots, source, context, self.size)
        self._l2 = L2Reader(source, header)
        self._judge = Judge(source, header, backed=header.backing is not None)
        self._locked = header.encryption is not None
        self.files = (self._decrypted(context), *self._data_file(context))
        if len(self.files) > 1:
            self._judge.end = self.files[1].size
        self._l1: NDArray[np.uint64] | None = None
        self._lock = threading.Lock()
        self._aes = False
        self._open_legacy(context)

    def _open_legacy(self, context: OpenContext) -> None:
        """Let plain data be read from a second source, decrypted, which is addressed by disk offset."""
        passphrase = context.opener.parents.passphrase
        if self._header.encryption != "AES" or passphrase is None or len(self.files) > 1:
            return
        from diskmorph.formats.qcow2.legacy import decrypted  # noqa: PLC0415 - encrypted images only

        self._locked = False
        stored = copy.copy(self)
        self.files = (self._source, decrypted(stored, self._source, passphrase))
        self._aes = True

    @property
    def dirty_bitmaps(self) -> tuple[DirtyBitmap, ...]:
        """See ImageDisk; none of an internal snapshot, whose content they do not tell of."""
        if self._snapshot or not self.info.bitmaps:
            return ()
        entries = read_bitmaps(self._source, self._header, self._limits)
        return usable(self._source, self._header, entries, self._limits)

    @property
    def header(self) -> Header:
        """The image's header."""
        return self._header

    def _decrypted(self, context: OpenContext) -> ByteSource:
        """Return the source that data clusters are read from; tables are never encrypted.

        Without a passphrase the refusal is kept until data is asked for, so that `info` works.
        """
        place = self._header.extensions.crypto
        if self._header.encryption != "LUKS" or place is None or context.opener.parents.passphrase is None:
            return self._source
        from diskmorph.formats.luks.cipher import DecryptedSource  # noqa: PLC0415 - encrypted images only
        from diskmorph.formats.luks.unlock import unlock  # noqa: PLC0415

        volume = unlock(self._source.window(*place), context.opener.parents.passphrase)
        self._locked = False
        return DecryptedSource(self._source, volume.cipher)

    def _data_file(self, context: OpenContext) -> tuple[ByteSource, ...]:
        """Open the external data file; a refusal is kept until data is asked for, so that `info` works without it."""
        if not self._header.has_data_file:
            return ()
        name = self._header.extensions.data_file
        if name is None:
            raise bad("has a data file, but does not name it", self._source, "header extension", field="data file")
        try:
            return (context.opener.allowed(name, self._source, "data file"),)
        except (PolicyError, SourceError) as error:
            self._refusal = error
            return ()

    def unit_size(self) -> int:
        """Return the cluster's size."""
        return self._header.cluster

    def encoded_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> tuple[bytes | bytearray, Buffer]:
        """See Disk."""
        return self._encoded(file, offset, stored, codec, least, held)

    def _table(self) -> NDArray[np.uint64]:
        """Return the L2 tables' offsets, by L1 index; read once."""
        with self._lock:
            if self._l1 is None:
                offset, entries = self._l1_place
                needed = -(-self.size // self._header.coverage)
                l1 = read_l1(self._source, offset, min(entries, needed))
                self._l1 = l2_offsets(l1, self._header, self._source, offset)
            return self._l1

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        if self._locked:
            can = not self._header.has_data_file
            raise UnsupportedError(
                f"is encrypted with {self._header.encryption}"
                + (", and no passphrase was given" if can else " and has a data file, which is not supported"),
                feature=f"{self._header.encryption} encryption",
                file=self.name,
                format="qcow2",
                structure="header",
                field="crypt_method",
                offset=32,
                hint="give it with --passphrase-file FILE" if can else None,
            )
        if self._refusal is not None:
            raise self._refusal
        for rows in self._rows(start, stop):
            part = clip(rows, start, stop)
            if len(part):
                yield self._by_disk_offset(self._within(part))

    def _by_disk_offset(self, rows: NDArray[np.void]) -> NDArray[np.void]:
        if not self._aes:
            return rows
        plain = (rows["kind"] == DATA) & (rows["codec"] == PLAIN)
        rows = copied(rows)
        rows["file"][plain] = 1
        rows["offset"][plain] = rows["start"][plain]
        return rows

    def _rows(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        header, l1 = self._header, self._table()
        coverage, cluster = header.coverage, header.cluster
        first, last = start // coverage, -(-stop // coverage)
        if last - first <= 2:
            for index in range(first, last):
                low = max(start - index * coverage, 0) // cluster
                high = -(-min(stop - index * coverage, coverage) // cluster)
                yield from self._one(index, int(l1[index]), low, high)
            return
        for low, high, empty in chunks(l1, header, first, last):
            if empty:
                yield row(low * coverage, (high - low) * coverage, self._void)
                continue
            words = self._l2.many(l1[low:high])
            try:
                yield from self._judge.rows(low * header.l2_entries, words.reshape(-1), 0)
            except FormatError as error:
                self._locate(low, high, error)

    @property
    def _void(self) -> int:
        return HOLE if self._header.backing is None else ABSENT

    def _one(self, index: int, offset: int, low: int, high: int) -> Iterator[NDArray[np.void]]:
        """Yield the extents of entries low..high of one L2 table."""
        header = self._header
        if not offset:
            yield row(index * header.coverage + low * header.cluster, (high - low) * header.cluster, self._void)
            return
        width = 2 if header.extended else 1
        words = self._l2.one(offset)[low * width : high * width]
        yield from self._judge.rows(index * header.l2_entries + low, words, offset + 8 * width * low)

    def _locate(self, low: int, high: int, error: FormatError) -> None:
        """Judge the tables of a chunk one by one, so that the error says where in the file the entry lies."""
        l1 = self._table()
        for index in range(low, high):
            for _ in self._one(index, int(l1[index]), 0, self._header.l2_entries):
                pass
        raise error

    def _within(self, rows: NDArray[np.void]) -> NDArray[np.void]:
        """Return the rows, data beyond the file's end refused.

        QEMU writes whole clusters (or subclusters): where a file ends inside one, what lies behind the disk's end may
        be missing, but nothing that a guest can read.
        """
        data = rows["kind"] == DATA
        plain = data & (rows["codec"] == PLAIN)
        ends = rows["offset"] + np.where(plain, rows["length"], np.uint64(1))
        limit = np.where(plain, self._judge.end, self._source.size).astype(np.uint64)
        beyond = np.flatnonzero(data & (ends > limit))
        if not len(beyond):
            return rows
        worst = rows[beyond[0]]
        file = self.files[int(worst["file"])]
        raise bad(
            f"the image is truncated: the data of disk offset {int(worst['start'])} lies beyond its end",
            file,
            "data cluster",
            field="offset",
            offset=int(worst["offset"]),
            expected=f"{int(worst['length'])} bytes",
            found=f"the end at {file.size}",
        )


def _choose(snapshots: list[SnapshotEntry], wanted: str | None, source: ByteSource) -> SnapshotEntry | None:
    if wanted is None:
        return None
    for key in ("name", "id"):
        for entry in snapshots:
            if getattr(entry.info, key) == wanted:
                return entry
    names = ", ".join(entry.info.name for entry in snapshots[:20])
    raise SourceError(
        f"has no snapshot {wanted!r}",
        file=source.name,
        format="qcow2",
        structure="snapshot table",
        hint=f"it has {names}" if names else "it has none",
    )


def _snapshot_l1(entry: SnapshotEntry, disk: Qcow2Disk, context: OpenContext) -> tuple[int, int]:
    header, source = disk.header, disk._source  # noqa: SLF001 - a part of the class
    field = f"l1_table_offset of snapshot {entry.info.name!r}"
    place = Place("L1 table", entry.l1_offset, entry.l1_size * 8, field, entry.offset)
    require_table(source, place, header.cluster, min(context.limits.resident_table, s.L1_MOST))
    needed = -(-disk.size // header.coverage)
    if entry.l1_size < needed:
        raise bad(
            f"the L1 table of snapshot {entry.info.name!r} is too short for its disk",
            source,
            "snapshot table",
            field="l1_size",
            offset=entry.offset + 8,
            expected=f"at least {needed}",
            found=entry.l1_size,
        )
    return entry.l1_offset, entry.l1_size


def _info(
    header: Header, snapshots: list[SnapshotEntry], source: ByteSource, context: OpenContext, size: int
) -> ImageInfo:
    parent = None
    if header.backing is not None:
        parent = ParentRef((header.backing,), header.extensions.backing_format)
    warnings = []
    if header.incompatible & s.DIRTY:
        warnings.append("the dirty bit is set: the image was not closed; its refcounts may be wrong, its data is not")
    if header.incompatible & s.CORRUPT:
        warnings.append("the corrupt bit is set: QEMU found this image damaged; check it")
    try:
        bitmaps = tuple(entry.name for entry in read_bitmaps(source, header, context.limits))
    except FormatError as error:
        bitmaps = ()
        warnings.append(f"bitmaps are unreadable: {error.problem}")
    return ImageInfo(
        "qcow2",
        f"v{header.version}",
        size,
        512,
        header.cluster,
        _features(header),
        tuple(entry.info for entry in snapshots),
        parent,
        bitmaps,
        tuple(warnings),
    )


def _features(header: Header) -> dict[str, Any]:
    features: dict[str, Any] = {
        "version": header.version,
        "compat": "0.10" if header.version == 2 else "1.1",
        "cluster_size": header.cluster,
        "refcount_bits": header.refcount_bits,
        "compression": s.COMPRESSIONS[header.compression],
        "extended_l2": header.extended,
        "lazy_refcounts": bool(header.compatible & s.LAZY_REFCOUNTS),
        "dirty": bool(header.incompatible & s.DIRTY),
        "corrupt": bool(header.incompatible & s.CORRUPT),
    }
    if header.encryption is not None:
        features["encryption"] = header.encryption
    if header.has_data_file:
        features["data_file"] = header.extensions.data_file
        features["data_file_raw"] = bool(header.autoclear & s.AUTOCLEAR_RAW)
    return features


def open_image(source: ByteSource, context: OpenContext) -> Qcow2Disk:
    """Read the headers; see FormatModule. Raises FormatError, UnsupportedError, SourceError (no such snapshot)."""
    return Qcow2Disk(source, context)
