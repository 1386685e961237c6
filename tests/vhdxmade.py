"""Hand-made VHDX files for what no tool here writes, laid out with struct alone, apart from the package's schema."""

import struct
import uuid
from dataclasses import dataclass, field

import google_crc32c

KIB, MIB = 1 << 10, 1 << 20
LOG_AT, METADATA_AT, BAT_AT = MIB, 2 * MIB, 3 * MIB
HEADERS, TABLES = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)
GUIDS = {
    "BAT": "2dc27766-f623-4200-9d64-115e9bfd4a08",
    "metadata": "8b7ca206-4790-4b9a-b8fe-575f050f886e",
    "parameters": "caa16737-fa36-4d43-b3b6-33f0aa44e76b",
    "size": "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
    "page83": "beca12ab-b2e6-4523-93ef-c309e000c746",
    "logical": "8141bf1d-a96f-4709-ba47-f233a8faab5f",
    "physical": "cda348c7-445d-4471-9cc9-e9885251c556",
    "parent": "a8d35f2d-b30b-454d-abf7-d3d84834ab0c",
    "vhdx locator": "b04aefb7-d19e-4a81-b789-25b8e9445913",
}
DATA_WRITE = uuid.UUID(int=0xDA7A)
LOG = uuid.UUID(int=0x106)
NONE = uuid.UUID(int=0)
NOT_PRESENT, UNDEFINED, ZEROED, UNMAPPED, OLD_UNMAPPED, FULL, PARTIAL = 0, 1, 2, 3, 5, 6, 7


def guid(word):
    return uuid.UUID(GUIDS.get(str(word), str(word))).bytes_le


def sealed(block):
    clear = bytes(block[:4]) + bytes(4) + bytes(block[8:])
    return clear[:4] + struct.pack("<I", google_crc32c.value(clear)) + clear[8:]


def header(sequence, *, log=NONE, log_version=0, version=1, log_length=MIB, log_at=LOG_AT, data=DATA_WRITE):
    head = struct.pack("<4sIQ", b"head", 0, sequence) + uuid.UUID(int=1).bytes_le + data.bytes_le + log.bytes_le
    return sealed((head + struct.pack("<HHIQ", log_version, version, log_length, log_at)).ljust(4096, b"\0"))


def region_table(entries, count=None):
    """`entries`: (GUID or name, offset, length, required)."""
    body = b"".join(guid(name) + struct.pack("<QII", at, length, required) for name, at, length, required in entries)
    count = len(entries) if count is None else count
    return sealed((struct.pack("<4sIII", b"regi", 0, count, 0) + body).ljust(65536, b"\0"))


def locator(texts, kind="vhdx locator"):
    at = 20 + 12 * len(texts)
    table, body = b"", b""
    for key, value in texts.items():
        one, two = key.encode("utf-16-le"), value.encode("utf-16-le")
        table += struct.pack("<IIHH", at + len(body), at + len(body) + len(one), len(one), len(two))
        body += one + two
    return guid(kind) + struct.pack("<HH", 0, len(texts)) + table + body


