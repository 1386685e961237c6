"""`diskmorph resize IMG SIZE`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_source, add_target

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Give an image another virtual size: in place where its tables allow, a journal of what was there before being written
first; else -o writes a new image. What lies beyond a smaller size is cut off only with --shrink."""

EXAMPLES = (
    ("diskmorph resize disk.qcow2 40G", "to 40 GiB"),
    ("diskmorph resize disk.qcow2 +10G", "10 GiB larger"),
    ("diskmorph resize -o large.vdi disk.vdi 40G", "into a new image"),
    ("diskmorph resize --shrink disk.raw 5G", "smaller; what lies beyond is gone"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMG", help="the image")
    parser.add_argument("size", metavar="SIZE", help="the new virtual size; +SIZE and -SIZE are relative")
    parser.add_argument("-o", dest="target", metavar="DST", help="write a new image instead")
    parser.add_argument("--shrink", action="store_true", help="allow a smaller size")
    add_source(parser)
    add_target(parser, rewrites=True)
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    import diskmorph
    from diskmorph.commands.progress import progress

    with progress(out, "resizing") as tell:
        report = diskmorph.resize(
            args.image,
            args.size,
            format=args.format,
            target=args.target,
            shrink=args.shrink,
            on_progress=tell,
        )
    del report
    return 0
