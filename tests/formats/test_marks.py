"""Marks: a target carries its job's mark as soon as it has its name, on file systems with attributes and without."""

import errno
import os
from pathlib import Path

import pytest

from diskmorph.formats import marks
from diskmorph.formats.directory import DirectoryTarget
from diskmorph.formats.output import FileTarget


def write(folder: Path, name: str, *, force: bool = False) -> None:
    with FileTarget(folder, [name], force=force) as target:
        target.members[0].write(0, b"content")
        target.commit([7])


@pytest.fixture(params=["attributes", "none"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "none":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOTSUP, "not supported")

        monkeypatch.setattr(os, "setxattr", refuse)
    return str(request.param)


def test_a_file_is_born_with_its_mark(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    born = []
    link = os.link

    def watch(*args: object, **rest: object) -> None:
        link(*args, **rest)  # type: ignore[arg-type]
        born.append(marks.mark_of(tmp_path / "a"))

    monkeypatch.setattr(os, "link", watch)
    with marks.marked("job 1"):
        write(tmp_path, "a")
    write(tmp_path, "b")
    assert born[0] == "job 1"
    assert marks.mark_of(tmp_path / "a") == "job 1"
    assert marks.mark_of(tmp_path / "b") is None and marks.mark_of(tmp_path / "c") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ([".a.mark"] if kind == "none" else []) + ["a", "b"]


def test_a_mark_is_changed_and_belongs_to_one_file(kind: str, tmp_path: Path) -> None:
    with marks.marked("job 1"):
        write(tmp_path, "a")
    marks.change(tmp_path / "a", "job 1, whole")
    marks.change(tmp_path / "gone", "nothing")
    assert marks.mark_of(tmp_path / "a") == "job 1, whole"
    write(tmp_path, "a", force=True)
    assert marks.mark_of(tmp_path / "a") is None, "another file has taken its place"


def test_directories(kind: str, tmp_path: Path) -> None:
    with marks.marked("tree"), DirectoryTarget(tmp_path / "d") as target:
        target.commit()
    assert marks.mark_of(tmp_path / "d") == "tree"


def test_several_members(kind: str, tmp_path: Path) -> None:
    with marks.marked("both"), FileTarget(tmp_path, ["a", "b"]) as target:
        target.commit([0, 0])
    assert marks.mark_of(tmp_path / "a") == marks.mark_of(tmp_path / "b") == "both"


def test_other_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "setxattr", fail)
    with marks.marked("m"), pytest.raises(Exception, match="cannot be named"):
        write(tmp_path, "a")
    assert not (tmp_path / "a").exists()
    with marks.marked("m" * 4000), pytest.raises(ValueError, match="too long"):
        write(tmp_path, "a")
