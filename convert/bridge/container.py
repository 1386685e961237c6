"""A container image as a machine: its ENTRYPOINT and CMD as the one program, with ENV, WORKDIR and USER."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from diskmorph.convert.bridge.facts import read_text
from diskmorph.convert.bridge.initramfs import guest_script
from diskmorph.convert.bridge.launcher import Program, run_program
from diskmorph.formats.errors import OptionError
from diskmorph.formats.numbers import whole_number
from diskmorph.formats.tree import Node, Tree, dir_node, file_node

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.convert.bridge.injected import Injector

FOLDER = ".diskmorph"
INIT = "/.diskmorph/init"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # Docker's, where ENV has none
_NEEDED = (("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755), ("tmp", 0o1777), ("etc", 0o755))
_SIGNALS = ("HUP", "INT", "QUIT", "KILL", "USR1", "USR2", "TERM", "WINCH", "PWR", "CONT", "STOP")
_SIGNAL_NUMBERS = {"1": "HUP", "2": "INT", "3": "QUIT", "9": "KILL", "10": "USR1", "12": "USR2", "15": "TERM",
                   "28": "WINCH", "30": "PWR"}  # fmt: skip
_RTMIN, _LAST_SIGNAL = 34, 64
_LAST_ID = 0xFFFF_FFFE  # all ones is nobody's number


class Account(NamedTuple):
    """A user as its numbers, with its home."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def program_of(tree: Tree) -> Program | None:
    """Return what the image's configuration runs; None where it says nothing. Raises OptionError for unknown users."""
    config = settings(tree)
    arguments = [*_words(config, "Entrypoint"), *_words(config, "Cmd")]
    if not arguments:
        return None
    account = resolve_user(tree, str(config.get("User") or ""))
    environment = [word for word in _words(config, "Env") if word]
    names = {word.partition("=")[0] for word in environment}
    defaults = {"PATH": _PATH, "HOME": account.home, "TERM": "linux"}
    environment += [f"{name}={value}" for name, value in defaults.items() if name not in names]
    path = next(word.partition("=")[2] for word in environment if word.startswith("PATH="))
    first = arguments[0]
    places = [first] if "/" in first else [f"{folder or '.'}/{first}" for folder in path.split(":")]
    return Program(
        tuple(map(_bytes, places)),
        tuple(map(_bytes, arguments)),
        tuple(map(_bytes, environment)),
        _bytes(str(config.get("WorkingDir") or "/")),
        account.uid,
        account.gid,
        account.groups,
    )


def shell_of(tree: Tree) -> Program | None:
    """Return a shell as the program, for trees that say nothing; None without one."""
    if tree.find("bin/sh") is None:
        return None
    home = "/root" if tree.find("root") else "/"
    environment = (f"PATH={_PATH}".encode(), b"HOME=" + home.encode(), b"TERM=linux")
    return Program((b"/bin/sh",), (b"sh",), environment, home.encode())


def settings(tree: Tree) -> Mapping[str, object]:
    """Return the `config` of an OCI image's configuration; empty for other trees."""
    found = tree.config.get("config")
    return found if isinstance(found, dict) else {}


def put_container(inject: Injector, tree: Tree, program: Program, busybox: Node, architecture: str, mtime: int) -> None:
    """Put PID 1 and what it needs into the tree, below /.diskmorph."""
    for name, mode in _NEEDED:
        if tree.find(name) is None:
            inject.put(name, dir_node(mode, mtime=mtime))
    folder = program.directory.strip(b"/")
    if folder and b".." not in folder.split(b"/") and tree.find(folder) is None:
        inject.put(folder, dir_node(0o755, mtime=mtime))  # as container engines make it
    inject.put(FOLDER, dir_node(0o755, mtime=mtime))
    inject.put(f"{FOLDER}/busybox", Node(0o100755, mtime=mtime, size=busybox.size, pieces=busybox.pieces))
    stop = stop_signal(str(settings(tree).get("StopSignal") or "TERM"))
    inject.put(f"{FOLDER}/init", file_node(guest_script("container.sh", STOP=stop), 0o755, mtime=mtime))
    inject.put(f"{FOLDER}/dhcp", file_node(guest_script("dhcp.sh"), 0o755, mtime=mtime))
    inject.put(f"{FOLDER}/acpi/PWRF/00000080", file_node(guest_script("power.sh"), 0o755, mtime=mtime))
    inject.put(f"{FOLDER}/run", file_node(run_program(program, architecture), 0o755, mtime=mtime))


def stop_signal(text: str) -> str:
    """Return the name of a signal as `kill` takes it. Raises OptionError."""
    name = _SIGNAL_NUMBERS.get(text, text.upper().removeprefix("SIG"))
    if name in _SIGNALS:
        return name
    real_time = whole_number(name[5:].lstrip("+"), _LAST_SIGNAL - _RTMIN) if name.startswith("RTMIN") else None
    if real_time is None:
        raise OptionError(f"the image's STOPSIGNAL {text[:40]!r} is not known")
    # busybox's kill knows no RTMIN+3, which images with an init use
    return str(_RTMIN + real_time)


def resolve_user(tree: Tree, text: str) -> Account:
    """Return the numbers of a USER (name or number, with a group or without) by the tree's passwd and group.

    As container engines do: a number need not be there; other groups count only where USER names none. Raises
    OptionError for a name that is not there.
    """
    user, _, group = text.partition(":")
    user = user or "0"
    users = _table(tree, "etc/passwd", 7)
    groups = _table(tree, "etc/group", 4)
    found = next((fields for fields in users if user in (fields[0], fields[2])), None)
    uid = whole_number(found[2] if found else user, _LAST_ID)
    if uid is None:
        raise OptionError(f"the image's user {user!r} is not in its /etc/passwd")
    gid = int(found[3]) if found else 0
    home = (found[5] if found else "") or "/"
    if group:
        row = next((fields for fields in groups if group in (fields[0], fields[2])), None)
        chosen = whole_number(row[2] if row else group, _LAST_ID)
        if chosen is None:
            raise OptionError(f"the image's group {group!r} is not in its /etc/group")
        return Account(uid, chosen, (), home)
    name = found[0] if found else None
    others = [int(fields[2]) for fields in groups if name is not None and name in fields[3].split(",")]
    return Account(uid, gid, tuple(dict.fromkeys(others)), home)


def _table(tree: Tree, path: str, fields: int) -> list[list[str]]:
    """Return the rows of passwd or group whose numbers are numbers."""
    rows = [line.split(":") for line in (read_text(tree, path) or "").splitlines()]
    numeric = (2, 3) if fields == 7 else (2,)
    return [
        row for row in rows if len(row) >= fields and all(whole_number(row[at], _LAST_ID) is not None for at in numeric)
    ]


def _words(config: Mapping[str, object], name: str) -> list[str]:
    found = config.get(name)
    if isinstance(found, str):
        return ["/bin/sh", "-c", found] if name != "Env" else [found]
    return [str(word) for word in found] if isinstance(found, list) else []


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
