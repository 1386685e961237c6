"""Views over disks, and the functions on extents that they rest on, held against a byte-array model."""

import time
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskmorph.formats.disk import Disk, checked
from diskmorph.formats.errors import DiskmorphError, FormatError, IntegrityError, PolicyError
from diskmorph.formats.extents import (
    ABSENT,
    DATA,
    DEFLATE,
    EXTENT,
    HOLE,
    PLAIN,
    ZERO,
    clip,
    coalesce,
    coalesced,
    cut,
    from_units,
    plain_runs,
    require_within,
    row,
    stops,
)
from diskmorph.formats.source import BytesSource, FileSource
from diskmorph.formats.views import Mapped, Memory, Overlay, Regions, Slice, SourceDisk, Zero, grown

from testkit import content, data

FILES = [BytesSource(data("file 0", 5000), "first"), BytesSource(data("file 1", 3000), "second")]
UNIT = 64
BLOBS = [data(("unit", number), UNIT) for number in range(4)]


def deflated(blob):
    import zlib

    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    return packer.compress(blob) + packer.flush()


PACKED = [deflated(blob * 1) for blob in BLOBS]
STARTS = [sum(map(len, PACKED[:number])) for number in range(4)]
FILES.append(BytesSource(b"".join(PACKED), "packed"))


class Rows(Mapped):
    """A disk by rows that may hold encoded units of UNIT bytes."""

    def unit_size(self):
        return UNIT


@st.composite
def rows(draw, kinds=(DATA, ZERO, HOLE, ABSENT), encoded=True, size=None):
    """Sorted, gapless extents with plain, encoded and empty ranges."""
    lengths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=10))
    found, at = [], 0
    for length in lengths:
        if size is not None:
            length = min(length, size - at)
            if not length:
                break
        kind = draw(st.sampled_from(kinds))
        if kind == DATA and encoded and draw(st.booleans()):
            number, skip = draw(st.integers(0, 3)), draw(st.integers(0, UNIT - 1))
            length = min(length, UNIT - skip)
            stored = len(PACKED[number])
            found.append(row(at, length, DATA, offset=STARTS[number], file=2, codec=DEFLATE, stored=stored, skip=skip))
        elif kind == DATA:
            file = draw(st.integers(0, 1))
            offset = draw(st.integers(0, FILES[file].size - length))
            found.append(row(at, length, DATA, offset=offset, file=file))
        else:
            found.append(row(at, length, kind))
        at += length
    if size is not None and at < size:
        found.append(row(at, size - at, HOLE))
    return np.concatenate(found)


def meaning(table):
    """For each byte of the table: (kind, file, where its byte lies), which no split or merge may change."""
    out = []
    for start, length, offset, stored, skip, file, kind, codec, depth, flags in table.tolist():
        del start
        for step in range(length):
            if kind != DATA:
                out.append((kind, depth, flags))
            elif codec == PLAIN:
                out.append((kind, file, offset + step, depth, flags))
            else:
                out.append((kind, file, offset, codec, stored, skip + step, depth, flags))
    return out


def model(table):
    """The bytes that the table reads as; ABSENT as zeroes."""
    out = bytearray()
    for _, length, offset, _, skip, file, kind, codec, _, _ in table.tolist():
        if kind != DATA:
            out += bytes(length)
        elif codec == PLAIN:
            out += FILES[file].read(offset, length)
        else:
            out += BLOBS[STARTS.index(offset)][skip : skip + length]
    return bytes(out)


def total(table):
    return int(stops(table)[-1])


@given(rows(), st.data())
def test_clip_keeps_the_meaning_of_what_is_left(table, draw):
    low = draw.draw(st.integers(0, total(table)))
    high = draw.draw(st.integers(low, total(table)))
    before = table.copy()
    part = clip(table, low, high)
    assert meaning(part) == meaning(table)[low:high]
    assert (table == before).all()
    if len(part):
        assert (int(part["start"][0]), total(part)) == (low, high)
        assert (part["length"] > 0).all()


