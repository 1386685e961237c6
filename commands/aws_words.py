"""The words of `diskmorph aws ...`, and the options that they stand for."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_parents, parents_of, size_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.commands.output import Output
    from diskmorph.convert.aws.publish import JobOptions
    from diskmorph.convert.aws.register import ImageOptions
    from diskmorph.convert.aws.session import Session
    from diskmorph.convert.aws.sources import SourceOptions
    from diskmorph.convert.aws.upload import UploadOptions
    from diskmorph.convert.bridge.options import BuildOptions
    from diskmorph.convert.options import Progress

_NOTHING = argparse.SUPPRESS


def add_common(parser: argparse.ArgumentParser, *, progress: bool = True, manual: str = "docs/aws.md") -> None:
    """Add output words to a verb below a verb; unsaid ones leave what was said before it."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", default=_NOTHING, help=f"print one JSON object ({manual})")
    group.add_argument(
        "-q", "--quiet", action="store_true", default=_NOTHING, help="say nothing but results and errors"
    )
    group.add_argument(
        "-v", "--verbose", action="count", default=_NOTHING, help="say more; -vv adds tracebacks to errors"
    )
    if progress:
        group.add_argument(
            "--progress",
            choices=("auto", "bar", "json", "none"),
            default=_NOTHING,
            help="auto: a bar on a terminal, else nothing; json: an object a line on standard error",
        )
        group.add_argument(
            "-p", dest="progress", action="store_const", const="bar", default=_NOTHING, help="same as --progress bar"
        )


def add_job(parser: argparse.ArgumentParser) -> None:
    """Add what every job that makes something takes."""
    group = parser.add_argument_group("job")
    group.add_argument(
        "--tag", action="append", default=[], metavar="K=V", help="a tag for all that is made; repeatable"
    )
    group.add_argument(
        "--keep-on-failure", action="store_true", help="leave what was made when the job fails, and name it"
    )
    add_yes(group)


def add_yes(group: argparse._ArgumentGroup) -> None:
    """Add --yes."""
    group.add_argument("--yes", action="store_true", help="ask no questions on a terminal")


