"""qcow version 1: read as qemu-img reads it; damage names its place."""

import struct

import numpy as np
import pytest
from contract.cases.qcow import PACKED, handmade, raw_deflate

from diskmorph.formats.allocator import NewImage
from diskmorph.formats.errors import FormatError, OptionError, PolicyError, SourceError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, DEFLATE, HOLE
from diskmorph.formats.policy import Parents
from diskmorph.formats.qcow import ENTRY, ENTRY_STRUCT, HEADER, check_image, new_allocator, open_image
from diskmorph.formats.registry import OpenContext, open_disk
from diskmorph.formats.source import BytesSource, FileSource

from testkit import MIB, content, data, run

CLUSTER = 4096


def opened(path):
    return open_image(FileSource(path), OpenContext())


def refused(path, error=FormatError):
    with pytest.raises(error) as caught:
        content(opened(path))
    assert caught.value.format == "qcow"
    return caught.value


def test_declarations():
    assert HEADER.sizeof() == 48
    blob = data("entry", 8)
    assert int(np.frombuffer(blob, ENTRY)[0]) == ENTRY_STRUCT.parse(blob)


def test_compressed_images_of_qemu_img(tmp_path):
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow"
    raw.write_bytes(b"".join(b"line %08d\n" % number for number in range(200_000))[: 2 * MIB])
    run(
        "qemu-img", "convert", "-f", "raw", "-O", "qcow", "-c", raw, path, ok=False
    )  # it exits with 1 after all went well
    disk = opened(path)
    assert content(disk) == raw.read_bytes()
    assert set(np.concatenate(list(disk.extents()))["codec"].tolist()) == {DEFLATE}
    assert check_image(FileSource(path), OpenContext()).clean


def test_info_and_identity(tmp_path):
    info = opened(handmade(tmp_path / "a.qcow", MIB, {}, {})).info
    assert (info.format, info.virtual_size, info.allocation_unit, info.parent) == ("qcow", MIB, CLUSTER, None)


def test_a_backing_file_is_asked_for_what_was_never_written(tmp_path):
    (tmp_path / "base.raw").write_bytes(b"b" * (3 * CLUSTER))
    path = handmade(tmp_path / "a.qcow", 4 * CLUSTER, {1: MIB}, {MIB: b"t" * CLUSTER}, backing=b"base.raw")
    kinds = np.concatenate(list(opened(path).extents()))["kind"].tolist()
    assert kinds == [ABSENT, DATA, ABSENT]
    with open_disk(path, parents=Parents.of(tmp_path)) as disk:
        assert content(disk) == b"b" * CLUSTER + b"t" * CLUSTER + b"b" * CLUSTER + bytes(CLUSTER)
    with pytest.raises(PolicyError):
        open_disk(path)


def test_aes_is_refused_by_name(tmp_path):
    path = handmade(tmp_path / "a.qcow", MIB, {}, {}, crypt=1)
    assert opened(path).info.features["encryption"] == "AES"
    assert "AES" in str(refused(path, UnsupportedError))
    assert check_image(FileSource(path), OpenContext()).clean


@pytest.mark.parametrize(
    ("field", "offset", "piece"),
    [
        ("cluster_bits", 32, b"\x08"),
        ("l2_bits", 33, b"\x0e"),
        ("crypt_method", 36, struct.pack(">I", 2)),
        ("size", 24, struct.pack(">Q", 1 << 63)),
        ("backing_file_size", 8, struct.pack(">QI", 48, 2000)),
        ("backing_file_offset", 8, struct.pack(">QI", 1 << 40, 20)),
        ("offset", 40, struct.pack(">Q", 1 << 40)),
        ("offset", 24, struct.pack(">Q", 1 << 62)),
    ],
)
def test_header_faults_name_their_field(tmp_path, field, offset, piece):
    path = handmade(tmp_path / "a.qcow", MIB, {}, {offset: piece})
    assert refused(path).field == field


