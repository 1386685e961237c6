"""LUKS on disk: the header of version 1 and the binary header of version 2. Numbers are big-endian.

"LUKS On-Disk Format Specification" 1.2.3 (version 1), "LUKS2 On-Disk Format Specification" 1.1.1.
"""

from __future__ import annotations

from construct import Array, Bytes, Int16ub, Int32ub, Int64ub, Struct

MAGIC = b"LUKS\xba\xbe"
SECTOR = 512

KEY_SLOT = Struct(
    "active" / Int32ub,  # ACTIVE or 0x0000dead
    "iterations" / Int32ub,  # of PBKDF2
    "salt" / Bytes(32),
    "offset" / Int32ub,  # of the key material, in sectors from the header
    "stripes" / Int32ub,  # of the anti-forensic splitter
)
ACTIVE = 0x00AC71F3

HEADER1 = Struct(
    "magic" / Bytes(6),
    "version" / Int16ub,  # 1
    "cipher" / Bytes(32),  # "aes"
    "mode" / Bytes(32),  # "xts-plain64"
    "hash" / Bytes(32),  # "sha256", for PBKDF2 and the splitter
    "payload_offset" / Int32ub,  # sectors
    "key_bytes" / Int32ub,
    "digest" / Bytes(20),  # PBKDF2 of the key
    "digest_salt" / Bytes(32),
    "digest_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "slots" / Array(8, KEY_SLOT),
)

HEADER2 = Struct(
    "magic" / Bytes(6),
    "version" / Int16ub,  # 2
    "size" / Int64ub,  # bytes of this header with its JSON area
    "sequence" / Int64ub,
    "label" / Bytes(48),
    "checksum_name" / Bytes(32),  # "sha256"
    "salt" / Bytes(64),
    "uuid" / Bytes(40),
    "subsystem" / Bytes(48),
    "offset" / Int64ub,  # of this header in the device
    "padding" / Bytes(184),
    "checksum" / Bytes(64),  # of the whole header with this field zeroed
)
JSON_OFFSET = 4096
