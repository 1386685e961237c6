"""Checking a VMDK: its descriptor, each of its extents, the copies of its tables; patches from the redundant ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.check import LEAK, WARNING, CheckReport, Patch
from diskmorph.formats.errors import FormatError, SourceError
from diskmorph.formats.vmdk import hosted, schema
from diskmorph.formats.vmdk.check_grains import GrainCheck, check_stream
from diskmorph.formats.vmdk.check_tables import RedundantCheck
from diskmorph.formats.vmdk.extent import GrainTables
from diskmorph.formats.vmdk.hosted import HostedExtent, StreamExtent
from diskmorph.formats.vmdk.reader import Opening, find_descriptor, is_sparse, open_sparse
from diskmorph.formats.vmdk.schema import SECTOR

if TYPE_CHECKING:
    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.vmdk.descriptor import Descriptor
    from diskmorph.formats.vmdk.extent import Extent

# createType (in lower case) -> kinds of its extents
_KINDS = {
    "monolithicsparse": {"SPARSE"},
    "monolithicflat": {"FLAT"},
    "twogbmaxextentsparse": {"SPARSE"},
    "2gbmaxextentsparse": {"SPARSE"},
    "twogbmaxextentflat": {"FLAT"},
    "2gbmaxextentflat": {"FLAT"},
    "streamoptimized": {"SPARSE"},
    "vmfs": {"VMFS"},
    "vmfsthin": {"VMFS"},
    "vmfssparse": {"VMFSSPARSE"},
    "sesparse": {"SESPARSE"},
    "custom": {"FLAT", "SPARSE"},
}
_PIECE = 1 << 20
_ADAPTERS = {"ide", "buslogic", "lsilogic", "legacyesx", "pvscsi", "lsisas1068", "sata", "nvme"}


def check_image(source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
    """See FormatModule. Repair restores directories and tables of a single sparse file from their other copy."""
    report = CheckReport("vmdk")
    found = find_descriptor(source, context)
    if found is None:
        report.add("descriptor", None, "has no descriptor: checked as one extent, alone", WARNING)
        _check_extent(report, open_sparse(source, None, context), "", repair)
        return report
    _check_descriptor(report, found)
    opening = Opening(source, found, context, embedded=is_sparse(source))
    opening.refuse_devices()
    try:
        for line in found.extents:
            try:
                extent, number = opening.open(line)
            except (FormatError, SourceError) as error:
                if opening.is_own(line):
                    raise
                report.add("extent", error.offset, f"{line.name}: {error}")
                continue
            name = "" if number == 0 else f"{opening.files[number].name}: "
            before = report.corruptions
            _check_extent(report, extent, name, repair if number == 0 else None)
            if repair and number and report.corruptions > before:
                report.add(
                    "extent", None, f"{name}a file of its own: mend it by `check --repair {repair}` on it", WARNING
                )
    finally:
        for opened in opening.files[1:]:
            opened.close()
    return report


def _check_descriptor(report: CheckReport, found: Descriptor) -> None:
    values = found.values
    notes: list[str] = []
    if values.get("version", "1") not in {"1", "2", "3", "4"}:
        notes.append(f"version {values['version']} is unknown")
    if found.cid is None:
        notes.append("has no CID, so no child can be tied to it")
    if found.create_type is None:
        notes.append("has no createType")
    else:
        kinds = _KINDS.get(found.create_type.lower())
        other = sorted({line.kind for line in found.extents} - (kinds or set()) - {"ZERO"})
        if kinds is None:
            notes.append(f"createType {found.create_type!r} is unknown")
        elif other:
            notes.append(f"createType {found.create_type} has extents of kind {', '.join(other)}")
    content = values.get("ddb.longcontentid", "")
    if content and found.cid is not None and not content.lower().endswith(f"{found.cid:08x}"):
        notes.append(f"longContentID {content} does not end in the CID {found.cid:08x}")
    adapter = values.get("ddb.adaptertype", "")
    if adapter and adapter.lower() not in _ADAPTERS:
        notes.append(f"adapterType {adapter!r} is unknown")
    notes.extend(f"line {line.line} is an extent of no sectors" for line in found.extents if not line.sectors)
    notes.extend(f"says something unknown: {line!r}" for line in found.strange)
    for note in notes:
        report.add("descriptor", None, note, WARNING)
    if found.has_parent and not found.parent_hint:
        report.add("descriptor", None, "has a parentCID but no parentFileNameHint")
    if not found.extents:
        report.add("descriptor", None, "names no extent")


def _check_extent(report: CheckReport, extent: Extent, name: str, repair: str | None) -> None:
    if not isinstance(extent, GrainTables):
        return
    if not isinstance(extent, HostedExtent):
        for warning in extent.warnings:
            report.add("header", 0, name + warning, WARNING)
        GrainCheck(report, extent, name).run()
        return
    if extent.header.unclean:
        report.add("sparse header", schema.UNCLEAN_AT, f"{name}was not closed cleanly", WARNING)
        if repair == "all":
            report.patches.append(Patch(schema.UNCLEAN_AT, b"\0", "clear the mark of an unclean shutdown"))
    redundant = RedundantCheck(report, extent, name, repair=repair == "all")
    redundant.restore()
    if isinstance(extent, StreamExtent):
        _check_end(report, extent, name, check_stream(report, extent, name))
        return
    grains = GrainCheck(report, extent, name, redundant.metadata())
    grains.run(redundant.compare)
    redundant.conclude(grains)


def _check_end(report: CheckReport, extent: StreamExtent, name: str, used: int) -> None:
    """Look at what follows the last byte that belongs to the stream; `used` is the end of its grains and tables."""
    source, marker = extent.source, SECTOR
    if hosted.parse_header(source).gd_offset == schema.DIRECTORY_AT_END:
        used = hosted.footer_offset(source) + SECTOR
    end = used + marker
    if source.size < end:
        report.add("end-of-stream marker", used, f"{name}there is no end-of-stream marker", WARNING)
    elif source.size > end and _is_zero(source, end):
        text = f"{name}{source.size - end} bytes of zeroes follow the end of the stream"
        report.add("end-of-stream marker", end, text, WARNING)
    elif source.size > end:
        report.add("end-of-stream marker", end, f"{name}{source.size - end} bytes follow the end of the stream", LEAK)


def _is_zero(source: ByteSource, start: int) -> bool:
    """Whether all bytes from `start` on are zero."""
    for at, length, allocated in source.runs(start, source.size):
        for piece in range(at, at + length if allocated else at, _PIECE):
            if any(source.view(piece, min(_PIECE, at + length - piece))):
                return False
    return True
