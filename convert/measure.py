"""How large a target would be: the writer's own layout, driven without moving data."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.convert.copy import run
from diskmorph.convert.job import transfer_of
from diskmorph.convert.options import ConvertOptions, Measurement, Progress
from diskmorph.convert.plan import make_plan, new_allocator
from diskmorph.formats.allocator import RUN
from diskmorph.formats.extents import DATA, PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.allocator import Allocator
    from diskmorph.formats.disk import Disk

_UNITS = 1 << 16
_NAME = "measured"
_LONGEST_NAME = "m" * (255 - len("-s001.vmdk")) + ".vmdk"
"""What a file may be called, of which it has parts beside it: the names are recorded."""


def measure(
    source: str | os.PathLike[str] | Disk,
    format: str | None = None,
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Measurement:
    """Return the size in bytes of what `convert` would write with these options, and with every unit stored.

    The source is read, since zeroes in it are not stored; compressed targets are encoded. Of an image of several files,
    which records their names, that is the most that it may be. Raises what `convert` raises.
    """
    options = options or ConvertOptions()
    if format is not None:
        options = replace(options, target_format=format)
    with make_plan(source, _NAME, options) as plan:
        exact = len(plan.allocator.members) == 1
        name = _NAME if exact else _LONGEST_NAME
        if not exact:
            plan.allocator = new_allocator(plan.format, plan.disk, name, plan.options, plan.base)
        run(transfer_of(plan), None, None, on_progress)
        required = sum(plan.allocator.sizes())
        full = new_allocator(plan.format, plan.disk, name, plan.options, plan.base)
        return Measurement(plan.format.name, required, max(required, fully_allocated(full)), exact=exact)


def fully_allocated(allocator: Allocator) -> int:
    """Return the size of an image in which every unit is stored; uses the allocator up."""
    for _ in allocator.begin():
        pass
    whole = allocator.unit >= allocator.size and allocator.unit > _UNITS * 512
    step = max(allocator.size if whole else allocator.unit * _UNITS, 1)
    for start in range(0, allocator.size, step):
        length = min(step, allocator.size - start)
        allocator.place(_runs(allocator, start, length))
        for _ in allocator.settle(start + length):
            pass
    for _ in allocator.finish():
        pass
    return sum(allocator.sizes())


def _runs(allocator: Allocator, start: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    if PLAIN in allocator.codecs:
        runs = np.zeros(1, RUN)
        runs[0] = (start, length, 0, DATA, PLAIN)
        return runs
    unit = allocator.unit
    runs = np.zeros(-(-length // unit), RUN)
    runs["start"] = start + np.arange(len(runs), dtype=np.uint64) * np.uint64(unit)
    runs["length"] = np.minimum(runs["start"] + np.uint64(unit), np.uint64(start + length)) - runs["start"]
    runs["size"] = len(allocator.frame(start, bytes(unit + unit // 1000 + 16)))
    runs["kind"], runs["codec"] = DATA, allocator.codec
    return runs
