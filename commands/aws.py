"""`diskmorph aws VERB`: to Amazon's cloud and back."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from diskmorph.commands import aws_words as words
from diskmorph.commands.common import add_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Bring disks to Amazon's cloud: snapshots block by block, images from them, and back again.

Region, endpoint (AWS_ENDPOINT_URL) and credentials are taken as boto3 takes them. Whatever is made carries the tag
diskmorph:job; when a job fails or is interrupted, what it made is removed again. `diskmorph aws VERB --help` explains
each verb; docs/aws.md has the permissions that are needed."""

_UPLOAD = (
    ("diskmorph aws upload disk.qcow2", "any format, converted on the way; said again, it resumes"),
    ("diskmorph aws upload vm.ova --disk 2 --encrypt", "a package's disk into an encrypted snapshot"),
    ("diskmorph aws upload new.vmdk --parent snap-0123456789abcdef0", "only what differs from a snapshot"),
)
_REGISTER = (
    ("diskmorph aws register snap-0123456789abcdef0 --name web-1", "an image from a snapshot"),
    ("diskmorph aws register snap-0123456789abcdef0 --name web-1 --boot-mode uefi --arch arm64", "said, not read"),
)
_PUBLISH = (
    ("diskmorph aws publish disk.vhdx --name web-1", "upload and register in one"),
    ("diskmorph aws publish disk.raw --name web-1 --copy-to eu-west-1 --share 111122223333", "copied and shared"),
    ("diskmorph aws publish app.tar --name app-1 --kernel linux-image.deb", "from `docker save` to an AMI"),
)
_IMPORT = (
    ("diskmorph aws import vm.ova --bucket my-bucket", "through VM Import: an OVA becomes an image"),
    ("diskmorph aws import disk.qcow2 --bucket my-bucket", "a disk becomes a snapshot"),
    ("diskmorph aws import --print-role --bucket my-bucket", "the role that VM Import needs"),
)
_DOWNLOAD = (
    ("diskmorph aws download snap-0123456789abcdef0 disk.qcow2", "a snapshot into any format"),
    ("diskmorph aws download ami-0123456789abcdef0 disk.vmdk", "an image's root volume"),
    (
        "diskmorph aws download snap-0123456789abcdef0 now.qcow2 --since snap-0fedcba9876543210 -B then.qcow2",
        "an overlay of what changed",
    ),
)
_PLAN = (("diskmorph aws plan disk.qcow2 --name web-1", "blocks, cost, time, permissions; nothing is changed"),)
_GC = (
    ("diskmorph aws gc --dry-run", "what jobs that died left behind"),
    ("diskmorph aws gc --older-than 12h --bucket my-bucket", "remove it, objects in a bucket too"),
)

EXAMPLES = (*_UPLOAD, *_REGISTER, *_PUBLISH, *_IMPORT, *_DOWNLOAD, *_PLAN, *_GC)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    add_output(parser)
    verbs = parser.add_subparsers(metavar="VERB", dest="aws_verb", required=True, prog="diskmorph aws")

    def verb(name: str, help: str, examples: tuple[tuple[str, str], ...]) -> argparse.ArgumentParser:
        text = "examples:\n" + "\n".join(f"  {line}\n      {what}" for line, what in examples)
        return verbs.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    upload = verb("upload", "bring a disk into an EBS snapshot, block by block", _UPLOAD)
    words.add_source(upload)
    words.add_upload(upload)
    words.add_volume(upload)
    words.add_job(upload)
    words.add_common(upload)
    register = verb("register", "make an image (AMI) of a snapshot", _REGISTER)
    register.add_argument("snapshot_id", metavar="SNAP", help="a completed snapshot")
    words.add_image(register)
    words.add_volume(register)
    words.add_job(register)
    words.add_common(register)
    publish = verb("publish", "upload a disk and make an image of it", _PUBLISH)
    words.add_source(publish)
    words.add_upload(publish)
    words.add_image(publish)
    words.add_volume(publish)
    words.add_job(publish)
    words.add_common(publish)
    _add_others(verb)


def _add_others(verb: Callable[..., argparse.ArgumentParser]) -> None:
    import_ = verb("import", "import through S3 by VM Import, the slow way", _IMPORT)
    words.add_source(import_, optional=True)
    importing = import_.add_argument_group("import")
    importing.add_argument("--bucket", required=True, metavar="B", help="a bucket in the same region")
    importing.add_argument("--role", default="vmimport", metavar="NAME", help="the service role (default: vmimport)")
    importing.add_argument("--print-role", action="store_true", help="print the role's policies and stop")
    importing.add_argument("--encrypt", action="store_true", help="encrypt what is made")
    importing.add_argument("--kms-key", metavar="ARN", help="by this key (with --encrypt)")
    importing.add_argument("--description", metavar="TEXT")
    words.add_job(import_)
    words.add_common(import_)
    download = verb("download", "fetch a snapshot, or an image's root volume, into any format", _DOWNLOAD)
    download.add_argument("snapshot_id", metavar="SNAP", help="a snapshot or an image")
    download.add_argument("target", metavar="DST", help="the file to be written")
    group = download.add_argument_group("target")
    group.add_argument("-O", dest="target_format", metavar="FMT", help="DST's format (default: by its suffix)")
    group.add_argument("-o", dest="options", action="append", default=[], metavar="K=V,...", help="format options")
    group.add_argument("-c", dest="compressed", action="store_true", help="compress by the format's default codec")
    group.add_argument("--compress", metavar="CODEC[:LEVEL]", help="compress by deflate or zstd")
    group.add_argument("--since", metavar="SNAP", help="only blocks that changed since that snapshot (with -B)")
    group.add_argument(
        "-B", dest="base", metavar="BASE", help="an image of that snapshot; DST becomes an overlay on it"
    )
    group.add_argument("-F", dest="base_format", metavar="FMT", help="the format of BASE (default: by its content)")
    group.add_argument("--force", action="store_true", help="replace an existing target")
    group.add_argument("--no-sync", action="store_true", help="leave writing back to the kernel")
    words.add_common(download)
    plan = verb("plan", "tell what publishing would do, cost and need; nothing is changed", _PLAN)
    words.add_source(plan)
    words.add_upload(plan)
    words.add_image(plan, required=False)
    words.add_volume(plan)
    words.add_job(plan)
    words.add_common(plan)
    gc = verb("gc", "remove what jobs that died left behind", _GC)
    group = gc.add_argument_group("what")
    group.add_argument(
        "--older-than", default="1d", metavar="D", help="such as 12h or 3d, a number is days (default: 1d)"
    )
    group.add_argument("--dry-run", action="store_true", help="remove nothing; tell what would be")
    group.add_argument("--bucket", metavar="B", help="also objects and uploads under diskmorph/ in this bucket")
    words.add_yes(group)
    words.add_common(gc)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.commands import aws_verbs

    verb: Any = getattr(aws_verbs, f"run_{args.aws_verb}")
    return int(verb(args, out))
