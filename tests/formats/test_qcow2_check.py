"""qcow2 checked and repaired, beside qemu-img check: the same counts, and clean afterwards."""

import random
import struct

import numpy as np
import pytest
from contract.cases.qcow2 import COPIED, PACKED, handmade, packed_entry
from qcow2kit import MASK, Image, checked, counts, peer, repaired

from diskmorph.formats.check import WARNING
from diskmorph.formats.errors import DiskmorphError, OptionError, UnsupportedError
from diskmorph.formats.qcow2 import check_image, open_image
from diskmorph.formats.qcow2.references import Counter, compressed_ranges
from diskmorph.formats.qcow2.survey import Survey
from diskmorph.formats.registry import OpenContext
from diskmorph.formats.source import BytesSource

from testkit import KIB, MIB, run

CLUSTER = 1 << 16


OPTIONS = [
    "",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=2M",
    "extended_l2=on",
    "refcount_bits=1",
    "refcount_bits=64",
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_what_qemu_wrote_is_clean(tmp_path, options, packed):
    image = Image(tmp_path, options, packed=packed)
    report = checked(image.path, "all")
    assert report.clean
    assert (report.findings, report.patches) == ([], [])


def test_snapshots_and_bitmaps_are_counted(tmp_path):
    image = Image(tmp_path, snapshot=True)
    run("qemu-img", "bitmap", "--add", image.path, "monday")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 6 0 1M", image.path)
    assert checked(image.path).findings == []


def test_a_data_file_needs_no_leave_to_be_checked(tmp_path):
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/d.raw", path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 6 0 128k", path)
    assert checked(path).findings == []


def test_a_leak_and_a_corruption_are_told_apart_and_mended(tmp_path):
    image = Image(tmp_path)
    entry = image.data_entry()
    used = (image.get(entry) & MASK) // image.cluster
    image.blob += bytes(-len(image.blob) % image.cluster + image.cluster)
    leaked = len(image.blob) // image.cluster - 1
    image.refcount(leaked, 1).refcount(used, 0).save()
    report = checked(image.path)
    assert counts(report) == peer(image.path)
    assert report.leaks == 1
    places = {(f.structure, f.offset, f.severity) for f in report.findings}
    assert ("refcount", leaked * image.cluster, "leak") in places
    assert ("refcount", used * image.cluster, "error") in places
    assert ("L2 table", entry, "error") in places
    left = repaired(image.path, "leaks")
    assert (left.leaks, left.corruptions) == (0, report.corruptions)
    assert repaired(image.path).clean
    assert peer(image.path) == (0, 0)
    image.same()


def test_repairing_leaks_changes_nothing_but_leaked_refcounts(tmp_path):
    image = Image(tmp_path)
    used = (image.get(image.data_entry()) & MASK) // image.cluster
    path = image.refcount(used, 7).save()
    before = path.read_bytes()
    assert counts(checked(path)) == peer(path)
    assert repaired(path, "leaks").leaks == 0
    changed = [at for at, (a, b) in enumerate(zip(before, path.read_bytes(), strict=True)) if a != b]
    assert changed == [image.block + 2 * used + 1]


def test_leaks_stay_where_tables_cannot_be_trusted(tmp_path):
    image = Image(tmp_path)
    path = image.put(image.l1, image.l2[0] + 512 | COPIED).save()
    report = checked(path, "leaks")
    assert report.leaks
    assert report.corruptions
    assert report.patches == []
    left = repaired(path, "all")
    assert not left.clean
    assert left.leaks == report.leaks  # nothing that may be in use is given away


