"""CRC-32C against known values and the definition, one buffer and many rows."""

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskmorph.formats.crc32c import crc32c, crc32c_rows

from testkit import data

# RFC 3720 B.4
KNOWN = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


def by_definition(block):
    crc = 0xFFFFFFFF
    for byte in block:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(("block", "want"), KNOWN)
def test_known_values(block, want):
    assert crc32c(block) == want == by_definition(block)
    assert crc32c_rows(np.frombuffer(block, np.uint8).reshape(1, -1)).tolist() == [want]


def test_it_goes_on_from_what_precedes_and_takes_any_buffer():
    block = data("crc", 1000)
    assert crc32c(block[300:], crc32c(block[:300])) == crc32c(block)
    assert crc32c(bytearray(block)) == crc32c(memoryview(block)) == crc32c(block)


def test_the_library_is_the_fast_one():
    assert google_crc32c.implementation == "c"


@given(st.integers(0, 9), st.integers(0, 40), st.data())
def test_rows_agree_with_single_buffers(count, width, draw):
    table = np.frombuffer(draw.draw(st.binary(min_size=count * width, max_size=count * width)), np.uint8)
    table = table.reshape(count, width)
    seeds = np.array(draw.draw(st.lists(st.integers(0, 0xFFFFFFFF), min_size=count, max_size=count)), np.uint32)
    want = [crc32c(row.tobytes(), int(seed)) for row, seed in zip(table, seeds, strict=True)]
    assert crc32c_rows(table, seeds).tolist() == want
    assert crc32c_rows(table, 5).tolist() == [crc32c(row.tobytes(), 5) for row in table]


def test_rows_of_a_view_that_is_not_contiguous():
    table = np.frombuffer(data("strided", 64 * 100), np.uint8).reshape(64, 100)[::2, 3:60]
    assert crc32c_rows(table).tolist() == [crc32c(row.tobytes()) for row in table]
