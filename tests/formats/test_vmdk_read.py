"""Reading VMDK: descriptors in all their forms, every refusal, what peers get silently wrong."""

import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import vmdkmade
from vmdkmade import ZEROED, Hosted, Stream

from diskmorph.formats.disk import checked
from diskmorph.formats.errors import FormatError, PolicyError, SourceError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, HOLE, ZERO
from diskmorph.formats.limits import Limits
from diskmorph.formats.registry import OpenContext, load, open_disk, open_layers, require_format
from diskmorph.formats.source import BytesSource, FileSource
from diskmorph.formats.vmdk import descriptor, schema

from testkit import KIB, MIB, content, data, run

GRAIN = 64 * KIB


def opened(path, **words):
    return open_disk(path, format="vmdk", **words)


def bytes_of(path, **words):
    with opened(path, **words) as disk:
        return content(checked(disk))


def refusal(path, kind=FormatError, **words):
    with pytest.raises(kind) as caught, opened(path, **words) as disk:
        content(disk)
    return caught.value


def put(path, raw):
    path.write_bytes(raw)
    return path


def patched(raw, offset, piece):
    return raw[:offset] + piece + raw[offset + len(piece) :]


def one(capacity, made):
    return vmdkmade.words([f'RW {capacity} SPARSE "x.vmdk"'])


def hosted(capacity=1024, grains=None, **more):
    grains = {n: data(n, GRAIN) for n in range(8)} if grains is None else grains
    return Hosted(capacity, grains, text=vmdkmade.words([f'RW {capacity} SPARSE "x.vmdk"']), **more)


def streamed(capacity=1024, grains=None, **more):
    grains = {n: data(n, GRAIN) for n in range(8)} if grains is None else grains
    text = vmdkmade.words([f'RW {capacity} SPARSE "x.vmdk"'], "streamOptimized")
    return Stream(capacity, grains, text=text, **more)


class TestSchema:
    @pytest.mark.parametrize(
        ("struct_", "dtype"),
        [
            (schema.ENTRY_STRUCT, schema.ENTRY),
            (schema.WIDE_ENTRY_STRUCT, schema.WIDE_ENTRY),
        ],
    )
    def test_entries(self, struct_, dtype):
        raw = bytes(range(1, 1 + dtype.itemsize))
        assert struct_.sizeof() == dtype.itemsize
        assert struct_.parse(raw) == int(np.frombuffer(raw, dtype)[0])

    def test_grain_marker(self):
        raw = bytes(range(12))
        parsed, row = schema.GRAIN_MARKER_STRUCT.parse(raw), np.frombuffer(raw, schema.GRAIN_MARKER)[0]
        assert (parsed.lba, parsed.size) == (int(row["lba"]), int(row["size"]))

    @pytest.mark.parametrize(
        ("struct_", "size"),
        [
            (schema.SPARSE_HEADER, 512),
            (schema.MARKER, 512),
            (schema.COWD_HEADER, 2048),
            (schema.SESPARSE_HEADER, 512),
            (schema.SESPARSE_VOLATILE, 512),
        ],
    )
    def test_sizes(self, struct_, size):
        assert struct_.sizeof() == size

    def test_a_header_is_built_as_it_was_parsed(self):
        raw = hosted().build()[:512]
        assert schema.SPARSE_HEADER.build(schema.SPARSE_HEADER.parse(raw)) == raw
        assert raw[schema.UNCLEAN_AT] == 0
        assert hosted(unclean=1).build()[schema.UNCLEAN_AT] == 1


