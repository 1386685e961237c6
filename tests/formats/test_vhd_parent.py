"""A differencing VHD's parent: its names, its unique id, what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from contract.cases.vhd import dynamic, sealed

from diskmorph.formats.disk import ImageDisk, checked
from diskmorph.formats.errors import DiskmorphError, FormatError, PolicyError, SourceError
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import OpenContext, open_disk, open_layer, require_format
from diskmorph.formats.source import FileSource

from testkit import MIB, content, data

RELATIVE, ABSOLUTE, MAC = b"W2ru", b"W2ku", b"MacX"
SECTORS = (0, 2, 63)


def _family(folder: Path, locators: list[tuple[bytes, bytes]], name: str = "parent.vhd") -> bytes:
    base, over = data("base", 4 * MIB), data("over", 2 * MIB)
    (folder / "parents").mkdir(exist_ok=True)
    for where in (folder, folder / "parents"):
        blocks = {0: (None, base[: 2 * MIB]), 1: (None, base[2 * MIB :])}
        dynamic(where / "parent.vhd", 6 * MIB, blocks, name="parent")
    dynamic(
        folder / "child.vhd",
        6 * MIB,
        {1: (SECTORS, over)},
        kind=4,
        name="child",
        parent="parent",
        parent_name=name,
        locators=locators,
    )
    want = bytearray(base + bytes(2 * MIB))
    for sector in SECTORS:
        at = sector * 512
        want[2 * MIB + at : 2 * MIB + at + 512] = over[at : at + 512]
    return bytes(want)


def _names(folder: Path) -> tuple[str, ...]:
    with FileSource(folder / "child.vhd") as source:
        disk = open_layer(source, require_format("vhd"), OpenContext())
    assert isinstance(disk, ImageDisk)
    assert disk.info.parent is not None
    return disk.info.parent.names


def wide(text: str) -> bytes:
    return text.encode("utf-16-le")


@pytest.mark.parametrize(
    ("locators", "name", "want"),
    [
        ([(RELATIVE, wide(".\\parent.vhd"))], "", ("parent.vhd",)),
        ([(RELATIVE, wide("..\\a\\b.vhd"))], "c.vhd", ("../a/b.vhd", "c.vhd")),
        ([(ABSOLUTE, wide("C:\\vm\\b.vhd"))], "c.vhd", ("c.vhd", "b.vhd")),
        ([(ABSOLUTE, wide("\\\\server\\vm\\b.vhd"))], "c.vhd", ("c.vhd", "b.vhd")),
        ([(ABSOLUTE, wide("/srv/b.vhd")), (RELATIVE, wide("a.vhd"))], "", ("a.vhd", "/srv/b.vhd")),
        ([(MAC, b"file://localhost/vm/b%20c.vhd\0")], "x.vhd", ("x.vhd", "/vm/b c.vhd")),
        ([(MAC, b"file://[x")], "x.vhd", ("x.vhd",)),
        ([(b"Wi2r", b"old.vhd"), (b"Mac ", b"\1\2")], "x.vhd", ("x.vhd",)),
        ([], "C:\\vm\\b.vhd", ("b.vhd",)),
        ([(RELATIVE, wide("\u00e4 \u4e2d.vhd\0\0"))], "", ("\u00e4 \u4e2d.vhd",)),
        ([], "", ()),
    ],
    ids=str,
)
def test_names_by_trust(locators: list[tuple[bytes, bytes]], name: str, want: tuple[str, ...], tmp_path: Path) -> None:
    _family(tmp_path, locators, name)
    assert _names(tmp_path) == want


@pytest.mark.parametrize(
    ("locators", "name"),
    [
        ([(RELATIVE, wide(".\\parent.vhd"))], ""),
        ([(RELATIVE, wide("gone.vhd"))], "parent.vhd"),
        ([(ABSOLUTE, wide("D:\\machines\\parent.vhd"))], ""),
        ([(RELATIVE, wide("parents\\parent.vhd"))], "gone.vhd"),
    ],
    ids=str,
)
def test_reads_over_the_parent_that_it_names(locators: list[tuple[bytes, bytes]], name: str, tmp_path: Path) -> None:
    want = _family(tmp_path, locators, name)
    assert content(checked(open_disk(tmp_path / "child.vhd", parents=tmp_path))) == want


def test_reads_over_the_parent_that_the_user_names(tmp_path: Path) -> None:
    want = _family(tmp_path, [], "")
    (tmp_path / "parent.vhd").rename(tmp_path / "moved.img")
    backing = Parents(backing=tmp_path / "moved.img")
    assert content(open_disk(tmp_path / "child.vhd", parents=backing)) == want


def test_without_leave_it_is_refused_and_never_zeroes(tmp_path: Path) -> None:
    _family(tmp_path, [(RELATIVE, wide("parent.vhd"))])
    with pytest.raises(PolicyError, match="parent") as caught:
        open_disk(tmp_path / "child.vhd")
    assert "--allow-parent" in str(caught.value)
    assert "--backing" in str(caught.value)


@pytest.mark.parametrize("word", ["..\\outside.vhd", "/etc/hostname", "..\\..\\..\\..\\etc\\hostname"])
def test_nothing_outside_is_opened(word: str, tmp_path: Path) -> None:
    (tmp_path / "cage").mkdir()
    _family(tmp_path / "cage", [(RELATIVE, wide(word))], "gone.vhd")
    (tmp_path / "cage" / "parent.vhd").rename(tmp_path / "outside.vhd")
    with pytest.raises((PolicyError, SourceError), match="parent"):
        open_disk(tmp_path / "cage" / "child.vhd", parents=tmp_path / "cage")


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    _family(tmp_path, [(RELATIVE, wide("parent.vhd"))])
    (tmp_path / "parent.vhd").unlink()
    with pytest.raises(DiskmorphError, match=r"parent\.vhd"):
        open_disk(tmp_path / "child.vhd", parents=tmp_path)


def test_a_stranger_is_refused(tmp_path: Path) -> None:
    _family(tmp_path, [(RELATIVE, wide("parent.vhd"))])
    dynamic(tmp_path / "parent.vhd", 6 * MIB, {}, name="stranger")
    with pytest.raises(FormatError, match="parent") as caught:
        open_disk(tmp_path / "child.vhd", parents=tmp_path)
    assert (caught.value.structure, caught.value.field) == ("parent", "uuid")


@pytest.mark.parametrize(("field", "value"), [(8, 0x7FFFFFFF), (8, 100_000), (16, 0xFFFFFFFF)], ids=str)
def test_locators_out_of_bounds_are_refused(field: int, value: int, tmp_path: Path) -> None:
    _family(tmp_path, [(RELATIVE, wide("parent.vhd"))])
    raw = bytearray((tmp_path / "child.vhd").read_bytes())
    struct.pack_into(">I" if field == 8 else ">Q", raw, 512 + 576 + field, value)
    raw[512:1536] = sealed(bytes(raw[512:1536]), 36)
    (tmp_path / "child.vhd").write_bytes(raw)
    with pytest.raises(FormatError) as caught:
        open_disk(tmp_path / "child.vhd", parents=tmp_path)
    assert caught.value.structure == "parent locator 0"
    assert caught.value.offset == 512 + 576