def test_tables_and_data_beyond_the_file(tmp_path):
    path = handmade(tmp_path / "a.qcow", MIB, {}, {4096: struct.pack(">Q", 1 << 41)})
    error = refused(path)
    assert (error.structure, error.offset) == ("L2 table", 1 << 41)
    path = handmade(tmp_path / "b.qcow", MIB, {5: 3 * MIB, 6: MIB}, {MIB: b"x" * CLUSTER})
    error = refused(path)
    assert (error.structure, error.offset) == ("data cluster", 3 * MIB)
    report = check_image(FileSource(path), OpenContext())
    assert [(f.structure, f.offset) for f in report.findings] == [("data cluster", 3 * MIB)]
    stream = raw_deflate(b"y" * CLUSTER)
    path = handmade(tmp_path / "c.qcow", MIB, {0: PACKED | len(stream) << 51 | MIB}, {MIB: stream[:-3]})
    assert refused(path).structure == "data cluster"


@pytest.mark.parametrize("keep", [0.97, 0.8, 0.5, 0.1, 700, 47, 10])
def test_truncated_images_are_refused(tmp_path, keep):
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow"
    raw.write_bytes(data("cut", 2 * MIB))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow", raw, path)
    blob = path.read_bytes()
    path.write_bytes(blob[: int(len(blob) * keep) if keep < 1 else keep])
    assert refused(path).structure


def test_a_file_may_end_inside_its_last_cluster_only_where_the_disk_ends(tmp_path):
    piece = {MIB: b"z" * (CLUSTER + 1024)}
    path = handmade(tmp_path / "a.qcow", 2 * CLUSTER + 1024, {0: MIB, 2: MIB + CLUSTER}, piece)
    assert content(opened(path)) == b"z" * CLUSTER + bytes(CLUSTER) + b"z" * 1024
    path = handmade(tmp_path / "b.qcow", 2 * CLUSTER + 1536, {0: MIB, 2: MIB + CLUSTER}, piece)
    assert refused(path).structure == "data cluster"


def test_a_place_used_twice_is_found(tmp_path):
    path = handmade(tmp_path / "a.qcow", MIB, {0: MIB, 9: MIB}, {MIB: b"x" * CLUSTER})
    report = check_image(FileSource(path), OpenContext())
    assert [(f.structure, f.offset) for f in report.findings if f.severity == "error"] == [("L2 table", MIB)]


def test_what_a_wound_leaves_is_found(tmp_path):
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow"
    raw.write_bytes(data("wound", 256 * 1024))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow", raw, path)
    whole = path.read_bytes()
    assert check_image(FileSource(path), OpenContext()).findings == []
    l1 = struct.unpack_from(">Q", whole, 40)[0]
    l2 = struct.unpack_from(">Q", whole, l1)[0]

    def wounded(offset, value):
        return BytesSource(whole[:offset] + struct.pack(">Q", value) + whole[offset + 8 :])

    def found(source):
        return [(f.severity, f.message) for f in check_image(source, OpenContext()).findings]

    assert found(wounded(l2 + 8, 0)) == [("warning", "1 clusters hold nothing")]
    assert ("error", "a place in the file is used twice") in found(wounded(l2 + 8, l2))
    assert ("error", "the disk's size 262136 is not a multiple of 512") in found(wounded(24, 256 * 1024 - 8))
    with pytest.raises(FormatError, match="does not begin on a cluster"):
        content(open_image(wounded(l2 + 8, l2 + 4096 + 512), OpenContext()))


def test_large_disks_are_one_extent_where_nothing_is(tmp_path):
    path = handmade(tmp_path / "a.qcow", 1 << 34, {1 << 21: MIB}, {MIB: b"x" * CLUSTER})
    rows = np.concatenate(list(opened(path).extents()))
    assert rows[["start", "kind"]].tolist() == [(0, HOLE), (1 << 33, DATA), ((1 << 33) + CLUSTER, HOLE)]


def test_there_are_no_snapshots_and_no_writer(tmp_path):
    path = handmade(tmp_path / "a.qcow", MIB, {}, {})
    with pytest.raises(SourceError, match="'monday'"):
        open_disk(path, snapshot="monday")
    with pytest.raises(OptionError, match="not written"):
        new_allocator(NewImage(MIB, "a"))
    with pytest.raises(FormatError, match="version 1"):
        open_image(BytesSource(b"QFI\xfb\0\0\0\2"), OpenContext())
