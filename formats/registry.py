"""From a name or a file to a Disk: formats are imported when used, parents are found, chains are put together."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, cast

from diskmorph.formats.errors import (
    DiskmorphError,
    FormatError,
    OptionError,
    PolicyError,
    SourceError,
    UnsupportedError,
)
from diskmorph.formats.foreign import refuse_foreign
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import OR_BACKING, Opener, Parents
from diskmorph.formats.probe import RAW, Format, Signature, format_named, format_of_suffix, signatures
from diskmorph.formats.source import ByteSource, FilePool, FileSource

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskmorph.formats.allocator import Allocator, NewImage, Option
    from diskmorph.formats.check import CheckReport
    from diskmorph.formats.disk import Disk, ImageDisk, ParentRef


@dataclass(frozen=True)
class OpenContext:
    """What a reader gets beside the bytes: how to open its other files, limits, the internal snapshot wanted.

    `disk` is the number, from 1, of the disk wanted of a package that holds several.
    """

    opener: Opener = field(default_factory=Opener)
    limits: Limits = field(default_factory=Limits)
    snapshot: str | None = None
    disk: int | None = None


class FormatModule(Protocol):
    """What the module of a format exports."""

    OPTIONS: tuple[Option, ...]
    SUBFORMATS: tuple[str, ...]

    def open_image(self, source: ByteSource, context: OpenContext) -> ImageDisk:
        """Read the headers and return the image as one layer: ABSENT where the parent must be asked."""

    def new_allocator(self, image: NewImage) -> Allocator:
        """Return the layout of a new image. Raises OptionError, TargetError (too large)."""

    def check_image(self, source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
        """Check every structure; with `repair` ("leaks" or "all") propose patches. Raises FormatError if unreadable."""


def load(entry: Format) -> FormatModule:
    """Import a format's module."""
    return cast("FormatModule", importlib.import_module(entry.module))


def require_format(name: str) -> Format:
    """Return the format of that name. Raises OptionError."""
    entry = format_named(name)
    if entry is None:
        raise OptionError(f"unknown format {name!r}", hint="`diskmorph formats` lists what there is")
    return entry


def identify(source: ByteSource, format: str | None = None) -> tuple[Format, list[Signature]]:
    """Return the format of a source (`format` decides, else its content) and every signature found.

    Raises FormatError where content says raw and the name's suffix another format, UnsupportedError where it has the
    mark of something that is no disk in itself.
    """
    found = signatures(source)
    if format is not None:
        return require_format(format), found
    outer = next((signature for signature in found if signature.outer), None)
    if outer is not None:
        return require_format(outer.format), found
    claimed = format_of_suffix(source.name) if source.path is not None else None
    if claimed is not None and claimed.kind == "wrapper":
        _refuse_archive(source)
    elif not found and (claimed is None or claimed.kind != "package"):  # a damaged package is told as one
        refuse_foreign(source)
    if claimed is not None and claimed is not RAW:
        raise FormatError(
            f"its name says {claimed.name}, but it has no {claimed.name} structure: it may be cut off or damaged",
            file=source.name,
            format=claimed.name,
            structure="signature",
            offset=0,
            hint="read it as a plain disk with -f raw if that is what it is",
        )
    return RAW, found


def _refuse_archive(source: ByteSource) -> None:
    """Raise UnsupportedError for an archive of files that was compressed, such as an OVA; FormatError for damage."""
    from diskmorph.formats.spool import codec_of, head_of  # noqa: PLC0415 - compressed files only

    codec = codec_of(source)
    if codec is not None and not head_of(source, 1):
        raise FormatError(f"its {codec} stream is damaged from its beginning on, or empty", file=source.name, offset=0)
    if codec is not None:
        raise UnsupportedError(
            "is an archive of files that was compressed as one, no disk image",
            feature="compressed archives",
            file=source.name,
            hint=f"decompress it first ({codec}), if it is an OVA; ls, cat, extract and build read a tar as it is",
        )


def open_layer(source: ByteSource, entry: Format, context: OpenContext) -> ImageDisk:
    """Open one image file without its parent. Raises FormatError for a disk larger than the limits allow."""
    try:
        layer = load(entry).open_image(source, context)
    except DiskmorphError as error:
        raise error.located(file=source.name, format=entry.name) from error.__cause__
    if layer.size <= context.limits.virtual_size:
        return layer
    layer.close()
    raise FormatError(
        "its disk is larger than the limit virtual_size",
        file=source.name,
        format=entry.name,
        field="virtual size",
        expected=f"at most {context.limits.virtual_size} bytes",
        found=layer.size,
    )


def open_chain(source: ByteSource, entry: Format, context: OpenContext) -> Disk:
    """Open an image with all its parents, as one disk. Raises PolicyError where a parent may not be opened."""
    layers = open_layers(source, entry, context)
    from diskmorph.formats.views import Overlay  # noqa: PLC0415 - most images stand alone

    disk: Disk = layers[-1]
    for layer in reversed(layers[:-1]):
        disk = Overlay(layer, disk)
    return disk


