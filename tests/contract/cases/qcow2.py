"""qcow2 for the contract suite; `handmade` puts images together byte by byte, for what qemu-img does not write."""

import struct
import zlib
from pathlib import Path

from diskmorph.formats.extents import DEFLATE, ZSTD

from testkit import KIB, MIB, AllocatorCase, DiskCase, content, data, little_disk, run

COPIED, PACKED = 1 << 63, 1 << 62


def handmade(
    path,
    size,
    entries,
    pieces,
    *,
    bits=16,
    version=3,
    features=(0, 0, 0),
    extensions=(),
    backing=b"",
    crypt=0,
    order=4,
    compression=None,
    end=None,
):
    """A qcow2 file whose L2 entry of guest cluster N is entries[N] (a number, or two where extended).

    `pieces` maps offsets in the file to bytes. Cluster 0 is the header, 1 the refcount table, 2 its block, 3 the L1
    table, the L2 tables follow from 4 on; data belongs from cluster 32 on. Refcounts are not kept.
    """
    cluster = 1 << bits
    width = 16 if features[0] & 16 else 8
    per_table = cluster // width
    count = max(-(-size // (cluster * per_table)), 1)
    tables = [bytearray(cluster) for _ in range(count)]
    for number, entry in entries.items():
        words = entry if isinstance(entry, tuple) else (entry,)
        struct.pack_into(f">{len(words)}Q", tables[number // per_table], number % per_table * width, *words)
    used = [any(table) for table in tables]
    places = [(4 + sum(used[:index])) * cluster if used[index] else 0 for index in range(count)]
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 0, 0, bits, size, crypt, count, 3 * cluster, cluster, 1, 0, 0
    )
    if version == 3:
        length = 104 if compression is None else 112
        head += struct.pack(">QQQII", *features, order, length)
        head += b"" if compression is None else bytes([compression]) + bytes(7)
    for kind, body in (*extensions, (0, b"")):
        head += struct.pack(">II", kind, len(body)) + body + bytes(-len(body) % 8)
    if backing:
        head = head[:8] + struct.pack(">QI", len(head), len(backing)) + head[20:] + backing
    with open(path, "wb") as file:
        file.write(head)
        file.seek(cluster)
        file.write(struct.pack(">Q", 2 * cluster))
        file.seek(3 * cluster)
        file.write(struct.pack(f">{count}Q", *(place and place | COPIED for place in places)))
        file.truncate(max(32, 4 + count) * cluster)
        for place, table in zip(places, tables, strict=True):
            if place:
                file.seek(place)
                file.write(table)
        for offset, piece in pieces.items():
            file.seek(offset)
            file.write(piece)
        if end is not None:
            file.truncate(end)
    return path


def raw_deflate(unit):
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    return packer.compress(unit) + packer.flush()


def zstd(unit):
    import zstandard

    return zstandard.ZstdCompressor(3).compress(unit)


def packed_entry(offset, size, bits):
    return PACKED | ((offset + size - 1) // 512 - offset // 512) << (62 - (bits - 8)) | offset


def peers(options, *words, size=5 * MIB + 512):
    def make(folder: Path):
        raw = folder / "disk.raw"
        raw.write_bytes(want := content(little_disk(size)))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *words, "-o", options, raw, folder / "disk.qcow2")
        return folder / "disk.qcow2", want

    return make


def permuted(folder: Path):
    """64 clusters of 4 KiB in reverse and shuffled places, with holes, both kinds of zero, and several L2 tables."""
    cluster, count = 4096, 1200
    size = count * cluster - 1536
    entries, pieces, want = {}, {}, bytearray(size + cluster)
    for number in range(count):
        place = (32 + (count - 1 - number) ^ 5) * cluster
        kind = number % 7
        if kind in {0, 1, 2, 3}:
            entries[number] = place | COPIED
            pieces[place] = piece = data(number, cluster)
            want[number * cluster : (number + 1) * cluster] = piece
        elif kind == 4:
            entries[number] = 1
        elif kind == 5:
            entries[number] = place | COPIED | 1
            pieces[place] = b"\xff" * cluster
    return handmade(folder / "permuted.qcow2", size, entries, pieces, bits=12), bytes(want[:size])


def subclusters(folder: Path):
    """Extended entries of every shape: mixed bitmaps, whole ones, one compressed, a partial last cluster."""
    cluster, sub = 1 << 14, 512
    size = 9 * cluster + 700
    want = bytearray(10 * cluster)
    unit = (b"packed %04d " * 2000)[:cluster]
    stream = raw_deflate(unit)
    bitmaps = {0: 0xFFFFFFFF, 1: 0x0F0F << 32 | 0xF0F0, 2: 0xFFFFFFFF << 32, 3: 1, 4: 1 << 31, 6: 0x5555_5555, 9: 3}
    entries, pieces = {}, {}
    for number, bitmap in bitmaps.items():
        place = (40 - number) * cluster
        entries[number] = (place | COPIED, bitmap)
        pieces[place] = piece = data(number, cluster)
        for index in range(32):
            if bitmap >> index & 1:
                at = number * cluster + index * sub
                want[at : at + sub] = piece[index * sub : (index + 1) * sub]
    odd = 45 * cluster + 100
    entries[7] = (packed_entry(odd, len(stream), 14), 0)
    pieces[odd] = stream
    want[7 * cluster : 8 * cluster] = unit
    path = handmade(folder / "subclusters.qcow2", size, entries, pieces, bits=14, features=(16, 0, 0))
    return path, bytes(want[:size])


def crossing(folder: Path):
    """Compressed clusters that share host clusters and run over their ends, the file ending right behind the last."""
    cluster = 1 << 12
    units = [(b"unit %06d " % number * 400)[:cluster] for number in range(200)]
    at = 32 * cluster + 77
    entries, pieces = {}, {}
    for number, unit in enumerate(units):
        stream = raw_deflate(unit)
        entries[199 - number] = packed_entry(at, len(stream), 12)
        pieces[at] = stream
        at += len(stream)
    want = b"".join(reversed(units))
    return handmade(folder / "crossing.qcow2", len(want), entries, pieces, bits=12, end=at), want


def short_tail(folder: Path):
    """A file that ends inside its last data cluster, where the disk ends: behind it nothing was ever written."""
    cluster = 1 << 16
    entries = {2: 32 * cluster | COPIED, 5: 33 * cluster | COPIED}
    first, last = data("first", cluster), data("last", 5120)
    path = handmade(
        folder / "short.qcow2",
        5 * cluster + 5120,
        entries,
        {32 * cluster: first, 33 * cluster: last},
        end=33 * cluster + 5120,
    )
    want = bytearray(5 * cluster + 5120)
    want[2 * cluster : 3 * cluster] = first
    want[5 * cluster :] = last
    return path, bytes(want)


def snapshot(folder: Path):
    """A snapshot taken before the disk grew and was written to."""
    path = folder / "snapshot.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "3M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 1M", "-c", "write -P 8 2M 12k", path)
    run("qemu-img", "snapshot", "-c", "before", path)
    run("qemu-img", "resize", "-q", path, "5M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 2M", "-c", "write -P 3 4M 64k", path)
    want = bytearray(3 * MIB)
    want[64 * KIB : 64 * KIB + MIB] = b"\7" * MIB
    want[2 * MIB : 2 * MIB + 12 * KIB] = b"\10" * (12 * KIB)
    return path, bytes(want)


DISKS = [
    DiskCase("version 3", peers("compat=1.1")),
    DiskCase("version 2", peers("compat=0.10")),
    DiskCase("clusters of 512", peers("cluster_size=512", size=MIB + 512)),
    DiskCase("clusters of 2M", peers("cluster_size=2M")),
    DiskCase("deflate", peers("cluster_size=4k", "-c")),
    DiskCase("zstd", peers("compression_type=zstd", "-c")),
    DiskCase("extended", peers("extended_l2=on")),
    DiskCase("permuted", permuted),
    DiskCase("subclusters", subclusters),
    DiskCase("crossing", crossing),
    DiskCase("short tail", short_tail),
    DiskCase("snapshot", snapshot, {"snapshot": "before"}),
]


def case(name, options, codec=None):
    encode = {None: None, DEFLATE: raw_deflate, ZSTD: zstd}[codec]
    return AllocatorCase(name, "qcow2", options, peer="qcow2", codec=codec, encode=encode)


ALLOCATORS = [
    case("version 3", {}),
    case("version 2", {"compat": "0.10"}),
    case("clusters of 512", {"cluster_size": "512"}),
    case("clusters of 2M", {"cluster_size": "2M"}),
    case("extended", {"extended_l2": "on"}),
    case("extended 16K", {"extended_l2": "on", "cluster_size": "16K"}),
    case("refcounts of 1 bit", {"refcount_bits": "1", "cluster_size": "4K"}),
    case("refcounts of 64 bits", {"refcount_bits": "64", "lazy_refcounts": "on"}),
    case("deflate", {}, DEFLATE),
    case("deflate, 512", {"cluster_size": "512"}, DEFLATE),
    case("deflate, refcounts of 1 bit", {"refcount_bits": "1"}, DEFLATE),
    case("deflate, extended", {"extended_l2": "on"}, DEFLATE),
    case("deflate, version 2", {"compat": "v2"}, DEFLATE),
    case("zstd", {}, ZSTD),
    case("preallocation=metadata", {"preallocation": "metadata"}),
    case("preallocation=falloc", {"preallocation": "falloc", "extended_l2": "on"}),
    case("preallocation=full", {"preallocation": "full", "compat": "0.10"}),
]

__all__ = ["ALLOCATORS", "DISKS", "handmade", "packed_entry", "raw_deflate"]
