"""Partition tables: what sfdisk writes is read, what is built satisfies sgdisk and sfdisk, damage is told."""

import binascii
import json
import struct
import subprocess
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskmorph.formats.errors import FormatError, TargetError
from diskmorph.formats.gpt import (
    Hybrid,
    Partition,
    build_gpt,
    build_mbr,
    first_usable,
    last_usable,
    read_partitions,
    read_table,
)
from diskmorph.formats.gpt_schema import GPT_ENTRY, GPT_ENTRY_DTYPE, GPT_HEADER, MBR, MBR_ENTRY
from diskmorph.formats.source import FileSource
from diskmorph.formats.views import Memory, Regions, SourceDisk

from testkit import MIB, run

LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
DISK = uuid.UUID("12345678-9abc-def0-1234-56789abcdef0")


def partition(number: int, start: int, length: int, name: str = "", kind: str = LINUX, **rest) -> Partition:
    return Partition(number, kind, name, start, length, str(uuid.UUID(int=number)).upper(), **rest)


def write(path: Path, size: int, head: bytes, tail: bytes = b"") -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
        file.write(head)
        file.seek(size - len(tail))
        file.write(tail)
    return path


def built(size: int, head: bytes, tail: bytes) -> Memory:
    return Memory(head + bytes(size - len(head) - len(tail)) + tail)


def sfdisk(path: Path, script: str, size: int = 64 * MIB) -> SourceDisk:
    write(path, size, b"")
    subprocess.run(["sfdisk", "-q", path], input=script, text=True, check=True, capture_output=True)
    return SourceDisk(FileSource(path))


THREE = [
    partition(1, MIB, 2 * MIB, "boot", ESP),
    partition(2, 3 * MIB, MIB, "grüße", bootable=True),
    partition(128, 4 * MIB, 8 * MIB, "x" * 36),
]


