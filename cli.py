"""The command `diskmorph`: finds the verb, parses its words, runs it and turns failures into exit statuses.

Exit status: 0 done, 1 failed, 2 bad usage, 3 the answer is no, 130 interrupted, 143 terminated. Only this module exits.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from diskmorph._version import __version__
from diskmorph.commands import VERBS, Verb, verb_named
from diskmorph.commands.output import Output

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

DONE, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_ABOUT = "Convert disk images, machine packages and container file systems into each other."
_FOOT = """\
`diskmorph VERB --help` explains a verb, with examples. The most used:

  diskmorph convert disk.vmdk disk.qcow2     VMware to QEMU; suffixes choose the format
  diskmorph convert disk.vhdx - | ssh host 'cat > /srv/disk.raw'
  diskmorph info disk.vdi                    format, sizes, snapshots, partitions inside
  diskmorph compare disk.vmdk disk.qcow2     whether two images hold the same bytes

Sources are never written to. A target appears whole or not at all.
Exit status: 0 done, 1 failed, 2 bad usage, 3 the answer is no, 130 interrupted, 143 terminated.
"""


class Command(Protocol):
    """What the module of a verb exports."""

    DESCRIPTION: str
    EXAMPLES: tuple[tuple[str, str], ...]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's words."""

    def run(self, args: argparse.Namespace, out: Output) -> int:
        """Do it; return the exit status."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived: unwinds like an interrupt, so that nothing half done stays."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line in the style of all others."""

    def error(self, message: str) -> NoReturn:
        """Raise Usage."""
        raise Usage(f"{message}; see `{self.prog} --help`")


class Usage(Exception):  # noqa: N818 - it is what was said, not what went wrong
    """Words that no verb takes."""


def entry() -> NoReturn:
    """Run the command line and exit; the console script's entry point."""
    gc.set_threshold(20_000, 20, 50)  # trees are many objects that all live to the end
    status = main(sys.argv[1:])
    if all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()):
        _leave(status)
    sys.exit(status)


def _leave(status: int) -> None:
    """End the process without taking its objects apart one by one, which costs a tenth of a second with NumPy."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return
    atexit._run_exitfuncs()  # noqa: SLF001 - what libraries want done: there is no public way
    os._exit(status)


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy would start threads that nothing here uses
    _catch_signals()
    out = Output(json="--json" in argv, verbose=_verbosity(argv))
    try:
        status = _dispatch(list(argv), out)
        out.flush()
    except BaseException as error:  # noqa: BLE001 - every end of the process goes through one place
        return _failed(error, out)
    return status


def _dispatch(argv: list[str], out: Output) -> int:
    split = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    head = _head_parser().parse_args(argv[:split])
    if split == len(argv):
        raise Usage("a verb is missing; see `diskmorph --help`")
    name, rest = argv[split], argv[split + 1 :]
    if name == "help":
        name, rest = (rest[0], ["--help"]) if rest else ("", [])
        if not name:
            _head_parser().print_help()
            return DONE
    verb = verb_named(name)
    if verb is None:
        raise Usage(_unknown(name))
    command = load(verb)
    args = parse(verb_parser(verb, command), rest)
    out.json = out.json or bool(getattr(args, "json", False))
    out.quiet = head.quiet or getattr(args, "quiet", False)
    out.progress = getattr(args, "progress", "auto")
    return command.run(args, out)


def _head_parser() -> Parser:
    verbs = "\n".join(f"  {verb.name:<12}{verb.help}" for verb in VERBS)
    parser = Parser(
        prog="diskmorph",
        usage="diskmorph VERB [OPTION...] [ARGUMENT...]",
        description=_ABOUT,
        epilog=f"verbs:\n{verbs}\n\n{_FOOT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diskmorph {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more; -vv adds tracebacks to errors")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but results and errors")
    return parser


def load(verb: Verb) -> Command:
    """Import the module of a verb."""
    return cast("Command", importlib.import_module(verb.module))


def verb_parser(verb: Verb, command: Command) -> Parser:
    """Return the parser of one verb, its examples in the epilog."""
    parser = Parser(
        prog=f"diskmorph {verb.name}",
        description=command.DESCRIPTION,
        epilog=examples_text(command.EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    if not _has_subverbs(parser):
        parser.usage = f"{parser.prog} [OPTION...] {_arguments_text(parser)}".rstrip()
    parser._positionals.title = "arguments"  # noqa: SLF001 - argparse has no public way to name them
    return parser


def _has_subverbs(parser: argparse.ArgumentParser) -> bool:
    return any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)  # noqa: SLF001 - likewise


def _arguments_text(parser: argparse.ArgumentParser) -> str:
    """Return the arguments for the usage line; the many options are listed below it."""
    words = [
        f"[{action.metavar or action.dest}]" if action.nargs == "?" else str(action.metavar or action.dest)
        for action in parser._actions  # noqa: SLF001 - likewise
        if not action.option_strings
    ]
    return " ".join(words)


def examples_text(examples: Sequence[tuple[str, str]]) -> str:
    """Return the examples of a verb for its help: what each is for, and its words."""
    return "examples:\n" + "\n".join(f"  {words}\n      {what}" for words, what in examples)


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a verb's words; options and arguments may be mixed. Raises Usage."""
    if _has_subverbs(parser):
        return parser.parse_args(words)
    return parser.parse_intermixed_args(words)


