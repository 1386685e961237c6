"""Hashes of a disk's content, the same whatever the format.

`sha256` is that of the raw disk. `sha256-tree` is a hash tree that all processors compute together:
the disk is cut into leaves of 4 MiB (the last one may be shorter); a leaf's hash is SHA-256(0x00, its bytes); two
neighbours' hash is SHA-256(0x01, left, right), an odd one at the end of a level goes up as it is; the digest is
SHA-256(0x02, the size as 8 bytes little-endian, the top hash), with 32 zero bytes as the top of an empty disk.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from diskmorph.convert.buffers import layout, new_buffer
from diskmorph.convert.moves import Reader
from diskmorph.convert.opening import open_source
from diskmorph.convert.options import Digest, Progress
from diskmorph.convert.windows import READ, Grid, Window, windows
from diskmorph.convert.workers import Crew

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.formats.disk import Disk
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.policy import Allowed

LEAF = 4 << 20
_CAPACITY = 1 << 20
_STEP = 4096
_ZEROES = bytes(1 << 20)
_READERS = 2
_LONG = 64 << 20


def digest(
    path: str | os.PathLike[str] | Disk,
    *,
    tree: bool = False,
    format: str | None = None,
    parents: Allowed = None,
    limits: Limits | None = None,
    snapshot: str | None = None,
    disk: int | None = None,
    threads: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Digest:
    """Return the hash of what a guest sees: SHA-256 in order, or with `tree` the parallel hash tree.

    `disk` is the number of one of a package's disks. Raises what opening and reading raise.
    """
    with open_source(path, format=format, parents=parents, limits=limits, snapshot=snapshot, disk=disk) as opened:
        whole = opened.disk
        if tree:
            text = tree_digest(whole, threads=threads, on_progress=on_progress).hex()
        else:
            text = content_digest(whole, on_progress=on_progress)
        whole.verify_unchanged()
        return Digest(opened.name, "sha256-tree" if tree else "sha256", text, whole.size)


def content_digest(disk: Disk, *, on_progress: Callable[[Progress], None] | None = None) -> str:
    """Return the SHA-256 of a disk's bytes in order, as hexadecimal digits."""
    state = hashlib.sha256()
    with Reader(disk) as reader:
        hands = [_OrderedHand(reader, state) for _ in range(_READERS)]
        _drive(disk, hands, Grid(disk.size, _STEP, _STEP, _CAPACITY, _STEP), on_progress)
    return state.hexdigest()


def tree_digest(
    disk: Disk, *, threads: int | None = None, on_progress: Callable[[Progress], None] | None = None
) -> bytes:
    """Return the root of the hash tree over a disk's bytes."""
    tree = _HashTree()
    with Reader(disk) as reader:
        hands = [_LeafHand(reader, tree) for _ in range(threads or len(os.sched_getaffinity(0)))]
        _drive(disk, hands, Grid(disk.size, LEAF, LEAF, LEAF, LEAF), on_progress)
    return hashlib.sha256(b"\2" + disk.size.to_bytes(8, "little") + tree.top()).digest()


class _HashTree:
    """The tree over leaves that come in order: only the roots of whole subtrees are kept, one of a height at most."""

    def __init__(self) -> None:
        self._count = 0
        self._roots: list[tuple[int, bytes]] = []  # height and hash, the highest and leftmost first
        self._zero = [zero_leaf(LEAF)]  # by height, subtrees of zeroes

    def add(self, root: bytes, height: int = 0) -> None:
        """Append a leaf, or a whole subtree where so many leaves came before that it stands on its own."""
        self._count += 1 << height
        while self._roots and self._roots[-1][0] == height:
            root = _joined(self._roots.pop()[1], root)
            height += 1
        self._roots.append((height, root))

    def add_zeroes(self, count: int) -> None:
        """Append leaves of zeroes, in as many steps as the tree is high."""
        while count:
            height = count.bit_length() - 1
            if self._count:
                height = min(height, (self._count & -self._count).bit_length() - 1)
            self.add(self._zeroes(height), height)
            count -= 1 << height

    def _zeroes(self, height: int) -> bytes:
        while len(self._zero) <= height:
            self._zero.append(_joined(self._zero[-1], self._zero[-1]))
        return self._zero[height]

    def top(self) -> bytes:
        """Return the root over all leaves; what is odd at the end of a level went up as it was."""
        if not self._roots:
            return bytes(32)
        *left, (_, top) = self._roots
        for _, root in reversed(left):
            top = _joined(root, top)
        return top


