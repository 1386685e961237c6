"""One wound for each rule of each format: what is done to a good image, whether it can be mended, whether qemu-img sees it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import vhdxmade
from contract.cases.vhd import sealed
from vhdxmade import BAT_AT, FULL, Made

from testkit import MIB, content, data, little_disk, run

Blob = bytearray
C = 1 << 16
MASK = 0x00FF_FFFF_FFFF_FE00
FINDS, MISSES, NONE = "finds it", "misses it", "has no check"


class Wound(NamedTuple):
    """`base` names the good image; `peer` is what qemu-img check 7.2 makes of the wound (refusing it is finding it); `mends`: --repair all heals it."""

    format: str
    rule: str
    base: str
    hurt: Callable[[Blob], None]
    peer: str
    mends: bool = False
    repair: str = "all"
    heals: bool = True
    """Whether a mended image reads as before the wound: else only its structure is whole again."""
    warns: bool = False
    """Whether the check only warns: nothing is lost, but something waits to be done."""


def get(blob: Blob, at: int, form: str = ">Q") -> int:
    return int(struct.unpack_from(form, blob, at)[0])


def put(form: str, at: Callable[[Blob], int] | int, value: Callable[[Blob], int] | int) -> Callable[[Blob], None]:
    def hurt(blob: Blob) -> None:
        where = at(blob) if callable(at) else at
        struct.pack_into(form, blob, where, value(blob) if callable(value) else value)

    return hurt


# --- good images


def peer_made(format: str, *words: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        raw, path = folder / "disk.raw", folder / f"disk.{format}"
        raw.write_bytes(content(little_disk(3 * MIB)))
        run("qemu-img", "convert", "-f", "raw", "-O", format, *words, raw, path)
        return path

    return make


def snapshot(folder: Path) -> Path:
    path = peer_made("qcow2")(folder)
    run("qemu-img", "snapshot", "-c", "before", path)
    return path


def bitmap(folder: Path) -> Path:
    path = peer_made("qcow2")(folder)
    run("qemu-img", "bitmap", "--add", path, "monday")
    return path


def vhdx(folder: Path) -> Path:
    blocks = {n: (FULL, data(("wound", n), MIB), None) for n in range(3)}
    path = folder / "disk.vhdx"
    path.write_bytes(Made(3 * MIB, blocks).build())
    (folder / "disk.raw").write_bytes(b"".join(blocks[n][1] for n in range(3)))
    return path


BASES: dict[str, Callable[[Path], Path]] = {
    "qcow2": peer_made("qcow2"),
    "qcow2 v2": peer_made("qcow2", "-o", "compat=0.10"),
    "qcow2 extended": peer_made("qcow2", "-o", "extended_l2=on"),
    "qcow2 deflate": peer_made("qcow2", "-c"),
    "qcow2 snapshot": snapshot,
    "qcow2 bitmap": bitmap,
    "vmdk": peer_made("vmdk"),
    "vmdk stream": peer_made("vmdk", "-o", "subformat=streamOptimized"),
    "vdi": peer_made("vdi"),
    "vpc": peer_made("vpc", "-o", "force_size=on"),
    "vhdx": vhdx,
    "parallels": peer_made("parallels"),
    "qcow": peer_made("qcow"),
}


# --- places


def l2(blob: Blob) -> int:
    return get(blob, get(blob, 40)) & MASK


def block(blob: Blob) -> int:
    return get(blob, get(blob, 48))


def used(blob: Blob) -> int:
    """The number of the first data cluster."""
    return (get(blob, l2(blob)) & MASK) // C


def free_cluster(blob: Blob) -> int:
    blob += bytes(-len(blob) % C + C)
    return len(blob) // C - 1


def leak(blob: Blob) -> None:
    put(">H", lambda b: block(b) + 2 * free_cluster(b), 1)(blob)


def extension(blob: Blob, kind: int) -> int:
    return blob.index(struct.pack(">I", kind), 104) + 8


def cut(count: int) -> Callable[[Blob], None]:
    def hurt(blob: Blob) -> None:
        del blob[len(blob) - count :]

    return hurt


def cut_stream(blob: Blob) -> None:
    """Take the last 512 bytes of the last compressed cluster."""
    del blob[len(blob) // 512 * 512 - 512 :]


def gd(blob: Blob) -> int:
    return get(blob, 56, "<Q") * 512


def table(blob: Blob) -> int:
    return get(blob, gd(blob), "<I") * 512


def first_grain(blob: Blob) -> int:
    return next(at for at in range(table(blob), table(blob) + 2048, 4) if get(blob, at, "<I"))


def second_grain(blob: Blob) -> int:
    return next(at for at in range(first_grain(blob) + 4, table(blob) + 2048, 4) if get(blob, at, "<I"))


def marker(blob: Blob) -> int:
    return get(blob, first_grain(blob), "<I") * 512


def vmdk_map(blob: Blob) -> int:
    return get(blob, 0x154, "<I")


def vhd_table(blob: Blob) -> int:
    return get(blob, 512 + 16)


def reseal_footers(blob: Blob) -> None:
    for at in (0, len(blob) - 512):
        blob[at : at + 512] = sealed(bytes(blob[at : at + 512]), 64)


def other_footer(blob: Blob) -> None:
    blob[70] ^= 1
    blob[:512] = sealed(bytes(blob[:512]), 64)


def pending_log(blob: Blob) -> None:
    """The BAT's first sector stands in the log alone."""
    bat = bytes(blob[BAT_AT : BAT_AT + 4096])
    blob[BAT_AT : BAT_AT + 4096] = bytes(4096)
    for number, at in enumerate(vhdxmade.HEADERS):
        blob[at : at + 4096] = vhdxmade.header(20 + number, log=vhdxmade.LOG)
    vhdxmade.put_log(blob, 0, vhdxmade.log_entry(9, [(BAT_AT, bat)], size=len(blob)))


