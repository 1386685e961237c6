"""What a repair of qcow2 must not do: take lost clusters for new ones, write to data, call damage mended."""

import pytest
from contract.cases.qcow2 import COPIED
from qcow2kit import MASK, Image, checked, counts, peer, repaired

from diskmorph.formats.check import WARNING

from testkit import run


def settled(path):
    """Repair until nothing is left to mend; return the last report."""
    for _ in range(4):
        left = repaired(path)
        if not checked(path, "all").patches:
            return left
    raise AssertionError("repairs do not come to an end")


def refused_to_grow(path):
    size = path.stat().st_size
    report = checked(path, "all")
    assert report.corruptions
    assert report.patches == []
    assert [f for f in report.findings if "restore the rest" in f.message and f.severity == WARNING]
    assert path.stat().st_size == size


def lost_refcounts(image):
    """Take the refcount block away, so that refcounts must be built anew behind the end."""
    return image.put(image.table, 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", [1000, 1 << 16, (3 << 16) - 1000])
def test_a_cut_image_does_not_grow_over_what_it_lost(tmp_path, cut, packed):
    image = lost_refcounts(Image(tmp_path, packed=packed))
    end = len(image.blob) - (600 if packed and cut == 1000 else cut)
    del image.blob[end:]
    refused_to_grow(image.put(72, 3).save())


def test_a_cut_image_of_small_clusters(tmp_path):
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "32M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 20M", path)
    with open(path, "r+b") as file:
        file.truncate(12 << 20)
    refused_to_grow(path)


def test_what_only_a_snapshot_lost_is_not_grown_over(tmp_path):
    image = Image(tmp_path, snapshot=True)
    last = len(image.blob) - image.cluster
    table = image.get(image.get(image.get(64))) & MASK
    active = next(at for at in range(image.l2[0], image.l2[0] + image.cluster, 8) if image.get(at) & MASK == last)
    kept = table + active - image.l2[0]
    mine, its = image.get(active), image.get(kept)
    image.put(active, its | COPIED).put(kept, mine & MASK)
    del image.blob[-1000:]
    refused_to_grow(lost_refcounts(image).save())


@pytest.mark.parametrize("where", ["L1 table", "L2 table", "snapshot", "bitmap", "compressed"])
def test_nothing_grows_over_what_any_table_refers_to(tmp_path, where):
    image = Image(tmp_path, snapshot=True, packed=where == "compressed")
    run("qemu-img", "bitmap", "--add", image.path, "monday")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 6 0 1M", image.path)
    image.blob = bytearray(image.path.read_bytes())
    image.blob += bytes(-len(image.blob) % image.cluster)
    end = len(image.blob)
    if where == "L1 table":
        image.put(image.l1, end | COPIED)
    elif where == "L2 table":
        image.put(image.data_entry(), end | COPIED)
    elif where == "snapshot":
        image.put(image.get(image.get(64)), end)
    elif where == "bitmap":
        at = image.blob.index((0x23852875).to_bytes(4, "big"))
        image.put(image.get(image.get(at + 24)), end)
    else:
        image.put(image.data_entry(), 1 << 62 | 1 << 54 | (end - 100))
    refused_to_grow(lost_refcounts(image).save())