class TestDescriptor:
    def parsed(self, text):
        raw = text if isinstance(text, bytes) else text.encode()
        return descriptor.parse(raw, "x.vmdk", Limits())

    def test_what_vmware_writes(self):
        found = self.parsed(
            '# Disk DescriptorFile\r\nversion=1\r\nencoding="UTF-8"\r\nCID=fffffffe\r\nparentCID=ffffffff\r\n'
            'createType="vmfs"\r\n\r\nRW 100 VMFS "a b-flat.vmdk"\r\nddb.geometry.heads = "255"\r\n'
        )
        assert (found.create_type, found.cid, found.has_parent) == ("vmfs", 0xFFFFFFFE, False)
        assert [(e.kind, e.sectors, e.name, e.offset) for e in found.extents] == [("VMFS", 100, "a b-flat.vmdk", 0)]
        assert found.values["ddb.geometry.heads"] == "255"

    def test_extents_that_are_too_large_together_are_refused(self, tmp_path):
        path = put(tmp_path / "d.vmdk", vmdkmade.words([f"RW {1 << 52} ZERO"] * 9).encode())
        assert refusal(path).field == "extents"
        assert bytes_of(put(path, vmdkmade.words(["RW 1 ZERO"] * 9).encode())) == bytes(9 * 512)

    def test_what_follows_a_nul_is_ignored(self):
        assert len(self.parsed(b"RW 1 ZERO\n\0RW 2 ZERO\n").extents) == 1

    @pytest.mark.parametrize(
        ("encoding", "codec"),
        [
            ("UTF-8", "utf-8"),
            ("windows-1252", "cp1252"),
            ("GBK", "gbk"),
            ("windows-936", "gbk"),
            ("Shift_JIS", "cp932"),
        ],
    )
    def test_encodings(self, encoding, codec):
        name = {"windows-1252": "disqu\u00e9", "Shift_JIS": "\u65e5\u672c"}.get(encoding, "\u78c1\u76d8")
        raw = f'encoding="{encoding}"\nRW 1 FLAT "{name}" 0\n'.encode(codec)
        assert self.parsed(raw).extents[0].name == name

    @pytest.mark.parametrize("encoding", ["klingon", "hex", "unicode_escape", "punycode", "utf-16"])
    def test_unknown_encodings_are_refused(self, encoding):
        with pytest.raises(UnsupportedError, match=encoding):
            self.parsed(f'encoding="{encoding}"\nRW 1 FLAT "'.encode() + b'\xe9" 0\n')

    def test_text_that_its_encoding_cannot_be(self):
        with pytest.raises(FormatError, match="encoding"):
            self.parsed(b'encoding="UTF-8"\nRW 1 FLAT "\xff\xfe" 0\n')

    @pytest.mark.parametrize(
        "line",
        [
            "RW",
            "RW x FLAT",
            'RW -1 FLAT "a" 0',
            "RW 1 FLAT",
            "RW 1 FLAT a 0",
            "RW 99999999999999999999 ZERO",
            "RW 9007199254740992 ZERO",
            'RW 1 FLAT "a" 99999999999999999',
        ],
    )
    def test_extent_lines_that_make_no_sense(self, line):
        with pytest.raises(FormatError, match="line 2"):
            self.parsed(f"version=1\n{line} \n")

    @pytest.mark.parametrize("text", ["CID=xyz", "CID=123456789", "parentCID=-1", "CID=", "CID=1\nCID=2"])
    def test_bad_cids(self, text):
        with pytest.raises(FormatError, match=r"(?i)cid"):
            self.parsed(text)

    def test_too_many_extents(self):
        with pytest.raises(FormatError, match="too many"):
            self.parsed("RW 1 ZERO\n" * (Limits().members + 1))

    def test_a_huge_file_is_not_read(self, tmp_path):
        path = put(tmp_path / "x.vmdk", b"# Disk DescriptorFile\n")
        os.truncate(path, 1 << 40)
        assert "too large" in str(refusal(path))

    def test_something_else(self, tmp_path):
        assert refusal(put(tmp_path / "x.vmdk", b"hello")).structure == "descriptor"
        assert refusal(put(tmp_path / "empty.vmdk", b"")).structure == "descriptor"


