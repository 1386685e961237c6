"""Trees in the shapes that WSL and Firecracker take: a gzip'd root file system tar; a kernel and an ext4 image."""

from __future__ import annotations

import os
import re
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.cloud_write import FileSink, GzipSink, pump, require_readable
from diskmorph.convert.options import ConvertOptions, ConvertReport, Moved, Progress
from diskmorph.formats.allocator import Identity, OptionReader
from diskmorph.formats.errors import FormatError, OptionError, UnsupportedError
from diskmorph.formats.numbers import whole_number
from diskmorph.formats.output import FileTarget
from diskmorph.formats.source import ByteSource, FileSource
from diskmorph.formats.tree import file_node
from diskmorph.formats.trees import open_tree
from diskmorph.formats.views import DiskSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.tree import Node, Tree

    OnProgress = Callable[[Progress], None] | None

_MIB = 1 << 20
_SLACK = 64 * _MIB
_MOST_KERNEL = 256 * _MIB
_DISTRIBUTION = b"etc/wsl-distribution.conf"
_WSL = b"etc/wsl.conf"
_SYSTEMD = (b"usr/lib/systemd/systemd", b"lib/systemd/systemd")
_KERNELS = (b"vmlinuz", b"vmlinux", b"kernel-", b"Image")
_BESIDE = (b".sig", b".hmac", b".old")
_DIGITS = re.compile(rb"(\d+)")


def tree_to_shape(
    source: str | os.PathLike[str] | Disk,
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: OnProgress = None,
) -> ConvertReport:
    """Write a tree in the shape that `options.profile` (wsl, firecracker) names. Raises what `convert` raises.

    `-o` words: wsl: `name`; firecracker: `kernel` (a file to be used instead of the tree's). `options.size` is the
    root image's size.
    """
    begun = time.monotonic()
    options = options or ConvertOptions()
    if not isinstance(source, str | os.PathLike):
        raise OptionError(f"{options.profile} takes a tree: a directory, an archive or a container image, not a disk")
    if os.fspath(target) == "-" or options.device or options.base is not None or options.compress is not None:
        raise OptionError(f"the shape for {options.profile} is neither piped, compressed otherwise nor an overlay")
    if options.target_format is not None:
        raise OptionError(f"-O does not go with --for {options.profile}")
    with open_tree(source, format=options.source_format, limits=options.limits) as tree:
        write = _write_wsl if options.profile == "wsl" else _write_firecracker
        report = write(tree, Path(target), options, on_progress)
        lost = tuple(dict.fromkeys((*tree.lost, *report.lost, *_config_lost(tree))))
        return replace(report, source=os.fspath(source), lost=lost, seconds=time.monotonic() - begun)


def _config_lost(tree: Tree) -> Iterator[str]:
    config = tree.config.get("config") if tree.config else None
    said = [word for word in ("Entrypoint", "Cmd", "Env", "User", "WorkingDir") if config and config.get(word)]
    if said:
        yield f"the container's configuration: {', '.join(said)}"


# --- WSL


def _write_wsl(tree: Tree, target: Path, options: ConvertOptions, on_progress: OnProgress) -> ConvertReport:
    from diskmorph.formats.tar import TarOptions, tar_disk  # noqa: PLC0415 - loads when used

    reader = OptionReader("wsl", options.format_options)
    name = reader.text("name", re.sub(r"[^A-Za-z0-9._-]", "-", target.name.split(".")[0]) or "linux")
    reader.done()
    notes = [*_add_wsl_files(tree, name, options)]
    if not target.name.endswith(".wsl"):
        notes.append(f"WSL opens files whose names end in .wsl by themselves, unlike {target.name}")
    lost: list[str] = []
    disk = tar_disk(tree.walk(ordered=True), TarOptions(sparse=None), lost)
    disk.name = target.name
    stored = 0
    if options.dry_run:
        file = FileSink(None)
        _compress(disk, file, on_progress)
    else:
        with FileTarget(target.parent, [target.name], force=options.force, sync=options.sync) as written:
            file = FileSink(written.members[0])
            digest = _compress(disk, file, on_progress)
            for source in tree.sources:
                source.verify_unchanged()
            if options.verify:
                require_readable(written.members[0], file.stored, digest)
            written.commit([file.stored])
    stored = file.stored
    return _report(target, "wsl", disk.size, stored, Moved(encoded=disk.size), options, tuple(lost), tuple(notes))


