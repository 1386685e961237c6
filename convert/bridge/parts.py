"""Partitions put together into a disk with a GPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diskmorph.formats.errors import TargetError
from diskmorph.formats.gpt import Partition, build_gpt
from diskmorph.formats.views import Regions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.allocator import Identity
    from diskmorph.formats.disk import Disk

MIB = 1 << 20
ALIGNMENT = MIB
FIRST = MIB  # where the first partition begins: LBA 2048
_TAIL = 33 * 512  # the backup GPT

ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
# Discoverable Partitions Specification, by OCI's names of architectures
ROOT_TYPES = {
    "amd64": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "arm64": "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
    "386": "44479540-F297-41B2-9AF7-D131D5F0458A",
    "arm": "69DAD710-2CE4-4E3C-B16C-21A1D49ABED3",
    "riscv64": "72EC70A6-CF74-40E6-BD49-4BDA08E8F224",
    "ppc64le": "C31C45E6-3F39-412E-80FB-4809C4980599",
    "s390x": "5EEAD9A9-FE09-4A1E-A1D7-520D00531306",
}


@dataclass(frozen=True)
class Part:
    """A partition to be: its name, type GUID, content (whole MiB long or padded to that), attribute bits."""

    name: str
    type: str
    disk: Disk
    attributes: int = 0

    @property
    def length(self) -> int:
        """Bytes that it takes on the disk."""
        return -(-self.disk.size // ALIGNMENT) * ALIGNMENT


def starts(parts: Sequence[Part]) -> list[int]:
    """Return the byte at which each partition begins, and where the next would."""
    found = [FIRST]
    for part in parts:
        found.append(found[-1] + part.length)
    return found


def room_for_last(size: int, parts: Sequence[Part]) -> int:
    """Return the bytes that a disk of `size` bytes leaves for one more partition behind `parts`; perhaps negative."""
    return (size - _TAIL - starts(parts)[-1]) // ALIGNMENT * ALIGNMENT


def size_of(parts: Sequence[Part]) -> int:
    """Return the size of the smallest disk that holds the partitions: whole MiB."""
    return -(-(starts(parts)[-1] + _TAIL) // MIB) * MIB


def compose(parts: Sequence[Part], size: int, identity: Identity, mbr_code: bytes = b"") -> Disk:
    """Return a disk of `size` bytes with a GPT and these partitions, the last extended to all room that is left.

    Raises TargetError where they do not fit.
    """
    places = starts(parts)
    partitions = []
    for number, (part, start) in enumerate(zip(parts, places, strict=False), 1):
        length = part.length if number < len(parts) else max(part.length, (size - _TAIL - start) // MIB * MIB)
        uuid = str(identity.uuid(f"partition {number}"))
        partitions.append(Partition(number, part.type, part.name, start, length, uuid, attributes=part.attributes))
    if size_of(parts) > -(-size // MIB) * MIB:
        raise TargetError("the disk is too small for its partitions", expected=size_of(parts), found=size)
    head, tail = build_gpt(size, partitions, disk_guid=identity.uuid("disk"), mbr_code=mbr_code)
    disk = Regions()
    disk.add_bytes(head)
    for part, start in zip(parts, places, strict=False):
        disk.pad_to(start)
        disk.add_disk(part.disk)
    disk.pad_to(size // 512 * 512 - len(tail))
    disk.add_bytes(tail)
    disk.pad_to(size)
    return disk
