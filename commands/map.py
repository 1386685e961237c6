"""`diskmorph map IMG`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from diskmorph.commands.common import add_output, add_source, parents_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from diskmorph.commands.allocation import Tally
    from diskmorph.commands.output import Output
    from diskmorph.formats.disk import Disk
    from diskmorph.formats.source import ByteSource

DESCRIPTION = """\
Show which ranges of the disk hold data, which are written zeroes, and which were never allocated; and where in which
file the data lies. In the terminal allocation is drawn; --plot writes the drawing as PNG or SVG."""

EXAMPLES = (
    ("diskmorph map disk.qcow2", "a drawing of what is allocated"),
    ("diskmorph map -v disk.qcow2", "every extent, one a line"),
    ("diskmorph map --json disk.vmdk", "every extent, for a program"),
    ("diskmorph map --plot map.svg disk.vhdx", "the drawing as a file, .svg or .png"),
    ("diskmorph map --allow-parent . top.qcow2", "with the layers below"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMG", help="the image; `-` is standard input")
    parser.add_argument("--plot", metavar="FILE", help="write the drawing to FILE.png or FILE.svg")
    parser.add_argument("--snapshot", metavar="NAME", help="an internal snapshot")
    parser.add_argument("--disk", type=int, metavar="N", help="one of a package's disks, from 1")
    parser.add_argument("--force", action="store_true", help="replace an existing FILE")
    add_source(parser)
    add_output(parser, progress=False)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.commands.allocation import tally
    from diskmorph.convert.opening import open_source

    if args.plot:
        from diskmorph.commands.plot import require_suffix

        require_suffix(args.plot)
    with open_source(
        args.image, format=args.format, parents=parents_of(args), snapshot=args.snapshot, disk=args.disk
    ) as opened:
        disk = opened.disk
        found = tally(disk, 4096)  # the whole map is read once before anything is printed: it may be damaged
        if args.plot:
            from diskmorph.commands.plot import write_plot

            write_plot(found, args.image, args.plot, force=args.force)
        if out.json:
            _print_json(disk, out)
        elif out.verbose:
            for line in _listing(disk):
                out.line(line)
        elif args.plot:
            out.report({}, [f"{args.plot}: written"])
        else:
            _print_drawing(found, args.image, out)
    return 0


def _rows(disk: Disk) -> Iterator[dict[str, Any]]:
    """Yield the extents as docs/json.md has them."""
    from diskmorph.formats.extents import CODEC_NAMES, DATA, KIND_NAMES, PLAIN

    places = [_place(source) for source in disk.files]
    for batch in disk.extents():
        columns = (batch[name].tolist() for name in ("start", "length", "offset", "file", "kind", "codec", "depth"))
        for start, length, offset, file, kind, codec, depth in zip(*columns, strict=True):
            place = places[file] if kind == DATA and codec == PLAIN else None
            yield {
                "start": start,
                "length": length,
                "kind": KIND_NAMES[kind],
                "depth": depth,
                "file": None if place is None else place[0],
                "offset": None if place is None else place[1] + offset,
                "codec": CODEC_NAMES[codec] if kind == DATA and codec != PLAIN else None,
            }


def _place(source: ByteSource) -> tuple[str, int] | None:
    """Return the file whose bytes a source shows, and where its first byte lies in it; None where it decodes them."""
    with source.descriptor() as lent:
        if lent is not None:
            descriptor, base = lent
            status = os.fstat(descriptor)
            if not status.st_nlink:  # decoded, or taken from a pipe, into a file without a name
                return None
            named = source.origins().get((status.st_dev, status.st_ino), source.name)
            return str(source.path or named), base
    return (source.name, 0) if _is_remote(source) else None


def _is_remote(source: ByteSource) -> bool:
    """Say whether a source is what a URL names, as it is."""
    from diskmorph.formats.remote import is_url

    if not is_url(source.name):
        return False
    from diskmorph.formats.remote.blocks import BlockSource
    from diskmorph.formats.remote.nbd import NbdSource

    return isinstance(source, BlockSource | NbdSource)


def _print_json(disk: Disk, out: Output) -> None:
    """Print the object extent by extent: a map may have millions, which are never held at once."""
    out.stdout.write(f'{{"virtual_size": {disk.size}, "extents": [')
    comma = "\n"
    for row in _rows(disk):
        out.stdout.write(comma + json.dumps(row))
        comma = ",\n"
    out.stdout.write("\n]}\n")


def _listing(disk: Disk) -> Iterator[str]:
    width = len(str(disk.size))
    yield f"{'start':>{width}}  {'length':>{width}}  kind  depth  where"
    for row in _rows(disk):
        where = "-" if row["offset"] is None else f"{row['file']} at {row['offset']}"
        if row["kind"] == "data" and row["offset"] is None:
            where = "encoded"
        if row["codec"]:
            where = f"encoded by {row['codec']}"
        yield f"{row['start']:>{width}}  {row['length']:>{width}}  {row['kind']:<4}  {row['depth']:>5}  {where}"


def _print_drawing(found: Tally, name: str, out: Output) -> None:
    from diskmorph.commands.allocation import drawing

    for line in drawing(found, name, width=min(out.width, 120), colour=out.colour):
        out.stdout.write(line + "\n")
