"""LVM2 as lvm2 makes it, read where lvm2 says it lies; what is not linear, missing or damaged is refused by name."""

from __future__ import annotations

import contextlib
import random
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest
from lvmkit import Lvm

from diskmorph.formats import fsprobe
from diskmorph.formats.errors import DiskmorphError, FormatError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.lvm import Groups, LogicalVolume, groups_of
from diskmorph.formats.lvm.schema import crc_of
from diskmorph.formats.lvm.text import parse
from diskmorph.formats.registry import open_disk
from diskmorph.formats.views import Memory, Slice

from testkit import data, run

if TYPE_CHECKING:
    from pathlib import Path

    from diskmorph.formats.disk import Disk

KIB, MIB = 1 << 10, 1 << 20
AREA = 4096  # where lvm2 lays the first metadata area


def empty(path: Path, size: int = 64 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def read(*disks: Disk) -> Groups:
    return groups_of(disks, Limits(), name="disk")


def volumes(groups: Groups) -> dict[str, LogicalVolume]:
    return {volume.name: volume for group in groups.groups for volume in group.volumes}


def fill(path: Path, length: int) -> bytes:
    content = data(str(path), length)
    path.write_bytes(content)
    return content


def committed(image: bytes) -> tuple[int, int, int]:
    """Size of the metadata area, offset and size of its text."""
    return struct.unpack_from("<Q", image, AREA + 32)[0], *struct.unpack_from("<QQ", image, AREA + 40)  # type: ignore[return-value]


# ---------------------------------------------------------------- made by lvm2


def test_segments_on_several_volumes(tmp_path: Path) -> None:
    """Parts of one disk, another disk, volumes that grew and moved about: each byte lies where lvm2 says."""
    one, two = empty(tmp_path / "one"), empty(tmp_path / "two")
    with Lvm(tmp_path) as lvm:
        devices = [lvm.attach(one, MIB, 20 * MIB), lvm.attach(one, 32 * MIB, 24 * MIB), lvm.attach(two)]
        lvm("pvcreate", devices[0])
        lvm("pvcreate", "--metadatacopies", 2, devices[1])
        lvm("pvcreate", "--metadatacopies", 0, "--dataalignment", "3m", devices[2])
        lvm("vgcreate", "-s", "1m", "v-g.1", *devices)
        lvm.create("v-g.1", "a+b", "-l", 15, devices[0])
        lvm.create("v-g.1", "other", "-l", 4, devices[1])
        lvm("lvextend", "-l", "+5", "v-g.1/a+b", devices[2])
        lvm("lvextend", "-l", "+6", "v-g.1/a+b", devices[1])
        lvm("lvextend", "-l", "+3", "v-g.1/other", devices[1])
        lvm("lvremove", "v-g.1/other")
        lvm.create("v-g.1", "other", "-l", 7, devices[1])
        lvm("lvrename", "v-g.1", "other", "new-name")
        assert len(lvm.places("v-g.1/a+b")) == 3
        want = {}
        for name in ("a+b", "new-name"):
            want[name] = fill(tmp_path / name, lvm.sizes(f"v-g.1/{name}"))
            lvm.fill(f"v-g.1/{name}", tmp_path / name)
        uuids = lvm("lvs", "--noheadings", "-o", "lv_name,lv_uuid", "v-g.1").split()
    disk, other = open_disk(one), open_disk(two)
    parts = [Slice(disk, MIB, 20 * MIB, "p1"), Slice(disk, 32 * MIB, 24 * MIB, "p2"), other]
    for order in (parts, parts[::-1]):
        found = read(*order)
        assert not found.failures
        assert {name: volume.uuid for name, volume in volumes(found).items()} == dict(
            zip(uuids[::2], uuids[1::2], strict=True)
        )
        for name, volume in volumes(found).items():
            assert volume.opened().read(0, volume.size) == want[name], name
    paths = volumes(found)["a+b"].paths
    assert paths[:2] == ("/dev/v-g.1/a+b", "/dev/mapper/v--g.1-a+b")
    missing = volumes(read(*parts[:2]))
    with pytest.raises(UnsupportedError, match="missing"):
        missing["a+b"].opened()
    assert missing["new-name"].opened().read(0, 512) == want["new-name"][:512]
    assert read(parts[2]) == Groups((), {})  # no metadata of its own


def test_a_text_that_goes_round_its_ring(tmp_path: Path) -> None:
    image = empty(tmp_path / "disk")
    with Lvm(tmp_path) as lvm:
        device = lvm.attach(image)
        lvm("pvcreate", "--metadatasize", "4k", "--dataalignment", "64k", device)
        lvm("vgcreate", "-s", "64k", "vg", device)
        lvm.create("vg", "lv", "-l", 9)
        tags = [word for number in range(180) for word in ("--addtag", f"{number:03}" + "x" * 100)]
        lvm("vgchange", *tags, "vg")
        for number in range(8):
            size, offset, length = committed(image.read_bytes())
            if offset + length > size:
                break
            lvm("vgchange", "--addtag", f"more-{number}", "vg")
        assert offset + length > size, "the text did not wrap: the test says nothing"
        want = fill(tmp_path / "content", 9 * 64 * KIB)
        lvm.fill("vg/lv", tmp_path / "content")
    found = volumes(read(open_disk(image)))["lv"]
    assert found.opened().read(0, found.size) == want


def test_what_is_not_linear_is_refused_by_its_type(tmp_path: Path) -> None:
    """Types that need device-mapper to be made come by vgcfgrestore, which judges the text."""
    image = empty(tmp_path / "disk")
    with Lvm(tmp_path) as lvm:
        device = lvm.attach(image)
        lvm("pvcreate", device)
        lvm("vgcreate", "-s", "64k", "vg", device, lvm.attach(empty(tmp_path / "other")))
        lvm.create("vg", "plain", "-l", 3)
        lvm.create("vg", "wide", "-l", 4, "-i", 2)
        lvm.create("vg", "raid", "--type", "raid0", "-i", 2, "-l", 4)
        lvm.create("vg", "nothing", "--type", "zero", "-l", 4)
        lvm.create("vg", "store", "-l", 4)
        lvm("vgcfgbackup", "-f", tmp_path / "text", "vg")
        text = (tmp_path / "text").read_text()
        extra = """
            snapshot0 {  # lvm2 shows it by its store's name
                id = "000000-0000-0000-0000-0000-0000-00000s"
                status = ["READ", "WRITE", "VISIBLE"]
                segment_count = 1
                segment1 {
                    start_extent = 0
                    extent_count = 3
                    type = "snapshot"
                    chunk_size = 8
                    origin = "plain"
                    cow_store = "store"
                }
            }
        }
        }"""
        end = text.rstrip().removesuffix("}").rstrip().removesuffix("}")
        (tmp_path / "text").write_text(end + extra)
        lvm("vgcfgrestore", "--force", "-f", tmp_path / "text", "vg")
        assert "plain" in lvm("lvs", "--noheadings", "-o", "origin", "vg/store")
        fill(tmp_path / "content", 3 * 64 * KIB)
        lvm.fill("vg/plain", tmp_path / "content")
    found = volumes(read(open_disk(image), open_disk(tmp_path / "other")))
    kinds = {name: volume.kind for name, volume in found.items()}
    assert kinds == {
        "plain": "linear",
        "wide": "striped",
        "raid": "raid0",
        "nothing": "zero",
        "store": "snapshot",
    }
    assert found["plain"].opened().read(0, 512) == (tmp_path / "content").read_bytes()[:512]
    for name, kind in kinds.items():
        if kind != "linear":
            with pytest.raises(UnsupportedError, match=f"vg/{name} is of type {kind}"):
                found[name].opened()


def test_one_sound_copy_is_enough_and_the_newest_counts(tmp_path: Path) -> None:
    image = empty(tmp_path / "disk")
    with Lvm(tmp_path) as lvm:
        lvm("pvcreate", "--metadatacopies", 2, lvm.attach(image))
        lvm("vgcreate", "vg", lvm.loops[0])
        lvm.create("vg", "old", "-l", 1)
        before = image.read_bytes()
        lvm.create("vg", "new", "-l", 1)
    raw = bytearray(image.read_bytes())
    raw[AREA + 41] ^= 1  # the first area's header
    found = read(Memory(raw))
    assert not found.failures
    assert set(volumes(found)) == {"old", "new"}
    raw[:MIB] = before[:MIB]  # the first area says what was before
    assert set(volumes(read(Memory(raw)))) == {"old", "new"}
    raw[AREA + 41] ^= 1
    raw[-MIB:] = bytes(MIB)
    failed = read(Memory(raw))
    assert not failed.groups
    assert isinstance(failed.failures[0], FormatError)


def test_fsprobe_sees_what_lies_inside(tmp_path: Path) -> None:
    image = empty(tmp_path / "disk")
    with Lvm(tmp_path) as lvm:
        lvm("pvcreate", lvm.attach(image))
        lvm("vgcreate", "vg", lvm.loops[0])
        lvm.create("vg", "lv", "-l", 2)
        run("mke2fs", "-q", "-t", "ext4", "-L", "label", empty(tmp_path / "fs", 8 * MIB))
        lvm.fill("vg/lv", tmp_path / "fs")
    found = fsprobe.probe(volumes(read(open_disk(image)))["lv"].opened())
    assert found is not None
    assert (found.type, found.label) == ("ext4", "label")


# ---------------------------------------------------------------- made by hand, to be damaged

TEXT = """
contents = "Text Format Volume Group"
version = 1
vg {
    id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa"
    seqno = 3
    status = ["RESIZEABLE", "READ", "WRITE"]
    extent_size = 8
    physical_volumes {
        pv0 {
            id = "pppppp-pppp-pppp-pppp-pppp-pppp-pppppp"
            status = ["ALLOCATABLE"]
            flags = []
            pe_start = 64
            pe_count = 8
        }
    }
    logical_volumes {
        lv {
            id = "llllll-llll-llll-llll-llll-llll-llllll"
            status = ["READ", "VISIBLE"]
            segment_count = 2
            segment1 {
                start_extent = 0
                extent_count = 2
                type = "striped"
                stripe_count = 1
                stripes = ["pv0", 4]
            }
            segment2 {
                start_extent = 2
                extent_count = 1
                type = "striped"
                stripe_count = 1
                stripes = ["pv0", 0]
            }
        }
    }
}
"""


def sealed(body: bytes) -> bytes:
    return crc_of(body).to_bytes(4, "little") + body


def volume(
    text: str = TEXT, *, uuid: bytes = b"p" * 32, area: tuple[int, int] | None = None, cut: int = 0, **more: int
) -> bytes:
    """A physical volume whose text is as it is said; `more`: fields of the area's header that lie."""
    room = -(-(len(text) + KIB) // (24 * KIB)) * 24 * KIB
    extents = AREA + room + 4 * KIB
    body = text.replace("pe_start = 64", f"pe_start = {extents // 512}").encode() + b"\0"
    raw = bytearray(extents + 8 * 4 * KIB)
    place = area or (AREA, room)
    header = struct.pack("<I8s32sQQQ16xQQ16x", 32, b"LVM2 001", uuid, len(raw), extents, 0, *place)
    raw[512:1024] = b"LABELONE" + struct.pack("<Q", 1) + sealed(header.ljust(512 - 20, b"\0"))
    said = {"version": 1, "start": place[0], "size": place[1], "at": 512, "length": len(body), "crc": crc_of(body)}
    head = b" LVM2 x[5A%r0N*>" + struct.pack("<IQQQQII", *(said | {"flags": 0} | more).values())
    raw[AREA : AREA + 512] = sealed(head.ljust(508, b"\0"))
    raw[AREA + 512 : AREA + 512 + len(body)] = body
    for extent in range(8):
        raw[extents + extent * 4 * KIB] = extent + 1
    return bytes(raw[: len(raw) - cut])


def test_the_one_made_by_hand() -> None:
    found = volumes(read(Memory(volume())))["lv"]
    assert found.size == 3 * 4 * KIB
    assert [found.opened().read(at * 4 * KIB, 1)[0] for at in range(3)] == [5, 6, 1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"start": 8192}, "header of a metadata area"),
        ({"size": 8192}, "header of a metadata area"),
        ({"at": 100}, "outside its metadata area"),
        ({"at": 1 << 62}, "outside its metadata area"),
        ({"length": 0}, "outside its metadata area"),
        ({"length": 1 << 62}, "outside its metadata area"),
        ({"length": 100}, "text is damaged"),
        ({"area": (1 << 40, 24 * KIB)}, "outside the volume"),
        ({"area": (AREA, 512)}, "outside the volume"),
        ({"uuid": b"\xff" * 32}, "label is damaged"),
        ({"uuid": b"/" * 32}, "label is damaged"),
    ],
)
def test_areas_that_lie(more: dict[str, Any], words: str) -> None:
    found = read(Memory(volume(**more)))
    assert not found.groups
    assert words in str(found.failures[0])
    assert found.failures[0].structure


