"""Words that several verbs take: output, sources, targets, and those of qemu-img that mean something else here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.policy import Parents


def add_output(parser: argparse.ArgumentParser, *, progress: bool = True) -> None:
    """Add --json, -q, -v and, for verbs that take their time, --progress."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object (docs/json.md)")
    group.add_argument("--output", choices=("human", "json"), action=_OutputWord, help=argparse.SUPPRESS)
    group.add_argument("-q", "--quiet", action="store_true", help="say nothing but results and errors")
    group.add_argument("-v", "--verbose", action="count", default=0, help="say more; -vv adds tracebacks to errors")
    if progress:
        group.add_argument(
            "--progress",
            choices=("auto", "bar", "json", "none"),
            default="auto",
            help="auto: a bar on a terminal, else nothing; json: an object a line on standard error",
        )
        group.add_argument("-p", dest="progress", action="store_const", const="bar", help="same as --progress bar")


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add what says how an image is read: -f, --allow-parent, --backing, -U."""
    group = parser.add_argument_group("source")
    group.add_argument("-f", "--format", metavar="FMT", help="the source's format (default: by its content)")
    add_parents(group)


def add_parents(group: argparse._ArgumentGroup) -> None:
    """Add --allow-parent, --backing and -U."""
    group.add_argument(
        "--allow-parent",
        action="append",
        default=[],
        metavar="DIR",
        help="open parents, backing and extent files that the image names in this folder; repeatable",
    )
    group.add_argument("--backing", metavar="FILE", help="the image's parent, whatever it says itself")
    group.add_argument(
        "--passphrase-file", metavar="FILE", help="what opens an encrypted image (a newline at its end is left out)"
    )
    group.add_argument(
        "-U", "--force-share", action="store_true", help="read an image although a running process has locked it"
    )


def add_partition(group: argparse._ActionsContainer, *, more: str = "instead of the root that is found") -> None:
    """Add --partition: a number, or a logical volume as GROUP/NAME."""
    group.add_argument(
        "--partition",
        type=_partition,
        metavar="N",
        help=f"this partition, or logical volume (GROUP/NAME), {more}",
    )


def _partition(word: str) -> int | str:
    if "/" in word:
        return word
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a number nor GROUP/NAME") from None


def add_target(parser: argparse.ArgumentParser, *, rewrites: bool = False) -> None:
    """Add what says how a target appears: --force, --no-sync, --reproducible, --dry-run.

    `rewrites`: the verb may change an image in place.
    """
    group = parser.add_argument_group("target")
    group.add_argument("--force", action="store_true", help="replace an existing target")
    group.add_argument("--no-sync", action="store_true", help="leave writing back to the kernel, as qemu-img does")
    group.add_argument(
        "--reproducible",
        action="store_true",
        help="same content, same bytes: times from SOURCE_DATE_EPOCH, identifiers from the content",
    )
    what = "change nothing" if rewrites else "write nothing"
    group.add_argument("--dry-run", action="store_true", help=f"{what}; tell what would happen")


def parents_of(args: argparse.Namespace) -> Parents:
    """Return what the words allow an image to open."""
    from diskmorph.formats.policy import Parents

    return Parents(
        allow=tuple(Path(directory) for directory in args.allow_parent),
        backing=Path(args.backing) if args.backing else None,
        shared=args.force_share,
        passphrase=passphrase_of(args.passphrase_file),
    )


_MOST_PASSPHRASE = 8 << 20


def passphrase_of(path: str | None) -> bytes | None:
    """Return what a file holds, without a newline at its end."""
    if path is None:
        return None
    with open(path, "rb") as file:  # noqa: PTH123 - a pipe will do as well
        return file.read(_MOST_PASSPHRASE).removesuffix(b"\n")


def size_of(text: str | None, name: str) -> int | None:
    """Return bytes of a size such as 10G. Raises OptionError."""
    if text is None:
        return None
    from diskmorph.formats.allocator import parse_size

    return parse_size(text, name)


def format_options(words: Sequence[str]) -> dict[str, str]:
    """Return the `-o` words, which are separated by commas and may come in several -o. Raises OptionError.

    A word without a value means `on`, as with qemu-img.
    """
    from diskmorph.formats.errors import OptionError

    options: dict[str, str] = {}
    for word in _split(words):
        name, sign, value = word.partition("=")
        if not name:
            raise OptionError(f"-o {word!r} is not NAME=VALUE")
        options[name] = value if sign else "on"
    return options


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether the `-o` words ask which options there are."""
    return any(word in {"help", "?"} for word in _split(words))


def _split(words: Sequence[str]) -> list[str]:
    """Split at commas; a doubled comma stands for one inside a value."""
    text = ",".join(words).replace(",,", "\0")
    return [word.replace("\0", ",").strip() for word in text.split(",") if word.strip()]


class _OutputWord(argparse.Action):
    """qemu-img's `--output=json`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        del parser, option
        namespace.json = values == "json"


class Refused(argparse.Action):
    """A word of qemu-img's that is not taken: its error names what to say here instead."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, instead: str, **rest: Any) -> None:
        rest.setdefault("help", argparse.SUPPRESS)
        super().__init__(option_strings, dest, **rest)
        self.instead = instead

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Raise the parser's error."""
        del namespace, values
        parser.error(f"{option or self.option_strings[0]} is not taken here: {self.instead}")


CACHE_MODES = ("none", "writeback", "unsafe", "directsync", "writethrough")
