"""Names found inside images open nothing but plain siblings and what the user allowed."""

from __future__ import annotations

import os

import pytest

from diskmorph.formats.errors import DiskmorphError, PolicyError, SourceError
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.source import BytesSource, FileSource


@pytest.fixture
def cage(tmp_path):
    (tmp_path / "cage").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/canary").write_bytes(b"secret")
    (tmp_path / "cage/image").write_bytes(b"image")
    (tmp_path / "cage/part").write_bytes(b"part")
    (tmp_path / "cage/link").symlink_to(tmp_path / "secret/canary")
    (tmp_path / "cage/inner").symlink_to("part")
    return tmp_path


HOSTILE = [
    "../secret/canary",
    "/etc/hostname",
    "link",
    "",
    ".",
    "..",
    "a/../../secret/canary",
    "..\\secret\\canary",
    "part\0x",
    "json:{}",
    "nbd://127.0.0.1/x",
    "http://127.0.0.1/x",
    "/dev/zero",
    "/proc/self/environ",
    "x" * 300,
    "x" * 5000,
    "x/" * 3000,
    "\ud800",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_open_nothing(cage, name):
    with FileSource(cage / "cage/image") as near:
        for opener in (Opener(), Opener(Parents.of(cage / "cage"))):
            for ask in (opener.sibling, opener.allowed):
                with pytest.raises(DiskmorphError) as caught:
                    ask(name, near)
                assert "\n" not in str(caught.value)


def test_a_plain_sibling_opens_and_an_inner_link_needs_leave(cage):
    with FileSource(cage / "cage/image") as near:
        assert Opener().sibling("part", near).read(0, 4) == b"part"
        with pytest.raises(PolicyError):
            Opener().sibling("inner", near)
        assert Opener(Parents.of(cage / "cage")).sibling("inner", near).read(0, 4) == b"part"


def test_allowed_directories_hold_what_they_hold(cage):
    with FileSource(cage / "cage/image") as near:
        opener = Opener(Parents.of([cage / "secret"]))
        for name in (str(cage / "secret/canary"), "../secret/canary", "link"):
            assert opener.allowed(name, near).read(0, 6) == b"secret"
        with pytest.raises(PolicyError) as caught:
            opener.allowed("part", near)
        assert caught.value.option == "--allow-parent"
        assert "--backing" in str(caught.value)
        with pytest.raises(SourceError, match="does not exist"):
            opener.allowed("../secret/gone", near)


def test_a_link_out_of_an_allowed_directory_is_refused(cage):
    with FileSource(cage / "cage/image") as near, pytest.raises(PolicyError):
        Opener(Parents.of(cage / "cage")).allowed("link", near)


@pytest.mark.parametrize("what", ["fifo", "device"])
def test_special_files_are_refused_even_where_allowed(cage, what):
    path = cage / "cage/special"
    os.mkfifo(path) if what == "fifo" else path.symlink_to("/dev/zero")
    allow = Parents.of([cage / "cage", "/dev"])
    with FileSource(cage / "cage/image") as near:
        for ask in (Opener(allow).sibling, Opener(allow).allowed):
            with pytest.raises(SourceError, match="not a disk image"):
                ask("special", near)


def test_one_directory_given_as_a_string_is_not_taken_for_its_letters(cage):
    parents = Parents(allow=str(cage / "cage"))
    assert parents.allow == (cage / "cage",)
    near = FileSource(cage / "cage/image")
    with pytest.raises(PolicyError):
        Opener(parents).sibling(str(cage / "secret/canary"), near)


def test_an_image_without_a_folder_has_no_siblings():
    with pytest.raises(PolicyError):
        Opener().sibling("part", BytesSource(b"x"))
