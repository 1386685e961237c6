"""Replays an ext3 or ext4 journal in memory (kernel docs, "Journal (jbd2)"); the image stays as it is."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from diskmorph.formats.crc32c import crc32c
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.ext4 import schema as s
from diskmorph.formats.ext4.blockmap import runs_of
from diskmorph.formats.ext4.checksum import chain, start
from diskmorph.formats.ext4.volume import Volume
from diskmorph.formats.limits import Limits
from diskmorph.formats.source import ByteSource

if TYPE_CHECKING:
    from collections.abc import Iterator

_KNOWN = s.J_REVOKES | s.J_64BIT | s.J_ASYNC_COMMIT | s.J_CSUM_V2 | s.J_CSUM_V3 | s.J_FAST_COMMIT


def replayed(volume: Volume, limits: Limits | None = None) -> Volume:
    """Return the file system as it is after its journal is replayed; itself where none needs to be.

    Raises FormatError (damaged journal), UnsupportedError (external journal, fast commits).
    """
    if not volume.has(s.RECOVER):
        return volume
    if not volume.super.journal_inum or volume.super.journal_dev:
        raise UnsupportedError(
            "its journal needs recovery, and lies on another device",
            feature="external journal",
            file=volume.source.name,
            format="ext4",
            hint="mount it once, or run e2fsck",
        )
    blocks = _Journal(volume).replay((limits or Limits()).log_bytes)
    return Volume(PatchedSource(volume.source, blocks, volume.block_size)) if blocks else volume


class PatchedSource(ByteSource):
    """A source with some of its blocks replaced."""

    def __init__(self, source: ByteSource, blocks: dict[int, bytes], size: int) -> None:
        self.name = source.name
        self.size = source.size
        self._source = source
        self._blocks = blocks
        self._block_size = size
        self._numbers = sorted(blocks)

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        count = self._source.pread(offset, buffer)
        size = self._block_size
        index = bisect_left(self._numbers, offset // size)
        while index < len(self._numbers) and self._numbers[index] * size < offset + count:
            number = self._numbers[index]
            low = max(number * size, offset)
            high = min((number + 1) * size, offset + count)
            buffer[low - offset : high - offset] = self._blocks[number][low - number * size : high - number * size]
            index += 1
        return count

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self._source.verify_unchanged()

    def close(self) -> None:
        """See ByteSource."""
        self._source.close()


class _Journal:
    """One log: blocks of descriptors, data and commits in a ring."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._map: list[int] = []
        for run in runs_of(volume, volume.inode(volume.super.journal_inum)):
            if run.block != len(self._map):
                raise self._error("the journal has holes", 0)
            self._map.extend(range(run.at, run.at + run.length))
        head = self._block(0)
        try:
            self.super: Any = s.JOURNAL_SUPER.parse(head[:1024])
        except Exception as error:  # construct raises kinds of its own
            raise self._error("the journal's superblock is damaged", 0) from error
        self._require_sane(head)
        incompat = self.super.feature_incompat
        self._wide = bool(incompat & s.J_64BIT)
        self._v3 = bool(incompat & s.J_CSUM_V3)
        self._sums = bool(incompat & (s.J_CSUM_V2 | s.J_CSUM_V3))
        self._seed = start(self.super.uuid)

    def _error(self, problem: str, block: int) -> FormatError:
        at = self._map[block] * self._volume.block_size if block < len(self._map) else 0
        return self._volume.error(problem, "journal", at)

    def _block(self, number: int) -> bytes:
        if number >= len(self._map):
            raise self._error("the journal is cut off", 0)
        return self._volume.read_block(self._map[number], "journal block")

    def _require_sane(self, head: bytes) -> None:
        found = self.super
        if found.header.blocktype not in {s.J_SUPER_V1, s.J_SUPER_V2} or found.blocksize != self._volume.block_size:
            raise self._error("the journal's superblock is damaged", 0)
        if not 1 <= found.first < found.maxlen <= len(self._map) or found.start >= found.maxlen:
            raise self._error("the journal's superblock is damaged", 0)
        unknown = found.feature_incompat & ~_KNOWN
        if unknown:
            raise UnsupportedError(
                f"its journal needs recovery and uses unknown features {unknown:#x}",
                feature="journal features",
                file=self._volume.source.name,
                format="ext4",
            )
        if found.feature_incompat & (s.J_CSUM_V2 | s.J_CSUM_V3):
            body = head[:0xFC] + bytes(4) + head[0x100:1024]
            if start(body) != found.checksum:
                raise self._error("the journal's superblock is damaged: its checksum is wrong", 0)

    def replay(self, most: int) -> dict[int, bytes]:
        """Return the blocks that the log holds newer versions of. Raises FormatError beyond `most` bytes."""
        if not self.super.start:
            self._refuse_fast_commits()
            return {}
        transactions = list(self._transactions())
        revoked: dict[int, int] = {}
        for sequence, _, revokes in transactions:
            for block in revokes:
                revoked[block] = sequence
        blocks: dict[int, bytes] = {}
        for sequence, tags, _ in transactions:
            for block, place, escaped in tags:
                if revoked.get(block, -1) >= sequence:
                    continue
                data = self._block(place)
                if escaped:
                    data = s.JOURNAL_MAGIC.to_bytes(4, "big") + data[4:]
                if block >= self._volume.blocks:
                    raise self._error("the journal names a block outside the file system", place)
                blocks[block] = data
                if len(blocks) * self._volume.block_size > most:
                    raise self._error(f"the journal holds more than {most} bytes", place)
        self._refuse_fast_commits()
        return blocks

    def _refuse_fast_commits(self) -> None:
        """Raise UnsupportedError where the area of fast commits holds any: they change more than blocks."""
        if not self.super.feature_incompat & s.J_FAST_COMMIT:
            return
        count = self.super.num_fc_blocks or 256
        first = self.super.maxlen - count
        head = self._block(first)[:4] if 0 < first < len(self._map) else bytes(4)
        if int.from_bytes(head[:2], "little") == 9:  # EXT4_FC_TAG_HEAD
            raise UnsupportedError(
                "its journal needs recovery and holds fast commits",
                feature="fast_commit",
                file=self._volume.source.name,
                format="ext4",
                hint="mount it once, or run e2fsck",
            )

    def _next(self, place: int, step: int = 1) -> int:
        last = self.super.maxlen
        if self.super.feature_incompat & s.J_FAST_COMMIT:
            last -= self.super.num_fc_blocks or 256
        place += step
        return place - (last - self.super.first) if place >= last else place

    def _transactions(self) -> Iterator[tuple[int, list[tuple[int, int, bool]], list[int]]]:
        """Yield the sequence number, tags (block, place in the log, escaped) and revoked blocks of each commit."""
        place, sequence = self.super.start, self.super.sequence
        tags: list[tuple[int, int, bool]] = []
        revokes: list[int] = []
        steps = 0
        while steps <= self.super.maxlen:
            data = self._block(place)
            header = (s.JOURNAL_MAGIC.to_bytes(4, "big"), sequence.to_bytes(4, "big"))
            if (data[:4], data[8:12]) != header:
                return
            kind = int.from_bytes(data[4:8], "big")
            if kind == s.J_DESCRIPTOR:
                found = self._tags(data)
                if found is None:
                    return
                for block, flags in found:
                    place = self._next(place)
                    tags.append((block, place, bool(flags & s.J_ESCAPE)))
                    steps += 1
            elif kind == s.J_REVOKE:
                if not self._tail_fine(data):
                    return
                revokes.extend(self._revoked(data, place))
            elif kind == s.J_COMMIT:
                if self._sums and not self._commit_fine(data):
                    return
                yield sequence, tags, revokes
                tags, revokes = [], []
                sequence = (sequence + 1) & 0xFFFFFFFF
            else:
                return
            place = self._next(place)
            steps += 1

    def _tags(self, data: bytes) -> list[tuple[int, int]] | None:
        """Return (block, flags) of a descriptor block's tags; None if the block was not written whole."""
        if not self._tail_fine(data):
            return None
        found = []
        at, end = 12, len(data) - (4 if self._sums else 0)
        size = 16 if self._v3 else 8 + (4 if self._wide else 0)
        while at + size <= end:
            block = int.from_bytes(data[at : at + 4], "big")
            if self._v3:
                flags = int.from_bytes(data[at + 4 : at + 8], "big")
            else:
                flags = int.from_bytes(data[at + 6 : at + 8], "big")
            if self._wide:
                block |= int.from_bytes(data[at + 8 : at + 12], "big") << 32
            if not flags & s.J_DELETED:
                found.append((block, flags))
            at += size + (0 if flags & s.J_SAME_UUID else 16)
            if flags & s.J_LAST_TAG:
                break
        return found

    def _tail_fine(self, data: bytes) -> bool:
        return not self._sums or chain(self._seed, data[:-4] + bytes(4)).to_bytes(4, "big") == data[-4:]

    def _commit_fine(self, data: bytes) -> bool:
        stored = data[16:20]
        return chain(self._seed, data[:16] + bytes(4) + data[20:]).to_bytes(4, "big") == stored

    def _revoked(self, data: bytes, place: int) -> list[int]:
        count = int.from_bytes(data[12:16], "big")
        if not 16 <= count <= len(data):
            raise self._error("a revoke block is damaged", place)
        size = 8 if self._wide else 4
        return [int.from_bytes(data[at : at + size], "big") for at in range(16, count - size + 1, size)]


__all__ = ["PatchedSource", "crc32c", "replayed"]
