"""A new LUKS header of version 1: a volume key by chance, one key slot for a passphrase (LUKS1 2.3 to 2.5)."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from typing import NamedTuple

from diskmorph.formats.luks import schema as s
from diskmorph.formats.luks.cipher import SectorCipher
from diskmorph.formats.luks.unlock import diffused

_CIPHER, _MODE, _HASH = "aes", "xts-plain64", "sha256"
_KEY_BYTES = 64  # two AES-256 keys, as XTS takes them
_STRIPES = 4000
_SLOTS = 8
_ALIGN = 4096
_MATERIAL = -(-_KEY_BYTES * _STRIPES // _ALIGN) * _ALIGN
SIZE = _ALIGN + _SLOTS * _MATERIAL
"""Bytes of a header with the room of all key slots."""
_LEAST_ITERATIONS = 1000
_INACTIVE = 0x0000DEAD


class NewHeader(NamedTuple):
    """The bytes of a header with its one key slot (the rest of `SIZE` is zeroes), and the volume's cipher."""

    data: bytes
    cipher: SectorCipher


def new_header(passphrase: bytes, milliseconds: int) -> NewHeader:
    """Return a new volume that the passphrase opens; trying one takes about so long on this machine."""
    key, salt, digest_salt = os.urandom(_KEY_BYTES), os.urandom(32), os.urandom(32)
    iterations = _calibrated(milliseconds)
    checked = max(iterations // 8, _LEAST_ITERATIONS)
    derived = hashlib.pbkdf2_hmac(_HASH, passphrase, salt, iterations, _KEY_BYTES)
    material = split(key, _STRIPES, _HASH)
    stored = SectorCipher(_CIPHER, _MODE, derived).encrypt(memoryview(material), 0)
    slots = [
        {"active": _INACTIVE, "iterations": 0, "salt": bytes(32), "offset": _slot(number), "stripes": _STRIPES}
        for number in range(_SLOTS)
    ]
    slots[0] |= {"active": s.ACTIVE, "iterations": iterations, "salt": salt}
    head = s.HEADER1.build(
        {
            "magic": s.MAGIC,
            "version": 1,
            "cipher": _CIPHER.encode().ljust(32, b"\0"),
            "mode": _MODE.encode().ljust(32, b"\0"),
            "hash": _HASH.encode().ljust(32, b"\0"),
            "payload_offset": SIZE // s.SECTOR,
            "key_bytes": _KEY_BYTES,
            "digest": hashlib.pbkdf2_hmac(_HASH, key, digest_salt, checked, 20),
            "digest_salt": digest_salt,
            "digest_iterations": checked,
            "uuid": str(uuid.uuid4()).encode().ljust(40, b"\0"),
            "slots": slots,
        }
    )
    return NewHeader(head.ljust(_ALIGN, b"\0") + stored, SectorCipher(_CIPHER, _MODE, key))


def _slot(number: int) -> int:
    return (_ALIGN + number * _MATERIAL) // s.SECTOR


def split(key: bytes, stripes: int, name: str) -> bytes:
    """Return a key spread over stripes of which none may be missing (LUKS1 2.4, "anti-forensic splitter")."""
    parts, held = [], bytes(len(key))
    for _ in range(stripes - 1):
        stripe = os.urandom(len(key))
        parts.append(stripe)
        held = diffused(bytes(a ^ b for a, b in zip(held, stripe, strict=True)), name)
    parts.append(bytes(a ^ b for a, b in zip(held, key, strict=True)))
    return b"".join(parts)


def _calibrated(milliseconds: int) -> int:
    """Return the iterations of PBKDF2 that take about so long, for a key of two hashes."""
    count = _LEAST_ITERATIONS
    while True:
        begun = time.perf_counter()
        hashlib.pbkdf2_hmac(_HASH, b"measure", bytes(32), count, _KEY_BYTES)
        took = time.perf_counter() - begun
        if took > 0.02 or count >= 1 << 24:
            return max(int(count * milliseconds / 1000 / took), _LEAST_ITERATIONS)
        count *= 4