def test_the_copied_flag(tmp_path):
    image = Image(tmp_path)
    first, second = image.data_entry(0), image.data_entry(1)
    image.put(first, image.get(first) ^ COPIED).put(second, image.get(second) ^ COPIED)
    path = image.put(image.l1, image.get(image.l1) ^ COPIED).save()
    report = checked(path)
    assert counts(report) == peer(path) == (3, 0)
    assert {(f.structure, f.offset) for f in report.findings} == {
        ("L1 table", image.l1),
        ("L2 table", first),
        ("L2 table", second),
    }
    assert repaired(path).clean
    assert peer(path) == (0, 0)
    image.same()


def test_the_copied_flag_of_a_compressed_cluster(tmp_path):
    image = Image(tmp_path, packed=True)
    at = next(at for at in range(image.l2[0], image.l2[0] + image.cluster, 8) if image.get(at) & PACKED)
    path = image.put(at, image.get(at) | COPIED).save()
    assert counts(checked(path)) == peer(path)
    assert repaired(path).clean
    image.same()


@pytest.mark.parametrize("target", ["refcount table", "refcount block"])
def test_data_in_the_refcounts_is_found_and_they_are_built_anew(tmp_path, target):
    image = Image(tmp_path)
    place = {"refcount table": image.table, "refcount block": image.block}[target]
    path = image.put(image.data_entry(), place | COPIED).save()
    run("qemu-img", "convert", "-O", "raw", path, tmp_path / "before.raw")
    report = checked(path)
    assert counts(report) == peer(path)
    assert report.corruptions
    assert repaired(path).clean
    assert peer(path) == (0, 0)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "before.raw", path)


def test_data_in_other_metadata_is_found_though_the_refcount_agrees(tmp_path):
    image = Image(tmp_path)
    path = image.put(image.data_entry(), image.l1).refcount(image.l1 // image.cluster, 2).save()
    report = checked(path)
    assert ("metadata", image.l1) in {(f.structure, f.offset) for f in report.findings}
    assert not report.clean


@pytest.mark.parametrize(
    "options", ["", "refcount_bits=1", "refcount_bits=4,cluster_size=4k", "compat=0.10", "cluster_size=512"]
)
@pytest.mark.parametrize("wound", ["no table", "no block", "beyond", "misaligned"])
def test_lost_refcounts_are_built_anew(tmp_path, options, wound):
    image = Image(tmp_path, options)
    value = {"no table": 0, "no block": 0, "beyond": 1 << 40, "misaligned": image.block + 512 * 3}[wound]
    if wound == "no table":
        image.blob[image.block : image.block + image.cluster] = bytes(image.cluster)
    path = image.put(image.table, value).save()
    if wound == "misaligned" and image.cluster == 512:
        return
    if wound in {"no table", "no block"}:
        assert counts(checked(path)) == peer(path)
    assert checked(path).corruptions
    assert repaired(path).clean
    assert peer(path) == (0, 0)
    image.same()


def test_the_header_is_patched_after_what_it_points_to(tmp_path):
    image = Image(tmp_path)
    path = image.put(image.table, 0).save()
    patches = checked(path, "all").patches
    assert [patch.offset for patch in patches if patch.offset < image.cluster] == [48]
    assert patches[-1].offset == 48
    assert all(patch.offset >= len(image.blob) // image.cluster * image.cluster for patch in patches[:-1])


def test_dirty_and_corrupt_bits_are_told_and_cleared_after_success(tmp_path):
    image = Image(tmp_path)
    path = image.put(72, 3).put(88, 1 << 40).save()
    report = checked(path)
    assert report.clean
    assert [f.severity for f in report.findings] == [WARNING] * 3
    assert any("corrupt" in f.message for f in report.findings)
    assert repaired(path).findings == []
    assert path.read_bytes()[72:96] == bytes(24)
    broken = Image(tmp_path)
    path = broken.put(72, 3).put(broken.data_entry(), broken.get(broken.data_entry()) | 1 << 60).save()
    assert not repaired(path).clean
    assert path.read_bytes()[79] == 3  # not mended, so not called so


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (lambda entry: entry | 1 << 60, "reserved bits"),
        (lambda entry: entry + 512, "begin on a cluster"),
        (lambda _: 1 << 45 | COPIED, "beyond the end of the file"),
    ],
)
def test_faulty_l2_entries_name_their_place(tmp_path, word, message):
    image = Image(tmp_path)
    at = image.data_entry()
    path = image.put(at, word(image.get(at))).save()
    report = checked(path)
    assert any(message in f.message and f.offset == at for f in report.findings)
    assert counts(report) == peer(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((32 * CLUSTER | COPIED, 1 << 32 | 1), "at once"),
        ((0, 1), "no place"),
        ((packed_entry(32 * CLUSTER, 99, 16), 1), "compressed cluster has a subcluster bitmap"),
        ((1, 0), "zero flag"),
    ],
)
def test_impossible_extended_entries(tmp_path, entry, message):
    path = handmade(tmp_path / "a.qcow2", MIB, {3: entry}, {}, features=(16, 0, 0))
    report = checked(path)
    assert any(message in f.message and f.offset == 4 * CLUSTER + 48 for f in report.findings)


