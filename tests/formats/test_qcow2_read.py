"""qcow2 read: every feature that is taken, and every one that is refused, with its place."""

import struct

import numpy as np
import pytest
from contract.cases.qcow2 import COPIED, PACKED, handmade, packed_entry, raw_deflate

from diskmorph.formats.errors import FormatError, PolicyError, SourceError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, DEFLATE, HOLE, PLAIN, ZERO
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.qcow2 import check_image, open_image, schema
from diskmorph.formats.registry import OpenContext, open_disk
from diskmorph.formats.source import BytesSource, FileSource

from testkit import KIB, MIB, TIB, content, data, little_disk, run

CLUSTER = 1 << 16
BASE = 32 * CLUSTER


def opened(path, **words):
    return open_image(FileSource(path), OpenContext(**words))


def rows(disk, *names):
    batches = list(disk.extents())
    table = np.concatenate(batches)
    return [tuple(int(value) for value in row) for row in table[list(names)]] if names else table


def refused(path, error, **words):
    with pytest.raises(error) as caught:
        content(opened(path, **words))
    assert caught.value.format == "qcow2"
    assert caught.value.file == str(path)
    return caught.value


@pytest.mark.parametrize(
    ("layout", "entry"),
    [
        (schema.ENTRY, schema.ENTRY_STRUCT),
        (schema.EXTENDED_ENTRY, schema.EXTENDED_STRUCT),
    ],
)
def test_hot_dtypes_are_their_declarations(layout, entry):
    blob = data("dtype", layout.itemsize)
    assert layout.itemsize == entry.sizeof()
    parsed = entry.parse(blob)
    value = np.frombuffer(blob, layout)[0]
    if layout.names is None:
        assert int(value) == parsed
    else:
        assert {name: int(value[name]) for name in layout.names} == {name: parsed[name] for name in layout.names}


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_refcount_dtypes(bits):
    assert schema.refcount_dtype(bits).itemsize * 8 == bits


def test_header_declarations_have_the_lengths_of_the_specification():
    assert schema.HEADER.sizeof() == schema.V2_LENGTH
    assert schema.HEADER.sizeof() + schema.HEADER_V3.sizeof() == schema.V3_LENGTH
    assert schema.V3_LENGTH + schema.HEADER_MORE.sizeof() == schema.WRITTEN_LENGTH
    assert (schema.SNAPSHOT.sizeof(), schema.BITMAP_ENTRY.sizeof(), schema.FEATURE_NAME.sizeof()) == (40, 24, 48)


def test_data_holes_and_both_kinds_of_zero_stay_distinct(tmp_path):
    entries = {0: BASE | COPIED, 2: 1, 3: BASE + CLUSTER | COPIED | 1, 5: BASE + 2 * CLUSTER | COPIED}
    path = handmade(
        tmp_path / "a.qcow2", 6 * CLUSTER, entries, {BASE: b"a" * CLUSTER, BASE + 2 * CLUSTER: b"c" * CLUSTER}
    )
    assert rows(opened(path), "start", "length", "kind", "offset") == [
        (0, CLUSTER, DATA, BASE),
        (CLUSTER, CLUSTER, HOLE, 0),
        (2 * CLUSTER, 2 * CLUSTER, ZERO, 0),
        (4 * CLUSTER, CLUSTER, HOLE, 0),
        (5 * CLUSTER, CLUSTER, DATA, BASE + 2 * CLUSTER),
    ]


def test_neighbouring_clusters_are_one_extent_whatever_their_copied_flag(tmp_path):
    entries = {n: BASE + n * CLUSTER | (COPIED if n % 2 else 0) for n in range(9)}
    path = handmade(tmp_path / "a.qcow2", 9 * CLUSTER, entries, {BASE: bytes(9 * CLUSTER)})
    assert rows(opened(path), "start", "length", "offset") == [(0, 9 * CLUSTER, BASE)]


