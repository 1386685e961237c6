"""qcow version 1 for the contract suite; `handmade` puts images together byte by byte."""

import struct
import zlib
from pathlib import Path

from testkit import KIB, MIB, DiskCase, content, data, little_disk, run

PACKED = 1 << 63


def handmade(path, size, entries, pieces, *, bits=12, l2_bits=9, crypt=0, backing=b"", end=None):
    """A qcow file whose L2 entry of guest cluster N is entries[N]; `pieces` maps offsets in the file to bytes.

    The L1 table lies at 4096, the L2 tables follow at 64 KiB; data belongs from 1 MiB on.
    """
    per_table = 1 << l2_bits
    count = -(-size // (per_table << bits))
    tables = [bytearray(8 * per_table) for _ in range(count)]
    for number, entry in entries.items():
        struct.pack_into(">Q", tables[number // per_table], number % per_table * 8, entry)
    places = [64 * KIB + index * 8 * per_table if any(table) else 0 for index, table in enumerate(tables)]
    head = struct.pack(
        ">4sIQIIQBBHIQ", b"QFI\xfb", 1, 48 if backing else 0, len(backing), 0, size, bits, l2_bits, 0, crypt, 4096
    )
    with open(path, "wb") as file:
        file.write(head + backing)
        file.seek(4096)
        file.write(struct.pack(f">{count}Q", *places))
        file.truncate(MIB)
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


def peers(folder: Path):
    raw = folder / "disk.raw"
    raw.write_bytes(want := content(little_disk(5 * MIB + 512)))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow", raw, folder / "disk.qcow")
    return folder / "disk.qcow", want


def permuted(folder: Path):
    """Clusters in reverse places, some compressed side by side, holes between them, several L2 tables."""
    cluster, count = 4096, 300
    size = count * cluster - 1000
    want = bytearray(count * cluster)
    entries, pieces, at = {}, {}, 4 * MIB + 13
    for number in range(count):
        unit = data(number, cluster) if number % 4 < 2 else (b"%05d text " % number * 500)[:cluster]
        if number % 4 == 3:
            continue
        if number % 4 == 2:
            stream = raw_deflate(unit)
            entries[number] = PACKED | len(stream) << (63 - 12) | at
            pieces[at] = stream
            at += len(stream)
        else:
            place = MIB + (count - number) * cluster
            entries[number] = place
            pieces[place] = unit
        want[number * cluster : (number + 1) * cluster] = unit
    return handmade(folder / "permuted.qcow", size, entries, pieces, l2_bits=6, end=at), bytes(want[:size])


DISKS = [DiskCase("qemu-img", peers), DiskCase("permuted", permuted)]
ALLOCATORS = []
