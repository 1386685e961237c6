"""`diskmorph build TREE DST`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_target, format_options

if TYPE_CHECKING:
    from diskmorph.commands.output import Output
    from diskmorph.convert.bridge.options import BuildOptions
    from diskmorph.convert.options import ConvertOptions

DESCRIPTION = """\
Build a bootable disk from a tree: a directory, a tar archive (gzip, zstd, xz or plain), a docker-archive, an OCI
layout or archive, an image in a registry (docker://HOST/NAME:TAG; credentials are those of docker login).

The disk has a GPT with the root file system last, so that it can grow. It is written straight in DST's format; no
root, no loop device and no temporary image are needed, and nothing of the tree is unpacked."""

EXAMPLES = (
    ("diskmorph build app.tar disk.qcow2", "boots on BIOS and UEFI; the tree has a kernel"),
    ("diskmorph build app.tar disk.vmdk --kernel linux-image.deb", "a container without a kernel"),
    ("diskmorph build docker://docker.io/library/debian:12 disk.qcow2 --kernel linux-image.deb", "from a registry"),
    ("diskmorph build oci:app disk.raw --boot none", "the root partition alone, nothing put in"),
    ("diskmorph build rootfs/ disk.vhdx --size 20G --hostname web-1", "of a given size"),
    ("diskmorph build app.tar disk.qcow2 --size min", "as small as can be; or --size +2G for room"),
    ("diskmorph build app.tar disk.qcow2 --boot uki", "a unified kernel image"),
    ("diskmorph build --layers oci:app top.qcow2", "one overlay an image layer, on a shared base"),
    ("diskmorph build app.tar disk.raw --triple out/", "also kernel, ramdisk and bare file system"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("source", metavar="TREE", help="a directory, archive or container image")
    parser.add_argument("target", metavar="DST", help="the disk to be written")
    group = parser.add_argument_group("tree")
    group.add_argument("-f", "--format", metavar="FMT", help="directory, tar, oci, oci-archive, docker-archive, docker")
    group.add_argument("--platform", metavar="OS/ARCH", help="which image of a multi-platform index")
    group = parser.add_argument_group("disk")
    group.add_argument("-O", dest="target_format", metavar="FMT", help="DST's format (default: by its suffix)")
    group.add_argument("-o", dest="options", action="append", default=[], metavar="K=V,...", help="format options")
    group.add_argument("-c", dest="compressed", action="store_true", help="compress by the format's default codec")
    group.add_argument("--compress", metavar="CODEC[:LEVEL]", help="compress by deflate or zstd")
    group.add_argument("--for", dest="profile", metavar="TARGET", help="what a cloud or hypervisor wants, in one word")
    group.add_argument("--size", metavar="SIZE", help="SIZE, min, or +SLACK left free (default: +512M)")
    group.add_argument("--fs", default="ext4", metavar="FS", help="the root's file system: ext4")
    group.add_argument("--label", default="", help="its label")
    group.add_argument("--layers", action="store_true", help="a chain of overlays, one an image layer; DST is the top")
    group.add_argument("--triple", metavar="DIR", help="also write DIR/ami, DIR/aki and DIR/ari")
    group.add_argument("--verify", action="store_true", help="read the disk back and compare it")
    _add_boot(parser)
    add_target(parser)
    add_output(parser)


def _add_boot(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("boot")
    group.add_argument(
        "--boot", default="bios,uefi", metavar="HOW", help="bios,uefi (the default), bios, uefi, uki or none"
    )
    group.add_argument("--kernel", metavar="FILE", help="a vmlinuz, or a kernel package (.deb)")
    group.add_argument("--modules", metavar="DIR", help="its modules, a directory such as lib/modules/VERSION")
    group.add_argument("--initrd", metavar="FILE", help="an initial ramdisk, instead of one made here")
    group.add_argument("--cmdline", metavar="WORDS", help="the kernel's command line")
    group.add_argument("--part", action="append", default=[], metavar="DEB", help="a package that brings boot parts")
    group.add_argument("--hostname", metavar="NAME")
    group.add_argument("--ssh-key", action="append", default=[], metavar="KEY", help="a public key that root lets in")
    group.add_argument(
        "--entrypoint",
        choices=("auto", "always", "never"),
        default="auto",
        help="whether the image's ENTRYPOINT runs as the machine's only program (auto: if there is no init)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.commands.convert import print_report
    from diskmorph.commands.progress import progress
    from diskmorph.convert.bridge import build

    options = options_of(args)
    with progress(out, "building") as tell:
        report = build(args.source, args.target, options=options, on_progress=tell)
    print_report(report, out, dry=args.dry_run)
    return 0


def options_of(args: argparse.Namespace) -> BuildOptions:
    """Return the words as the library's options."""
    from diskmorph.convert.bridge.options import BuildOptions, Size, parse_boot

    return BuildOptions(
        convert=_convert_options(args),
        size=Size.parse(args.size),
        fs=args.fs,
        boot=parse_boot(args.boot),
        kernel=_path(args.kernel),
        modules=_path(args.modules),
        initrd=_path(args.initrd),
        cmdline=args.cmdline,
        hostname=args.hostname,
        ssh_keys=tuple(args.ssh_key),
        entrypoint=args.entrypoint,
        layers=args.layers,
        triple=_path(args.triple),
        platform=args.platform,
        label=args.label,
        parts=tuple(Path(name) for name in args.part),
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _convert_options(args: argparse.Namespace) -> ConvertOptions:
    from diskmorph.convert.options import ConvertOptions

    return ConvertOptions(
        source_format=args.format,
        target_format=args.target_format,
        format_options=format_options(args.options),
        compress=args.compress or ("default" if args.compressed else None),
        profile=args.profile,
        verify=args.verify,
        reproducible=args.reproducible,
        sync=not args.no_sync,
        force=args.force,
        dry_run=args.dry_run,
    )
