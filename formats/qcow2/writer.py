"""New qcow2 images: where clusters go and what the tables say.

The file has no gaps: the header's cluster, then data and L2 tables as they come, then the L1 table, refcount blocks
and the refcount table. So every refcount is 1, but those of clusters that compressed data shares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.allocator import PLACED, Allocator, NewImage, Write
from diskmorph.formats.errors import OptionError
from diskmorph.formats.extents import DATA, HOLE, PLAIN, ZERO
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.bitmaps import NewBitmaps
from diskmorph.formats.qcow2.building import RefcountLayout, header_bytes, luks_size, refcount_writes
from diskmorph.formats.qcow2.options import read_shape
from diskmorph.formats.qcow2.packing import Packer
from diskmorph.formats.qcow2.pending import PENDING, Pending, extended_entries, standard_entries
from diskmorph.formats.rows import chosen, copied, joined

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.luks.cipher import SectorCipher
    from diskmorph.formats.source import Buffer

_U = np.uint64
_BATCH = 4 << 20
"""Bytes of the L2 tables that are laid out side by side and made at once: a group."""


class Qcow2Allocator(Allocator):
    """Lays out one qcow2 file of version 2 or 3. Raises OptionError and TargetError when made."""

    def __init__(self, image: NewImage) -> None:
        self._shape = shape = read_shape(image)
        self.size = -(-image.size // 512) * 512
        if image.sector_size not in {512, 4096}:
            raise OptionError(f"qcow2 has no sectors of {image.sector_size} bytes")
        self.unit, self.grain, self.alignment = shape.cluster, shape.grain, shape.cluster
        self.codec, self.level = shape.codec, image.level
        self.window_bits = shape.window_bits
        self.codecs = frozenset({PLAIN, shape.codec})
        self.members = (image.name,)
        self.overlay = image.parent is not None
        self.preallocation = shape.preallocation
        self._header_room = header_bytes(shape, image, self.size, 0, 0, RefcountLayout(0, 0, 0, 0))
        self._image = image
        self._bitmaps: NewBitmaps | None = None
        if image.bitmaps and shape.version >= 3 and image.size == self.size:
            self._bitmaps = NewBitmaps(image.bitmaps, shape.cluster)
            self.bitmaps = frozenset(bitmap.name for bitmap in image.bitmaps)
            self._header_room = header_bytes(
                shape, image, self.size, 0, 0, RefcountLayout(0, 0, 0, 0), self._bitmaps.extension(0)
            )
        self._next = shape.cluster
        self._cipher: SectorCipher | None = None
        self.encrypted = bool(shape.luks)
        if self.encrypted:
            self._next += -(-luks_size() // shape.cluster) * shape.cluster
        self._l1 = np.zeros(max(-(-self.size // shape.coverage), 1), s.ENTRY)
        self._pending = Pending(shape.grain)
        self._packer = Packer(shape.cluster, shape.refcount_bits)
        self._group = shape.coverage * max(_BATCH // shape.cluster, 1)
        self._open = 0  # the group that is being placed; those before have places for their tables
        self._sealed: list[tuple[int, int, NDArray[np.int64]]] = []
        self._final: int | None = None

    def begin(self) -> Iterator[Write]:
        """See Allocator: the LUKS header, whose key encrypts what follows."""
        if self._shape.luks and self._image.passphrase is not None:
            from diskmorph.formats.luks.making import new_header  # noqa: PLC0415 - encrypted images only

            made = new_header(self._image.passphrase, self._shape.luks)
            self._cipher = made.cipher
            yield Write(0, self._shape.cluster, made.data)

    def seal(self, offset: int, data: Buffer) -> Buffer:
        """See Allocator: the tweak is the sector in the file."""
        assert self._cipher is not None  # noqa: S101 - `begin` came first
        return self._cipher.encrypt(memoryview(data).cast("B"), offset // 512)

    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """See Allocator: plain clusters in the order of the runs, then compressed ones packed byte by byte."""
        wanted = (runs["kind"] == DATA) | (runs["kind"] == ZERO)
        if self.preallocation != "off":
            wanted |= runs["kind"] == HOLE
        runs = chosen(runs, wanted)
        if not len(runs):
            return np.zeros(0, PLACED)
        first = int(runs["start"][0]) // self._group
        last = int(runs["start"][-1] + runs["length"][-1] - _U(1)) // self._group
        placed = []
        for group in range(first, last + 1):
            part = runs if first == last else _within(runs, group * self._group, (group + 1) * self._group)
            if len(part):
                self._seal(group)
                placed.append(self._place_group(part))
        return joined(placed)

    def _place_group(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        if len(runs) == 1 and runs["kind"][0] == DATA and runs["codec"][0] == PLAIN:
            return self._place_whole(runs)
        data, zero = runs["kind"] == DATA, runs["kind"] == ZERO
        packed = data & (runs["codec"] != PLAIN)
        flagged = zero & (self._shape.version >= 3)
        whole = data & ~packed
        if self.preallocation != "off":
            whole |= ~data
        elif self.overlay:
            whole |= zero & ~flagged  # version 2 has no zero clusters: real zeroes must hide the parent's data
        placed = self._place_whole(chosen(runs, whole))
        if flagged.any():
            self._note(chosen(runs, flagged & ~whole), None)
        if not packed.any():
            return placed
        rows = joined((placed, self._place_packed(chosen(runs, packed))))
        return rows.take(np.argsort(rows["start"], kind="stable"))

    def _place_whole(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """Give runs host clusters of their own; neighbours in one cluster (of subclusters) share it."""
        rows = np.zeros(len(runs), PLACED)
        if not len(runs):
            return rows
        rows["start"], rows["length"] = runs["start"], runs["length"]
        rows["offset"] = self._clusters_for(runs)
        rows["kind"] = np.where(runs["kind"] == DATA, DATA, ZERO)
        self._note(runs, rows["offset"])
        return rows

    def _clusters_for(self, runs: NDArray[np.void]) -> NDArray[np.uint64]:
        if len(runs) == 1:  # the common call, a window of data, in plain integers: a tenth of the time
            start, size = int(runs["start"][0]), self._shape.cluster
            single = np.array([self._next + start % size], _U)
            self._next += ((start + int(runs["length"][0]) - 1) // size - start // size + 1) * size
            return single
        cluster = _U(self._shape.cluster)
        first = runs["start"] // cluster
        last = (runs["start"] + runs["length"] - _U(1)) // cluster
        shared = np.zeros(len(runs), _U)
        shared[1:] = first[1:] == last[:-1]
        counts = last - first + _U(1) - shared
        before = np.cumsum(counts) - counts
        offsets: NDArray[np.uint64] = _U(self._next) + (before - shared) * cluster + runs["start"] % cluster
        self._next += int(counts.sum()) * self._shape.cluster
        return offsets

    def _place_packed(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        offsets, self._next = self._packer.pack(runs["size"], self._next)
        rows = np.zeros(len(runs), PLACED)
        rows["start"], rows["length"], rows["offset"] = runs["start"], runs["length"], offsets
        rows["kind"], rows["codec"] = DATA, runs["codec"]
        x = 62 - (self._shape.cluster.bit_length() - 1 - 8)
        sectors = (offsets + runs["size"] - _U(1)) // _U(512) - offsets // _U(512)
        self._note(runs, _U(s.COMPRESSED) | sectors << _U(x) | offsets)
        return rows

    def _note(self, runs: NDArray[np.void], offsets: NDArray[np.uint64] | None) -> None:
        """Remember runs for their L2 tables; `offsets` are places or compressed entries, None for flags alone."""
        rows = np.zeros(len(runs), PENDING)
        grain = _U(self._shape.grain)
        rows["start"] = runs["start"] // grain
        rows["count"] = (runs["length"] + grain - _U(1)) // grain
        rows["offset"] = 0 if offsets is None else offsets
        rows["kind"] = np.where((runs["kind"] == ZERO) & (self._shape.version >= 3), ZERO, DATA)
        self._pending.add(rows)

    def _seal(self, group: int) -> None:
        """Give the L2 tables of all groups before `group` their places: behind their data, before what comes next.

        So the layout depends on what is placed alone, not on how it is divided into calls.
        """
        if group <= self._open:
            return
        grains = self._shape.coverage // self._shape.grain
        for number, used in self._pending.touched(self._open, group, self._group // self._shape.grain, grains):
            self._sealed.append((number, self._next, used))
            places = np.arange(len(used), dtype=_U) * _U(self._shape.cluster) + _U(self._next)
            self._l1[number * (self._group // self._shape.coverage) + used] = places | _U(s.COPIED)
            self._next += len(used) * self._shape.cluster
        self._open = group

    def settle(self, upto: int) -> Iterator[Write]:
        """See Allocator: the L2 tables of the groups before `upto`."""
        self._seal(upto // self._group)
        yield from self._tables()

    def _tables(self) -> Iterator[Write]:
        """Yield the tables that have their places, those of a group in one piece."""
        make = extended_entries if self._shape.extended else standard_entries
        count = self._group // self._shape.grain
        while self._sealed:
            group, offset, used = self._sealed.pop(0)
            words = make(self._pending.take((group + 1) * count), group * count, count, self._shape.cluster)
            tables = words.reshape(self._group // self._shape.coverage, -1)[used]
            yield Write(0, offset, tables.astype(s.ENTRY).tobytes())

    def finish(self) -> Iterator[Write]:
        """See Allocator: remaining L2 tables, L1 table, refcounts, the header last."""
        self._seal(-(-self.size // self._group))
        yield from self._tables()
        bitmaps_at = self._next
        if self._bitmaps is not None:
            yield from self._bitmaps.writes(bitmaps_at)
            self._next += self._bitmaps.room()
        l1_offset = self._next
        self._next += self._l1_room()
        yield Write(0, l1_offset, self._l1.tobytes())
        layout = RefcountLayout.after(self._next, self._shape)
        yield from refcount_writes(layout, self._shape, self._packer)
        self._final = layout.end
        words = (self._shape, self._image, self.size, l1_offset, len(self._l1), layout)
        extension = None if self._bitmaps is None else self._bitmaps.extension(bitmaps_at)
        yield Write(0, 0, header_bytes(*words, extension))

    def _l1_room(self) -> int:
        return -(-len(self._l1) * 8 // self._shape.cluster) * self._shape.cluster

    def sizes(self) -> Sequence[int]:
        """See Allocator; before `finish` what the size will be if nothing more is placed."""
        if self._final is not None:
            return (self._final,)
        grains = self._shape.coverage // self._shape.grain
        groups = self._pending.touched(self._open, len(self._l1), self._group // self._shape.grain, grains)
        tables = sum(len(used) for _, used in groups) * self._shape.cluster
        bitmaps = 0 if self._bitmaps is None else self._bitmaps.room()
        return (RefcountLayout.after(self._next + tables + bitmaps + self._l1_room(), self._shape).end,)


def _within(runs: NDArray[np.void], start: int, stop: int) -> NDArray[np.void]:
    """Return the part of sorted runs within start..stop (disk bytes, on multiples of a cluster)."""
    ends = runs["start"] + runs["length"]
    first = int(np.searchsorted(ends, _U(start), side="right"))
    last = int(np.searchsorted(runs["start"], _U(stop), side="left"))
    out = copied(runs[first:last])
    ends = np.minimum(ends[first:last], _U(stop))
    out["start"] = np.maximum(out["start"], _U(start))
    out["length"] = ends - out["start"]
    return out


def new_allocator(image: NewImage) -> Qcow2Allocator:
    """See FormatModule. Raises OptionError and TargetError."""
    return Qcow2Allocator(image)
