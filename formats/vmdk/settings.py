"""What a new VMDK is asked to be: the `-o` words, read once for every subformat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diskmorph.formats.allocator import Option, OptionReader
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.extents import DEFLATE, ZLIB
from diskmorph.formats.vmdk.descriptor import NO_PARENT, NewDescriptor
from diskmorph.formats.vmdk.schema import SECTOR

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewImage

FLAT = ("monolithicFlat", "twoGbMaxExtentFlat", "vmfs", "vmfsThin")
SPARSE = ("monolithicSparse", "twoGbMaxExtentSparse")
STREAM = "streamOptimized"
SUBFORMATS: tuple[str, ...] = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsThin",
)
ADAPTERS = ("lsilogic", "buslogic", "ide", "legacyESX", "pvscsi")
PREALLOCATIONS = ("off", "falloc", "full")

OPTIONS: tuple[Option, ...] = (
    Option("subformat", "|".join(SUBFORMATS), "monolithicSparse", "the kind of disk; with -c streamOptimized"),
    Option("adapter_type", "|".join(ADAPTERS), "lsilogic", "the controller that the descriptor names"),
    Option("hwversion", "NUMBER", "4", "the virtual hardware version that the descriptor names"),
    Option("toolsversion", "NUMBER", "2147483647", "the VMware Tools version that the descriptor names"),
    Option("zeroed_grain", "on|off", "off", "keep explicit zeroes in sparse kinds (on in overlays); header version 2"),
    Option("preallocation", "|".join(PREALLOCATIONS), "off", "reserve the room of flat kinds, or write it all"),
)

EXTENT_SECTORS = 4192256
"""Sectors of an extent of the twoGbMax kinds, as VMware splits: 2047 MiB."""
MAX_SIZE = 62 << 40
"""VMware's largest disk, bytes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A request for a new image, checked. `size` is in bytes, a multiple of the sector."""

    image: NewImage
    size: int
    subformat: str
    adapter_type: str
    hwversion: str
    toolsversion: str
    zeroed_grain: bool
    preallocation: str

    @property
    def overlay(self) -> bool:
        """Whether the image has a parent."""
        return self.image.parent is not None

    def member(self, suffix: str) -> str:
        """Return the name of an extent file: NAME.vmdk with `suffix` before the dot."""
        name = self.image.name
        stem, dot, ending = name.rpartition(".")
        if not dot or ending.lower() != "vmdk":
            return f"{name}{suffix}.vmdk"
        return f"{stem}{suffix}.{ending}"

    def descriptor(self, lines: tuple[str, ...]) -> bytes:
        """Return the descriptor for extents described by `lines`."""
        identity, parent = self.image.identity, self.image.parent
        uuid = bytearray(identity.bytes("vmdk/uuid", 16))
        uuid[:4] = bytes((0x60, 0x00, 0xC2, 0x90 | uuid[3] & 0x0F))  # VMware's NAA identifiers begin so
        return NewDescriptor(
            create_type="vmfs" if self.subformat == "vmfsThin" else self.subformat,
            cid=identity.u32("vmdk/cid"),
            sectors=self.size // SECTOR,
            extents=lines,
            adapter_type=self.adapter_type,
            hwversion=self.hwversion,
            toolsversion=self.toolsversion,
            uuid=bytes(uuid),
            content_id=identity.bytes("vmdk/content", 12),
            parent_cid=NO_PARENT if parent is None else int(parent.identity["cid"], 16),
            parent_hint=None if parent is None else parent.name,
            thin=self.subformat == "vmfsThin",
        ).text()


def read_settings(image: NewImage) -> Settings:
    """Return the checked request. Raises OptionError for what does not go together, TargetError for size and names."""
    options = OptionReader("vmdk", image.options)
    compressed = image.codec is not None
    subformat = options.text("subformat", STREAM if compressed else "monolithicSparse", SUBFORMATS)
    found = Settings(
        image=image,
        size=-(-image.size // SECTOR) * SECTOR,
        subformat=subformat,
        adapter_type=options.text("adapter_type", "lsilogic", ADAPTERS),
        hwversion=str(options.number("hwversion", 4, least=3, most=99)),
        toolsversion=str(options.number("toolsversion", 2147483647, least=0, most=2147483647)),
        zeroed_grain=options.flag("zeroed_grain", default=image.parent is not None),
        preallocation=options.text("preallocation", "off", PREALLOCATIONS),
    )
    options.done()
    _require_together(found)
    _require_size(found)
    _require_names(found)
    return found


def _require_together(found: Settings) -> None:
    image, kind = found.image, found.subformat
    if image.codec is not None and kind != STREAM:
        raise OptionError(f"vmdk {kind} cannot be compressed", hint="use -o subformat=streamOptimized")
    if image.codec not in {None, ZLIB, DEFLATE}:
        raise OptionError("vmdk is compressed by deflate alone", hint="say -c, or --compress deflate")
    if found.zeroed_grain and kind not in SPARSE and "zeroed_grain" in image.options:
        raise OptionError(f"vmdk {kind} has no zeroed grains", hint=f"they are of {' and '.join(SPARSE)}")
    if found.preallocation != "off" and kind not in FLAT:
        raise OptionError(f"vmdk {kind} has no preallocation", hint="use -o subformat=monolithicFlat")
    if image.parent is None:
        return
    if kind not in SPARSE:
        raise OptionError(f"vmdk {kind} cannot have a parent", hint="use -o subformat=monolithicSparse")
    if image.parent.format != "vmdk" or "cid" not in image.parent.identity:
        raise OptionError(
            f"the parent of a vmdk must be a vmdk with a CID, not {image.parent.format}",
            hint="write the overlay as qcow2, or convert the parent first",
        )


def _require_size(found: Settings) -> None:
    if found.size > MAX_SIZE:
        raise TargetError("is larger than a VMDK can be", file=found.image.name, expected=MAX_SIZE, found=found.size)
    if found.image.sector_size != SECTOR and found.image.sector_size % SECTOR:
        raise TargetError("vmdk has sectors of 512 bytes", file=found.image.name, found=found.image.sector_size)


def _require_names(found: Settings) -> None:
    parent = found.image.parent
    for name in (found.image.name, *([parent.name] if parent else [])):
        if any(mark in name for mark in '"\n\r\0'):
            raise TargetError(f"the name {name!r} cannot stand in a VMDK descriptor", file=found.image.name)
