"""XXH64 (xxHash specification 0.1.1), as btrfs seals blocks with it: seed 0."""

from __future__ import annotations

import struct

_MASK = (1 << 64) - 1
_P1, _P2, _P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P4, _P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def xxh64(data: bytes) -> int:
    """Return the hash of some bytes."""
    size = len(data)
    whole = size & ~31
    value = _stripes(data, whole) if whole else _P5
    value = value + size & _MASK
    at = whole
    for _ in range((size - at) // 8):
        value ^= _rounded(0, int.from_bytes(data[at : at + 8], "little"))
        value = (_rotated(value, 27) * _P1 + _P4) & _MASK
        at += 8
    if size - at >= 4:
        value ^= int.from_bytes(data[at : at + 4], "little") * _P1 & _MASK
        value = (_rotated(value, 23) * _P2 + _P3) & _MASK
        at += 4
    for byte in data[at:]:
        value = _rotated(value ^ byte * _P5 & _MASK, 11) * _P1 & _MASK
    value = (value ^ value >> 33) * _P2 & _MASK
    value = (value ^ value >> 29) * _P3 & _MASK
    return value ^ value >> 32


def _rotated(value: int, bits: int) -> int:
    return (value << bits | value >> 64 - bits) & _MASK


def _rounded(lane: int, word: int) -> int:
    return _rotated(lane + word * _P2 & _MASK, 31) * _P1 & _MASK


def _stripes(data: bytes, whole: int) -> int:
    """Return what stripes of 32 bytes come to, four lanes side by side."""
    a, b, c, d = (_P1 + _P2) & _MASK, _P2, 0, -_P1 & _MASK
    for w, x, y, z in struct.iter_unpack("<4Q", memoryview(data)[:whole]):
        a = a + w * _P2 & _MASK
        a = (a << 31 | a >> 33) * _P1 & _MASK
        b = b + x * _P2 & _MASK
        b = (b << 31 | b >> 33) * _P1 & _MASK
        c = c + y * _P2 & _MASK
        c = (c << 31 | c >> 33) * _P1 & _MASK
        d = d + z * _P2 & _MASK
        d = (d << 31 | d >> 33) * _P1 & _MASK
    value = (_rotated(a, 1) + _rotated(b, 7) + _rotated(c, 12) + _rotated(d, 18)) & _MASK
    for lane in (a, b, c, d):
        value = ((value ^ _rounded(0, lane)) * _P1 + _P4) & _MASK
    return value