def add_source(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the source and how it is read."""
    count = "?" if optional else None
    parser.add_argument("source", metavar="SRC", nargs=count, help="a disk image, a package, or a container image")
    group = parser.add_argument_group("source")
    group.add_argument("-f", "--format", metavar="FMT", help="the source's format (default: by its content)")
    group.add_argument("--snapshot", metavar="NAME", help="an internal snapshot as the source")
    group.add_argument("--disk", type=int, metavar="N", help="which disk of a package, from 1")
    add_parents(group)
    group = parser.add_argument_group("container (the disk is built on the way)")
    group.add_argument("--size", metavar="SIZE", help="SIZE, min, or +SLACK left free")
    group.add_argument(
        "--boot", default="bios,uefi", metavar="HOW", help="bios,uefi (the default), bios, uefi, uki or none"
    )
    group.add_argument("--kernel", metavar="FILE", help="a vmlinuz, or a kernel package (.deb)")
    group.add_argument("--modules", metavar="DIR", help="its modules")
    group.add_argument("--initrd", metavar="FILE", help="an initial ramdisk, instead of one made here")
    group.add_argument("--cmdline", metavar="WORDS", help="the kernel's command line")
    group.add_argument("--part", action="append", default=[], metavar="DEB", help="a package that brings boot parts")
    group.add_argument("--hostname", metavar="NAME")
    group.add_argument("--ssh-key", action="append", default=[], metavar="KEY", help="a public key that root lets in")
    group.add_argument(
        "--entrypoint", choices=("auto", "always", "never"), default="auto", help="run the image's ENTRYPOINT"
    )
    group.add_argument("--platform", metavar="OS/ARCH", help="which image of a multi-platform index")


def add_upload(parser: argparse.ArgumentParser) -> None:
    """Add how a snapshot is made."""
    group = parser.add_argument_group("snapshot")
    group.add_argument("--encrypt", action="store_true", help="encrypt the snapshot")
    group.add_argument("--kms-key", metavar="ARN", help="by this key (with --encrypt)")
    group.add_argument(
        "--zero",
        choices=("auto", "send", "omit"),
        default="auto",
        help="zeroes that were written: sent if the snapshot is encrypted (auto), always, or never",
    )
    group.add_argument("--parent", metavar="SNAP", help="only what differs from this snapshot")
    group.add_argument("--workers", type=int, metavar="N", help="connections, 1 to 64 (default: as many as help)")
    group.add_argument("--max-rps", type=float, metavar="N", help="at most so many blocks a second")


def add_volume(parser: argparse.ArgumentParser) -> None:
    """Add the volume's size and the description."""
    group = parser.add_argument_group("volume")
    group.add_argument("--volume-size", metavar="SIZE", help="the volume's size, in whole GiB (default: the disk's)")
    group.add_argument("--description", metavar="TEXT")


def add_image(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add how an image is registered."""
    group = parser.add_argument_group("image (what is not said is read from the disk)")
    group.add_argument("--name", required=required, default="", metavar="NAME", help="the image's name")
    group.add_argument("--arch", metavar="ARCH", help="x86_64, arm64 or i386")
    group.add_argument("--boot-mode", metavar="MODE", help="legacy-bios, uefi or uefi-preferred")
    group.add_argument("--root-device", metavar="DEVICE", help="such as /dev/xvda")
    group.add_argument("--volume-type", default="gp3", metavar="TYPE", help="of the root volume (default: gp3)")
    group.add_argument(
        "--imds", choices=("v2.0", "optional"), default="v2.0", help="v2.0: metadata by session only (the default)"
    )
    group.add_argument("--tpm", action="store_true", help="a virtual TPM 2.0 (boots by UEFI only)")
    group.add_argument(
        "--copy-to", action="append", default=[], metavar="REGION", help="also in this region; repeatable"
    )
    group.add_argument(
        "--share",
        action="append",
        default=[],
        metavar="WHO",
        help="an account, an organisation's ARN, or all; repeatable",
    )
    group.add_argument("--deprecate-at", metavar="TIME", help="such as 2031-05-01T00:00:00Z")


# --- from words to options


def session_of() -> Session:
    """Return a session with AWS as boto3 finds it."""
    from diskmorph.convert.aws.session import Session

    return Session()


def source_options(args: argparse.Namespace) -> SourceOptions:
    """Return how the source is read."""
    from diskmorph.convert.aws.sources import SourceOptions

    return SourceOptions(
        format=args.format,
        parents=parents_of(args),
        snapshot=args.snapshot,
        disk=args.disk,
        build=partial(_build_options, args),
    )


def _build_options(args: argparse.Namespace) -> BuildOptions:
    from diskmorph.convert.bridge.options import BuildOptions, Size, parse_boot

    return BuildOptions(
        size=Size.parse(args.size),
        boot=parse_boot(args.boot),
        kernel=_path(args.kernel),
        modules=_path(args.modules),
        initrd=_path(args.initrd),
        cmdline=args.cmdline,
        hostname=args.hostname,
        ssh_keys=tuple(args.ssh_key),
        entrypoint=args.entrypoint,
        platform=args.platform,
        parts=tuple(Path(name) for name in args.part),
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def upload_options(args: argparse.Namespace) -> UploadOptions:
    """Return how the snapshot is made."""
    from diskmorph.convert.aws.upload import UploadOptions

    return UploadOptions(
        volume_size=size_of(args.volume_size, "--volume-size"),
        encrypt=args.encrypt,
        kms_key=args.kms_key,
        zero=args.zero,
        parent=args.parent,
        workers=args.workers,
        max_rps=args.max_rps,
        description=args.description,
    )


def image_options(args: argparse.Namespace) -> ImageOptions:
    """Return how the image is registered."""
    from diskmorph.convert.aws.register import ImageOptions

    return ImageOptions(
        name=args.name,
        architecture=args.arch,
        boot_mode=args.boot_mode,
        root_device=args.root_device,
        volume_type=args.volume_type,
        volume_size=size_of(args.volume_size, "--volume-size"),
        imds=args.imds,
        tpm=args.tpm,
        description=args.description,
        copy_to=tuple(args.copy_to),
        share=tuple(args.share),
        deprecate_at=args.deprecate_at,
    )


def job_options(args: argparse.Namespace, out: Output, tell: Callable[[Progress], None]) -> JobOptions:
    """Return what every job takes; `tell` takes its progress."""
    from diskmorph.convert.aws.job import parse_tags
    from diskmorph.convert.aws.publish import JobOptions

    def say(text: str) -> None:
        """Tell of what was removed or kept, which even `--json` and `-q` do not silence."""
        out.stderr.write(f"diskmorph: {text}\n")

    return JobOptions(parse_tags(args.tag), args.keep_on_failure, out.note, tell, say)