@dataclass
class Made:
    """A VHDX file in the making. `blocks`: number -> (state, content or None, bitmap bits or None)."""

    size: int
    blocks: dict = field(default_factory=dict)
    order: list | None = None
    """Blocks with content in the order in which they lie in the file; ascending if None."""
    block: int = MIB
    sector: int = 512
    parent: dict | None = None
    leave: bool = False
    regions: list = field(default_factory=list)
    items: list = field(default_factory=list)
    """Further metadata items: (GUID, flags, content)."""
    header: dict = field(default_factory=dict)
    locator_kind: str = "vhdx locator"

    @property
    def ratio(self):
        return (1 << 23) * self.sector // self.block

    def entry_at(self, block):
        return BAT_AT + 8 * (block + block // self.ratio)

    def bitmap_entry_at(self, chunk):
        return BAT_AT + 8 * (chunk * (self.ratio + 1) + self.ratio)

    def metadata(self):
        flags = (1 if self.leave else 0) | (2 if self.parent is not None else 0)
        items = [
            ("parameters", 4, struct.pack("<II", self.block, flags)),
            ("size", 6, struct.pack("<Q", self.size)),
            ("page83", 6, uuid.UUID(int=83).bytes_le),
            ("logical", 6, struct.pack("<I", self.sector)),
            ("physical", 6, struct.pack("<I", 4096)),
        ]
        if self.parent is not None:
            items.append(("parent", 4, locator(self.parent, self.locator_kind)))
        items += self.items
        table, body = struct.pack("<8sHH20x", b"metadata", 0, len(items)), b""
        for name, bits, content in items:
            table += guid(name) + struct.pack("<IIII", 65536 + len(body), len(content), bits, 0)
            body += content
        return table.ljust(65536, b"\0") + body

    def build(self):
        count = -(-self.size // self.block)
        entries = count + count // self.ratio + 1
        bat_length = -(-entries * 8 // MIB) * MIB
        out = bytearray(BAT_AT + bat_length)
        out[:8] = b"vhdxfile"
        out[8:24] = "hand".encode("utf-16-le").ljust(16, b"\0")
        for sequence, at in enumerate(HEADERS):
            out[at : at + 4096] = header(7 + sequence, **self.header)
        regions = [("BAT", BAT_AT, bat_length, 1), ("metadata", METADATA_AT, MIB, 1), *self.regions]
        for at in TABLES:
            out[at : at + 65536] = region_table(regions)
        metadata = self.metadata()
        out[METADATA_AT : METADATA_AT + len(metadata)] = metadata
        self._add_blocks(out)
        return out

    def _add_blocks(self, out):
        places = {}
        for number in self.order or [n for n in sorted(self.blocks) if self.blocks[n][1] is not None]:
            places[number] = len(out)
            out += self.blocks[number][1].ljust(self.block, b"\0")
        bitmaps = {}
        for number, (state, _, bits) in sorted(self.blocks.items()):
            struct.pack_into("<Q", out, self.entry_at(number), places.get(number, 0) | state)
            if bits is None:
                continue
            chunk = number // self.ratio
            if chunk not in bitmaps:
                bitmaps[chunk] = len(out)
                out += bytes(MIB)
                struct.pack_into("<Q", out, self.bitmap_entry_at(chunk), bitmaps[chunk] | 6)
            at = bitmaps[chunk] + number % self.ratio * (self.block // self.sector // 8)
            out[at : at + len(bits)] = bits


def log_entry(sequence, changes, *, tail=0, size=0, last=None, log=LOG):
    """A log entry. `changes`: (file offset, 4096 bytes) or (file offset, length of zeroes)."""
    data = [content for _, content in changes if not isinstance(content, int)]
    first = -(-(64 + 32 * len(changes)) // 4096) * 4096
    entry = bytearray(first)
    length = first + 4096 * len(data)
    last = size if last is None else last
    struct.pack_into(
        "<4sIIIQII16sQQ", entry, 0, b"loge", 0, length, tail, sequence, len(changes), 0, log.bytes_le, size, last
    )
    for number, (at, content) in enumerate(changes):
        if isinstance(content, int):
            struct.pack_into("<4sIQQQ", entry, 64 + 32 * number, b"zero", 0, content, at, sequence)
        else:
            struct.pack_into("<4s4s8sQQ", entry, 64 + 32 * number, b"desc", content[-4:], content[:8], at, sequence)
    for content in data:
        entry += struct.pack("<4sI4084sI", b"data", sequence >> 32, content[8:-4], sequence & 0xFFFFFFFF)
    return sealed(bytes(entry))


def put_log(image, at, entry, *, length=MIB):
    """Write a log entry at `at` of the log, going on at its start behind its end."""
    room = min(len(entry), length - at)
    image[LOG_AT + at : LOG_AT + at + room] = entry[:room]
    image[LOG_AT : LOG_AT + len(entry) - room] = entry[room:]
