"""`diskmorph completion SHELL`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output

if TYPE_CHECKING:
    from diskmorph.commands.output import Output

DESCRIPTION = """\
Print a script that completes verbs, options and file names in a shell."""

EXAMPLES = (
    ("diskmorph completion bash > ~/.local/share/bash-completion/completions/diskmorph", "for bash"),
    ("diskmorph completion zsh > ~/.zfunc/_diskmorph", "for zsh; ~/.zfunc must be in fpath"),
    ("diskmorph completion fish > ~/.config/fish/completions/diskmorph.fish", "for fish"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")
    add_output(parser, progress=False)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    script = script_for(args.shell)
    out.result({"shell": args.shell, "script": script}, ())
    if not out.json:
        out.stdout.write(script + "\n")
    return 0


def script_for(shell: str) -> str:
    """Return the completion script of a shell, from the parsers of all verbs."""
    import importlib

    import shtab

    from diskmorph.commands import VERBS

    top = argparse.ArgumentParser(prog="diskmorph", description="Convert disk images.")
    top.add_argument("--version", action="store_true", help="print the version")
    verbs = top.add_subparsers(metavar="VERB")
    for verb in VERBS:
        module = importlib.import_module(verb.module)
        parser = verbs.add_parser(verb.name, help=verb.help, description=verb.help)
        module.add_arguments(parser)
        _complete_values(parser, shtab)
    return str(shtab.complete(top, shell))


_FILES = frozenset({"paths", "image", "first", "second", "target", "base", "backing", "plot"})
_FOLDERS = frozenset({"allow_parent"})
_FORMATS = frozenset({"format", "target_format", "base_format", "second_format", "name"})


def _complete_values(parser: argparse.ArgumentParser, shtab: object) -> None:
    """Say what the values of arguments are: files, folders, or names of formats."""
    from diskmorph.formats.probe import FORMATS, RAW

    names = [name for entry in (RAW, *FORMATS) for name in (entry.name, *entry.aliases)]
    for action in parser._actions:  # noqa: SLF001 - argparse has no public list of them
        if action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in _FORMATS and action.nargs != 0:
            action.choices = names
