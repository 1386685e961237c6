"""What the rules of `lint` look at: a package read leniently, its faults noted instead of raised."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.ovf.container import ArchiveContainer, Container, FolderContainer
from diskmorph.formats.ovf.manifest import Digest, digest_of, parse_manifest
from diskmorph.formats.ovf.reader import read_envelope
from diskmorph.formats.registry import identify
from diskmorph.formats.vmdk import schema
from diskmorph.formats.xmltree import parse_xml

if TYPE_CHECKING:
    import os

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.ovf.archive import TarMember
    from diskmorph.formats.ovf.model import Envelope, FileRef
    from diskmorph.formats.policy import Opener
    from diskmorph.formats.source import ByteSource
    from diskmorph.formats.xmltree import Node

_PAIR = re.compile(r'^\s*([\w.]+)\s*=\s*"?([^"\n]*)"?\s*$', re.MULTILINE)
_STEP = 1 << 20
_SECTOR = schema.SECTOR


@dataclass(frozen=True, slots=True)
class VmdkFacts:
    """A VMDK's sparse header and descriptor.

    `trailing` bytes follow its end-of-stream sector: negative where that is missing, None where the file is cut off.
    """

    version: int
    capacity: int
    compressed: bool
    settings: dict[str, str]
    trailing: int | None


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A referenced file: what it is called, the bytes that it has, its format, its VMDK header if it has one."""

    ref: FileRef
    size: int | None
    format: str | None = None
    vmdk: VmdkFacts | None = None
    problem: str | None = None


@dataclass(slots=True)
class Facts:
    """Everything that is known of a package."""

    path: str
    format: str
    members: list[TarMember] = field(default_factory=list)
    descriptor: str = ""
    root: Node | None = None
    envelope: Envelope | None = None
    manifest: str | None = None
    certificate: str | None = None
    lines: list[Digest] = field(default_factory=list)
    false_digests: list[Digest] = field(default_factory=list)
    missing_digests: list[Digest] = field(default_factory=list)
    files: list[FileFacts] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Parts that could not be read at all: (rule, what is wrong)."""

    @property
    def archive(self) -> bool:
        """Whether it is an OVA."""
        return self.format == "ova"


def gather(path: str | os.PathLike[str], opener: Opener, limits: Limits) -> Facts:
    """Read a package as far as it can be read. Raises SourceError where there is no file, UnsupportedError."""
    with opener.user_file(path) as source:
        return _Gatherer(source, opener, limits).facts()


class _Gatherer:
    def __init__(self, source: ByteSource, opener: Opener, limits: Limits) -> None:
        self._source, self._opener, self._limits = source, opener, limits
        self._facts = Facts(source.name, "ova")

    def facts(self) -> Facts:
        """Return everything, reading on after each part that fails."""
        facts = self._facts
        facts.format = self._kind()
        try:
            container: Container = (
                ArchiveContainer(self._source, self._limits)
                if facts.archive
                else FolderContainer(self._source, self._opener, self._limits)
            )
        except DiskmorphError as error:
            facts.unreadable.append(("archive", error.problem))
            return facts
        if isinstance(container, ArchiveContainer):
            facts.members = list(container.members.values())
        facts.descriptor = container.descriptor
        self._read_manifest(container)
        self._read_descriptor(container)
        if facts.envelope is not None:
            facts.files = [self._file(container, ref) for ref in facts.envelope.files.values()]
        return facts

    def _kind(self) -> str:
        """Return "ova" or "ovf"; what is neither is judged as what its name says it is."""
        try:
            found = identify(self._source)[0].name
        except DiskmorphError:
            found = self._source.name.rpartition(".")[2].lower()
        if found in {"ova", "ovf"}:
            return found
        if self._source.name.lower().endswith((".ova", ".ovf")):
            return self._source.name[-3:].lower()
        raise UnsupportedError(
            "is no OVF package", feature="lint", file=self._source.name, hint="lint judges .ova and .ovf"
        )

    def _read_manifest(self, container: Container) -> None:
        facts = self._facts
        facts.manifest = container.manifest()
        certificate = f"{container.base}.cert"
        facts.certificate = certificate if container.has(certificate) else None
        if facts.manifest is None:
            return
        try:
            facts.lines = parse_manifest(container.read(facts.manifest), file=self._source.name)
        except DiskmorphError as error:
            facts.unreadable.append(("manifest-form", str(error.problem)))
            return
        wanted: dict[str, list[Digest]] = defaultdict(list)
        for line in facts.lines:
            wanted[line.name].append(line)
        for name, digests in wanted.items():
            self._judge_digests(container, name, digests)

    def _judge_digests(self, container: Container, name: str, digests: list[Digest]) -> None:
        located = container.locate(name)
        if name != container.descriptor and not container.has(located):
            self._facts.missing_digests += digests
            return
        try:
            source = container.open(located)
            found = digest_of(source, tuple({digest.algorithm for digest in digests}))
        except DiskmorphError as error:
            self._facts.unreadable.append(("file-missing", f"{name}: {error.problem}"))
            return
        self._facts.false_digests += [digest for digest in digests if found[digest.algorithm] != digest.hex]

    def _read_descriptor(self, container: Container) -> None:
        facts = self._facts
        try:
            data = container.read(container.descriptor)
            facts.root = parse_xml(data, file=self._source.name, format="ovf", limits=self._limits)
            facts.envelope = read_envelope(data, file=self._source.name, limits=self._limits)
        except DiskmorphError as error:
            facts.unreadable.append(("descriptor", error.problem))

    def _file(self, container: Container, ref: FileRef) -> FileFacts:
        try:
            name = container.locate(ref.href)
            if ref.chunk_size:
                size = sum(container.open(part).size for part in container.chunk_names(ref, name))
            else:
                size = container.open(name).size
        except DiskmorphError as error:
            return FileFacts(ref, None, problem=error.problem)
        try:
            with container.open_reference(ref) as source:
                found = identify(source)[0].name
                return FileFacts(ref, size, found, vmdk_facts(source) if found == "vmdk" else None)
        except DiskmorphError as error:
            return FileFacts(ref, size, problem=error.problem)


def vmdk_facts(source: ByteSource) -> VmdkFacts | None:
    """Return what a sparse VMDK's header says; None for other kinds."""
    raw = source.read_upto(0, _SECTOR)
    if raw[:4] != schema.HOSTED_MAGIC or len(raw) < _SECTOR:
        return None
    header = schema.SPARSE_HEADER.parse(raw)
    compressed = bool(header.flags & schema.FLAG_COMPRESSED)
    length = min(header.descriptor_size * _SECTOR, 1 << 20)
    text = source.read_upto(min(header.descriptor_offset, 1 << 40) * _SECTOR, length).rstrip(b"\0")
    return VmdkFacts(
        header.version,
        header.capacity * _SECTOR,
        compressed,
        dict(_PAIR.findall(text.decode("latin-1"))),
        _trailing(source, header) if compressed else 0,
    )


