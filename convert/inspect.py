"""What `info` tells: an image's headers, its chain, every signature found, partitions and file systems inside."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from diskmorph.convert.journal import BROKEN_OFF, is_unfinished
from diskmorph.formats import fsprobe, gpt
from diskmorph.formats.errors import DiskmorphError, PolicyError
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import OpenContext, identify, open_chain, open_layer, open_layers

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from diskmorph.formats.disk import Disk, ImageDisk, ParentRef
    from diskmorph.formats.fsprobe import FileSystem
    from diskmorph.formats.gpt import Partition, PartitionTable
    from diskmorph.formats.policy import Allowed
    from diskmorph.formats.probe import Format, Signature
    from diskmorph.formats.source import ByteSource


@dataclass(frozen=True, slots=True)
class Content:
    """What lies inside a disk: its partition table, the file system of each partition by number, and of the whole."""

    table: PartitionTable | None = None
    filesystems: dict[int, FileSystem] = field(default_factory=dict)
    whole: FileSystem | None = None
    warnings: tuple[str, ...] = ()
    os: dict[str, str] | None = None
    groups: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the keys `partition_table`, `partitions`, `volume_groups`, `filesystem...`, `os` of docs/json.md."""
        table = self.table
        return {
            "partition_table": table
            and {"scheme": table.scheme, "id": table.disk_id, "sector_size": table.sector_size},
            "partitions": [self._partition(partition) for partition in table.partitions] if table else [],
            "volume_groups": list(self.groups),
            **_filesystem(self.whole),
            "os": self.os,
        }

    def _partition(self, partition: Partition) -> dict[str, Any]:
        inside = self.filesystems.get(partition.number)
        return {
            "number": partition.number,
            "type": partition.type,
            "type_name": partition.type_name,
            "name": partition.name,
            "start": partition.start,
            "length": partition.length,
            "uuid": partition.uuid,
            "bootable": partition.bootable,
            **_filesystem(inside),
        }


def _filesystem(found: FileSystem | None) -> dict[str, Any]:
    return {
        "filesystem": found and found.type,
        "filesystem_label": found and found.label,
        "filesystem_uuid": found and found.uuid,
    }


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of one image. Sizes in bytes; `guessed`: no signature was found, so it counts as raw."""

    image: ImageDisk
    file: str
    format: str
    stored_size: int
    allocated_size: int
    signatures: tuple[Signature, ...]
    guessed: bool
    content: Content = field(default_factory=Content)
    chain: tuple[Inspection, ...] = ()
    warnings: tuple[str, ...] = ()
    """What its files' surroundings tell: a change of it that was broken off."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of docs/json.md."""
        info = self.image.info
        report = {
            "file": self.file,
            "format": self.format,
            "subformat": info.subformat,
            "virtual_size": self.image.size,
            "stored_size": self.stored_size,
            "allocated_size": self.allocated_size,
            "sector_size": self.image.sector_size,
            "allocation_unit": info.allocation_unit,
            "features": dict(info.features),
            "snapshots": [asdict(snapshot) for snapshot in info.snapshots],
            "bitmaps": list(info.bitmaps),
            "parent": _parent_dict(info.parent),
            "signatures": [asdict(signature) for signature in self.signatures],
            "guessed": self.guessed,
            **self.content.as_dict(),
            "warnings": [*info.warnings, *self.warnings, *self.content.warnings],
        }
        if self.chain:
            report["chain"] = [layer.as_dict() for layer in self.chain]
        return report


def _parent_dict(parent: ParentRef | None) -> dict[str, Any] | None:
    if parent is None:
        return None
    expects = {key: list(values) for key, values in parent.expects.items()}
    return {"names": list(parent.names), "format": parent.format, "expects": expects}


def inspect(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    parents: Allowed = None,
    limits: Limits | None = None,
    chain: bool = False,
    inside: bool = True,
    source: ByteSource | None = None,
) -> Inspection:
    """Tell what an image is, from its headers; `source`: its bytes, where they are open already, which stay open.

    Its parent need not be there or allowed, unless `chain` asks for every layer. `inside` looks for partitions and file
    systems too; what cannot be read there becomes a warning. Raises FormatError, UnsupportedError, PolicyError,
    SourceError, OptionError.
    """
    limits = limits or Limits()
    opener = Opener(Parents.of(parents), limits)
    context = OpenContext(opener, limits)
    given = source
    source = _reopened(path, opener, given)
    try:
        entry, found = identify(source, format)
        if chain:
            layers = open_layers(source, entry, context)
            below = tuple(_inspection(layer, layer.name, _signatures(layer), guessed=False) for layer in layers)
            for layer in layers:
                layer.close()
            source = _reopened(path, opener, given)
        else:
            below = ()
        image = open_layer(source, entry, context)
    except BaseException:
        source.close()
        raise
    with image:
        content = _content(source, entry, image, context) if inside else Content()
        guessed = format is None and not any(signature.outer for signature in found)
        return _inspection(image, str(path), found, guessed=guessed, content=content, chain=below)


