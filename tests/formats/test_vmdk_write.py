"""Writing VMDK: what VMware asks of headers, descriptors and streams, and what other products read of it."""

import hashlib
import os
import re
import struct
import zlib

import numpy as np
import pytest

from diskmorph.formats.allocator import RUN, Identity, NewImage, NewParent
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.extents import ABSENT, DATA, DEFLATE, HOLE, ZERO, ZLIB, ZSTD
from diskmorph.formats.registry import OpenContext, load, open_disk, require_format
from diskmorph.formats.source import FileSource
from diskmorph.formats.views import Memory, Overlay, Zero
from diskmorph.formats.vmdk.descriptor import geometry
from diskmorph.formats.vmdk.settings import EXTENT_SECTORS

from testkit import GIB, KIB, MIB, TIB, content, data, little_disk, pattern_disk, qemu_same, run, write_image

GRAIN = 64 * KIB
VMDK = load(require_format("vmdk"))
SPARSE = ("monolithicSparse", "twoGbMaxExtentSparse")
SUBFORMATS = (*SPARSE, "monolithicFlat", "twoGbMaxExtentFlat", "streamOptimized", "vmfs")


def allocator(size, options=None, name="disk.vmdk", **words):
    return VMDK.new_allocator(NewImage(size, name, options=options or {}, identity=Identity(b"seed"), **words))


def written(disk, path, subformat="monolithicSparse", **options):
    encode = zlib.compress if subformat == "streamOptimized" else None
    return write_image("vmdk", disk, path, options={"subformat": subformat, **options}, encode=encode)


def text_of(path):
    raw = path.read_bytes()
    at = raw.index(b"# Disk DescriptorFile")
    return raw[at:].split(b"\0")[0].decode()


def findings(path):
    return VMDK.check_image(FileSource(path), OpenContext()).findings


def runs_of(*rows):
    runs = np.zeros(len(rows), RUN)
    for index, (start, length, kind) in enumerate(rows):
        runs[index] = (start, length, 0, kind, 0)
    return runs


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_other_products_read_it(subformat, tmp_path):
    disk = little_disk(5 * MIB + 1536)
    raw, path = tmp_path / "a.raw", tmp_path / "a.vmdk"
    raw.write_bytes(content(disk))
    written(disk, path, subformat)
    qemu_same(raw, path, "vmdk")
    assert f"create type: {subformat}" in run("qemu-img", "info", path).stdout
    if subformat in (*SPARSE, "streamOptimized"):
        run("qemu-img", "check", "-q", path)
    shown = run("vmdkinfo", path).stdout
    assert f"({disk.size} bytes)" in shown
    assert findings(path) == []


def test_a_split_disk(tmp_path):
    """Data on both sides of the bound, in grains that end at it."""
    bound = EXTENT_SECTORS * 512
    size = bound + 3 * MIB + 512
    disk = pattern_disk(
        size, [(0, 512, b"a"), (bound - 100_000, 200_000, data("bound", 200_000)), (size - 512, 512, b"z")]
    )
    for subformat, letter in (("twoGbMaxExtentSparse", "s"), ("twoGbMaxExtentFlat", "f")):
        paths = written(disk, tmp_path / "disk.vmdk", subformat)
        assert [p.name for p in paths] == ["disk.vmdk", f"disk-{letter}001.vmdk", f"disk-{letter}002.vmdk"]
        with open_disk(paths[0]) as back:
            assert back.size == size
            for start, length in ((0, 4096), (bound - 131_072, 262_144), (size - 4096, 4096)):
                assert checked(back).read(start, length) == disk.read(start, length)
        shown = run("qemu-io", "-r", "-f", "vmdk", "-c", f"read -P 122 {size - 512} 512", paths[0])
        assert "failed" not in shown.stdout + shown.stderr
        assert findings(paths[0]) == []
        for path in paths:
            path.unlink()


