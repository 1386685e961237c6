"""What remote sources share: pieces are fetched in blocks, kept for a while, and read ahead of sequential readers."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from diskmorph.formats.source import ByteSource

BLOCK = 1 << 20
_KEPT = 32  # blocks: 32 MiB at the most
_AHEAD = 4
_WORKERS = 6
_LARGE = 4 * BLOCK


class BlockSource(ByteSource):
    """A source whose `fetch` is slow: small reads go through a cache of blocks, sequential ones are read ahead.

    Large reads are split over several connections. Thread-safe; `fetch` is called from several threads at once.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._last = -2
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="fetch")

    @abstractmethod
    def fetch(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`; both lie inside. Raises SourceError, IntegrityError."""

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        count = max(0, min(len(buffer), self.size - offset))
        if count >= _LARGE:
            self._large(offset, buffer[:count])
            return count
        done = 0
        while done < count:
            number, skip = divmod(offset + done, BLOCK)
            piece = self._block(number).result()[skip : skip + count - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        return count

    def _large(self, offset: int, buffer: memoryview) -> None:
        parts = [(at, min(BLOCK, len(buffer) - at)) for at in range(0, len(buffer), BLOCK)]
        waiting: list[tuple[int, Future[bytes]]] = []
        for at, length in parts:
            waiting.append((at, self._pool.submit(self.fetch, offset + at, length)))
            if len(waiting) > 2 * _WORKERS:
                self._take(waiting.pop(0), buffer)
        for part in waiting:
            self._take(part, buffer)

    @staticmethod
    def _take(part: tuple[int, Future[bytes]], buffer: memoryview) -> None:
        at, future = part
        data = future.result()
        buffer[at : at + len(data)] = data

    def _block(self, number: int) -> Future[bytes]:
        with self._lock:
            sequential = number in (self._last, self._last + 1)
            wanted = self._started(number)
            if sequential:
                for ahead in range(number + 1, number + 1 + _AHEAD):
                    if ahead * BLOCK < self.size:
                        self._started(ahead)
            self._blocks.move_to_end(number)
            self._last = number
            while len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        return wanted

    def _started(self, number: int) -> Future[bytes]:
        found = self._blocks.get(number)
        if found is None or (found.done() and found.exception() is not None):
            start = number * BLOCK
            found = self._pool.submit(self.fetch, start, min(BLOCK, self.size - start))
            self._blocks[number] = found
        return found

    def close(self) -> None:
        """See ByteSource."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __getstate__(self) -> Any:
        raise TypeError("a remote source cannot be sent; send its URL")
