"""VHDX blocks as they are read: states, chains, peers, cost, damage."""

import random
import struct
import time
import tracemalloc
import uuid

import numpy as np
import pytest
import vhdxmade
from vhdxkit import SIZE, kinds, made, opened, refusal
from vhdxmade import (
    BAT_AT,
    FULL,
    HEADERS,
    METADATA_AT,
    NOT_PRESENT,
    OLD_UNMAPPED,
    PARTIAL,
    TABLES,
    UNDEFINED,
    UNMAPPED,
    ZEROED,
    Made,
)

from diskmorph.formats import vhdx
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, FormatError, PolicyError, UnsupportedError
from diskmorph.formats.extents import ABSENT, DATA, HOLE, ZERO
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import OpenContext, open_disk
from diskmorph.formats.source import BytesSource

from testkit import GIB, MIB, TIB, content, data, little_disk, qemu_same, run


class TestBlocks:
    def test_states_of_a_disk_that_stands_alone(self):
        blocks = {n: (s, None, None) for n, s in enumerate((NOT_PRESENT, UNDEFINED, ZEROED, UNMAPPED, OLD_UNMAPPED))}
        disk = opened(Made(5 * MIB, blocks).build())
        assert kinds(disk) == [HOLE, HOLE, ZERO, HOLE, HOLE]
        assert content(checked(disk)) == bytes(5 * MIB)

    def test_states_of_a_differencing_disk_ask_the_parent_only_where_nothing_is_present(self):
        blocks = {n: (s, None, None) for n, s in enumerate((NOT_PRESENT, UNDEFINED, ZEROED, UNMAPPED, OLD_UNMAPPED))}
        disk = opened(Made(5 * MIB, blocks, parent={"parent_linkage": "{x}", "relative_path": "p"}).build())
        assert kinds(disk) == [ABSENT, ZERO, ZERO, ZERO, ZERO]

    @pytest.mark.parametrize("state", [4, PARTIAL])
    def test_states_that_are_not_valid(self, state):
        blocks = {0: (FULL, b"x", None), 2: (state, b"y", None)}
        refusal(made(blocks=blocks).build(), structure="BAT", field="state", offset=BAT_AT + 16, found=state)

    def test_partially_present_without_a_bitmap(self):
        image = made(blocks={1: (PARTIAL, b"y", None)}, parent={"parent_linkage": "{x}", "relative_path": "p"})
        refusal(image.build(), structure="BAT", field="sector bitmap entry", offset=image.bitmap_entry_at(0))

    def test_bitmaps_are_least_significant_bit_first_and_one_means_here(self):
        bits = b"\x01\x00\x80" + bytes(252) + b"\xff"
        blocks = {1: (PARTIAL, data("lsb", MIB), bits)}
        disk = opened(made(blocks=blocks, parent={"parent_linkage": "{x}", "relative_path": "p"}).build())
        found = np.concatenate(list(disk.extents(MIB, 2 * MIB)))
        here = [(s - MIB, n) for s, n, k in found[["start", "length", "kind"]].tolist() if k == DATA]
        assert here == [(0, 512), (23 * 512, 512), (255 * 8 * 512, 4096)]
        for start, length in here:
            assert disk.read(MIB + start, length) == blocks[1][1][start : start + length]
        with pytest.raises(PolicyError):
            disk.read(MIB, 513)

    def test_a_bitmap_entry_between_blocks_is_no_block(self):
        """Chunks of 4096 blocks of 1 MiB: block 4096 has entry 4097 (qemu-img leaves junk in entry 4096)."""
        image = Made(4100 * MIB, {4095: (FULL, b"last", None), 4096: (FULL, b"first", None)})
        raw = image.build()
        struct.pack_into("<Q", raw, BAT_AT + 8 * 4096, 0xFFFF_FFFF_FFF0_0006)
        disk = opened(raw)
        assert disk.read(4095 * MIB, 4) == b"last"
        assert disk.read(4096 * MIB, 5) == b"first"
        assert disk.read(4095 * MIB + MIB - 2, 7) == b"\0\0first"
        assert kinds(disk)[4090:] == [HOLE] * 5 + [DATA, DATA] + [HOLE] * 3

    def test_chunk_ratio_follows_the_logical_sector(self):
        image = Made(33_000 * MIB, {32_767: (FULL, b"last", None), 32_768: (FULL, b"first", None)}, sector=4096)
        disk = opened(image.build())
        assert disk.read(32_767 * MIB, 4) == b"last"
        assert disk.read(32_768 * MIB, 5) == b"first"

    @pytest.mark.parametrize("offset", [0, MIB // 2, 1 << 40, 0xFFFF_FFFF_FFF0_0000])
    def test_a_block_in_no_place(self, offset):
        image = made().build()
        struct.pack_into("<Q", image, BAT_AT + 8, offset & 0xFFFF_FFFF_FFF0_0000 | FULL)
        refusal(image)
        assert opened(image).read(0, 10) == data(("read", 0), MIB)[:10]

    def test_the_last_block_may_be_cut_behind_the_disks_end(self):
        image = Made(2 * MIB + 512, {2: (FULL, b"tail" * 128, None)}).build()
        del image[-MIB + 512 :]
        assert opened(image).read(2 * MIB, 512) == b"tail" * 128
        del image[-1:]
        refusal(image, structure="block")


class TestTruncation:
    @pytest.mark.parametrize("keep", [0.97, 0.8, 0.5, 0.2, 70_000, 700, 135_000, 200_000, 2 * MIB + 100, 3 * MIB + 8])
    def test_a_cut_file_is_refused(self, keep):
        image = made().build()
        image = image[: int(len(image) * keep) if keep < 1 else keep]
        error = refusal(image)
        assert error.offset is not None

    @pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
    def test_a_cut_file_of_qemu_img_is_refused(self, subformat, tmp_path):
        raw, path = tmp_path / "d.raw", tmp_path / "d.vhdx"
        raw.write_bytes(data("cut", 8 * MIB))
        run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", f"subformat={subformat}", raw, path)
        image = path.read_bytes()
        assert content(checked(opened(image))) == raw.read_bytes()
        for cut in (0.97, 0.8, 0.5, 0.2):
            refusal(image[: int(len(image) * cut)])


class TestParents:
    def top(self, folder, texts, **words):
        (folder / "base.vhdx").write_bytes(made().build())
        path = folder / "sub" / "top.vhdx"
        path.parent.mkdir(exist_ok=True)
        image = Made(SIZE, {1: (FULL, b"top", None)}, parent=texts, header={"data": uuid.UUID(int=9)}, **words)
        path.write_bytes(image.build())
        return path

    link = f"{{{vhdxmade.DATA_WRITE}}}"

    @pytest.mark.parametrize(
        "where",
        [
            {"relative_path": "..\\base.vhdx"},
            {"relative_path": "..\\nowhere.vhdx", "absolute_win32_path": "C:\\elsewhere\\..\\..\\base.vhdx"},
            {"absolute_win32_path": "\\\\?\\d:\\..\\base.vhdx"},
        ],
    )
    def test_windows_names_lead_to_the_parent(self, where, tmp_path):
        path = self.top(tmp_path, {"parent_linkage": self.link, **where})
        with open_disk(path, parents=tmp_path) as disk:
            assert disk.read(0, 8) == data(("read", 0), MIB)[:8]
            assert disk.read(MIB, 4) == b"top\0"

    def test_the_bare_name_is_tried_beside_the_image(self, tmp_path):
        path = self.top(tmp_path, {"parent_linkage": self.link, "absolute_win32_path": "Z:\\vms\\base.vhdx"})
        (tmp_path / "base.vhdx").rename(path.parent / "base.vhdx")
        with open_disk(path, parents=tmp_path) as disk:
            assert disk.read(0, 8) == data(("read", 0), MIB)[:8]

    def test_nothing_is_opened_without_leave(self, tmp_path):
        path = self.top(tmp_path, {"parent_linkage": self.link, "relative_path": "..\\base.vhdx"})
        with pytest.raises(PolicyError, match="--allow-parent"):
            open_disk(path)
        with open_disk(path, parents=Parents(backing=tmp_path / "base.vhdx")) as disk:
            assert disk.read(0, 8) == data(("read", 0), MIB)[:8]

    @pytest.mark.parametrize("keys", [("parent_linkage",), ("parent_linkage2", "parent_linkage")])
    def test_the_parent_must_be_the_one_that_was_recorded(self, keys, tmp_path):
        texts = dict.fromkeys(keys, "{00000000-0000-0000-0000-00000000abcd}") | {"relative_path": "..\\base.vhdx"}
        path = self.top(tmp_path, texts)
        with pytest.raises(FormatError, match="not the one") as caught:
            open_disk(path, parents=tmp_path)
        assert caught.value.found == str(vhdxmade.DATA_WRITE)

    def test_the_second_linkage_and_capitals_are_taken(self, tmp_path):
        texts = {"parent_linkage": "{0}", "parent_linkage2": self.link.upper(), "relative_path": "..\\base.vhdx"}
        with open_disk(self.top(tmp_path, texts), parents=tmp_path) as disk:
            assert disk.read(0, 1) == data(("read", 0), MIB)[:1]

    def test_no_linkage_no_locator_another_type(self):
        refusal(made(parent={"relative_path": "p"}).build(), structure="parent locator", field="parent_linkage")
        image = made(parent={}).build()
        at = bytes(image).index(vhdxmade.guid("parent"), METADATA_AT)
        image[at : at + 16] = uuid.UUID(int=5).bytes_le
        struct.pack_into("<I", image, at + 24, 0)
        assert "without a parent locator" in str(refusal(image))
        other = made(parent={}, locator_kind="11111111-2222-3333-4444-555555555555")
        assert "11111111-2222" in str(refusal(other.build(), UnsupportedError, field="locator_type"))

    @pytest.mark.parametrize(("field", "value"), [(18, 65535), (20, 1 << 30), (24, 1 << 31), (28, 0xFFFF), (30, 3)])
    def test_a_locator_that_points_outside_itself(self, field, value):
        image = made(parent={"parent_linkage": self.link, "relative_path": "p"}).build()
        at = bytes(image).index(vhdxmade.guid("vhdx locator"), METADATA_AT)
        struct.pack_into("<I" if field in {20, 24} else "<H", image, at + field, value)
        refusal(image, structure="parent locator")


class TestPeers:
    @pytest.mark.parametrize("options", ["block_size=1M", "block_size=2M,log_size=2M", "block_size=256M"])
    def test_qemu_io_scatters_writes_over_chunks(self, options, tmp_path):
        path, raw = tmp_path / "d.vhdx", tmp_path / "d.raw"
        run("qemu-img", "create", "-q", "-f", "vhdx", "-o", options, path, "9G")
        spots = (8 * GIB, 0, 4 * GIB - MIB, 4 * GIB, 9 * GIB - MIB, 8 * GIB - 512)
        words = [w for i, at in enumerate(spots) for w in ("-c", f"write -P {i + 1} {at} 512")]
        run("qemu-io", "-f", "vhdx", *words, path)
        with open_disk(path) as disk:
            for number, at in enumerate(spots):
                assert disk.read(at, 512) == bytes([number + 1]) * 512
            assert not any(disk.read(4 * GIB - MIB + 512, MIB - 512))
            assert disk.info.warnings == ()
        run("qemu-img", "convert", "-O", "raw", path, raw)
        with open_disk(path) as disk:
            whole = checked(disk)
            assert sum(int(b["length"].sum()) for b in whole.extents()) == 9 * GIB

    def test_4096_byte_sectors(self, tmp_path):
        raw, path = tmp_path / "d.raw", tmp_path / "d.vhdx"
        raw.write_bytes(content(little_disk(32 * MIB)))
        run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", raw, path)
        image = bytearray(path.read_bytes())
        for name in ("logical", "physical"):
            entry = bytes(image).index(vhdxmade.guid(name), 2 * MIB)
            base = bytes(image).index(b"metadata", MIB)
            struct.pack_into("<I", image, base + struct.unpack_from("<I", image, entry + 16)[0], 4096)
        disk = opened(image)
        assert disk.sector_size == 4096
        assert content(checked(disk)) == raw.read_bytes()

    def test_libyal_reads_the_hand_made_chain(self, tmp_path):
        path = tmp_path / "d.vhdx"
        path.write_bytes(made(parent={"parent_linkage": f"{{{vhdxmade.DATA_WRITE}}}", "relative_path": "p"}).build())
        assert "Differential" in run("vhdiinfo", path).stdout

    def test_qemu_img_reads_the_hand_made_file(self, tmp_path):
        path, raw = tmp_path / "d.vhdx", tmp_path / "d.raw"
        path.write_bytes(made(order=[3, 1, 0, 2]).build())
        raw.write_bytes(b"".join(data(("read", n), MIB) for n in range(4)))
        qemu_same(raw, path, "vhdx")


class TestCost:
    def test_the_largest_disk_is_mapped_in_seconds_and_little_memory(self, tmp_path):
        path = tmp_path / "big.vhdx"
        image = Made(64 * TIB)
        raw = image.build()
        last = 64 * TIB // MIB - 1
        struct.pack_into("<Q", raw, image.entry_at(last), len(raw) | FULL)
        with open(path, "wb") as file:
            file.write(raw[: 4 * MIB])
            file.seek(len(raw) - MIB)
            file.write(raw[-MIB:] + bytes(MIB - 512) + b"z" * 512)
        with open_disk(path) as disk:
            tracemalloc.start()
            began = time.process_time()
            rows = [batch for batch in checked(disk).extents() if (batch["kind"] == DATA).any()]
            assert time.process_time() - began < 20  # about 1 s on a quiet machine
            assert tracemalloc.get_traced_memory()[1] < 64 * MIB
            tracemalloc.stop()
            assert len(rows) == 1
            assert disk.read(64 * TIB - 512, 512) == b"z" * 512

    def test_scattered_blocks_of_two_tebibytes(self):
        count = 1 << 21
        made_ = Made(count * MIB)
        image = made_.build()
        entries = np.zeros(count + count // 4096, np.uint64)
        numbers = np.arange(count)
        order = np.random.default_rng(1).permutation(count).astype(np.uint64)
        entries[numbers + numbers // 4096] = (order + np.uint64(64)) << np.uint64(20) | np.uint64(FULL)
        image[BAT_AT : BAT_AT + entries.nbytes] = entries.tobytes()
        source = BytesSource(bytes(image))
        source.size = (count + 64) * MIB
        began = time.process_time()
        rows = sum(len(batch) for batch in vhdx.open_image(source, OpenContext()).extents())
        assert rows > count * 0.99
        assert time.process_time() - began < 10

    def test_alternating_sector_bits_stay_bounded(self):
        block = 256 * MIB
        blocks = dict.fromkeys(range(2), (PARTIAL, b"", b"U" * (block // 512 // 8)))
        image = Made(2 * block, block=block, parent={"parent_linkage": "{x}", "relative_path": "p"})
        image.blocks = {n: (PARTIAL, None, blocks[n][2]) for n in blocks}
        raw = image.build()
        for number in blocks:
            struct.pack_into("<Q", raw, image.entry_at(number), 64 * MIB | PARTIAL)
        source = BytesSource(bytes(raw))
        source.size = 64 * MIB + block
        disk = vhdx.open_image(source, OpenContext())
        tracemalloc.start()
        assert sum(len(batch) for batch in disk.extents()) == 2 * block // 512
        assert tracemalloc.get_traced_memory()[1] < 200 * MIB
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_gives_more_than_an_error(seed):
    """Bytes of every structure are changed and its checksum made right: an error of ours or a disk, nothing else."""
    rng = random.Random(seed)
    bits = bytes(rng.randrange(256) for _ in range(256))
    blocks = {0: (FULL, b"0", None), 1: (PARTIAL, b"1", bits), 3: (ZEROED, None, None)}
    made_ = Made(SIZE, blocks, parent={"parent_linkage": "{0}", "relative_path": "p"}, header={"log": vhdxmade.LOG})
    image = made_.build()
    vhdxmade.put_log(
        image,
        0,
        vhdxmade.log_entry(3, [(BAT_AT, bytes(image[BAT_AT : BAT_AT + 4096])), (5 * MIB, 4096)], size=len(image)),
    )
    spots = [
        (HEADERS[1], 80),
        (TABLES[0], 80),
        (METADATA_AT, 224),
        (METADATA_AT + 65536, 200),
        (BAT_AT, 32),
        (MIB, 128),
    ]
    spots += [(BAT_AT + 8 * 4096, 8)]
    outcomes = set()
    for _ in range(250):
        broken = bytearray(image)
        at, length = rng.choice(spots)
        for _ in range(rng.choice((1, 1, 3))):
            broken[at + rng.randrange(length)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        for start, size in ((HEADERS[1], 4096), (TABLES[0], 65536), (MIB, 8192)):
            broken[start : start + size] = vhdxmade.sealed(broken[start : start + size])
        try:
            disk = vhdx.open_image(BytesSource(bytes(broken)), OpenContext(limits=Limits()))
            list(checked(disk).extents())
            outcomes.add("read")
        except DiskmorphError as error:
            outcomes.add(type(error).__name__)
    assert {"read", "FormatError"} <= outcomes