def test_an_overlay_asks_its_parent_only_for_what_was_never_written(tmp_path):
    (tmp_path / "base.raw").write_bytes(b"b" * (CLUSTER + 100))
    path = handmade(
        tmp_path / "top.qcow2", 3 * CLUSTER, {0: 1}, {}, backing=b"base.raw", extensions=[(0xE2792ACA, b"raw")]
    )
    disk = opened(path)
    assert [row[0] for row in rows(disk, "kind")] == [ZERO, ABSENT]
    assert disk.info.parent.names == ("base.raw",)
    assert disk.info.parent.format == "raw"
    with open_disk(path, parents=tmp_path) as chain:
        # A zero hides the parent, a hole shows it; beyond a short parent lie zeroes.
        assert content(chain) == bytes(CLUSTER) + b"b" * 100 + bytes(2 * CLUSTER - 100)
    with pytest.raises(PolicyError, match="--allow-parent"):
        open_disk(path)


def test_a_backing_file_without_format_is_probed(tmp_path):
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "1M")
    run("qemu-io", "-c", "write -P 5 0 64k", tmp_path / "base.qcow2")
    path = handmade(tmp_path / "top.qcow2", MIB, {}, {}, backing=b"base.qcow2")
    assert opened(path).info.parent.format is None
    with open_disk(path, parents=tmp_path) as disk:
        assert content(disk) == b"\5" * CLUSTER + bytes(MIB - CLUSTER)


def test_compressed_clusters_are_extents_of_their_own_up_to_the_end_of_the_file(tmp_path):
    stream = raw_deflate(b"x" * CLUSTER)
    entry = packed_entry(BASE + 100, 5 * 512, 16)
    path = handmade(tmp_path / "a.qcow2", CLUSTER, {0: entry}, {BASE + 100: stream}, end=BASE + 100 + len(stream))
    disk = opened(path)
    assert rows(disk, "offset", "stored", "codec") == [(BASE + 100, len(stream), DEFLATE)]
    assert content(disk) == b"x" * CLUSTER


def test_a_deflate_stream_with_a_large_window_is_read(tmp_path):
    import zlib

    unit = data("window", 20 * KIB) * 4
    unit = unit[:CLUSTER]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = packer.compress(unit) + packer.flush()
    assert len(stream) < 30 * KIB
    path = handmade(tmp_path / "a.qcow2", CLUSTER, {0: packed_entry(BASE, len(stream), 16)}, {BASE: stream})
    assert content(opened(path)) == unit


def test_damaged_compressed_data_names_its_place(tmp_path):
    path = handmade(tmp_path / "a.qcow2", CLUSTER, {0: packed_entry(BASE + 9, 700, 16)}, {BASE + 9: b"\xff" * 700})
    error = refused(path, FormatError)
    assert error.offset == BASE + 9


@pytest.mark.parametrize(
    ("entry", "words", "field"),
    [
        (BASE | 1 << 57, "reserved", "entry 3"),
        (BASE | 1 << 3, "reserved", "entry 3"),
        (BASE + 512, "does not begin on a cluster", "entry 3"),
    ],
)
def test_faulty_l2_entries_name_their_place(tmp_path, entry, words, field):
    path = handmade(tmp_path / "a.qcow2", 8 * CLUSTER, {3: entry}, {})
    error = refused(path, FormatError)
    assert (error.structure, error.field, error.offset) == ("L2 table", field, 4 * CLUSTER + 24)
    assert words in error.problem