def _reopened(path: str | os.PathLike[str], opener: Opener, given: ByteSource | None) -> ByteSource:
    return opener.user_source(path) if given is None else given.window(0, given.size)


def _signatures(layer: ImageDisk) -> Sequence[Signature]:
    from diskmorph.formats.probe import signatures  # noqa: PLC0415 - chains only

    return signatures(layer.files[0]) if layer.files else ()


def _inspection(
    image: ImageDisk,
    file: str,
    found: Sequence[Signature],
    *,
    guessed: bool,
    content: Content | None = None,
    chain: tuple[Inspection, ...] = (),
) -> Inspection:
    stored = [_stored(source) for source in image.files]
    return Inspection(
        image,
        file,
        image.info.format,
        sum(size for size, _ in stored),
        sum(room for _, room in stored),
        tuple(found),
        guessed,
        content or Content(),
        chain,
        tuple(BROKEN_OFF for source in image.files if source.path is not None and is_unfinished(source.path)),
    )


def _stored(source: ByteSource) -> tuple[int, int]:
    """Return a file's length and the room that it takes on its file system, in bytes."""
    path = source.path
    if path is None:
        stored = getattr(source, "stored_size", source.size)  # of what was decoded
        return stored, stored
    try:
        return source.size, path.stat().st_blocks * 512
    except OSError:
        return source.size, source.size


def _content(source: ByteSource, entry: Format, image: ImageDisk, context: OpenContext) -> Content:
    """Return what lies inside; a disk that cannot be read, whole or in part, is a warning."""
    if image.info.parent is None:
        return look_inside(image)
    try:
        disk = open_chain(source, entry, context)
    except PolicyError as error:
        return Content(warnings=(f"what lies inside is unknown without the parent: {error.hint or error.problem}",))
    except DiskmorphError as error:
        return Content(warnings=(f"what lies inside is unknown: {error}",))
    return look_inside(disk)


def look_inside(disk: Disk) -> Content:
    """Return a disk's partitions and file systems; what cannot be read becomes a warning."""
    warnings: list[str] = []
    table = None
    try:
        table = gpt.read_table(disk)
    except DiskmorphError as error:
        warnings.append(f"the partition table cannot be read: {_reason(error)}")
    if table is not None:
        warnings.extend(table.warnings)
    filesystems: dict[int, FileSystem] = {}
    for partition in table.partitions if table else ():
        found = _probe(disk, partition.start, partition.length, f"partition {partition.number}", warnings)
        if found is not None and not partition.type_name.startswith("extended"):
            filesystems[partition.number] = found
    whole = _probe(disk, 0, disk.size, "the whole disk", warnings)
    held = [*filesystems.values(), whole]
    groups: tuple[dict[str, Any], ...] = ()
    if any(found is not None and found.type == "lvm2" for found in held):
        from diskmorph.convert.volume_groups import describe  # noqa: PLC0415 - loaded where there are physical volumes

        groups = describe(disk, warnings)
    system = _system(disk, held, groups)
    return Content(table, filesystems, whole, tuple(warnings), system, groups)


def _system(disk: Disk, held: Sequence[FileSystem | None], groups: Sequence[dict[str, Any]]) -> dict[str, str] | None:
    """Return which system lies on the disk's root, None where none is found: a probe, so no fault counts."""
    from diskmorph.formats.volumes import readable  # noqa: PLC0415

    if not groups and not any(readable(found) for found in held):
        return None
    from diskmorph.formats.roots import open_root, os_of  # noqa: PLC0415 - loads a file system's reader

    try:
        return os_of(open_root(disk))
    except DiskmorphError:
        return None


def _probe(disk: Disk, start: int, length: int, what: str, warnings: list[str]) -> FileSystem | None:
    if start >= disk.size:
        return None
    try:
        return fsprobe.probe(disk, start, length)
    except DiskmorphError as error:
        warnings.append(f"{what} cannot be read: {_reason(error)}")
        return None


def _reason(error: DiskmorphError) -> str:
    """Return what an error says without the file, which stands before a warning anyway."""
    place = error.place()
    return f"{error.problem} ({place})" if place else error.problem
