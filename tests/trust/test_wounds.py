"""`check` finds a wound of every rule, mends what can be mended, in place with a journal and in a copy; the peer agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clikit import dm

from testkit import run  # isort: skip

from trust.wounds import BASES, FINDS, MISSES, NONE, WOUNDS, Wound

IDS = [f"{wound.format}: {wound.rule}" for wound in WOUNDS]


def by_peer(wound: Wound, path: Path) -> str:
    status = run("qemu-img", "check", "-q", "-f", wound.format, path, ok=False).returncode
    return {0: MISSES, 63: NONE}.get(status, FINDS)


def same(wound: Wound, path: Path) -> None:
    run("qemu-img", "compare", "-f", "raw", "-F", wound.format, path.with_name("disk.raw"), path)


def undo(path: Path) -> None:
    """Do what docs say of a journal: write the old bytes back, last line first, and cut the file."""
    lines = [json.loads(line) for line in path.with_name(path.name + ".diskmorph-journal").read_text().splitlines()]
    with open(path, "r+b") as file:
        for line in reversed(lines[1:]):
            file.seek(line["offset"])
            file.write(bytes.fromhex(line["old"]))
        file.truncate(lines[0]["size"])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, bytes, str]]:
    found = {}
    for number, (name, make) in enumerate(BASES.items()):
        path = make(tmp_path_factory.mktemp(f"good{number}"))
        found[name] = path.read_bytes(), path.with_name("disk.raw").read_bytes(), path.name
    return found


@pytest.mark.parametrize("base", BASES)
def test_good_images_are_clean(base: str, good: dict[str, tuple[bytes, bytes, str]], tmp_path: Path) -> None:
    blob, _, name = good[base]
    (tmp_path / name).write_bytes(blob)
    report = dm("check", "--json", tmp_path / name)
    assert report.json["corruptions"] == 0
    assert report.status == 0


@pytest.mark.parametrize("wound", WOUNDS, ids=IDS)
def test_wounds(wound: Wound, good: dict[str, tuple[bytes, bytes, str]], tmp_path: Path) -> None:
    whole, raw, name = good[wound.base]
    path = tmp_path / name
    (tmp_path / "disk.raw").write_bytes(raw)
    blob = bytearray(whole)
    wound.hurt(blob)
    path.write_bytes(blob)
    assert by_peer(wound, path) == wound.peer
    report = dm("check", "--json", path)
    assert path.read_bytes() == blob, "check wrote to the image"
    if report.status == 1:
        assert report.json["error"]["offset"] is not None
    else:
        assert report.status == (0 if wound.warns else 3)
        assert report.json["findings"]
        assert report.json["clean"] == wound.warns
    copy = tmp_path / f"copy-{name}"
    mended = dm("check", "--json", "--repair", wound.repair, "-o", copy, path)
    assert path.read_bytes() == blob, "a repair with -o wrote to the image"
    assert (mended.status == 0) == wound.mends, mended.out or mended.err
    if not wound.mends:
        return
    assert by_peer(wound, copy) in {MISSES, NONE}
    copy.rename(tmp_path / f"{name}2")
    if wound.heals:
        same(wound, tmp_path / f"{name}2")
    in_place = dm("check", "--json", "--repair", wound.repair, path)
    assert in_place.status == 0
    assert in_place.json["repaired"] > 0
    assert in_place.json["journal"].endswith(".diskmorph-journal")
    assert by_peer(wound, path) in {MISSES, NONE}
    if wound.heals:
        same(wound, path)
    undo(path)
    assert path.read_bytes() == blob, "the journal does not undo the repair"
