"""`diskmorph unbundle MANIFEST DST`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Open an EC2 bundle: the manifest's signature, every part's digest and that of the archive inside are verified, and the
image is written as plain bytes. Parts are looked for beside the manifest."""

EXAMPLES = (
    ("diskmorph unbundle bundle/root.img.manifest.xml root.img --key key.pem", "with the key that it was bundled for"),
    (
        "diskmorph unbundle bundle/root.img.manifest.xml root.img --key key.pem --cert cert.pem",
        "verified by a certificate too",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("manifest", metavar="MANIFEST", help="NAME.manifest.xml")
    parser.add_argument("target", metavar="DST", help="the image to write")
    parser.add_argument("--key", required=True, metavar="PEM", help="the private key that it was bundled for")
    parser.add_argument("--cert", metavar="PEM", help="the certificate that signed it")
    group = parser.add_argument_group("target")
    group.add_argument("--force", action="store_true", help="replace an existing target")
    group.add_argument("--no-sync", action="store_true", help="leave writing back to the kernel")
    group.add_argument("--reproducible", action="store_true", help="taken for uniformity; the image is what it is")
    group.add_argument("--dry-run", action="store_true", help="verify everything, write nothing")
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.commands.progress import progress
    from diskmorph.commands.text import size_text
    from diskmorph.convert.bundles import unbundle

    with progress(out, "unbundling") as tell:
        report = unbundle(
            args.manifest,
            args.target,
            key=args.key,
            certificate=args.cert,
            force=args.force,
            sync=not args.no_sync,
            dry_run=args.dry_run,
            on_progress=tell,
        )
    for warning in report.warnings:
        out.note(f"warning: {warning}")
    words = f"{report.target}: {report.type} image, {size_text(report.virtual_size)}, signature and digests verified"
    out.report(report.as_dict(), [words])
    return 0