class TestDescriptor:
    def test_as_vmware_writes_it(self, tmp_path):
        path, *_ = written(Zero(10 * GIB), tmp_path / "disk.vmdk")
        text = text_of(path)
        cid = re.search(r"^CID=([0-9a-f]{8})$", text, re.MULTILINE)[1]
        assert text.startswith('# Disk DescriptorFile\nversion=1\nencoding="UTF-8"\nCID=')
        assert "\nparentCID=ffffffff\n" in text
        assert '\nisNativeSnapshot="no"\ncreateType="monolithicSparse"\n' in text
        assert f'\nRW {10 * GIB // 512} SPARSE "disk.vmdk"\n' in text
        assert re.search(rf'^ddb.longContentID = "[0-9a-f]{{24}}{cid}"$', text, re.MULTILINE)
        assert re.search(
            r'^ddb.uuid = "60 00 C2 9[0-9a-f]( [0-9a-f]{2}){4}-[0-9a-f]{2}( [0-9a-f]{2}){7}"$',
            text,
            re.MULTILINE | re.IGNORECASE,
        )
        for key, value in {
            "adapterType": "lsilogic",
            "geometry.cylinders": 10 * GIB // 512 // (255 * 63),
            "geometry.heads": 255,
            "geometry.sectors": 63,
            "toolsVersion": 2147483647,
            "virtualHWVersion": 4,
        }.items():
            assert f'ddb.{key} = "{value}"\n' in text

    @pytest.mark.parametrize(
        ("sectors", "adapter", "want"),
        [
            (1, "ide", (1, 16, 63)),
            (16 * 63 * 100, "ide", (100, 16, 63)),
            (1 << 40, "ide", (16383, 16, 63)),
            (255 * 63 * 100 + 1, "lsilogic", (100, 255, 63)),
            (1 << 40, "pvscsi", (65535, 255, 63)),
        ],
    )
    def test_geometry(self, sectors, adapter, want):
        assert geometry(sectors, adapter) == want

    def test_options(self, tmp_path):
        options = {"adapter_type": "ide", "hwversion": "13", "toolsversion": "11269"}
        path, *_ = written(Zero(GIB), tmp_path / "disk.vmdk", "streamOptimized", **options)
        text = text_of(path)
        for line in (
            'adapterType = "ide"',
            'geometry.heads = "16"',
            'virtualHWVersion = "13"',
            'toolsVersion = "11269"',
        ):
            assert f"ddb.{line}\n" in text

    @pytest.mark.parametrize(("subformat", "kind", "thin"), [("vmfs", "vmfs", False), ("vmfsThin", "vmfs", True)])
    def test_vmfs(self, tmp_path, subformat, kind, thin):
        paths = written(little_disk(MIB), tmp_path / "disk.vmdk", subformat)
        text = text_of(paths[0])
        assert [path.name for path in paths] == ["disk.vmdk", "disk-flat.vmdk"]
        assert f'createType="{kind}"' in text
        assert '\nRW 2048 VMFS "disk-flat.vmdk"\n' in text
        assert ("thinProvisioned" in text) == thin

    def test_a_name_without_the_suffix(self):
        options = {"subformat": "monolithicFlat"}
        assert list(allocator(MIB, options, "a.b").members) == ["a.b", "a.b-flat.vmdk"]
        assert list(allocator(MIB, options, "a.VMDK").members) == ["a.VMDK", "a-flat.VMDK"]

    def test_a_long_name_has_room(self, tmp_path):
        name = "n" * 200 + ".vmdk"
        disk = little_disk(MIB)
        for subformat in SUBFORMATS:
            folder = tmp_path / subformat
            folder.mkdir()
            path, *_ = written(disk, folder / name, subformat)
            with open_disk(path) as back:
                assert content(back) == content(disk)

    @pytest.mark.parametrize("name", ['a"b.vmdk', "a\nb.vmdk"])
    def test_names_that_cannot_be_said(self, name):
        with pytest.raises(TargetError, match="name"):
            allocator(MIB, name=name)

    def test_the_time_and_chance_come_from_the_identity(self, tmp_path):
        def bytes_of(seed):
            (tmp_path / seed).mkdir()
            path, *_ = write_image("vmdk", Zero(MIB), tmp_path / seed / "d.vmdk", identity=Identity(seed.encode()))
            return path.read_bytes()

        assert bytes_of("a") != bytes_of("b")