@given(rows(), st.lists(st.integers(0, 900), max_size=12))
def test_cut_splits_at_every_bound_and_changes_nothing(table, bounds):
    before = table.copy()
    fine = cut(table, np.array(sorted(bounds), np.uint64))
    assert meaning(fine) == meaning(table)
    assert (table == before).all()
    assert {bound for bound in bounds if 0 < bound < total(table)} <= set(fine["start"].tolist())
    assert len(fine) == len(set(table["start"].tolist()) | {b for b in bounds if 0 < b < total(table)})


@given(rows(), st.lists(st.integers(0, 900), max_size=12))
def test_coalesce_undoes_every_cut(table, bounds):
    merged = coalesce(table)
    assert meaning(merged) == meaning(table)
    assert coalesce(merged).tolist() == merged.tolist()
    assert coalesce(cut(table, np.array(sorted(bounds), np.uint64))).tolist() == merged.tolist()


@given(rows(), st.lists(st.integers(0, 900), max_size=8), st.integers(1, 5))
def test_batches_are_joined_split_and_merged_across_their_bounds(table, bounds, most):
    inner = sorted({bound for bound in bounds if 0 < bound < total(table)})
    pieces = [clip(table, low, high) for low, high in zip([0, *inner], [*inner, total(table)], strict=True)]
    batches = list(coalesced(iter([*pieces, table[:0]]), most))
    assert all(0 < len(batch) <= most for batch in batches)
    assert meaning(np.concatenate(batches)) == meaning(table)
    if most >= len(table) + len(inner):
        assert np.concatenate(batches).tolist() == coalesce(table).tolist()


def test_many_batches_of_one_row_are_joined_in_a_time_that_grows_with_their_number():
    pieces = [row(8192 * number, 4096, DATA, offset=1 << 40 | 8192 * number) for number in range(50_000)]
    begun = time.process_time()
    joined = np.concatenate(list(coalesced(iter(pieces))))
    assert time.process_time() - begun < 4, "it took ten times that when held rows were counted for each batch"
    assert len(joined) == len(pieces)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=20), st.integers(0, 1 << 40))
def test_runs_of_a_file_become_extents(parts, base):
    runs, at = [], base
    for length, stored in parts:
        runs.append((at, length, stored))
        at += length
    found = [one.tolist() for batch in plain_runs(iter(runs), base=base, hole=ZERO) for one in batch]
    wanted = [
        (at - base, length, at if stored else 0, 0, 0, 0, DATA if stored else ZERO, 0, 0, 0)
        for at, length, stored in runs
    ]
    assert found == wanted


@given(rows(kinds=(DATA, ZERO, HOLE)), st.data())
def test_any_range_of_a_mapped_disk_reads_as_the_model(table, draw):
    disk = checked(Rows(table, FILES))
    low = draw.draw(st.integers(0, disk.size))
    high = draw.draw(st.integers(low, disk.size))
    assert disk.read(low, high - low) == model(table)[low:high]


@given(rows(encoded=False), st.data())
def test_an_overlay_reads_as_its_layers_laid_over_each_other(top, draw):
    below = draw.draw(rows(kinds=(DATA, ZERO, HOLE)))
    disk = checked(Overlay(Rows(top, FILES), Rows(below, FILES)))
    want = bytearray(model(below)[: disk.size].ljust(disk.size, b"\0"))
    for start, length, kind in zip(*(top[field].tolist() for field in ("start", "length", "kind")), strict=True):
        if kind != ABSENT:
            want[start : start + length] = model(top)[start : start + length]
    assert content(disk) == want
    low = draw.draw(st.integers(0, disk.size))
    high = draw.draw(st.integers(low, disk.size))
    assert disk.read(low, high - low) == want[low:high]