def test_a_faulty_entry_among_thousands_of_tables_names_its_place(tmp_path):
    cluster = 512
    path = handmade(
        tmp_path / "a.qcow2", MIB, {n: 0 if n % 3 else 1 for n in range(2048)} | {1999: 1 << 60}, {}, bits=9
    )
    error = refused(path, FormatError)
    assert error.offset == (4 + 1999 // 64) * cluster + 1999 % 64 * 8


def test_the_zero_flag_is_refused_in_version_2_and_in_extended_entries(tmp_path):
    path = handmade(tmp_path / "v2.qcow2", CLUSTER, {0: 1}, {}, version=2)
    assert "zero flag is not allowed in version 2" in str(refused(path, FormatError))
    path = handmade(tmp_path / "extended.qcow2", CLUSTER, {0: (1, 0)}, {}, features=(16, 0, 0))
    assert "zero flag is not allowed in extended" in str(refused(path, FormatError))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ((BASE | COPIED, 1 << 32 | 1), "allocated and as zero at once"),
        ((0, 1), "no place"),
        ((PACKED | BASE, 1), "compressed cluster has a subcluster bitmap"),
    ],
)
def test_impossible_subclusters(tmp_path, entry, words):
    path = handmade(tmp_path / "a.qcow2", 4 * CLUSTER, {2: entry}, {}, features=(16, 0, 0))
    error = refused(path, FormatError)
    assert words in error.problem
    assert (error.field, error.offset) == ("bitmap of entry 2", 4 * CLUSTER + 2 * 16 + 8)


def test_mixed_subclusters(tmp_path):
    entry = (BASE | COPIED, 0b0110 | 0b1001 << 32)
    path = handmade(tmp_path / "a.qcow2", CLUSTER, {0: entry}, {BASE: data(1, CLUSTER)}, features=(16, 0, 0))
    assert rows(opened(path), "start", "length", "kind", "offset") == [
        (0, 2048, ZERO, 0),
        (2048, 4096, DATA, BASE + 2048),
        (6144, 2048, ZERO, 0),
        (8192, CLUSTER - 8192, HOLE, 0),
    ]


def test_a_file_may_end_inside_a_data_cluster_only_where_the_disk_ends(tmp_path):
    entries = {0: BASE | COPIED, 1: BASE + CLUSTER | COPIED}
    unit = data("tail", CLUSTER)
    path = handmade(tmp_path / "a.qcow2", CLUSTER + 1024, entries, {BASE: unit}, end=BASE + CLUSTER + 1024)
    assert content(opened(path)) == unit + bytes(1024)
    for end in (BASE + 2 * CLUSTER - 512, BASE + CLUSTER + 1000, BASE + CLUSTER, BASE + 1024):
        path = handmade(tmp_path / "c.qcow2", 2 * CLUSTER, entries, {BASE: unit}, end=end)
        error = refused(path, FormatError)
        assert error.structure == "data cluster"
        assert error.offset in {BASE, BASE + CLUSTER}
        with FileSource(path) as source:
            assert not check_image(source, OpenContext()).clean
    with pytest.raises(FormatError, match="truncated"):  # the missing part alone is refused as well
        opened(path).read(2000, 10)


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on", "cluster_size=512", "cluster_size=2M"])
@pytest.mark.parametrize("keep", [0.97, 0.8, 0.5, 0.2, 0.05, 700, 100, 71, 10])
def test_truncated_images_are_refused(tmp_path, options, keep):
    raw, path = tmp_path / "full.raw", tmp_path / "full.qcow2"
    raw.write_bytes(data("cut", 6 * MIB))
    words = ["-o", options] if options else []
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *words, raw, path)
    blob = path.read_bytes()
    path.write_bytes(blob[: int(len(blob) * keep) if keep < 1 else keep])
    error = refused(path, FormatError)
    assert error.structure
    assert error.offset is not None
    assert error.offset <= len(blob)


