"""What every Disk must do, whatever its format. A format takes part by a file in tests/contract/cases."""

import os
import random
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diskmorph.formats.disk import checked
from diskmorph.formats.errors import DiskmorphError, IntegrityError
from diskmorph.formats.extents import clip, coalesce
from diskmorph.formats.probe import FORMATS, RAW
from diskmorph.formats.source import FileSource

from testkit import CASES, contract_cases

DISKS = contract_cases("DISKS")
DISK_FORMATS = [entry for entry in (*FORMATS, RAW) if entry.kind == "disk"]


def name(entry):
    return f"{entry[0]}: {entry[1].name}"


@pytest.fixture(scope="module", params=DISKS, ids=name)
def image(request, tmp_path_factory):
    """The disk of a case, wrapped in `checked`, and the bytes that it must read as."""
    disk, want = request.param[1].disk(tmp_path_factory.mktemp("image"))
    with disk:
        yield checked(disk), want


def extents(disk, start=0, stop=None):
    batches = list(disk.extents(start, stop))
    return coalesce(np.concatenate(batches)) if batches else None


def ranges(size, count, seed):
    """Ranges of a disk: most short, some long, at odd offsets; the first byte, the last one and all."""
    rng = random.Random(seed)
    found = [(0, size), (0, min(1, size)), (max(size - 1, 0), size)]
    while len(found) < count and size:
        start = rng.randrange(size)
        length = rng.choice((1, 511, 513, 4097, 70_001, size // 3 + 1))
        found.append((start, min(start + length, size)))
    return found


@pytest.mark.parametrize("entry", DISK_FORMATS, ids=lambda entry: entry.name)
def test_every_format_takes_part(entry):
    assert entry.name in {word for word, _ in DISKS}, f"tests/contract/cases/{entry.name}.py has no DISKS"
    lays_out = entry.writes and entry.name != "iso"  # an ISO is written from a tree
    assert lays_out == (entry.name in {word for word, _ in contract_cases("ALLOCATORS")})


def test_case_files_belong_to_formats_and_cases_have_names_of_their_own():
    assert {path.stem for path in CASES.glob("*.py")} <= {entry.name for entry in DISK_FORMATS}
    assert [word for word, count in Counter(map(name, DISKS)).items() if count > 1] == []


def test_whole_content(image):
    disk, want = image
    assert disk.size == len(want)
    assert disk.read(0, disk.size) == want


def test_random_reads(image):
    disk, want = image
    for start, stop in ranges(disk.size, 53, "reads"):
        assert disk.read(start, stop - start) == want[start:stop], (start, stop)


def test_extents_of_a_part_are_the_part_of_the_extents(image):
    disk, _ = image
    if not disk.size:
        return
    whole = extents(disk)
    for start, stop in ranges(disk.size, 25, "extents"):
        part = extents(disk, start, stop)
        expected = coalesce(clip(whole, start, stop))
        assert part.tolist() == expected.tolist(), (start, stop)


def test_no_extents_of_nothing(image):
    disk, _ = image
    assert list(disk.extents(0, 0)) == []
    assert list(disk.extents(disk.size, disk.size)) == []
    assert disk.read(disk.size, 0) == b""


def test_stream(image):
    disk, want = image
    with disk.open_stream() as stream:
        pieces = iter(lambda: stream.read(99_991), b"")
        assert b"".join(pieces) == want
        middle = disk.size // 2
        assert stream.seek(middle) == middle
        assert stream.read(1000) == want[middle : middle + 1000]
        assert stream.seek(0, os.SEEK_END) == len(want)
        assert stream.read() == b""


def test_concurrent_reads(image):
    disk, want = image
    wrong = []

    def work(seed):
        try:
            for start, stop in ranges(disk.size, 16, f"thread {seed}"):
                if disk.read(start, stop - start) != want[start:stop]:
                    wrong.append((seed, start, stop))
        except BaseException as error:  # noqa: BLE001 - reported below
            wrong.append((seed, error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(("start", "length"), [(0, 1), (-1, 2), (1, 1), (1 << 40, 1)])
def test_reads_beyond_the_end_are_refused(image, start, length):
    disk, _ = image
    with pytest.raises(DiskmorphError):
        disk.read_into(disk.size + start, memoryview(bytearray(length)))
    with pytest.raises(DiskmorphError):
        disk.extents(disk.size + start, disk.size + start + length)


@pytest.mark.parametrize("entry", DISKS, ids=name)
def test_closing_gives_every_file_back_and_changes_are_noticed(entry, tmp_path):
    disk, _ = entry[1].disk(tmp_path)
    disk.read(0, disk.size)
    disk.verify_unchanged()
    paths = {source.path for source in disk.files if isinstance(source, FileSource) and source.path}
    for path in sorted(paths)[:1]:
        os.utime(path, (1, 1))
        with pytest.raises(IntegrityError):
            disk.verify_unchanged()
    disk.close()
    disk.close()
    held = [link for link in map(_target, Path("/proc/self/fd").iterdir()) if link.startswith(str(tmp_path))]
    assert held == []


def _target(link):
    try:
        return os.readlink(link)
    except OSError:
        return ""
