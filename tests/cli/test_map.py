"""`map`: the drawing in characters, PNG and SVG; the listing; the shares that they are drawn from."""

import random
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from clikit import dm
from hypothesis import given
from hypothesis import strategies as st

from diskmorph.commands.allocation import BELOW, CLASSES, ENCODED, NOTHING, PLAIN_DATA, ZEROES, drawing, tally
from diskmorph.formats.extents import DATA, HOLE, ZERO, ZSTD, row
from diskmorph.formats.views import Mapped, Zero

from testkit import KIB, MIB, data, run

SVG = "{http://www.w3.org/2000/svg}"


def mixed() -> Mapped:
    """4 MiB of each class: data, zeroes, compressed, a hole, data of a parent."""
    rows = np.concatenate(
        [
            row(0, 4 * MIB, DATA),
            row(4 * MIB, 4 * MIB, ZERO),
            row(8 * MIB, 4 * MIB, DATA, codec=ZSTD, stored=100),
            row(12 * MIB, 4 * MIB, HOLE),
            row(16 * MIB, 4 * MIB, DATA, offset=1 << 30),
        ]
    )
    rows["depth"][-1] = 1
    return Mapped(rows, ())


def test_totals_and_shares() -> None:
    found = tally(mixed(), 10)
    assert found.totals == (4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB)
    assert found.cells == 10 and found.extents == 5
    want = [PLAIN_DATA] * 2 + [ZEROES] * 2 + [ENCODED] * 2 + [NOTHING] * 2 + [BELOW] * 2
    assert found.share.argmax(axis=0).tolist() == want
    assert np.allclose(found.share.sum(axis=0), 1)


