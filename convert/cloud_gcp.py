"""Compute Engine's image archive: the one member `disk.raw` in a gzip'd tar with old-GNU sparse headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.convert.cloud_write import (
    SPARSE,
    FileSink,
    GzipSink,
    Sink,
    end_archive,
    octal,
    require_readable,
    tar_header,
)
from diskmorph.convert.options import Moved
from diskmorph.formats.extents import DATA, stops
from diskmorph.formats.output import FileTarget
from diskmorph.formats.tar import schema as s

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskmorph.convert.cloud import Shaping
    from diskmorph.convert.options import ConvertReport
    from diskmorph.formats.disk import Disk

_GRAIN = 4096
_GAP = 64 << 10
"""Holes shorter than this are written as zeroes: an entry of the map costs more than they do compressed."""
_STEP = 1 << 20
_IN_HEADER, _IN_BLOCK = 4, 21
NAME = "disk.raw"


def write_gcp(shaping: Shaping) -> ConvertReport:
    """Write the archive; stream it straight from the disk, since the map of its extents is known beforehand."""
    options = shaping.options
    disk = shaping.plan.disk
    ranges = data_ranges(disk)
    stored = int(ranges[:, 1].sum())
    path = Path(shaping.target)
    if options.dry_run:
        size, _ = _stream(shaping, FileSink(None), ranges)
    else:
        with FileTarget(path.parent, [path.name], force=options.force, sync=options.sync) as target:
            size, digest = _stream(shaping, FileSink(target.members[0]), ranges)
            shaping.plan.source.disk.verify_unchanged()
            if options.verify:
                require_readable(target.members[0], size, digest)
            target.commit([size])
    moved = Moved(encoded=stored, skipped=disk.size - stored)
    return shaping.report("gcp", size, moved, (path.name,), *_name_note(path))


def _name_note(path: Path) -> Iterator[str]:
    if not path.name.endswith(".tar.gz"):
        yield f"Compute Engine takes archives whose names end in .tar.gz, unlike {path.name}"


def _stream(shaping: Shaping, file: FileSink, ranges: NDArray[np.int64]) -> tuple[int, str]:
    sink = GzipSink(file)
    disk = shaping.plan.disk
    for block in sparse_header(NAME, disk.size, ranges, shaping.mtime):
        sink.write(block)
    _data(sink, disk, ranges, shaping)
    end_archive(sink)
    return file.stored, sink.sha256


def _data(sink: Sink, disk: Disk, ranges: NDArray[np.int64], shaping: Shaping) -> None:
    buffer = memoryview(bytearray(_STEP))
    for start, length in ranges.tolist():
        for at in range(start, start + length, _STEP):
            piece = buffer[: min(_STEP, start + length - at)]
            disk.read_into(at, piece)
            sink.write(piece)
            shaping.tell(at + len(piece))
    shaping.tell(disk.size)


def data_ranges(disk: Disk) -> NDArray[np.int64]:
    """Return where a disk has data, as rows of (start, length): on 4 KiB, near ones joined, at most a few a MiB."""
    found: list[NDArray[np.int64]] = []
    for batch in disk.extents():
        rows = batch[batch["kind"] == DATA]
        if len(rows):
            low = rows["start"].astype(np.int64) // _GRAIN * _GRAIN
            high = np.minimum(-(-stops(rows).astype(np.int64) // _GRAIN) * _GRAIN, disk.size)
            found.append(_joined(np.column_stack((low, high))))
    if not found:
        return np.zeros((0, 2), np.int64)
    bounds = _joined(np.concatenate(found))
    bounds[:, 1] -= bounds[:, 0]
    return bounds


def _joined(bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ascending (start, stop) rows with those joined between which there is less than _GAP."""
    heads = np.concatenate(([True], bounds[1:, 0] - bounds[:-1, 1] >= _GAP))
    tails = np.append(heads[1:], True)
    return np.column_stack((bounds[heads, 0], bounds[tails, 1]))


def sparse_header(name: str, size: int, ranges: NDArray[np.int64], mtime: int) -> Iterator[bytes]:
    """Yield the blocks before a sparse member's data (GNU tar manual, "Old GNU Format"; `ranges`: start, length)."""
    entries = ranges.tolist()
    if not entries or sum(entries[-1]) < size:
        entries.append([size, 0])  # GNU tar marks the end of a file that ends in a hole so
    stored = int(ranges[:, 1].sum())
    first = _entries(entries[:_IN_HEADER], _IN_HEADER)
    more = entries[_IN_HEADER:]
    gnu = s.GNU_SPARSE.build({"entries": first, "isextended": _flag(more), "realsize": octal(size, 12)})
    yield tar_header(name, stored, mtime, flag=SPARSE, gnu=gnu)
    for at in range(0, len(more), _IN_BLOCK):
        some = _entries(more[at : at + _IN_BLOCK], _IN_BLOCK)
        yield s.GNU_SPARSE_MORE.build({"entries": some, "isextended": _flag(more[at + _IN_BLOCK :])})


def _entries(some: list[list[int]], count: int) -> list[dict[str, bytes]]:
    empty = {"offset": bytes(12), "numbytes": bytes(12)}
    found = [{"offset": octal(start, 12), "numbytes": octal(length, 12)} for start, length in some]
    return found + [empty] * (count - len(found))


def _flag(more: list[list[int]]) -> bytes:
    return b"\1" if more else b"\0"
