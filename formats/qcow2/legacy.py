"""The old AES encryption of qcow2 (crypt_method 1): AES-128-CBC, the key being the passphrase's first 16 bytes.

A sector's vector is its number on the disk, not in the file. So decrypted bytes are addressed by disk offset, too.
Nothing tells whether a passphrase is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.formats.luks.cipher import DecryptedSource, SectorCipher
from diskmorph.formats.source import ByteSource

if TYPE_CHECKING:
    from pathlib import Path

    from diskmorph.formats.disk import Disk

_KEY = 16


class _Stored(ByteSource):
    """What is stored for a disk, by disk offset; `disk` shows it as it is."""

    def __init__(self, disk: Disk, source: ByteSource) -> None:
        self._disk, self._source = disk, source
        self.name = source.name
        self.size = -(-disk.size // 512) * 512

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource."""
        count = max(min(len(buffer), self._disk.size - offset), 0)
        if count:
            self._disk.read_into(offset, buffer[:count])
        rest = max(min(len(buffer), self.size - offset), 0) - count
        buffer[count : count + rest] = bytes(rest)
        return count + rest

    @property
    def path(self) -> Path | None:
        """See ByteSource."""
        return self._source.path

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self._source.verify_unchanged()


def decrypted(stored: Disk, source: ByteSource, passphrase: bytes) -> ByteSource:
    """Return the plain bytes by disk offset; `stored` is the disk as if it were not encrypted."""
    key = passphrase[:_KEY].ljust(_KEY, b"\0")
    return DecryptedSource(_Stored(stored, source), SectorCipher("aes", "cbc-plain64", key))
