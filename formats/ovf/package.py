"""OVF packages opened: verified, their machines known, their disks read where they lie."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.disk import Disk, ImageDisk, ImageInfo
from diskmorph.formats.errors import FormatError
from diskmorph.formats.extents import ABSENT, HOLE
from diskmorph.formats.machine import MachineDisk
from diskmorph.formats.ovf.container import ArchiveContainer, Container, FolderContainer
from diskmorph.formats.ovf.manifest import Digest, parse_manifest, verify_certificate, verify_digest
from diskmorph.formats.ovf.reader import read_envelope
from diskmorph.formats.packages import Package
from diskmorph.formats.probe import RAW, format_of_suffix
from diskmorph.formats.views import Overlay, Zero

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.ovf.model import DiskRef, Envelope
    from diskmorph.formats.policy import Opener
    from diskmorph.formats.source import Buffer, ByteSource

_OVERHEAD = 64 << 20
"""Bytes that a disk's file may have beyond its capacity and an eighth of it: tables, data that does not compress."""
_ROUNDED = 1 << 20
"""What writers round a capacity up to, at the most."""
# What a Disk's format URI claims, where its file's name has no suffix that does.
_CLAIMS = (("vmdk", "vmdk"), ("vhdx", "vhdx"), ("vhd", "vhd"), ("vdi", "vdi"), ("qcow", "qcow2"))


