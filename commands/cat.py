"""`diskmorph cat IMG PATH`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output
from diskmorph.commands.ls import add_inside, open_inside

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Print a file that lies inside a disk (on its root file system, or --partition), an ISO, an archive, a container image.

Its bytes go to standard output as they are; symbolic links are followed inside."""

EXAMPLES = (
    ("diskmorph cat disk.vmdk /etc/os-release", "a file on the root file system"),
    ("diskmorph cat disk.qcow2 /boot/vmlinuz > vmlinuz", "taken out"),
    ("diskmorph cat docker-archive:app.tar /etc/passwd", "of a container image"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("source", metavar="IMG", help="a disk, ISO, archive, container image or directory")
    parser.add_argument("path", metavar="PATH", help="a file inside")
    add_inside(parser)
    add_output(parser, progress=False)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.formats.errors import OptionError, SourceError
    from diskmorph.formats.output import StreamTarget
    from diskmorph.formats.tree import chunks

    if out.json:
        raise OptionError("--json prints on standard output, where the file goes")
    with open_inside(args) as tree:
        node = tree.find(args.path)
        if node is None or node.kind != 0o100000:
            what = "no" if node is None else "no file"
            raise SourceError(f"has {what} {args.path}", file=args.source)
        out.flush()
        done = 0
        with StreamTarget(sys.stdout.buffer) as target:
            for chunk in chunks(node):
                target.members[0].write(done, chunk)
                done += len(chunk)
            target.commit([done])
    return 0
