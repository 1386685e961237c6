"""Parts of a new package's file: written in order by the pipeline, hashed on the way."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from diskmorph.formats.errors import IntegrityError
from diskmorph.formats.output import Member, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.source import Buffer

_ZEROES = bytes(1 << 20)


class Slot(Member):
    """Bytes of a fresh file from `base`, as long as they turn out to be.

    It has no descriptor, so that the pipeline writes from front to back: then the digest is known when the last byte
    is written, and nothing is read again.
    """

    fresh = True

    def __init__(self, member: Member, base: int, name: str, algorithm: str) -> None:
        self.name = name
        self._member, self._base = member, base
        self._hash = hashlib.new(algorithm)
        self._at = 0

    def write(self, offset: int, data: Buffer) -> None:
        """See Member; `offset` may not lie before what was written."""
        self._advance(offset)
        self._member.write(self._base + offset, data)
        self._hash.update(data)
        self._at += memoryview(data).nbytes

    def _advance(self, offset: int) -> None:
        if offset < self._at:
            raise IntegrityError(
                "a package cannot be written backwards", file=self.name, offset=offset, expected=self._at
            )
        while self._at < offset:
            step = min(offset - self._at, len(_ZEROES))
            self._hash.update(_ZEROES[:step])
            self._at += step

    def digest(self, size: int) -> str:
        """Return the digest of all `size` bytes in hex; what was not written reads as zeroes."""
        self._advance(size)
        if self._at != size:
            raise IntegrityError(
                "more was written than the file is long", file=self.name, expected=size, found=self._at
            )
        return self._hash.hexdigest()


class SlotTarget(Target):
    """One slot as a target; the file around it is committed by whoever opened it."""

    def __init__(self, slot: Slot) -> None:
        self.members = (slot,)

    def commit(self, sizes: Sequence[int]) -> None:
        """See Target."""

    def close(self) -> None:
        """See Target."""
