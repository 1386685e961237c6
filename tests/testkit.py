"""What tests share: seeded content, a small driver for allocators, cases of the contract suite.

The driver is deliberately not the pipeline: it moves bytes in the plainest way, so that a writer can be judged alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.allocator import RUN, Allocator, Identity, NewImage, NewParent
from diskmorph.formats.extents import ABSENT, DATA, HOLE, PLAIN, ZERO
from diskmorph.formats.registry import load, open_disk, require_format
from diskmorph.formats.views import Regions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diskmorph.formats.disk import Disk

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def data(seed: Any, length: int) -> bytes:
    """Seeded bytes that neither compress nor contain zero runs."""
    return random.Random(str(seed)).randbytes(length)


def pattern_disk(size: int, pieces: Sequence[tuple[int, int, bytes | int]]) -> Disk:
    """A disk of `size` bytes from (start, length, bytes | ZERO | HOLE) pieces, holes between them."""
    disk = Regions()
    for start, length, what in sorted(pieces, key=lambda p: p[0]):
        disk.pad_to(start)
        if isinstance(what, int):
            disk.add_hole(length, what)
        else:
            disk.add_bytes((what * (length // len(what) + 1))[:length])
    disk.pad_to(size)
    return disk


def little_disk(size: int = 9 * MIB + 1536, seed: int = 1) -> Disk:
    """A small disk with random and repetitive data, explicit zeroes and holes, data in its first and last sector."""
    rng = random.Random(seed)
    pieces: list[tuple[int, int, bytes | int]] = [(0, 512, data((seed, "first"), 512))]
    at = 4096
    while at < size - 512 * 1024:
        length = rng.choice((512, 4096, 12288, 65536, 200 * 1024))
        kind = rng.randrange(4)
        if kind == 0:
            pieces.append((at, length, data((seed, at), length)))
        elif kind == 1:
            pieces.append((at, length, b"text %08d " % at))
        elif kind == 2:
            pieces.append((at, length, ZERO))
        at += length + rng.choice((0, 0, 4096, 65536, 300 * 1024))
    pieces.append((size - 512, 512, data((seed, "last"), 512)))
    return pattern_disk(size, pieces)


def content(disk: Disk) -> bytes:
    return disk.read(0, disk.size)


def reads_as(path: Path, want: bytes, **options: object) -> None:
    """Hold an image to its content; a rounded size holds zeroes behind it."""
    with open_disk(path, **options) as disk:  # type: ignore[arg-type]
        got = content(disk)
    assert got[: len(want)] == want
    assert not got[len(want) :].strip(b"\0")
    assert len(got) - len(want) < 4096


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def unit_runs(disk: Disk, grain: int, *, overlay: bool = False) -> np.ndarray:
    """RUN rows of a disk at `grain`: DATA where any byte is data, else ZERO where any is zero, else HOLE (or ABSENT)."""
    count = -(-disk.size // grain)
    rank = np.full(count, {True: ABSENT, False: HOLE}[overlay], np.uint8)
    for wanted in (ZERO, DATA):
        for batch in disk.extents():
            for e in batch[batch["kind"] == wanted]:
                rank[int(e["start"]) // grain : -(-(int(e["start"]) + int(e["length"])) // grain)] = wanted
    heads = np.concatenate(([0], np.flatnonzero(np.diff(rank)) + 1)) if count else np.zeros(0, int)
    runs = np.zeros(len(heads), RUN)
    runs["start"] = heads * grain
    stops = np.minimum(np.append(heads[1:], count) * grain, disk.size) if count else np.zeros(0)
    runs["length"] = stops - runs["start"]
    runs["kind"] = rank[heads]
    return runs


def drive(
    allocator: Allocator, disk: Disk, folder: Path, encode: Callable[[bytes], bytes] | None = None, step: int = 16 * MIB
) -> list[Path]:
    """Write `disk` by the allocator's directions into files in `folder`; return their paths."""
    assert allocator.unit % allocator.grain == 0
    paths = [folder / name for name in allocator.members]
    files = [open(path, "w+b") for path in paths]  # noqa: SIM115
    high = [0] * len(files)

    def put(member: int, offset: int, payload: Any) -> None:
        if allocator.sequential:
            assert offset >= high[member], f"sequential, but {offset} after {high[member]}"
        high[member] = max(high[member], offset + len(payload))
        files[member].seek(offset)
        files[member].write(payload)

    for write in allocator.begin():
        put(*write)
    step = max(step // allocator.unit, 1) * allocator.unit
    for low in range(0, disk.size, step):
        stop = min(low + step, disk.size)
        from diskmorph.formats.views import Slice

        piece = allocator.grain if encode is None else allocator.unit  # encoded runs are whole units
        runs = unit_runs(Slice(disk, low, stop - low), piece, overlay=allocator.overlay)
        runs["start"] += np.uint64(low)
        _put_runs(allocator, disk, runs, put, encode)
        for write in allocator.settle(stop):
            put(*write)
    for write in allocator.finish():
        put(*write)
    for file, size, reach in zip(files, allocator.sizes(), high, strict=True):
        assert reach <= size, f"written up to {reach}, but the size is said to be {size}"
        file.truncate(size)
        file.close()
    return paths


def _put_runs(
    allocator: Allocator,
    disk: Disk,
    runs: np.ndarray,
    put: Callable[..., None],
    encode: Callable[[bytes], bytes] | None,
) -> None:
    if encode is None:
        for row in allocator.place(runs):
            if row["kind"] == DATA:
                put(int(row["member"]), int(row["offset"]), disk.read(int(row["start"]), int(row["length"])))
        return
    for run in runs:
        if run["kind"] != DATA:
            allocator.place(np.array([run], RUN))
            continue
        start, stop = int(run["start"]), int(run["start"]) + int(run["length"])
        for at in range(start, stop, allocator.unit):
            length = min(allocator.unit, stop - at)
            unit = disk.read(at, length) + bytes(allocator.unit - length)
            framed: Any = allocator.frame(at, encode(unit))
            codec = allocator.codec
            if len(framed) >= allocator.unit and PLAIN in allocator.codecs:
                framed, codec = unit[:length], PLAIN
            one = np.zeros(1, RUN)
            one[0] = (at, length, len(framed), DATA, codec)
            placed = allocator.place(one)
            assert len(placed) == 1
            put(int(placed["member"][0]), int(placed["offset"][0]), framed)


def write_image(
    format: str,
    disk: Disk,
    path: Path,
    *,
    options: Mapping[str, str] | None = None,
    codec: int | None = None,
    encode: Callable[[bytes], bytes] | None = None,
    parent: NewParent | None = None,
    identity: Identity | None = None,
) -> list[Path]:
    """Write a disk in a format with the plain driver; return the members' paths."""
    image = NewImage(
        disk.size,
        path.name,
        disk.sector_size,
        dict(options or {}),
        codec,
        None,
        parent,
        identity or Identity(b"test seed"),
    )
    return drive(load(require_format(format)).new_allocator(image), disk, path.parent, encode)


def run(*argv: Any, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a peer to its end; asked again where its clock of processor time stood still while it measured PBKDF2 (QEMU)."""
    words = [str(a) for a in argv]
    for _ in range(50):
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    assert not ok or done.returncode == 0, (
        f"{' '.join(map(str, argv))}: exit {done.returncode}: {done.stderr or done.stdout}"
    )
    return done


def qemu_same(raw: Path, image: Path, format: str) -> None:
    """qemu-img reads the same bytes and size from the image as from the raw file."""
    run("qemu-img", "compare", "-f", "raw", "-F", format, raw, image)


@dataclass(frozen=True)
class DiskCase:
    """An image for the contract suite: `make(folder)` returns its path and the bytes it must read as."""

    name: str
    make: Callable[[Path], tuple[Path, bytes]]
    open: Mapping[str, Any] = field(default_factory=dict)

    def disk(self, folder: Path) -> tuple[Disk, bytes]:
        path, want = self.make(folder)
        return open_disk(path, **self.open), want


@dataclass(frozen=True)
class AllocatorCase:
    """A way to write an image for the contract suite; `peer` is qemu-img's word for the format, None where it has none."""

    name: str
    format: str
    options: Mapping[str, str] = field(default_factory=dict)
    peer: str | None = None
    codec: int | None = None
    encode: Callable[[bytes], bytes] | None = None


CASES = Path(__file__).parent / "contract" / "cases"


def contract_cases(kind: str) -> list[tuple[str, Any]]:
    """(format, case) of every file in tests/contract/cases; `kind` is DISKS or ALLOCATORS."""
    found = []
    for path in sorted(CASES.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"contract_cases_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [(path.stem, case) for case in getattr(module, kind)]
    return found
