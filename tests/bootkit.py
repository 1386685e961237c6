"""What tests of booting share: a container image with a known line, a kernel and a distribution from Debian's archive,
and a machine under emulation whose serial port is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ocikit import docker_archive
from treekit import tar_entry, tar_file

from testkit import run

MARKER = b"""#!/bin/sh
echo
echo "MARKER uid=$(id -u) gid=$(id -g) groups=$(id -G) pwd=$(pwd) n=$# <$1><$2> <$GREETING>"
exit 7
"""
LINE = 'MARKER uid=1000 gid=1000 groups=1000 27 pwd=/srv/app n=2 <first arg><it\'s> <hello "me" $HOME>'
CONFIG = {
    "Env": ["PATH=/usr/bin:/bin", 'GREETING=hello "me" $HOME'],
    "Entrypoint": ["/bin/marker", "first arg"],
    "Cmd": ["it's"],
    "WorkingDir": "/srv/app",
    "User": "app",
}
OVMF = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
BUSYBOX = Path("/bin/busybox")


def tiny_layer(marker: bytes = MARKER) -> bytes:
    """A root file system of one static busybox with a user `app`."""
    entries = [tar_entry(f"{name}/", type=b"5", mode=0o755) for name in ("bin", "dev", "etc", "proc", "sys", "run")]
    entries += [tar_entry("tmp/", type=b"5", mode=0o1777), tar_entry("srv/app/", type=b"5", mode=0o755, uid=1000)]
    entries += [tar_entry("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)]
    entries += [
        tar_entry(f"bin/{name}", type=b"2", link="busybox") for name in ("sh", "id", "echo", "pwd", "sleep", "df")
    ]
    entries += [
        tar_entry("etc/passwd", b"root:x:0:0:root:/:/bin/sh\napp:x:1000:1000::/srv/app:/bin/sh\n"),
        tar_entry("etc/group", b"root:x:0:\napp:x:1000:\nextra:x:27:app\n"),
        tar_entry("bin/marker", marker, mode=0o755),
        tar_entry(".dockerenv"),
    ]
    return tar_file(*entries)


def tiny_image(path: Path, marker: bytes = MARKER, **config: Any) -> Path:
    return docker_archive(path, [tiny_layer(marker)], config={**CONFIG, **config})


def _cached(name: str, make: Any) -> Path:
    home = Path(tempfile.gettempdir()) / "diskmorph-tests"
    home.mkdir(exist_ok=True)
    path = home / name
    if not path.exists():
        part = home / f".{name}.{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(path)
    return path


def kernel_package() -> Path:
    """Debian's kernel for virtual machines, as its package; downloaded once."""

    def make(folder: Path) -> None:
        folder.mkdir(mode=0o777)
        folder.chmod(0o777)
        text = run("apt-cache", "depends", "linux-image-cloud-amd64").stdout
        name = next(line.split()[1] for line in text.splitlines() if "Depends: linux-image" in line)
        subprocess.run(["apt-get", "download", name], cwd=folder, check=True, capture_output=True)

    return next(_cached("kernel", make).glob("*.deb"))


def debian() -> Path:
    """A whole Debian with kernel, systemd and GRUB, as a tar; made once."""
    packages = "linux-image-cloud-amd64,systemd-sysv,udev,dbus,grub-pc-bin,grub-efi-amd64-bin,e2fsprogs,busybox-static"
    words = ("mmdebstrap", "--variant=minbase", "--format=tar", f"--include={packages}", "bookworm")
    return _cached("debian.tar", lambda path: run(*words, path))


def machine(
    disk: Path | str,
    format: str,
    *,
    until: str,
    seconds: float,
    uefi: bool = False,
    ends: bool = False,
    keep: bool = False,
    press: str = "",
    more: tuple[str, ...] = (),
) -> str:
    """Start a machine and return what its serial port said up to `until` (or, with `ends`, to its power-off).

    When it has said `press`, its power button is pressed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "serial"
        log.touch()
        words = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "1024"]
        words += ["-smp", "2", "-display", "none", "-monitor", "stdio", "-serial", f"file:{log}", "-no-reboot"]
        words += ["-nic", "user,model=virtio-net-pci"]
        if uefi:
            shutil.copy(OVMF[1], Path(scratch) / "vars")
            words += ["-drive", f"if=pflash,format=raw,readonly=on,file={OVMF[0]}"]
            words += ["-drive", f"if=pflash,format=raw,file={scratch}/vars"]
        words += ["-drive", f"file={disk},format={format},if=virtio" + ("" if keep else ",snapshot=on"), *more]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline and child.poll() is None:
                if press and press in log.read_text("utf-8", "replace"):
                    press = ""
                    child.stdin.write(b"system_powerdown\n")  # type: ignore[union-attr]
                    child.stdin.flush()  # type: ignore[union-attr]
                if until in log.read_text("utf-8", "replace") and not ends:
                    break
                time.sleep(0.2)
        finally:
            ended = child.poll()
            child.kill()
            errors = child.communicate()[1].decode("utf-8", "replace")
        text = log.read_text("utf-8", "replace")
    assert until in text, f"no {until!r} within {seconds} s: {errors[-300:]} {text[-800:]!r}"
    assert not ends or ended == 0, f"the machine did not power off: {text[-300:]!r}"
    return text


def info(path: Path) -> dict[str, Any]:
    return json.loads(run("qemu-img", "info", "--output=json", path).stdout)  # type: ignore[no-any-return]
