"""`-` as a source: standard input, where a verb can read it; where not, that is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from testkit import MIB, data, run

COMMAND = [sys.executable, "-m", "diskmorph"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path, made = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    path.write_bytes(data("stdin", MIB) + bytes(MIB))
    run("qemu-img", "convert", "-O", "qcow2", path, made)
    return made


def fed(path: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    with path.open("rb") as file:
        command = [*COMMAND, *(str(word) for word in words)]
        return subprocess.run(command, stdin=file, capture_output=True, text=True, check=False)


def test_info_and_map_read_standard_input(disk: Path) -> None:
    told = json.loads(fed(disk, "info", "--json", "-").stdout)
    assert (told["format"], told["virtual_size"]) == ("qcow2", 2 * MIB)
    extents = json.loads(fed(disk, "map", "--json", "-").stdout)["extents"]
    assert (extents[0]["start"], extents[0]["length"], extents[0]["kind"]) == (0, MIB, "data")
    assert "qcow2" in fed(disk, "info", "-").stdout and "data" in fed(disk, "map", "-").stdout


def test_standard_input_is_not_compared_with_itself(disk: Path) -> None:
    done = fed(disk, "compare", "-", "-")
    assert done.returncode == 2 and "standard input" in done.stderr
    assert fed(disk, "compare", "-", disk).returncode == 0


def test_check_says_that_it_needs_a_file(disk: Path) -> None:
    done = fed(disk, "check", "-")
    assert done.returncode == 2 and "standard input" in done.stderr
