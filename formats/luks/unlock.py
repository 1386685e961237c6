"""A LUKS header opened with a passphrase: the volume key out of the first key slot that the passphrase fits."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError, PolicyError, UnsupportedError
from diskmorph.formats.luks import schema as s
from diskmorph.formats.luks.cipher import SectorCipher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.source import ByteSource

_MOST_ITERATIONS = 50_000_000
_MOST_MATERIAL = 16 << 20
_MOST_MEMORY = 4 << 20  # KiB of Argon2
_MOST_JSON = 4 << 20
_KEY_BYTES = (16, 24, 32, 64)


@dataclass(frozen=True)
class Volume:
    """An open volume: its cipher, where the encrypted data begins (bytes), the number of its first sector's tweak."""

    version: int
    cipher: SectorCipher
    offset: int
    first: int
    size: int | None
    algorithm: str


def unlock(source: ByteSource, passphrase: bytes | None) -> Volume:
    """Return the volume whose header `source` begins with.

    Raises PolicyError (no passphrase, or one that fits no key slot), FormatError, UnsupportedError.
    """
    head = source.read_upto(0, 8)
    if head[:6] != s.MAGIC:
        raise _fault(source, "is no LUKS header", 0)
    version = int.from_bytes(head[6:8], "big")
    if version not in {1, 2}:
        raise UnsupportedError(f"LUKS version {version} is not supported", feature=f"LUKS {version}", file=source.name)
    if passphrase is None:
        raise PolicyError(
            "is encrypted by LUKS, and no passphrase was given",
            option="--passphrase-file",
            file=source.name,
            hint="give it with --passphrase-file FILE",
        )
    try:
        return _version1(source, passphrase) if version == 1 else _version2(source, passphrase)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise _fault(source, f"the LUKS header makes no sense: {error!r}", 0) from error


def _fault(source: ByteSource, problem: str, offset: int) -> FormatError:
    return FormatError(problem, file=source.name, format="luks", structure="LUKS header", offset=offset)


def _wrong(source: ByteSource) -> PolicyError:
    return PolicyError("the passphrase fits no key slot", option="--passphrase-file", file=source.name, hint="check it")