@given(st.lists(rows(encoded=False, size=300), min_size=3, max_size=5))
def test_a_chain_tells_which_layer_each_byte_comes_from(layers):
    last = layers[-1]
    last["kind"] = np.where(last["kind"] == ABSENT, HOLE, last["kind"])
    disk = Rows(last, FILES)
    for table in reversed(layers[:-1]):
        disk = Overlay(Rows(table, FILES), disk)
    by_byte = [meaning(table) for table in layers]
    found = meaning(np.concatenate(list(checked(disk).extents())))
    for at, one in enumerate(found):
        depth = next(level for level, bytes_ in enumerate(by_byte) if bytes_[at][0] != ABSENT)
        source = by_byte[depth][at]
        assert one[0] == source[0]
        if one[0] == DATA:
            assert one[1:4] == (source[1] + 3 * depth, source[2], depth)
        elif one[0] == ZERO:
            assert one[1] == depth


@given(st.data())
def test_regions_read_as_their_pieces_one_after_the_other(draw):
    regions, want = Regions(), bytearray()
    for number in range(draw.draw(st.integers(0, 8))):
        kind = draw.draw(st.sampled_from(("bytes", "range", "hole", "disk", "pad", "rows")))
        length = draw.draw(st.integers(0, 90))
        if kind == "bytes":
            regions.add_bytes(piece := data(number, length))
        elif kind == "range":
            offset = draw.draw(st.integers(0, FILES[0].size - length))
            regions.add_range(FILES[0], offset, length)
            piece = FILES[0].read(offset, length)
        elif kind == "disk":
            table = draw.draw(rows(kinds=(DATA, ZERO, HOLE)))
            regions.add_disk(Rows(table, FILES))
            piece = model(table)
        elif kind == "rows":
            table = draw.draw(rows(kinds=(DATA, ZERO, HOLE), encoded=False))
            regions.add_rows(table, FILES)
            piece = model(table)
        elif kind == "pad":
            regions.pad_to(len(want) + length)
            piece = bytes(length)
        else:
            regions.add_hole(length, draw.draw(st.sampled_from((ZERO, HOLE))))
            piece = bytes(length)
        want += piece
    assert regions.size == len(want)
    disk = checked(regions)
    assert content(disk) == want
    low = draw.draw(st.integers(0, disk.size))
    high = draw.draw(st.integers(low, disk.size))
    assert disk.read(low, high - low) == want[low:high]


@given(rows(kinds=(DATA, ZERO, HOLE)), st.data())
def test_a_slice_of_a_slice_reads_as_the_part(table, draw):
    whole = Rows(table, FILES)
    low = draw.draw(st.integers(0, whole.size))
    length = draw.draw(st.integers(0, whole.size - low))
    inner = draw.draw(st.integers(0, length))
    want = model(table)[low : low + length]
    part = Slice(whole, low, length, "part")
    assert content(checked(part)) == want
    assert content(checked(Slice(part, inner, length - inner))) == want[inner:]
    assert part.name == "part"


@given(st.integers(0, 20), st.integers(1, 50), st.data())
def test_units_become_coalesced_rows_cut_to_the_disk(first, unit, draw):
    count = draw.draw(st.integers(0, 12))
    kinds = np.array(draw.draw(st.lists(st.sampled_from((DATA, ZERO, HOLE)), min_size=count, max_size=count)), np.uint8)
    offsets = np.array(draw.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)), np.uint64) * np.uint64(
        unit
    )
    size = draw.draw(st.integers(0, (first + count) * unit + 5))
    table = from_units(first, unit, kinds, offsets, size)
    want = []
    for number in range(count):
        for step in range(unit):
            if (first + number) * unit + step < size:
                kind = int(kinds[number])
                want.append((kind, 0, int(offsets[number]) + step, 0, 0) if kind == DATA else (kind, 0, 0))
    assert meaning(table) == want
    assert coalesce(table).tolist() == table.tolist()