def test_built_gpt_satisfies_sfdisk(tmp_path: Path) -> None:
    size = 16 * MIB
    path = write(tmp_path / "disk", size, *build_gpt(size, THREE, disk_guid=DISK))
    table = json.loads(run("sfdisk", "--json", path).stdout)["partitiontable"]
    assert table["label"] == "gpt" and table["id"] == str(DISK).upper()
    assert (table["firstlba"], table["lastlba"]) == (first_usable() // 512, last_usable(size) // 512 - 1)
    found = [(p["start"] * 512, p["size"] * 512, p["type"], p["uuid"], p.get("name")) for p in table["partitions"]]
    assert found == [(p.start, p.length, p.type, p.uuid, p.name) for p in THREE]
    assert "LegacyBIOSBootable" in table["partitions"][1]["attrs"]
    run("sfdisk", "--verify", path)


def test_built_gpt_of_4096_byte_sectors_satisfies_fdisk(tmp_path: Path) -> None:
    size = 16 * MIB
    path = write(tmp_path / "disk", size, *build_gpt(size, THREE, disk_guid=DISK, sector_size=4096))
    shown = run("fdisk", "-b", "4096", "-l", "-o", "Start,Sectors,Type-UUID,UUID", path)
    assert "corrupt" not in (shown.stdout + shown.stderr).lower()
    assert f"Disk identifier: {str(DISK).upper()}" in shown.stdout
    rows = [line.split() for line in shown.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [[str(p.start // 4096), str(p.length // 4096), p.type, p.uuid] for p in THREE]


def test_built_gpt_satisfies_sgdisk(tmp_path: Path) -> None:
    path = write(tmp_path / "disk", 16 * MIB, *build_gpt(16 * MIB, THREE, disk_guid=DISK))
    assert "No problems found" in run("sgdisk", "--verify", path).stdout


@pytest.mark.parametrize("sector", [512, 4096])
def test_built_gpt_is_read_back(sector: int) -> None:
    disk = built(16 * MIB, *build_gpt(16 * MIB, THREE, disk_guid=DISK, sector_size=sector))
    table = read_table(disk)
    assert table is not None
    assert (table.scheme, table.disk_id, table.sector_size, table.warnings) == ("gpt", str(DISK).upper(), sector, ())
    assert [p.name for p in table.partitions] == [p.name for p in THREE]
    assert [(p.number, p.start, p.length, p.type, p.uuid, p.bootable) for p in table.partitions] == [
        (p.number, p.start, p.length, p.type, p.uuid, p.bootable) for p in THREE
    ]
    assert table.partitions[0].type_name == "EFI system"


def test_sfdisk_gpt_is_read(tmp_path: Path) -> None:
    script = "label: gpt\nlabel-id: 12345678-9ABC-DEF0-1234-56789ABCDEF0\nstart=2048, size=4096, type=uefi, name=esp\nsize=8192, type=linux, name=root, attrs=LegacyBIOSBootable\n"
    table = read_table(sfdisk(tmp_path / "disk", script))
    assert table is not None and table.disk_id == str(DISK).upper() and not table.warnings
    assert [(p.number, p.name, p.start, p.length, p.type, p.bootable) for p in table.partitions] == [
        (1, "esp", MIB, 2 * MIB, ESP, False),
        (2, "root", 3 * MIB, 4 * MIB, LINUX, True),
    ]


def test_sfdisk_mbr_with_logical_partitions_is_read(tmp_path: Path) -> None:
    script = "label: dos\nlabel-id: 0x11223344\nstart=2048, size=2048, type=83, bootable\nstart=4096, type=5\nstart=6144, size=2048, type=82\nstart=10240, size=4096, type=83\nstart=16384, size=2048, type=8e\n"
    disk = sfdisk(tmp_path / "disk", script)
    table = read_table(disk)
    theirs = json.loads(run("sfdisk", "--json", tmp_path / "disk").stdout)["partitiontable"]["partitions"]
    assert table is not None and (table.scheme, table.disk_id) == ("mbr", "11223344")
    assert [
        (p.start // 512, p.length // 512, p.type.removeprefix("0x").lstrip("0"), p.bootable) for p in table.partitions
    ] == [(p["start"], p["size"], p["type"], p.get("bootable", False)) for p in theirs]
    assert [p.number for p in table.partitions] == [1, 2, 5, 6, 7]
    assert table.partitions[3].uuid == "11223344-06"
    assert table.partitions[2].type_name == "Linux swap"


def test_built_mbr_satisfies_sfdisk(tmp_path: Path) -> None:
    parts = [
        Partition(1, "0x83", "", MIB, 2 * MIB, "", bootable=True),
        Partition(4, "0xef", "", 4 * MIB, 2 * MIB, ""),
    ]
    code = bytes(range(256)) + bytes(184)
    path = write(tmp_path / "disk", 16 * MIB, build_mbr(parts, disk_id=0x11223344, mbr_code=code))
    table = json.loads(run("sfdisk", "--json", path).stdout)["partitiontable"]
    assert (table["label"], table["id"]) == ("dos", "0x11223344")
    assert [(p["node"][-1], p["start"], p["size"], p["type"]) for p in table["partitions"]] == [
        ("1", 2048, 4096, "83"),
        ("4", 8192, 4096, "ef"),
    ]
    assert path.read_bytes()[:440] == code
    assert [p.number for p in read_partitions(SourceDisk(FileSource(path)))] == [1, 4]


def test_hybrid_mbr(tmp_path: Path) -> None:
    head, tail = build_gpt(
        16 * MIB, THREE, disk_guid=DISK, mbr_code=b"\xfa" * 440, hybrid=[Hybrid(2, 0x83, active=True)]
    )
    mbr = MBR.parse(head[:512])
    assert head[:440] == b"\xfa" * 440
    assert [(e.type, e.start, e.count, e.status) for e in mbr.entries] == [
        (0x83, 3 * MIB // 512, MIB // 512, 0x80),
        (0xEE, 1, 3 * MIB // 512 - 1, 0),
        (0, 0, 0, 0),
        (0, 0, 0, 0),
    ]
    path = write(tmp_path / "disk", 16 * MIB, head, tail)
    assert "No problems found" in run("sgdisk", "--verify", path).stdout
    assert len(read_partitions(SourceDisk(FileSource(path)))) == 3


def test_protective_entry_of_a_large_disk() -> None:
    size = 3 << 40
    head, tail = build_gpt(size, [], disk_guid=DISK)
    assert MBR.parse(head[:512]).entries[0].count == 0xFFFFFFFF
    disk = Regions()
    disk.add_bytes(head)
    disk.pad_to(size - len(tail))
    disk.add_bytes(tail)
    assert read_partitions(disk) == []


def test_dtype_agrees_with_construct() -> None:
    assert GPT_ENTRY.sizeof() == GPT_ENTRY_DTYPE.itemsize == 128
    assert (GPT_HEADER.sizeof(), MBR.sizeof(), MBR_ENTRY.sizeof()) == (92, 512, 16)
    values = {
        "type": bytes(range(16)),
        "guid": bytes(range(16, 32)),
        "first": 1 << 40,
        "last": 7,
        "attributes": 1 << 63,
        "name": b"n\0" * 36,
    }
    row = np.frombuffer(GPT_ENTRY.build(values), GPT_ENTRY_DTYPE)[0]
    assert {name: row[name].tobytes() if row.dtype[name].kind == "V" else int(row[name]) for name in values} == values


# --- damage


def gpt_disk(change=lambda image: None) -> Memory:
    head, tail = build_gpt(16 * MIB, THREE, disk_guid=DISK)
    image = bytearray(head + bytes(16 * MIB - len(head) - len(tail)) + tail)
    change(image)
    return Memory(bytes(image))


@pytest.mark.parametrize("at", [512, 512 + 24, 512 + 80, 1024 + 5])
def test_damaged_primary_is_replaced_by_the_backup(at: int) -> None:
    def change(image: bytearray) -> None:
        image[at] ^= 0xFF

    table = read_table(gpt_disk(change))
    assert table is not None and len(table.partitions) == 3
    assert "primary GPT is damaged" in table.warnings[0]


def test_both_damaged_is_an_error() -> None:
    def change(image: bytearray) -> None:
        image[512 + 40] ^= 1
        image[-512 + 40] ^= 1

    with pytest.raises(FormatError) as caught:
        read_table(gpt_disk(change))
    error = caught.value
    assert (error.structure, error.field, error.offset) == ("GPT header", "header_crc", 512 + 16)
    assert error.expected != error.found


def sealed(image: bytearray, at: int, form: str, *values: int) -> None:
    """Write header fields at `at` of both headers, and the checksums that make them look whole."""
    for base in (512, len(image) - 512):
        struct.pack_into(form, image, base + at, *values)
        image[base + 16 : base + 20] = bytes(4)
        struct.pack_into("<I", image, base + 16, binascii.crc32(image[base : base + 92]))


@pytest.mark.parametrize(
    ("at", "form", "values"),
    [(80, "<II", (0xFFFFFFFF, 128)), (80, "<II", (128, 1 << 31)), (80, "<II", (128, 100)), (72, "<Q", (1 << 50,))],
)
def test_hostile_entry_tables_are_refused(at: int, form: str, values: tuple[int, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        read_table(gpt_disk(lambda image: sealed(image, at, form, *values)))
    assert (caught.value.structure, caught.value.field, caught.value.offset) == ("GPT header", "entry_count", 512 + 80)


def test_damaged_entries_say_where() -> None:
    def change(image: bytearray) -> None:
        image[1024 + 7] ^= 1
        image[-512 - 16384 + 7] ^= 1

    with pytest.raises(FormatError) as caught:
        read_table(gpt_disk(change))
    assert (caught.value.structure, caught.value.field, caught.value.offset) == ("GPT entries", "entries_crc", 1024)


def test_grown_and_cut_disks_are_told() -> None:
    head, tail = build_gpt(16 * MIB, THREE, disk_guid=DISK)
    grown = read_table(Memory(head + bytes(16 * MIB - len(head) - len(tail)) + tail + bytes(MIB)))
    assert grown is not None and "larger or smaller" in grown.warnings[0]
    cut = read_table(Memory(head + bytes(8 * MIB - len(head))))
    assert cut is not None and any("beyond the disk's end" in warning for warning in cut.warnings)


def mbr_disk(entries: list[dict[str, int]], records: dict[int, list[dict[str, int]]]) -> Memory:
    image = bytearray(4 * MIB)
    for sector, rows in {0: entries, **records}.items():
        image[sector * 512 : sector * 512 + 512] = MBR.build({"entries": (rows + [{}] * 4)[:4]})
    return Memory(bytes(image))


def test_logical_partitions_that_loop_or_leave_are_refused() -> None:
    extended = {"type": 5, "start": 100, "count": 1000}
    own = {"type": 0x83, "start": 10, "count": 20}
    for link, offset in (({"type": 5, "start": 0x64, "count": 9}, 200), ({"type": 5, "start": 4000, "count": 9}, 4100)):
        records = {100: [own, link], 200: [own, {"type": 5, "start": 100, "count": 9}]}
        with pytest.raises(FormatError) as caught:
            read_table(mbr_disk([extended], records))
        assert caught.value.structure == "extended boot record"
        assert caught.value.offset == offset * 512


def test_boot_sectors_of_file_systems_are_no_mbr(tmp_path: Path) -> None:
    for kind in ("12", "16", "32"):
        path = write(tmp_path / kind, 64 * MIB, b"")
        run("mkfs.fat", "-F", kind, path) if kind != "12" else run("mkfs.fat", "-F", "12", "-s", "64", path)
        assert read_table(SourceDisk(FileSource(path))) is None
    path = write(tmp_path / "ntfs", 16 * MIB, b"")
    run("mkntfs", "-q", "-F", "-f", "-s", "512", "-p", "0", "-H", "255", "-S", "63", path)
    assert read_table(SourceDisk(FileSource(path))) is None


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1000, 4096])
def test_tiny_disks_have_none(size: int) -> None:
    assert read_table(Memory(bytes(size))) is None


def test_stale_gpt_beside_a_real_mbr() -> None:
    def change(image: bytearray) -> None:
        image[:512] = MBR.build({"entries": [{"type": 0x83, "start": 2048, "count": 100}, {}, {}, {}]})

    table = read_table(gpt_disk(change))
    assert table is not None and table.scheme == "mbr" and "does not protect" in table.warnings[0]


# --- what cannot be built


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ([partition(1, 512, MIB)], "fit"),
        ([partition(1, 15 * MIB, MIB)], "fit"),
        ([partition(1, MIB + 1, MIB)], "sector"),
        ([partition(1, MIB, 0)], "sector"),
        ([partition(1, MIB, 2 * MIB), partition(2, 2 * MIB, MIB)], "overlap"),
        ([partition(0, MIB, MIB)], "number"),
        ([partition(129, MIB, MIB)], "number"),
        ([partition(1, MIB, MIB, "y" * 37)], "name"),
    ],
)
def test_tables_that_cannot_be_are_refused(parts: list[Partition], word: str) -> None:
    with pytest.raises(TargetError, match=word):
        build_gpt(16 * MIB, parts, disk_guid=DISK)


def test_too_much_boot_code_is_refused() -> None:
    with pytest.raises(TargetError, match="boot code"):
        build_gpt(16 * MIB, [], disk_guid=DISK, mbr_code=bytes(447))


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.text(max_size=36).filter(lambda t: "\0" not in t)),
        max_size=20,
    ),
    st.sampled_from([512, 4096]),
)
def test_any_table_is_read_back(pieces: list[tuple[int, int, str]], sector: int) -> None:
    parts, at = [], MIB
    for number, (gap, length, name) in enumerate(pieces, 1):
        name = name.encode("utf-16-le", "replace")[:72].decode("utf-16-le", "ignore")
        at += gap * sector
        parts.append(partition(number, at, length * sector, name, attributes=number << 48))
        at += length * sector
    size = at + MIB
    head, tail = build_gpt(size, parts, disk_guid=DISK, sector_size=sector)
    disk = Regions()
    disk.add_bytes(head)
    disk.pad_to(size - len(tail))
    disk.add_bytes(tail)
    assert read_partitions(disk) == parts
