"""The structures of VMDK files. All numbers are little-endian; offsets and lengths are in sectors of 512 bytes.

"VDF" is VMware's technical note "Virtual Disk Format 5.0". seSparse is not in it; its layout is the one that VMware's
and other vendors' tools agree on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import construct as cs
import numpy as np
from construct_typed import DataclassMixin, DataclassStruct, csfield, csfield_const, csfield_default

SECTOR: Final = 512

HOSTED_MAGIC: Final = b"KDMV"
COWD_MAGIC: Final = b"COWD"
SESPARSE_MAGIC: Final = b"\xbe\xba\xfe\xca\0\0\0\0"

# SparseHeader.flags (VDF "Hosted Sparse Extent Header")
FLAG_NEWLINES: Final = 1 << 0  # the newline test bytes are valid
FLAG_REDUNDANT: Final = 1 << 1  # rgd_offset is valid
FLAG_ZEROED_GRAIN: Final = 1 << 2  # grain table entry 1 means a grain of zeroes
FLAG_COMPRESSED: Final = 1 << 16  # grains are compressed
FLAG_MARKERS: Final = 1 << 17  # markers identify every block of metadata and data
KNOWN_FLAGS: Final = FLAG_NEWLINES | FLAG_REDUNDANT | FLAG_ZEROED_GRAIN | FLAG_COMPRESSED | FLAG_MARKERS

NEWLINES: Final = b"\n \r\n"
DIRECTORY_AT_END: Final = 0xFFFFFFFFFFFFFFFF
COMPRESSION_NONE, COMPRESSION_DEFLATE = 0, 1
UNCLEAN_AT: Final = 72
"""Byte offset of SparseHeader.unclean."""


@dataclass
class SparseHeader(DataclassMixin):
    """Header of a hosted sparse extent, and footer of a stream (VDF "Hosted Sparse Extent Header"): 512 bytes."""

    magic: bytes = csfield_const(cs.Bytes(4), HOSTED_MAGIC)
    version: int = csfield(cs.Int32ul)  # 1; 2: zeroed grains; 3: streamOptimized
    flags: int = csfield(cs.Int32ul)
    capacity: int = csfield(cs.Int64ul)  # sectors of the disk that the extent holds
    grain_size: int = csfield(cs.Int64ul)  # sectors, a power of two above 4
    descriptor_offset: int = csfield(cs.Int64ul)  # of the embedded descriptor, 0 if none
    descriptor_size: int = csfield(cs.Int64ul)
    table_entries: int = csfield(cs.Int32ul)  # entries in a grain table: 512
    rgd_offset: int = csfield(cs.Int64ul)  # redundant grain directory
    gd_offset: int = csfield(cs.Int64ul)  # grain directory; DIRECTORY_AT_END: the footer says
    overhead: int = csfield(cs.Int64ul)  # sectors before the first grain
    unclean: int = csfield(cs.Int8ul)  # 1 while the disk is open for writing
    newlines: bytes = csfield(cs.Bytes(4))  # broken by a transfer in text mode
    compression: int = csfield(cs.Int16ul)
    padding: bytes = csfield_default(cs.Bytes(433), default=bytes(433))


@dataclass
class Marker(DataclassMixin):
    """A metadata marker of a stream (VDF "Stream-Optimized Compressed Sparse Extents"): one sector."""

    sectors: int = csfield(cs.Int64ul)  # of the metadata that follows
    size: int = csfield(cs.Int32ul)  # 0; otherwise it is a grain marker
    type: int = csfield(cs.Int32ul)
    padding: bytes = csfield_default(cs.Bytes(496), default=bytes(496))


END_OF_STREAM, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)


@dataclass
class GrainMarker(DataclassMixin):
    """What stands before each compressed grain (VDF "Grain Marker"); the zlib stream follows at once."""

    lba: int = csfield(cs.Int64ul)  # first sector of the grain, in the extent
    size: int = csfield(cs.Int32ul)  # bytes of the zlib stream


GRAIN_MARKER: Final = np.dtype([("lba", "<u8"), ("size", "<u4")])
MARKER_BYTES: Final = GRAIN_MARKER.itemsize


@dataclass
class CowdHeader(DataclassMixin):
    """Header of a vmfsSparse extent (VDF "ESX Server Sparse Extents"): four sectors.

    `parent` is the geometry in a root disk: cylinders, heads, sectors.
    """

    magic: bytes = csfield_const(cs.Bytes(4), COWD_MAGIC)
    version: int = csfield(cs.Int32ul)  # 1
    flags: int = csfield(cs.Int32ul)  # 3
    capacity: int = csfield(cs.Int32ul)
    grain_size: int = csfield(cs.Int32ul)  # sectors, usually 1
    gd_offset: int = csfield(cs.Int32ul)  # 4
    gd_entries: int = csfield(cs.Int32ul)
    free_sector: int = csfield(cs.Int32ul)  # where the next grain or table will go
    parent: bytes = csfield(cs.Bytes(1024))
    parent_generation: int = csfield(cs.Int32ul)
    generation: int = csfield(cs.Int32ul)
    name: bytes = csfield(cs.Bytes(60))
    description: bytes = csfield(cs.Bytes(512))
    saved_generation: int = csfield(cs.Int32ul)
    reserved: bytes = csfield(cs.Bytes(8))
    unclean: int = csfield(cs.Int32ul)  # 1 while the disk is open for writing
    padding: bytes = csfield_default(cs.Bytes(396), default=bytes(396))


COWD_TABLE_ENTRIES: Final = 4096


@dataclass
class SeSparseHeader(DataclassMixin):
    """Constant header of an seSparse extent: one sector. All offsets and sizes in sectors."""

    magic: bytes = csfield_const(cs.Bytes(8), SESPARSE_MAGIC)
    version: int = csfield(cs.Int64ul)  # 0x0000000200000001
    capacity: int = csfield(cs.Int64ul)
    grain_size: int = csfield(cs.Int64ul)  # 8
    table_size: int = csfield(cs.Int64ul)  # 64: 4096 entries of 8 bytes
    flags: int = csfield(cs.Int64ul)  # 0
    reserved: bytes = csfield(cs.Bytes(32))
    volatile_offset: int = csfield(cs.Int64ul)
    volatile_size: int = csfield(cs.Int64ul)
    journal_header_offset: int = csfield(cs.Int64ul)
    journal_header_size: int = csfield(cs.Int64ul)
    journal_offset: int = csfield(cs.Int64ul)
    journal_size: int = csfield(cs.Int64ul)
    gd_offset: int = csfield(cs.Int64ul)
    gd_size: int = csfield(cs.Int64ul)
    tables_offset: int = csfield(cs.Int64ul)
    tables_size: int = csfield(cs.Int64ul)
    free_bitmap_offset: int = csfield(cs.Int64ul)
    free_bitmap_size: int = csfield(cs.Int64ul)
    backmap_offset: int = csfield(cs.Int64ul)
    backmap_size: int = csfield(cs.Int64ul)
    grains_offset: int = csfield(cs.Int64ul)
    grains_size: int = csfield(cs.Int64ul)
    padding: bytes = csfield_default(cs.Bytes(304), default=bytes(304))


SESPARSE_VERSION: Final = 0x0000000200000001


@dataclass
class SeSparseVolatileHeader(DataclassMixin):
    """Header of an seSparse extent that changes while it is written: one sector."""

    magic: int = csfield_const(cs.Int64ul, 0xCAFECAFE)
    free_table: int = csfield(cs.Int64ul)
    next_sequence: int = csfield(cs.Int64ul)
    replay_journal: int = csfield(cs.Int64ul)  # not 0: the journal holds changes that the tables lack
    padding: bytes = csfield_default(cs.Bytes(480), default=bytes(480))


SPARSE_HEADER: Final = DataclassStruct(SparseHeader)
MARKER: Final = DataclassStruct(Marker)
GRAIN_MARKER_STRUCT: Final = DataclassStruct(GrainMarker)
COWD_HEADER: Final = DataclassStruct(CowdHeader)
SESPARSE_HEADER: Final = DataclassStruct(SeSparseHeader)
SESPARSE_VOLATILE: Final = DataclassStruct(SeSparseVolatileHeader)

# Grain directory and table entries (VDF "Hosted Sparse Extent Metadata"): sectors; 0: not allocated.
ENTRY: Final = np.dtype("<u4")
ENTRY_STRUCT: Final = cs.Int32ul
# seSparse entries: a state in the top 4 bits.
WIDE_ENTRY: Final = np.dtype("<u8")
WIDE_ENTRY_STRUCT: Final = cs.Int64ul
UNALLOCATED, UNMAPPED, ZEROED, ALLOCATED = range(4)
"""States of seSparse grain table entries; directory entries know UNALLOCATED and 1."""