def test_header_faults_name_their_field(tmp_path):
    good = handmade(tmp_path / "good.qcow2", MIB, {}, {}).read_bytes()
    faults = {
        "cluster_bits": (20, struct.pack(">I", 8)),
        "size": (24, struct.pack(">Q", 1 << 63)),
        "crypt_method": (32, struct.pack(">I", 7)),
        "l1_size": (36, struct.pack(">I", 0)),
        "l1_table_offset": (40, struct.pack(">Q", 3 * CLUSTER + 8)),
        "refcount_table_offset": (48, struct.pack(">Q", 512)),
        "nb_snapshots": (60, struct.pack(">I", 1 << 30)),
        "snapshots_offset": (60, struct.pack(">IQ", 1, 99)),
        "refcount_order": (96, struct.pack(">I", 7)),
        "header_length": (100, struct.pack(">I", 100)),
        "length": (104, struct.pack(">II", 0x12345678, 0x7FFFFFFF)),
        "backing_file_size": (8, struct.pack(">QI", 200, 2000)),
        "backing_file_offset": (8, struct.pack(">QI", CLUSTER, 10)),
    }
    for field, (offset, piece) in faults.items():
        path = tmp_path / "bad.qcow2"
        path.write_bytes(good[:offset] + piece + good[offset + len(piece) :])
        error = refused(path, FormatError)
        assert error.field == field
        assert error.offset is not None


@pytest.mark.parametrize(("l1", "words"), [(1 << 58, "reserved"), (COPIED | 512, "begin on a cluster")])
def test_l1_faults(tmp_path, l1, words):
    path = handmade(tmp_path / "a.qcow2", MIB, {0: 1}, {3 * CLUSTER: struct.pack(">Q", l1)})
    error = refused(path, FormatError)
    assert words in error.problem
    assert (error.structure, error.offset) == ("L1 table", 3 * CLUSTER)


def test_an_l2_table_beyond_the_file_is_a_truncation(tmp_path):
    path = handmade(tmp_path / "a.qcow2", MIB, {0: 1}, {3 * CLUSTER: struct.pack(">Q", COPIED | 500 * CLUSTER)})
    error = refused(path, FormatError)
    assert (error.structure, error.offset) == ("L2 table", 500 * CLUSTER)


def test_huge_claims_cost_nothing(tmp_path):
    path = handmade(tmp_path / "a.qcow2", MIB, {}, {24: struct.pack(">Q", 1 << 60), 36: struct.pack(">I", 0x7FFFFFFF)})
    assert refused(path, FormatError).structure in {"header", "L1 table"}


def test_unknown_features_are_refused_by_name_or_number(tmp_path):
    names = struct.pack("BB46s", 0, 10, b"quantum clusters")
    path = handmade(tmp_path / "a.qcow2", MIB, {}, {}, features=(1 << 10, 0, 0), extensions=[(0x6803F857, names)])
    error = refused(path, UnsupportedError)
    assert "quantum clusters" in str(error)
    assert error.feature == "quantum clusters"
    path = handmade(tmp_path / "b.qcow2", MIB, {}, {}, features=(1 << 40, 0, 0))
    assert "incompatible feature bit 40" in str(refused(path, UnsupportedError))
    path = handmade(tmp_path / "c.qcow2", MIB, {}, {}, features=(0, 1 << 40, 1 << 40))
    assert content(opened(path)) == bytes(MIB)


def test_versions_that_do_not_exist_are_named(tmp_path):
    path = tmp_path / "a.qcow2"
    path.write_bytes(b"QFI\xfb" + struct.pack(">I", 99) + bytes(200))
    assert "99" in str(refused(path, UnsupportedError))


@pytest.mark.parametrize(("method", "name"), [(1, "AES"), (2, "LUKS")])
def test_encryption_is_refused_by_name_but_told(tmp_path, method, name):
    path = handmade(tmp_path / "a.qcow2", MIB, {}, {}, crypt=method)
    assert opened(path).info.features["encryption"] == name
    assert name in str(refused(path, UnsupportedError))


