"""A distribution's tree as a machine: fstab, host name, machine-id, network, serial console, keys."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.bridge.facts import read_text
from diskmorph.formats.errors import OptionError
from diskmorph.formats.tree import Node, Tree, dir_node, file_node, link_node

if TYPE_CHECKING:
    from diskmorph.convert.bridge.injected import Injector

_INITS = ("sbin/init", "usr/sbin/init", "usr/lib/systemd/systemd", "lib/systemd/systemd", "init")
_SYSTEMD = ("usr/lib/systemd/systemd", "lib/systemd/systemd")
_KEPT_TYPES = (
    "tmpfs",
    "proc",
    "sysfs",
    "nfs",
    "nfs4",
    "cifs",
    "9p",
    "virtiofs",
    "overlay",
    "ramfs",
    "hugetlbfs",
    "bind",
)
_OURS = ("/", "/boot", "/boot/efi", "none", "swap")
_KEYS = ("ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-", "no-", "restrict", "command=", "from=", "cert-authority")
_NETWORK = "[Match]\nType=ether\n\n[Network]\nDHCP=yes\n\n[DHCPv4]\nUseDomains=yes\n"
_LEFT_BY_ENGINES = (".dockerenv", "run/.containerenv")
_LONGEST_HOST = 64


def find_init(tree: Tree) -> str | None:
    """Return the path of an init that can start a system; None where there is none.

    Busybox counts only where something tells it what to start: its init alone is in many images that run one program.
    """
    for path in _INITS:
        node = tree.find(path)
        if node is None or node.kind != stat.S_IFREG or not node.mode & 0o111:
            continue
        link = tree.find(path, follow=False)
        target = link.target if link is not None and link.kind == stat.S_IFLNK else b""
        told = tree.find("sbin/openrc") is not None or tree.find("etc/init.d/rcS") is not None
        if told or not target.rsplit(b"/", 1)[-1].startswith(b"busybox"):
            return "/" + path
    return None


def put_common(
    inject: Injector, tree: Tree, hostname: str | None, keys: tuple[str, ...], fstab: str, mtime: int
) -> None:
    """Put what every machine gets, and take away what container engines left."""
    for path in _LEFT_BY_ENGINES:
        inject.remove(path)
    policy = read_text(tree, "usr/sbin/policy-rc.d")
    if policy is not None and "exit 101" in policy:
        inject.remove("usr/sbin/policy-rc.d")  # it keeps services from being started
    inject.put("etc/fstab", file_node(fstab.encode(), mtime=mtime))
    name = _host_name(tree, hostname)
    inject.put("etc/hostname", file_node(f"{name}\n".encode(), mtime=mtime))
    if not (read_text(tree, "etc/hosts") or "").strip():
        lines = f"127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\n"
        inject.put("etc/hosts", file_node(lines.encode(), mtime=mtime))
    if keys:
        _put_keys(inject, tree, keys, mtime)


def _host_name(tree: Tree, hostname: str | None) -> str:
    if hostname is not None:
        words = hostname.split(".")
        if len(hostname) > _LONGEST_HOST or not all(w and w.replace("-", "a").isalnum() and w.isascii() for w in words):
            raise OptionError(f"--hostname {hostname!r} is no host name", hint="letters, digits and hyphens")
        return hostname
    return (read_text(tree, "etc/hostname") or "").strip() or "localhost"


def _put_keys(inject: Injector, tree: Tree, keys: tuple[str, ...], mtime: int) -> None:
    home = "root"
    old = read_text(tree, f"{home}/.ssh/authorized_keys") or ""
    lines = [line for key in keys for line in _key_lines(key)]
    if tree.find(home) is None:
        inject.put(home, dir_node(0o700, mtime=mtime))
    if tree.find(f"{home}/.ssh") is None:
        inject.put(f"{home}/.ssh", dir_node(0o700, mtime=mtime))
    text = old + ("\n" if old and not old.endswith("\n") else "") + "".join(f"{line}\n" for line in lines)
    inject.put(f"{home}/.ssh/authorized_keys", file_node(text.encode(), 0o600, mtime=mtime))


def _key_lines(key: str) -> list[str]:
    """Return the lines of a key, or of a file of keys."""
    if key.startswith(_KEYS) and " " in key:
        return [key.strip()]
    path = Path(key.removeprefix("@"))
    if not path.is_file() or path.stat().st_size > 1 << 20:
        raise OptionError(f"--ssh-key {key!r} is neither a public key nor a file of them")
    lines = [line.strip() for line in path.read_text("utf-8", "replace").splitlines()]
    if any("PRIVATE KEY" in line for line in lines):
        raise OptionError(f"{path} is a private key", hint=f"the public one is often {path}.pub")
    return [line for line in lines if line and not line.startswith("#")]


def fstab_text(tree: Tree, root: str, esp: str | None) -> str:
    """Return an fstab: the root and the ESP by UUID, and the tree's own lines for what is no disk."""
    lines = [f"UUID={root} / ext4 defaults,errors=remount-ro 0 1"]
    if esp is not None:
        lines.append(f"UUID={esp} /boot/efi vfat noauto,umask=0077 0 0")
    for line in (read_text(tree, "etc/fstab") or "").splitlines():
        fields = line.split()
        if len(fields) < 4 or fields[0].startswith("#") or fields[1] in _OURS:
            continue
        if fields[2] in _KEPT_TYPES or "bind" in fields[3].split(","):
            lines.append(line.strip())
    return "\n".join(lines) + "\n"


