"""What callers of the library say wrong is an OptionError, or another DiskmorphError; never an exception of Python's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clikit import dm

import diskmorph
from diskmorph.convert.inspect import inspect
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import FormatError, OptionError, SourceError

from testkit import MIB, run


@pytest.mark.parametrize("size", [-1, -(1 << 70), 1 << 63, 1 << 80, "9M", 1.5, True])
def test_what_is_no_size(size: Any, tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    diskmorph.create(image, MIB)
    with pytest.raises(OptionError, match="size"):
        diskmorph.create(tmp_path / "b.raw", size)
    with pytest.raises(OptionError, match="size"):
        diskmorph.resize(image, size)
    with pytest.raises(OptionError, match="size"):
        diskmorph.convert(image, tmp_path / "b.raw", options=ConvertOptions(size=size))
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]


@pytest.mark.parametrize(
    "words", [{"compress": True}, {"rate": "5M"}, {"zero_unit": -1}, {"format_options": {"a": 1.5}}]
)
def test_options_of_another_kind(words: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ConvertOptions(**words)


def test_format_options_may_be_numbers(tmp_path: Path) -> None:
    words: dict[str, Any] = {"cluster_size": 131072, "lazy_refcounts": True}
    diskmorph.create(tmp_path / "a.qcow2", MIB, options=ConvertOptions(format_options=words))
    info = inspect(tmp_path / "a.qcow2").image.info
    assert (info.allocation_unit, info.features["lazy_refcounts"]) == (131072, True)


@pytest.mark.parametrize(
    ("start", "length", "error"),
    [(0, -5, OptionError), (-1, 1, OptionError), (MIB, 1, FormatError), (0, 1 << 62, FormatError)],
)
def test_reads_that_cannot_be(start: int, length: int, error: type[Exception], tmp_path: Path) -> None:
    diskmorph.create(tmp_path / "a.raw", MIB)
    with diskmorph.open_disk(tmp_path / "a.raw") as disk, pytest.raises(error):
        disk.read(start, length)


def test_an_empty_name_is_said_to_be_empty() -> None:
    for ask in (diskmorph.open_disk, diskmorph.probe, diskmorph.check):
        with pytest.raises(SourceError, match="empty"):
            ask("")
    assert "empty" in dm("info", "").err


def test_parents_are_taken_alike_everywhere(tmp_path: Path) -> None:
    base, over = tmp_path / "base.qcow2", tmp_path / "over.qcow2"
    diskmorph.create(base, MIB)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", over)
    for parents in (str(tmp_path), tmp_path, [tmp_path], iter([str(tmp_path)])):
        options = ConvertOptions(parents=parents)  # type: ignore[arg-type]  # what is no Parents is the test
        assert diskmorph.measure(over, "raw", options=options).format == "raw"
    for allowed in (str(tmp_path), tmp_path, [str(tmp_path)]):
        assert diskmorph.digest(over, parents=allowed).virtual_size == MIB
        assert diskmorph.compare(over, base, parents=allowed).identical
        assert diskmorph.check(over, parents=allowed).clean
