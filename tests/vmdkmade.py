"""Hand-made VMDK files for what no tool here writes, laid out with struct alone, apart from the package's schema."""

import struct
import zlib
from dataclasses import dataclass, field

SECTOR = 512
ZEROED = "zeroed"
AT_END = 0xFFFFFFFFFFFFFFFF


def words(extents, create_type="monolithicSparse", *, cid="12345678", parent="ffffffff", hint=None, more=()):
    """The text of a descriptor."""
    lines = ["# Disk DescriptorFile", "version=1", 'encoding="UTF-8"', f"CID={cid}", f"parentCID={parent}"]
    lines.append(f'createType="{create_type}"')
    if hint is not None:
        lines.append(f'parentFileNameHint="{hint}"')
    lines += ["", "# Extent description", *extents, "", "# The Disk Data Base", "#DDB", "", *more]
    lines += ['ddb.adapterType = "lsilogic"', 'ddb.virtualHWVersion = "4"', ""]
    return "\n".join(lines)


def descriptor(path, extents, create_type="twoGbMaxExtentFlat", **more):
    path.write_text(words(extents, create_type, **more), encoding="utf-8")
    return path


def sectors(raw, grain=1):
    return raw + bytes(-len(raw) % (grain * SECTOR))


@dataclass
class Hosted:
    """A hosted sparse extent. `grains` maps grain numbers to bytes or ZEROED; `order` gives the places of the stored."""

    capacity: int
    grains: dict = field(default_factory=dict)
    grain: int = 128
    entries: int = 512
    order: tuple = ()
    version: int = 1
    flags: int = 3
    text: str | None = None
    unclean: int = 0
    sparse_tables: bool = False
    """Leave out tables without entries, and put the others in reverse order."""

    def build(self):
        tables = -(-self.capacity // (self.grain * self.entries))
        described = sectors(self.text.encode()) if self.text is not None else b""
        directory = -(-tables * 4 // SECTOR)
        width = -(-self.entries * 4 // SECTOR)
        rgd = 1 + len(described) // SECTOR
        gd = rgd + directory + tables * width
        overhead = -(-(gd + directory + tables * width) // self.grain) * self.grain
        stored = [n for n, g in self.grains.items() if g != ZEROED]
        places = dict(zip(stored, self.order or range(len(stored)), strict=True))
        image = bytearray(overhead * SECTOR + len(stored) * self.grain * SECTOR)
        image[:SECTOR] = self.header(1 if described else 0, len(described) // SECTOR, rgd, gd, overhead)
        image[SECTOR : SECTOR + len(described)] = described
        for base in (rgd, gd):
            used = sorted({n // self.entries for n in self.grains}) if self.sparse_tables else range(tables)
            for index, table in enumerate(reversed(used) if self.sparse_tables else used):
                at = base + directory + index * width
                struct.pack_into("<I", image, base * SECTOR + 4 * table, at)
                for n, g in self.grains.items():
                    if n // self.entries == table:
                        entry = 1 if g == ZEROED else overhead + places[n] * self.grain
                        struct.pack_into("<I", image, at * SECTOR + 4 * (n % self.entries), entry)
        for n in stored:
            at = (overhead + places[n] * self.grain) * SECTOR
            image[at : at + self.grain * SECTOR] = self.grains[n].ljust(self.grain * SECTOR, b"\0")
        return bytes(image)

    def header(self, described_at, described, rgd, gd, overhead, compression=0):
        head = struct.pack("<4sII", b"KDMV", self.version, self.flags)
        head += struct.pack("<QQQQ", self.capacity, self.grain, described_at, described)
        head += struct.pack("<IQQQB", self.entries, rgd, gd, overhead, self.unclean)
        return (head + b"\n \r\n" + struct.pack("<H", compression)).ljust(SECTOR, b"\0")

    def content(self):
        size = self.capacity * SECTOR
        image = bytearray(size)
        for n, g in self.grains.items():
            if g != ZEROED:
                at = n * self.grain * SECTOR
                piece = g.ljust(self.grain * SECTOR, b"\0")[: size - at]
                image[at : at + len(piece)] = piece
        return bytes(image)


def marker(value, kind):
    return struct.pack("<QII", value, 0, kind).ljust(SECTOR, b"\0")


@dataclass
class Stream(Hosted):
    """A streamOptimized file. `form`: "footer" as VMware's exports, "header" as vmdk-convert (no footer)."""

    version: int = 3
    flags: int = 0x30001
    form: str = "footer"
    level: int = 6

    def build(self):
        described = sectors(self.text.encode()) if self.text is not None else b""
        overhead = 128
        image = bytearray(overhead * SECTOR)
        image[SECTOR : SECTOR + len(described)] = described
        tables = -(-self.capacity // (self.grain * self.entries))
        directory = [0] * tables
        for table in range(tables):
            entries = [0] * self.entries
            inside = [n for n in self.grains if n // self.entries == table]
            for n in sorted(inside, key=(lambda n: self.order.index(n)) if self.order else None):
                entries[n % self.entries] = len(image) // SECTOR
                image += self.packed(n)
            if inside:
                image += marker(-(-self.entries * 4 // SECTOR), 1)
                directory[table] = len(image) // SECTOR
                image += sectors(struct.pack(f"<{self.entries}I", *entries))
        listed = sectors(struct.pack(f"<{tables}I", *directory))
        image += marker(len(listed) // SECTOR, 2)
        gd = len(image) // SECTOR
        image += listed
        length = len(described) // SECTOR
        if self.form == "footer":
            image += marker(1, 3) + self.header(1, length, 0, gd, overhead, 1)
        image += marker(0, 0)
        image[:SECTOR] = self.header(1, length, 0, AT_END if self.form == "footer" else gd, overhead, 1)
        return bytes(image)

    def packed(self, number):
        packed = zlib.compress(self.grains[number].ljust(self.grain * SECTOR, b"\0"), self.level)
        return sectors(struct.pack("<QI", number * self.grain, len(packed)) + packed)


def cowd(capacity, grains, *, grain=1, order=(), unclean=0):
    """A vmfsSparse extent of `capacity` sectors; `grains` maps grain numbers to bytes."""
    tables = -(-capacity // (grain * 4096))
    directory = -(-tables * 4 // SECTOR)
    used = sorted({n // 4096 for n in grains})
    at = 4 + directory
    base = at + 32 * len(used)
    places = dict(zip(grains, order or range(len(grains)), strict=True))
    image = bytearray((base + grain * len(grains)) * SECTOR)
    struct.pack_into("<4sIIIIIII", image, 0, b"COWD", 1, 3, capacity, grain, 4, tables, len(image) // SECTOR)
    struct.pack_into("<I", image, 2048 - 400, unclean)
    for index, table in enumerate(reversed(used)):
        struct.pack_into("<I", image, 4 * SECTOR + 4 * table, at + 32 * index)
        for n in grains:
            if n // 4096 == table:
                struct.pack_into("<I", image, (at + 32 * index) * SECTOR + 4 * (n % 4096), base + places[n] * grain)
    for n, g in grains.items():
        place = (base + places[n] * grain) * SECTOR
        image[place : place + len(g)] = g
    return bytes(image)


def sesparse(capacity, grains, *, order=(), journal=0, version=0x200000001):
    """An seSparse extent of grains of 4 KiB: bytes, ZEROED or "unmapped"."""
    tables = -(-capacity // (8 * 4096))
    gd_size = -(-tables * 8 // SECTOR)
    gd_at, tables_at = 16, 16 + gd_size
    used = sorted({n // 4096 for n in grains})
    grains_at = -(-(tables_at + 64 * len(used)) // 8) * 8
    stored = [n for n, g in grains.items() if isinstance(g, bytes)]
    places = dict(zip(stored, order or range(len(stored)), strict=True))
    most = max(places.values(), default=-1) + 1
    image = bytearray((grains_at + 8 * most) * SECTOR)
    fields = [0xCAFEBABE, version, capacity, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 2, 4, 8]
    fields += [gd_at, gd_size, tables_at, 64 * len(used), 0, 0, 0, 0, grains_at, 8 * most]
    struct.pack_into("<26Q", image, 0, *fields)
    struct.pack_into("<4Q", image, SECTOR, 0xCAFECAFE, 0, 0, journal)
    for index, table in enumerate(reversed(used)):
        struct.pack_into("<Q", image, gd_at * SECTOR + 8 * table, 0x10000000 << 32 | index)
        for n, g in grains.items():
            if n // 4096 == table:
                if isinstance(g, bytes):
                    entry = 3 << 60 | (places[n] & 0xFFF) << 48 | places[n] >> 12
                else:
                    entry = (2 if g == ZEROED else 1) << 60
                struct.pack_into("<Q", image, (tables_at + 64 * index) * SECTOR + 8 * (n % 4096), entry)
    for n in stored:
        at = (grains_at + 8 * places[n]) * SECTOR
        image[at : at + 4096] = grains[n].ljust(4096, b"\0")
    return bytes(image)