def test_compression_types(tmp_path):
    path = handmade(tmp_path / "a.qcow2", MIB, {}, {}, compression=1)
    assert refused(path, FormatError).field == "compression_type"
    path = handmade(tmp_path / "b.qcow2", MIB, {}, {}, compression=2, features=(8, 0, 0))
    assert refused(path, UnsupportedError).field == "compression_type"
    path = handmade(tmp_path / "c.qcow2", MIB, {}, {}, compression=1, features=(8, 0, 0))
    assert opened(path).info.features["compression"] == "zstd"


def test_dirty_and_corrupt_bits_are_told(tmp_path):
    path = handmade(tmp_path / "a.qcow2", MIB, {}, {}, features=(3, 1, 0))
    disk = opened(path)
    assert content(disk) == bytes(MIB)
    dirty, corrupt = disk.info.warnings
    assert "dirty" in dirty
    assert "corrupt" in corrupt
    assert disk.info.features["lazy_refcounts"] is True


def data_image(tmp_path, **words):
    (tmp_path / "guest.raw").write_bytes(data("guest", 2 * CLUSTER))
    extensions = [(0x44415441, b"guest.raw")]
    entries = {0: COPIED, 3: CLUSTER | COPIED}
    return handmade(tmp_path / "a.qcow2", 4 * CLUSTER, entries, {}, features=(4, 0, 2), extensions=extensions, **words)


def test_a_data_file_is_read_from_its_first_byte_on_by_permission(tmp_path):
    path = data_image(tmp_path)
    disk = opened(path, opener=Opener(Parents.of(tmp_path)))
    guest = data("guest", 2 * CLUSTER)
    assert content(disk) == guest[:CLUSTER] + bytes(2 * CLUSTER) + guest[CLUSTER:]
    assert rows(disk, "kind", "file", "offset") == [(DATA, 1, 0), (HOLE, 0, 0), (DATA, 1, CLUSTER)]
    with pytest.raises(PolicyError, match=r"guest\.raw.*--allow-parent"):
        content(opened(path))
    features = opened(path).info.features
    assert (features["data_file"], features["data_file_raw"]) == ("guest.raw", True)


def test_a_data_file_that_is_too_short_or_not_named_is_refused(tmp_path):
    path = data_image(tmp_path)
    (tmp_path / "guest.raw").write_bytes(bytes(CLUSTER))
    with pytest.raises(FormatError, match="beyond its end"):
        content(opened(path, opener=Opener(Parents.of(tmp_path))))
    path = handmade(tmp_path / "b.qcow2", MIB, {}, {}, features=(4, 0, 0))
    refused(path, FormatError)


def test_a_data_file_as_qemu_makes_it(tmp_path):
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/d.raw,data_file_raw=on", path, "1M")
    run("qemu-io", "-c", "write -P 6 0 64k", "-c", "write -P 7 512k 64k", path)
    run("qemu-img", "convert", "-O", "raw", path, tmp_path / "want.raw")
    with open_disk(path, parents=tmp_path) as disk:
        assert content(disk) == (tmp_path / "want.raw").read_bytes()


@pytest.fixture
def snapshots(tmp_path):
    path = tmp_path / "s.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    run("qemu-io", "-c", "write -P 1 0 1M", path)
    run("qemu-img", "snapshot", "-c", "first", path)
    run("qemu-img", "resize", "-q", path, "9M")
    run("qemu-io", "-c", "write -P 2 0 64k", "-c", "write -P 3 8M 64k", path)
    run("qemu-img", "snapshot", "-c", "second", path)
    run("qemu-io", "-c", "write -z 0 4M", path)
    return path