def test_areas_that_are_not_in_use() -> None:
    for more in ({"flags": 1}, {"at": 0}):
        assert read(Memory(volume(**more))) == Groups((), {})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("extent_size = 8", "extent_size = 0", "extent_size"),
        ("extent_size = 8", 'extent_size = "8"', "extent_size"),
        ("extent_size = 8", "extent_size = 9999999999999999999", "extent_size"),
        ("extent_size = 8", "", "extent_size"),
        ("pe_count = 8", "pe_count = 9223372036854775807", "pe_count"),
        ("pe_start = 64", "pe_start = -64", "pe_start"),
        ("segment_count = 2", "segment_count = 3", "segment3"),
        ("segment_count = 2", "segment_count = 0", "segment_count"),
        ("start_extent = 2", "start_extent = 1", "start_extent"),
        ("extent_count = 1", "extent_count = 0", "extent_count"),
        ("extent_count = 1", "extent_count = 99", "stripes"),
        ('stripes = ["pv0", 0]', 'stripes = ["pv0", 8]', "stripes"),
        ('stripes = ["pv0", 0]', 'stripes = ["pv0", -1]', "stripes"),
        ('stripes = ["pv0", 0]', 'stripes = ["pv9", 0]', "stripes"),
        ('stripes = ["pv0", 0]', 'stripes = ["pv0"]', "stripes"),
        ('stripes = ["pv0", 0]', "stripes = 1", "stripes"),
        ("stripe_count = 1\n                stripes", "stripes", "stripe_count"),
        ('type = "striped"\n', "type = 7\n", "type"),
        ("lv {", "../lv {", "name"),
        ("lv {", '"a\x1b[31m" {', "name"),
        ("vg {", "-vg {", "name"),
        ("physical_volumes {", "physical_volumes = 1 other {", "physical_volumes"),
        ("segment1 {", "segment1 = 3 other {", "segment1"),
        ('status = ["READ", "VISIBLE"]', "status = [1, 2]", "status"),
        ("version = 1", "version { }", "one section"),
        ("version = 1", "version", "neither a value nor a section"),
        ("version = 1", "version = [1, 2", "damaged"),
        ("version = 1", 'version = "never closed', "damaged"),
        ("version = 1", "version = 1 version = 2", "twice"),
        ("version = 1", "version = 1 }", "no name"),
        ("version = 1", "a {" * 50, "too many sections"),
    ],
)
def test_texts_that_lie(old: str, new: str, words: str) -> None:
    assert old in TEXT
    found = read(Memory(volume(TEXT.replace(old, new, 1) if "stripes" not in old else new.join(TEXT.rsplit(old, 1)))))
    errors = list(found.failures.values()) + [one.failure for one in volumes(found).values() if one.failure]
    assert len(errors) == 1
    assert isinstance(errors[0], FormatError)
    assert words in str(errors[0])


