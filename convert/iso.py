"""Trees to ISOs, and ISOs to disks."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diskmorph.convert.digest import tree_digest
from diskmorph.convert.job import convert
from diskmorph.convert.options import ConvertOptions
from diskmorph.convert.routes import disk_converter
from diskmorph.formats.allocator import Identity, OptionReader
from diskmorph.formats.errors import FormatError, OptionError, TargetError
from diskmorph.formats.gpt import Hybrid, Partition, build_gpt, first_usable, last_usable
from diskmorph.formats.iso.reader import describe
from diskmorph.formats.iso.writer import IsoLayout, IsoOptions
from diskmorph.formats.numbers import whole_number
from diskmorph.formats.policy import Opener
from diskmorph.formats.probe import signatures
from diskmorph.formats.registry import open_disk
from diskmorph.formats.source import FileSource
from diskmorph.formats.trees import open_tree
from diskmorph.formats.views import Regions, Slice

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.convert.options import ConvertReport, Progress
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.tree import Tree

_MIB = 1 << 20
_ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_DATA = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
_MBR_CODE = 432
_GPT_TAIL = 33 * 512
# What cloud-init requires of its seeds: NoCloud by the label cidata, ConfigDrive by config-2
_SEEDS = {"cidata": ("meta-data", "user-data"), "config-2": ("openstack/latest/meta_data.json",)}


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The `-o` words of an ISO."""

    joliet: bool
    boot: str | None
    efi: str | None
    hybrid: str | None
    load_sectors: int
    uid: int | None
    gid: int | None
    publisher: str


def _wanted(options: ConvertOptions) -> _Wanted:
    reader = OptionReader("iso", options.format_options)
    found = _Wanted(
        joliet=reader.flag("joliet", default=True),
        boot=reader.text("boot", "") or None,
        efi=reader.text("efi", "") or None,
        hybrid=reader.text("hybrid", "") or None,
        load_sectors=reader.number("load_sectors", 4, least=1, most=0xFFFF),
        uid=_owner(reader, "uid"),
        gid=_owner(reader, "gid"),
        publisher=reader.text("publisher", ""),
    )
    reader.done()
    if options.compress is not None or options.base is not None:
        raise OptionError("an ISO is neither compressed nor an overlay")
    return found


def _owner(reader: OptionReader, name: str) -> int | None:
    text = reader.text(name, "")
    found = whole_number(text, 0xFFFF_FFFF)
    if text and found is None:
        raise OptionError(f"iso option {name}={text} is not a number")
    return found