class TestExtents:
    """One test for each of the ways in which peers go wrong."""

    @pytest.fixture
    def files(self, tmp_path):
        put(tmp_path / "one.bin", data("before", GRAIN) + data("one", GRAIN) + data("after", GRAIN))
        put(tmp_path / "two.bin", data("two", GRAIN))
        return tmp_path

    def test_zero_and_read_only_extents_keep_their_place(self, files):
        lines = ['RDONLY 128 FLAT "two.bin" 0', "RW 256 ZERO", 'RW 128 FLAT "one.bin" 128']
        path = vmdkmade.descriptor(files / "disk.vmdk", lines)
        assert bytes_of(path) == data("two", GRAIN) + bytes(2 * GRAIN) + data("one", GRAIN)
        with opened(path) as disk:
            kinds = [int(e["kind"]) for batch in disk.extents() for e in batch]
            assert kinds == [DATA, ZERO, DATA]
            assert disk.files[0].name == str(path)

    def test_parts_of_one_file_in_another_order(self, files):
        lines = ['RW 128 FLAT "one.bin" 256', 'RW 128 FLAT "one.bin" 0']
        path = vmdkmade.descriptor(files / "disk.vmdk", lines)
        assert bytes_of(path) == data("after", GRAIN) + data("before", GRAIN)

    def test_no_access_is_refused(self, files):
        path = vmdkmade.descriptor(files / "disk.vmdk", ['NOACCESS 128 FLAT "two.bin" 0'])
        assert "NOACCESS" in refusal(path, UnsupportedError).feature

    @pytest.mark.parametrize("line", ['RW 128 FLAT "two.bin" 64', 'RW 129 FLAT "two.bin" 0', 'RW 1 VMFS "two.bin" 128'])
    def test_an_extent_shorter_than_said(self, files, line):
        error = refusal(vmdkmade.descriptor(files / "disk.vmdk", [line]))
        assert error.file.endswith("two.bin")
        assert error.offset == {"64": 64 * 512, "128": GRAIN}.get(line.split()[-1], 0)

    def test_a_missing_extent(self, files):
        path = vmdkmade.descriptor(files / "disk.vmdk", ['RW 128 FLAT "three.bin" 0'])
        assert "three.bin" in str(refusal(path, SourceError))

    @pytest.mark.parametrize("word", ["VMFSRDM", "VMFSRAW", "MAGIC"])
    def test_kinds_that_are_no_files(self, files, word):
        path = vmdkmade.descriptor(files / "disk.vmdk", [f'RW 128 {word} "two.bin"'])
        assert word in str(refusal(path, UnsupportedError))

    @pytest.mark.parametrize("word", ["fullDevice", "partitionedDevice", "vmfsRawDeviceMap"])
    def test_devices(self, files, word):
        path = vmdkmade.descriptor(files / "disk.vmdk", [r'RW 128 FLAT "\\.\PhysicalDrive0" 0'], word)
        assert refusal(path, UnsupportedError).feature == word

    def test_no_extents_at_all(self, files):
        assert "no extent" in str(refusal(vmdkmade.descriptor(files / "disk.vmdk", [])))

    def test_a_descriptor_as_its_own_extent(self, files):
        path = vmdkmade.descriptor(files / "disk.vmdk", ['RW 1 SPARSE "disk.vmdk"'])
        assert "no sparse extent" in str(refusal(path))

    def test_a_sparse_extent_named_twice(self, files):
        put(files / "s.vmdk", Hosted(128, {0: b"x"}).build())
        path = vmdkmade.descriptor(files / "disk.vmdk", ['RW 128 SPARSE "s.vmdk"'] * 2)
        assert "twice" in str(refusal(path))

    @pytest.mark.parametrize(
        ("sectors", "good"), [(1024, True), (1000, True), (897, True), (896, False), (1025, False)]
    )
    def test_sizes_in_header_and_descriptor(self, files, sectors, good):
        put(files / "s.vmdk", Hosted(1024, {n: data(n, GRAIN) for n in range(8)}).build())
        path = vmdkmade.descriptor(files / "disk.vmdk", [f'RW {sectors} SPARSE "s.vmdk"'])
        if good:
            want = b"".join(data(n, GRAIN) for n in range(8))
            assert bytes_of(path) == want[: sectors * 512]
        else:
            assert refusal(path).field == "capacity"


class TestPolicy:
    """Nothing but plain files beside the image is opened."""

    @pytest.fixture
    def cage(self, tmp_path):
        (tmp_path / "cage").mkdir()
        put(tmp_path / "secret.bin", b"s" * GRAIN)
        return tmp_path / "cage"

    @pytest.mark.parametrize("word", ["{up}/secret.bin", "../secret.bin", "link.bin", "..\\secret.bin", "", ".", ".."])
    def test_names_outside(self, cage, word):
        (cage / "link.bin").symlink_to(cage.parent / "secret.bin")
        name = word.format(up=cage.parent)
        path = vmdkmade.descriptor(cage / "disk.vmdk", [f'RW 1 FLAT "{name}" 0'])
        refusal(path, (PolicyError, SourceError))

    def test_names_outside_by_leave(self, cage):
        path = vmdkmade.descriptor(cage / "disk.vmdk", ['RW 1 FLAT "../secret.bin" 0'])
        assert bytes_of(path, parents=cage.parent) == b"s" * 512

    @pytest.mark.parametrize("word", ["pipe", "/dev/zero", "zero"])
    def test_special_files(self, cage, word):
        os.mkfifo(cage / "pipe")
        (cage / "zero").symlink_to("/dev/zero")
        path = vmdkmade.descriptor(cage / "disk.vmdk", [f'RW 1 FLAT "{word}" 0'])
        begin = time.monotonic()
        refusal(path, (PolicyError, SourceError))
        refusal(path, (PolicyError, SourceError), parents=["/dev", cage])
        assert time.monotonic() - begin < 5

    def test_failure_closes_what_was_opened(self, cage):
        put(cage / "a.bin", bytes(512))
        path = vmdkmade.descriptor(cage / "disk.vmdk", ['RW 1 FLAT "a.bin" 0', 'RW 1 FLAT "b.bin" 0'])
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            refusal(path, SourceError)
        assert len(os.listdir("/proc/self/fd")) == before


