"""`resize` in place: tables changed where they have room, nothing else of the file touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from clikit import dm

import diskmorph
from diskmorph.convert import growing
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import DiskmorphError, PolicyError
from diskmorph.formats.locking import lock_for_writing
from diskmorph.formats.policy import Parents
from diskmorph.formats.registry import open_disk
from diskmorph.formats.vhdx.schema import HEADER_SIZE, HEADERS_AT, sealed

from testkit import KIB, MIB, content, data, qemu_same, run

GIB = 1 << 30
PEER = {"raw": "raw", "qcow2": "qcow2", "vdi": "vdi", "vhdx": "vhdx", "vhd": "vpc"}
GROWING = ["raw", "qcow2", "qcow2 compat=0.10", "qcow2 extended_l2=on", "qcow2 cluster_size=2M", "vdi", "vhdx",
           "vhdx block_size=1M", "vhd subformat=fixed"]  # fmt: skip


def made(folder: Path, how: str, size: int = 5 * MIB, *, by: str = "diskmorph") -> Path:
    """An image with data at both ends, written here or by QEMU; its content lies in `in.raw`."""
    kind, _, words = how.partition(" ")
    source, image = folder / "in.raw", folder / f"a.{kind}"
    source.write_bytes(data("growing", MIB) + bytes(size - 2 * MIB) + data("end", MIB))
    options = ("-o", words) if words else ()
    if by == "diskmorph":
        dm("convert", "-O", kind, *options, source, image).ok()
        return image
    exact = ("-o", "force_size=on") if kind == "vhd" else ()
    run("qemu-img", "convert", "-f", "raw", "-O", PEER[kind], *options, *exact, source, image)
    return image


@pytest.mark.parametrize("by", ["diskmorph", "qemu-img"])
@pytest.mark.parametrize("how", GROWING)
def test_the_file_stays_and_the_disk_is_larger(how: str, by: str, tmp_path: Path) -> None:
    image = made(tmp_path, how, by=by)
    inode, blocks = image.stat().st_ino, image.stat().st_blocks
    report = diskmorph.resize(image, 40 * MIB)
    assert image.stat().st_ino == inode
    assert image.stat().st_blocks <= blocks + 8 * 8
    assert report.bytes.skipped == report.virtual_size == 40 * MIB
    assert report.stored_size == image.stat().st_size
    assert not report.lost
    assert [one.name for one in tmp_path.iterdir() if "journal" in one.name] == []
    os.truncate(tmp_path / "in.raw", 40 * MIB)
    with open_disk(image) as disk:
        assert disk.size == 40 * MIB
        assert content(disk) == (tmp_path / "in.raw").read_bytes()
    qemu_same(tmp_path / "in.raw", image, PEER[how.partition(" ")[0]])
    assert dm("check", image).status == 0
    if how.startswith("qcow2"):
        run("qemu-img", "check", image)


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vhdx"])
def test_peers_write_into_what_has_been_added(format: str, tmp_path: Path) -> None:
    image = made(tmp_path, format)
    inode = image.stat().st_ino
    diskmorph.resize(image, 3 * GIB)
    assert image.stat().st_ino == inode
    run("qemu-io", "-f", PEER[format], image, "-c", "write -P 9 2G 1M", "-c", f"write -P 8 {5 * MIB} 4k")
    with open_disk(image) as disk:
        assert disk.read(2 * GIB, MIB) == bytes([9]) * MIB
        assert disk.read(5 * MIB, 8 * KIB) == bytes([8]) * 4 * KIB + bytes(4 * KIB)
        assert disk.read(0, MIB) == data("growing", MIB)
    assert dm("check", image).status == 0


@pytest.mark.parametrize("how", ["qcow2 cluster_size=512", "vhd", "vmdk", "vdi static=on", "vhdx subformat=fixed"])
def test_what_has_no_room_is_written_anew(how: str, tmp_path: Path) -> None:
    image = made(tmp_path, how)
    inode = image.stat().st_ino
    diskmorph.resize(image, 40 * MIB)
    assert image.stat().st_ino != inode
    with open_disk(image) as disk:
        assert content(disk) == (tmp_path / "in.raw").read_bytes() + bytes(35 * MIB)


def test_an_l1_table_with_something_behind_it_is_not_extended(tmp_path: Path) -> None:
    image = made(tmp_path, "qcow2 cluster_size=4k")
    with image.open("r+b") as file:
        head = file.read(48)
        at, count = int.from_bytes(head[40:48], "big"), int.from_bytes(head[36:40], "big")
        file.seek(at + count * 8)
        file.write(b"\0\0\0\0\0\1\0\0")
    inode = image.stat().st_ino
    diskmorph.resize(image, 40 * MIB)
    assert image.stat().st_ino != inode
    with open_disk(image) as disk:
        assert not any(disk.read(5 * MIB, 35 * MIB))


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vhdx"])
def test_data_behind_the_old_end_does_not_come_to_light(format: str, tmp_path: Path) -> None:
    """The last unit of a disk may hold anything behind the disk's end."""
    image = made(tmp_path, format, 5 * MIB + 512)
    whole = image.read_bytes()
    at = whole.rindex(data("end", MIB)[-512:])
    with image.open("r+b") as file:
        file.seek(at + 512)
        file.write(b"secret" * 10)
    inode = image.stat().st_ino
    diskmorph.resize(image, 40 * MIB)
    assert image.stat().st_ino != inode
    with open_disk(image) as disk:
        assert content(disk) == (tmp_path / "in.raw").read_bytes() + bytes(35 * MIB - 512)


