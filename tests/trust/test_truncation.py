"""Any cut of any image but raw is refused and says where, or reads the same because the missing part held nothing."""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
import subjects
from subjects import Subject, words

from diskmorph.formats.errors import DiskmorphError, FormatError
from diskmorph.formats.extents import DATA, PLAIN
from diskmorph.formats.policy import Opener
from diskmorph.formats.registry import OpenContext, load, open_disk, require_format
from diskmorph.formats.source import FileSource

from testkit import MIB, data, run

ALL = [(kind, name) for table in (subjects.TABLE, subjects.CUT) for kind, group in table.items() for name in group]
RANDOM = 60
_HEADS = (0, 1, 4, 8, 16, 48, 64, 72, 100, 104, 112, 400, 456, 511, 512, 513, 1023, 1024, 1536, 65536, 131072, 196608)
_TAILS = (1, 8, 10, 511, 512, 513, 1023, 1024, 1025, 1536, 4096, 65536)


def borders(it: Subject, path: Path) -> set[int]:
    """Where structures begin and end: of data by the extents, of metadata by what lies between, and fixed places."""
    size = len(it.blob)
    found = {*_HEADS, *(size - tail for tail in _TAILS)}
    for start, stop in it.ranges:
        found |= {start, stop}
    if size < 4096:  # a descriptor
        found |= {at + 1 for at, byte in enumerate(it.blob) if byte in b'\n"'}
    with open_disk(path, format=it.format, **words(path.parent, it.open)) as disk:
        mine = [index for index, source in enumerate(disk.files) if source.path == path.with_name(it.victim)]
        for batch in disk.extents():
            for row in batch[batch["kind"] == DATA][:200]:
                if int(row["file"]) in mine:
                    start = int(row["offset"])
                    found |= {start, start + int(row["length"] if row["codec"] == PLAIN else row["stored"])}
    return found


def cuts(it: Subject, path: Path, most: int) -> list[int]:
    rng = random.Random(it.name)
    edges = sorted(borders(it, path))
    if len(edges) > most:
        edges = sorted({*edges[: most // 3], *edges[-most // 3 :], *rng.sample(edges, most // 3)})
    near = {edge + step for edge in edges for step in (-1, 0, 1)}
    near |= {rng.randrange(len(it.blob)) for _ in range(RANDOM)}
    return sorted(cut for cut in near if 0 <= cut < len(it.blob))


def judge(it: Subject, path: Path) -> str | None:
    """Return what is wrong with how a cut image is read; None if nothing."""
    try:
        with open_disk(path, format=it.format, **words(path.parent, it.open)) as disk:
            sha = hashlib.sha256(disk.read(0, disk.size)).hexdigest()
    except FormatError as error:
        return None if error.offset is not None and error.structure else f"no place in: {error}"
    except DiskmorphError as error:
        return f"refused as something else: {error.kind}: {error}"
    return None if sha == it.content else "silently wrong"


def clean(it: Subject, path: Path) -> bool:
    how = words(path.parent, it.open)
    try:
        with FileSource(path) as source:
            return load(require_format(it.format)).check_image(source, OpenContext(Opener(how["parents"]))).clean
    except DiskmorphError:
        return False


def wrong_cuts(it: Subject, folder: Path, most: int) -> list[str]:
    path = it.write(folder)
    victim = folder / it.victim
    wrong = []
    for cut in reversed(cuts(it, path, most)):  # each cuts what the last one left
        with open(victim, "r+b") as file:
            file.truncate(cut)
        verdict = judge(it, path)
        if verdict is not None:
            wrong.append(f"{it.name} cut at {cut} of {len(it.blob)}: {verdict}")
    return wrong


@pytest.mark.parametrize(("format", "name"), ALL, ids=[f"{f}-{n}" for f, n in ALL])
def test_no_cut_is_silently_wrong(format: str, name: str, tmp_path: Path) -> None:
    assert not wrong_cuts(subjects.make(format, name), tmp_path, 24)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name"), ALL, ids=[f"{f}-{n}" for f, n in ALL])
def test_no_cut_of_many_is_silently_wrong(format: str, name: str, tmp_path: Path) -> None:
    assert not wrong_cuts(subjects.make(format, name), tmp_path, 1 << 20)


WRITTEN = [
    ("qcow2", ""),
    ("qcow2", "compat=0.10"),
    ("qcow2", "extended_l2=on"),
    ("qcow2", "cluster_size=512"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=streamOptimized"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", "subformat=dynamic,force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
    ("vhdx", ""),
    ("vhdx", "subformat=fixed"),
    ("parallels", ""),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("format", "options"), WRITTEN, ids=[f"{f} {o}".strip() for f, o in WRITTEN])
def test_cuts_of_full_images_of_qemu(format: str, options: str, packed: bool, tmp_path: Path) -> None:
    """A disk without a zero: no cut at all may be read, and none is clean to the check."""
    if packed and format != "qcow2":
        return
    raw, path = tmp_path / "full.raw", tmp_path / f"full.{format}"
    raw.write_bytes(data("full", MIB + 512))
    more = ["-o", options] if options else []
    run("qemu-img", "convert", *(["-c"] if packed else []), "-f", "raw", "-O", format, *more, raw, path)
    ours = {"vpc": "vhd"}.get(format, format)
    blob = path.read_bytes()
    with open_disk(path, format=ours) as disk:
        want = disk.read(0, disk.size)
    last = len(blob) if ours != "parallels" else len(blob.rstrip(b"\0"))
    rng = random.Random(options)
    for cut in sorted({rng.randrange(last) for _ in range(40)} | {last - n for n in (1, 512, 4096)}, reverse=True):
        with open(path, "r+b") as file:
            file.truncate(cut)
        try:
            with open_disk(path, format=ours) as disk:
                assert disk.read(0, disk.size) == want, f"silently wrong at {cut} of {len(blob)}"
        except FormatError as error:
            assert error.offset is not None, error
            it = Subject("full", ours, {}, path.name, path.name, (), lambda _: None, {}, "")
            assert not clean(it, path), f"check finds nothing at {cut} of {len(blob)}"