def entry(number: int) -> int:
    return BAT_AT + 8 * number


WOUNDS = [
    # qcow2
    Wound("qcow2", "data beyond the file", "qcow2", put(">Q", l2, 1 << 63 | 1 << 40), FINDS),
    Wound("qcow2", "an L2 table beyond the file", "qcow2", put(">Q", lambda b: get(b, 40), 1 << 63 | 1 << 40), FINDS),
    Wound(
        "qcow2",
        "data over the refcount table",
        "qcow2",
        put(">Q", l2, lambda b: 1 << 63 | get(b, 48)),
        FINDS,
        True,
        heals=False,
    ),
    Wound(
        "qcow2",
        "one cluster for two places",
        "qcow2",
        put(">Q", lambda b: l2(b) + 8, lambda b: get(b, l2(b))),
        FINDS,
        True,
        heals=False,
    ),
    Wound("qcow2", "a refcount too low", "qcow2", put(">H", lambda b: block(b) + 2 * used(b), 0), FINDS, True),
    Wound("qcow2", "a leaked cluster", "qcow2", leak, FINDS, True, "leaks"),
    Wound("qcow2", "COPIED missing", "qcow2", put(">Q", l2, lambda b: get(b, l2(b)) & MASK), FINDS, True),
    Wound(
        "qcow2",
        "COPIED on shared clusters",
        "qcow2 snapshot",
        put(">Q", l2, lambda b: get(b, l2(b)) | 1 << 63),
        FINDS,
        True,
    ),
    Wound("qcow2", "reserved bits in an L2 entry", "qcow2", put(">Q", l2, lambda b: get(b, l2(b)) | 1 << 57), FINDS),
    Wound(
        "qcow2",
        "reserved bits in an L1 entry",
        "qcow2",
        put(">Q", lambda b: get(b, 40), lambda b: get(b, get(b, 40)) | 1 << 57),
        FINDS,
    ),
    Wound("qcow2", "the zero flag in version 2", "qcow2 v2", put(">Q", l2, lambda b: get(b, l2(b)) | 1), MISSES),
    Wound(
        "qcow2",
        "a subcluster allocated and zero",
        "qcow2 extended",
        put(">Q", lambda b: l2(b) + 8, (1 << 64) - 1),
        FINDS,
    ),
    Wound("qcow2", "a refcount block missing", "qcow2", put(">Q", lambda b: get(b, 48), 0), FINDS, True),
    Wound(
        "qcow2",
        "a snapshot's L1 table beyond the file",
        "qcow2 snapshot",
        put(">Q", lambda b: get(b, 64), 1 << 45),
        FINDS,
    ),
    Wound(
        "qcow2",
        "a bitmap table beyond the file",
        "qcow2 bitmap",
        put(">Q", lambda b: get(b, extension(b, 0x23852875) + 16), 1 << 45),
        FINDS,
    ),
    Wound("qcow2", "cut inside the last cluster", "qcow2", cut(4096), MISSES),
    Wound("qcow2", "a compressed cluster cut", "qcow2 deflate", cut_stream, MISSES),
    # vmdk
    Wound("vmdk", "a grain beyond the file", "vmdk", put("<I", first_grain, 0x7FFF_FFF0), FINDS, True),
    Wound(
        "vmdk",
        "one grain for two places",
        "vmdk",
        put("<I", second_grain, lambda b: get(b, first_grain(b), "<I")),
        MISSES,
        True,
    ),
    Wound("vmdk", "a grain over the tables", "vmdk", put("<I", first_grain, lambda b: table(b) // 512), MISSES, True),
    Wound("vmdk", "a grain missing from the table", "vmdk", put("<I", first_grain, 0), MISSES, True),
    Wound("vmdk", "a directory entry of nothing", "vmdk", put("<I", gd, 0), MISSES, True),
    Wound("vmdk", "a directory entry beyond the file", "vmdk", put("<I", gd, 0x7FFF_FFF0), MISSES, True),
    Wound("vmdk", "a marker of another grain", "vmdk stream", put("<Q", marker, 128 * 77), MISSES),
    Wound("vmdk", "compressed data damaged", "vmdk stream", put("<Q", lambda b: marker(b) + 40, (1 << 64) - 1), MISSES),
    # vdi
    Wound("vdi", "one block for two places", "vdi", put("<I", lambda b: vmdk_map(b) + 4, 0), FINDS),
    Wound("vdi", "a block beyond the file", "vdi", put("<I", vmdk_map, 77), FINDS),
    Wound("vdi", "a count of blocks too low", "vdi", put("<I", 0x184, 1), FINDS, True),
    Wound("vdi", "a count of blocks too high", "vdi", put("<I", 0x184, 60), FINDS, True, "leaks"),
    # vhd
    Wound("vpc", "a wrong checksum of the last footer", "vpc", put("B", lambda b: len(b) - 512 + 90, 0xAA), NONE, True),
    Wound("vpc", "a wrong checksum of the first footer", "vpc", put("B", 90, 0xAA), FINDS, True),
    Wound("vpc", "no footer at the end", "vpc", cut(512), NONE, True),
    Wound("vpc", "two footers that differ", "vpc", other_footer, NONE, True),
    Wound("vpc", "a block beyond the file", "vpc", put(">I", vhd_table, 0x7FFF_0000), FINDS),
    Wound(
        "vpc",
        "one place for two blocks",
        "vpc",
        put(">I", lambda b: vhd_table(b) + 4, lambda b: get(b, vhd_table(b), ">I")),
        NONE,
    ),
    Wound("vpc", "a block over the tables", "vpc", put(">I", vhd_table, 1), NONE),
    # vhdx
    Wound("vhdx", "a wrong checksum of a header", "vhdx", put("B", vhdxmade.HEADERS[0] + 30, 0xAA), MISSES, True),
    Wound("vhdx", "a wrong checksum of a region table", "vhdx", put("B", vhdxmade.TABLES[0] + 30, 0xAA), FINDS, True),
    Wound("vhdx", "a log that was not replayed", "vhdx", pending_log, FINDS, True, warns=True),
    Wound("vhdx", "a block beyond the file", "vhdx", put("<Q", entry(0), 1 << 40 | FULL), FINDS),
    Wound("vhdx", "one place for two blocks", "vhdx", put("<Q", entry(1), lambda b: get(b, entry(0), "<Q")), MISSES),
    Wound("vhdx", "a block over the BAT", "vhdx", put("<Q", entry(0), BAT_AT | FULL), FINDS),
    Wound("vhdx", "a reserved state", "vhdx", put("<Q", entry(0), lambda b: get(b, entry(0), "<Q") & ~7 | 4), MISSES),
    # parallels, qcow
    Wound("parallels", "one place for two clusters", "parallels", put("<I", 68, lambda b: get(b, 64, "<I")), MISSES),
    Wound("parallels", "a cluster beyond the file", "parallels", put("<I", 64, 0x7FFF_0000), FINDS),
    Wound(
        "qcow",
        "one place for two clusters",
        "qcow",
        put(">Q", lambda b: get(b, get(b, 40)) + 8, lambda b: get(b, get(b, get(b, 40)))),
        NONE,
    ),
    Wound(
        "qcow", "data over a table", "qcow", put(">Q", lambda b: get(b, get(b, 40)), lambda b: get(b, get(b, 40))), NONE
    ),
]