def _trailing(source: ByteSource, header: schema.SparseHeader) -> int | None:
    """Return the bytes behind a stream's end-of-stream sector, negative where that is missing; None where cut off."""
    if header.gd_offset == schema.DIRECTORY_AT_END:
        return _behind_footer(source)
    try:
        end = _last_byte(source, header)
    except FormatError:
        return None
    return source.size - (-(-end // _SECTOR) * _SECTOR + _SECTOR)


def _behind_footer(source: ByteSource) -> int | None:
    """Return what follows footer and end-of-stream marker; None where no footer is the last that is not zero."""
    stop = source.size
    while stop > 0:
        start = max(0, stop - _STEP)
        block = source.read(start, stop - start).rstrip(b"\0")
        if block:
            last = (start + len(block) - 1) // _SECTOR * _SECTOR
            if source.read_upto(last, 4) != schema.HOSTED_MAGIC:
                return None
            return source.size - (last + 2 * _SECTOR)
        stop = start
    return None


def _last_byte(source: ByteSource, header: schema.SparseHeader) -> int:
    """Return where the last grain, grain table or directory ends, of a stream whose header names its directory."""
    span = header.grain_size * header.table_entries
    count = -(-header.capacity // span) if span else 0
    if count * schema.ENTRY.itemsize > source.size:
        raise FormatError("the grain directory is larger than the file", file=source.name)
    directory = np.frombuffer(source.read(header.gd_offset * _SECTOR, count * schema.ENTRY.itemsize), schema.ENTRY)
    length = header.table_entries * schema.ENTRY.itemsize
    end = header.gd_offset * _SECTOR + directory.nbytes
    last = 0
    for table in directory[directory > 0].tolist():
        entries = np.frombuffer(source.read(table * _SECTOR, length), schema.ENTRY)
        last = max(last, int(entries.max(initial=0)))
        end = max(end, table * _SECTOR + length)
    if last:
        marker = schema.GRAIN_MARKER_STRUCT.parse(source.read(last * _SECTOR, schema.MARKER_BYTES))
        end = max(end, last * _SECTOR + schema.MARKER_BYTES + marker.size)
    return end
