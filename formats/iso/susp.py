"""Rock Ridge (RRIP 1.12 over SUSP 1.12), read for all records of a directory at once.

System use entries form a chain in each record: two letters, a length, a version, data. Round by round the next entry of
every record is looked at, so that the work is a few array operations a round, whatever the number of records.
Continuation areas (CE) are appended to the buffer and the chains go on there; hops and bytes are bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.iso.directory import record_seconds
from diskmorph.formats.iso.schema import SECTOR
from diskmorph.formats.rows import distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskmorph.formats.iso.directory import Records
    from diskmorph.formats.source import ByteSource

_MAX_HOPS = 64  # continuation areas of one record
_MAX_ENTRIES = 1024  # system use entries of one record
_NM_CONTINUE, _NM_CURRENT, _NM_PARENT = 1, 2, 4
_TF_LONG = 0x80


def _word(letters: bytes) -> int:
    return letters[0] << 8 | letters[1]


@dataclass(slots=True)
class RockRidge:
    """What Rock Ridge says of the records of a directory; arrays have a value a record.

    `has_px`: whether mode, uid and gid were given; `mtime`: seconds since 1970, `has_time` where given; `child`: the
    block of a relocated directory (CL), 0 elsewhere; `relocated`: it only stands for a moved directory (RE).
    """

    has_px: NDArray[np.bool_]
    mode: NDArray[np.uint32]
    uid: NDArray[np.uint32]
    gid: NDArray[np.uint32]
    has_time: NDArray[np.bool_]
    mtime: NDArray[np.int64]
    child: NDArray[np.uint32]
    relocated: NDArray[np.bool_]
    names: dict[int, bytes] = field(default_factory=dict)
    links: dict[int, bytes] = field(default_factory=dict)
    devices: dict[int, tuple[int, int]] = field(default_factory=dict)
    zisofs: set[int] = field(default_factory=set)


def sharing_protocol_skip(data: bytes, begin: int, end: int) -> int | None:
    """Return the bytes to skip in system use areas if the root's first record begins with SP (SUSP 5.3), else None."""
    area = data[begin:end]
    if area[:2] == b"SP" and len(area) >= 7 and area[4:6] == b"\xbe\xef":
        return area[6]
    return None


