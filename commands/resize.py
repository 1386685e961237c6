"""`diskmorph resize IMG SIZE`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_source, add_target, format_options, parents_of

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Give an image another virtual size. A larger one is a change of the image's tables where they have room for it (raw,
qcow2, VDI, VHDX, fixed VHD), behind a journal; else the image is written anew and takes its own place when it is
complete. With -o it goes to another file. What lies beyond a smaller size is cut off only with --shrink."""

EXAMPLES = (
    ("diskmorph resize disk.qcow2 40G", "to 40 GiB"),
    ("diskmorph resize disk.qcow2 +10G", "10 GiB larger"),
    ("diskmorph resize -o large.vdi disk.vdi 40G", "into a new file, the old one staying"),
    ("diskmorph resize --shrink disk.raw 5G", "smaller; what lies beyond is gone"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMG", help="the image")
    parser.add_argument(
        "size",
        metavar="SIZE",
        help="the new virtual size: bytes, or 10G, 1.5T, ...; +SIZE makes it so much larger, -SIZE smaller",
    )
    parser.add_argument("-o", dest="target", metavar="DST", help="write to another file")
    parser.add_argument("-O", dest="target_format", metavar="FMT", help="DST's format (default: the same)")
    parser.add_argument("--options", action="append", default=[], metavar="K=V,...", help="DST's format options")
    parser.add_argument("--shrink", action="store_true", help="allow a smaller size")
    add_source(parser)
    add_target(parser, rewrites=True)
    add_output(parser)
    # -10G is a size here: argparse takes words that look like numbers for arguments where no option does.
    parser._negative_number_matcher = re.compile(r"^-[0-9]")  # noqa: SLF001 - it has no public name


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    import diskmorph
    from diskmorph.commands.convert import print_report
    from diskmorph.commands.progress import progress
    from diskmorph.convert.options import ConvertOptions

    options = ConvertOptions(
        source_format=args.format,
        target_format=args.target_format,
        format_options=format_options(args.options),
        reproducible=args.reproducible,
        sync=not args.no_sync,
        force=args.force,
        dry_run=args.dry_run,
        parents=parents_of(args),
    )
    size = _wanted_size(args)
    with progress(out, "resizing") as tell:
        report = diskmorph.resize(
            args.image, size, shrink=args.shrink, output=args.target, options=options, on_progress=tell
        )
    print_report(report, out, dry=args.dry_run)
    return 0


def _wanted_size(args: argparse.Namespace) -> int:
    """Return the new size in bytes; `+` and `-` count from the size that the disk has."""
    from diskmorph.formats.allocator import parse_size
    from diskmorph.formats.errors import OptionError
    from diskmorph.formats.registry import open_disk

    sign = args.size[:1] if args.size[:1] in {"+", "-"} else ""
    amount = parse_size(args.size.removeprefix(sign), "SIZE")
    if not sign or args.image == "-":  # which resize refuses
        return amount
    with open_disk(args.image, format=args.format, parents=parents_of(args)) as disk:
        size = disk.size + amount if sign == "+" else disk.size - amount
    if size < 0:
        raise OptionError(f"{args.size} is more than the disk has", file=args.image)
    return size