def _compress(disk: Disk, file: FileSink, on_progress: OnProgress) -> str:
    sink = GzipSink(file)

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(Progress("pack", done, disk.size))

    pump(sink, DiskSource(disk), tell)
    sink.close()
    return sink.sha256


def _add_wsl_files(tree: Tree, name: str, options: ConvertOptions) -> Iterator[str]:
    """Put into the tree what WSL reads, where it is not there yet (Microsoft, "Build a Custom Linux Distribution")."""
    mtime = int(Identity(b"shape" if options.reproducible else None).time()) * 10**9
    if tree.find(_DISTRIBUTION) is None:
        user = _first_user(tree)
        lines = [
            "[oobe]",
            f"defaultUid = {user}" if user else "",
            f"defaultName = {name}",
            "",
            "[shortcut]",
            "enabled = true",
            "",
        ]
        text = "\n".join(line for number, line in enumerate(lines) if line or number != 1)
        tree.put(_DISTRIBUTION, file_node(text.encode(), 0o644, mtime=mtime))
        yield "put into the tree: /etc/wsl-distribution.conf"
    if tree.find(_WSL) is None and any(tree.find(path) is not None for path in _SYSTEMD):
        tree.put(_WSL, file_node(b"[boot]\nsystemd = true\n", 0o644, mtime=mtime))
        yield "put into the tree: /etc/wsl.conf, which starts systemd"


def _first_user(tree: Tree) -> int | None:
    """Return the uid of the first ordinary user."""
    node = tree.find(b"etc/passwd")
    if node is None or node.size > _MIB or node.is_dir:
        return None
    for line in node.read().split(b"\n"):
        words = line.split(b":")
        uid = whole_number(words[2], 59999) if len(words) >= 7 else None
        if uid is not None and uid >= 1000:
            return uid
    return None


# --- Firecracker


def _write_firecracker(tree: Tree, target: Path, options: ConvertOptions, on_progress: OnProgress) -> ConvertReport:
    from diskmorph.convert.job import convert  # noqa: PLC0415 - loads when used
    from diskmorph.convert.package_disks import new_folder  # noqa: PLC0415
    from diskmorph.formats.ext4 import Ext4Options, Ext4Writer  # noqa: PLC0415

    reader = OptionReader("firecracker", options.format_options)
    named = reader.text("kernel", "")
    reader.done()
    kernel, where = _kernel(tree, named)
    identity = Identity(b"shape") if options.reproducible else Identity()
    writer = Ext4Writer(Ext4Options(label=b"rootfs", identity=_Same(identity)))
    writer.take(tree)
    disk = writer.disk(options.size) if options.size is not None else writer.disk(None, slack=_SLACK)
    disk.name = "rootfs.ext4"
    plain = replace(
        options, profile=None, target_format="raw", format_options={}, size=None, force=False, source_format=None
    )
    with new_folder(target, sync=options.sync, dry_run=options.dry_run) as folder:
        size = 0
        for piece in kernel:
            size += _append(folder / "vmlinux", piece, dry=options.dry_run)
        if not options.dry_run and options.sync:
            _sync(folder / "vmlinux")
        report = convert(disk, folder / "rootfs.ext4", options=plain, on_progress=on_progress)
    return replace(
        report,
        target=str(target),
        format="firecracker",
        stored_size=report.stored_size + size,
        lost=(*report.lost, *dict.fromkeys(writer.lost)),
        notes=(*report.notes, f"vmlinux is unpacked from {where}", "boot it with root=/dev/vda rw"),
        members=("vmlinux", "rootfs.ext4"),
    )


class _Same(Identity):
    """Identifiers that stay the same for the same label during one run."""

    def __init__(self, below: Identity) -> None:
        super().__init__(below.bytes("seed", 32))
        self._below = below

    @property
    def reproducible(self) -> bool:
        """See Identity."""
        return self._below.reproducible

    def time(self) -> float:
        """See Identity."""
        return self._below.time()