def test_what_lies_behind_a_whole_image_is_free_to_grow_into(tmp_path):
    image = lost_refcounts(Image(tmp_path, packed=True))
    del image.blob[len(image.blob) // 512 * 512 :]
    path = image.save()
    assert settled(path).clean
    assert peer(path) == (0, 0)


def test_a_cut_tail_is_told_of_until_it_is_back(tmp_path):
    image = Image(tmp_path)
    used = (image.get(image.data_entry()) & MASK) // image.cluster
    del image.blob[-1000:]
    path = image.refcount(used, 0).put(72, 3).save()
    assert settled(path).corruptions == 1
    assert path.read_bytes()[79] == 3


@pytest.mark.parametrize("shared", [True, False])
def test_data_that_an_l1_entry_takes_for_a_table_is_not_written_to(tmp_path, shared):
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0xa5 0 16k", path)
    blob = bytearray(path.read_bytes())
    l1 = int.from_bytes(blob[40:48], "big")
    data = blob.index(b"\xa5" * 512)
    entry = l1 + (40 if shared else 0)  # else the only table that refers to it is lost
    blob[entry : entry + 8] = (data | COPIED).to_bytes(8, "big")
    path.write_bytes(blob)
    settled(path)
    assert path.read_bytes()[data : data + 512] == b"\xa5" * 512
    if shared:
        run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0xa5 0 16k", path)


def test_tables_of_snapshots_are_not_taken_for_shared(tmp_path):
    image = Image(tmp_path)
    for name in "ab":
        run("qemu-img", "snapshot", "-c", name, image.path)
    image.blob = bytearray(image.path.read_bytes())
    entry = image.data_entry()
    path = image.put(entry, image.get(entry) | COPIED).save()
    assert settled(path).findings == []


def test_lowering_refcounts_leaves_no_flag_wrong(tmp_path):
    image = Image(tmp_path)
    run("qemu-img", "snapshot", "-c", "lost", image.path)
    image.blob = bytearray(image.path.read_bytes())
    at = image.data_entry()
    path = image.put(60, 0, ">I").put(64, 0).put(at, image.get(at) | COPIED).save()
    before = checked(path)
    assert before.leaks
    assert before.corruptions == 1
    assert repaired(path, "leaks").findings == []
    assert peer(path) == (0, 0)


def test_lowering_refcounts_leaves_flags_that_were_wrong(tmp_path):
    image = Image(tmp_path)
    at, used = image.data_entry(0), (image.get(image.data_entry(1)) & MASK) // image.cluster
    path = image.put(at, image.get(at) ^ COPIED).refcount(used, 2).save()
    assert counts(checked(path)) == (2, 1)
    assert counts(repaired(path, "leaks")) == (1, 0)
    assert path.read_bytes()[at] & 0x80 == 0


@pytest.mark.parametrize("how", ["leaks", "all"])
@pytest.mark.parametrize("target", ["L1 table", "L2 table"])
def test_nothing_is_given_away_while_metadata_is_used_for_data_too(tmp_path, target, how):
    image = Image(tmp_path)
    entry = image.data_entry()
    lost = (image.get(entry) & MASK) // image.cluster
    image.put(entry, {"L1 table": image.l1, "L2 table": image.l2[0]}[target] | COPIED)
    path = image.put(72, 2).save()
    for _ in range(2):
        left = repaired(path, how)
        assert left.corruptions
        assert left.leaks == 1
    blob = path.read_bytes()
    assert blob[79] == 2
    assert blob[image.block + 2 * lost + 1] == 1
    assert checked(path, how).patches == []


def test_a_flag_that_no_repair_turns_keeps_the_bits(tmp_path):
    image = Image(tmp_path, packed=True)
    run("qemu-img", "snapshot", "-c", "before", image.path)
    image.blob = bytearray(image.path.read_bytes())
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 3M", image.path)
    image.blob = bytearray(image.path.read_bytes())
    table = image.get(image.get(image.get(64))) & MASK
    at = next(at for at in range(table, table + image.cluster, 8) if image.get(at) & 1 << 62)
    path = image.put(at, image.get(at) | COPIED).put(72, 2).save()
    assert settled(path).corruptions
    assert path.read_bytes()[79] == 2


def test_what_commits_a_repair_waits_for_what_it_relies_on(tmp_path):
    image = Image(tmp_path)
    first, used = image.data_entry(), (image.get(image.data_entry(1)) & MASK) // image.cluster
    image.put(first, image.get(first) ^ COPIED).put(image.l1, image.get(image.l1) ^ COPIED)
    path = image.refcount(used, 0).put(72, 3).put(88, 1 << 40).save()
    patches = checked(path, "all").patches
    assert [(patch.offset, patch.sync) for patch in patches] == [
        (image.block + 2 * used, False),
        (image.l1, True),
        (first, False),
        (88, True),
        (72, True),
    ]
    path = lost_refcounts(image).save()
    patches = checked(path, "all").patches
    assert [patch.offset for patch in patches if patch.sync] == [image.l1, 48, 88, 72]
    assert patches[-3].offset == 48


def test_flags_wait_for_refcounts_that_are_lowered(tmp_path):
    image = Image(tmp_path)
    run("qemu-img", "snapshot", "-c", "lost", image.path)
    image.blob = bytearray(image.path.read_bytes())
    patches = checked(image.put(60, 0, ">I").put(64, 0).save(), "leaks").patches
    first = next(number for number, patch in enumerate(patches) if "copied" in patch.why)
    assert first > 0
    assert [patch.sync for patch in patches[: first + 1]] == [False] * first + [True]
