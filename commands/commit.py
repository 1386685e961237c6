"""`diskmorph commit DISK --base IMAGE DST`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_partition, add_source, add_target
from diskmorph.commands.extract import add_config

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Write what changed on a disk as one new layer on the container image that the disk was built from.

The trees are compared: new and changed files go into the layer, whiteouts stand for what is gone. What `build` had put
in (kernel, boot loader, fstab, ...) does not count. The base's layers are taken over as they are."""

EXAMPLES = (
    ("diskmorph commit disk.qcow2 --base app.tar oci:app2 -m 'security updates' -a 'Me <me@x>'", "to an OCI layout"),
    ("diskmorph commit disk.vmdk --base oci:app docker-archive:app2.tar:app:2", "to what docker load takes"),
    (
        "diskmorph commit disk.qcow2 --base docker://registry.example/app:1 docker://registry.example/app:2",
        "in a registry, to which the new layer alone is sent",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("source", metavar="DISK", help="a disk image in any format")
    parser.add_argument(
        "target", metavar="DST", help="oci:DIR, oci-archive:FILE, docker-archive:FILE or docker://HOST/NAME:TAG"
    )
    parser.add_argument("--base", required=True, metavar="IMAGE", help="the image that the disk was built from")
    parser.add_argument("-m", "--message", default="", help="the history entry's comment")
    parser.add_argument("-a", "--author", default="", help="its author")
    add_source(parser)
    add_partition(parser)
    add_config(parser)
    add_target(parser)
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.commands.convert import print_report
    from diskmorph.commands.extract import options_of
    from diskmorph.commands.progress import progress
    from diskmorph.convert.bridge import CommitOptions, commit

    options = CommitOptions(args.base, args.message, args.author, options_of(args))
    with progress(out, "committing") as tell:
        report = commit(args.source, args.target, options=options, on_progress=tell)
    print_report(report, out, dry=args.dry_run)
    return 0