class OvfPackage(Package):
    """An .ova or an .ovf with its folder."""

    def __init__(self, container: Container, format: str, name: str, opener: Opener, limits: Limits) -> None:
        self.format, self.name = format, name
        self.container = container
        self._opener, self._limits = opener, limits
        self.warnings: list[str] = []
        self.manifest: list[Digest] = []
        descriptor = container.read(container.descriptor)
        self._verify()
        self.envelope: Envelope = read_envelope(descriptor, file=name, limits=limits)
        self.machines = self.envelope.machines
        known = {disk.id: disk for machine in self.machines for disk in machine.disks}
        self.disks = [
            known.get(ref.id) or self._unused(number, ref) for number, ref in enumerate(self.envelope.disks.values(), 1)
        ]

    def _unused(self, number: int, ref: DiskRef) -> MachineDisk:
        file = self.envelope.files.get(ref.file) if ref.file is not None else None
        return MachineDisk(number, ref.id, file.href if file else None, ref.capacity, ref.format)

    # Manifest and certificate

    def _verify(self) -> None:
        """Check every file that the manifest names. Raises IntegrityError, FormatError."""
        name = self.container.manifest()
        certificate = f"{self.container.base}.cert"
        if name is None:
            if self.container.has(certificate):
                raise FormatError(
                    "has a certificate but no manifest that it could sign",
                    file=self.name,
                    format=self.format,
                    structure="certificate",
                )
            return
        text = self.container.read(name)
        self.manifest = parse_manifest(text, file=self.name)
        if self.container.has(certificate):
            signed = self.container.read(certificate)
            self.warnings += verify_certificate(signed, text, manifest_name=name, file=self.name)
        wanted: dict[str, list[Digest]] = defaultdict(list)
        for digest in self.manifest:
            wanted[digest.name].append(digest)
        for file, digests in wanted.items():
            self._verify_file(file, digests)
        if self.container.descriptor not in wanted:
            self.warnings.append("its manifest does not cover the descriptor")

    def _verify_file(self, file: str, digests: list[Digest]) -> None:
        located = self.container.locate(file)
        if file != self.container.descriptor and not self.container.has(located):
            raise FormatError(
                f"its manifest names {file}, which is not in the package",
                file=self.name,
                format=self.format,
                structure="manifest",
                field=f"line {digests[0].line}",
            )
        source = self.container.open(located)
        try:
            verify_digest(source, file, digests, file=self.name)
        finally:
            if file != self.container.descriptor:
                source.close()

    # Disks

    def open_disk(self, number: int | None = None) -> MemberDisk:
        """See Package."""
        chosen = self.pick(number)
        return MemberDisk(self._chain(chosen.id, ()), self.format, f"{self.name}:{chosen.file or chosen.id}")

    def _chain(self, key: str, above: tuple[str, ...]) -> Disk:
        """Open a disk over those that its parentRef names (DSP0243 9.1): what it lacks is its parent's."""
        ref = self.envelope.disks[key]
        if key in above or len(above) >= self._limits.chain_depth:
            raise FormatError(
                "the chain of its disks' parents comes back to itself or is too deep",
                file=self.name,
                format=self.format,
                structure="Disk",
                field="parentRef",
                found=key,
            )
        if ref.parent is None:
            return self._single(ref)
        if ref.parent not in self.envelope.disks:
            raise FormatError(
                f"its disk {key} has a parent that is not there",
                file=self.name,
                format=self.format,
                structure="Disk",
                field="parentRef",
                found=ref.parent,
            )
        parent = self._chain(ref.parent, (*above, key))
        try:
            return Overlay(_Delta(self._layer(ref)), parent)
        except BaseException:
            parent.close()
            raise

    def _single(self, ref: DiskRef) -> Disk:
        if ref.file is None:
            return self._blank(ref)
        from diskmorph.formats.registry import OpenContext, identify, open_chain  # noqa: PLC0415 - loads when needed

        source = self._file(ref)
        try:
            entry, _ = identify(source, self._claimed(ref, source))
            if entry.name == RAW.name:
                self._require_capacity(ref, source)
            return open_chain(source, entry, OpenContext(self._opener, self._limits))
        except BaseException:
            source.close()
            raise

    def _require_capacity(self, ref: DiskRef, source: ByteSource) -> None:
        """Raise FormatError where plain bytes are fewer than the disk has: nothing else would tell of the cut."""
        if ref.capacity is None or source.size + _ROUNDED > ref.capacity:
            return
        raise FormatError(
            f"its file {self.envelope.files[ref.file or ''].href} is cut off, or its disk's capacity is wrong",
            file=self.name,
            format=self.format,
            structure="Disk",
            field="capacity",
            expected=f"{ref.capacity} bytes",
            found=source.size,
            hint="take the file out of the package and convert it with -f raw",
        )

    def _layer(self, ref: DiskRef) -> Disk:
        if ref.file is None:
            return self._blank(ref)
        from diskmorph.formats.registry import OpenContext, identify, open_layer  # noqa: PLC0415

        source = self._file(ref)
        try:
            entry, _ = identify(source, self._claimed(ref, source))
            return open_layer(source, entry, OpenContext(self._opener, self._limits))
        except BaseException:
            source.close()
            raise

    def _blank(self, ref: DiskRef) -> Disk:
        if ref.capacity is None:
            raise FormatError(
                f"its empty disk {ref.id} has no size",
                file=self.name,
                format=self.format,
                structure="Disk",
                field="capacity",
            )
        return Zero(ref.capacity)

    def _file(self, ref: DiskRef) -> ByteSource:
        file = self.envelope.files.get(ref.file or "")
        if file is None:
            raise FormatError(
                f"its disk {ref.id} refers to a file that is not listed",
                file=self.name,
                format=self.format,
                structure="Disk",
                field="fileRef",
                found=ref.file,
            )
        most = None if ref.capacity is None else ref.capacity + ref.capacity // 8 + _OVERHEAD
        return self.container.open_reference(file, most)

    def _claimed(self, ref: DiskRef, source: ByteSource) -> str | None:
        """Return None where the content tells its format; raise where it should be one and is none."""
        from diskmorph.formats.registry import identify  # noqa: PLC0415

        href = self.envelope.files[ref.file or ""].href
        entry, _ = identify(source)
        claimed = format_of_suffix(href.removesuffix(".gz"))
        uri = (ref.format or "").lower()
        word = claimed.name if claimed else next((name for mark, name in _CLAIMS if mark in uri), None)
        if entry.name != RAW.name or word in {None, RAW.name, "iso"}:
            return None
        raise FormatError(
            f"its file {href} should be {word}, but has no {word} structure: it may be cut off or damaged",
            file=self.name,
            format=self.format,
            structure="signature",
            offset=0,
        )

    def details(self) -> dict[str, Any]:
        """See Package."""
        return {"ovf_version": self.envelope.version, "manifest": bool(self.manifest)}

    def close(self) -> None:
        """See Package."""
        self.container.close()