def test_snapshots_stay_and_keep_their_size(tmp_path: Path) -> None:
    image = made(tmp_path, "qcow2")
    run("qemu-img", "snapshot", "-c", "monday", image)
    run("qemu-io", "-f", "qcow2", image, "-c", "write -P 9 0 1M")
    diskmorph.resize(image, 40 * MIB)
    run("qemu-img", "check", image)
    with open_disk(image) as disk:
        assert disk.size == 40 * MIB
        assert disk.read(0, MIB) == bytes([9]) * MIB
    dm("snapshot", image, "--extract", "monday", tmp_path / "then.raw").ok()
    assert (tmp_path / "then.raw").read_bytes() == (tmp_path / "in.raw").read_bytes()


def test_an_encrypted_image_stays_encrypted(tmp_path: Path) -> None:
    image, options = tmp_path / "a.qcow2", {"encrypt.format": "luks", "encrypt.iter-time": "20"}
    (tmp_path / "in.raw").write_bytes(data("growing", MIB))
    words = ConvertOptions(format_options=options, target_passphrase=b"secret")
    diskmorph.convert(tmp_path / "in.raw", image, options=words)
    parents = Parents(passphrase=b"secret")
    assert not diskmorph.resize(image, 9 * MIB, options=ConvertOptions(parents=parents)).lost
    assert data("growing", MIB)[:4096] not in image.read_bytes()
    with open_disk(image, parents=parents) as disk:
        assert content(disk) == data("growing", MIB) + bytes(8 * MIB)


