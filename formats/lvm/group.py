"""Volume groups: what the metadata text says of physical and logical volumes, and logical volumes as disks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.lvm.physical import PhysicalVolume, Texts, read_physical
from diskmorph.formats.lvm.schema import SECTOR
from diskmorph.formats.lvm.text import Reader
from diskmorph.formats.views import Regions, Slice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.lvm.text import Section

_NAME = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,127}")  # lvm(8), "Valid names"
_LINEAR = frozenset(("striped", "linear"))
_LARGEST = 1 << 62  # bytes


@dataclass(frozen=True, slots=True)
class Member:
    """A physical volume of a group, as the text describes it. `disk` is None where it is missing; sizes in bytes."""

    name: str
    uuid: str
    disk: Disk | None
    start: int
    extents: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Extents of a logical volume that lie one after the other on a physical volume."""

    member: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """A logical volume that a user would see. `size` in bytes; `kind`: `linear`, or the type that is not read.

    `failure`: why it cannot be read: the type, a missing physical volume.
    """

    group: str
    name: str
    uuid: str
    group_uuid: str
    size: int
    kind: str
    disk: Disk | None
    failure: DiskmorphError | None = None

    def opened(self) -> Disk:
        """Return it as a disk. Raises the error that says why it cannot be read."""
        if self.disk is None:
            assert self.failure is not None  # noqa: S101 - one of the two is there
            raise self.failure
        return self.disk

    @property
    def paths(self) -> tuple[str, ...]:
        """What Linux calls it: in /dev/GROUP/, in /dev/mapper/ with hyphens doubled, by its UUIDs."""
        mapped = f"{self.group.replace('-', '--')}-{self.name.replace('-', '--')}"
        both = (self.group_uuid + self.uuid).replace("-", "")
        by_id = "/dev/disk/by-id/dm-"
        return (
            f"/dev/{self.group}/{self.name}",
            f"/dev/mapper/{mapped}",
            f"{by_id}name-{mapped}",
            f"{by_id}uuid-LVM-{both}",
        )


@dataclass(frozen=True, slots=True)
class VolumeGroup:
    """A group: `extent_size` in bytes; `members` and `volumes` in the text's order."""

    name: str
    uuid: str
    sequence: int
    extent_size: int
    members: tuple[Member, ...]
    volumes: tuple[LogicalVolume, ...]


@dataclass(frozen=True, slots=True)
class Groups:
    """What physical volumes came to: groups, and why metadata could not be read, by the volume's place in the list."""

    groups: tuple[VolumeGroup, ...]
    failures: dict[int, FormatError]


def groups_of(disks: Sequence[Disk], limits: Limits, *, name: str) -> Groups:
    """Return the volume groups of physical volumes: disks and partitions in any order, those that are none passed over.

    The newest metadata text counts, wherever it lies. Nothing raises here: what is damaged is told in `failures`, and
    by the logical volumes that cannot be read. `name` is of what all this lies in, for messages.
    """
    failures: dict[int, FormatError] = {}
    devices: dict[str, tuple[int, PhysicalVolume]] = {}
    texts = Texts(limits)
    for number, disk in enumerate(disks):
        try:
            found = read_physical(disk, texts, devices)
        except FormatError as error:
            failures[number] = error
        else:
            if found is not None:
                devices[found.uuid] = (number, found)
    groups: dict[str, VolumeGroup] = {}
    present = {uuid: device.disk for uuid, (_, device) in devices.items()}
    parsed: dict[int, VolumeGroup | FormatError] = {}
    for number, device in devices.values():
        failure = device.failure
        for text in device.texts:
            if id(text) not in parsed:
                parsed[id(text)] = _parsed(text, name, present)
            group = parsed[id(text)]
            if isinstance(group, FormatError):
                failure = failure or group
            elif group.uuid not in groups or groups[group.uuid].sequence < group.sequence:
                groups[group.uuid] = group
        if failure is not None:
            failures[number] = failure
    told = {member.uuid.replace("-", "") for group in groups.values() for member in group.members}
    for uuid, (number, _) in devices.items():
        if uuid in told:  # another area has a sound text
            failures.pop(number, None)
    return Groups(tuple(groups.values()), failures)


def _parsed(text: Section, name: str, present: dict[str, Disk]) -> VolumeGroup | FormatError:
    try:
        return _Parser(text, name, present).group()
    except FormatError as error:
        return error.located(file=name, format="lvm2")


