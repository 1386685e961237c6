"""qcow2 written: options, layout, refcounts, and what other readers make of it."""

import hashlib
import itertools
import json
import random
import struct

import numpy as np
import pytest
from contract.cases.qcow2 import raw_deflate, zstd

from diskmorph.formats.allocator import PLACED, RUN, NewImage, NewParent
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.extents import ABSENT, BZIP2, DATA, DEFLATE, HOLE, PLAIN, ZERO, ZSTD
from diskmorph.formats.policy import Parents
from diskmorph.formats.qcow2 import check_image, new_allocator
from diskmorph.formats.qcow2.packing import Packer
from diskmorph.formats.qcow2.refcounts import pack, unpack
from diskmorph.formats.registry import OpenContext, open_disk
from diskmorph.formats.source import FileSource
from diskmorph.formats.views import Memory

from testkit import KIB, MIB, TIB, content, data, little_disk, pattern_disk, qemu_same, run, write_image

CODECS = {None: None, DEFLATE: raw_deflate, ZSTD: zstd}


def made(path, options=None, codec=None, disk=None, parent=None):
    disk = disk or little_disk(MIB + 512)
    write_image("qcow2", disk, path, options=options, codec=codec, encode=CODECS[codec], parent=parent)
    raw = path.with_suffix(".raw")
    raw.write_bytes(content(disk))
    return disk, raw


def clean(path):
    run("qemu-img", "check", "-q", "-f", "qcow2", path)
    report = check_image(FileSource(path), OpenContext())
    assert (report.corruptions, report.leaks, report.findings) == (0, 0, [])


def details(path):
    found = json.loads(run("qemu-img", "info", "-f", "qcow2", "--output=json", path).stdout)
    return found["format-specific"]["data"] | {"cluster": found["cluster-size"], "info": found}


def field(path, form, offset):
    return struct.unpack_from(form, path.read_bytes(), offset)[0]


def runs_of(*rows):
    runs = np.zeros(len(rows), RUN)
    for index, (start, length, kind, codec, size) in enumerate(rows):
        runs[index] = (start, length, size, kind, codec)
    return runs


@pytest.mark.parametrize("bits", range(9, 22))
@pytest.mark.parametrize("codec", [None, DEFLATE])
def test_every_cluster_size(tmp_path, bits, codec):
    path = tmp_path / "a.qcow2"
    _, raw = made(path, {"cluster_size": str(1 << bits)}, codec)
    qemu_same(raw, path, "qcow2")
    clean(path)
    assert details(path)["cluster"] == 1 << bits


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize(
    ("cluster", "codec"), [("512", None), ("4K", ZSTD), ("64K", DEFLATE), ("2M", None), ("2M", ZSTD)]
)
def test_every_refcount_width(tmp_path, order, cluster, codec):
    path = tmp_path / "a.qcow2"
    # Text packs so well that hundreds of clusters share one, more than narrow refcounts can count.
    disk = pattern_disk(
        3 * MIB, [(0, MIB, b"same "), (MIB, 300 * KIB, data("noise", 300 * KIB)), (2 * MIB, MIB, b"text")]
    )
    _, raw = made(path, {"refcount_bits": str(1 << order), "cluster_size": cluster}, codec, disk)
    qemu_same(raw, path, "qcow2")
    clean(path)
    assert details(path)["refcount-bits"] == 1 << order


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcounts_are_packed_from_the_lowest_bit(bits):
    rng = random.Random(bits)
    counts = np.array([rng.randrange(1 << min(bits, 60)) for _ in range(64)], np.uint64)
    packed = pack(counts, bits)
    assert len(packed) == 64 * bits // 8
    assert (unpack(packed, bits) == counts).all()
    if bits < 8:
        assert packed[0] & ((1 << bits) - 1) == int(counts[0])
    with pytest.raises(ValueError, match="does not fit"):
        pack(np.array([1 << bits if bits < 64 else 0, 0, 0, 0, 0, 0, 0, 0], np.uint64), bits) if bits < 64 else pack(
            np.array([2], np.uint64), 1
        )


def test_defaults_are_those_of_qemu(tmp_path):
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    made(ours)
    run("qemu-img", "create", "-q", "-f", "qcow2", theirs, str(MIB + 512))
    mine, his = details(ours), details(theirs)
    assert {k: v for k, v in mine.items() if k != "info"} == {k: v for k, v in his.items() if k != "info"}
    # The header's extensions are the same bytes: the feature name table.
    assert ours.read_bytes()[72:512] == theirs.read_bytes()[72:512]