def put_distribution(inject: Injector, tree: Tree, notes: list[str], mtime: int) -> None:
    """Put what a system with an init of its own needs: a machine-id to be made, DHCP, a login on the serial port."""
    if any(tree.find(path) is not None for path in _SYSTEMD):
        inject.put("etc/machine-id", file_node(b"uninitialized\n", 0o444, mtime=mtime))
        _put_networkd(inject, tree, notes, mtime)
        return
    text = read_text(tree, "etc/inittab")
    if text is not None:
        inject.put("etc/inittab", file_node(_with_serial(text).encode(), mtime=mtime))
    if tree.find("etc/network") is not None and not (read_text(tree, "etc/network/interfaces") or "").strip():
        lines = b"auto lo\niface lo inet loopback\n\nauto eth0\niface eth0 inet dhcp\n"
        inject.put("etc/network/interfaces", file_node(lines, mtime=mtime))
    if tree.find("etc/init.d/networking") is not None and tree.find("etc/runlevels") is not None:
        _link(inject, tree, "etc/runlevels/boot/networking", b"/etc/init.d/networking", mtime)


def _with_serial(text: str) -> str:
    """Return an inittab with a login on the serial port."""
    lines = [line for line in text.splitlines() if not line.lstrip("#").strip().startswith("ttyS0:")]
    if any("ttyS0" in line and not line.startswith("#") for line in lines):
        return text
    busybox = any(line.startswith("::") for line in lines)
    getty = (
        "ttyS0::respawn:/sbin/getty -L ttyS0 115200 vt100"
        if busybox
        else "S0:2345:respawn:/sbin/getty -L ttyS0 115200 vt100"
    )
    return "\n".join([*lines, getty]) + "\n"


def _put_networkd(inject: Injector, tree: Tree, notes: list[str], mtime: int) -> None:
    others = (
        "usr/sbin/NetworkManager",
        "usr/bin/cloud-init",
        "usr/sbin/netplan",
        "usr/sbin/wicked",
        "sbin/ifup",
        "usr/sbin/ifup",
    )
    has_ifupdown = any(tree.find(path) for path in others[-2:]) and "dhcp" in (
        read_text(tree, "etc/network/interfaces") or ""
    )
    if any(tree.find(path) for path in others[:4]) or has_ifupdown:
        return
    unit = next(
        (p for p in ("usr/lib/systemd/system", "lib/systemd/system") if tree.find(f"{p}/systemd-networkd.service")),
        None,
    )
    if unit is None:
        notes.append("no network: the tree has neither systemd-networkd nor NetworkManager")
        return
    if not _configured(tree):
        inject.put("etc/systemd/network/80-dhcp.network", file_node(_NETWORK.encode(), mtime=mtime))
    wanted = {"multi-user.target.wants/systemd-networkd.service": "systemd-networkd.service",
              "sockets.target.wants/systemd-networkd.socket": "systemd-networkd.socket",
              "dbus-org.freedesktop.network1.service": "systemd-networkd.service"}  # fmt: skip
    if tree.find(f"{unit}/systemd-resolved.service") is not None:
        wanted["multi-user.target.wants/systemd-resolved.service"] = "systemd-resolved.service"
    else:
        notes.append("names are not resolved unless /etc/resolv.conf is right: the tree has no systemd-resolved")
    for place, name in wanted.items():
        if tree.find(f"{unit}/{name}") is not None:
            _link(inject, tree, f"etc/systemd/system/{place}", f"/{unit}/{name}".encode(), mtime)


def _configured(tree: Tree) -> bool:
    folder = tree.find("etc/systemd/network")
    return folder is not None and any(name.endswith(b".network") for name in folder.children)


def _link(inject: Injector, tree: Tree, path: str, target: bytes, mtime: int) -> None:
    if tree.find(path, follow=False) is None:
        inject.put(path, link_node(target, mtime=mtime))


def mounted_folders(inject: Injector, tree: Tree, mtime: int) -> None:
    """Make the folders that an init mounts on, where they are missing."""
    for name, mode in (("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755), ("tmp", 0o1777)):
        if tree.find(name) is None:
            inject.put(name, dir_node(mode, mtime=mtime))


def copy_of(node: Node, mode: int, mtime: int) -> Node:
    """Return a file with the same content under our own owner, mode and time."""
    return Node(stat.S_IFREG | mode, mtime=mtime, size=node.size, pieces=node.pieces)
