"""VHDX for the contract suite."""

import random
import struct
import uuid
from pathlib import Path

import numpy as np
import vhdxmade
from vhdxmade import FULL, NOT_PRESENT, OLD_UNMAPPED, PARTIAL, UNDEFINED, UNMAPPED, ZEROED, Made

from testkit import MIB, AllocatorCase, DiskCase, content, data, little_disk, run

SIZE = 9 * MIB + 1536


def by_qemu(options, size=SIZE):
    def make(folder: Path) -> tuple[Path, bytes]:
        raw, path = folder / "disk.raw", folder / "disk.vhdx"
        want = content(little_disk(size))
        raw.write_bytes(want)
        run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, path)
        return path, want

    return make


def permuted(sector):
    def make(folder: Path) -> tuple[Path, bytes]:
        size = 12 * MIB + 3 * 4096
        numbers = list(range(13))
        random.Random(3).shuffle(numbers)
        blocks = {n: (FULL, data(("permuted", n), MIB), None) for n in numbers}
        path = folder / "permuted.vhdx"
        path.write_bytes(Made(size, blocks, order=numbers, sector=sector).build())
        return path, b"".join(blocks[n][1] for n in range(13))[:size]

    return make


def states(folder: Path) -> tuple[Path, bytes]:
    kinds = (NOT_PRESENT, FULL, UNDEFINED, ZEROED, FULL, UNMAPPED, OLD_UNMAPPED, FULL)
    blocks = {n: (state, data(("states", n), MIB) if state == FULL else None, None) for n, state in enumerate(kinds)}
    path = folder / "states.vhdx"
    path.write_bytes(Made(8 * MIB, blocks).build())
    return path, b"".join(blocks[n][1] or bytes(MIB) for n in range(8))


def chunks(folder: Path) -> tuple[Path, bytes]:
    """Blocks on both sides of a sector bitmap entry: the largest block makes chunks of 16 blocks."""
    ratio = 16
    block = 256 * MIB
    made = Made(20 * block, block=block)
    image = made.build()
    spots = {number: data(("chunks", number), 4096) for number in (0, ratio - 1, ratio, ratio + 3)}
    for place, number in enumerate((ratio, 0, ratio + 3, ratio - 1)):
        struct.pack_into("<Q", image, made.entry_at(number), (4 * MIB + place * block) | FULL)
    path = folder / "chunks.vhdx"
    with open(path, "wb") as file:
        file.write(image)
        for place, number in enumerate((ratio, 0, ratio + 3, ratio - 1)):
            file.seek(4 * MIB + place * block)
            file.write(spots[number])
        file.truncate(4 * MIB + 4 * block)
    want = b"".join(spots.get(number, bytes(4096)) for number in range(20))
    return path, want


def logged(folder: Path) -> tuple[Path, bytes]:
    """The BAT stands in the log alone, as after a crash."""
    made = Made(3 * MIB, {n: (FULL, data(("logged", n), MIB), None) for n in range(3)}, order=[2, 0, 1])
    made.header = {"log": vhdxmade.LOG}
    image = made.build()
    bat = bytes(image[vhdxmade.BAT_AT : vhdxmade.BAT_AT + 4096])
    image[vhdxmade.BAT_AT : vhdxmade.BAT_AT + 4096] = bytes(4096)
    vhdxmade.put_log(image, 0, vhdxmade.log_entry(9, [(vhdxmade.BAT_AT, bat)], size=len(image)))
    path = folder / "logged.vhdx"
    path.write_bytes(image)
    return path, b"".join(made.blocks[n][1] for n in range(3))


def differencing(sector, block):
    """A chain of two: each block of the top in another state, two of them partially present."""

    def make(folder: Path) -> tuple[Path, bytes]:
        size = 8 * block - 3 * sector
        base = {n: (FULL, data(("base", n), block), None) for n in (0, 1, 2, 3, 4, 6, 7)}
        (folder / "base.vhdx").write_bytes(Made(size, base, block=block, sector=sector).build())
        rng = np.random.default_rng(5)
        bits = {n: rng.integers(0, 2, block // sector, np.uint8) for n in (1, 6, 7)}
        bits[7][: block // sector // 2] = 1
        kinds = (NOT_PRESENT, PARTIAL, FULL, ZEROED, UNMAPPED, NOT_PRESENT, PARTIAL, PARTIAL)
        top = {}
        for number, state in enumerate(kinds):
            own = data(("top", number), block) if state in {FULL, PARTIAL} else None
            mask = np.packbits(bits[number], bitorder="little").tobytes() if state == PARTIAL else None
            top[number] = (state, own, mask)
        linkage = {"parent_linkage": f"{{{vhdxmade.DATA_WRITE}}}", "relative_path": ".\\base.vhdx"}
        made = Made(size, top, [6, 1, 7, 2], block, sector, linkage, header={"data": uuid.UUID(int=9)})
        path = folder / "top.vhdx"
        path.write_bytes(made.build())
        want = b""
        for number, state in enumerate(kinds):
            below = base[number][1] if number in base else bytes(block)
            own = top[number][1] or bytes(block)
            mask = np.repeat(bits.get(number, np.full(block // sector, state != NOT_PRESENT, np.uint8)), sector)
            want += np.where(mask, np.frombuffer(own, np.uint8), np.frombuffer(below, np.uint8)).tobytes()
        return path, want[:size]

    return make


class _Chain(DiskCase):
    """A case whose parent lies in its own folder."""

    def disk(self, folder):
        path, want = self.make(folder)
        from diskmorph.formats.registry import open_disk

        return open_disk(path, parents=folder), want


class _Spots(DiskCase):
    """A large sparse disk seen through the first 4 KiB of each block."""

    def disk(self, folder):
        path, want = self.make(folder)
        from diskmorph.formats.registry import open_disk
        from diskmorph.formats.views import Regions, Slice

        whole = open_disk(path)
        seen = Regions()
        for number in range(20):
            seen.add_disk(Slice(whole, number * 256 * MIB, 4096))
        return seen, want


DISKS = [
    DiskCase("qemu-img dynamic", by_qemu("subformat=dynamic")),
    DiskCase("qemu-img dynamic 1M", by_qemu("subformat=dynamic,block_size=1M")),
    DiskCase("qemu-img fixed", by_qemu("subformat=fixed")),
    DiskCase("permuted", permuted(512)),
    DiskCase("permuted 4096", permuted(4096)),
    DiskCase("states", states),
    DiskCase("log", logged),
    _Spots("chunks", chunks),
    _Chain("differencing", differencing(512, MIB)),
    _Chain("differencing 4096", differencing(4096, 2 * MIB)),
]
ALLOCATORS = [
    AllocatorCase("dynamic", "vhdx", peer="vhdx"),
    AllocatorCase("dynamic 1M", "vhdx", {"block_size": "1M", "physical_sector_size": "512"}, peer="vhdx"),
    AllocatorCase("dynamic 64M", "vhdx", {"block_size": "64M", "log_size": "3M"}, peer="vhdx"),
    AllocatorCase("dynamic 4096", "vhdx", {"logical_sector_size": "4096"}),
    AllocatorCase("fixed", "vhdx", {"subformat": "fixed"}, peer="vhdx"),
    AllocatorCase("fixed 8M", "vhdx", {"subformat": "fixed", "block_size": "8M"}, peer="vhdx"),
]