class _Reader:
    """Follows the chains of one directory."""

    def __init__(self, records: Records, source: ByteSource, skip: int) -> None:
        begin, end = records.system_use()
        self.at = np.minimum(begin + skip, end)
        self.end = end.copy()
        self.data = records.data
        self.source = source
        count = len(begin)
        self.found = RockRidge(
            np.zeros(count, bool),
            np.zeros(count, np.uint32),
            np.zeros(count, np.uint32),
            np.zeros(count, np.uint32),
            np.zeros(count, bool),
            np.zeros(count, np.int64),
            np.zeros(count, np.uint32),
            np.zeros(count, bool),
        )
        self.next: dict[int, tuple[int, int, int]] = {}
        self.hops = 0
        self.link_open: dict[int, bool] = {}

    def run(self) -> RockRidge:
        """Follow every chain to its end."""
        rounds = 0
        active = np.flatnonzero(self.at + 4 <= self.end)
        while len(active) or self.next:
            if not len(active):
                active = self._hop()
                continue
            rounds += 1
            if rounds > _MAX_ENTRIES:
                raise self._damaged("more system use entries than are sane")
            active = self._round(active)
        return self.found

    def _round(self, active: NDArray[np.int64]) -> NDArray[np.int64]:
        cells = np.frombuffer(self.data, np.uint8)
        at = self.at[active]
        letters = cells[at].astype(np.uint32) << 8 | cells[at + 1]
        length = cells[at + 2].astype(np.int64)
        whole = (length >= 4) & (at + length <= self.end[active])
        active, at, letters, length = active[whole], at[whole], letters[whole], length[whole]
        for word in distinct(letters).tolist():
            handle = _HANDLERS.get(word)
            if handle is not None:
                mine = letters == word
                handle(self, active[mine], at[mine], length[mine])
        self.at[active] = at + length
        more: NDArray[np.bool_] = (letters != _word(b"ST")) & (self.at[active] + 4 <= self.end[active])
        return active[more]

    def _gather(self, at: NDArray[np.int64], offset: int) -> NDArray[np.uint32]:
        cells = np.frombuffer(self.data, np.uint8)
        four: NDArray[np.uint8] = cells[(at + offset)[:, None] + np.arange(4)].reshape(-1)
        return four.view(np.uint32)

    def px(self, who: NDArray[np.int64], at: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """POSIX file attributes, RRIP 4.1.1."""
        keep = length >= 36
        who, at = who[keep], at[keep]
        self.found.has_px[who] = True
        self.found.mode[who] = self._gather(at, 4)
        self.found.uid[who] = self._gather(at, 20)
        self.found.gid[who] = self._gather(at, 28)

    def tf(self, who: NDArray[np.int64], at: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Time stamps, RRIP 4.1.6: the modification time, which follows the creation time if that is there."""
        cells = np.frombuffer(self.data, np.uint8)
        flags = cells[at + 4]
        for value in distinct(flags).tolist():
            if not value & 2:
                continue
            size = 17 if value & _TF_LONG else 7
            start = 5 + (size if value & 1 else 0)
            mine = (flags == value) & (length >= start + size)
            some, place = who[mine], at[mine] + start
            self.found.has_time[some] = True
            if size == 7:
                stamp = cells[place[:, None] + np.arange(7)]
                self.found.mtime[some] = record_seconds(stamp[:, :6], stamp[:, 6].astype(np.int8))
                continue
            for index, p in zip(some.tolist(), place.tolist(), strict=True):
                self.found.mtime[index] = long_seconds(self.data[p : p + 17])

    def nm(self, who: NDArray[np.int64], at: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Alternate name, RRIP 4.1.4."""
        data, names = self.data, self.found.names
        for index, p, n in zip(who.tolist(), at.tolist(), length.tolist(), strict=True):
            if data[p + 4] & (_NM_CURRENT | _NM_PARENT):
                continue
            part = data[p + 5 : p + n]
            names[index] = names[index] + part if index in names else part

    def sl(self, who: NDArray[np.int64], at: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Symbolic link, RRIP 4.1.3: component records, perhaps continued in the next SL."""
        for index, p, n in zip(who.tolist(), at.tolist(), length.tolist(), strict=True):
            self._components(index, self.data[p + 5 : p + n])

    def _components(self, index: int, area: bytes) -> None:
        target = self.found.links.get(index, b"")
        glue = self.link_open.pop(index, False)
        at = 0
        while at + 2 <= len(area):
            flags, size = area[at], area[at + 1]
            word = {2: b".", 4: b"..", 8: b"/"}.get(flags & 0xE, area[at + 2 : at + 2 + size])
            separator = b"" if glue or not target or target.endswith(b"/") else b"/"
            target += separator + word
            glue = bool(flags & 1)
            at += 2 + size
        if glue:
            self.link_open[index] = True
        self.found.links[index] = target

    def pn(self, who: NDArray[np.int64], at: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Device number, RRIP 4.1.2; a low half above 255 with a zero high half is an old 16-bit number."""
        keep = length >= 20
        high, low = self._gather(at[keep], 4).tolist(), self._gather(at[keep], 12).tolist()
        for index, h, lo in zip(who[keep].tolist(), high, low, strict=True):
            self.found.devices[index] = (lo >> 8, lo & 0xFF) if not h and lo > 0xFF else (h, lo)

    def cl(self, who: NDArray[np.int64], at: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Child link, RRIP 4.1.5.1: the record stands for a directory that was moved elsewhere."""
        keep = length >= 12
        self.found.child[who[keep]] = self._gather(at[keep], 4)

    def re(self, who: NDArray[np.int64], _at: NDArray[np.int64], _length: NDArray[np.int64]) -> None:
        """Relocated directory, RRIP 4.1.5.3."""
        self.found.relocated[who] = True

    def zf(self, who: NDArray[np.int64], at: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Compressed file: zisofs."""
        for index, p, n in zip(who.tolist(), at.tolist(), length.tolist(), strict=True):
            kind = self.data[p + 4 : p + 6] if n >= 6 else b""
            if kind != b"pz":
                raise UnsupportedError(
                    f"file compression {kind!r} is not supported", feature="zisofs2", file=self.source.name
                )
            self.found.zisofs.add(index)

    def sf(self, _who: NDArray[np.int64], at: NDArray[np.int64], _length: NDArray[np.int64]) -> None:
        """Sparse file, RRIP 4.1.7: no known writer makes them; refused by name."""
        del at
        raise UnsupportedError("Rock Ridge sparse files (SF) are not supported", feature="SF", file=self.source.name)

    def ce(self, who: NDArray[np.int64], at: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Continuation area, SUSP 5.1: followed when the rest of the area was read."""
        keep = length >= 28
        fields = [self._gather(at[keep], offset).tolist() for offset in (4, 12, 20)]
        for index, block, offset, size in zip(who[keep].tolist(), *fields, strict=True):
            self.next[index] = (block, offset, size)

    def _hop(self) -> NDArray[np.int64]:
        """Go on in the continuation areas; each block is read once."""
        self.hops += 1
        if self.hops > _MAX_HOPS:
            block, offset, _ = next(iter(self.next.values()))
            raise self._damaged("continuation areas loop", block * SECTOR + offset)
        places: dict[int, int] = {}
        grown = [self.data]
        size = len(self.data)
        for block, offset, length in self.next.values():
            if offset + length > SECTOR or (block + 1) * SECTOR > self.source.size + SECTOR - 1:
                raise self._damaged("a continuation area lies outside its block or the volume", block * SECTOR + offset)
            if block not in places:
                piece = self.source.read(block * SECTOR, min(SECTOR, self.source.size - block * SECTOR))
                places[block] = size
                grown.append(piece.ljust(SECTOR, b"\0"))
                size += SECTOR
        self.data = b"".join(grown)
        for index, (block, offset, length) in self.next.items():
            self.at[index] = places[block] + offset
            self.end[index] = places[block] + offset + length
        active = np.array(sorted(self.next), np.int64)
        self.next = {}
        return active[self.at[active] + 4 <= self.end[active]]

    def _damaged(self, what: str, offset: int | None = None) -> FormatError:
        return FormatError(what, file=self.source.name, format="iso", structure="system use entry", offset=offset)


_HANDLERS = {
    _word(b"PX"): _Reader.px,
    _word(b"TF"): _Reader.tf,
    _word(b"NM"): _Reader.nm,
    _word(b"SL"): _Reader.sl,
    _word(b"PN"): _Reader.pn,
    _word(b"CL"): _Reader.cl,
    _word(b"RE"): _Reader.re,
    _word(b"ZF"): _Reader.zf,
    _word(b"SF"): _Reader.sf,
    _word(b"CE"): _Reader.ce,
}


def long_seconds(stamp: bytes) -> int:
    """Return seconds since 1970 of a 17-byte time (ECMA-119 8.4.26.1); 0 if it is unset or no date."""
    from datetime import UTC, datetime  # noqa: PLC0415 - seldom needed

    text = stamp[:16].decode("ascii", "replace")
    try:
        moment = datetime.strptime(text[:14], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return 0
    zone = stamp[16] - 256 if stamp[16] > 127 else stamp[16]
    return int(moment.timestamp()) - zone * 900


def read_rock_ridge(records: Records, source: ByteSource, skip: int) -> RockRidge:
    """Return what Rock Ridge says of a directory's records. Raises FormatError, UnsupportedError."""
    return _Reader(records, source, skip).run()
