"""`diskmorph serve IMG`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_source, parents_of

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Serve a disk over NBD, read-only, whatever its format: qemu, nbdkit, libnbd and the kernel's client can use it where it
lies. It is served on the loopback address or a Unix socket until the command is interrupted."""

EXAMPLES = (
    ("diskmorph serve --socket disk.sock disk.vmdk", "on a Unix socket"),
    ("diskmorph serve --port 10809 disk.qcow2", "on a port of 127.0.0.1"),
    ("diskmorph serve --json disk.ova", "on any free port; the URL is printed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMG", help="the image")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="listen on a Unix socket of this name")
    where.add_argument("--port", metavar="N", type=int, help="listen on this port of 127.0.0.1 (default: any)")
    parser.add_argument("--export", metavar="NAME", default="", help="the export's name (default: none)")
    parser.add_argument("--snapshot", metavar="NAME", help="an internal snapshot")
    parser.add_argument("--disk", type=int, metavar="N", help="one of a package's disks, from 1")
    add_source(parser)
    add_output(parser, progress=False)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    import sys

    from diskmorph.convert.serve import Server
    from diskmorph.formats.registry import open_disk

    with open_disk(
        args.image, format=args.format, parents=parents_of(args), snapshot=args.snapshot, disk=args.disk
    ) as disk:
        path = Path(args.socket) if args.socket else None
        server = Server(disk, path=path, port=args.port, name=args.export)
        report = {"url": server.url, "export": args.export, "virtual_size": disk.size}
        out.result(report, [server.url])
        sys.stdout.flush()
        try:
            server.run()
        finally:
            server.stop()
    return 0
