"""The bytes of a new image's header and refcounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.allocator import Write
from diskmorph.formats.errors import TargetError
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.refcounts import PIECE, pack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.allocator import NewImage
    from diskmorph.formats.qcow2.header import Header
    from diskmorph.formats.qcow2.options import Shape
    from diskmorph.formats.qcow2.packing import Packer

_PEER_NAMES = {"vhd": "vpc"}
"""What QEMU calls formats that have another name here."""


@dataclass(frozen=True)
class RefcountLayout:
    """Where refcount blocks and the refcount table lie, all at the end of the file. In bytes, counts in clusters."""

    offset: int
    blocks: int
    table_clusters: int
    end: int

    @classmethod
    def after(cls, end: int, shape: Shape | Header) -> RefcountLayout:
        """Return the smallest layout behind `end` that counts every cluster, its own included."""
        cluster = shape.cluster
        per_block = cluster * 8 // shape.refcount_bits
        blocks = table = 0
        while True:
            total = end // cluster + blocks + table
            needed = -(-total // per_block)
            needed_table = -(-needed * 8 // cluster)
            if (needed, needed_table) == (blocks, table):
                return cls(end, blocks, table, total * cluster)
            blocks, table = max(blocks, needed), max(table, needed_table)

    def table_offset(self, cluster: int) -> int:
        """Return where the refcount table lies."""
        return self.offset + self.blocks * cluster


def refcount_writes(layout: RefcountLayout, shape: Shape, packer: Packer) -> Iterator[Write]:
    """Yield refcount blocks and table: 1 for every cluster of the file, but what the packer counted otherwise."""
    cluster = shape.cluster
    total = layout.end // cluster
    whole = layout.blocks * (cluster * 8 // shape.refcount_bits)
    for low in range(0, whole, PIECE):
        counts = np.zeros(min(PIECE, whole - low), np.uint64)
        used = max(min(total - low, len(counts)), 0)
        counts[:used] = 1
        packer.apply(low, counts[:used])
        yield Write(0, layout.offset + low * shape.refcount_bits // 8, pack(counts, shape.refcount_bits))
    table = np.arange(layout.blocks, dtype=np.uint64) * np.uint64(cluster) + np.uint64(layout.offset)
    yield Write(0, layout.table_offset(cluster), table.astype(s.ENTRY).tobytes())


def luks_size() -> int:
    """Return the bytes of a LUKS header with its key slots, which lies in the second cluster and those behind it."""
    from diskmorph.formats.luks.making import SIZE  # noqa: PLC0415 - encrypted images only

    return SIZE


def header_bytes(
    shape: Shape,
    image: NewImage,
    size: int,
    l1_offset: int,
    l1_size: int,
    layout: RefcountLayout,
    bitmaps: bytes | None = None,
) -> bytes:
    """Return the header with its extensions and the backing file's name: part of the first cluster.

    `bitmaps` is the data of the bitmaps extension.

    Raises TargetError where the name does not fit.
    """
    tail = s.EXTENSION.build({"type": s.EXT_END, "length": 0})
    backing = image.parent.name.encode("utf-8", "surrogateescape") if image.parent is not None else b""
    start = s.V2_LENGTH if shape.version == 2 else s.WRITTEN_LENGTH
    middle = _extension(s.EXT_BACKING_FORMAT, _backing_format(image)) if image.parent is not None else b""
    if shape.luks:
        middle += _extension(s.EXT_CRYPTO, s.CRYPTO.build({"offset": shape.cluster, "length": luks_size()}))
    middle += _extension(s.EXT_BITMAPS, bitmaps) if bitmaps is not None else b""
    names = _extension(s.EXT_FEATURE_NAMES, _feature_names()) if shape.version >= 3 else b""
    if start + len(middle + names + tail + backing) > shape.cluster:
        names = b""  # they only explain; QEMU leaves them out of small clusters too
    middle += names + tail
    if len(backing) > s.BACKING_NAME_MOST or start + len(middle) + len(backing) > shape.cluster:
        raise TargetError(
            f"the backing file's name is too long for clusters of {shape.cluster} bytes",
            file=image.name,
            format="qcow2",
            structure="header",
            field="backing_file_name",
            found=f"{len(backing)} bytes",
            hint="use a shorter name or larger clusters",
        )
    head = s.HEADER.build(
        {
            "version": shape.version,
            "backing_offset": start + len(middle) if backing else 0,
            "backing_length": len(backing),
            "cluster_bits": shape.cluster.bit_length() - 1,
            "size": size,
            "crypt_method": s.CRYPT_LUKS if shape.luks else 0,
            "l1_size": l1_size,
            "l1_offset": l1_offset,
            "refcount_offset": layout.table_offset(shape.cluster),
            "refcount_clusters": layout.table_clusters,
            "snapshot_count": 0,
            "snapshot_offset": 0,
        }
    )
    return head + _version_3(shape, s.AUTOCLEAR_BITMAPS if bitmaps is not None else 0) + middle + backing


def _version_3(shape: Shape, autoclear: int) -> bytes:
    if shape.version == 2:
        return b""
    features = {
        "incompatible": s.COMPRESSION * shape.zstd | s.EXTENDED_L2 * shape.extended,
        "compatible": s.LAZY_REFCOUNTS * shape.lazy,
        "autoclear": autoclear,
        "refcount_order": shape.refcount_bits.bit_length() - 1,
        "header_length": s.WRITTEN_LENGTH,
    }
    return s.HEADER_V3.build(features) + s.HEADER_MORE.build({"compression": int(shape.zstd)})


def _extension(kind: int, data: bytes) -> bytes:
    return s.EXTENSION.build({"type": kind, "length": len(data)}) + data + bytes(-len(data) % 8)


def _backing_format(image: NewImage) -> bytes:
    word = image.parent.format if image.parent is not None else ""
    return backing_format_name(word).encode()


def backing_format_name(format: str) -> str:
    """Return what QEMU calls a format."""
    return _PEER_NAMES.get(format, format)


def _feature_names() -> bytes:
    return b"".join(
        s.FEATURE_NAME.build({"type": kind, "bit": bit, "name": name.encode().ljust(46, b"\0")})
        for kind, bit, name in s.FEATURE_NAMES
    )
