"""Cloning: ranges of one file system's files that share blocks (XFS, btrfs, bcachefs), without reading them."""

from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.convert.windows import CLONE_ALIGN, CLONE_LEAST
from diskmorph.formats.extents import DATA, PLAIN
from diskmorph.formats.rows import distinct

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from diskmorph.convert.moves import Reader

_FICLONERANGE = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_RANGE = "=qQQQ"  # struct file_clone_range: src_fd, src_offset, src_length, dest_offset


def clone_range(source: int, offset: int, target: int, at: int, length: int) -> None:
    """Make `length` bytes of descriptor `target` at `at` share the blocks of `source` at `offset`. Raises OSError."""
    import fcntl  # noqa: PLC0415 - not on every system

    fcntl.ioctl(target, _FICLONERANGE, struct.pack(_RANGE, source, offset, length, at))


def can_clone(source: int, offset: int, folder: Path) -> bool:
    """Return whether a block of `source` can be cloned into a new file in `folder`: found out by doing it."""
    with contextlib.suppress(OSError, AttributeError):
        trial = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            clone_range(source, offset, trial, 0, CLONE_ALIGN)
        finally:
            os.close(trial)
        return True
    return False


class Cloner:
    """Tells which extents of a source can be cloned into files of `folder`."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        self._reader, self._folder = reader, folder
        self._known: dict[int, bool] = {}

    def mask(self, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        """Return for each extent whether it is plain data, long, and aligned, in a file that can be cloned."""
        fits: NDArray[np.bool_] = (rows["kind"] == DATA) & (rows["codec"] == PLAIN) & (rows["length"] >= CLONE_LEAST)
        if not fits.any():
            return fits
        align = np.uint64(CLONE_ALIGN)
        for file in distinct(rows["file"][fits]).tolist():
            mine = fits & (rows["file"] == file)
            base = np.uint64(self._reader.base(file))
            fits &= ~mine | ((rows["offset"] + base) % align == rows["start"] % align)
            mine &= fits
            if mine.any() and not self._able(file, int(rows["offset"][mine][0]), int(rows["start"][mine][0])):
                fits &= ~mine
        return fits

    def _able(self, file: int, offset: int, start: int) -> bool:
        if file not in self._known:
            fd = self._reader.descriptor(file)
            inner = offset + self._reader.base(file) + -start % CLONE_ALIGN
            self._known[file] = fd is not None and can_clone(fd, inner, self._folder)
        return self._known[file]


__all__: Sequence[str] = ["Cloner", "can_clone", "clone_range"]