@pytest.mark.parametrize(("word", "version"), [("0.10", 2), ("v2", 2), ("1.1", 3), ("v3", 3)])
def test_compat(tmp_path, word, version):
    path = tmp_path / "a.qcow2"
    _, raw = made(path, {"compat": word})
    assert field(path, ">I", 4) == version
    qemu_same(raw, path, "qcow2")
    run("qcowinfo", path)


def test_extended_l2_keeps_subclusters_apart(tmp_path):
    path = tmp_path / "a.qcow2"
    disk = pattern_disk(
        MIB, [(2048, 2048, b"one"), (8192, 4096, ZERO), (65536 * 3 - 2048, 4096, b"two"), (MIB - 512, 512, b"end")]
    )
    _, raw = made(path, {"extended_l2": "on"}, None, disk)
    qemu_same(raw, path, "qcow2")
    clean(path)
    with open_disk(path) as back:
        rows = np.concatenate(list(back.extents()))
    assert [tuple(row) for row in rows[["start", "length", "kind"]].tolist()] == [
        (0, 2048, HOLE),
        (2048, 2048, DATA),
        (4096, 4096, HOLE),
        (8192, 4096, ZERO),
        (12288, 3 * 65536 - 2048 - 12288, HOLE),
        (3 * 65536 - 2048, 4096, DATA),
        (3 * 65536 + 2048, MIB - 2048 - 3 * 65536 - 2048, HOLE),
        (MIB - 2048, 2048, DATA),
    ]
    assert details(path)["extended-l2"] is True


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation_gives_every_cluster_a_place(tmp_path, compat, mode):
    path = tmp_path / "a.qcow2"
    disk, raw = made(path, {"preallocation": mode, "compat": compat})
    qemu_same(raw, path, "qcow2")
    clean(path)
    assert path.stat().st_size >= disk.size
    allocator = new_allocator(NewImage(MIB, "a", options={"preallocation": mode, "compat": compat}))
    placed = allocator.place(runs_of((0, MIB // 2, HOLE, PLAIN, 0), (MIB // 2, MIB // 2, ZERO, PLAIN, 0)))
    assert allocator.preallocation == mode
    assert (placed["kind"] == ZERO).all()
    assert int(placed["length"].sum()) == MIB


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", ["512", "64K"])
def test_overlays_name_their_parent_and_hide_it_with_zeroes(tmp_path, compat, cluster):
    base, path = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    made(base, disk=Memory(b"b" * MIB))
    parent = NewParent("base.qcow2", "qcow2", MIB, path=base)
    disk = pattern_disk(MIB + 4096, [(65536, 65536, b"t"), (196608, 65536, ZERO)])
    write_image("qcow2", disk, path, options={"compat": compat, "cluster_size": cluster}, parent=parent)
    info = details(path)["info"]
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.qcow2", "qcow2")
    want = bytearray(b"b" * MIB + bytes(4096))
    want[65536:131072], want[196608:262144] = b"t" * 65536, bytes(65536)
    with open_disk(path, parents=Parents.of(tmp_path)) as chain:
        assert content(chain) == want
    (tmp_path / "want.raw").write_bytes(want)
    qemu_same(tmp_path / "want.raw", path, "qcow2")
    clean(path)


def test_version_2_gives_zeroes_in_overlays_a_place():
    parent = NewParent("base", "raw", MIB)
    allocator = new_allocator(NewImage(MIB, "a", options={"compat": "0.10"}, parent=parent))
    placed = allocator.place(runs_of((0, 65536, ZERO, PLAIN, 0), (65536, 65536, ABSENT, PLAIN, 0)))
    assert placed[["start", "length", "kind"]].tolist() == [(0, 65536, ZERO)]
    without = new_allocator(NewImage(MIB, "a", options={"compat": "0.10"}))
    assert not len(without.place(runs_of((0, 65536, ZERO, PLAIN, 0))))


def test_backing_formats_have_qemus_names_and_long_names_are_refused():
    vhd = new_allocator(NewImage(MIB, "a", parent=NewParent("base.vhd", "vhd", MIB)))
    head = list(vhd.finish())[-1]
    assert head.offset == 0
    assert b"vpc\0" in bytes(head.data)
    for name, cluster in (("x" * 1024, "64K"), ("x" * 400, "512")):
        with pytest.raises(TargetError, match="too long"):
            new_allocator(NewImage(MIB, "a", options={"cluster_size": cluster}, parent=NewParent(name, "raw", MIB)))
    new_allocator(NewImage(MIB, "a", options={"cluster_size": "512"}, parent=NewParent("x" * 300, "raw", MIB)))


@pytest.mark.parametrize(
    ("options", "words", "codec", "parent"),
    [
        ({"compat": "2"}, "compat=2", None, None),
        ({"cluster_size": "3000"}, "cluster_size", None, None),
        ({"cluster_size": "256"}, "cluster_size", None, None),
        ({"cluster_size": "4M"}, "cluster_size", None, None),
        ({"refcount_bits": "3"}, "refcount_bits", None, None),
        ({"refcount_bits": "8", "compat": "0.10"}, "compat=0.10", None, None),
        ({"compression_type": "zstd", "compat": "0.10"}, "compat=0.10", None, None),
        ({"extended_l2": "on", "compat": "0.10"}, "compat=0.10", None, None),
        ({"lazy_refcounts": "on", "compat": "v2"}, "compat=0.10", None, None),
        ({"extended_l2": "on", "cluster_size": "8K"}, "16K", None, None),
        ({"data_file": "x"}, "data file", None, None),
        ({"backing_file": "x"}, "backing_file", None, None),
        ({"nonsense": "on"}, "nonsense", None, None),
        ({}, "bzip2", BZIP2, None),
        ({"compression_type": "zlib"}, "contradicts", ZSTD, None),
        ({"compat": "0.10"}, "compat=0.10", ZSTD, None),
        ({"preallocation": "full"}, "contradicts", DEFLATE, None),
        ({"preallocation": "metadata"}, "overlay", None, NewParent("x", "raw", MIB)),
    ],
)
def test_impossible_options_are_refused(options, words, codec, parent):
    with pytest.raises(OptionError) as caught:
        new_allocator(NewImage(MIB, "a", options=options, codec=codec, parent=parent))
    assert words in str(caught.value)


def test_a_disk_too_large_for_its_clusters_is_refused():
    with pytest.raises(TargetError, match="cluster_size"):
        new_allocator(NewImage(2 * TIB, "a", options={"cluster_size": "512"}))


def test_compression_type_without_compression_is_kept_for_later(tmp_path):
    path = tmp_path / "a.qcow2"
    _, raw = made(path, {"compression_type": "zstd"})
    assert details(path)["compression-type"] == "zstd"
    qemu_same(raw, path, "qcow2")
    assert new_allocator(NewImage(MIB, "a", options={"compression_type": "zstd"}, codec=DEFLATE)).codec == ZSTD


def test_the_header_comes_last_and_data_lies_in_one_run():
    allocator = new_allocator(NewImage(64 * MIB, "a"))
    placed = allocator.place(runs_of((0, 64 * MIB, DATA, PLAIN, 0)))
    assert len(placed) == 1
    assert int(placed["offset"][0]) == 65536
    assert list(allocator.begin()) == []
    writes = list(allocator.finish())
    assert writes[-1].offset == 0
    assert all(write.offset for write in writes[:-1])


@pytest.mark.parametrize("options", [{"cluster_size": "512"}, {"extended_l2": "on", "cluster_size": "16K"}])
def test_the_layout_does_not_depend_on_how_runs_are_divided(options):
    size = 20 * 1024 * MIB  # several groups of L2 tables
    runs = runs_of(*((at, 9 * MIB, DATA, PLAIN, 0) for at in range(0, size, 320 * MIB)))
    found = []
    for step in (size, 1000, 3):
        allocator = new_allocator(NewImage(size, "a", options=options))
        state, placed = hashlib.sha256(), []
        writes = []
        for low in range(0, len(runs), step):
            part = runs[low : low + step]
            placed.append(allocator.place(part))
            writes += allocator.settle(int(part["start"][-1] + part["length"][-1]))
        writes += allocator.finish()
        for write in sorted(writes):
            state.update(b"%d " % write.offset + bytes(write.data))
        found.append((np.concatenate(placed)["offset"].tolist(), allocator.sizes(), state.hexdigest()))
    assert found[0] == found[1] == found[2]


def test_compressed_clusters_share_host_clusters_byte_by_byte():
    packer = Packer(65536, 16)
    offsets, end = packer.pack(np.array([1000, 2000, 65000], np.uint64), 65536)
    assert offsets.tolist() == [65536, 66536, 68536]
    assert end == 4 * 65536 - 65536
    counts = np.ones(4, np.uint64)
    packer.apply(0, counts)
    assert counts.tolist() == [1, 3, 1, 1]
    # Something else was put behind: what fits goes into the room that is left, the rest begins anew.
    room = end - 68536 - 65000
    offsets, after = packer.pack(np.array([room - 10, 11, 500], np.uint64), end + 65536)
    assert offsets.tolist() == [68536 + 65000, end + 65536, end + 65536 + 11]
    assert after == end + 2 * 65536


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_no_host_cluster_is_shared_more_often_than_its_refcount_counts(bits):
    rng = random.Random(bits)
    packer = Packer(4096, bits)
    end, spans = 4096, []
    for _ in range(40):
        sizes = np.array([rng.choice((3, 50, 900, 4000)) for _ in range(rng.randrange(1, 60))], np.uint64)
        offsets, end = packer.pack(sizes, end)
        spans += [(int(o), int(o + n)) for o, n in zip(offsets, sizes, strict=True)]
        end += rng.choice((0, 0, 4096))
    counts = np.ones(end // 4096, np.uint64)
    packer.apply(0, counts)
    touched = np.zeros_like(counts)
    for begin, stop in spans:
        touched[begin // 4096 : (stop - 1) // 4096 + 1] += np.uint64(1)
    assert (np.maximum(touched, 1) == counts).all()
    assert int(counts.max()) <= (1 << bits) - 1
    spans.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_mixed_plain_and_compressed_runs_of_one_call():
    allocator = new_allocator(NewImage(MIB, "a", codec=DEFLATE))
    unit = 65536
    placed = allocator.place(
        runs_of(
            (0, unit, DATA, DEFLATE, 700),
            (unit, 2 * unit, DATA, PLAIN, 0),
            (3 * unit, unit, ZERO, PLAIN, 0),
            (4 * unit, unit, DATA, DEFLATE, 900),
        )
    )
    assert placed.dtype == PLACED
    assert placed[["start", "offset", "codec"]].tolist() == [
        (0, 3 * unit, DEFLATE),
        (unit, unit, PLAIN),
        (4 * unit, 3 * unit + 700, DEFLATE),
    ]


def test_2_tib_are_placed_in_little_memory():
    allocator = new_allocator(NewImage(2 * TIB, "a"))
    assert len(allocator._l1) == 4096
    total = 0
    step = 256 * 1024 * MIB
    for low in range(0, 2 * TIB, step):
        allocator.place(runs_of((low, step, DATA, PLAIN, 0)))
        for write in allocator.settle(low + step):
            assert len(write.data) <= 4 * MIB
            total += len(write.data)
    sizes = allocator.sizes()
    total += sum(len(write.data) for write in allocator.finish())
    assert sizes == allocator.sizes()
    assert 256 * MIB <= total < 330 * MIB
    assert sizes[0] > 2 * TIB


def test_sizes_are_known_before_tables_are_written():
    disk = little_disk(5 * MIB)
    for options in ({}, {"cluster_size": "512"}, {"refcount_bits": "64", "cluster_size": "4K"}):
        one, two = (new_allocator(NewImage(disk.size, "a", options=options)) for _ in range(2))
        for allocator in (one, two):
            for at in range(0, 5 * MIB, MIB):
                allocator.place(runs_of((at, 300 * KIB // 4096 * 4096, DATA, PLAIN, 0)))
        list(two.finish())
        assert one.sizes() == two.sizes()


def test_odd_sizes_are_rounded_up_to_a_sector(tmp_path):
    for size in (1, 511, 512, 1000, 65537):
        assert new_allocator(NewImage(size, "a")).size == -(-size // 512) * 512
    path = tmp_path / "a.qcow2"
    write_image("qcow2", Memory(data("odd", 1000)), path)
    with open_disk(path) as back:
        assert content(back) == data("odd", 1000) + bytes(24)
