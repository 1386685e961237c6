"""`diskmorph rebase IMG -b NEW`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_source, add_target, parents_of

if TYPE_CHECKING:
    import argparse

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Give an overlay another parent. Only its metadata is changed, after it was found to show the same content on the new
parent. With -o a new overlay is written instead, which keeps the content whatever the parents hold; with --flatten a
new image without a parent."""

EXAMPLES = (
    ("diskmorph rebase top.qcow2 -b copy-of-base.qcow2 --allow-parent .", "the parent was moved or converted"),
    ("diskmorph rebase top.vmdk -b base.vmdk --unsafe", "without comparing, as qemu-img rebase -u"),
    ("diskmorph rebase top.vhdx -b other.vhdx -o new.vhdx --allow-parent .", "a new overlay, with the same content"),
    ("diskmorph rebase top.qcow2 --flatten -o whole.qcow2 --allow-parent .", "folded into its parent, as a new file"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMG", help="the overlay")
    parser.add_argument("-b", dest="base", metavar="NEW", help="the new parent")
    parser.add_argument("-F", dest="base_format", metavar="FMT", help="the format of NEW (default: by its content)")
    parser.add_argument("-u", "--unsafe", action="store_true", help="do not compare contents first")
    parser.add_argument("--flatten", action="store_true", help="write an image without a parent (needs -o)")
    parser.add_argument("-o", dest="output", metavar="FILE", help="write a new image instead")
    add_source(parser)
    add_target(parser, rewrites=True)
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.commands.convert import print_report
    from diskmorph.commands.progress import progress
    from diskmorph.convert.options import ConvertOptions
    from diskmorph.convert.rebase import rebase, rewrite
    from diskmorph.formats.errors import OptionError

    if bool(args.base) == args.flatten:
        raise OptionError("say either -b NEW or --flatten")
    if args.flatten and not args.output:
        raise OptionError("--flatten writes a new image", hint="name it with -o FILE")
    options = ConvertOptions(
        source_format=args.format,
        base_format=args.base_format,
        parents=parents_of(args),
        force=args.force,
        sync=not args.no_sync,
        reproducible=args.reproducible,
        dry_run=args.dry_run,
    )
    if args.output:
        with progress(out, "rebasing") as tell:
            report = rewrite(args.image, args.output, base=args.base, options=options, on_progress=tell)
        print_report(report, out, dry=args.dry_run)
        return 0
    with progress(out, "comparing") as tell:
        done = rebase(args.image, args.base, unsafe=args.unsafe, options=options, on_progress=tell)
    word = "would become" if args.dry_run else "is now"
    how = "contents compared" if done.compared else "contents not compared"
    out.report(done.as_dict(), [f"{done.file}: its parent {word} {done.parent} ({how})"])
    return 0
