"""Where trees and images go: a tar archive, a directory, an OCI layout or archive, a docker-archive."""

from __future__ import annotations

import secrets
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.job import convert
from diskmorph.convert.options import ConvertOptions, ConvertReport, Moved, Progress
from diskmorph.convert.plan import STDOUT
from diskmorph.formats.directory import DirectoryTarget
from diskmorph.formats.docker_registry.reference import is_reference, parse_reference
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.oci.writer import ArchiveSink, NewImage, encoded, write_blobs, write_docker, write_layout
from diskmorph.formats.output import FileTarget
from diskmorph.formats.tar import TarOptions, tar_disk
from diskmorph.formats.tree_names import IMAGE_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.tree import Tree

_COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".tzst": "zstd"}
_STEP = 1 << 20
LAYER_TAR = TarOptions(acl_text=False, sparse=None)


@dataclass(frozen=True)
class Output:
    """A parsed DST: its kind (directory, tar, oci, oci-archive, docker-archive), path and, of images, name and tag.

    Of the kind docker, an image in a registry, `url` is its whole name, and there is no path.
    """

    kind: str
    path: Path
    tag: str | None = None
    url: str = ""

    @property
    def is_image(self) -> bool:
        """Whether it is a container image."""
        return self.kind in IMAGE_FORMATS


def parse_output(target: str, format: str | None = None) -> Output:
    """Return what a DST says. `oci:DIR[:TAG]`, `oci-archive:FILE[:NAME:TAG]`, `docker-archive:FILE[:NAME:TAG]`.

    `docker://HOST/NAME[:TAG]` is an image in a registry. Else NAME.tar (or .tar.gz, .tgz, .tar.zst) is an archive,
    anything else a directory, unless `format` decides; `-` takes a tar archive alone. Raises OptionError.
    """
    if (target == STDOUT and format != "tar") or target.partition(":")[::2] in {(k, STDOUT) for k in IMAGE_FORMATS}:
        raise OptionError("standard output takes no directory and no image", hint="an archive does: -O tar")
    if is_reference(target):
        parse_reference(target)
        return Output("docker", Path(), url=target)
    for kind in ("oci-archive", "docker-archive", "oci"):
        if target.startswith(kind + ":"):
            name, _, tag = target[len(kind) + 1 :].partition(":")
            if not name:
                raise OptionError(f"{target!r} names no file", hint=f"{kind}:NAME")
            return Output(kind, Path(name), tag or None)
    if format not in {None, "directory", "tar", "oci", "oci-archive", "docker-archive"}:
        raise OptionError(f"a tree is not written as {format}", hint="directory, tar, oci, oci-archive, docker-archive")
    if format is not None:
        return Output(format, Path(target))
    lower = target.lower()
    archive = lower.endswith((".tar", ".tgz", ".tzst")) or any(lower.endswith(f".tar{s}") for s in (".gz", ".zst"))
    return Output("tar" if archive else "directory", Path(target))


class Teller:
    """Counts bytes and tells of them."""

    def __init__(self, phase: str, total: int, on_progress: Callable[[Progress], None] | None) -> None:
        self._phase, self._total, self._on_progress = phase, total, on_progress
        self.done = 0

    def __call__(self, count: int) -> None:
        """Note that so many bytes more are done."""
        self.done += count
        if self._on_progress is not None:
            self._on_progress(Progress(self._phase, min(self.done, self._total), self._total))


