"""`diskmorph measure SRC -O FMT`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_source, format_options, parents_of, size_of

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Tell the size that a target of SRC would have, without writing it. Exact to the byte, unless the target consists of
several files, whose names it records: then `required` is an upper bound."""

EXAMPLES = (
    ("diskmorph measure -O qcow2 disk.raw", "the size as qcow2"),
    ("diskmorph measure -O vmdk -o subformat=monolithicFlat disk.qcow2", "of a subformat"),
    ("diskmorph measure --json -O vhdx disk.qcow2", "for a program"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="SRC", help="the source")
    parser.add_argument("-O", dest="target_format", metavar="FMT", required=True, help="the target's format")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="K=V,...", help="format options")
    parser.add_argument("-c", dest="compressed", action="store_true", help="compress by the format's default codec")
    parser.add_argument("--compress", metavar="CODEC[:LEVEL]", help="compress by deflate or zstd")
    parser.add_argument("-S", dest="zero_unit", metavar="SIZE", default="4k", help="unit of zero detection; 0: off")
    parser.add_argument("--snapshot", metavar="NAME", help="an internal snapshot as the source")
    parser.add_argument("--disk", type=int, metavar="N", help="one of a package's disks, from 1")
    parser.add_argument("--size", metavar="SIZE", help="another virtual size")
    add_source(parser)
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    import diskmorph
    from diskmorph.commands.progress import progress
    from diskmorph.commands.text import exact_size_text, properties
    from diskmorph.convert.options import ConvertOptions

    options = ConvertOptions(
        source_format=args.format,
        format_options=format_options(args.options),
        compress=args.compress or ("default" if args.compressed else None),
        snapshot=args.snapshot,
        disk=args.disk,
        size=size_of(args.size, "--size"),
        zero_unit=size_of(args.zero_unit, "-S") or 0,
        parents=parents_of(args),
    )
    with progress(out, "measuring") as tell:
        found = diskmorph.measure(args.image, args.target_format, options=options, on_progress=tell)
    lines = properties(
        [
            ("required", exact_size_text(found.required) + ("" if found.exact else ", at most")),
            ("fully allocated", exact_size_text(found.fully_allocated)),
        ]
    )
    out.result(asdict(found), lines)
    return 0
