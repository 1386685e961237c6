"""Reading VMDK: descriptors in all their forms, every refusal, what peers get silently wrong."""

import os
import time

import numpy as np
import pytest
import vmdkmade
from vmdkkit import GRAIN, bytes_of, hosted, opened, put, refusal
from vmdkmade import ZEROED, Hosted

from diskmorph.formats.errors import FormatError, PolicyError, SourceError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, ZERO
from diskmorph.formats.limits import Limits
from diskmorph.formats.registry import OpenContext, load, open_layers, require_format
from diskmorph.formats.source import FileSource
from diskmorph.formats.vmdk import descriptor, schema

from testkit import data


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
