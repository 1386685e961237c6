"""Reading VHDX: copies, regions, metadata, block states, chains, damage."""

import struct
import uuid

import numpy as np
import pytest
import vhdxmade
from vhdxkit import SIZE, made, opened, refusal
from vhdxmade import (
    BAT_AT,
    HEADERS,
    METADATA_AT,
    TABLES,
    Made,
)

from diskmorph.formats import vhdx
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.registry import OpenContext
from diskmorph.formats.source import BytesSource
from diskmorph.formats.vhdx import schema

from testkit import MIB, TIB, content, data


class TestSchema:
    def test_dtypes_are_the_structures(self):
        pairs = [
            (schema.REGION_DTYPE, schema.RegionEntry),
            (schema.LOG_ENTRY_DTYPE, schema.LogEntryHeader),
            (schema.DESCRIPTOR_DTYPE, schema.DataDescriptor),
            (schema.DESCRIPTOR_DTYPE, schema.ZeroDescriptor),
            (schema.DATA_SECTOR_DTYPE, schema.DataSector),
            (schema.METADATA_DTYPE, schema.MetadataEntry),
            (schema.LOCATOR_ENTRY_DTYPE, schema.ParentLocatorEntry),
            (schema.BAT_ENTRY, schema.BatEntry),
        ]
        for dtype, struct_ in pairs:
            assert dtype.itemsize == struct_.sizeof()
            raw = bytearray(data(str(struct_), dtype.itemsize))
            if hasattr(struct_.subcons[0].subcon, "value"):
                raw[: len(struct_.subcons[0].subcon.value)] = struct_.subcons[0].subcon.value
            parsed = struct_.parse(bytes(raw))
            row = np.frombuffer(bytes(raw), dtype)[0]
            for index, sub in enumerate(struct_.subcons):
                found = row if dtype.names is None else row[dtype.names[index]]
                value = parsed[sub.name]
                if isinstance(value, uuid.UUID):
                    assert uuid.UUID(bytes_le=found.tobytes()) == value
                elif isinstance(value, int):
                    assert int(found) == value
                else:
                    assert found.tobytes() == bytes(value)
            assert struct_.build(parsed) == bytes(raw)

    @pytest.mark.parametrize(
        ("name", "size"),
        [("Header", 4096), ("Identifier", 520), ("RegionTableHeader", 16), ("MetadataTableHeader", 32)],
    )
    def test_sizes(self, name, size):
        assert getattr(schema, name).sizeof() == size

    def test_bat_entries(self):
        count = schema.bat_entries
        assert [count(n, 4, differencing=False) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 4, 6, 9, 11]
        assert [count(n, 4, differencing=True) for n in (0, 1, 4, 5, 8, 9)] == [0, 5, 5, 10, 10, 15]


