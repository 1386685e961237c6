"""`diskmorph digest IMG`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_source, parents_of

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Hash what the guest sees, whatever the format: the SHA-256 is that of the raw disk, as `sha256sum` would give it."""

EXAMPLES = (
    ("diskmorph digest disk.qcow2", "the line that sha256sum would print for the raw disk"),
    ("diskmorph digest --tree disk.vmdk", "a tree hash: faster, since it uses every core; not a sha256sum"),
    ("diskmorph digest --snapshot monday disk.qcow2", "of an internal snapshot"),
    ("diskmorph digest --allow-parent . top.qcow2", "of an overlay with its backing files"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMG", help="the image")
    parser.add_argument("--tree", action="store_true", help="a parallel tree hash instead")
    parser.add_argument("--snapshot", metavar="NAME", help="an internal snapshot")
    parser.add_argument("--disk", type=int, metavar="N", help="one of a package's disks, from 1")
    add_source(parser)
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    import diskmorph
    from diskmorph.commands.progress import progress

    with progress(out, "hashing") as tell:
        found = diskmorph.digest(
            args.image,
            format=args.format,
            parents=parents_of(args),
            snapshot=args.snapshot,
            disk=args.disk,
            tree=args.tree,
            on_progress=tell,
        )
    out.result(asdict(found), [f"{found.digest}  {found.file}"])
    return 0