def tree_to_iso(
    source: str | os.PathLike[str] | Disk,
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Write a directory, archive or container image as an ISO; file data goes straight from its source.

    `options.label` is the volume's label; `-o` words: joliet, boot, efi, hybrid, load_sectors, uid, gid, publisher.
    Labels that cloud-init knows (cidata, config-2) must come with their files. Raises OptionError, TargetError, and
    what reading the tree raises.
    """
    options = options or ConvertOptions()
    if not isinstance(source, str | os.PathLike):
        raise OptionError("an ISO is made from a directory, an archive or a container, not from a disk")
    wanted = _wanted(options)
    with _tree(source, options) as tree:
        label = options.label or "CDROM"
        _require_seed(tree, label)
        _own(tree, wanted)
        image = _image(tree, label, wanted, options, str(source))
        image.name = os.fspath(source)
        plain = replace(options, target_format="raw", format_options={}, label=None)
        report = convert(image, target, options=plain, on_progress=on_progress)
    return replace(report, source=os.fspath(source), format="iso", lost=(*report.lost, *tree.lost))


def _tree(source: str | os.PathLike[str], options: ConvertOptions) -> Tree:
    try:
        return open_tree(source, limits=options.limits)
    except FormatError as error:
        error.hint = error.hint or "an ISO takes a tree: a directory, an archive, a container, a disk's file system"
        raise


def _require_seed(tree: Tree, label: str) -> None:
    for name in _SEEDS.get(label.lower(), ()):
        node = tree.find(name)
        if node is None or node.is_dir:
            raise TargetError(f"a seed labelled {label} needs the file {name}, which is not in {tree.name}")


def _own(tree: Tree, wanted: _Wanted) -> None:
    if wanted.uid is None and wanted.gid is None:
        return
    for _, node in tree.walk():
        node.uid = node.uid if wanted.uid is None else wanted.uid
        node.gid = node.gid if wanted.gid is None else wanted.gid


def _image(tree: Tree, label: str, wanted: _Wanted, options: ConvertOptions, name: str) -> Disk:
    pinned = options.reproducible or "SOURCE_DATE_EPOCH" in os.environ
    identity = Identity(name.encode() if pinned else None)
    iso = IsoOptions(
        label=label,
        joliet=wanted.joliet,
        boot=wanted.boot,
        efi=wanted.efi,
        load_sectors=wanted.load_sectors,
        align_efi=_MIB if wanted.hybrid else 2048,
        time=identity.time(),
        room=_GPT_TAIL + 2048 if wanted.hybrid else 0,
        publisher=wanted.publisher,
    )
    layout = IsoLayout(tree, iso)
    if wanted.hybrid is None:
        return layout.image()
    head, tail = _hybrid_tables(layout, wanted.hybrid, pinned=pinned)
    return layout.image(head, tail)


def _hybrid_tables(layout: IsoLayout, code_file: str, *, pinned: bool) -> tuple[bytes, bytes]:
    """Return the system area and the end of an ISO that is a disk as well: MBR code, GPT with the EFI image as ESP."""
    with FileSource(code_file) as source:
        code = source.read_upto(0, _MBR_CODE + 1)
    if len(code) > _MBR_CODE:
        raise OptionError(f"the MBR code in {code_file} is longer than {_MBR_CODE} bytes")
    seed = tree_digest(layout.image()) if pinned else None
    identity = Identity(seed)
    start, length = layout.efi or (64 * 512, layout.size - _GPT_TAIL - 64 * 512)
    kind, name = (_ESP, "EFI") if layout.efi else (_DATA, "ISO")
    length = -(-length // 512) * 512
    part = Partition(1, kind, name, start, length, str(identity.uuid("partition")))
    mbr = Hybrid(1, 0xEF if layout.efi else 0x17, active=True)
    return build_gpt(layout.size, [part], disk_guid=identity.uuid("disk"), mbr_code=code, hybrid=[mbr])


def iso_to_disk(
    source: str | os.PathLike[str] | Disk,
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Write an ISO as a disk. A hybrid one passes as it is; around another a GPT is put, by mapping alone.

    The GPT disk's first partition holds the ISO; the second, an ESP, is its El Torito EFI image, where it has one.
    """
    options = options or ConvertOptions()
    opener = Opener(options.parents, options.limits)
    write = disk_converter(target, options)
    if not isinstance(source, str | os.PathLike):
        return write(source, target, options=options, on_progress=on_progress)
    with opener.user_file(source) as file:
        inside = {signature.format for signature in signatures(file)}
    if inside & {"mbr", "gpt"}:
        return write(source, target, options=options, on_progress=on_progress)
    with open_disk(source, format="iso", parents=options.parents, limits=options.limits) as disk:
        wrapped = _wrapped(disk, options)
        wrapped.name = os.fspath(source)
        report = write(wrapped, target, options=replace(options, source_format=None), on_progress=on_progress)
    note = "the ISO is no hybrid: it becomes the first partition of a GPT disk; -f raw copies its bytes as they are"
    return replace(report, source=os.fspath(source), notes=(note, *report.notes))


def _wrapped(iso: Disk, options: ConvertOptions) -> Disk:
    identity = Identity(tree_digest(iso) if options.reproducible else None)
    pieces: list[tuple[Partition, Disk]] = []
    at = _MIB
    for number, (kind, name, piece) in enumerate(_contents(iso), 1):
        length = -(-piece.size // 512) * 512
        pieces.append((Partition(number, kind, name, at, length, str(identity.uuid(name))), piece))
        at = -(-(at + length) // _MIB) * _MIB
    size = at + _MIB
    assert first_usable() <= _MIB  # noqa: S101 - the first partition's place
    assert last_usable(size) >= at  # noqa: S101
    head, tail = build_gpt(size, [part for part, _ in pieces], disk_guid=identity.uuid("disk"))
    disk = Regions()
    disk.add_bytes(head)
    for part, piece in pieces:
        disk.pad_to(part.start)
        disk.add_disk(piece)
    disk.pad_to(size - len(tail))
    disk.add_bytes(tail)
    return disk


def _contents(iso: Disk) -> list[tuple[str, str, Disk]]:
    found: list[tuple[str, str, Disk]] = [(_DATA, "iso", iso)]
    volume, _ = describe(iso.files[0])
    image = next((boot for boot in volume.boot if boot.platform == "EFI"), None)
    if image is None:
        return found
    length = _fat_size(iso.files[0], image.offset) or image.load_sectors * 512
    length = min(length, iso.size - image.offset)
    return [*found, (_ESP, "esp", Slice(iso, image.offset, length))]


def _fat_size(source: ByteSource, offset: int) -> int:
    """Return the bytes of the FAT file system at `offset`, as its boot sector tells; 0 if there is none."""
    from diskmorph.formats.iso.schema import BootSector  # noqa: PLC0415

    raw = source.read_upto(offset, 512)
    if len(raw) < 512 or raw[510:] != b"\x55\xaa":
        return 0
    sector = BootSector.parse(raw)
    return int((sector.sectors_16 or sector.sectors_32) * sector.sector_size)


__all__ = ["iso_to_disk", "tree_to_iso"]
