"""`diskmorph check IMG`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_source, add_target, parents_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from diskmorph.commands.output import Output
    from diskmorph.convert.options import CheckResult

DESCRIPTION = """\
Check every structure of an image: headers, copies, checksums, tables, reference counts. Exit status 0: clean, 3: not.

With --repair the image is mended in place: a journal of what was there before is written beside it first. With -o a
mended copy is written and the image stays as it is. A repair by which data would be lost or written over, or that would
leave more wrong than it found, is refused. --repair undo puts back what the journal holds of the last change."""

EXAMPLES = (
    ("diskmorph check disk.qcow2", "what is wrong, if anything"),
    ("diskmorph check --repair leaks disk.qcow2", "give back clusters that nothing uses"),
    ("diskmorph check --repair all -o mended.qcow2 disk.qcow2", "mend a copy"),
    ("diskmorph check --repair undo disk.qcow2", "put back what was there before the last repair"),
    ("diskmorph check --json disk.vhdx", "for a program"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMG", help="the image")
    parser.add_argument(
        "-r",
        "--repair",
        choices=("leaks", "all", "undo"),
        help="mend leaks only, or all that can be mended, or undo the last change in place",
    )
    parser.add_argument("-o", dest="target", metavar="DST", help="mend a copy")
    add_source(parser)
    add_target(parser, rewrites=True)
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    import diskmorph
    from diskmorph.formats.errors import OptionError

    if args.target and not args.repair:
        raise OptionError("-o writes a mended copy, so it needs --repair leaks or --repair all")
    found = diskmorph.check(
        args.image,
        format=args.format,
        parents=parents_of(args),
        repair=None if args.dry_run else args.repair,
        output=None if args.dry_run else args.target,
        force=args.force,
        sync=not args.no_sync,
    )
    if args.dry_run and args.repair:
        out.note("nothing was changed; these findings are what a repair would begin with")
    out.report(_report(found), _lines(found, "put back" if args.repair == "undo" else "mended"))
    return 0 if found.clean else 3


def _report(found: CheckResult) -> dict[str, object]:
    report = asdict(found)
    report["findings"] = list(found.findings)
    return report


def _lines(found: CheckResult, word: str) -> Iterator[str]:
    for finding in found.findings:
        place = "" if finding["offset"] is None else f" at {finding['offset']}"
        yield f"{finding['severity']}: {finding['structure']}{place}: {finding['message']}"
    counts = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in ((found.corruptions, "corruption"), (found.leaks, "leaked unit"))
        if count
    ]
    if found.repaired:
        yield f"{found.repaired} places {word}" + (f"; undo with {found.journal}" if found.journal else "")
    yield f"{found.file}: {found.format}, " + ("clean" if found.clean else ", ".join(counts) or "not clean")
