"""Sparse VMDK extents as they are read: hosted, streamed, ESX's own."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import vmdkmade
from vmdkkit import GRAIN, bytes_of, hosted, opened, patched, put, refusal, streamed
from vmdkmade import ZEROED, Hosted, Stream

from diskmorph.formats.disk import checked
from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.extents import DATA, HOLE, ZERO
from diskmorph.formats.registry import OpenContext, load, require_format
from diskmorph.formats.source import BytesSource

from testkit import KIB, MIB, content, data, run


class TestHosted:
    @pytest.mark.parametrize(
        ("offset", "piece", "field"),
        [
            (4, struct.pack("<I", 4), "version"),
            (4, struct.pack("<I", 0), "version"),
            (8, struct.pack("<I", 3 | 1 << 5), "flags"),
            (12, struct.pack("<Q", 1 << 54), "capacity"),
            (12, struct.pack("<Q", 2048), "capacity"),
            (20, struct.pack("<Q", 0), "grain_size"),
            (20, struct.pack("<Q", 100), "grain_size"),
            (20, struct.pack("<Q", 4), "grain_size"),
            (20, struct.pack("<Q", 1 << 40), "grain_size"),
            (36, struct.pack("<Q", 1 << 40), "descriptor_size"),
            (44, struct.pack("<I", 0), "table_entries"),
            (44, struct.pack("<I", 1 << 31), "table_entries"),
            (73, b"\r\n \n", "newlines"),
            (77, struct.pack("<H", 1), "compression"),
            (77, struct.pack("<H", 7), "compression"),
        ],
    )
    def test_wild_fields(self, tmp_path, offset, piece, field):
        path = put(tmp_path / "x.vmdk", patched(hosted().build(), offset, piece))
        error = refusal(path, (FormatError, UnsupportedError))
        assert error.field == field

    def test_entry_one_is_zeroes_only_by_the_flag(self, tmp_path):
        grains = {0: data(0, GRAIN), 1: ZEROED}
        with_flag = hosted(256, grains, version=2, flags=7)
        assert bytes_of(put(tmp_path / "x.vmdk", with_flag.build())) == with_flag.content()
        raw = hosted(256, grains).build()
        assert bytes_of(put(tmp_path / "y.vmdk", raw))[GRAIN:] == raw[512 : 512 + GRAIN]

    def test_a_grain_beyond_the_file(self, tmp_path):
        raw = hosted().build()
        gd = struct.unpack_from("<Q", raw, 56)[0] * 512
        table = struct.unpack_from("<I", raw, gd)[0] * 512
        path = put(tmp_path / "x.vmdk", patched(raw, table + 8, struct.pack("<I", 0x7FFFFFFF)))
        error = refusal(path)
        assert (error.structure, error.offset) == ("grain", 0x7FFFFFFF * 512)
        with opened(path) as disk:
            assert disk.read(0, 4096) == data(0, GRAIN)[:4096]
            with pytest.raises(FormatError):
                list(disk.extents())

    @pytest.mark.parametrize("keep", [0.97, 0.8, 0.5, 0.2, 70_000, 10_000, 700, 100])
    def test_cut_off(self, tmp_path, keep):
        raw = hosted().build()
        path = put(tmp_path / "x.vmdk", raw[: int(len(raw) * keep) if keep < 1 else keep])
        refusal(path)
        with pytest.raises(FormatError), opened(path) as disk:
            list(disk.extents())

    @pytest.mark.parametrize("piece", [bytes(4), b"\xff\xff\xff\x7f", struct.pack("<I", 1 << 20)])
    def test_the_redundant_directory_serves_where_the_primary_is_damaged(self, tmp_path, piece):
        made = hosted(128 * 1100, {0: b"a", 600: b"b", 1099: b"c"})
        raw = made.build()
        primary, redundant = (struct.unpack_from("<Q", raw, at)[0] * 512 for at in (56, 48))
        for entry in (0, 1, 2):
            path = put(tmp_path / "x.vmdk", patched(raw, primary + 4 * entry, piece))
            with opened(path) as disk:
                assert content(disk) == made.content()
                assert any("redundant" in warning for warning in disk.info.warnings)
            both = patched(path.read_bytes(), redundant + 4, b"\xff\xff\xff\x7f")
            if any(piece):
                refusal(put(tmp_path / "y.vmdk", both))

    def test_gaps_in_both_directories(self, tmp_path):
        raw = hosted(128 * 1100, {0: b"a", 600: b"b"}).build()
        primary, redundant = (struct.unpack_from("<Q", raw, at)[0] * 512 for at in (56, 48))
        raw = patched(patched(raw, primary, bytes(4)), redundant + 4, bytes(4))
        assert "both" in str(refusal(put(tmp_path / "x.vmdk", raw)))

    def test_the_primary_directory_outside_the_file(self, tmp_path):
        made = hosted()
        path = put(tmp_path / "x.vmdk", patched(made.build(), 56, struct.pack("<Q", 1 << 50)))
        with opened(path) as disk:
            assert content(disk) == made.content()
            assert disk.info.warnings

    def test_tables_over_each_other(self, tmp_path):
        made = hosted(128 * 1100, {0: b"a", 600: b"b"}, flags=1)
        raw = made.build()
        gd = struct.unpack_from("<Q", raw, 56)[0] * 512
        first = struct.unpack_from("<I", raw, gd)[0]
        for wild in (first, first + 1):
            error = refusal(put(tmp_path / "x.vmdk", patched(raw, gd + 4, struct.pack("<I", wild))))
            assert "one place" in str(error)

    def test_unclean_shutdown_is_told(self, tmp_path):
        with opened(put(tmp_path / "x.vmdk", hosted(unclean=1).build())) as disk:
            assert any("closed cleanly" in warning for warning in disk.info.warnings)

    def test_a_bare_extent_is_told(self, tmp_path):
        made = Hosted(256, {0: b"a"})
        with opened(put(tmp_path / "disk-s001.vmdk", made.build())) as disk:
            assert any("descriptor" in warning for warning in disk.info.warnings)
            assert content(disk) == made.content()

    def test_info(self, tmp_path):
        with opened(put(tmp_path / "x.vmdk", hosted().build())) as disk:
            info = disk.info
        assert (info.format, info.subformat, info.virtual_size, info.allocation_unit) == (
            "vmdk",
            "monolithicSparse",
            1024 * 512,
            GRAIN,
        )
        assert info.features["cid"] == "12345678"
        assert info.features["adapter_type"] == "lsilogic"

    def test_kinds(self, tmp_path):
        made = hosted(512, {1: data(1, GRAIN), 2: data(2, GRAIN), 3: ZEROED}, version=2, flags=7)
        with opened(put(tmp_path / "x.vmdk", made.build())) as disk:
            found = np.concatenate(list(checked(disk).extents()))
        assert found["kind"].tolist() == [HOLE, DATA, ZERO]

    def test_a_snapshot_is_refused(self, tmp_path):
        with pytest.raises(UnsupportedError, match="snapshot"):
            opened(put(tmp_path / "x.vmdk", hosted().build()), snapshot="one")


class TestStream:
    def test_a_cut_anywhere_is_refused(self, tmp_path):
        for form in ("footer", "header"):
            raw = streamed(128 * 600, {0: data(0, GRAIN), 599: data(1, GRAIN)}, form=form).build()
            cuts = {len(raw) - n for n in (1, 12, 511, 512, 513, 1024, 1536, 2048, 4096)} | {700, 65536, 70_000}
            for keep in sorted(cuts):
                refusal(put(tmp_path / "x.vmdk", raw[:keep]))

    def test_qemus_stream_cut(self, tmp_path):
        raw, path = tmp_path / "a.raw", tmp_path / "a.vmdk"
        raw.write_bytes(data("a", 2 * MIB))
        run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
        whole = path.read_bytes()
        assert bytes_of(path) == raw.read_bytes()
        used = len(whole.rstrip(b"\0"))
        for keep in (used - 1, used - 1000, used // 2, 70_000):
            path.write_bytes(whole[:keep])
            with pytest.raises(FormatError), opened(path) as disk:
                list(disk.extents())

    def test_zeroes_behind_the_end_are_looked_past(self, tmp_path):
        made = streamed()
        for more in (512, 65536, 777):
            assert bytes_of(put(tmp_path / "x.vmdk", made.build() + bytes(more))) == made.content()

    def test_a_footer_that_contradicts_the_header(self, tmp_path):
        raw = streamed().build()
        footer = len(raw) - 1024
        assert "contradicts" in str(refusal(put(tmp_path / "x.vmdk", patched(raw, footer + 12, b"\1"))))
        refusal(put(tmp_path / "y.vmdk", patched(raw, footer + 56, b"\xff" * 8)))
        refusal(put(tmp_path / "z.vmdk", patched(raw, footer - 512, b"\2")))

    def marker(self, raw, number=0):
        """The offset of a grain's marker in a stream of one table."""
        gd = struct.unpack_from("<Q", raw, len(raw) - 1024 + 56)[0] * 512
        table = struct.unpack_from("<I", raw, gd)[0] * 512
        return struct.unpack_from("<I", raw, table + 4 * number)[0] * 512

    def test_a_marker_of_another_grain(self, tmp_path):
        raw = streamed().build()
        at = self.marker(raw, 3)
        for lba in (0, 3 * 128 + 1, 1 << 60):
            error = refusal(put(tmp_path / "x.vmdk", patched(raw, at, struct.pack("<Q", lba))))
            assert (error.structure, error.field, error.offset) == ("grain marker", "lba", at)

    @pytest.mark.parametrize("size", [0, 70_000, 1 << 20, 0xFFFFFFFF])
    def test_wild_sizes_in_markers(self, tmp_path, size):
        raw = streamed().build()
        at = self.marker(raw, 3)
        error = refusal(put(tmp_path / "x.vmdk", patched(raw, at + 8, struct.pack("<I", size))))
        assert (error.field, error.offset) == ("size", at)

    def test_damaged_data(self, tmp_path):
        raw = streamed(1024, {0: b"text" * 1000, 1: data(1, GRAIN)}).build()
        at = self.marker(raw)
        assert "damaged" in str(refusal(put(tmp_path / "x.vmdk", patched(raw, at + 14, b"\xff\xff\xff"))))

    def test_a_bomb_costs_little(self, tmp_path):
        pack = zlib.compressobj(9)
        bomb = b"".join(pack.compress(bytes(MIB)) for _ in range(64)) + pack.flush()

        class Bomb(Stream):
            def packed(self, number):
                return vmdkmade.sectors(struct.pack("<QI", number * self.grain, len(bomb)) + bomb)

        text = vmdkmade.words(['RW 1024 SPARSE "x.vmdk"'], "streamOptimized")
        path = put(tmp_path / "x.vmdk", Bomb(1024, {0: b"", 1: b""}, text=text).build())
        tracemalloc.start()
        error = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        tracemalloc.stop()
        assert "length" in str(error)

    def test_incompressible_grains_may_exceed_the_grain(self, tmp_path):
        made = streamed(1024, {0: data(0, GRAIN)}, level=0)
        assert bytes_of(put(tmp_path / "x.vmdk", made.build())) == made.content()

    @pytest.mark.parametrize("short", [True, False])
    def test_a_partial_last_grain(self, tmp_path, short):
        class Short(Stream):
            def packed(self, number):
                packed = zlib.compress(self.grains[number])
                return vmdkmade.sectors(struct.pack("<QI", number * self.grain, len(packed)) + packed)

        kind = Short if short else Stream
        text = vmdkmade.words(['RW 133 SPARSE "x.vmdk"'], "streamOptimized")
        made = kind(133, {0: data(0, GRAIN), 1: data(1, 5 * 512)}, text=text)
        assert bytes_of(put(tmp_path / "x.vmdk", made.build())) == made.content()

    def test_a_short_grain_that_is_not_the_last(self, tmp_path):
        class Short(Stream):
            def packed(self, number):
                packed = zlib.compress(self.grains[number][:512])
                return vmdkmade.sectors(struct.pack("<QI", number * self.grain, len(packed)) + packed)

        text = vmdkmade.words(['RW 260 SPARSE "x.vmdk"'], "streamOptimized")
        made = Short(260, {0: data(0, GRAIN)}, text=text)
        assert "wrong length" in str(refusal(put(tmp_path / "x.vmdk", made.build())))