def _joined(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def zero_leaf(length: int) -> bytes:
    """Return the hash of a leaf of zeroes."""
    state = hashlib.sha256(b"\0")
    _add_zeroes(state, length)
    return state.digest()


def _add_zeroes(state: Any, length: int) -> None:
    while length:
        count = min(length, len(_ZEROES))
        state.update(_ZEROES if count == len(_ZEROES) else _ZEROES[:count])
        length -= count


def _drive(disk: Disk, hands: list[Any], grid: Grid, on_progress: Callable[[Progress], None] | None) -> None:
    def tick(done: int) -> None:
        if on_progress is not None:
            on_progress(Progress("digest", min(done, disk.size), disk.size))

    tick(0)
    if disk.size:
        crew: Crew[Any] = Crew(hands, windows(disk, grid), None)
        for hand in hands:
            hand.halt = crew.halt
        crew.run(tick)
    tick(disk.size)


class _OrderedHand:
    """Reads windows at the same time as others, and hashes them in turn."""

    halt: Callable[[], None]
    """Raises Stopped when work shall end: hashing a hole may take hours."""

    def __init__(self, reader: Reader, state: Any) -> None:
        self._reader, self._state = reader, state
        self._buffer = new_buffer(_CAPACITY)
        self.done = 0

    def prepare(self, window: Window) -> Window:
        if window.read:
            plan = layout(window.segments, _STEP)
            self._reader.fill(window.rows, plan.pieces, self._buffer[: plan.size])
        return window

    def settle(self, window: Window) -> None:
        at = 0
        for start, length, _, mode in window.segments.tolist():
            del start
            if mode != READ:
                self._skip(length)
                continue
            self._state.update(self._buffer[at : at + length])
            at += -(-length // _STEP) * _STEP

    def _skip(self, length: int) -> None:
        for at in range(0, length, _LONG):
            self.halt()
            _add_zeroes(self._state, min(_LONG, length - at))

    def write(self, window: Window) -> None:
        self.done += window.stop - window.start


class _LeafHand:
    """Hashes the leaves of a window, and adds them to the tree in turn."""

    def __init__(self, reader: Reader, tree: _HashTree) -> None:
        self._reader, self._tree = reader, tree
        self._buffer = new_buffer(LEAF)
        self.done = 0

    def prepare(self, window: Window) -> tuple[Window, list[bytes]]:
        if not window.read:
            return window, []
        plan = layout(window.segments, LEAF)
        buffer = self._buffer[: plan.size]
        self._reader.fill(window.rows, plan.pieces, buffer)
        leaves = []
        for _, length, at in plan.pieces.tolist():
            state = hashlib.sha256(b"\0")
            state.update(buffer[at : at + length])
            leaves.append(state.digest())
        return window, leaves

    def settle(self, batch: tuple[Window, list[bytes]]) -> None:
        window, leaves = batch
        read = iter(leaves)
        for _, length, _, mode in window.segments.tolist():
            if mode == READ:
                self._tree.add(next(read))
                continue
            self._tree.add_zeroes(length // LEAF)
            if length % LEAF:
                self._tree.add(zero_leaf(length % LEAF))

    def write(self, batch: tuple[Window, list[bytes]]) -> None:
        self.done += batch[0].stop - batch[0].start
