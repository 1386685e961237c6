"""From a descriptor, or a bare extent, to one disk."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.disk import ImageDisk, ImageInfo, ParentRef
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, HOLE, ZERO
from diskmorph.formats.vmdk import descriptor as text
from diskmorph.formats.vmdk import directories, hosted, schema
from diskmorph.formats.vmdk.esx import CowdExtent, SeSparseExtent
from diskmorph.formats.vmdk.extent import Extent, FlatExtent, ZeroExtent
from diskmorph.formats.vmdk.schema import FLAG_COMPRESSED, FLAG_MARKERS, SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import Buffer, ByteSource
    from diskmorph.formats.vmdk.descriptor import Descriptor, ExtentLine
    from diskmorph.formats.vmdk.schema import SparseHeader

_DEVICES = {
    "fulldevice": "fullDevice",
    "partitioneddevice": "partitionedDevice",
    "vmfsraw": "vmfsRaw",
    "vmfsrdm": "vmfsRDM",
    "vmfsrdmp": "vmfsRDMP",
    "vmfsrawdevicemap": "vmfsRawDeviceMap",
    "vmfspassthroughrawdevicemap": "vmfsPassthroughRawDeviceMap",
}
_MOST_BYTES = (1 << 63) - 1
_FLAT = frozenset({"FLAT", "VMFS"})
_SPARSE = frozenset({"SPARSE", "VMFSSPARSE", "SESPARSE"})


class VmdkDisk(ImageDisk):
    """The extents of a VMDK, one behind the other. `files[0]` is the file that was opened."""

    format = "vmdk"

    def __init__(
        self, files: Sequence[ByteSource], parts: Sequence[tuple[Extent, int]], info: ImageInfo, cid: int | None
    ) -> None:
        self.files = tuple(files)
        self.name = files[0].name
        self.parts = tuple(parts)
        self.info = info
        self.identity = {} if cid is None else {"cid": f"{cid:08x}"}
        self._stops = list(accumulate(extent.size for extent, _ in parts))
        self.size = self._stops[-1] if self._stops else 0
        self._by_file = {number: extent for extent, number in parts if extent.kind in _SPARSE}

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        index = bisect_right(self._stops, start)
        while start < stop:
            extent, number = self.parts[index]
            base, end = self._stops[index] - extent.size, min(self._stops[index], stop)
            if end > start:
                for rows in extent.rows(start - base, end - base):
                    rows["start"] += np.uint64(base)
                    rows["file"][rows["kind"] == DATA] = number
                    yield rows
            start, index = max(start, end), index + 1

    def decode_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> bytes | bytearray:
        """See Disk: one compressed grain, its marker checked."""
        return self.encoded_unit(file, offset, stored, codec, least, held)[0]

    def encoded_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> tuple[bytes | bytearray, Buffer]:
        """See Disk."""
        del codec, least
        return self._by_file[file].decode(offset, stored, held)

    def unit_size(self) -> int:
        """See Disk."""
        return max((extent.grain or 0 for extent in self._by_file.values()), default=0)


def open_image(source: ByteSource, context: OpenContext) -> VmdkDisk:
    """See FormatModule: a descriptor file, a file with an embedded descriptor, or a bare sparse extent."""
    if context.snapshot is not None:
        raise UnsupportedError(f"vmdk has no internal snapshot {context.snapshot!r}", feature="snapshots")
    found = find_descriptor(source, context)
    if found is None:
        extent = open_sparse(source, None, context)
        return _disk((source,), [(extent, 0)], None, [_BARE])
    return Opening(source, found, context, embedded=is_sparse(source)).disk()


_BARE = "has no descriptor: it is read alone, as one extent; the rest of its disk, and its parent if any, are not"


def is_sparse(source: ByteSource) -> bool:
    """Whether the file begins with the header of a sparse extent, of whatever kind."""
    head = source.read_upto(0, 8)
    return head[:4] in {schema.HOSTED_MAGIC, schema.COWD_MAGIC} or head == schema.SESPARSE_MAGIC


def find_descriptor(source: ByteSource, context: OpenContext) -> Descriptor | None:
    """Return the descriptor that the file is or has embedded; None for a bare extent. Raises FormatError."""
    if not is_sparse(source):
        if source.size > context.limits.descriptor:
            raise FormatError(
                "is too large for a descriptor",
                file=source.name,
                format="vmdk",
                structure="descriptor",
                expected=f"at most {context.limits.descriptor} bytes",
                found=source.size,
            )
        raw = source.read(0, source.size)
        begin = raw.removeprefix(b"\xef\xbb\xbf").lstrip()[: len(text.MAGIC)]
        if begin.lower() != text.MAGIC.encode():
            raise FormatError(
                "is no VMDK: neither a descriptor nor a sparse extent",
                file=source.name,
                format="vmdk",
                structure="descriptor",
                offset=0,
                expected="# Disk DescriptorFile",
                found=raw[:16],
            )
        found = text.parse(raw, source.name, context.limits)
        if b"#DDB" not in raw and not any(key.startswith("ddb.") for key in found.values):
            raise FormatError(
                "the descriptor is truncated: it ends before the disk data base, and may lack extents",
                file=source.name,
                format="vmdk",
                structure="descriptor",
                field="#DDB",
                offset=source.size,
                hint="append a line `#DDB` if it is complete",
            )
        return found
    if source.read(0, 4) != schema.HOSTED_MAGIC:
        return None
    raw = embedded_descriptor(source, hosted.parse_header(source), context)
    return text.parse(raw, source.name, context.limits) if raw.strip(b"\0 \r\n") else None


def embedded_descriptor(source: ByteSource, header: SparseHeader, context: OpenContext) -> bytes:
    """Return the bytes that the header gives the embedded descriptor; none where it has none."""
    size = header.descriptor_size * SECTOR
    if not header.descriptor_offset or not size:
        return b""
    if size > context.limits.descriptor:
        raise FormatError(
            "the embedded descriptor is too large",
            file=source.name,
            format="vmdk",
            structure="sparse header",
            field="descriptor_size",
            expected=f"at most {context.limits.descriptor} bytes",
            found=size,
        )
    return source.read(header.descriptor_offset * SECTOR, size)


def open_sparse(source: ByteSource, sectors: int | None, context: OpenContext, empty: int = HOLE) -> Extent:
    """Open a sparse extent of any kind. `sectors` is what the descriptor says of its size.

    A header may round the size up to a grain; any other difference is a FormatError.
    """
    head = source.read_upto(0, 8)
    size = None if sectors is None else sectors * SECTOR
    if head[:4] == schema.HOSTED_MAGIC:
        header = hosted.read_header(source, context.limits)
        require_capacity(source, header.capacity, header.grain_size, sectors)
        found = directories.directories(source, header)
        kind = hosted.StreamExtent if header.flags & FLAG_COMPRESSED else hosted.HostedExtent
        _require_end(source, header, found)
        return kind(source, header, found, header.capacity * SECTOR if size is None else size, empty)
    if head[:4] == schema.COWD_MAGIC:
        cowd = CowdExtent(source, context.limits, size, empty)
        require_capacity(source, cowd.header.capacity, cowd.header.grain_size, sectors)
        return cowd
    if head == schema.SESPARSE_MAGIC:
        wide = SeSparseExtent(source, context.limits, size, empty)
        require_capacity(source, wide.header.capacity, wide.header.grain_size, sectors)
        return wide
    raise FormatError(
        "is no sparse extent",
        file=source.name,
        format="vmdk",
        structure="sparse header",
        field="magic",
        offset=0,
        expected="KDMV, COWD or 0xcafebabe",
        found=head,
    )


def require_capacity(source: ByteSource, capacity: int, grain: int, sectors: int | None) -> None:
    """Raise FormatError if a header and the descriptor contradict each other about an extent's size."""
    if sectors is None or sectors <= capacity < sectors + grain:
        return
    raise FormatError(
        "the extent has another size than its descriptor says",
        file=source.name,
        format="vmdk",
        structure="sparse header",
        field="capacity",
        offset=12,
        expected=f"{sectors} sectors",
        found=capacity,
    )