def test_what_hidden_flags_say() -> None:
    gone = volumes(read(Memory(volume(TEXT.replace("flags = []", 'flags = ["MISSING"]')))))["lv"]
    with pytest.raises(UnsupportedError, match=r"pppppp-\S+ ?, which is missing|which is missing"):
        gone.opened()
    assert not volumes(read(Memory(volume(TEXT.replace('"READ", "VISIBLE"', '"READ"')))))
    stacked = TEXT.replace('["pv0", 0]', '["lv", 0]')
    assert volumes(read(Memory(volume(stacked))))["lv"].kind == "stacked"


def test_a_device_cut_off() -> None:
    found = volumes(read(Memory(volume(cut=3 * 4 * KIB))))["lv"]
    with pytest.raises(FormatError, match="cut off"):
        found.opened()


def test_two_devices_of_one_uuid_are_refused() -> None:
    found = read(Memory(volume()), Memory(volume()))
    assert "one UUID" in str(found.failures[1])


def test_strings_and_lists() -> None:
    text = r'a = "x\"y\\z" # comment' + '\nb = [1, -2, "q"] c = [] d = 1.5 e { f = g } # end'
    assert parse(text) == {"a": 'x"y\\z', "b": [1, -2, "q"], "c": [], "d": "1.5", "e": {"f": "g"}}
    assert parse("") == {}


