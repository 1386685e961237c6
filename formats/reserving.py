"""Whether room is best reserved right before it is written: so on ext4, whose delayed allocation costs time a block."""

from __future__ import annotations

import contextlib
import os

LEAST = 128 << 10
"""Bytes from which reserving a write's range costs less than it gains."""
_GAINING = frozenset({"ext4"})
_MOUNTS = "/proc/self/mountinfo"


def gains(fd: int) -> bool:
    """Return whether writes into a file are faster where their range was reserved before.

    On ext4 by a third, of 2 MiB at a time; XFS is as fast either way, btrfs slower. False where nothing is known.
    """
    with contextlib.suppress(OSError, ValueError):
        return kind_of(os.fstat(fd).st_dev) in _GAINING
    return False


def kind_of(device: int, mounts: str = _MOUNTS) -> str | None:
    """Return the type of the file system on a device (`st_dev`), as /proc/PID/mountinfo tells it: proc(5)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open(mounts, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 - a start without pathlib's cost
        for line in lines:
            words = line.split()
            if words[2] == wanted:
                return words[words.index("-", 6) + 1]
    return None
