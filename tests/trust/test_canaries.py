"""No name inside any image opens anything that was not allowed: every open of the process is watched by strace."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from trust.cages import (
    DISKS,
    NAMES,
    SECRET,
    Cage,
    Case,
    backing,
    data_file,
    flat_extent,
    iso_of_links,
    layout_of,
    ovf_reference,
    tars,
    traced,
    vhd_parent,
    vmdk_parent,
)

VERBS = (["convert", "-O", "raw"], ["info"], ["info", "--chain"], ["check"])
TARS = ("dots", "absolute", "through a link", "hard link", "over a link")
DIGESTS = ("sha256:../../../secret/canary.raw", "sha256:" + "0" * 64, "../../secret/canary.raw")
TREE_TARGETS = (["out", "-O", "directory"], ["out.tar"], ["oci-archive:out.tar"])


def new_cage(where: Path, number: int) -> Cage:
    folder = where / str(number)
    folder.mkdir()
    return Cage(folder)


def test_no_name_in_an_image_opens_the_canary(tmp_path: Path) -> None:
    cases: list[Case] = []
    for make in DISKS:
        for kind in NAMES:
            cage = new_cage(tmp_path, len(cases))
            image = make(cage, cage.name(kind)).name
            for verb in VERBS if kind == "relative" else VERBS[:1]:
                target = ["out.raw"] if verb[0] == "convert" else []
                cases.append(Case(f"{make.__name__} {kind} {verb}", cage, [*verb, image, *target]))
    for case in traced(cases, tmp_path):
        image = next(case.cage.cage.glob("a.*"))
        assert image in case.seen, f"{case.name}: strace saw nothing"
        assert case.cage.secret not in case.seen, case.name
        assert Path("/network") not in case.seen, case.name
        assert "Traceback" not in case.text, case.name
        if case.argv[0] == "convert":
            assert case.status == 1, f"{case.name}: {case.text}"
            assert not (case.cage.cage / "out.raw").exists()
        else:
            assert case.status in {0, 1, 3}, f"{case.name}: {case.text}"


def test_what_is_allowed_is_opened(tmp_path: Path) -> None:
    """The canary itself can be seen: without this the test above could not fail."""
    cage = new_cage(tmp_path, 0)
    image = backing(cage, cage.name("relative")).name
    argv = ["convert", "--allow-parent", str(cage.secret.parent), "-O", "raw", image, "out.raw"]
    (case,) = traced([Case("allowed", cage, argv)], tmp_path)
    assert (case.status, cage.secret in case.seen) == (0, True)
    assert (cage.cage / "out.raw").read_bytes().startswith(SECRET)


def test_no_name_in_a_tree_leads_out(tmp_path: Path) -> None:
    cases: list[Case] = []
    for source in (*TARS, "iso", *DIGESTS):
        for target in TREE_TARGETS:
            cage = new_cage(tmp_path, len(cases))
            if source in TARS:
                name = "a.tar"
                (cage.cage / name).write_bytes(tars(cage)[source])
            else:
                name = iso_of_links(cage) if source == "iso" else layout_of(cage, source)
            cases.append(Case(f"{source} {target}", cage, ["convert", name, *target]))
    for case in traced(cases, tmp_path):
        assert "Traceback" not in case.text, case.name
        assert case.cage.secret not in case.seen, case.name
        assert case.cage.secret.read_bytes() == SECRET, case.name
        assert [path.name for path in case.cage.secret.parent.iterdir()] == ["canary.raw"], case.name
        if case.argv[1] == "layout":
            assert case.status == 1, f"{case.name}: {case.text}"
        if case.argv[1] == "a.iso":
            assert case.status == 0, f"{case.name}: {case.text}"


def test_special_files_are_refused_at_once(tmp_path: Path) -> None:
    cases: list[Case] = []
    with contextlib.ExitStack() as stack:
        for make in (backing, data_file, flat_extent, vmdk_parent, vhd_parent, ovf_reference):
            for what in ("fifo", "socket", "zero", "folder"):
                cage = new_cage(tmp_path, len(cases))
                place = cage.cage / what
                image = make(cage, what).name
                if what == "fifo":
                    os.mkfifo(place)
                elif what == "socket":
                    with contextlib.chdir(cage.cage):  # an address is short
                        stack.enter_context(socket.socket(socket.AF_UNIX)).bind(what)
                elif what == "zero":
                    place.symlink_to("/dev/zero")
                else:
                    place.mkdir()
                argv = ["convert", "--allow-parent", ".", "-O", "raw", image, "out.raw"]
                cases.append(Case(f"{make.__name__} {what}", cage, argv))
        for case in traced(cases, tmp_path):
            assert case.status == 1, f"{case.name}: {case.text}"
            assert case.seconds < 5, case.name
            assert "Traceback" not in case.text, case.name
            special = {Path("/dev/zero"), *(case.cage.cage / word for word in ("fifo", "socket"))}
            assert not case.seen & special, case.name