class TestEsx:
    def test_a_journal_that_needs_replay_is_refused(self, tmp_path):
        path = put(tmp_path / "x.vmdk", vmdkmade.sesparse(4096, {0: b"a"}, journal=1))
        assert refusal(path, UnsupportedError).field == "replay_journal"

    def test_another_version(self, tmp_path):
        path = put(tmp_path / "x.vmdk", vmdkmade.sesparse(4096, {0: b"a"}, version=0x200000002))
        assert refusal(path, UnsupportedError).field == "version"

    @pytest.mark.parametrize("entry", [4 << 60, 1, 0xF << 60, 3 << 60 | 0xFFF << 48])
    def test_wild_sesparse_entries(self, tmp_path, entry):
        raw = vmdkmade.sesparse(4096, {0: b"a"})
        table = struct.unpack_from("<Q", raw, 18 * 8)[0] * 512
        refusal(put(tmp_path / "x.vmdk", patched(raw, table + 8, struct.pack("<Q", entry))))

    def test_the_index_has_its_halves_swapped(self, tmp_path):
        number = 4098  # low 12 bits 2, high bits 1
        raw = vmdkmade.sesparse(8 * 5000, {0: data("far", 4096)}, order=[number])
        want = data("far", 4096)
        with opened(put(tmp_path / "x.vmdk", raw)) as disk:
            assert disk.read(0, 4096) == want

    @pytest.mark.parametrize("entry", [0x10000000 << 32 | 5, 0x20000000 << 32, 7])
    def test_wild_sesparse_directories(self, tmp_path, entry):
        raw = vmdkmade.sesparse(4096, {0: b"a"})
        gd = struct.unpack_from("<Q", raw, 16 * 8)[0] * 512
        refusal(put(tmp_path / "x.vmdk", patched(raw, gd, struct.pack("<Q", entry))))

    @pytest.mark.parametrize(
        ("index", "value"), [(2, 1 << 60), (3, 16), (4, 1), (10, 1 << 50), (16, 1 << 50), (24, 1 << 50)]
    )
    def test_wild_sesparse_headers(self, tmp_path, index, value):
        raw = patched(vmdkmade.sesparse(4096, {0: b"a"}), index * 8, struct.pack("<Q", value))
        refusal(put(tmp_path / "x.vmdk", raw))

    @pytest.mark.parametrize(
        ("at", "value"), [(4, 2), (12, 1 << 31), (16, 3), (16, 0), (20, 1 << 30), (24, 0), (24, 1 << 31)]
    )
    def test_wild_cowd_headers(self, tmp_path, at, value):
        raw = patched(vmdkmade.cowd(4096, {0: b"a"}), at, struct.pack("<I", value))
        refusal(put(tmp_path / "x.vmdk", raw), (FormatError, UnsupportedError))

    @pytest.mark.parametrize("keep", [100, 600, 2048, 3000, 19_000, -1])
    def test_cut_off(self, tmp_path, keep):
        for raw in (vmdkmade.cowd(4096, {5: data(5, 512)}), vmdkmade.sesparse(4096, {5: data(5, 4096)})):
            refusal(put(tmp_path / "x.vmdk", raw[:keep]))

    def test_cowd_grains_of_many_sectors(self, tmp_path):
        grains = {n: data(n, 8192) for n in (0, 9, 4097)}
        raw = vmdkmade.cowd(16 * 4100, grains, grain=16, unclean=1)
        with opened(put(tmp_path / "x.vmdk", raw)) as disk:
            assert disk.read(9 * 8192, 8192) == grains[9]
            assert disk.read(4097 * 8192, 8192) == grains[4097]
            assert any("cleanly" in warning for warning in disk.info.warnings)


class Counted(BytesSource):
    reads = 0

    def pread(self, offset, buffer):
        self.reads += 1
        return super().pread(offset, buffer)


def test_tables_are_read_in_batches():
    made = hosted(128 * 512 * 300, {n * 512: b"x" for n in range(300)})
    source = Counted(made.build())
    disk = load(require_format("vmdk")).open_image(source, OpenContext())
    before = source.reads
    assert sum(len(batch) for batch in disk.extents()) == 600
    assert source.reads - before <= 4
    before = source.reads
    for _ in range(100):
        disk.read(0, 16)
    assert source.reads - before <= 101


def test_tables_that_do_not_exist_cost_nothing():
    capacity = 128 * 512 * 60_000
    made = Hosted(capacity, {}, sparse_tables=True)
    source = Counted(bytes(4096 * KIB)[: 60_000 * 4 * 2 + 4 * MIB // 1])
    raw = bytearray(source._data)
    raw[:512] = made.header(0, 0, 0, 1, 1024)
    source = Counted(bytes(patched(bytes(raw), 8, struct.pack("<I", 1))))
    disk = load(require_format("vmdk")).open_image(source, OpenContext())
    before = source.reads
    assert [len(batch) for batch in disk.extents()] == [1]
    assert source.reads == before
