"""`diskmorph snapshot IMG`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diskmorph.commands.common import Refused, add_output, add_source, add_target, parents_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from diskmorph.commands.output import Output

DESCRIPTION = """\
List the internal snapshots of an image, or extract one as an image of its own."""

EXAMPLES = (
    ("diskmorph snapshot disk.qcow2", "list them"),
    ("diskmorph snapshot disk.qcow2 --extract monday monday.raw", "one of them, as a disk of its own"),
)

_READS_ONLY = "snapshots are read here, not made or changed; use qemu-img snapshot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMG", help="the image")
    parser.add_argument("--extract", nargs=2, metavar=("NAME", "DST"), help="write the snapshot NAME to DST")
    parser.add_argument("-O", dest="target_format", metavar="FMT", help="DST's format (default: by its suffix)")
    parser.add_argument("-l", "--list", action="store_true", help="list the snapshots (the default)")
    for words in (("-c",), ("-a",), ("-d",)):
        parser.add_argument(*words, action=Refused, nargs=1, instead=_READS_ONLY)
    add_source(parser)
    add_target(parser)
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    if args.extract:
        return _extract(args, out)
    from diskmorph.convert.inspect import inspect

    found = inspect(args.image, format=args.format, parents=parents_of(args), inside=False)
    snapshots = found.as_dict()["snapshots"]
    out.result({"file": found.file, "format": found.format, "snapshots": snapshots}, snapshot_lines(snapshots))
    return 0


def snapshot_lines(snapshots: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of snapshots, as `info` gives them."""
    from diskmorph.commands.text import size_text, table, time_text

    if not snapshots:
        yield "no snapshots"
        return
    rows = [
        (s["id"], s["name"], size_text(s["virtual_size"]), size_text(s["vm_state_size"]), time_text(s["created"]))
        for s in snapshots
    ]
    yield from table(("id", "name", "disk size", "VM state", "made"), rows, right=(2, 3))


def _extract(args: argparse.Namespace, out: Output) -> int:
    import diskmorph
    from diskmorph.commands.convert import print_report
    from diskmorph.commands.progress import progress
    from diskmorph.convert.options import ConvertOptions

    name, target = args.extract
    options = ConvertOptions(
        source_format=args.format,
        target_format=args.target_format,
        snapshot=name,
        reproducible=args.reproducible,
        sync=not args.no_sync,
        force=args.force,
        dry_run=args.dry_run,
        parents=parents_of(args),
    )
    with progress(out, "extracting") as tell:
        report = diskmorph.convert(args.image, target, options=options, on_progress=tell)
    print_report(report, out, dry=args.dry_run)
    return 0