def test_l1_entries_that_lead_nowhere(tmp_path):
    image = Image(tmp_path)
    for value, message in ((1 << 45 | COPIED, "beyond"), (COPIED | 512, "on a cluster"), (1 << 60, "reserved")):
        path = image.put(image.l1, value).save()
        report = checked(path)
        assert any(message in f.message and f.offset == image.l1 for f in report.findings)


def test_a_cut_image_is_not_clean(tmp_path):
    image = Image(tmp_path)
    del image.blob[len(image.blob) - 5 * image.cluster :]
    path = image.save()
    report = checked(path)
    assert report.corruptions
    assert counts(report) == peer(path)


def test_damaged_snapshot_and_bitmap_tables(tmp_path):
    image = Image(tmp_path, snapshot=True)
    table = image.get(64)
    path = image.put(table, 1 << 45).save()
    report = checked(path, "leaks")
    assert any(f.structure == "snapshot table" and f.offset == table for f in report.findings)
    assert report.patches == []  # what the snapshot holds is unknown
    image = Image(tmp_path)
    run("qemu-img", "bitmap", "--add", image.path, "monday")
    blob = bytearray(image.path.read_bytes())
    at = blob.index(struct.pack(">I", 0x23852875))
    directory = struct.unpack_from(">Q", blob, at + 24)[0]
    struct.pack_into(">Q", blob, directory, 1 << 45)
    report = check_image(BytesSource(blob), OpenContext())
    assert any(f.structure == "bitmap directory" and f.offset == directory for f in report.findings)


def test_random_damage_is_counted_as_qemu_counts_it_and_mended(tmp_path):
    for seed in range(24):
        rng = random.Random(seed)
        options = rng.choice(
            ["cluster_size=4k", "", "compat=0.10", "extended_l2=on,cluster_size=16k", "refcount_bits=64"]
        )
        image = Image(tmp_path, options, packed=rng.random() < 0.3, snapshot=rng.random() < 0.4)
        used = len(image.blob) // image.cluster
        for _ in range(rng.randrange(1, 4)):
            kind, table = rng.randrange(4), rng.choice(image.l2)
            entry = table + 16 * rng.randrange(32)
            if kind == 0:
                image.blob[image.block + rng.randrange(used)] ^= 1 << rng.randrange(8)
            elif kind == 1:
                image.put(entry, image.get(entry) ^ COPIED)
            elif kind == 2:
                image.put(entry, 0)
            else:
                image.blob += bytes(2 * image.cluster)
        path = image.save()
        before = run("qemu-img", "convert", "-O", "raw", path, tmp_path / "before.raw", ok=False)
        assert counts(checked(path)) == peer(path), seed
        left = repaired(path)
        assert left.findings == [], seed
        assert peer(path) == (0, 0), seed
        if before.returncode == 0:
            run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "before.raw", path)


