"""`diskmorph extract IMG DST`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_partition, add_source, add_target, parents_of

if TYPE_CHECKING:
    from diskmorph.commands.output import Output
    from diskmorph.convert.bridge.options import ExtractOptions

DESCRIPTION = """\
Take the root file system out of a disk: as a directory, a tar archive or a container image.

The root is found by its partition's type, else by what lies in it; /boot, /usr and /var are merged where fstab mounts
them from the same disk. Of what has an /etc, contents of /proc, /sys, /dev, /run and /tmp, lost+found and swap files
stay behind. No root rights are needed; as another user a directory cannot keep owners and devices, archives and images
keep both."""

EXAMPLES = (
    ("diskmorph extract disk.vmdk app.tar", "an archive with owners, times, attributes and links"),
    ("diskmorph extract disk.qcow2 root/", "a directory"),
    ("diskmorph extract disk.qcow2 oci:app --entrypoint '[\"/bin/app\"]'", "an OCI layout"),
    ("diskmorph extract disk.vhdx docker-archive:app.tar:app:1.0 --strip-boot", "what docker load takes"),
    ("diskmorph extract disk.qcow2 docker://registry.example/app:2", "pushed to a registry"),
    ("diskmorph extract disk.raw data/ --partition 2", "one partition"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument(
        "source", metavar="IMG", help="a disk image in any format, an ISO, an archive, a container image"
    )
    parser.add_argument(
        "target",
        metavar="DST",
        help="NAME.tar, a directory, oci:DIR, oci-archive:FILE, docker-archive:FILE or docker://HOST/NAME:TAG",
    )
    add_source(parser)
    group = parser.add_argument_group("tree")
    group.add_argument(
        "-O", dest="target_format", metavar="FMT", help="directory, tar, oci, oci-archive, docker-archive"
    )
    add_partition(group, more="with nothing merged")
    group.add_argument("--strip-boot", action="store_true", help="leave kernel, modules, firmware and boot loader out")
    add_config(parser)
    add_target(parser)
    add_output(parser)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add what an image's configuration is made of."""
    group = parser.add_argument_group("image configuration")
    group.add_argument("--entrypoint", type=_words, metavar="JSON|WORD", help="a JSON list, or one word")
    group.add_argument("--cmd", type=_words, metavar="JSON|WORD", help="a JSON list, or one word")
    group.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    group.add_argument("--user", metavar="USER")
    group.add_argument("--workdir", metavar="DIR")
    group.add_argument("--platform", metavar="OS/ARCH", help="default: found out")
    group.add_argument("--layer-compression", choices=("gzip", "zstd", "none"), default="gzip")


def _words(text: str) -> tuple[str, ...]:
    """Return the words of a JSON list, or the text itself as one word."""
    if not text.lstrip().startswith("["):
        return (text,)
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON list of strings")
    return tuple(found)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.commands.convert import print_report
    from diskmorph.commands.progress import progress
    from diskmorph.convert.bridge import extract

    with progress(out, "extracting") as tell:
        report = extract(args.source, args.target, options=options_of(args), on_progress=tell)
    print_report(report, out, dry=args.dry_run)
    return 0


def options_of(args: argparse.Namespace) -> ExtractOptions:
    """Return the words as the library's options. Raises OptionError."""
    from diskmorph.convert.bridge.options import ExtractOptions
    from diskmorph.convert.options import ConvertOptions
    from diskmorph.formats.errors import OptionError

    for word in args.env:
        if "=" not in word:
            raise OptionError(f"--env {word!r} is not NAME=VALUE")
    return ExtractOptions(
        convert=ConvertOptions(
            source_format=args.format,
            target_format=getattr(args, "target_format", None),
            reproducible=args.reproducible,
            sync=not args.no_sync,
            force=args.force,
            dry_run=args.dry_run,
            parents=parents_of(args),
        ),
        partition=getattr(args, "partition", None),
        strip_boot=getattr(args, "strip_boot", False),
        entrypoint=args.entrypoint,
        cmd=args.cmd,
        env=dict(word.split("=", 1) for word in args.env),
        user=args.user,
        workdir=args.workdir,
        compress=args.layer_compression,
        platform=args.platform,
    )
