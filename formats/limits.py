"""How much an image may ask of the machine that reads it. docs/limits.md explains each figure."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB, TIB, PIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40, 1 << 50


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what hostile input may cost; passed down from every `open_*` function. Sizes are in bytes."""

    virtual_size: int = 4 * PIB
    """The size of a disk, of which every part is looked at, though it may hold nothing."""
    resident_table: int = 64 * MIB
    """First-level tables that are held in memory at once (an L1 table, a BAT, a grain directory)."""
    chain_depth: int = 64
    """Images in one chain of backing files, deltas or differencing disks."""
    descriptor: int = 4 * MIB
    """Text descriptors: VMDK descriptor files, OVF envelopes."""
    xml_depth: int = 64
    directory_entries: int = 1_000_000
    """Entries of one ISO or one directory tree."""
    snapshots: int = 65_536
    header_extensions: int = 256
    decoded_unit: int = 4 * MIB
    """Decoded size of one compressed unit (cluster, grain)."""
    expansion: int = 1100
    """Decoded bytes for each stored byte, of whole compressed streams; deflate itself cannot pass 1032."""
    log_bytes: int = 256 * MIB
    """A VHDX log that is replayed in memory."""
    members: int = 4096
    """Extent files of one disk, members of one package."""
    open_files: int = 128
    """Files held open at once by one disk; the others are reopened when read."""
