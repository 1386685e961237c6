"""What every Allocator must do, whatever its format, judged through the plain driver of testkit and by peers."""

import numpy as np
import pytest

from diskmorph.formats.allocator import Identity, NewImage, NewParent
from diskmorph.formats.disk import Disk, checked
from diskmorph.formats.errors import DiskmorphError
from diskmorph.formats.extents import ABSENT, DATA, PLAIN, ZERO, clip, row
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import load, open_disk, require_format
from diskmorph.formats.source import BytesSource
from diskmorph.formats.views import Memory, Zero

from testkit import (
    KIB,
    MIB,
    content,
    contract_cases,
    data,
    drive,
    little_disk,
    pattern_disk,
    qemu_same,
    run,
    unit_runs,
    write_image,
)

ALLOCATORS = contract_cases("ALLOCATORS")
UNCHECKED_BY_QEMU = {"raw", "vpc"}  # qemu-img check exits with 63: not supported


def name(entry):
    return f"{entry[0]}: {entry[1].name}"


DISKS = {
    "holes": lambda: Zero(5 * MIB),
    "zeroes": lambda: Zero(3 * MIB + 4096, kind=ZERO),
    "little": little_disk,
    "full": lambda: Memory(data("full", 3 * MIB + 4096)),
    "1": lambda: Memory(b"1"),
    "512": lambda: Memory(data(512, 512)),
    "1000": lambda: Memory(data(1000, 1000)),
    "65537": lambda: Memory(data(65537, 65537)),
    "1M+512": lambda: pattern_disk(MIB + 512, [(MIB, 512, b"end")]),
}


@pytest.fixture(params=ALLOCATORS, ids=name)
def case(request):
    return request.param[1]


def allocator_of(case, size, sector_size=512, **words):
    image = NewImage(size, "image", sector_size, dict(case.options), case.codec, identity=Identity(b"seed"), **words)
    return load(require_format(case.format)).new_allocator(image)


def written(case, disk, path):
    return write_image(case.format, disk, path, options=case.options, codec=case.codec, encode=case.encode)


def require_same(disk, path, format):
    want = content(disk)
    with open_disk(path, format=format) as back:
        assert 0 <= back.size - disk.size < max(back.sector_size, 512)
        found = content(checked(back))
    assert found[: disk.size] == want
    assert not any(found[disk.size :])


def require_peer(case, disk, path):
    if case.peer is None:
        return
    raw = path.with_name("expected.raw")
    raw.write_bytes(content(disk))
    qemu_same(raw, path, case.peer)
    if case.peer not in UNCHECKED_BY_QEMU:
        run("qemu-img", "check", "-q", "-f", case.peer, path)


@pytest.mark.parametrize("disk", DISKS)
def test_what_is_written_is_read_back(case, disk, tmp_path):
    source = DISKS[disk]()
    path, *_ = written(case, source, tmp_path / "image")
    require_same(source, path, case.format)
    require_peer(case, source, path)


def test_a_partial_last_unit(case, tmp_path):
    unit = min(allocator_of(case, 64 * MIB).unit, 32 * MIB)
    size = 2 * unit + 1536
    disk = pattern_disk(size, [(unit - 512, 1024, b"across"), (size - 700, 700, data("tail", 700))])
    path, *_ = written(case, disk, tmp_path / "image")
    require_same(disk, path, case.format)
    require_peer(case, disk, path)


def test_an_empty_disk_is_written_or_refused(case, tmp_path):
    try:
        path, *_ = written(case, Zero(0), tmp_path / "image")
    except DiskmorphError:
        return
    require_same(Zero(0), path, case.format)


def test_the_same_identity_gives_the_same_bytes(case, tmp_path):
    disk = little_disk(2 * MIB + 512)
    copies = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        paths = written(case, disk, folder / "image")
        copies.append({path.name: path.read_bytes() for path in paths})
    assert copies[0] == copies[1]


def merged(placed):
    """Placed rows as a sorted list in which neighbours that continue each other are one."""
    rows = []
    for start, length, offset, member, kind, codec in sorted(placed.tolist()):
        last = rows[-1] if rows else None
        if last and last[3:] == [member, kind, codec] and (last[0] + last[1], last[2] + last[1]) == (start, offset):
            last[1] += length
        else:
            rows.append([start, length, offset, member, kind, codec])
    return rows


def placed_in(case, disk, *, halves, settle):
    allocator = allocator_of(case, disk.size)
    list(allocator.begin())
    runs = unit_runs(disk, allocator.grain)
    bound = disk.size // 2 // allocator.unit * allocator.unit
    parts = [runs]
    if halves:
        low, high = split(runs, bound)
        parts = [low, high]
    rows = []
    for part in parts:
        if len(part):
            rows.append(allocator.place(part))
            if settle:
                list(allocator.settle(int(part["start"][-1] + part["length"][-1])))
    list(allocator.finish())
    return allocator, np.concatenate(rows)


