"""Sectors decrypted: AES in the modes that dm-crypt and QEMU use, as a filter of a ByteSource."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.source import ByteSource

if TYPE_CHECKING:
    from pathlib import Path

_STEP = 1 << 20
_MODES = ("xts-plain64", "xts-plain", "cbc-plain64", "cbc-plain", "cbc-essiv:sha256")
_KEYS = {"xts": (32, 64), "cbc": (16, 24, 32)}


class SectorCipher:
    """AES of a mode such as `xts-plain64`, for sectors of `sector` bytes whose numbers count 512 bytes.

    Raises UnsupportedError for other ciphers and modes, FormatError for keys of a wrong length.
    """

    def __init__(self, cipher: str, mode: str, key: bytes, sector: int = 512) -> None:
        if cipher != "aes" or mode not in _MODES:
            raise UnsupportedError(
                f"is encrypted by {cipher}-{mode}, which is not supported", feature=f"{cipher}-{mode}"
            )
        self.sector = sector
        self._mode, self._iv = mode.split("-", 1)
        if len(key) not in _KEYS[self._mode]:
            raise FormatError(
                "a key has a length that its cipher does not take", structure="LUKS header", found=len(key)
            )
        from cryptography.hazmat.primitives.ciphers import algorithms  # noqa: PLC0415 - encrypted images only

        self._algorithm = algorithms.AES(key)
        self._essiv = algorithms.AES(hashlib.sha256(key).digest()) if self._iv.startswith("essiv") else None

    def decrypt(self, data: memoryview, number: int) -> bytes:
        """Return whole sectors decrypted, the first one having this number (of 512 bytes)."""
        return self._each(data, number, encrypt=False)

    def encrypt(self, data: memoryview, number: int) -> bytes:
        """Return whole sectors encrypted, the first one having this number (of 512 bytes)."""
        return self._each(data, number, encrypt=True)

    def _each(self, data: memoryview, number: int, *, encrypt: bool) -> bytes:
        from cryptography.hazmat.primitives.ciphers import Cipher, modes  # noqa: PLC0415

        out = bytearray()
        for at in range(0, len(data), self.sector):
            iv = self._vector(number + at // 512)
            mode = modes.XTS(iv) if self._mode == "xts" else modes.CBC(iv)
            cipher = Cipher(self._algorithm, mode)
            stream = cipher.encryptor() if encrypt else cipher.decryptor()
            out += stream.update(data[at : at + self.sector])
        return bytes(out)

    def _vector(self, number: int) -> bytes:
        if self._iv == "plain":
            return (number & 0xFFFFFFFF).to_bytes(16, "little")
        plain = number.to_bytes(16, "little")
        if self._essiv is None:
            return plain
        from cryptography.hazmat.primitives.ciphers import Cipher, modes  # noqa: PLC0415

        return Cipher(self._essiv, modes.ECB()).encryptor().update(plain)  # noqa: S305 - ESSIV is defined so


class DecryptedSource(ByteSource):
    """A source decrypted sector by sector; `first`: the number of its first sector, of 512 bytes."""

    def __init__(self, source: ByteSource, cipher: SectorCipher, first: int = 0) -> None:
        self.name = source.name
        self._source, self._cipher, self._first = source, cipher, first
        self.size = source.size

    def pread(self, offset: int, buffer: memoryview) -> int:
        """See ByteSource; a sector that the file cuts off cannot be decrypted and is not there."""
        sector = self._cipher.sector
        low = offset // sector * sector
        whole = self.size // sector * sector
        high = min(-(-min(offset + len(buffer), offset + _STEP) // sector) * sector, whole)
        if high <= low:
            return 0
        stored = bytearray(high - low)
        self._source.read_into(low, memoryview(stored))
        plain = self._cipher.decrypt(memoryview(stored), self._first + low // 512)
        piece = plain[offset - low : offset - low + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    @property
    def path(self) -> Path | None:
        """See ByteSource: names inside the image are relative to it."""
        return self._source.path

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self._source.verify_unchanged()

    def close(self) -> None:
        """See ByteSource."""
        self._source.close()
