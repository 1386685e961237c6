"""The table of images that are mutated, cut and checked: fixtures, and images made by hand for every other shape.

Each is the same everywhere: made of seeded bytes by the makers of the contract suite, or kept in fixtures/.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import tempfile
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import vhdxmade
import vmdkmade
from contract.cases import asif, bochs, cloop, dmg, ewf, parallels, qcow, qcow2, vdi, vhd, vhdx, vmdk
from vhdxmade import FULL, Made
from vmdkmade import ZEROED, Hosted

from diskmorph.formats.crc32c import crc32c
from diskmorph.formats.extents import DATA, PLAIN
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import open_disk

from testkit import KIB, MIB, data

FIXTURES = Path(__file__).parents[2] / "fixtures"
WIDE = 1 << 16
Mender = Callable[[bytearray], None]


class Subject(NamedTuple):
    """Files that make one image: `main` is opened, `victim` mutated in its `ranges`, which are metadata.

    `open` are further words of open_disk (a snapshot, a parent that the image cannot name); `content` is the SHA-256.
    """

    name: str
    format: str
    files: Mapping[str, bytes]
    main: str
    victim: str
    ranges: tuple[tuple[int, int], ...]
    mend: Mender
    open: Mapping[str, Any]
    content: str

    @property
    def blob(self) -> bytes:
        return self.files[self.victim]

    def write(self, folder: Path, victim: bytes | None = None) -> Path:
        """Write all files, the victim as given; return the path that is opened."""
        for name, blob in self.files.items():
            Path(folder, name).write_bytes(blob if victim is None or name != self.victim else victim)
        return folder / self.main


def words(folder: Path, it: Mapping[str, Any]) -> dict[str, Any]:
    """The words of open_disk for an image in `folder`."""
    more = dict(it)
    backing = more.pop("backing", None)
    parents = Parents(allow=(folder,), backing=None if backing is None else folder / backing)
    return {"parents": parents, **more}


def _nothing(_: bytearray) -> None:
    pass


def _mend_vhd(blob: bytearray) -> None:
    """Make the sums of footers and dynamic header right again."""
    for at, size, field in ((len(blob) - 512, 512, 64), (0, 512, 64), (512, 1024, 36)):
        if not 0 <= at <= len(blob) - size or blob[at : at + 8] not in (b"conectix", b"cxsparse"):
            continue
        blob[at + field : at + field + 4] = bytes(4)
        struct.pack_into(">I", blob, at + field, ~sum(blob[at : at + size]) & 0xFFFFFFFF)


def _mend_vhdx(blob: bytearray) -> None:
    """Make the CRCs of headers, region tables and log entries right again."""
    places = [(0x10000, 4096), (0x20000, 4096), (0x30000, 0x10000), (0x40000, 0x10000)]
    if blob[vhdxmade.LOG_AT : vhdxmade.LOG_AT + 4] == b"loge":
        length = struct.unpack_from("<I", blob, vhdxmade.LOG_AT + 8)[0]
        places.append((vhdxmade.LOG_AT, min(length, MIB)))
    for at, size in places:
        if blob[at : at + 4] in (b"head", b"regi", b"loge") and len(blob) >= at + size >= at + 8:
            blob[at + 4 : at + 8] = bytes(4)
            struct.pack_into("<I", blob, at + 4, crc32c(bytes(blob[at : at + size])))


def _mend_ewf(blob: bytearray) -> None:
    """Make the sums of section descriptors, table headers, tables and volumes right again."""

    def seal(start: int, length: int) -> None:
        if start + length + 4 <= len(blob):
            struct.pack_into("<I", blob, start + length, zlib.adler32(blob[start : start + length]))

    at = 13
    while at + 76 <= len(blob):
        seal(at, 72)
        kind, following = struct.unpack_from("<16sQ", blob, at)
        if kind.startswith(b"table"):
            seal(at + 76, 20)
            count = struct.unpack_from("<I", blob, at + 76)[0]
            if following == at + 76 + 24 + 4 * count + 4:
                seal(at + 100, 4 * count)
        elif kind.startswith((b"volume", b"data")) and following - at - 76 in (94, 1052):
            seal(at + 76, following - at - 80)
        if following <= at:
            return
        at = following


MENDERS: dict[str, Mender] = {"vhd": _mend_vhd, "vhdx": _mend_vhdx, "ewf": _mend_ewf}


def subject(name: str, format: str, folder: Path, main: str, victim: str | None = None, **more: Any) -> Subject:
    """The subject of an image in a folder, whose other files belong to it."""
    victim = victim or main
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    used: list[tuple[int, int]] = []
    with open_disk(folder / main, format=format, **words(folder, more)) as disk:
        sha = hashlib.sha256(disk.read(0, disk.size)).hexdigest()
        mine = [index for index, source in enumerate(disk.files) if source.path == folder / victim]
        for batch in disk.extents():
            for row in batch[batch["kind"] == DATA]:
                if int(row["file"]) in mine:
                    start = int(row["offset"])
                    length = int(row["length"] if row["codec"] == PLAIN else row["stored"])
                    used.append((start, start + length))
    blob = files[victim]
    ranges = _between(sorted(used), blob) or [(0, len(blob))]
    mend = MENDERS.get(format, _nothing)
    return Subject(name, format, files, main, victim, tuple(ranges), mend, more, sha)


def _between(used: list[tuple[int, int]], blob: bytes) -> list[tuple[int, int]]:
    ranges, at = [], 0
    for start, stop in [*used, (len(blob), len(blob))]:
        if start > at:
            ranges.append((at, min(start, len(blob))))
        at = max(at, stop)
    return [(a, b) for a, b in ranges if any(blob[a:b])]


# --- makers: each writes into a folder and returns (main, victim, further words)

Maker = Callable[[Path], tuple[str, str, dict[str, Any]]]


def _case(make: Callable[[Path], tuple[Path, bytes]], victim: str | None = None, **more: Any) -> Maker:
    def made(folder: Path) -> tuple[str, str, dict[str, Any]]:
        main = make(folder)[0].name
        return main, victim or main, more

    return made


def _fixture(*names: str, victim: str | None = None) -> Maker:
    def made(folder: Path) -> tuple[str, str, dict[str, Any]]:
        for name in names:
            (folder / Path(name).name).write_bytes((FIXTURES / name).read_bytes())
        main = Path(names[0]).name
        return main, victim or main, {}

    return made


def _qcow2_overlay(folder: Path) -> tuple[str, str, dict[str, Any]]:
    base = {32 * WIDE: data("base", WIDE), 33 * WIDE: data("base 2", WIDE)}
    entries = {0: 32 * WIDE | qcow2.COPIED, 3: 33 * WIDE | qcow2.COPIED}
    qcow2.handmade(folder / "base.qcow2", 5 * WIDE, entries, base)
    over = {1: 32 * WIDE | qcow2.COPIED, 2: 1, 3: 1}
    extension = [(0xE2792ACA, b"qcow2")]
    qcow2.handmade(
        folder / "top.qcow2",
        6 * WIDE,
        over,
        {32 * WIDE: data("top", WIDE)},
        backing=b"base.qcow2",
        extensions=extension,
    )
    return "top.qcow2", "top.qcow2", {}


def _qcow2_snapshot(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """Clusters of 4 KiB; a snapshot of an earlier, smaller disk with its own L1 and L2 table."""
    c = 4096
    table = struct.pack(">QIHHIIQII", 21 * c, 1, 1, 6, 1_600_000_000, 0, 0, 0, 24)
    table += struct.pack(">QQQ", 0, 2 * c, 0) + b"1" + b"before"
    pieces = {20 * c: table, 21 * c: struct.pack(">Q", 22 * c | qcow2.COPIED)}
    pieces[22 * c] = struct.pack(">QQ", 34 * c | qcow2.COPIED, 33 * c)
    pieces |= {n * c: data(n, c) for n in (32, 33, 34)}
    path = qcow2.handmade(folder / "snap.qcow2", 3 * c, {0: 32 * c | qcow2.COPIED, 1: 33 * c}, pieces, bits=12)
    blob = bytearray(path.read_bytes())
    struct.pack_into(">IQ", blob, 60, 1, 20 * c)
    path.write_bytes(blob)
    return path.name, path.name, {"snapshot": "before"}


def _qcow2_bitmap(folder: Path) -> tuple[str, str, dict[str, Any]]:
    c = 4096
    directory = struct.pack(">QIIBBHI", 21 * c, 1, 2, 1, 16, 6, 0) + b"monday"
    extension = struct.pack(">IIQQ", 1, 0, 32, 20 * c)
    pieces = {20 * c: directory.ljust(32, b"\0"), 21 * c: struct.pack(">Q", 22 * c), 22 * c: b"\xff" * 64}
    pieces |= {32 * c: data("bitmap", c)}
    words = {"bits": 12, "features": (0, 0, 1), "extensions": [(0x23852875, extension), (0x6803F857, _features())]}
    qcow2.handmade(folder / "bitmap.qcow2", 5 * c, {2: 32 * c | qcow2.COPIED}, pieces, **words)
    return "bitmap.qcow2", "bitmap.qcow2", {}


def _features() -> bytes:
    return b"".join(struct.pack(">BB46s", 0, bit, name) for bit, name in ((0, b"dirty bit"), (4, b"extended L2")))


def _qcow2_data_file(folder: Path) -> tuple[str, str, dict[str, Any]]:
    (folder / "data.raw").write_bytes(data("data file", 4 * WIDE))
    entries = {0: qcow2.COPIED, 1: WIDE | qcow2.COPIED, 3: 3 * WIDE | qcow2.COPIED}
    extension = [(0x44415441, b"data.raw")]
    qcow2.handmade(folder / "main.qcow2", 4 * WIDE, entries, {}, features=(4, 0, 0), extensions=extension)
    return "main.qcow2", "main.qcow2", {}


def _vmdk_delta(kind: str) -> Maker:
    def made(folder: Path) -> tuple[str, str, dict[str, Any]]:
        grains = {n: data(("base", n), 64 * KIB) for n in range(4)}
        base = Hosted(512, grains, text=vmdkmade.words(['RW 512 SPARSE "base.vmdk"']))
        (folder / "base.vmdk").write_bytes(base.build())
        family = {"parent": "12345678", "hint": "base.vmdk", "cid": "0000000a"}
        if kind == "hosted":
            text = vmdkmade.words(['RW 512 SPARSE "top.vmdk"'], **family)
            top = {1: data("top", 64 * KIB), 2: ZEROED}
            (folder / "top.vmdk").write_bytes(Hosted(512, top, text=text, version=2, flags=7).build())
            return "top.vmdk", "top.vmdk", {}
        if kind == "cowd":
            blob, word = vmdkmade.cowd(512, {3: data("c", 512), 7: data("d", 512)}, order=[1, 0]), "VMFSSPARSE"
        else:
            grains = {0: data("w", 4096), 1: ZEROED, 2: "unmapped", 5: data("x", 4096)}
            blob, word = vmdkmade.sesparse(512, grains, order=[1, 0]), "SESPARSE"
        (folder / "extent.vmdk").write_bytes(blob)
        vmdkmade.descriptor(folder / "top.vmdk", [f'RW 512 {word} "extent.vmdk"'], "vmfsSparse", **family)
        return "top.vmdk", "extent.vmdk", {}

    return made


def _vmdk_split(victim: str) -> Maker:
    def made(folder: Path) -> tuple[str, str, dict[str, Any]]:
        for part in (1, 2):
            grains = {n: data((part, n), 64 * KIB) for n in (0, 2)}
            (folder / f"disk-s00{part}.vmdk").write_bytes(Hosted(512, grains, text=None).build())
        (folder / "flat.bin").write_bytes(data("flat", 64 * KIB))
        lines = [
            'RW 512 SPARSE "disk-s001.vmdk"',
            'RW 16 FLAT "flat.bin" 32',
            "RW 100 ZERO",
            'RW 512 SPARSE "disk-s002.vmdk"',
        ]
        vmdkmade.descriptor(folder / "disk.vmdk", lines, "custom", more=('ddb.uuid = "60 00 C2 9a"',))
        return "disk.vmdk", victim, {}

    return made


def _vdi_child(folder: Path) -> tuple[str, str, dict[str, Any]]:
    size = 64 * KIB
    vdi.vdi(
        folder / "base.vdi",
        4 * size,
        [data(i, size) for i in range(4)],
        [3, 1, 0, 2],
        block=size,
        create="P",
        modify="M",
    )
    said = {"create": "C", "modify": "N", "linkage": "P", "parent_modify": "M"}
    vdi.vdi(folder / "top.vdi", 4 * size, [vdi.FREE, vdi.ZERO, data("t", size), vdi.FREE], block=size, kind=4, **said)
    return "top.vdi", "top.vdi", {"backing": "base.vdi"}


def _vhd_child(folder: Path) -> tuple[str, str, dict[str, Any]]:
    size = 64 * KIB
    blocks = {i: (None, data(("base", i), size)) for i in (0, 1)}
    vhd.dynamic(folder / "base.vhd", 3 * size, blocks, block=size, name="parent")
    locators = [(b"W2ru", ".\\base.vhd".encode("utf-16-le")), (b"MacX", b"file:///base.vhd")]
    top = {1: ((0, 2, 63), data("over", size)), 2: (None, data("all", size))}
    family = {"name": "child", "parent": "parent", "parent_name": "base.vhd"}
    vhd.dynamic(folder / "top.vhd", 3 * size, top, block=size, kind=4, locators=locators, **family)
    return "top.vhd", "top.vhd", {}


def _vhdx_entries(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """Two log entries, the second with a zero descriptor."""
    made = Made(3 * MIB, {n: (FULL, data(("log", n), MIB), None) for n in range(3)}, order=[2, 0, 1])
    made.header = {"log": vhdxmade.LOG}
    image = made.build()
    bat = bytes(image[vhdxmade.BAT_AT : vhdxmade.BAT_AT + 4096])
    image[vhdxmade.BAT_AT : vhdxmade.BAT_AT + 4096] = bytes(4096)
    first = vhdxmade.log_entry(9, [(vhdxmade.BAT_AT, bat), (vhdxmade.BAT_AT + 4096, b"\xff" * 4096)], size=len(image))
    second = vhdxmade.log_entry(10, [(vhdxmade.BAT_AT + 4096, 4096)], size=len(image))
    vhdxmade.put_log(image, 0, first)
    vhdxmade.put_log(image, len(first), second)
    (folder / "log.vhdx").write_bytes(image)
    return "log.vhdx", "log.vhdx", {}


def _vhdx_items(folder: Path) -> tuple[str, str, dict[str, Any]]:
    items = [(uuid.UUID(int=5), 0, b"optional")]
    regions = [(str(uuid.UUID(int=6)), 4 * MIB, MIB, 0)]
    made = Made(2 * MIB, {1: (FULL, data("items", MIB), None)}, items=items, regions=regions, leave=True)
    image = made.build()
    image[4 * MIB : 4 * MIB] = bytes(MIB)  # the optional region, before the block
    struct.pack_into("<Q", image, made.entry_at(1), 5 * MIB | FULL)
    (folder / "items.vhdx").write_bytes(image)
    return "items.vhdx", "items.vhdx", {}


TABLE: dict[str, dict[str, Maker]] = {
    "qcow2": {
        **{name: _fixture(f"qcow2/{name}.qcow2") for name in ("deflate", "extended", "small", "v2", "v3", "zstd")},
        "overlay": _qcow2_overlay,
        "snapshot": _qcow2_snapshot,
        "bitmap": _qcow2_bitmap,
        "data file": _qcow2_data_file,
        "subclusters": _case(qcow2.subclusters),
        "crossing": _case(qcow2.crossing),
    },
    "vmdk": {
        "sparse": _fixture("vmdk/sparse.vmdk"),
        "stream": _fixture("vmdk/stream.vmdk"),
        "flat": _fixture("vmdk/flat.vmdk", "vmdk/flat-flat.vmdk"),
        "split": _vmdk_split("disk.vmdk"),
        "split extent": _vmdk_split("disk-s002.vmdk"),
        "small tables": _case(vmdk.small_tables),
        "permuted": _case(vmdk.permuted),
        "stream header": _case(vmdk.stream("header", version=1)),
        "delta": _vmdk_delta("hosted"),
        "cowd": _vmdk_delta("cowd"),
        "sesparse": _vmdk_delta("sesparse"),
    },
    "vdi": {
        "dynamic": _fixture("vdi/dynamic.vdi"),
        "static": _fixture("vdi/static.vdi"),
        "tiny blocks": _case({case.name: case.make for case in vdi.DISKS}["vdi-tiny-blocks"]),
        "extra": _case({case.name: case.make for case in vdi.DISKS}["vdi-extra"]),
        "version 0": _case({case.name: case.make for case in vdi.DISKS}["vdi-version-0"]),
        "differencing": _vdi_child,
    },
    "vhd": {
        "dynamic": _fixture("vhd/dynamic.vhd"),
        "fixed": _fixture("vhd/fixed.vhd"),
        **{
            case.name.removeprefix("vhd-"): _case(case.make)
            for case in vhd.DISKS
            if case.name in {"vhd-tiny-blocks", "vhd-permuted", "vhd-fixed-511"}
        },
        "differencing": _vhd_child,
    },
    "vhdx": {
        "dynamic": _fixture("vhdx/dynamic.vhdx"),
        "states": _case(vhdx.states),
        "log": _vhdx_entries,
        "items": _vhdx_items,
        "differencing": _case(vhdx.differencing(512, MIB)),
    },
    "parallels": {
        "disk": _fixture("parallels/disk.hds"),
        **{case.name.removeprefix("parallels-"): _case(case.make) for case in parallels.DISKS},
    },
    "qcow": {"disk": _fixture("qcow/disk.qcow"), "permuted": _case(qcow.permuted)},
    "asif": {case.name.removeprefix("asif-"): _case(case.make) for case in asif.DISKS},
    "bochs": {case.name.removeprefix("bochs-"): _case(case.make) for case in bochs.DISKS if case.name != "bximage"},
    "cloop": {
        "disk": _fixture("cloop/disk.cloop"),
        "v2": _case(cloop.v2),
        "v4 first": _case(cloop.v4(16 * KIB, last=False)),
        "v4 last": _case(cloop.v4(16 * KIB, last=True)),
    },
    "ewf": {
        "tables": _case(ewf.handmade()),
        "segments": _case(ewf.handmade(per_file=7, per_chunk=3), victim="d.E02"),
        "old": _case(ewf.handmade(old=True, per_file=11)),
    },
    "dmg": {
        "mixed": _case(dmg.mixed),
        "fork": _case(dmg.forked),
        "raw": _case(dmg.of_kind(dmg.RAW)),
        "lzfse": _case(dmg.of_kind(dmg.LZFSE)),
    },
}
"""Format -> name -> how the image is made."""
CUT: dict[str, dict[str, Maker]] = {
    "vmdk": {"flat extent": _fixture("vmdk/flat.vmdk", "vmdk/flat-flat.vmdk", victim="flat-flat.vmdk")},
}
"""Files without metadata: of use only where files are cut."""


def make(format: str, name: str) -> Subject:
    """Make one subject of the table."""
    with tempfile.TemporaryDirectory() as where:
        maker = TABLE[format].get(name) or CUT[format][name]
        main, victim, more = maker(Path(where))
        return subject(name, format, Path(where), main, victim, **more)


def subjects(format: str) -> list[Subject]:
    """Every subject of a format."""
    return [make(format, name) for name in TABLE[format]]