def _append(path: Path, piece: bytes, *, dry: bool) -> int:
    if not dry:
        with path.open("ab") as file:
            file.write(piece)
    return len(piece)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _kernel(tree: Tree, named: str) -> tuple[Iterator[bytes], str]:
    """Return the bytes of an uncompressed kernel and where it comes from: a file, else the tree's newest."""
    if named:
        return unpacked_kernel(FileSource(named)), named
    found = [
        (path, node)
        for folder in (b"boot", b"usr/lib/modules", b"lib/modules")
        for path, node in _kernels(tree, folder)
    ]
    if not found:
        raise UnsupportedError(
            "has no kernel in /boot or /lib/modules",
            feature="firecracker without a kernel",
            file=tree.name,
            hint="name one with -o kernel=FILE",
        )
    path, node = max(found, key=lambda one: _version(one[0]))
    where = "/" + path.decode(errors="backslashreplace")
    return unpacked_kernel(node.source(f"{tree.name}:{where}")), where


def _kernels(tree: Tree, folder: bytes) -> Iterator[tuple[bytes, Node]]:
    top = tree.find(folder)
    if top is None or not top.is_dir:
        return
    for name, child in top.children.items():
        path = folder + b"/" + name
        if child.is_dir and folder != b"boot":
            inner = child.children.get(b"vmlinuz")
            if inner is not None and stat.S_ISREG(inner.mode):
                yield path + b"/vmlinuz", inner
        elif stat.S_ISREG(child.mode) and name.startswith(_KERNELS) and not name.endswith(_BESIDE):
            yield path, child


def _version(path: bytes) -> list[tuple[int, bytes]]:
    """Return a key by which kernels' names sort as their versions do: longer numbers are larger."""
    parts = _DIGITS.split(path.split(b"/", 1)[1])
    return [(len(part.lstrip(b"0")), part.lstrip(b"0")) if part.isdigit() else (-1, part) for part in parts]


def unpacked_kernel(source: ByteSource) -> Iterator[bytes]:
    """Yield a kernel uncompressed: the ELF file in a bzImage, the Image of other machines, an ELF file as it is.

    Raises FormatError where it is none or damaged, UnsupportedError for a compression that nothing here decodes.
    """
    from diskmorph.formats.ami.kernel import read_kernel  # noqa: PLC0415 - loads when used
    from diskmorph.formats.ami.streams import open_stream  # noqa: PLC0415

    if source.read_upto(0, 4) == b"\x7fELF":
        yield from _plain(source)
        return
    kernel = read_kernel(source)
    if kernel.compression is None and kernel.kind == "Image":
        yield from _plain(source)
        return
    if kernel.kind == "Image":
        start, length = 0, source.size
    elif kernel.payload_offset is None or kernel.payload_size is None:
        raise FormatError(
            "says nothing of its payload: its boot protocol is older than 2.08", file=source.name, format="aki"
        )
    else:
        start, length = kernel.payload_offset, kernel.payload_size
    stream = open_stream(source.window(start, length), 0)
    size, first = 0, True
    while piece := stream.read(_MIB):
        if first and kernel.architecture in {"x86_64", "i386"} and not piece.startswith(b"\x7fELF"):
            raise FormatError("its payload is no ELF file", file=source.name, format="aki", offset=start)
        first, size = False, size + len(piece)
        if size > _MOST_KERNEL:
            raise FormatError(f"unpacks to more than {_MOST_KERNEL} bytes", file=source.name, format="aki")
        yield piece


def _plain(source: ByteSource) -> Iterator[bytes]:
    if source.size > _MOST_KERNEL:
        raise FormatError(f"is larger than {_MOST_KERNEL} bytes", file=source.name, format="aki")
    for at in range(0, source.size, _MIB):
        yield source.read(at, min(_MIB, source.size - at))


def _report(
    target: Path,
    format: str,
    size: int,
    stored: int,
    moved: Moved,
    options: ConvertOptions,
    lost: tuple[str, ...],
    notes: tuple[str, ...],
) -> ConvertReport:
    verified = options.verify and not options.dry_run
    return ConvertReport(
        "", str(target), format, size, stored, moved, 0.0, verified, lost, notes, members=(target.name,)
    )
