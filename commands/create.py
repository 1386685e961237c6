"""`diskmorph create DST SIZE`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.commands.common import (
    Refused,
    add_output,
    add_parents,
    add_target,
    asks_for_help,
    format_options,
    parents_of,
    size_of,
)

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Make an empty image. The format is chosen by DST's suffix, or by -O. With -b it is an overlay on another image, whose
size it takes if none is said."""

EXAMPLES = (
    ("diskmorph create disk.qcow2 20G", "an empty disk"),
    ("diskmorph create -O vmdk -o subformat=twoGbMaxExtentSparse disk.vmdk 20G", "of a subformat"),
    ("diskmorph create -b base.qcow2 over.qcow2", "an overlay: what is not written there is read from the base"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("target", metavar="DST", help="the new image")
    parser.add_argument("size", metavar="SIZE", nargs="?", help="virtual size: bytes, or 10G, 1.5T, ...")
    parser.add_argument("-O", "-f", dest="format", metavar="FMT", help="the format (default: by DST's suffix)")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="K=V,...", help="format options; -o help lists them"
    )
    parser.add_argument("-b", dest="base", metavar="BASE", help="the image that the new one is an overlay on")
    parser.add_argument("-F", dest="base_format", metavar="FMT", help="the format of BASE (default: by its content)")
    parser.add_argument("-u", action=Refused, nargs=0, instead="the base is always read, for its size and identity")
    add_parents(parser.add_argument_group("base"))
    add_target(parser)
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    import diskmorph
    from diskmorph.commands.convert import print_options, print_report
    from diskmorph.commands.progress import progress
    from diskmorph.convert.options import ConvertOptions
    from diskmorph.formats.errors import OptionError

    if asks_for_help(args.options):
        return print_options(args.format, args.target, out)
    if args.size is None and args.base is None:
        raise OptionError("create needs a size", hint="say one such as 20G, or a base with -b")
    options = ConvertOptions(
        target_format=args.format,
        format_options=format_options(args.options),
        base=args.base,
        base_format=args.base_format,
        reproducible=args.reproducible,
        sync=not args.no_sync,
        force=args.force,
        dry_run=args.dry_run,
        parents=parents_of(args),
    )
    size = size_of(args.size, "SIZE")
    with progress(out, "creating") as tell:
        report = diskmorph.create(args.target, size, options=options, on_progress=tell)
    print_report(report, out, dry=args.dry_run)
    return 0