def fetching(on_progress: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    """Return what tells of layers that are fetched from a registry."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(Progress("fetch", done, total))


def write_tree(
    tree: Tree, output: Output, options: ConvertOptions, on_progress: Callable[[Progress], None] | None
) -> ConvertReport:
    """Write a tree as a directory or an archive. Raises TargetError."""
    lost: list[str] = []
    if output.kind == "tar":
        report = _write_tar(tree, output, options, on_progress, lost)
    else:
        report = _write_directory(tree, output, options, on_progress, lost)
    return replace(report, source=tree.name, format=output.kind, lost=(*tree.lost, *lost))


def _write_tar(
    tree: Tree,
    output: Output,
    options: ConvertOptions,
    on_progress: Callable[[Progress], None] | None,
    lost: list[str],
) -> ConvertReport:
    disk = tar_disk(tree.walk(ordered=True), lost=lost)
    codec = next((codec for suffix, codec in _COMPRESSED.items() if output.path.name.lower().endswith(suffix)), None)
    if codec is None:
        plain = replace(options, source_format=None, target_format="raw", reproducible=False)
        return convert(disk, output.path, options=plain, on_progress=on_progress)
    tell = Teller("extracting", disk.size, on_progress)
    size = 0
    if not options.dry_run:
        with FileTarget(output.path.parent, [output.path.name], force=options.force, sync=options.sync) as target:
            for chunk in encoded(_read(disk, tell), codec):
                target.members[0].write(size, chunk)
                size += len(chunk)
            tree.verify_unchanged()
            target.commit([size])
    return _report(output, disk.size, size, Moved(encoded=disk.size))


def _read(disk: Disk, tell: Callable[[int], None]) -> Iterator[bytes]:
    for at in range(0, disk.size, _STEP):
        data = disk.read(at, min(_STEP, disk.size - at))
        tell(len(data))
        yield data


def _write_directory(
    tree: Tree,
    output: Output,
    options: ConvertOptions,
    on_progress: Callable[[Progress], None] | None,
    lost: list[str],
) -> ConvertReport:
    total = stored = 0
    seen: set[int] = set()
    for _, node in tree.walk():
        if node.kind == stat.S_IFREG and id(node) not in seen:
            seen.add(id(node))
            total += node.size
            stored += sum(piece.length for piece in node.pieces)
    if not options.dry_run:
        with DirectoryTarget(output.path, sync=options.sync) as target:
            target.write(tree, lost, Teller("extracting", total, on_progress))
            tree.verify_unchanged()
            target.commit()
    return _report(output, total, stored, Moved(copied=stored, skipped=total - stored))


def _report(output: Output, size: int, stored: int, moved: Moved) -> ConvertReport:
    return ConvertReport(
        source="",
        target=output.url or str(output.path),
        format=output.kind,
        virtual_size=size,
        stored_size=stored,
        bytes=moved,
        seconds=0.0,
        verified=False,
        lost=(),
    )


class LayoutSink:
    """Writes an image's files into a directory that is being built."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.size = 0

    def blob(self, chunks: Iterator[bytes], name: Callable[[], str]) -> None:
        """See Sink."""
        part = self._folder / f".{secrets.token_hex(8)}"
        try:
            with part.open("xb", buffering=0) as file:
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]
                    self.size += len(chunk)
            place = self._folder / name()
            place.parent.mkdir(parents=True, exist_ok=True)
            part.rename(place)
        except OSError as error:
            raise TargetError(f"cannot be written: {error.strerror}", file=str(self._folder)) from error


def write_image(
    image: NewImage,
    output: Output,
    options: ConvertOptions,
    *,
    tree: Tree,
    total: int,
    on_progress: Callable[[Progress], None] | None = None,
    mtime: int = 0,
) -> ConvertReport:
    """Write a container image of a tree; `total`: bytes of its new layers' archives.

    Raises TargetError, and IntegrityError where the tree's sources changed meanwhile.
    """
    image = replace(image, tag=output.tag, progress=Teller("extracting", total, on_progress))
    stored = 0
    if options.dry_run:
        pass
    elif output.kind == "oci":
        with DirectoryTarget(output.path, sync=options.sync) as folder:
            sink = LayoutSink(folder.part)
            write_layout(image, sink)
            folder.part.chmod(0o755)
            tree.verify_unchanged()
            folder.commit()
            stored = sink.size
    elif output.kind == "docker":
        stored = _push(image, output.url, tree, force=options.force)
    else:
        with FileTarget(output.path.parent, [output.path.name], force=options.force, sync=options.sync) as target:
            member = target.members[0]
            archive = ArchiveSink(member.write, mtime)
            (write_docker if output.kind == "docker-archive" else write_layout)(image, archive)
            stored = archive.finish()
            tree.verify_unchanged()
            target.commit([stored])
    plain = output.kind == "docker-archive" or image.compress == "none"
    return _report(output, total, stored, Moved(copied=total) if plain else Moved(encoded=total))


def _push(image: NewImage, url: str, tree: Tree, *, force: bool) -> int:
    """Send an image to a registry; return the bytes of its blobs and manifest."""
    from diskmorph.formats.oci.remote import RegistryTarget  # noqa: PLC0415 - what is used is loaded

    with RegistryTarget(url, force=force) as target:
        manifest = write_blobs(image, target)
        tree.verify_unchanged()
        target.commit(manifest)
        return target.size
