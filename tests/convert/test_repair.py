"""Repairs are judged on the image as it would be: what would do harm is refused, and nothing is written."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diskmorph
from diskmorph.convert import patching
from diskmorph.convert.journal import JOURNAL
from diskmorph.convert.mended import MendedSource
from diskmorph.convert.repair import plan_repair
from diskmorph.formats.check import CheckReport, Patch
from diskmorph.formats.errors import FormatError, IntegrityError, OptionError, PolicyError, TargetError
from diskmorph.formats.extents import DATA, HOLE, row
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.registry import OpenContext
from diskmorph.formats.rows import joined
from diskmorph.formats.source import BytesSource
from diskmorph.formats.views import Memory

from testkit import MIB, data, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from diskmorph.formats.source import ByteSource

BASE = bytes(range(100))
PATCHES = st.lists(st.tuples(st.integers(0, 150), st.binary(max_size=40)), max_size=8)


@given(PATCHES, st.integers(0, 200), st.integers(1, 200))
def test_mended_sources_read_as_what_is_written(patches: list[tuple[int, bytes]], offset: int, length: int) -> None:
    written = bytearray(BASE)
    for at, new in patches:
        if new:
            written.extend(bytes(max(0, at + len(new) - len(written))))
            written[at : at + len(new)] = new
    mended = MendedSource(BytesSource(BASE), [Patch(at, new, "") for at, new in patches])
    assert mended.size == len(written)
    assert mended.read_upto(offset, length) == written[offset : offset + length]
    where = set()
    for at, new in patches:
        where |= set(range(at, at + len(new)))
    starts = np.arange(160, dtype=np.uint64)
    assert mended.touches(starts, starts + np.uint64(1)).tolist() == [number in where for number in range(160)]
    covered = [at for begin, size, _ in mended.runs(0, mended.size) for at in range(begin, begin + size)]
    assert covered == list(range(mended.size))


class Made:
    """A format of one byte a check: byte 0 counts the corruptions, byte 1 says how to mend, byte 2 is data from 50 on."""

    def __init__(self, *patches: Patch) -> None:
        self._patches = patches

    def check_image(self, source: ByteSource, context: OpenContext, repair: str | None = None) -> CheckReport:
        del context
        report = CheckReport("made")
        wrong = source.read(0, 1)[0]
        if wrong == 255:
            raise FormatError("cannot be read")
        for number in range(wrong):
            report.add("byte", number, "is wrong")
        if repair and wrong:
            report.patches += self._patches
        return report

    def open_image(self, source: ByteSource, context: OpenContext) -> MadeDisk:
        del context
        return MadeDisk(source)


class MadeDisk:
    """50 bytes of data, unless byte 2 says that they are not there."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self.files = (source,)

    def extents(self) -> Iterator[NDArray[np.void]]:
        kind = DATA if self._source.read(2, 1)[0] else HOLE
        yield joined([row(0, 10, kind, offset=50), row(10, 40, DATA, offset=60)])


def plan(*patches: Patch, wrong: int = 1) -> list[Patch]:
    source = BytesSource(bytes([wrong, 1, 1]) + bytes(97))
    context = OpenContext(Opener(Parents()))
    module = Made(*patches)
    return plan_repair(module, source, context, "all", module.check_image(source, context, "all"))  # type: ignore[arg-type]  # Made stands for a format


def test_all_rounds_of_a_repair_are_planned() -> None:
    one, two = Patch(0, b"\0", "mended"), Patch(1, b"\7", "mended too")
    assert plan(one, two) == [one, two]
    assert plan(wrong=0) == []


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (Patch(0, b"\2", "worse"), "leave more wrong"),
        (Patch(0, b"\xff", "broken"), "leave more wrong"),
        (Patch(1, b"\2", "useless"), "not come to an end"),
        (Patch(0, b"\0\0\0", "loses data"), "data at 0 would be lost"),
        (Patch(99, b"\1", "over data"), "written over"),
    ],
)
def test_harm_is_refused(patch: Patch, words: str) -> None:
    mends = Patch(0, b"\0", "mended")
    with pytest.raises(IntegrityError, match=words):
        plan(*([mends] if patch.offset == 99 else []), patch)


