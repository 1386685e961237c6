"""What a repair of qcow2 must not do: take lost clusters for new ones, write to data, call damage mended."""

import pytest
from contract.cases.qcow2 import COPIED
from qcow2kit import MASK, Image, checked, peer, repaired

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
