"""A tree as a new ISO: ISO 9660 level 3 with Rock Ridge, Joliet, El Torito. Deterministic: same tree, same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.iso.layout import Content, Hierarchy, collect, sectors
from diskmorph.formats.iso.rockridge import record_time, volume_time
from diskmorph.formats.iso.schema import (
    DIRECTORY,
    FIRST_DESCRIPTOR,
    PLATFORM_BIOS,
    PLATFORM_EFI,
    PRIMARY,
    SECTOR,
    SUPPLEMENTARY,
    BootEntry,
    BootRecord,
    DirectoryRecord,
    PathRecordL,
    PathRecordM,
    SectionHeader,
    Terminator,
    ValidationEntry,
    VolumeDescriptor,
)
from diskmorph.formats.views import Regions

if TYPE_CHECKING:
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.tree import Tree

_MOST_SECTORS = 0xFFFFFFFF
_LEAST_SECTORS = 24  # libarchive knows no ISO that ends before; bsdtar then says that it is empty


@dataclass(frozen=True, slots=True)
class IsoOptions:
    """How an ISO is made.

    `label`: at most 32 bytes; `joliet`: add names for Windows; `boot`, `efi`: paths in the tree of the El Torito images
    for BIOS and UEFI, not emulated; `load_sectors`: how much of the BIOS image (in 512 bytes) the firmware loads;
    `align_efi`: bytes; `time`: the volume's, since 1970; `room`: bytes free at the end.
    """

    label: str = "CDROM"
    joliet: bool = True
    boot: str | None = None
    efi: str | None = None
    load_sectors: int = 4
    align_efi: int = SECTOR
    time: float = 0.0
    room: int = 0
    publisher: str = ""
    application: str = "DISKMORPH"


class IsoLayout:
    """A new ISO, laid out. `size` in bytes; `efi`: (offset, length) of the EFI image, if there is one."""

    def __init__(self, tree: Tree, options: IsoOptions) -> None:
        if len(options.label.encode("utf-8")) > 32:
            raise OptionError(f"the label {options.label!r} is longer than 32 bytes")
        self._options = options
        self._all = collect(tree)
        self._boot = self._content_at(tree, options.boot)
        self._efi = self._content_at(tree, options.efi)
        self._plain = Hierarchy(self._all, joliet=False)
        self._joliet = Hierarchy(self._all, joliet=True) if options.joliet else None
        self._place()
        self.efi = (self._efi.sector * SECTOR, self._efi.size) if self._efi else None

    def _content_at(self, tree: Tree, path: str | None) -> Content | None:
        if path is None:
            return None
        node = tree.find(path)
        content = next((c for c in self._all.contents if c.node is node), None)
        if content is not None:
            return content
        if node is None or node.is_dir or not node.size:
            raise OptionError(f"the boot image {path} is not a file with content in the tree")
        return next(c for c in self._all.contents if c.size == node.size and c.node.read() == node.read())

    @property
    def _bootable(self) -> bool:
        return self._boot is not None or self._efi is not None

    def _place(self) -> None:
        at = FIRST_DESCRIPTOR + 2 + (1 if self._bootable else 0) + (1 if self._joliet else 0)
        self._tables: list[tuple[int, bytes]] = []
        self._table_at: dict[bool, tuple[int, int, int]] = {}
        for hierarchy in self._hierarchies():
            size = sum(8 + len(name) + len(name) % 2 for name in hierarchy.identifiers.values())
            self._table_at[hierarchy is self._joliet] = (at, at + sectors(size), size)
            at += 2 * sectors(size)
        for hierarchy in self._hierarchies():
            at = hierarchy.assign(at)
        self._catalog = at
        at += 1 if self._bootable else 0
        self._data = at
        for content in self._all.contents:
            if content is self._efi:
                step = max(self._options.align_efi // SECTOR, 1)
                at += -at % step
            content.sector = at
            at += sectors(content.size)
        at = max(at, self._data + 1, _LEAST_SECTORS)  # empty files point to a sector that exists
        self._end = at
        self.size = (at + sectors(self._options.room)) * SECTOR
        if at + sectors(self._options.room) > _MOST_SECTORS:
            raise TargetError("the files are too large for one ISO 9660 volume")

    def _hierarchies(self) -> list[Hierarchy]:
        return [self._plain] if self._joliet is None else [self._plain, self._joliet]

    def image(self, system_area: bytes = b"", tail: bytes = b"") -> Disk:
        """Return the ISO as a disk; `system_area` fills its first 32 KiB, `tail` its last bytes."""
        if len(system_area) > FIRST_DESCRIPTOR * SECTOR or len(tail) > self._options.room:
            raise TargetError("there is no room for the partition table")
        disk = Regions(sector_size=512)
        disk.name = "iso"
        disk.add_bytes(system_area.ljust(FIRST_DESCRIPTOR * SECTOR, b"\0"))
        disk.add_bytes(b"".join(self._descriptors()))
        for hierarchy in self._hierarchies():
            for table in self._path_tables(hierarchy):
                disk.add_bytes(table + bytes(-len(table) % SECTOR))
        for hierarchy in self._hierarchies():
            disk.add_bytes(b"".join(hierarchy.build(number, self._data) for number in hierarchy.order))
        if self._bootable:
            disk.add_bytes(self._boot_catalog())
        for content in self._all.contents:
            self._add_content(disk, content)
        disk.pad_to(self.size - len(tail))
        disk.add_bytes(tail)
        return disk

    def _add_content(self, disk: Regions, content: Content) -> None:
        base = content.sector * SECTOR
        for piece in content.node.pieces:
            disk.pad_to(base + piece.start)
            disk.add_range(piece.source, piece.offset, piece.length)
        disk.pad_to(base + content.size)

    def _descriptors(self) -> list[bytes]:
        found = [self._descriptor(self._plain)]
        if self._bootable:
            found.append(BootRecord.build({"catalog": self._catalog}))
        if self._joliet is not None:
            found.append(self._descriptor(self._joliet))
        return [*found, Terminator.build({})]

    def _descriptor(self, hierarchy: Hierarchy) -> bytes:
        joliet = hierarchy is self._joliet
        options = self._options
        little, big, size = self._table_at[joliet]
        now, unset = volume_time(options.time), volume_time(None)
        fields: dict[str, Any] = {
            "type": SUPPLEMENTARY if joliet else PRIMARY,
            "version": 1,
            "flags": 0,
            "system_id": _padded("LINUX", 32, joliet=joliet),
            "volume_id": _padded(options.label, 32, joliet=joliet),
            "blocks": self.size // SECTOR,
            "escapes": (b"%/E" if joliet else b"").ljust(32, b"\0"),
            "set_size": 1,
            "sequence": 1,
            "block_size": SECTOR,
            "path_table_size": size,
            "path_table_l": little,
            "path_table_l_copy": 0,
            "path_table_m": big,
            "path_table_m_copy": 0,
            "root": self._root_record(hierarchy),
            "volume_set_id": _padded("", 128, joliet=joliet),
            "publisher_id": _padded(options.publisher, 128, joliet=joliet),
            "preparer_id": _padded("", 128, joliet=joliet),
            "application_id": _padded(options.application, 128, joliet=joliet),
            "copyright_file": _padded("", 37, joliet=joliet),
            "abstract_file": _padded("", 37, joliet=joliet),
            "bibliographic_file": _padded("", 37, joliet=joliet),
            "created": now,
            "modified": now,
            "expires": unset,
            "effective": unset,
            "structure_version": 1,
            "application_use": bytes(512),
        }
        return bytes(VolumeDescriptor.build(fields))

    def _root_record(self, hierarchy: Hierarchy) -> bytes:
        root = self._all.folders[0].node
        stamp = record_time(root.mtime // 1_000_000_000)
        head = DirectoryRecord.build(
            {
                "length": 34,
                "attribute_length": 0,
                "extent": hierarchy.sectors[0],
                "size": hierarchy.records[0].size,
                "time": dict(zip(("year", "month", "day", "hour", "minute", "second", "zone"), stamp, strict=True)),
                "flags": DIRECTORY,
                "unit_size": 0,
                "gap_size": 0,
                "volume": 1,
                "name_length": 1,
                "name": b"\0",
                "pad": b"",
            }
        )
        return bytes(head)

    def _path_tables(self, hierarchy: Hierarchy) -> tuple[bytes, bytes]:
        """Return the path tables, least and most significant byte first (ECMA-119 9.4)."""
        position = {number: index + 1 for index, number in enumerate(hierarchy.order)}
        if len(position) > 0xFFFF:
            raise TargetError(f"{len(position)} directories are more than an ISO 9660 path table can number (65535)")
        rows = [
            {
                "name_length": len(hierarchy.identifiers[number]),
                "attribute_length": 0,
                "extent": hierarchy.sectors[number],
                "parent": position[self._all.folders[number].parent],
                "name": hierarchy.identifiers[number],
                "pad": bytes(len(hierarchy.identifiers[number]) % 2),
            }
            for number in hierarchy.order
        ]
        return b"".join(map(PathRecordL.build, rows)), b"".join(map(PathRecordM.build, rows))

    def _boot_catalog(self) -> bytes:
        """Return the boot catalogue (El Torito 2): BIOS first, EFI in a section of its own."""
        first = PLATFORM_BIOS if self._boot else PLATFORM_EFI
        fields = {"platform": first, "developer": bytes(24), "checksum": 0}
        words = ValidationEntry.build(fields)
        total = sum(int.from_bytes(words[at : at + 2], "little") for at in range(0, 32, 2))
        out = ValidationEntry.build({**fields, "checksum": -total & 0xFFFF})
        if self._boot:
            out += _boot_entry(self._boot, self._options.load_sectors)
        if self._boot and self._efi:
            out += SectionHeader.build({"indicator": 0x91, "platform": PLATFORM_EFI, "entries": 1, "id": bytes(28)})
        if self._efi:
            out += _boot_entry(self._efi, min(-(-self._efi.size // 512), 0xFFFF))
        return bytes(out).ljust(SECTOR, b"\0")


def _boot_entry(content: Content, load: int) -> bytes:
    return bytes(
        BootEntry.build(
            {
                "indicator": 0x88,
                "media": 0,
                "segment": 0,
                "system_type": 0,
                "sectors": load,
                "extent": content.sector,
                "selection": bytes(20),
            }
        )
    )


def _padded(text: str, length: int, *, joliet: bool) -> bytes:
    if joliet:
        raw = text.encode("utf-16-be")[: length // 2 * 2]
        return (raw + b"\0 " * (length // 2))[: length // 2 * 2].ljust(length, b"\0")
    return text.encode("ascii", "replace").replace(b"?", b"_").ljust(length)
