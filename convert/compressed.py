"""Images compressed as one file, chosen by the target's suffix: `disk.raw.xz`, `disk.vmdk.gz`, `disk.img.zst`."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.cloud_write import FileSink, GzipSink, Part, Sink, content_of, pump, require_readable, unnamed
from diskmorph.convert.copy import run
from diskmorph.convert.job import refuse_own_files, transfer_of
from diskmorph.convert.options import ConvertOptions, ConvertReport, Moved, Progress
from diskmorph.convert.plan import STDOUT, Plan, make_plan
from diskmorph.convert.wrappers import wrapper_of
from diskmorph.formats.errors import IntegrityError, OptionError
from diskmorph.formats.output import FileTarget, Member

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.source import Buffer

    OnProgress = Callable[[Progress], None] | None

_XZ_BLOCK = 8 << 20
_BZIP2_BLOCK = 9 * 900_000  # nine of bzip2's own largest blocks
_ZSTD_LEVEL = 3
_XZ_PRESET = 6


class ZstdSink(Sink):
    """One zstd frame with a checksum, compressed in several threads."""

    def __init__(self, below: Sink) -> None:
        super().__init__()
        import zstandard  # noqa: PLC0415 - loads when first used

        self._below = below
        stream = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, threads=_threads(), write_checksum=True)
        self._stream = stream.compressobj()

    def _put(self, data: Buffer) -> None:
        out = self._stream.compress(data)
        if out:
            self._below.write(out)

    def close(self) -> None:
        """See Sink."""
        self._below.write(self._stream.flush())
        self._below.close()


class BlockSink(Sink):
    """Compresses blocks one by one in several threads; each is a whole stream, which decoders join."""

    def __init__(self, below: Sink, size: int, encode: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self._below, self._block, self._encode = below, size, encode
        self._held = bytearray()
        self._count = _threads()
        self._pool = ThreadPoolExecutor(self._count)
        self._waiting: deque[Future[bytes]] = deque()

    def _put(self, data: Buffer) -> None:
        self._held += data
        while len(self._held) >= self._block:
            self._send(bytes(self._held[: self._block]))
            del self._held[: self._block]

    def _send(self, block: bytes) -> None:
        self._waiting.append(self._pool.submit(self._encode, block))
        while len(self._waiting) > 2 * self._count:
            self._below.write(self._waiting.popleft().result())

    def close(self) -> None:
        """See Sink."""
        if self._held or not self.size:
            self._send(bytes(self._held))
        while self._waiting:
            self._below.write(self._waiting.popleft().result())
        self._pool.shutdown()
        self._below.close()


def _threads() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0))))


def _xz(below: Sink) -> Sink:
    import lzma  # noqa: PLC0415 - loads when first used

    return BlockSink(below, _XZ_BLOCK, lambda block: lzma.compress(block, lzma.FORMAT_XZ, lzma.CHECK_CRC64, _XZ_PRESET))


def _bzip2(below: Sink) -> Sink:
    import bz2  # noqa: PLC0415 - loads when first used

    return BlockSink(below, _BZIP2_BLOCK, bz2.compress)


WRAPPERS: Mapping[str, tuple[str, Callable[[Sink], Sink]]] = {
    ".gz": ("gzip", GzipSink),
    ".xz": ("xz", _xz),
    ".zst": ("zstd", ZstdSink),
    ".bz2": ("bzip2", _bzip2),
}


class _Stream(Member):
    """A sink as a file that is written from front to back."""

    fresh = True

    def __init__(self, sink: Sink, name: str) -> None:
        self.name = name
        self._sink = sink

    def write(self, offset: int, data: Buffer) -> None:
        """See Member."""
        self.advance(offset)
        self._sink.write(data)

    def advance(self, offset: int) -> None:
        """Write zeroes up to `offset`."""
        if offset < self._sink.size:
            raise IntegrityError("a stream cannot be written backwards", file=self.name, offset=offset)
        self._sink.zeroes(offset - self._sink.size)


def convert_compressed(
    source: str | os.PathLike[str] | Disk,
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: OnProgress = None,
) -> ConvertReport:
    """Write an image and compress the whole file; otherwise as `convert`, and raises what that raises.

    The image's format is the one asked for, else the one that the name without the last suffix says.
    """
    begun = time.monotonic()
    options = options or ConvertOptions()
    path = Path(target)
    suffix = wrapper_of(path.name)
    if suffix is None or os.fspath(target) == STDOUT:
        raise OptionError(f"{target} does not say by what it shall be compressed", hint=", ".join(WRAPPERS))
    if options.device or options.base is not None:
        raise OptionError("a compressed file is neither a device nor an overlay")
    with make_plan(source, path.with_name(path.name[: -len(suffix)]), options) as plan:
        refuse_own_files(replace_target(plan, path))
        moved, stored = _write(plan, path, suffix, on_progress)
        digest = None
        if options.digest:
            from diskmorph.convert.digest import content_digest  # noqa: PLC0415 - only when asked for

            digest = content_digest(plan.disk)
        return ConvertReport(
            source=plan.source.name,
            target=os.fspath(target),
            format=plan.format.name,
            virtual_size=plan.disk.size,
            stored_size=stored,
            bytes=moved,
            seconds=time.monotonic() - begun,
            verified=options.verify and not options.dry_run,
            lost=plan.lost,
            notes=(*plan.notes, f"the whole file is compressed by {WRAPPERS[suffix][0]}"),
            digest=digest,
            members=(path.name,),
        )


def replace_target(plan: Plan, path: Path) -> Plan:
    """Return the plan with one member of that name, for what looks at the names of what is written."""
    if len(plan.allocator.members) > 1:
        raise OptionError("an image of several files cannot be compressed as one")
    plan.allocator.members = (path.name,)
    return replace(plan, target=str(path))


def _write(plan: Plan, path: Path, suffix: str, on_progress: OnProgress) -> tuple[Moved, int]:
    options = plan.options
    codec, make = WRAPPERS[suffix]
    if options.dry_run:
        file = FileSink(None)
        return _compress(plan, path, make(file), on_progress), file.stored
    with FileTarget(path.parent, [path.name], force=options.force, sync=options.sync) as target:
        file = FileSink(target.members[0])
        sink = make(file)
        moved = _compress(plan, path, sink, on_progress)
        plan.source.disk.verify_unchanged()
        if options.verify:
            require_readable(target.members[0], file.stored, sink.sha256, codec)
        target.commit([file.stored])
    return moved, file.stored


def _compress(plan: Plan, path: Path, sink: Sink, on_progress: OnProgress) -> Moved:
    """Write the image through the sink: as it comes where its format is sequential, else from a nameless file."""
    if plan.allocator.sequential:
        stream = _Stream(sink, str(path))
        moved = run(transfer_of(plan), Part(stream), None, on_progress)
        stream.advance(plan.allocator.sizes()[0])
        sink.close()
        return moved
    with unnamed(path.parent, path.name) as inner:
        moved = run(transfer_of(plan), inner, path.parent, on_progress)
        with content_of(inner, plan.allocator.sizes()) as content:
            pump(sink, content, lambda done: on_progress and on_progress(Progress("pack", done, content.size)))
    sink.close()
    return moved