class TestOverlay:
    def test_beyond_a_short_parent_is_a_hole(self):
        disk = checked(Overlay(Zero(100, kind=ABSENT), Memory(b"x" * 30)))
        assert content(disk) == b"x" * 30 + bytes(70)
        found = np.concatenate(list(disk.extents()))
        assert found["kind"].tolist() == [DATA, HOLE]
        assert found["depth"].tolist() == [1, 0]

    def test_of_a_longer_parent_nothing_beyond_the_end_is_seen(self):
        assert content(checked(Overlay(Zero(10, kind=ABSENT), Memory(b"x" * 30)))) == b"x" * 10

    def test_a_parent_of_no_bytes(self):
        assert content(checked(Overlay(Zero(10, kind=ABSENT), Zero(0)))) == bytes(10)

    def test_a_zero_hides_the_parent_and_a_hole_of_the_top_too(self):
        top = Mapped(np.concatenate((row(0, 5, ZERO), row(5, 5, HOLE), row(10, 5, ABSENT))), ())
        assert content(checked(Overlay(top, Memory(b"x" * 15)))) == bytes(10) + b"x" * 5

    def test_layers_come_from_the_top_down(self):
        bottom, middle, top = Zero(1), Zero(1, kind=ABSENT), Zero(1, kind=ABSENT)
        assert Overlay(top, Overlay(middle, bottom)).layers == (top, middle, bottom)

    def test_many_small_rows_of_both_layers(self):
        count = 100_000
        kinds = np.where(np.arange(count) % 2, ABSENT, ZERO).astype(np.uint8)
        top = Mapped(from_units(0, 2, kinds, np.zeros(count), 2 * count), ())
        below = Memory(b"ab" * count)
        assert content(checked(Overlay(top, below))) == b"\0\0ab" * (count // 2)

    def test_encoded_units_are_decoded_by_the_layer_they_belong_to(self):
        packed = Rows(row(0, UNIT, DATA, offset=STARTS[2], file=2, codec=DEFLATE, stored=len(PACKED[2])), FILES)
        assert content(checked(Overlay(Zero(UNIT, kind=ABSENT), packed))) == BLOBS[2]
        regions = Regions()
        regions.add_bytes(b"!")
        regions.add_disk(packed)
        assert content(checked(regions)) == b"!" + BLOBS[2]


class TestLittleViews:
    def test_zero(self):
        assert content(checked(Zero(1000))) == bytes(1000)
        assert [batch["kind"].tolist() for batch in Zero(1 << 50, kind=ZERO).extents()] == [[ZERO]]
        assert list(Zero(0).extents()) == []

    def test_memory(self):
        disk = Memory(b"content", sector_size=4096)
        assert content(checked(disk)) == b"content"
        assert disk.sector_size == 4096

    def test_a_sparse_file_has_its_holes(self, tmp_path):
        path = tmp_path / "sparse"
        with open(path, "wb") as file:
            file.truncate(1 << 20)
            file.seek(1 << 19)
            file.write(b"x" * 4096)
        with SourceDisk(FileSource(path)) as disk:
            found = np.concatenate(list(checked(disk).extents()))
            assert (found["kind"] == HOLE).any()
            assert content(disk) == path.read_bytes()

    def test_a_mapped_disk_without_rows(self):
        assert Mapped(np.zeros(0, EXTENT), ()).size == 0

    @pytest.mark.parametrize(("offset", "length"), [(-1, 2), (5, 6), (11, 0), (0, 11)])
    def test_a_slice_beyond_its_disk_is_refused(self, offset, length):
        with pytest.raises(FormatError):
            Slice(Zero(10), offset, length)

    def test_pad_to_goes_forwards_only(self):
        regions = Regions()
        regions.add_bytes(b"1234")
        with pytest.raises(ValueError, match="pad_to"):
            regions.pad_to(3)

    def test_regions_may_grow_after_they_were_read(self):
        regions = Regions(sector_size=4096)
        regions.add_bytes(b"one")
        assert content(regions) == b"one"
        regions.add_hole(2)
        regions.add_bytes(b"two")
        assert content(checked(regions)) == b"one\0\0two"

    def test_grown(self):
        disk = Memory(b"abc")
        assert grown(disk, 3) is disk
        assert grown(disk, 2) is disk
        assert content(checked(grown(disk, 6))) == b"abc\0\0\0"
        assert grown(disk, 6).name == disk.name

    def test_what_a_parent_would_hold_is_never_read_as_zeroes(self):
        with pytest.raises(PolicyError, match="--backing"):
            Zero(10, kind=ABSENT).read(0, 1)


class Broken(Disk):
    size = 10

    def __init__(self, *batches):
        self.batches = batches

    def extents(self, start=0, stop=None):
        return iter(self.batches)

    def _extents(self, start, stop):
        raise NotImplementedError


@pytest.mark.parametrize(
    "batches",
    [
        [row(0, 9, ZERO)],
        [row(1, 9, ZERO)],
        [row(0, 11, ZERO)],
        [row(0, 5, ZERO), row(6, 4, ZERO)],
        [row(0, 5, ZERO), row(4, 6, ZERO)],
        [np.zeros(0, EXTENT), row(0, 10, ZERO)],
        [np.concatenate((row(0, 10, ZERO), row(10, 0, ZERO)))],
        [row(0, 10, 7)],
        [row(0, 10, ZERO, offset=4)],
        [row(0, 10, HOLE, codec=DEFLATE)],
        [row(0, 10, DATA, file=1)],
        [row(0, 10, DATA, codec=DEFLATE)],
    ],
)
def test_checked_finds_what_breaks_the_contract(batches):
    disk = Broken(*batches)
    disk.files = FILES[:1]
    with pytest.raises(AssertionError):
        list(checked(disk)._extents(0, 10))


class TestRequireWithin:
    words: ClassVar = {"file": "f", "format": "x", "structure": "block"}

    def test_what_lies_inside_passes(self):
        table = np.concatenate((row(0, 10, DATA, offset=90), row(10, 5, HOLE), row(15, 5, ZERO)))
        require_within(table, [100], **self.words)
        require_within(table[1:], [], **self.words)

    @pytest.mark.parametrize("offset", [91, 100, 1 << 63])
    def test_what_passes_the_end_is_named(self, offset):
        with pytest.raises(FormatError) as caught:
            require_within(row(0, 10, DATA, offset=offset), [100], **self.words)
        assert caught.value.offset == offset

    def test_a_partial_unit_may_be_missing_where_the_format_allows(self):
        require_within(row(0, 512, DATA, offset=0), [100], allow_partial_unit=512, **self.words)
        with pytest.raises(FormatError):
            require_within(row(0, 512, DATA, offset=101), [100], allow_partial_unit=512, **self.words)

    def test_encoded_data_must_begin_inside(self):
        require_within(row(0, 512, DATA, offset=99, codec=DEFLATE, stored=50), [100], **self.words)
        with pytest.raises(FormatError):
            require_within(row(0, 512, DATA, offset=100, codec=DEFLATE, stored=50), [100], **self.words)


def test_views_pass_on_that_a_file_changed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    below = SourceDisk(FileSource(path))
    regions = Regions()
    regions.add_disk(below)
    views = [Slice(below, 1, 5), Overlay(Zero(100, kind=ABSENT), below), regions, grown(below, 200)]
    for view in views:
        view.verify_unchanged()
    path.write_bytes(b"y" * 100)
    for view in views:
        with pytest.raises(IntegrityError):
            view.verify_unchanged()
    for view in views:
        view.close()
        view.close()
    with pytest.raises(DiskmorphError):
        below.read(0, 1)
