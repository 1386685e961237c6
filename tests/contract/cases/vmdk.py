"""VMDK for the contract suite: every subformat, by qemu-img and by hand, and every way to write one."""

import random
import zlib
from pathlib import Path

import vmdkmade
from vmdkmade import ZEROED, Hosted, Stream

from diskmorph.formats.extents import ZLIB

from testkit import KIB, MIB, AllocatorCase, DiskCase, content, data, little_disk, run

SIZE = 9 * MIB + 1536
GRAIN = 64 * KIB
SUBFORMATS = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized")


def by_qemu(subformat):
    def make(folder: Path) -> tuple[Path, bytes]:
        raw, path = folder / "disk.raw", folder / "disk.vmdk"
        want = content(little_disk(SIZE))
        raw.write_bytes(want)
        run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, path)
        return path, want

    return make


def grains_of(seed, numbers, size=GRAIN):
    return {n: data((seed, n), size) for n in numbers}


def permuted(folder: Path) -> tuple[Path, bytes]:
    """Grains in another order than the disk's, a renamed file, a partial last grain, a header of version 2."""
    numbers = [n for n in range(20) if n % 5]
    order = list(range(len(numbers)))
    random.Random("vmdk").shuffle(order)
    capacity = 20 * 128 - 125
    grains = {**grains_of("permuted", numbers), 5: ZEROED}
    text = vmdkmade.words([f'RW {capacity} SPARSE "another name.vmdk"'])
    made = Hosted(capacity, grains, order=order, text=text, version=2, flags=7)
    path = folder / "permuted.vmdk"
    path.write_bytes(made.build())
    return path, made.content()


def small_tables(folder: Path) -> tuple[Path, bytes]:
    """Grains of 8 sectors, tables of 24 entries in reverse order, some of them missing."""
    numbers = [0, 1, 23, 24, 25, 100, 101, 102, 103, 239]
    capacity = 240 * 8 - 3
    made = Hosted(
        capacity,
        grains_of("small", numbers, 4096),
        grain=8,
        entries=24,
        sparse_tables=True,
        text=vmdkmade.words([f'RW {capacity} SPARSE "x.vmdk"']),
    )
    path = folder / "small.vmdk"
    path.write_bytes(made.build())
    return path, made.content()


def stream(form, **more):
    def make(folder: Path) -> tuple[Path, bytes]:
        capacity = 1100 * 128 - 60
        grains = {
            0: data("a", GRAIN),
            1: b"text " * 100,
            2: data("b", GRAIN),
            511: b"x",
            600: b"y" * GRAIN,
            1099: data("c", 34816),
        }
        text = vmdkmade.words([f'RDONLY {capacity} SPARSE "generated-stream.vmdk"'], "streamOptimized")
        made = Stream(capacity, grains, form=form, text=text, **more)
        path = folder / "stream.vmdk"
        path.write_bytes(made.build())
        return path, made.content()

    return make


def mixed(folder: Path) -> tuple[Path, bytes]:
    """Every kind of extent in one disk: sizes that no grain divides, tabs, comments, an offset, zeroes between."""
    flat = data("flat", 40_960)
    (folder / "flat.bin").write_bytes(flat)
    hosted = Hosted(200, grains_of("hosted", [1], GRAIN), text=None)
    (folder / "sparse.vmdk").write_bytes(hosted.build())
    cowd = grains_of("cowd", [0, 7, 4095, 4096, 4500], 512)
    (folder / "cowd.vmdk").write_bytes(vmdkmade.cowd(4700, cowd, order=[4, 2, 0, 1, 3]))
    wide = {0: data("s0", 4096), 3: ZEROED, 4: "unmapped", 4097: data("s1", 4096)}
    (folder / "wide.vmdk").write_bytes(vmdkmade.sesparse(4100 * 8 + 5, wide, order=[1, 0]))
    lines = [
        'RW 16\tFLAT "flat.bin"   16  ',
        "",
        "# a remark",
        "RW 33 ZERO",
        'RDONLY 200 SPARSE "sparse.vmdk"',
        'RW 4700 VMFSSPARSE "cowd.vmdk"',
        'rw  1 VMFS "flat.bin"',
        f'RW {4100 * 8 + 5} SESPARSE "wide.vmdk"',
    ]
    path = vmdkmade.descriptor(folder / "disk.vmdk", lines, "custom")
    cowd_want, wide_want = bytearray(4700 * 512), bytearray((4100 * 8 + 5) * 512)
    for n, piece in cowd.items():
        cowd_want[n * 512 : n * 512 + 512] = piece
    for n in (0, 4097):
        wide_want[n * 4096 : n * 4096 + 4096] = wide[n]
    pieces = (flat[8192:16384], bytes(33 * 512), hosted.content(), bytes(cowd_want), flat[:512], bytes(wide_want))
    return path, b"".join(pieces)


def bare(folder: Path) -> tuple[Path, bytes]:
    made = Hosted(1000, grains_of("bare", [0, 3], GRAIN), text=None)
    path = folder / "disk-s001.vmdk"
    path.write_bytes(made.build())
    return path, made.content()


DISKS = [
    *(DiskCase(f"qemu-img {word}", by_qemu(word)) for word in SUBFORMATS),
    DiskCase("permuted grains", permuted),
    DiskCase("small grains and tables", small_tables),
    DiskCase("stream with a footer", stream("footer")),
    DiskCase("stream without a footer", stream("header", version=1)),
    DiskCase("stream in another order", stream("footer", order=(2, 0, 1, 511, 600, 1099), level=0, version=2)),
    DiskCase("every kind of extent", mixed),
    DiskCase("a bare extent", bare),
]
ALLOCATORS = [
    *(AllocatorCase(word, "vmdk", {"subformat": word}, peer="vmdk") for word in (*SUBFORMATS[:4], "vmfs", "vmfsThin")),
    AllocatorCase(
        "streamOptimized", "vmdk", {"subformat": "streamOptimized"}, peer="vmdk", codec=ZLIB, encode=zlib.compress
    ),
    AllocatorCase("zeroed grains", "vmdk", {"zeroed_grain": "on"}, peer="vmdk"),
    AllocatorCase("ide", "vmdk", {"adapter_type": "ide", "hwversion": "13", "toolsversion": "10"}, peer="vmdk"),
    AllocatorCase("full flat", "vmdk", {"subformat": "monolithicFlat", "preallocation": "full"}, peer="vmdk"),
]