class _Parser:
    """Makes a group of a text."""

    def __init__(self, text: Section, file: str, present: dict[str, Disk]) -> None:
        self._text = text
        self._file = file
        self._present = present
        self._name = ""
        self._uuid = ""
        self._extent = 0
        self._members: dict[str, Member] = {}
        self._stacked: set[str] = set()

    def group(self) -> VolumeGroup:
        """Return the group. Raises FormatError."""
        sections = [(name, content) for name, content in self._text.items() if isinstance(content, dict)]
        if len(sections) != 1:
            raise Reader(self._text, "a volume group").error("(top)", "one section", f"{len(sections)} sections")
        self._name, content = sections[0]
        reader = Reader(content, self._name[:128])
        self._require_name(reader, self._name)
        self._uuid = reader.string("id")
        self._extent = reader.number("extent_size", 1) * SECTOR
        if self._extent > _LARGEST:
            raise reader.error("extent_size", "a size", self._extent)
        for name, one in reader.sections("physical_volumes"):
            self._members[name] = self._member(name, one)
        volumes = list(reader.sections("logical_volumes"))
        self._stacked = {name for name, _ in volumes}
        stores = self._stores(one for _, one in volumes)
        return VolumeGroup(
            self._name,
            self._uuid,
            reader.number("seqno"),
            self._extent,
            tuple(self._members.values()),
            tuple(self._volume(name, one, stores) for name, one in volumes if self._is_shown(name, one, stores)),
        )

    def _is_shown(self, name: str, reader: Reader, stores: dict[str, str]) -> bool:
        """Return whether users see a volume; a snapshot they see by the name of its store."""
        first = reader.section.get("segment1")
        if isinstance(first, dict) and first.get("type") == "snapshot":
            return False
        return name in stores or "VISIBLE" in reader.words("status")

    def _require_name(self, reader: Reader, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise reader.error("name", "letters, digits, + _ . -", name)

    def _member(self, name: str, reader: Reader) -> Member:
        uuid = reader.string("id")
        missing = "MISSING" in reader.words("flags") + reader.words("status")
        start, count = reader.number("pe_start") * SECTOR, reader.number("pe_count")
        disk = None if missing else self._present.get(uuid.replace("-", ""))
        if start + count * self._extent > _LARGEST:
            raise reader.error("pe_count", "a size", count)
        return Member(name, uuid, disk, start, count)

    def _stores(self, volumes: Iterator[Reader]) -> dict[str, str]:
        """Return the volumes that are not what they seem, and why: stores of snapshots, and what they go into."""
        found: dict[str, str] = {}
        for volume in volumes:
            for segment in volume.section.values():
                if not isinstance(segment, dict) or segment.get("type") != "snapshot":
                    continue
                found.update(
                    (str(segment[field]), "snapshot") for field in ("cow_store", "merging_store") if field in segment
                )
                if "merging_store" in segment:
                    found[str(segment.get("origin"))] = "merging snapshot"
        return found

    def _volume(self, name: str, reader: Reader, stores: dict[str, str]) -> LogicalVolume:
        self._require_name(reader, name)
        uuid = reader.string("id")
        kind = stores.get(name, "linear")
        failure: DiskmorphError | None = None
        segments: list[Segment] = []
        extents = 0
        for number in range(1, reader.number("segment_count") + 1):
            segment = reader.inner(f"segment{number}")
            start, count = segment.number("start_extent"), segment.number("extent_count", 1)
            if start != extents or (start + count) * self._extent > _LARGEST:
                raise segment.error("start_extent", str(extents), start)
            extents += count
            other = self._kind(segment)
            if other != "linear":
                kind = other
            elif kind == "linear":
                place = self._segment(segment, count)
                if place is None:
                    kind = "stacked"
                else:
                    segments.append(place)
        disk = None
        if kind != "linear":
            failure = self._refused(name, kind)
        else:
            try:
                disk = self._disk(name, segments, reader)
            except DiskmorphError as error:
                failure = error.located(file=self._file, format="lvm2")
        return LogicalVolume(self._name, name, uuid, self._uuid, extents * self._extent, kind, disk, failure)

    def _refused(self, name: str, kind: str) -> UnsupportedError:
        return UnsupportedError(
            f"logical volume {self._name}/{name} is of type {kind}; only linear ones are read",
            feature=f"LVM2 {kind}",
            file=self._file,
            format="lvm2",
        )

    def _kind(self, segment: Reader) -> str:
        kind = segment.string("type").partition("+")[0]
        if kind not in _LINEAR:
            return kind[:32]
        return "linear" if segment.number("stripe_count", 1) == 1 else "striped"

    def _segment(self, segment: Reader, count: int) -> Segment | None:
        """Return where a segment lies; None where that is another logical volume."""
        place = segment.section.get("stripes")
        if not isinstance(place, list) or len(place) != 2:
            raise segment.error("stripes", "a physical volume and an extent", place)
        name, first = place
        if not isinstance(name, str) or not isinstance(first, int) or first < 0:
            raise segment.error("stripes", "a physical volume and an extent", place)
        member = self._members.get(name)
        if member is None and name in self._stacked:
            return None
        if member is None:
            raise segment.error("stripes", "a physical volume of the group", name)
        if first + count > member.extents:
            raise segment.error("stripes", f"at most {member.extents} extents", first + count)
        return Segment(name, first, count)

    def _disk(self, name: str, segments: list[Segment], reader: Reader) -> Disk:
        """Return the volume as a view of what it lies on."""
        if not segments:
            raise reader.error("segment_count", "a segment", 0)
        title = f"{self._file}, {self._name}/{name}"
        parts = [self._slice(segment, title) for segment in _joined(segments)]
        if len(parts) == 1:
            return parts[0]
        found = Regions(sector_size=max(part.sector_size for part in parts))
        for part in parts:
            found.add_disk(part)
        found.format, found.name = "lvm2", title
        return found

    def _slice(self, segment: Segment, title: str) -> Disk:
        member = self._members[segment.member]
        if member.disk is None:
            raise UnsupportedError(
                f"a logical volume lies on physical volume {member.uuid}, which is missing",
                feature="LVM2 with missing physical volumes",
                file=title,
                format="lvm2",
            )
        begin = member.start + segment.first * self._extent
        length = segment.count * self._extent
        if begin + length > member.disk.size:
            raise FormatError(
                f"physical volume {member.uuid} is cut off",
                file=member.disk.name,
                format="lvm2",
                expected=f"{begin + length} bytes",
                found=member.disk.size,
            )
        return Slice(member.disk, begin, length, title)


def _joined(segments: list[Segment]) -> Iterator[Segment]:
    """Yield segments, those that follow each other on one physical volume as one."""
    before: Segment | None = None
    for one in segments:
        if before is not None and before.member == one.member and before.first + before.count == one.first:
            before = Segment(one.member, before.first, before.count + one.count)
            continue
        if before is not None:
            yield before
        before = one
    if before is not None:
        yield before
