"""Targets that are there already and are written in place: a failure leaves their content undefined."""

from __future__ import annotations

import errno
import os
import stat
from abc import abstractmethod
from typing import TYPE_CHECKING

from diskmorph.formats.errors import TargetError
from diskmorph.formats.output import Member, Target, failed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diskmorph.formats.source import Buffer


class InPlaceMember(Member):
    """What is written in place; nothing in it is fresh."""

    fresh = False

    @abstractmethod
    def sync(self) -> None:
        """Wait until what was written is on stable storage. Raises TargetError."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


class InPlaceTarget(Target):
    """One member that is written in place."""

    def __init__(self, member: InPlaceMember, *, sync: bool = True) -> None:
        self._member = member
        self._sync = sync
        self.members = (member,)

    def commit(self, sizes: Sequence[int]) -> None:
        """See Target."""
        del sizes
        if self._sync:
            self._member.sync()

    def close(self) -> None:
        """See Target."""
        self._member.close()


class DeviceMember(InPlaceMember):
    """A block device."""

    def __init__(self, path: Path, size: int) -> None:
        self.name = str(path)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_EXCL  # O_EXCL: refused while mounted or held
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            hint = "unmount it and stop what holds it" if error.errno == errno.EBUSY else None
            raise TargetError(
                f"cannot be opened: {os.strerror(error.errno or 0)}", file=self.name, hint=hint
            ) from error
        try:
            self.capacity = self._measured(size)
        except BaseException:
            self.close()
            raise

    def _measured(self, least: int) -> int:
        """Return the bytes that the device has. Raises TargetError where it is none, or has not `least`."""
        try:
            if not stat.S_ISBLK(os.fstat(self._fd).st_mode):
                raise TargetError("is not a block device", file=self.name)
            capacity = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise failed(error, self.name, "measured") from error
        if capacity < least:
            raise TargetError("is too small", file=self.name, expected=f"{least} bytes", found=capacity)
        return capacity

    def write(self, offset: int, data: Buffer) -> None:
        """See Member."""
        view = memoryview(data).cast("B")
        try:
            while view:
                count = os.pwrite(self._fd, view, offset)
                offset, view = offset + count, view[count:]
        except OSError as error:
            raise failed(error, self.name).located(offset=offset) from error

    def fileno(self) -> int | None:
        """See Member."""
        return self._fd

    def sync(self) -> None:
        """Wait until the bytes are on the device."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise failed(error, self.name, "synced") from error

    def close(self) -> None:
        """Close the device."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DeviceTarget(InPlaceTarget):
    """A block device that the user named with `--device`."""

    def __init__(self, path: Path, size: int, *, sync: bool = True) -> None:
        super().__init__(DeviceMember(path, size), sync=sync)