def split(runs, bound):
    bound = np.uint64(bound)
    low, high = runs[runs["start"] < bound].copy(), runs[runs["start"] + runs["length"] > bound].copy()
    low["length"] = np.minimum(low["start"] + low["length"], bound) - low["start"]
    start = np.maximum(high["start"], bound)
    high["length"] -= start - high["start"]
    high["start"] = start
    return low, high


def plain_only(case):
    return PLAIN in allocator_of(case, MIB).codecs


def test_the_size_is_known_from_places_alone(case, tmp_path):
    if case.encode is not None or not plain_only(case):
        return  # encoded units are as large as their data
    disk = little_disk()
    measured, _ = placed_in(case, disk, halves=False, settle=False)
    paths = drive(allocator_of(case, disk.size), disk, tmp_path)
    assert [path.stat().st_size for path in paths] == list(measured.sizes())


@pytest.mark.parametrize("settle", [False, True])
def test_two_halves_are_placed_as_the_whole(case, settle):
    if not plain_only(case):
        return
    for disk in (little_disk(), Memory(data("halves", 3 * MIB))):
        one, whole = placed_in(case, disk, halves=False, settle=settle)
        two, parts = placed_in(case, disk, halves=True, settle=settle)
        assert merged(whole) == merged(parts)
        assert list(one.sizes()) == list(two.sizes())


def test_places_are_apart_aligned_and_within_the_files(case):
    if not plain_only(case):
        return
    disk = little_disk()
    allocator, placed = placed_in(case, disk, halves=False, settle=True)
    for member, size in enumerate(allocator.sizes()):
        mine = np.sort(placed[placed["member"] == member], order="offset")
        ends = mine["offset"] + mine["length"]
        assert not len(mine) or ends[-1] <= size
        assert (ends[:-1] <= mine["offset"][1:]).all()
        heads = mine[mine["start"] % np.uint64(allocator.unit) == 0]
        assert (heads["offset"] % np.uint64(allocator.alignment) == 0).all()
    covered = placed[placed["kind"] == DATA]["length"].sum()
    runs = unit_runs(disk, allocator.grain)
    assert covered == runs[runs["kind"] == DATA]["length"].sum()


def test_an_unknown_option_is_refused(case):
    image = NewImage(MIB, "image", options={**case.options, "no-such-option": "1"})
    with pytest.raises(DiskmorphError, match="no-such-option"):
        load(require_format(case.format)).new_allocator(image)


class Change(Disk):
    """The new content of an overlay: DATA and ZERO where it differs from the parent, ABSENT elsewhere; reads whole."""

    def __init__(self, below, size):
        self.size = size
        self.want = bytearray(content(below)[:size].ljust(size, b"\0"))
        self.rows = [(2 * MIB, 2 * MIB, ZERO)]
        self.want[2 * MIB : 4 * MIB] = bytes(2 * MIB)
        for start, length in (
            (0, 512),
            (70_144, 1024),
            (MIB - 512, 1024),
            (MIB + 64 * KIB, 128 * KIB),
            (size - 512, 512),
        ):
            self.want[start : start + length] = data(("change", start), length)
            self.rows.append((start, length, DATA))
        self.files = (BytesSource(self.want),)

    def _extents(self, start, stop):
        at = 0
        for first, length, kind in [*sorted(self.rows), (self.size, 0, ABSENT)]:
            if first > at:
                yield clip(row(at, first - at, ABSENT), start, stop)
            if length:
                yield clip(row(first, length, kind, offset=first if kind == DATA else 0), start, stop)
            at = first + length

    def read_into(self, start, buffer):
        self.files[0].read_into(start, buffer)


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi", "vhd", "vhdx"])
@pytest.mark.parametrize("sizes", [(9 * MIB + 1536, 9 * MIB + 1536), (5 * MIB, 7 * MIB), (9 * MIB, 7 * MIB)], ids=str)
def test_an_overlay_holds_what_differs_and_asks_its_parent_for_the_rest(format, sizes, tmp_path):
    below = little_disk(sizes[0])
    base, *_ = write_image(format, below, tmp_path / "base", identity=Identity(b"base"))
    with open_disk(base, format=format) as parent:
        ref = NewParent("base", format, below.size, parent.identity, base)
    change = Change(below, sizes[1])
    try:
        top, *_ = write_image(format, change, tmp_path / "top", parent=ref, identity=Identity(b"top"))
    except DiskmorphError:
        assert sizes[0] != sizes[1], "an overlay of the parent's size was refused"
        return
    parents = Parents(backing=base) if format == "vdi" else tmp_path  # a VDI does not say where its parent is
    with open_disk(top, format=format, parents=parents) as disk:
        assert content(checked(disk)) == change.want
        layer = disk.layers[0]
        assert layer.info.parent is not None
        rows = np.concatenate(list(layer.extents(4 * MIB, 5 * MIB)))
        assert set(rows["kind"].tolist()) == {ABSENT}