def test_snapshots_are_listed_and_chosen_by_name_or_id(snapshots):
    with open_disk(snapshots) as disk:
        assert [(s.id, s.name, s.virtual_size) for s in disk.info.snapshots] == [
            ("1", "first", 4 * MIB),
            ("2", "second", 9 * MIB),
        ]
        assert disk.info.snapshots[0].created > 1e9
        assert disk.read(0, 4 * MIB) == bytes(4 * MIB)
    first = b"\1" * MIB + bytes(3 * MIB)
    for word in ("first", "1"):
        with open_disk(snapshots, snapshot=word) as disk:
            assert disk.info.virtual_size == 4 * MIB
            assert content(disk) == first
    with open_disk(snapshots, snapshot="second") as disk:
        assert disk.read(0, 2 * CLUSTER) == b"\2" * CLUSTER + b"\1" * CLUSTER
        assert disk.read(8 * MIB, CLUSTER) == b"\3" * CLUSTER
    with pytest.raises(SourceError, match=r"'third'.*first, second"):
        open_disk(snapshots, snapshot="third")


def test_damaged_snapshot_tables_are_refused(snapshots, tmp_path):
    blob = bytearray(snapshots.read_bytes())
    table = struct.unpack_from(">Q", blob, 64)[0]
    struct.pack_into(">Q", blob, table, 1 << 50)
    with pytest.raises(FormatError, match="L1 table") as caught:
        open_disk(BytesSource(blob), snapshot="first")
    assert caught.value.offset == 1 << 50
    struct.pack_into(">I", blob, table + 36, 0x7FFFFFFF)
    with pytest.raises(FormatError) as caught:
        open_disk(BytesSource(blob))
    assert caught.value.structure == "snapshot table"


def test_bitmaps_are_listed(tmp_path):
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    run("qemu-img", "bitmap", "--add", path, "monday")
    run("qemu-img", "bitmap", "--add", path, "tuesday")
    assert opened(path).info.bitmaps == ("monday", "tuesday")
    stale = bytearray(path.read_bytes())
    stale[88:96] = bytes(8)
    assert open_image(BytesSource(stale), OpenContext()).info.bitmaps == ()


def test_all_of_2_tib_with_every_table(tmp_path):
    path = tmp_path / "a.qcow2"
    # One L2 table for all of the disk: what is read is as much as of a disk that was written to its end.
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "2T")
    with open(path, "r+b") as file:
        file.seek(struct.unpack_from(">Q", path.read_bytes(), 40)[0])
        file.write(struct.pack(">Q", COPIED | 6 * CLUSTER) * 4096)
        file.truncate(20000 * CLUSTER)
        file.seek(6 * CLUSTER)
        file.write(np.arange(7 * CLUSTER, 7 * CLUSTER + 8192 * CLUSTER, CLUSTER).astype(">u8").tobytes())
    disk = opened(path)
    found = np.concatenate(list(disk.extents()))
    assert len(found) == 4096
    assert (found["offset"] == 7 * CLUSTER).all()
    assert int(found["length"].sum()) == 2 * TIB


def test_tables_are_read_in_large_pieces_and_random_reads_from_a_cache(tmp_path):
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(content(little_disk(2 * MIB)))
    run("qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=512,preallocation=metadata", raw, path)

    class Counted(FileSource):
        count = 0

        def pread(self, offset, buffer):
            self.count += 1
            return super().pread(offset, buffer)

    source = Counted(path)
    disk = open_image(source, OpenContext())
    source.count = 0
    sum(len(batch) for batch in disk.extents())
    assert source.count < 40  # of 64 tables
    disk.read(MIB, 512)
    source.count = 0
    for at in range(MIB, MIB + 8192, 512):
        disk.read(at, 512)
    assert source.count == 16


def test_limits_bound_tables(tmp_path):
    path = handmade(tmp_path / "a.qcow2", 64 * MIB, {}, {}, bits=9)
    with pytest.raises(FormatError, match="too large"):
        opened(path, limits=Limits(resident_table=8192))


def test_plain_data_has_no_stored_size(tmp_path):
    path = handmade(tmp_path / "a.qcow2", CLUSTER, {0: BASE | COPIED}, {BASE: bytes(CLUSTER)})
    assert rows(opened(path), "codec", "stored", "skip") == [(PLAIN, 0, 0)]