def test_the_cost_of_a_long_text_is_bounded() -> None:
    begun = time.process_time()
    for filler in ("a {", '"', "[", 'x = "', "\\", "a = [1, ", "# \n", "'"):
        with pytest.raises(FormatError):
            parse((filler * (1 << 20))[: 1 << 20] + "\n]")
    assert time.process_time() - begun < 10
    with pytest.raises(FormatError, match="too long"):
        raise read(Memory(volume("x" * (5 * MIB)))).failures[0]


def test_many_segments_of_one_volume_stay_quick() -> None:
    segments = "".join(
        f'segment{n + 1} {{ start_extent = {n} extent_count = 1 type = "striped" stripe_count = 1'
        f' stripes = ["pv0", {n * 2 % 8}] }}\n'
        for n in range(5_000)
    )
    head, _, tail = TEXT.partition("            segment_count = 2")
    end = tail[tail.index("        }\n    }\n}") :]
    text = f"{head}segment_count = 5000\n{segments}{end}"
    begun = time.process_time()
    found = volumes(read(Memory(volume(text))))["lv"]
    assert found.opened().read(4_999 * 4 * KIB, 1) == b"\7"
    assert sum(len(batch) for batch in found.opened().extents()) == 5_000
    assert time.process_time() - begun < 5


def test_random_damage() -> None:
    """Whatever is changed, with right checksums: an error of ours or a volume, in bounded time."""
    rng = random.Random(7)
    alphabet = '{}[]=,"#\\ \n09az'
    for _ in range(300):
        text = list(TEXT)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(3)] = rng.choices(alphabet, k=rng.randrange(3))
        for one in volumes(read(Memory(volume("".join(text))))).values():
            with contextlib.suppress(DiskmorphError):
                one.opened().read(0, min(one.size, 4096))