class TestCopies:
    image = bytes(made().build())
    want = b"".join(data(("read", n), MIB) for n in range(4))

    @pytest.mark.parametrize("at", [*HEADERS, *TABLES])
    def test_one_damaged_copy_is_passed_over_and_told(self, at):
        image = bytearray(self.image)
        image[at + 20] ^= 1
        disk = opened(image)
        assert content(checked(disk)) == self.want
        assert any("checksum" in warning for warning in disk.info.warnings)
        image[at : at + 4] = b"dead"
        disk = opened(image)
        assert content(disk) == self.want
        assert any("signature" in warning for warning in disk.info.warnings)

    @pytest.mark.parametrize(("pair", "what"), [(HEADERS, "header 1"), (TABLES, "region table 1")])
    def test_two_damaged_copies_are_refused(self, pair, what):
        image = bytearray(self.image)
        for at in pair:
            image[at + 20] ^= 1
        refusal(image, structure=what, field="checksum", offset=pair[0])
        for at in pair:
            image[at] = 0
        refusal(image, structure=what, field="signature", offset=pair[0])

    def test_the_header_with_the_higher_number_is_current_wherever_it_stands(self):
        image = bytearray(self.image)
        one, two = uuid.UUID(int=1), uuid.UUID(int=2)
        for numbers, current in (((8, 9), two), ((9, 8), one)):
            for at, number, write in zip(HEADERS, numbers, (one, two), strict=True):
                image[at : at + 4096] = vhdxmade.header(number, data=write)
            assert opened(image).identity == {"data write guid": str(current)}

    def test_the_better_header_is_the_older_one_when_the_newer_is_damaged(self):
        image = bytearray(self.image)
        image[HEADERS[0] : HEADERS[0] + 4096] = vhdxmade.header(9, data=uuid.UUID(int=1))
        image[HEADERS[1] : HEADERS[1] + 4096] = vhdxmade.header(10, data=uuid.UUID(int=2))
        image[HEADERS[1] + 4000] ^= 1
        assert opened(image).identity == {"data write guid": str(uuid.UUID(int=1))}

    def test_equal_numbers_are_refused_unless_the_headers_are_the_same(self):
        image = bytearray(self.image)
        for at in HEADERS:
            image[at : at + 4096] = vhdxmade.header(9)
        assert content(opened(image)) == self.want
        image[HEADERS[1] : HEADERS[1] + 4096] = vhdxmade.header(9, data=uuid.UUID(int=7))
        refusal(image, field="sequence_number")

    def test_another_version_is_refused(self):
        image = bytearray(self.image)
        image[HEADERS[1] : HEADERS[1] + 4096] = vhdxmade.header(9, version=2)
        refusal(image, UnsupportedError, field="version", offset=HEADERS[1] + 66, found=2)

    def test_no_identifier(self):
        refusal(b"VHDXFILE" + self.image[8:], structure="file identifier", offset=0)
        refusal(b"", structure="file identifier")


class TestRegions:
    def with_table(self, entries, count=None):
        image = made().build()
        for at in TABLES:
            image[at : at + 65536] = vhdxmade.region_table(entries, count)
        return image

    known = (("BAT", BAT_AT, MIB, 1), ("metadata", METADATA_AT, MIB, 1))

    def test_an_unknown_region_is_refused_by_its_guid_only_where_it_is_required(self):
        stranger = "12345678-1234-1234-1234-123456789abc"
        assert opened(self.with_table([*self.known, (stranger, 64 * MIB, MIB, 0)])).size == SIZE
        image = self.with_table([*self.known, (stranger, 64 * MIB, MIB, 1)])
        assert stranger in str(refusal(image, UnsupportedError, structure="region table 1", offset=TABLES[0] + 16 + 64))

    @pytest.mark.parametrize(
        "entries",
        [
            known[:1],
            known[1:],
            (*known, known[0]),
            (("BAT", BAT_AT + 512, MIB, 1), known[1]),
            (("BAT", 0, MIB, 1), known[1]),
            (("BAT", BAT_AT, 0, 1), known[1]),
            (("BAT", BAT_AT, MIB + 8, 1), known[1]),
            (("BAT", METADATA_AT, MIB, 1), known[1]),
            (("BAT", MIB, 2 * MIB, 1), known[1]),
            (("BAT", 1 << 60, MIB, 1), known[1]),
        ],
    )
    def test_contradictions_are_refused(self, entries):
        refusal(self.with_table(entries))

    def test_too_many_entries(self):
        refusal(self.with_table(self.known, 2048), field="entry_count", offset=TABLES[0] + 8, found=2048)

    def test_a_bat_too_small_for_the_disk(self):
        image = Made(200_000 * MIB).build()  # 200,048 entries: 1.5 MiB
        for at in TABLES:
            image[at : at + 65536] = vhdxmade.region_table(self.known)
        refusal(image, structure="region table", field="length")


