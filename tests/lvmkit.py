"""LVM2 made by lvm2 itself on loop devices, without device-mapper: volumes are filled where lvm2 says that they lie."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, Any, Self

from testkit import run

if TYPE_CHECKING:
    from pathlib import Path

SECTOR = 512


class Lvm:
    """lvm2 that sees only the devices attached here: ranges of files. Use it in `with`; then all is written."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "lvm-home"
        self.home.mkdir()
        self.loops: list[str] = []
        self.files: dict[str, tuple[Path, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for loop in self.loops:
            run("losetup", "-d", loop)

    def attach(self, path: Path, start: int = 0, length: int | None = None) -> str:
        """Return the device of a range of a file."""
        length = path.stat().st_size - start if length is None else length
        loop = run("losetup", "--show", "-f", "-o", start, "--sizelimit", length, path).stdout.strip()
        self.loops.append(loop)
        self.files[loop] = (path, start)
        accepted = ", ".join(f'"a|^{loop}$|"' for loop in self.loops)
        (self.home / "lvm.conf").write_text(
            f'devices {{ global_filter = [ {accepted}, "r|.*|" ] use_devicesfile = 0 scan_lvs = 0\n'
            "obtain_device_list_from_udev = 0 md_component_detection = 0 }\n"
            f'global {{ locking_dir = "{self.home}" }}\n'
            "backup { backup = 0 archive = 0 }\n"
            "activation { udev_sync = 0 udev_rules = 0 monitoring = 0 }\n"
        )
        return loop

    def __call__(self, *words: Any) -> str:
        """Run an lvm2 command that needs no kernel."""
        name, *rest = (str(word) for word in words)
        env = {**os.environ, "LVM_SYSTEM_DIR": str(self.home), "LVM_SUPPRESS_FD_WARNINGS": "1"}
        command = ["lvm", name, "--driverloaded", "n", "-y", *rest]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def create(self, group: str, name: str, *words: Any) -> None:
        """Make a volume, by words that come before the group and devices that come behind it."""
        devices = [word for word in words if word in self.loops]
        options = [word for word in words if word not in self.loops]
        self("lvcreate", "-an", "-Zn", "-Wn", "-n", name, *options, group, *devices)

    def places(self, volume: str) -> list[tuple[str, int, int]]:
        """Where a linear volume lies, by lvm2's own tables: (device, byte, bytes) of each segment."""
        units = ("--noheadings", "--nosuffix", "--units", "b", "--separator", ",")
        starts = dict(line.split(",") for line in self("pvs", *units, "-o", "pv_name,pe_start").split())
        found = []
        table = self("lvs", *units, "-o", "seg_start,seg_pe_ranges,vg_extent_size", "-O", "seg_start", volume)
        for line in table.split():
            _, pe_range, size = line.split(",")
            match = re.fullmatch(r"(.*):(\d+)-(\d+)", pe_range)
            assert match is not None, pe_range
            device, first, last = match[1], int(match[2]), int(match[3])
            found.append((device, int(starts[device]) + first * int(size), (last - first + 1) * int(size)))
        return found

    def fill(self, volume: str, image: Path) -> None:
        """Lay a file system image into a volume."""
        with image.open("rb") as source:
            for device, at, length in self.places(volume):
                path, start = self.files[device]
                with path.open("r+b") as target:
                    target.seek(start + at)
                    target.write(source.read(length))
            assert not source.read(1), "the image is larger than the volume"

    def sizes(self, volume: str) -> int:
        return sum(length for _, _, length in self.places(volume))