@given(st.integers(1, 5000), st.integers(1, 60), st.integers(0, 1 << 30))
def test_shares_are_exact(size: int, cells: int, seed: int) -> None:
    """Held against counting byte by byte."""
    rng = random.Random(seed)
    kinds, at, pieces = np.zeros(size, int), 0, []
    while at < size:
        length = min(rng.randrange(1, 700), size - at)
        kind = rng.choice((DATA, ZERO, HOLE))
        pieces.append(row(at, length, kind, offset=at * 2 if kind == DATA else 0))
        kinds[at : at + length] = {DATA: PLAIN_DATA, ZERO: ZEROES, HOLE: NOTHING}[kind]
        at += length
    found = tally(Mapped(np.concatenate(pieces), ()), cells)
    step = -(-size // cells)
    assert found.cells == -(-size // step)
    for kind in range(len(CLASSES)):
        assert found.totals[kind] == (kinds == kind).sum()
        for cell in range(found.cells):
            part = kinds[cell * step : (cell + 1) * step]
            assert found.share[kind, cell] == pytest.approx((part == kind).mean())


def test_drawing_in_characters() -> None:
    lines = list(drawing(tally(mixed(), 4096), "disk", width=80, colour=False))
    cells = "".join(line[10:] for line in lines[1 : lines.index("")])
    for glyph in "#b c0.".replace(" ", ""):
        assert glyph in cells
    legend = "\n".join(lines[lines.index("") :])
    for word in CLASSES:
        assert word in legend
    assert max(map(len, lines)) <= 80
    assert not any("\x1b" in line for line in lines)
    assert any("\x1b[" in line for line in drawing(tally(mixed(), 4096), "disk", width=80, colour=True))


def test_like_rows_are_drawn_once() -> None:
    lines = list(drawing(tally(Zero(1 << 40), 4096), "disk", width=80, colour=False))
    assert any("more rows like that" in line for line in lines)
    assert len(lines) < 8


def test_an_empty_disk(tmp_path: Path) -> None:
    (tmp_path / "none.raw").touch()
    assert "0 B" in dm("map", tmp_path / "none.raw").ok().out
    assert dm("map", "--json", tmp_path / "none.raw").ok().json == {"virtual_size": 0, "extents": []}
    dm("map", "--plot", tmp_path / "none.png", tmp_path / "none.raw").ok()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk <&>.raw"
    with open(path, "wb") as file:
        file.write(data("map", 3 * MIB))
        file.seek(10 * MIB)
        file.write(data("more", 200 * KIB))
        file.truncate(32 * MIB)
    return path


def test_plot_svg(disk: Path, tmp_path: Path) -> None:
    done = dm("map", "--plot", tmp_path / "a.svg", disk).ok()
    assert "a.svg" in done.out
    root = ET.parse(tmp_path / "a.svg").getroot()
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert any("disk <&>.raw" in text for text in texts)
    assert "data" in texts and "not allocated" in texts
    width, height = int(root.attrib["width"]), int(root.attrib["height"])
    rects = [{key: int(value) for key, value in r.attrib.items() if key != "fill"} for r in root.iter(f"{SVG}rect")]
    assert len(rects) > 4096
    assert all(r["x"] + r["width"] <= width and r["y"] + r["height"] <= height and r["height"] > 0 for r in rects)


def test_plot_png(disk: Path, tmp_path: Path) -> None:
    from PIL import Image

    dm("map", "-q", "--plot", tmp_path / "a.png", disk).ok()
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        colours = {image.getpixel((x, y)) for x in range(84, 800, 3) for y in range(56, 800, 3)}
    assert (0x1B, 0x7F, 0x5C) in colours and (0xEE, 0xF1, 0xF4) in colours


def test_plot_does_not_overwrite(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("precious")
    done = dm("map", "--plot", tmp_path / "a.svg", disk)
    assert done.status == 1 and "--force" in done.err
    assert (tmp_path / "a.svg").read_text() == "precious"
    dm("map", "--force", "--plot", tmp_path / "a.svg", disk).ok()
    assert (tmp_path / "a.svg").read_text().startswith("<svg")


def test_listing_and_json_agree_with_qemu(disk: Path, tmp_path: Path) -> None:
    import json

    image = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", disk, image)
    theirs = json.loads(run("qemu-img", "map", "--output=json", image).stdout)
    ours = dm("map", "--json", image).ok().json["extents"]
    plain = [(e["start"], e["length"], e["offset"]) for e in ours if e["kind"] == "data"]
    assert plain == [(e["start"], e["length"], e["offset"]) for e in theirs if e["data"]]
    listing = dm("map", "-v", image).ok().out
    for start, length, offset in plain:
        assert any(
            line.split()[:2] == [str(start), str(length)] and f"at {offset}" in line for line in listing.splitlines()
        )


def test_compressed_data_names_its_codec(disk: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.raw"
    text.write_bytes(b"a line that packs well\n" * 100_000)
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", text, tmp_path / "a.qcow2")
    rows = dm("map", "--json", tmp_path / "a.qcow2").ok().json["extents"]
    assert {r["codec"] for r in rows if r["kind"] == "data"} == {"zstd"}
    assert "compressed data" in dm("map", tmp_path / "a.qcow2").ok().out


def test_a_damaged_map_prints_no_half_of_an_object(disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", disk, image)
    with open(image, "r+b") as file:
        file.truncate(image.stat().st_size - MIB)
    done = dm("map", "--json", image)
    assert done.status == 1 and done.json["error"]["kind"] == "format"


def stored(name: Path, *words: object) -> set[tuple[str | None, bool]]:
    """The files that a map says of data, and whether it says an offset."""
    extents = dm("map", "--json", *words, name).ok().json["extents"]
    return {(one["file"], one["offset"] is not None) for one in extents if one["kind"] == "data"}


def test_no_place_is_said_of_what_is_not_stored_as_it_is(tmp_path: Path) -> None:
    """Encrypted and compressed images store no byte of the disk as it is."""
    disk, key, luks, aes = (tmp_path / name for name in ("a.raw", "key", "luks.qcow2", "aes.qcow2"))
    disk.write_bytes(data("map", MIB))
    key.write_bytes(b"secret")
    secret = f"secret,id=s,file={key}"
    run(
        "qemu-img",
        "create",
        "-q",
        "--object",
        secret,
        "-f",
        "luks",
        "-o",
        "key-secret=s,iter-time=10",
        tmp_path / "v",
        "1M",
    )
    dm("convert", "-o", "encrypt.format=luks", "--target-passphrase-file", key, disk, luks).ok()
    run(
        "qemu-img", "convert", "--object", secret, "-O", "qcow2",
        "-o", "encrypt.format=aes,encrypt.key-secret=s", disk, aes,
    )  # fmt: skip
    run("gzip", "-k", disk)
    nowhere = {(None, False)}
    assert stored(tmp_path / "v", "-f", "luks", "--passphrase-file", key) == nowhere
    assert stored(luks, "--passphrase-file", key) == nowhere
    assert stored(aes, "--passphrase-file", key) == nowhere
    assert stored(tmp_path / "a.raw.gz") == nowhere
    assert stored(disk) == {(str(disk), True)}
