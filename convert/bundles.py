"""EC2 bundles: an image to a folder of parts and their manifest, and back to a plain image."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diskmorph._version import __version__
from diskmorph.convert.options import Progress
from diskmorph.convert.package_disks import new_folder
from diskmorph.formats.allocator import Identity
from diskmorph.formats.ami.bundle import BundleRequest, PartWriter, signed_manifest, verify_manifest
from diskmorph.formats.ami.bundle import unbundle as unpack
from diskmorph.formats.ami.keys import Certificate, PrivateKey
from diskmorph.formats.ami.manifest import TYPES
from diskmorph.formats.ami.package import BundlePackage
from diskmorph.formats.errors import IntegrityError, OptionError, TargetError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.output import FileTarget, Member
from diskmorph.formats.packages import open_package
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import identify, open_disk
from diskmorph.formats.views import SourceDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.policy import Allowed

_STEP = 1 << 20
_ACCOUNT = re.compile(r"\d{12}")
_ARCHITECTURES = ("i386", "x86_64", "arm64")
_WORD = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True, slots=True)
class BundleOptions:
    """How to bundle. `key` and `certificate` are the account's, `ec2_certificate` is Amazon's for the region."""

    type: str
    user: str
    architecture: str
    key: Path | str
    certificate: Path | str
    ec2_certificate: Path | str
    kernel_id: str | None = None
    ramdisk_id: str | None = None
    mappings: Mapping[str, str] = field(default_factory=dict)
    source_format: str | None = None
    reproducible: bool = False
    sync: bool = True
    dry_run: bool = False
    parents: Parents = field(default_factory=Parents)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class BundleReport:
    """What was done: the manifest's path, the bundle's type, bytes before and after, parts, warnings."""

    source: str
    target: str
    type: str
    virtual_size: int
    stored_size: int
    parts: int
    seconds: float
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of docs/json.md."""
        return {
            "source": self.source,
            "target": self.target,
            "format": {"machine": "ami", "kernel": "aki", "ramdisk": "ari"}[self.type],
            "type": self.type,
            "virtual_size": self.virtual_size,
            "stored_size": self.stored_size,
            "parts": self.parts,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


def bundle(
    image: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    options: BundleOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
) -> BundleReport:
    """Bundle an image into a new folder: NAME.part.00 and so on, and NAME.manifest.xml.

    A machine image may have any disk format and is bundled as the guest sees it; kernels and ramdisks are taken as
    they are. Raises OptionError (account, architecture, keys), TargetError, and what opening and reading raise.
    """
    begun = time.monotonic()
    _refuse(options)
    key, user, ec2 = PrivateKey(options.key), Certificate(options.certificate), Certificate(options.ec2_certificate)
    if not key.matches(user):
        raise OptionError(f"the key {key.name} is not that of the certificate {user.name}")
    with _image(image, options) as disk, new_folder(Path(folder), sync=options.sync, dry_run=options.dry_run) as place:
        identity = _identity(disk, options)
        request = BundleRequest(
            _name(Path(image), disk),
            disk.size,
            options.type,
            options.user,
            options.architecture,
            options.kernel_id,
            options.ramdisk_id,
            dict(options.mappings),
        )
        files = _Files(place, options)
        with files:
            writer = PartWriter(request, files.new, identity)
            _feed(disk, writer, on_progress)
            manifest = writer.sealed(writer.finish(), user, ec2)
            disk.verify_unchanged()
            text = signed_manifest(manifest, key, ("diskmorph", __version__))
            files.new(f"{request.name}.manifest.xml").write(0, text)
        return BundleReport(
            str(image),
            str(Path(folder) / f"{request.name}.manifest.xml"),
            options.type,
            disk.size,
            manifest.bundled_size + len(text),
            len(manifest.parts),
            time.monotonic() - begun,
            (*user.warnings(), *ec2.warnings()),
        )


def _refuse(options: BundleOptions) -> None:
    if options.type not in TYPES:
        raise OptionError(f"{options.type!r} is no type of bundle", hint=f"one of {', '.join(TYPES)}")
    if not _ACCOUNT.fullmatch(options.user):
        raise OptionError(f"{options.user!r} is no account number", hint="twelve digits")
    if options.architecture not in _ARCHITECTURES:
        raise OptionError(f"{options.architecture!r} is no architecture", hint=f"one of {', '.join(_ARCHITECTURES)}")
    if options.type != "machine" and (options.kernel_id or options.ramdisk_id or options.mappings):
        raise OptionError("kernel, ramdisk and block device mapping are those of machine images")
    words = [options.kernel_id, options.ramdisk_id, *options.mappings, *options.mappings.values()]
    for word in words:
        if word is not None and not _WORD.fullmatch(word):
            raise OptionError(f"{word!r} is no identifier or device name")


def _image(image: str | os.PathLike[str], options: BundleOptions) -> Disk:
    """Open what is bundled: any disk, or the bytes of a kernel or ramdisk."""
    if options.type == "machine":
        source = Opener(options.parents, options.limits).user_file(image)
        entry, _ = identify(source, options.source_format)
        if entry.kind == "part":
            source.close()
            raise OptionError(
                f"is {entry.title}, not a disk", file=str(image), hint="bundle it with --type kernel or ramdisk"
            )
        source.close()
        return open_disk(image, format=options.source_format, parents=options.parents, limits=options.limits)
    return SourceDisk(Opener(options.parents, options.limits).user_file(image))


def _name(path: Path, disk: Disk) -> str:
    """Return the image's name in its bundle: the file's, as an image of plain bytes."""
    return path.name if disk.format == "raw" else f"{path.stem}.img"


def _identity(disk: Disk, options: BundleOptions) -> Identity:
    if not options.reproducible:
        return Identity()
    from diskmorph.convert.digest import tree_digest  # noqa: PLC0415 - only when asked for

    return Identity(tree_digest(disk))


def _feed(disk: Disk, writer: PartWriter, on_progress: Callable[[Progress], None] | None) -> None:
    buffer = memoryview(bytearray(_STEP))
    for at in range(0, disk.size, _STEP):
        piece = buffer[: min(_STEP, disk.size - at)]
        disk.read_into(at, piece)
        writer.add(piece)
        if on_progress is not None:
            on_progress(Progress("bundle", at + len(piece), disk.size))


class _Nothing(Member):
    """Where the bytes of a dry run go."""

    fresh = True
    name = "nothing"

    def write(self, offset: int, data: object) -> None:
        """Do nothing."""


class _Files:
    """The files of a folder that is being built, one open at a time."""

    def __init__(self, folder: Path, options: BundleOptions) -> None:
        self._folder, self._options = folder, options
        self._target: FileTarget | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._target is None:
            return
        try:
            if kind is None:
                self._commit()
        finally:
            self._target.close()

    def new(self, name: str) -> _Counted:
        """Finish the file before and begin another."""
        if self._options.dry_run:
            return _Counted(_Nothing())
        if self._target is not None:
            self._commit()
            self._target.close()
        self._target = FileTarget(self._folder, [name], sync=self._options.sync)
        self._counted = _Counted(self._target.members[0])
        return self._counted

    def _commit(self) -> None:
        assert self._target is not None  # noqa: S101
        self._target.commit([self._counted.size])


class _Counted:
    """A file that knows how long it has become."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.size = 0

    def write(self, offset: int, data: Any) -> None:
        """Write all of `data` at `offset`."""
        self._member.write(offset, data)
        self.size = max(self.size, offset + memoryview(data).nbytes)


def unbundle(
    manifest: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    key: Path | str,
    certificate: Path | str | None = None,
    force: bool = False,
    sync: bool = True,
    dry_run: bool = False,
    parents: Allowed = None,
    limits: Limits | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> BundleReport:
    """Write the image of a bundle as plain bytes.

    The manifest's signature is verified first, by the key's public half (and the certificate, where one is given; an
    expired one is taken with a warning), then every part and the archive inside. Parts are opened beside the manifest
    only. Raises IntegrityError, FormatError, PolicyError, OptionError, TargetError.
    """
    begun = time.monotonic()
    limits, parents = limits or Limits(), Parents.of(parents)
    private = PrivateKey(key)
    public = Certificate(certificate) if certificate is not None else None
    opener = Opener(parents, limits)
    with open_package(manifest, format="ami", parents=parents, limits=limits) as package:
        if not isinstance(package, BundlePackage):
            raise UnsupportedError("is no bundle's manifest", feature="bundles", file=str(manifest))
        said = package.manifest
        file = str(manifest)
        verify_manifest(said, private, public, file=file)
        near = opener.user_file(manifest)
        path = Path(target)
        if not path.name:
            raise TargetError("is not the name of a file", file=os.fspath(target))
        with near, FileTarget(path.parent, [path.name], force=force, sync=sync) as out:

            def tell(done: int) -> None:
                if on_progress is not None:
                    on_progress(Progress("unbundle", done, said.size))

            unpack(
                said,
                private,
                lambda name: opener.sibling(name, near, "part"),
                _Nothing() if dry_run else out.members[0],
                file=file,
                on_progress=tell,
            )
            if not dry_run:
                out.commit([said.size])
    return BundleReport(
        file,
        os.fspath(target),
        said.type,
        said.size,
        said.bundled_size,
        len(said.parts),
        time.monotonic() - begun,
        tuple(public.warnings()) if public is not None else (),
    )


__all__ = ["BundleOptions", "BundleReport", "IntegrityError", "bundle", "unbundle"]