def open_layers(source: ByteSource, entry: Format, context: OpenContext) -> list[ImageDisk]:
    """Open an image and its parents one by one, the image first. On failure all are closed."""
    layers: list[ImageDisk] = []
    try:
        layers.append(open_layer(source, entry, context))
        seen = {_key(source)}
        while (parent := layers[-1].info.parent) is not None:
            if len(layers) >= context.limits.chain_depth:
                raise FormatError(
                    f"the chain of parents is deeper than {context.limits.chain_depth}",
                    file=source.name,
                    format=entry.name,
                )
            below = _open_parent(layers[-1], parent, context, first=len(layers) == 1)
            layers.append(below)
            key = _key(below.files[0])
            if key in seen:
                raise FormatError(
                    "the chain of parents comes back to itself", file=source.name, format=entry.name, found=below.name
                )
            seen.add(key)
    except BaseException:
        for layer in layers:
            layer.close()
        raise
    return layers


def _key(source: ByteSource) -> object:
    return source.identity[:2] if isinstance(source, FileSource) else id(source)


def _open_parent(child: ImageDisk, parent: ParentRef, context: OpenContext, *, first: bool) -> ImageDisk:
    source, named = _parent_source(child, parent, context, first=first)
    try:
        entry, _ = identify(source, None if named else parent.format)
        below = open_layer(source, entry, OpenContext(context.opener, context.limits))
    except BaseException:
        source.close()
        raise
    _require_match(child, parent, below)
    return below


def _parent_source(
    child: ImageDisk, parent: ParentRef, context: OpenContext, *, first: bool
) -> tuple[ByteSource, bool]:
    opener = context.opener
    if first and opener.parents.backing is not None:
        return opener.user_source(opener.parents.backing), True
    failure: DiskmorphError | None = None
    for name in parent.names:
        try:
            return opener.allowed(name, child.files[0], "backing file" if child.format == "qcow2" else "parent"), False
        except (PolicyError, SourceError, UnsupportedError) as error:
            if not first and error.hint:
                error.hint = error.hint.removesuffix(OR_BACKING)
            failure = failure or error
    found = _searched(child, parent, context) if not parent.names else None
    if found is not None:
        return found, False
    raise failure or FormatError(
        "names no parent, though it is a difference to one",
        file=child.name,
        format=child.format,
        hint="name the parent with --backing FILE, or allow its directory with --allow-parent DIR",
    )


_SEARCHED = 4096


def _searched(child: ImageDisk, parent: ParentRef, context: OpenContext) -> ByteSource | None:
    """Return the file in the allowed directories that is the parent by its identifiers, where no name is recorded."""
    entry = require_format(parent.format or child.format)
    looking = replace(context.opener, pool=FilePool())  # files that are only looked at are no part of the disk
    paths = (path for folder in context.opener.parents.allow for path in sorted(folder.glob("*")))
    for _, path in zip(range(_SEARCHED), paths, strict=False):
        if not path.name.lower().endswith(entry.suffixes) or not path.is_file():
            continue
        try:
            source = looking.allowed(str(path.absolute()), child.files[0], "parent")
        except DiskmorphError:
            continue
        if _key(source) == _key(child.files[0]):
            source.close()
            continue
        try:
            layer = open_layer(source, entry, OpenContext(looking, context.limits))
            if all(layer.identity.get(key) in accepted for key, accepted in parent.expects.items()):
                source.close()
                return context.opener.allowed(str(path.absolute()), child.files[0], "parent")
        except DiskmorphError:
            pass
        source.close()
    return None


def _require_match(child: ImageDisk, parent: ParentRef, below: ImageDisk) -> None:
    for key, accepted in parent.expects.items():
        found = below.identity.get(key)
        if found in accepted:
            continue
        below.close()
        raise FormatError(
            f"its parent {below.name} is not the one that it was made from, or was changed since",
            file=child.name,
            format=child.format,
            structure="parent",
            field=key,
            expected=" or ".join(accepted),
            found=found,
            hint="name the right parent with --backing FILE",
        )


def open_disk(
    path: str | os.PathLike[str] | ByteSource,
    *,
    format: str | None = None,
    parents: Parents | str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
    limits: Limits | None = None,
    snapshot: str | None = None,
    disk: int | None = None,
) -> Disk:
    """Open a disk image, its parents included, for reading.

    `format` decides where content is ambiguous; `parents` says which directories may hold parents and extents that the
    image names (or is a `Parents`); `snapshot` names an internal snapshot, `disk` is the number of one of a package's
    disks. Close the disk, or use it in `with`.
    Raises FormatError, UnsupportedError, PolicyError, SourceError.
    """
    limits = limits or Limits()
    opener = Opener(Parents.of(parents), limits)
    source = path if isinstance(path, ByteSource) else opener.user_source(path)
    try:
        entry, _ = identify(source, format)
        return open_chain(source, entry, OpenContext(opener, limits, snapshot, disk))
    except BaseException:
        source.close()
        raise