class TestSparse:
    def header(self, path):
        return struct.unpack("<4sIIQQQQIQQQB4sH", path.read_bytes()[:79])

    def test_layout(self, tmp_path):
        size = 70 * MIB + 512
        path, *_ = written(pattern_disk(size, [(GRAIN, 100, b"x")]), tmp_path / "disk.vmdk")
        magic, version, flags, capacity, grain, desc, length, entries, rgd, gd, overhead, unclean, ends, codec = (
            self.header(path)
        )
        assert (magic, version, flags, ends, codec, unclean) == (b"KDMV", 1, 3, b"\n \r\n", 0, 0)
        assert (capacity, grain, desc, length, entries) == (size // 512, 128, 1, 20, 512)
        assert (rgd, gd) == (21, 21 + 1 + 3 * 4)
        assert overhead % 128 == 0
        assert path.stat().st_size == overhead * 512 + GRAIN
        raw = path.read_bytes()
        for base in (rgd, gd):
            tables = struct.unpack_from("<3I", raw, base * 512)
            assert tables == (base + 1, base + 5, base + 9)
            assert struct.unpack_from("<2I", raw, tables[0] * 512) == (0, overhead)

    def test_no_embedded_descriptor_in_the_extents_of_a_split_disk(self, tmp_path):
        _, extent = written(little_disk(MIB), tmp_path / "disk.vmdk", "twoGbMaxExtentSparse")
        assert self.header(extent)[5:7] == (0, 0)
        assert self.header(extent)[8] == 1

    def test_zeroes_are_holes_unless_zeroed_grains_are_asked_for(self, tmp_path):
        disk = pattern_disk(MIB, [(0, GRAIN, data(1, GRAIN)), (GRAIN, 2 * GRAIN, ZERO)])
        for word, kinds, version, flags in (("off", [DATA, HOLE], 1, 3), ("on", [DATA, ZERO, HOLE], 2, 7)):
            path, *_ = written(disk, tmp_path / f"{word}.vmdk", zeroed_grain=word)
            assert self.header(path)[1:3] == (version, flags)
            with open_disk(path) as back:
                assert np.concatenate(list(back.extents()))["kind"].tolist() == kinds
            run("qemu-img", "check", "-q", path)

    def test_tables_of_two_tebibytes_need_no_memory(self):
        layout = allocator(2 * TIB, {"zeroed_grain": "on"})
        layout.place(runs_of((0, 4 * GIB, DATA), (4 * GIB, TIB, ZERO), (2 * TIB - GRAIN, GRAIN, DATA)))
        writes = list(layout.finish())
        assert max(len(write.data) for write in writes) <= 2 * MIB
        (size,) = layout.sizes()
        tables = 2 * (256 * KIB + 128 * MIB)
        assert size == -(-(21 * 512 + tables) // GRAIN) * GRAIN + 4 * GIB + GRAIN

    def test_what_its_sector_numbers_cannot_reach_is_refused(self):
        layout = allocator(3 * TIB)
        layout.place(runs_of((0, TIB, DATA)))
        with pytest.raises(TargetError, match="2 TiB"):
            layout.place(runs_of((TIB, TIB, DATA)))

    @pytest.mark.parametrize(("size", "subformat"), [(63 * TIB, "monolithicSparse"), (9 * TIB, "twoGbMaxExtentSparse")])
    def test_sizes_beyond_reason(self, size, subformat):
        with pytest.raises(TargetError):
            allocator(size, {"subformat": subformat})

    def test_many_pieces_in_any_portions(self, tmp_path):
        """Places, settled in portions of every size, give the tables that one go gives."""
        size = 300 * MIB
        rows = [(n * 3 * GRAIN, GRAIN * (1 + n % 2), (DATA, ZERO)[n % 3 == 0]) for n in range(1500)]
        images = []
        for portion in (1, 7, 1500):
            layout = allocator(size, {"zeroed_grain": "on"})
            image = bytearray()
            writes = []
            for low in range(0, len(rows), portion):
                layout.place(runs_of(*rows[low : low + portion]))
                last = rows[min(low + portion, len(rows)) - 1]
                writes += layout.settle(last[0] + last[1])
            writes += layout.finish()
            for _, offset, piece in writes:
                image.extend(bytes(max(0, offset + len(piece) - len(image))))
                image[offset : offset + len(piece)] = piece
            images.append(hashlib.sha256(image).hexdigest())
        assert len(set(images)) == 1


class TestOverlay:
    def parent(self, folder):
        base = little_disk(3 * MIB)
        path, *_ = written(base, folder / "base.vmdk")
        with open_disk(path) as disk:
            return base, NewParent("base.vmdk", "vmdk", base.size, disk.identity, path)

    def change(self, base):
        want = bytearray(content(base))
        want[GRAIN : 2 * GRAIN] = data("new", GRAIN)
        want[4 * GRAIN : 8 * GRAIN] = bytes(4 * GRAIN)
        top = pattern_disk(
            base.size,
            [
                (0, GRAIN, ABSENT),
                (GRAIN, GRAIN, data("new", GRAIN)),
                (2 * GRAIN, 2 * GRAIN, ABSENT),
                (4 * GRAIN, 4 * GRAIN, ZERO),
                (8 * GRAIN, base.size - 8 * GRAIN, ABSENT),
            ],
        )
        return Memory(bytes(want)), top

    @pytest.mark.parametrize("subformat", SPARSE)
    @pytest.mark.parametrize("word", ["on", "off"])
    def test_qemu_reads_it(self, tmp_path, subformat, word):
        base, parent = self.parent(tmp_path)
        whole, _ = self.change(base)
        path = tmp_path / "top.vmdk"
        options = {"subformat": subformat, "zeroed_grain": word}
        layout = VMDK.new_allocator(NewImage(base.size, path.name, options=options, parent=parent))
        members = {number: tmp_path / name for number, name in enumerate(layout.members)}
        rows = runs_of((GRAIN, GRAIN, DATA), (4 * GRAIN, 4 * GRAIN, ZERO))
        placed = layout.place(rows)
        assert placed["kind"].tolist() == ([DATA] if word == "on" else [DATA, ZERO])
        for name in members.values():
            name.touch()
        with open(members[int(placed["member"][0])], "r+b") as file:
            file.seek(int(placed["offset"][0]))
            file.write(data("new", GRAIN))
        for member, offset, piece in layout.finish():
            with open(members[member], "r+b") as file:
                file.seek(offset)
                file.write(piece)
        for number, size in enumerate(layout.sizes()):
            os.truncate(members[number], size)
        raw = tmp_path / "want.raw"
        raw.write_bytes(content(whole))
        with open_disk(path, parents=tmp_path) as back:
            assert isinstance(back, Overlay)
            assert content(back) == content(whole)
        if subformat == "monolithicSparse":
            qemu_same(raw, path, "vmdk")
            assert "base.vmdk" in run("qemu-img", "info", path).stdout
        assert findings(path) == []
        assert f"parentCID={parent.identity['cid']}" in text_of(path)

    @pytest.mark.parametrize("subformat", ["monolithicFlat", "streamOptimized", "vmfs"])
    def test_kinds_without_parents(self, tmp_path, subformat):
        _, parent = self.parent(tmp_path)
        with pytest.raises(OptionError, match="parent"):
            allocator(MIB, {"subformat": subformat}, parent=parent)

    def test_a_parent_of_another_format(self, tmp_path):
        with pytest.raises(OptionError, match="vmdk"):
            allocator(MIB, parent=NewParent("base.qcow2", "qcow2", MIB))


class TestStream:
    def walk(self, path):
        """Every marker from the end of the header on: (kind, offset, value or LBA)."""
        raw = path.read_bytes()
        at, found = struct.unpack_from("<Q", raw, 64)[0] * 512, []
        while True:
            value, size, kind = struct.unpack_from("<QII", raw, at)
            if size:
                found.append(("grain", at, value))
                at += -(-(12 + size) // 512) * 512
                continue
            found.append((("end", "table", "directory", "footer")[kind], at, value))
            at += 512 + value * 512
            if kind == 0:
                assert at == len(raw), "bytes follow the end-of-stream marker"
                return raw, found

    def test_order_of_the_markers(self, tmp_path):
        size = 100 * MIB + 512
        pieces = [(0, 100, b"a"), (40 * MIB, GRAIN, data(1, GRAIN)), (size - 512, 512, b"z")]
        path, *_ = written(pattern_disk(size, pieces), tmp_path / "disk.vmdk", "streamOptimized")
        raw, found = self.walk(path)
        kinds = [kind for kind, _, _ in found]
        assert kinds == ["grain", "table", "grain", "table", "grain", "table", "directory", "footer", "end"]
        assert [value for kind, _, value in found if kind == "grain"] == [0, 81920, size // 512 // 128 * 128]
        version, flags = struct.unpack_from("<II", raw, 4)
        assert (version, flags, struct.unpack_from("<Q", raw, 56)[0], raw[77:79]) == (
            3,
            0x30001,
            (1 << 64) - 1,
            b"\1\0",
        )
        footer = raw[-1024:-512]
        at = {kind: place for kind, place, _ in found}["directory"] + 512
        assert footer[:56] + footer[64:] == raw[:56] + raw[64:512]
        assert struct.unpack_from("<Q", footer, 56)[0] * 512 == at
        tables = [place + 512 for kind, place, _ in found if kind == "table"]
        listed = [sector * 512 for sector in struct.unpack_from("<4I", raw, at)]
        assert listed == [tables[0], tables[1], 0, tables[2]]

    def test_an_empty_one(self, tmp_path):
        path, *_ = written(Zero(40 * MIB), tmp_path / "disk.vmdk", "streamOptimized")
        assert [kind for kind, _, _ in self.walk(path)[1]] == ["directory", "footer", "end"]
        assert findings(path) == []

    def test_compression_asks_for_it(self):
        layout = allocator(MIB, codec=DEFLATE, level=7)
        assert (layout.codec, layout.level, layout.sequential, layout.codecs) == (ZLIB, 7, True, {ZLIB})

    def test_a_pipe_has_a_name_for_its_extent(self):
        layout = allocator(MIB, {"subformat": "streamOptimized"}, "-")
        head = b"".join(bytes(write.data) for write in layout.begin())
        assert b'SPARSE "disk.vmdk"' in head


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subformat": "seSparse"}, {}),
        ({"adapter_type": "sata"}, {}),
        ({"hwversion": "x"}, {}),
        ({"hwversion": "2"}, {}),
        ({"zeroed_grain": "maybe"}, {}),
        ({"subformat": "monolithicFlat", "zeroed_grain": "on"}, {}),
        ({"subformat": "streamOptimized", "preallocation": "full"}, {}),
        ({"subformat": "monolithicFlat"}, {"codec": DEFLATE}),
        ({}, {"codec": ZSTD}),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(OptionError):
        allocator(MIB, options, **words)


def test_every_option_is_listed():
    assert {option.name for option in VMDK.OPTIONS} == {
        "subformat",
        "adapter_type",
        "hwversion",
        "toolsversion",
        "zeroed_grain",
        "preallocation",
    }
    for word in VMDK.SUBFORMATS:
        assert allocator(MIB, {"subformat": word}).size == MIB