class TestParents:
    def chain(self, folder, **child):
        put(folder / "base.vmdk", hosted().build())
        words = {"parent": "12345678", "hint": "base.vmdk", "cid": "0000000a"} | child
        grains = {1: data("top", GRAIN), 2: ZEROED, 4: ZEROED}
        text = vmdkmade.words(['RW 1024 SPARSE "top.vmdk"'], **words)
        return put(folder / "top.vmdk", Hosted(1024, grains, text=text, version=2, flags=7).build())

    def test_zeroed_grains_hide_the_parent(self, tmp_path):
        want = [data(n, GRAIN) for n in range(8)]
        want[1], want[2], want[4] = data("top", GRAIN), bytes(GRAIN), bytes(GRAIN)
        top = self.chain(tmp_path)
        assert bytes_of(top, parents=tmp_path) == b"".join(want)
        context = OpenContext()
        with load(require_format("vmdk")).open_image(FileSource(top), context) as layer:
            kinds = np.concatenate(list(layer.extents()))["kind"].tolist()
            assert kinds == [ABSENT, DATA, ZERO, ABSENT, ZERO, ABSENT]
            assert layer.info.parent.names == ("base.vmdk",)
            assert layer.identity == {"cid": "0000000a"}

    def test_without_leave(self, tmp_path):
        assert refusal(self.chain(tmp_path), PolicyError).option == "--allow-parent"

    def test_another_cid_is_refused_by_that_word(self, tmp_path):
        error = refusal(self.chain(tmp_path, parent="12345679"), parents=tmp_path)
        assert (error.field, error.expected, error.found) == ("cid", "12345679", "12345678")

    def test_case_and_leading_zeroes_of_cids_do_not_matter(self, tmp_path):
        put(tmp_path / "base.vmdk", hosted().build().replace(b"CID=12345678", b"CID=ABC     ", 1))
        text = vmdkmade.words(['RW 1024 SPARSE "top.vmdk"'], parent="00000abc", hint="base.vmdk")
        top = put(tmp_path / "top.vmdk", Hosted(1024, {}, text=text).build())
        assert bytes_of(top, parents=tmp_path) == hosted().content()

    def test_a_parent_without_a_name(self, tmp_path):
        text = vmdkmade.words(['RW 1024 SPARSE "top.vmdk"'], parent="12345678")
        top = put(tmp_path / "top.vmdk", Hosted(1024, {}, text=text).build())
        assert "no parent" in str(refusal(top, parents=tmp_path))
        put(tmp_path / "base.vmdk", hosted().build())
        from diskmorph.formats.policy import Parents

        assert bytes_of(top, parents=Parents(backing=tmp_path / "base.vmdk")) == hosted().content()

    def test_a_name_without_a_cid(self, tmp_path):
        text = vmdkmade.words(['RW 1024 SPARSE "top.vmdk"'], hint="base.vmdk").replace("parentCID=ffffffff\n", "")
        assert refusal(put(tmp_path / "top.vmdk", Hosted(1024, {}, text=text).build())).field == "parentCID"

    def test_a_hole_of_a_flat_extent_hides_the_parent(self, tmp_path):
        put(tmp_path / "base.vmdk", hosted().build())
        (tmp_path / "flat.bin").touch()
        os.truncate(tmp_path / "flat.bin", 1024 * 512)
        top = vmdkmade.descriptor(
            tmp_path / "top.vmdk", ['RW 1024 FLAT "flat.bin" 0'], parent="12345678", hint="base.vmdk"
        )
        assert bytes_of(top, parents=tmp_path) == bytes(1024 * 512)

    def test_a_cowd_and_an_sesparse_child(self, tmp_path):
        put(tmp_path / "base.vmdk", hosted().build())
        put(tmp_path / "cowd.vmdk", vmdkmade.cowd(512, {3: data("c", 512)}))
        put(tmp_path / "wide.vmdk", vmdkmade.sesparse(512, {0: data("w", 4096), 1: ZEROED, 2: "unmapped"}))
        lines = ['RW 512 VMFSSPARSE "cowd.vmdk"', 'RW 512 SESPARSE "wide.vmdk"']
        top = vmdkmade.descriptor(tmp_path / "top.vmdk", lines, "seSparse", parent="12345678", hint="base.vmdk")
        want = bytearray(hosted().content())
        want[3 * 512 : 4 * 512] = data("c", 512)
        want[512 * 512 : 512 * 512 + 3 * 4096] = data("w", 4096) + bytes(8192)
        assert bytes_of(top, parents=tmp_path) == want

    def test_layers(self, tmp_path):
        layers = open_layers(
            FileSource(self.chain(tmp_path)), require_format("vmdk"), OpenContext(self.opener(tmp_path))
        )
        assert [layer.info.parent is not None for layer in layers] == [True, False]
        for layer in layers:
            layer.close()

    def opener(self, folder):
        from diskmorph.formats.policy import Opener, Parents

        return Opener(Parents.of(folder))


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