def _pbkdf2(source: ByteSource, name: str, secret: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    if not 0 < iterations <= _MOST_ITERATIONS:
        raise _fault(source, f"asks for {iterations} iterations of PBKDF2", 0)
    return hashlib.pbkdf2_hmac(name, secret, salt, iterations, length)


def merged(material: bytes, size: int, stripes: int, name: str) -> bytes:
    """Return a key from its stripes (LUKS1 2.4, "anti-forensic splitter")."""
    key = bytes(size)
    for number in range(stripes):
        stripe = material[number * size : (number + 1) * size]
        key = bytes(a ^ b for a, b in zip(key, stripe, strict=True))
        if number < stripes - 1:
            key = diffused(key, name)
    return key


def diffused(key: bytes, name: str) -> bytes:
    """Return the key with every bit spread over its block of the hash's length (LUKS1 2.4)."""
    length = hashlib.new(name).digest_size
    parts = [
        hashlib.new(name, at.to_bytes(4, "big") + key[at * length : (at + 1) * length]).digest()
        for at in range(-(-len(key) // length))
    ]
    last = len(key) % length
    if last:
        parts[-1] = parts[-1][:last]
    return b"".join(parts)


def _material(source: ByteSource, offset: int, size: int, stripes: int, cipher: SectorCipher) -> bytes:
    length = size * stripes
    whole = -(-length // s.SECTOR) * s.SECTOR
    if not 0 < length <= _MOST_MATERIAL or offset + whole > source.size:
        raise _fault(source, "key material lies beyond the file or is too large", offset)
    return cipher.decrypt(memoryview(source.read(offset, whole)), 0)[:length]


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii")


# --- version 1


def _version1(source: ByteSource, passphrase: bytes) -> Volume:
    header = s.HEADER1.parse(source.read(0, s.HEADER1.sizeof()))
    cipher, mode, name = _text(header.cipher), _text(header.mode), _text(header.hash)
    size = int(header.key_bytes)
    if size not in _KEY_BYTES:
        raise _fault(source, f"has keys of {size} bytes", 108)
    for slot in header.slots:
        if slot.active != s.ACTIVE:
            continue
        derived = _pbkdf2(source, name, passphrase, slot.salt, slot.iterations, size)
        slot_cipher = SectorCipher(cipher, mode, derived)
        material = _material(source, slot.offset * s.SECTOR, size, slot.stripes, slot_cipher)
        key = merged(material, size, slot.stripes, name)
        if _pbkdf2(source, name, key, header.digest_salt, header.digest_iterations, 20) == header.digest:
            offset = int(header.payload_offset) * s.SECTOR
            return Volume(1, SectorCipher(cipher, mode, key), offset, 0, None, f"{cipher}-{mode}")
    raise _wrong(source)


# --- version 2


def _version2(source: ByteSource, passphrase: bytes) -> Volume:
    found = _json(source)
    segments = found["segments"]
    if len(segments) != 1 or next(iter(segments.values()))["type"] != "crypt":
        raise UnsupportedError("has other than one encrypted segment", feature="LUKS2 segments", file=source.name)
    number, segment = next(iter(segments.items()))
    if "integrity" in segment:
        raise UnsupportedError("has integrity tags", feature="LUKS2 integrity", file=source.name)
    sector = int(segment["sector_size"])
    if sector not in {512, 1024, 2048, 4096}:
        raise _fault(source, f"has sectors of {sector} bytes", s.JSON_OFFSET)
    for key in _keys2(source, found, number, passphrase):
        cipher, _, mode = str(segment["encryption"]).partition("-")
        size = None if segment["size"] == "dynamic" else int(segment["size"])
        volume = SectorCipher(cipher, mode, key, sector)
        return Volume(2, volume, int(segment["offset"]), int(segment["iv_tweak"]), size, segment["encryption"])
    raise _wrong(source)


def _json(source: ByteSource) -> dict[str, Any]:
    """Return the JSON area, whose checksum is verified (LUKS2 2.2, 3)."""
    header = s.HEADER2.parse(source.read(0, s.HEADER2.sizeof()))
    size = int(header.size)
    if not s.JSON_OFFSET < size <= _MOST_JSON:
        raise _fault(source, f"says that it has {size} bytes", 8)
    raw = bytearray(source.read(0, size))
    at = s.HEADER2.sizeof() - 64
    raw[at : at + 64] = bytes(64)
    digest = hashlib.new(_text(header.checksum_name), raw).digest()
    if digest != header.checksum[: len(digest)]:
        raise _fault(source, "the header's checksum is wrong", at)
    found = json.loads(bytes(raw[s.JSON_OFFSET :]).split(b"\0", 1)[0])
    if not isinstance(found, dict):
        raise _fault(source, "the JSON area is no object", s.JSON_OFFSET)
    return found


def _keys2(source: ByteSource, found: dict[str, Any], segment: str, passphrase: bytes) -> Iterator[bytes]:
    """Yield the keys that the passphrase opens and whose digest is right."""
    digests = [digest for digest in found["digests"].values() if segment in digest["segments"]]
    for number, slot in sorted(found["keyslots"].items()):
        digest = next((one for one in digests if number in one["keyslots"]), None)
        if slot["type"] != "luks2" or digest is None:
            continue
        size, area, splitter = int(slot["key_size"]), slot["area"], slot["af"]
        if size not in _KEY_BYTES or area["type"] != "raw" or splitter["type"] != "luks1":
            raise UnsupportedError("has a key slot of an unknown kind", feature="LUKS2 key slots", file=source.name)
        derived = _derived(source, slot["kdf"], passphrase, int(area["key_size"]))
        cipher, _, mode = str(area["encryption"]).partition("-")
        stripes = int(splitter["stripes"])
        material = _material(source, int(area["offset"]), size, stripes, SectorCipher(cipher, mode, derived))
        key = merged(material, size, stripes, splitter["hash"])
        wanted = base64.b64decode(digest["digest"])
        salt = base64.b64decode(digest["salt"])
        if _pbkdf2(source, digest["hash"], key, salt, int(digest["iterations"]), len(wanted)) == wanted:
            yield key


def _derived(source: ByteSource, kdf: dict[str, Any], passphrase: bytes, length: int) -> bytes:
    salt = base64.b64decode(kdf["salt"])
    if kdf["type"] == "pbkdf2":
        return _pbkdf2(source, kdf["hash"], passphrase, salt, int(kdf["iterations"]), length)
    time, memory, lanes = int(kdf["time"]), int(kdf["memory"]), int(kdf["cpus"])
    if not (0 < time <= 1000 and 0 < memory <= _MOST_MEMORY and 0 < lanes <= 64):
        raise _fault(source, f"asks for {time} rounds of Argon2 over {memory} KiB", s.JSON_OFFSET)
    from cryptography.hazmat.primitives.kdf import argon2  # noqa: PLC0415 - encrypted images only

    kinds = {"argon2id": "Argon2id", "argon2i": "Argon2i"}
    made = getattr(argon2, kinds.get(kdf["type"], ""), None)
    if made is None:
        raise UnsupportedError(f"derives keys by {kdf['type']}", feature=str(kdf["type"]), file=source.name)
    derived: bytes = made(salt=salt, length=length, iterations=time, lanes=lanes, memory_cost=memory).derive(passphrase)
    return derived