def test_windows_of_references_together_see_everything(tmp_path, monkeypatch):
    monkeypatch.setattr("diskmorph.formats.qcow2.survey._WINDOW_BYTES", 128)
    monkeypatch.setattr("diskmorph.formats.qcow2.refcounts.PIECE", 32)
    monkeypatch.setattr("diskmorph.formats.qcow2.repair.PIECE", 32)
    image = Image(tmp_path, "cluster_size=2k", snapshot=True)
    monkeypatch.setattr("diskmorph.formats.qcow2.check._WINDOWS", 10_000)
    assert checked(image.path).findings == []
    used = [(image.get(image.data_entry(number)) & MASK) // image.cluster for number in (0, 3, 5)]
    for cluster, value in zip(used, (0, 9, 2), strict=True):
        image.refcount(cluster, value)
    path = image.save()
    assert counts(checked(path)) == peer(path)
    assert repaired(path).clean
    assert peer(path) == (0, 0)
    image.put(image.table, 0)
    path = image.save()
    assert counts(checked(path)) == peer(path)
    assert repaired(path).clean
    assert peer(path) == (0, 0)


def test_files_with_clusters_in_too_many_windows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("diskmorph.formats.qcow2.survey._WINDOW_BYTES", 128)
    image = Image(tmp_path, "cluster_size=512,preallocation=metadata")
    with pytest.raises(UnsupportedError, match="too large to check"):
        checked(image.path)


def test_counters_stay_at_their_most():
    survey = Survey.__new__(Survey)
    survey.header = type("Header", (), {"refcount_bits": 16})()
    survey.clusters, survey.window = 10, 100
    counter = Counter(survey, 0)
    counter.add(np.array([3, 3, 4]))
    counter.add(np.array([3]), np.array([70_000]))
    assert counter.counts.tolist() == [0, 0, 0, 65535, 1, 0, 0, 0, 0, 0]
    assert counter.overflown


def test_compressed_descriptors_are_whole_sectors():
    entries = np.array([packed_entry(65536 + 100, 412, 16), packed_entry(65536 + 100, 413, 16)], np.uint64)
    offsets, lengths = compressed_ranges(entries, 16)
    assert offsets.tolist() == [65636, 65636]
    assert lengths.tolist() == [412, 924]


def test_an_unknown_repair_is_refused(tmp_path):
    with pytest.raises(OptionError):
        checked(handmade(tmp_path / "a.qcow2", MIB, {}, {}), "everything")


def test_a_sparse_file_of_many_tebibytes_is_checked_in_little_memory(tmp_path):
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "2T")
    with open(path, "r+b") as file:
        file.truncate(1 << 43)
    report = checked(path)
    assert report.clean
    assert path.stat().st_size > 64 * KIB


@pytest.mark.parametrize("options", ["cluster_size=4k", "extended_l2=on,cluster_size=16k", "cluster_size=512"])
def test_mutated_metadata_is_read_or_refused_in_words(tmp_path, options):
    image = Image(tmp_path, options, packed=True, snapshot=True)
    run("qemu-img", "bitmap", "--add", image.path, "monday")
    good = image.path.read_bytes()
    for seed in range(120):
        rng = random.Random(seed)
        blob = bytearray(good)
        for _ in range(rng.choice((1, 2, 9))):
            blob[rng.choice((rng.randrange(112), rng.randrange(60_000)))] = rng.choice((0, 1, 128, 255))
        if seed % 10 == 0:
            del blob[rng.randrange(len(blob)) :]
        for snapshot in (None, "before"):
            try:
                disk = open_image(BytesSource(blob), OpenContext(snapshot=snapshot))
                sum(len(batch) for batch in disk.extents(0, min(disk.size, 1 << 36)))
            except DiskmorphError as error:
                assert error.problem
        try:
            check_image(BytesSource(blob), OpenContext(), "all")
        except DiskmorphError as error:
            assert error.problem