class _Delta(Disk):
    """A layer whose holes ask the disk below, though its own format knows of no parent."""

    def __init__(self, layer: Disk) -> None:
        self._layer = layer
        self.size, self.sector_size, self.files = layer.size, layer.sector_size, layer.files
        self.format, self.name = layer.format, layer.name

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        for batch in self._layer.extents(start, stop):
            rows = batch.copy()
            rows["kind"] = np.where(rows["kind"] == HOLE, ABSENT, rows["kind"])
            yield rows

    def unit_size(self) -> int:
        return self._layer.unit_size()

    def decode_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> bytes | bytearray:
        return self._layer.decode_unit(file, offset, stored, codec, least, held)

    def encoded_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> tuple[bytes | bytearray, Buffer]:
        return self._layer.encoded_unit(file, offset, stored, codec, least, held)

    def verify_unchanged(self) -> None:
        self._layer.verify_unchanged()

    def close(self) -> None:
        self._layer.close()


class MemberDisk(ImageDisk):
    """A disk of a package, as an image of its own: the package's format stands outside, the disk's inside."""

    def __init__(self, disk: Disk, format: str, name: str) -> None:
        self._disk = disk
        self.size, self.sector_size, self.files = disk.size, disk.sector_size, disk.files
        self.format, self.name = disk.format, name
        self.identity = {}
        inner = disk.info if isinstance(disk, ImageDisk) else None
        self.info = ImageInfo(
            format,
            disk.format if inner is None or inner.subformat is None else f"{disk.format} {inner.subformat}",
            disk.size,
            disk.sector_size,
            inner.allocation_unit if inner is not None else None,
            features=dict(inner.features) if inner is not None else {},
            warnings=inner.warnings if inner is not None else (),
        )
        self._package: Package | None = None

    def owning(self, package: Package) -> MemberDisk:
        """Return self, which from now on closes `package` when it is closed."""
        self._package = package
        return self

    def _extents(self, start: int, stop: int) -> Iterator[NDArray[np.void]]:
        return self._disk.extents(start, stop)

    def unit_size(self) -> int:
        """See Disk."""
        return self._disk.unit_size()

    def decode_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> bytes | bytearray:
        """See Disk."""
        return self._disk.decode_unit(file, offset, stored, codec, least, held)

    def encoded_unit(
        self, file: int, offset: int, stored: int, codec: int, least: int, held: ByteSource | None = None
    ) -> tuple[bytes | bytearray, Buffer]:
        """See Disk."""
        return self._disk.encoded_unit(file, offset, stored, codec, least, held)

    def verify_unchanged(self) -> None:
        """See Disk."""
        self._disk.verify_unchanged()
        if isinstance(self._package, OvfPackage):
            self._package.container.verify_unchanged()

    def close(self) -> None:
        """See Disk."""
        self._disk.close()
        if self._package is not None:
            self._package.close()


def open_package(source: ByteSource, format: str, opener: Opener, limits: Limits) -> OvfPackage:
    """See PackageModule. A descriptor is read with its folder, an archive by its index."""
    container: Container
    container = ArchiveContainer(source, limits) if format == "ova" else FolderContainer(source, opener, limits)
    return OvfPackage(container, format, source.name, opener, limits)
