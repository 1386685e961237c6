"""Whether an XFS log is clean: its last record says that the file system was unmounted ("Journaling Log").

A log that needs replay is refused: its transactions are logical, not blocks that could be laid over the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.xfs import schema as s

if TYPE_CHECKING:
    from diskmorph.formats.xfs.volume import Volume

_BLOCK = 512
_FARTHEST = 1 << 20  # bytes behind the head in which the last record must begin
_HEADER_COVERS = 32 << 10


def require_clean(volume: Volume) -> None:
    """Raise UnsupportedError if the log needs replay, or lies on another device."""
    if not volume.super.logstart:
        raise _refused(volume, "its log lies on another device", "external log")
    start = volume.place(volume.super.logstart, "log")
    blocks = volume.super.logblocks * volume.block_size // _BLOCK
    if start + blocks * _BLOCK > volume.blocks * volume.block_size:
        raise volume.error("the log lies outside the file system", "log", start)
    if not _Log(volume, start, blocks).is_clean():
        raise _refused(volume, "its log (journal) needs to be replayed", "dirty log")


def _refused(volume: Volume, problem: str, feature: str) -> UnsupportedError:
    return UnsupportedError(
        problem,
        feature=feature,
        file=volume.source.name,
        format="xfs",
        structure="log",
        hint="mount and unmount it once, or run xfs_repair",
    )


class _Log:
    def __init__(self, volume: Volume, start: int, blocks: int) -> None:
        self._volume = volume
        self._start = start
        self._blocks = blocks

    def _block(self, number: int) -> bytes:
        return self._volume.source.read(self._start + number % self._blocks * _BLOCK, _BLOCK)

    def _cycle(self, number: int) -> int:
        """Return which round through the log wrote a block: its first word, or of a record's header the second."""
        head = self._block(number)[:8]
        first = int.from_bytes(head[:4], "big")
        return int.from_bytes(head[4:], "big") if first == s.LOG_MAGIC else first

    def _head(self) -> int:
        """Return the first block that the newest round did not write."""
        first, last = self._cycle(0), self._cycle(self._blocks - 1)
        if first == last:
            return 0
        low, high = 0, self._blocks - 1  # cycle(low) is the newest, cycle(high) is not
        while high - low > 1:
            middle = (low + high) // 2
            if self._cycle(middle) == first:
                low = middle
            else:
                high = middle
        return high

    def is_clean(self) -> bool:
        head = self._head()
        for back in range(1, min(_FARTHEST // _BLOCK, self._blocks) + 1):
            block = self._block(head - back)
            if int.from_bytes(block[:4], "big") == s.LOG_MAGIC:
                return self._is_unmount(block, head - back, back)
        return not any(self._block(number).strip(b"\0") for number in range(8))  # a log that was never written

    def _is_unmount(self, block: bytes, number: int, back: int) -> bool:
        record = s.LOG_RECORD.parse(block)
        headers = 1
        if record.version & 2 and record.size > _HEADER_COVERS:
            headers = -(-record.size // _HEADER_COVERS)
        if record.num_logops != 1 or headers + -(-record.length // _BLOCK) != back:
            return False
        operation = self._block(number + headers)
        return bool(operation[9] & s.LOG_UNMOUNT)  # transaction, length, client, flags