def _unknown(name: str) -> str:
    import difflib  # noqa: PLC0415 - only bad words need it

    near = difflib.get_close_matches(name, [verb.name for verb in VERBS], 1)
    return f"no verb {name!r}" + (f"; did you mean `{near[0]}`?" if near else "; see `diskmorph --help`")


def _verbosity(argv: Sequence[str]) -> int:
    words = [word for word in argv if word == "--verbose" or (word.startswith("-v") and set(word[1:]) == {"v"})]
    return sum(1 if word == "--verbose" else len(word) - 1 for word in words)


# --- ends


def _catch_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP unwind the program once; further ones do not disturb the cleaning up."""

    def handle(number: int, _: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, handle)


def _failed(error: BaseException, out: Output) -> int:
    """Say what went wrong, in one line, and return the exit status."""
    if isinstance(error, SystemExit):  # argparse: --help and --version
        return error.code if isinstance(error.code, int) else DONE
    if _is_broken_pipe(error):
        _close_quietly()
        return FAILED
    line, fault, status = _explain(error)
    try:
        out.error(line, fault)
        if out.verbose >= 2:
            _print_traceback(error, out)
        out.flush()
    except OSError:
        _close_quietly()
    return status


def _print_traceback(error: BaseException, out: Output) -> None:
    import traceback  # noqa: PLC0415 - only failures need it

    out.stderr.write("".join(traceback.format_exception(error)))


def _explain(error: BaseException) -> tuple[str, dict[str, Any], int]:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", _fault("interrupted", "interrupted"), INTERRUPTED
    if isinstance(error, Terminated):
        return "terminated", _fault("terminated", "terminated"), TERMINATED
    if isinstance(error, Usage):
        return str(error), _fault("usage", str(error)), USAGE

    from diskmorph.formats.errors import DiskmorphError, OptionError  # noqa: PLC0415 - only failures need it

    if isinstance(error, DiskmorphError):
        return str(error), error.as_dict(), USAGE if isinstance(error, OptionError) else FAILED
    if isinstance(error, OSError):
        name = None if error.filename is None else os.fsdecode(error.filename)
        line = f"{name}: {error.strerror or error}" if name else str(error.strerror or error)
        return line, _fault("io", line, file=name), FAILED
    if isinstance(error, MemoryError):
        line = "there is not enough memory; free some, or convert with fewer --threads"
        return line, _fault("memory", line), FAILED
    words = f"{type(error).__name__}: {error}".rstrip(": ")
    line = f"this is a fault in diskmorph: {words}; please report it with the output of -vv"
    return line, _fault("internal", line), FAILED


def _fault(kind: str, message: str, file: str | None = None) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(("format", "structure", "field", "offset", "expected", "found"))
    return {"kind": kind, "file": file, **empty, "message": message, "hint": None}


def _is_broken_pipe(error: BaseException | None) -> bool:
    """Whether the reader of standard output went away; a target's error has that as its cause."""
    while error is not None and not isinstance(error, BrokenPipeError):
        error = error.__cause__
    return error is not None


def _close_quietly() -> None:
    """Send what is still buffered nowhere, so that the interpreter's own flush at exit does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