class TestMetadata:
    def patched(self, name, content_, length=None):
        image = made().build()
        for number in range(8):
            at = METADATA_AT + 32 + 32 * number
            if image[at : at + 16] == vhdxmade.guid(name):
                offset = struct.unpack_from("<I", image, at + 16)[0]
                image[METADATA_AT + offset : METADATA_AT + offset + len(content_)] = content_
                if length is not None:
                    struct.pack_into("<I", image, at + 20, length)
                return image
        raise AssertionError(name)

    @pytest.mark.parametrize(
        ("name", "content_", "structure"),
        [
            ("parameters", struct.pack("<II", MIB // 2, 0), "file parameters"),
            ("parameters", struct.pack("<II", 512 * MIB, 0), "file parameters"),
            ("parameters", struct.pack("<II", 3 * MIB, 0), "file parameters"),
            ("parameters", struct.pack("<II", 0, 0), "file parameters"),
            ("logical", struct.pack("<I", 0), "logical sector size"),
            ("logical", struct.pack("<I", 1024), "logical sector size"),
            ("physical", struct.pack("<I", 520), "physical sector size"),
            ("size", struct.pack("<Q", SIZE + 1), "virtual disk size"),
            ("size", struct.pack("<Q", 64 * TIB + 512), "virtual disk size"),
        ],
    )
    def test_values_out_of_range_are_refused(self, name, content_, structure):
        refusal(self.patched(name, content_), structure=structure)

    def test_an_item_that_is_too_short(self):
        refusal(self.patched("size", b"", 4), structure="virtual disk size", expected="8 bytes", found=4)

    @pytest.mark.parametrize("length", [0, MIB + 1, 0xFFFFFFFF])
    def test_an_item_of_a_length_that_cannot_be(self, length):
        refusal(self.patched("size", b"", length), structure="metadata table", field="offset")

    @pytest.mark.parametrize("offset", [0, 65535, MIB - 4, 0xFFFFFFFF])
    def test_an_item_outside_its_place(self, offset):
        image = made().build()
        struct.pack_into("<I", image, METADATA_AT + 32 + 16, offset)
        refusal(image, structure="metadata table", field="offset", offset=METADATA_AT + 32 + 16)

    @pytest.mark.parametrize("name", ["parameters", "size", "logical", "physical"])
    def test_a_missing_item_is_named(self, name):
        image = made().build()
        at = bytes(image).index(vhdxmade.guid(name), METADATA_AT)
        image[at : at + 16] = uuid.UUID(int=5).bytes_le
        struct.pack_into("<I", image, at + 24, 0)
        refusal(image, structure="metadata table", field="item_id")

    def test_an_unknown_item_is_refused_by_its_guid_only_where_it_is_required(self):
        stranger = "87654321-1234-1234-1234-123456789abc"
        assert opened(made(items=[(stranger, 2, b"x")]).build()).size == SIZE
        error = refusal(made(items=[(stranger, 4, b"x")]).build(), UnsupportedError, structure="metadata table")
        assert stranger in str(error)

    def test_an_item_twice(self):
        refusal(made(items=[("size", 6, struct.pack("<Q", SIZE))]).build(), structure="metadata table", field="item_id")

    def test_signature_and_count(self):
        image = made().build()
        struct.pack_into("<H", image, METADATA_AT + 10, 2048)
        refusal(image, field="entry_count", offset=METADATA_AT + 10)
        image[METADATA_AT] = 0
        refusal(image, structure="metadata table", field="signature", offset=METADATA_AT)

    def test_info(self):
        disk = opened(made(sector=4096, leave=True).build())
        assert (disk.info.subformat, disk.sector_size, disk.info.allocation_unit) == ("fixed", 4096, MIB)
        assert disk.info.features["physical_sector_size"] == 4096
        assert disk.info.features["creator"] == "hand"
        assert disk.info.features["virtual_disk_id"] == str(uuid.UUID(int=83))
        assert disk.info.warnings == ()
        assert opened(made().build()).info.subformat == "dynamic"

    def test_there_are_no_snapshots(self):
        with pytest.raises(UnsupportedError):
            vhdx.open_image(BytesSource(bytes(made().build())), OpenContext(snapshot="s"))
