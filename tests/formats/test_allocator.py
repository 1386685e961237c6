"""What writers are asked for: the user's words, the time that counts, the parent's name."""

from __future__ import annotations

import math

import pytest

from diskmorph.formats.allocator import Identity, NewImage, NewParent, OptionReader, parse_size
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.registry import load, require_format

from testkit import MIB

STRANGE = "b\udcff"
"""A file name whose bytes are no UTF-8, as Python hands it over."""


@pytest.mark.parametrize("text", ["", "2", "8", "-4", "4.0", "\u00b2", "9" * 5000], ids=ascii)
def test_what_is_no_number_in_range_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="out of range"):
        OptionReader("x", {"n": text}).number("n", 4, least=3, most=7)


@pytest.mark.parametrize("text", ["1.0e999", "\u00b2", "9" * 5000, "nan", "-1", "1.5B"], ids=ascii)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parse_size(text)


def test_the_time_of_reproducible_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert Identity(b"seed").time() == 1_700_000_000
    for text in ("", "soon", "nan", "inf", "-1", "1e9", "\u00b2", "9" * 5000):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
        with pytest.raises(OptionError, match="SOURCE_DATE_EPOCH"):
            Identity(b"seed").time()
        assert math.isfinite(Identity().time()), "it counts for reproducible images only"


@pytest.mark.parametrize("format", ["vhd", "vhdx", "vmdk"])
def test_a_parents_name_that_is_not_utf_8_is_refused(format: str) -> None:
    guid = "00000000-0000-0000-0000-000000000001"
    identity = {"uuid": guid, "data write guid": guid, "cid": "12345678"}
    parent = NewParent(f"{STRANGE}.{format}", format, MIB, identity)
    with pytest.raises((OptionError, TargetError), match="not UTF-8"):
        list(load(require_format(format)).new_allocator(NewImage(MIB, "c", parent=parent)).begin())


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized", "monolithicFlat"])
def test_a_vmdks_name_that_is_not_utf_8_is_refused(subformat: str) -> None:
    image = NewImage(MIB, f"{STRANGE}.vmdk", options={"subformat": subformat})
    with pytest.raises(TargetError, match="not UTF-8"):
        load(require_format("vmdk")).new_allocator(image)
