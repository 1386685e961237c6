"""A physical volume as it is read: its label, and the newest sound text in its metadata areas."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from construct import ConstructError

from diskmorph.formats.errors import FormatError
from diskmorph.formats.lvm import schema as s
from diskmorph.formats.lvm.text import Section, parse

if TYPE_CHECKING:
    from collections.abc import Container

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.limits import Limits

_UUID = re.compile(r"[A-Za-z0-9]{32}")
_LEAST_AREA = 2 * s.SECTOR  # a header, and a ring of one sector
_TEXTS = 4  # times `Limits.descriptor`: what the texts of all devices together may have, each counted once


class Texts:
    """Texts parsed, each once: all areas of a group hold the same."""

    def __init__(self, limits: Limits) -> None:
        self.longest = limits.descriptor
        self._left = limits.descriptor * _TEXTS
        self._known: dict[bytes, Section] = {}

    def parsed(self, text: bytes) -> Section:
        """Return a text parsed. Raises FormatError where it is damaged, or where there are too many."""
        found = self._known.get(text)
        if found is None:
            self._left -= len(text)
            if self._left < 0:
                raise FormatError("there is too much LVM2 metadata", expected=f"at most {self.longest * _TEXTS} bytes")
            found = self._known[text] = parse(text.rstrip(b"\0").decode("utf-8", "replace"))
        return found


@dataclass(frozen=True, slots=True)
class PhysicalVolume:
    """A device with a label: its UUID (32 characters), and the texts of its metadata areas, as many as are sound.

    `failure`: why an area's text could not be read; it counts where no device of the group has a sound one.
    """

    disk: Disk
    uuid: str
    texts: tuple[Section, ...]
    failure: FormatError | None


def read_physical(disk: Disk, texts: Texts, known: Container[str]) -> PhysicalVolume | None:
    """Return the physical volume that a disk or partition is; None where it has no label.

    Raises FormatError where the label is damaged, or its UUID is one of those `known`.
    """
    label = _label(disk)
    if label is None:
        return None
    header, at = label
    uuid = header.uuid.decode("latin-1")
    if not _UUID.fullmatch(uuid):
        raise _damaged(disk, "label", at, "the label is damaged", field="pv_uuid", found=uuid)
    if uuid in known:
        raise _damaged(disk, "label", at, "two physical volumes have one UUID", field="pv_uuid", found=uuid)
    sound = []
    failure: FormatError | None = None
    for place in header.metadata:
        try:
            text = _Area(disk, place, texts).text()
        except FormatError as error:
            failure = failure or error
        else:
            if text is not None:
                sound.append(text)
    return PhysicalVolume(disk, uuid, tuple(sound), failure)


def _damaged(disk: Disk, structure: str, offset: int, problem: str, **values: Any) -> FormatError:
    return FormatError(problem, file=disk.name, format="lvm2", structure=structure, offset=offset, **values)


def _label(disk: Disk) -> tuple[Any, int] | None:
    """Return the header behind the first label, and where it lies."""
    for number in range(min(s.LABEL_SECTORS, disk.size // s.SECTOR)):
        at = number * s.SECTOR
        sector = disk.read(at, s.SECTOR)
        label = s.LABEL.parse(sector)
        if label.magic != s.LABEL_MAGIC or label.type != s.LABEL_TYPE:
            continue
        found = s.crc_of(sector[s.LABEL_CRC_FROM :])
        if label.crc != found or label.sector != number:
            field, expected, stored = ("crc", f"{found:08x}", f"{label.crc:08x}")
            if label.crc == found:
                field, expected, stored = "sector", str(number), str(label.sector)
            problem = "the label is damaged"
            raise _damaged(disk, "label", at, problem, field=field, expected=expected, found=stored)
        try:
            return s.PV.parse(sector[label.offset :]), at
        except ConstructError:
            raise _damaged(disk, "label", at, "the label is damaged", field="pv_header") from None
    return None


class _Area:
    """One metadata area: a header, and a ring in which each new text is written behind the one before."""

    def __init__(self, disk: Disk, place: Any, texts: Texts) -> None:
        self._disk = disk
        self._start, self._size = int(place.offset), int(place.size)
        self._texts = texts

    def _damaged(self, problem: str, **values: Any) -> FormatError:
        return _damaged(self._disk, "metadata area", self._start, problem, **values)

    def text(self) -> Section | None:
        """Return the text that was committed last, parsed; None where the area holds none. Raises FormatError."""
        if self._size < _LEAST_AREA or self._start + self._size > self._disk.size:
            most = f"at most {self._disk.size} bytes"
            raise self._damaged(
                "a metadata area lies outside the volume", expected=most, found=self._start + self._size
            )
        head = self._disk.read(self._start, s.SECTOR)
        area = s.AREA.parse(head)
        wanted: dict[str, object] = {
            "crc": s.crc_of(head[4:]),
            "magic": s.AREA_MAGIC,
            "version": s.AREA_VERSION,
            "start": self._start,
            "size": self._size,
        }
        for field, expected in wanted.items():
            if area[field] != expected:
                problem = "the header of a metadata area is damaged"
                raise self._damaged(problem, field=field, expected=expected, found=area[field])
        if not area.committed.offset or area.committed.flags & s.IGNORED:
            return None
        return self._parsed(self._ring(area.committed))

    def _ring(self, place: Any) -> bytes:
        """Return a text's bytes, which may go on at the ring's start."""
        offset, size = int(place.offset), int(place.size)
        room = self._size - s.SECTOR
        if not s.SECTOR <= offset < self._size or not 0 < size <= room:
            raise self._damaged("a text lies outside its metadata area", field="raw_locn", found=f"{offset}+{size}")
        if size > self._texts.longest:
            raise self._damaged(
                "the metadata text is too long", expected=f"at most {self._texts.longest} bytes", found=size
            )
        first = min(size, self._size - offset)
        text = self._disk.read(self._start + offset, first)
        text += self._disk.read(self._start + s.SECTOR, size - first)
        found = s.crc_of(text)
        if found != place.crc:
            raise _damaged(
                self._disk,
                "metadata text",
                self._start + offset,
                "the metadata text is damaged",
                field="crc",
                expected=f"{found:08x}",
                found=f"{place.crc:08x}",
            )
        return text

    def _parsed(self, text: bytes) -> Section:
        try:
            return self._texts.parsed(text)
        except FormatError as error:
            raise error.located(file=self._disk.name, format="lvm2", offset=self._start) from None