@pytest.mark.parametrize("below", [4 * MIB, 6 * MIB])
def test_an_overlay_shows_no_more_of_its_base(below: int, tmp_path: Path) -> None:
    base, over = tmp_path / "base.qcow2", tmp_path / "over.qcow2"
    (tmp_path / "in.raw").write_bytes(b"abc!" * (below // 4))
    diskmorph.convert(tmp_path / "in.raw", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", over, "5M")
    done = dm("resize", "--allow-parent", tmp_path, over, "40M")
    if below > 5 * MIB:
        assert done.status == 1 and "overlay" in done.err
        return
    done.ok()
    run("qemu-img", "check", over)
    with open_disk(over, parents=Parents.of(tmp_path)) as disk:
        assert content(disk) == (tmp_path / "in.raw").read_bytes() + bytes(36 * MIB)


def test_a_link_is_followed_where_nothing_is_replaced(tmp_path: Path) -> None:
    image, link = made(tmp_path, "qcow2"), tmp_path / "link"
    link.symlink_to(image.name)
    diskmorph.resize(link, 40 * MIB)
    assert link.is_symlink()
    with open_disk(image) as disk:
        assert disk.size == 40 * MIB


def test_an_image_in_use_is_refused(tmp_path: Path) -> None:
    image = made(tmp_path, "qcow2")
    before = image.read_bytes()
    fd = os.open(image, os.O_RDWR)
    try:
        lock_for_writing(fd, str(image))
        with pytest.raises(PolicyError):
            diskmorph.resize(image, 40 * MIB)
    finally:
        os.close(fd)
    assert image.read_bytes() == before


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    image = made(tmp_path, "qcow2")
    before = image.read_bytes()
    done = dm("resize", "--dry-run", "--json", image, "40M").ok()
    assert done.json["bytes"]["skipped"] == 40 * MIB
    assert image.read_bytes() == before


def test_the_log_of_a_damaged_vhdx_is_not_written_over_data(tmp_path: Path) -> None:
    """Readers do not look at an empty log's place; who writes to it must."""
    image = made(tmp_path, "vhdx block_size=1M")
    raw = bytearray(image.read_bytes())
    (bat,) = (at for at in range(MIB, 4 * MIB, MIB) if raw[at] & 7 == 6)
    block = int.from_bytes(raw[bat : bat + 8], "little") & ~0xFFFFF
    for at in HEADERS_AT:
        raw[at + 72 : at + 80] = block.to_bytes(8, "little")
        raw[at : at + HEADER_SIZE] = sealed(bytes(raw[at : at + HEADER_SIZE]))
    image.write_bytes(raw)
    diskmorph.resize(image, 40 * MIB)
    with open_disk(image) as disk:
        assert content(disk) == (tmp_path / "in.raw").read_bytes() + bytes(35 * MIB)


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vhdx"])
def test_a_file_that_ends_with_its_disk_is_written_anew(format: str, tmp_path: Path) -> None:
    image = made(tmp_path, format, 5 * MIB + 512, by="qemu-img")
    at = image.read_bytes().rindex(data("end", MIB)[-512:])
    os.truncate(image, at + 512)
    diskmorph.resize(image, 40 * MIB)
    with open_disk(image) as disk:
        assert content(disk) == (tmp_path / "in.raw").read_bytes() + bytes(35 * MIB - 512)


def test_children_of_a_vhdx_see_that_it_changed(tmp_path: Path) -> None:
    image = made(tmp_path, "vhdx")
    diskmorph.create(tmp_path / "child.vhdx", options=ConvertOptions(base=image))
    diskmorph.resize(image, 40 * MIB)
    with pytest.raises(DiskmorphError):
        open_disk(tmp_path / "child.vhdx", parents=Parents.of(tmp_path))


@pytest.mark.parametrize("numbers", [(2**64 - 1, 2**64 - 2), (2**64 - 2, 5)])
def test_sequence_numbers_that_have_no_next(numbers: tuple[int, int], tmp_path: Path) -> None:
    image = made(tmp_path, "vhdx")
    raw = bytearray(image.read_bytes())
    for at, number in zip(HEADERS_AT, numbers, strict=True):
        raw[at + 8 : at + 16] = number.to_bytes(8, "little")
        raw[at : at + HEADER_SIZE] = sealed(bytes(raw[at : at + HEADER_SIZE]))
    image.write_bytes(raw)
    inode = image.stat().st_ino
    diskmorph.resize(image, 40 * MIB)
    assert image.stat().st_ino != inode


def test_unknown_autoclear_bits_are_cleared(tmp_path: Path) -> None:
    image = made(tmp_path, "qcow2")
    with image.open("r+b") as file:
        file.seek(88)
        file.write((1 << 20 | 2).to_bytes(8, "big"))
    diskmorph.resize(image, 40 * MIB)
    assert image.read_bytes()[88:96] == bytes(8)
    run("qemu-img", "check", image)


@pytest.mark.parametrize("creator", [b"vbox", b"vs  "])
def test_qemu_sees_the_size_of_a_vhd_whoever_made_it(creator: bytes, tmp_path: Path) -> None:
    image = made(tmp_path, "vhd subformat=fixed")
    raw = bytearray(image.read_bytes())
    footer = bytearray(raw[-512:])
    footer[28:32] = creator
    footer[64:68] = bytes(4)
    footer[64:68] = (~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big")
    image.write_bytes(raw[:-512] + footer)
    diskmorph.resize(image, 40 * MIB)
    os.truncate(tmp_path / "in.raw", 40 * MIB)
    qemu_same(tmp_path / "in.raw", image, "vpc")


def test_the_same_size_is_nothing_to_do(tmp_path: Path) -> None:
    image = made(tmp_path, "vmdk")
    before, inode = image.read_bytes(), image.stat().st_ino
    assert "already" in dm("resize", "--json", image, "+0").ok().json["notes"][0]
    assert (image.read_bytes(), image.stat().st_ino) == (before, inode)


def test_every_format_named_has_its_module() -> None:
    for name in growing.WITH_TABLES:
        assert (Path(growing.__file__).parents[1] / "formats" / name / "grow.py").exists()