# --- in place


def wounded(path: Path) -> bytes:
    """A qcow2 with a refcount that is too high."""
    diskmorph.convert(Memory(data(1, MIB)), path)
    blob = bytearray(path.read_bytes())
    table = int.from_bytes(blob[48:56], "big")
    block = int.from_bytes(blob[table : table + 8], "big")
    blob[block + 3] = 2
    path.write_bytes(blob)
    return bytes(blob)


def test_images_in_use_are_not_repaired_in_place(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    before = wounded(image)
    with pytest.raises(OptionError, match="in use"):
        diskmorph.check(image, repair="all", parents=Parents(shared=True))
    assert diskmorph.check(image, repair="all", parents=Parents(shared=True), output=tmp_path / "b.qcow2").clean
    assert image.read_bytes() == before


def test_who_begins_to_write_during_the_check_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "a.qcow2"
    wounded(image)
    lock = patching.lock_for_writing
    writers: list[subprocess.Popen[bytes]] = []

    def late(fd: int, name: str) -> None:
        writer = subprocess.Popen(["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        writers.append(writer)
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"write -P 9 0 4k\n")
        writer.stdin.flush()
        writer.stdout.readline()
        lock(fd, name)

    monkeypatch.setattr(patching, "lock_for_writing", late)
    try:
        with pytest.raises(PolicyError, match="in use"):
            diskmorph.check(image, repair="all")
    finally:
        writers[0].communicate()
    assert not (tmp_path / f"a.qcow2{JOURNAL}").exists()


def test_nobody_writes_while_an_image_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "a.qcow2"
    wounded(image)
    apply = patching._apply
    refused: list[str] = []

    def watched(fd: int, patches: list[Patch]) -> None:
        done = subprocess.run(["qemu-io", "-c", "write 0 4k", image], capture_output=True, text=True, check=False)
        refused.append(done.stderr)
        apply(fd, patches)

    monkeypatch.setattr(patching, "_apply", watched)
    assert diskmorph.check(image, repair="all").clean
    assert "lock" in refused[0]
    run("qemu-io", "-c", "write 0 4k", image)


def test_a_journal_that_cannot_be_written_leaves_no_half_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, journal = tmp_path / "a.qcow2", tmp_path / f"a.qcow2{JOURNAL}"
    before = wounded(image)
    write = os.write

    def full(fd: int, text: bytes) -> int:
        if len(text) > 20:
            return write(fd, text[:20])
        raise OSError(errno.ENOSPC, "no room")

    for earlier in (None, b'{"repair": "all"}\n'):
        if earlier is not None:
            journal.write_bytes(earlier)
        with monkeypatch.context() as patched, pytest.raises(TargetError, match="journal"):
            patched.setattr(os, "write", full)
            diskmorph.check(image, repair="all")
        assert (journal.read_bytes() if journal.exists() else None) == earlier
        assert image.read_bytes() == before


# --- into a copy


def test_a_copy_is_the_whole_image_or_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", tmp_path / "a.vmdk", "1M")
    with pytest.raises(OptionError, match="several files"):
        diskmorph.check(tmp_path / "a.vmdk", repair="all", output=elsewhere / "b.vmdk")
    diskmorph.convert(Memory(data(1, MIB)), tmp_path / "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "over.qcow2")
    with pytest.raises(OptionError, match="own folder"):
        diskmorph.check(tmp_path / "over.qcow2", repair="all", output=elsewhere / "b.qcow2")
    assert list(elsewhere.iterdir()) == []
    assert diskmorph.check(tmp_path / "over.qcow2", repair="all", output=tmp_path / "b.qcow2").clean