def _require_end(source: ByteSource, header: SparseHeader, found: directories.Directories) -> None:
    """Raise FormatError if a stream whose directory follows its grains lacks the end-of-stream marker behind it."""
    if not header.flags & FLAG_MARKERS or header.gd_offset <= header.overhead or not len(found.tables):
        return
    end = header.gd_offset * SECTOR + -(-len(found.tables) * schema.ENTRY.itemsize // SECTOR) * SECTOR
    if end + SECTOR > source.size:
        raise FormatError(
            "the image is truncated: its end-of-stream marker is missing",
            file=source.name,
            format="vmdk",
            structure="end-of-stream marker",
            offset=end,
            expected=f"{SECTOR} bytes",
            found=f"the end at {source.size}",
        )


@dataclass
class Opening:
    """Opens the extents that a descriptor names; closes them again if one of them fails."""

    source: ByteSource
    found: Descriptor
    context: OpenContext
    embedded: bool
    files: list[ByteSource] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    sparse: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.files = [self.source]

    def disk(self) -> VmdkDisk:
        """Return the disk of all extents."""
        self.refuse_devices()
        if not self.found.extents:
            raise self._fault("names no extent", "extents")
        try:
            parts = [self.open(line) for line in self.found.extents]
            return _disk(self.files, parts, self.found, [])
        except BaseException:
            for opened in self.files[1:]:
                opened.close()
            raise

    def _fault(self, problem: str, name: str, found: object = None) -> FormatError:
        return FormatError(
            problem, file=self.source.name, format="vmdk", structure="descriptor", field=name, offset=0, found=found
        )

    def refuse_devices(self) -> None:
        """Raise UnsupportedError for disks that stand for devices, and for extents whose content is not known."""
        device = _DEVICES.get((self.found.create_type or "").lower())
        line = next((line for line in self.found.extents if line.kind not in _FLAT | _SPARSE | {"ZERO"}), None)
        word = device or (line.kind if line else None)
        if word is not None:
            raise UnsupportedError(
                f"is a {word}: it stands for a device, not a file"
                if device or word.startswith("VMFSR")
                else f"extents of kind {word} are not supported",
                feature=word,
                file=self.source.name,
                format="vmdk",
                structure="descriptor",
                field=f"line {line.line}" if line else "createType",
                hint="read the device itself as raw" if device else None,
            )
        closed = next((line for line in self.found.extents if line.access == "NOACCESS"), None)
        if closed is not None:
            raise UnsupportedError(
                f"extent {closed.name!r} may not be accessed: its content is not known",
                feature="NOACCESS extents",
                file=self.source.name,
                format="vmdk",
                structure="descriptor",
                field=f"line {closed.line}",
            )

    def open(self, line: ExtentLine) -> tuple[Extent, int]:
        """Return the extent of a line and the number of its file. Raises FormatError, PolicyError, SourceError."""
        size = line.sectors * SECTOR
        child = self.found.has_parent
        if line.kind == "ZERO":
            return ZeroExtent(size), 0
        number = self._file(line)
        source = self.files[number]
        if line.kind in _FLAT:
            if number == 0:
                raise self._fault("names itself as a flat extent", f"line {line.line}", line.name)
            return FlatExtent(source, size, line.offset * SECTOR, ZERO if child else HOLE), number
        if number in self.sparse:
            raise self._fault("names a sparse extent twice", f"line {line.line}", line.name)
        self.sparse.add(number)
        return open_sparse(source, line.sectors, self.context, ABSENT if child else HOLE), number

    def _file(self, line: ExtentLine) -> int:
        """Return the number of the extent's file, opened if it was not yet; an embedded descriptor's own is 0."""
        name = line.name or ""
        if self.is_own(line):
            return 0
        if name not in self.numbers:
            opened = self.context.opener.sibling(name, self.source)
            self.numbers[name] = len(self.files)
            self.files.append(opened)
        return self.numbers[name]

    def is_own(self, line: ExtentLine) -> bool:
        """Whether the line means the file that its descriptor is embedded in, which may have been renamed since."""
        if not self.embedded or line.kind != "SPARSE":
            return False
        if len(self.found.extents) == 1:
            return True
        return self.source.path is not None and self.source.path.name == line.name


def _disk(
    files: Sequence[ByteSource], parts: Sequence[tuple[Extent, int]], found: Descriptor | None, notes: list[str]
) -> VmdkDisk:
    total = sum(extent.size for extent, _ in parts)
    if total > _MOST_BYTES:
        raise FormatError(
            "is too large: its extents' sizes pass what can be addressed",
            file=files[0].name,
            format="vmdk",
            structure="descriptor",
            field="extents",
            expected=f"at most {_MOST_BYTES} bytes",
            found=total,
        )
    warnings = list(notes)
    for extent, number in parts:
        prefix = f"{files[number].name}: " if number else ""
        warnings.extend(prefix + warning for warning in extent.warnings)
    info = ImageInfo(
        format="vmdk",
        subformat=found.create_type if found else None,
        virtual_size=total,
        sector_size=SECTOR,
        allocation_unit=next((extent.grain for extent, _ in parts if extent.grain), None),
        features=_features(files, parts, found),
        parent=_parent(found, files[0]),
        warnings=tuple(warnings),
    )
    return VmdkDisk(files, parts, info, found.cid if found else None)


def _parent(found: Descriptor | None, source: ByteSource) -> ParentRef | None:
    if found is None or found.parent_cid is None:
        if found is not None and found.parent_hint is not None:
            raise FormatError(
                "names a parent, but not the parent's CID",
                file=source.name,
                format="vmdk",
                structure="descriptor",
                field="parentCID",
            )
        return None
    if not found.has_parent:
        return None
    names = () if found.parent_hint is None else (found.parent_hint,)
    return ParentRef(names, "vmdk", {"cid": (f"{found.parent_cid:08x}",)})


def _features(
    files: Sequence[ByteSource], parts: Sequence[tuple[Extent, int]], found: Descriptor | None
) -> dict[str, Any]:
    features: dict[str, Any] = {}
    if found is not None:
        if found.cid is not None:
            features["cid"] = f"{found.cid:08x}"
        if found.parent_cid is not None:
            features["parent_cid"] = f"{found.parent_cid:08x}"
        for key, name in (("ddb.adaptertype", "adapter_type"), ("ddb.virtualhwversion", "hwversion")):
            if key in found.values:
                features[name] = found.values[key]
    headers = [extent.header for extent, _ in parts if isinstance(extent, hosted.HostedExtent)]
    if headers:
        features["header_version"] = max(header.version for header in headers)
        features["compressed"] = any(header.flags & FLAG_COMPRESSED for header in headers)
        features["zeroed_grain"] = any(header.flags & schema.FLAG_ZEROED_GRAIN for header in headers)
    features["extents"] = [
        {"kind": extent.kind, "size": extent.size, "file": files[number].name if extent.source else None}
        for extent, number in parts[:100]
    ]
    return features


__all__ = ["VmdkDisk", "open_image"]
