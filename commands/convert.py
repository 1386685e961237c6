"""`diskmorph convert SRC DST`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diskmorph.commands.common import (
    CACHE_MODES,
    Refused,
    add_output,
    add_source,
    add_target,
    asks_for_help,
    format_options,
    parents_of,
    passphrase_of,
    size_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.commands.output import Output
    from diskmorph.convert.options import ConvertOptions, ConvertReport

DESCRIPTION = """\
Write an image anew: another format, another subformat, compressed, flattened, grown, or as an overlay.

SRC and DST are files; `-` is standard input or output, where the format can be streamed (raw, if none is said). Several
SRC make one package (NAME.ova, NAME.ovf); a package's disks go one by one (--disk N) or all into a folder (DIR/). The
source's format is known by its content (-f decides), the target's by its suffix (-O decides). The target appears when
it is complete, or never."""

EXAMPLES = (
    ("diskmorph convert disk.vmdk disk.qcow2", "another format, chosen by the suffix"),
    ("diskmorph convert -c disk.raw disk.qcow2", "compressed, by the format's default codec"),
    ("diskmorph convert --compress zstd:9 disk.raw disk.qcow2", "compressed by a codec and level"),
    ("diskmorph convert -O vmdk -o subformat=streamOptimized disk.qcow2 disk.vmdk", "a subformat"),
    ("diskmorph convert -O vmdk -o help", "the options that a format takes"),
    ("diskmorph convert --for azure disk.qcow2 disk.vhd", "what a cloud's importer wants, in one word"),
    ("diskmorph convert --allow-parent . top.qcow2 flat.qcow2", "a chain of backing files, flattened"),
    ("diskmorph convert --keep-chain --allow-parent . top.qcow2 new/top.vmdk", "a chain, each layer a file of its own"),
    ("diskmorph convert https://host/disk.vmdk a.qcow2 --also b.vhdx", "two targets, one read of the source"),
    ("diskmorph convert -B base.qcow2 now.raw over.qcow2", "only what differs from another image"),
    ("diskmorph convert --snapshot monday disk.qcow2 monday.raw", "an internal snapshot"),
    ("diskmorph convert seed/ seed.iso --label cidata", "a directory, as a seed for cloud-init"),
    ("diskmorph convert --size 20G disk.raw disk.vdi", "grown on the way"),
    ("diskmorph convert --verify --digest disk.vhdx disk.qcow2", "read back, and hashed"),
    ("diskmorph convert --resume big.vmdk big.qcow2", "can be interrupted, and goes on when said again"),
    ("diskmorph convert -o encrypt.format=luks --passphrase-file key disk.raw safe.qcow2", "encrypted"),
    ("diskmorph convert --dry-run disk.qcow2 disk.vmdk", "what would happen, and what would be lost"),
    ("diskmorph convert disk.qcow2 s3://bucket/disk.raw", "to an object in S3; also nbd://host/export"),
    ("diskmorph convert --device disk.qcow2 /dev/sdX", "onto a block device, in place"),
    ("diskmorph convert disk.qcow2 - | zstd > disk.raw.zst", "through a pipe"),
    ("diskmorph convert -f raw -O qcow2 - disk.qcow2 < disk.raw", "from a pipe"),
    ("diskmorph convert disk.qcow2 vm.ova -o cpus=2,memory=4G,firmware=efi", "a package with its machine"),
    ("diskmorph convert root.qcow2 data.vhdx vm.ova", "several disks in one package"),
    ("diskmorph convert vm.ova disk.qcow2 --disk 2", "one disk of a package, read where it lies"),
    ("diskmorph convert vm.ova disks/ -O qcow2", "all of them"),
)

_REFUSED = (
    (
        ("-n", "--no-create"),
        0,
        "a target is replaced with --force, a block device written in place with --device, nbd://... always",
    ),
    (("--salvage",), 0, "a damaged image is never read as if it were whole; `diskmorph check --repair` may mend it"),
    (("--target-is-zero",), 0, "a file is new and reads as zeroes by itself; a device is zeroed where it must be"),
    (("--image-opts",), 0, "name the file, its format with -f and its parent with --backing"),
    (("--target-image-opts",), 0, "name the file, its format with -O and its options with -o"),
    (("--bitmaps", "--skip-broken-bitmaps"), 0, "bitmaps go from qcow2 to qcow2 by themselves, where the size stays"),
    (("--object",), 1, "encrypted images are opened with --passphrase-file and made with --target-passphrase-file"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("paths", nargs="*", metavar="SRC DST", help="the source and the target; `-` is a pipe")
    add_source(parser)
    parser.add_argument("--snapshot", metavar="NAME", help="an internal snapshot as the source")
    parser.add_argument("--disk", type=int, metavar="N", help="a package's disk as the source, from 1")
    parser.add_argument("-l", dest="snapshot", type=_snapshot_word, metavar="NAME", help=argparse.SUPPRESS)
    _add_shape(parser)
    _add_run(parser)
    add_target(parser)
    add_output(parser)
    for words, count, instead in _REFUSED:
        parser.add_argument(*words, action=Refused, nargs=count, instead=instead)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    from diskmorph.convert.targets import PROFILES

    profiles = ", ".join(profile.name for profile in PROFILES)
    group = parser.add_argument_group("shape of the target")
    group.add_argument("-O", dest="target_format", metavar="FMT", help="the target's format (default: by its suffix)")
    group.add_argument(
        "-o", dest="options", action="append", default=[], metavar="K=V,...", help="format options; -o help lists them"
    )
    group.add_argument("--for", dest="profile", metavar="TARGET", help=f"one of {profiles}")
    group.add_argument("-c", dest="compressed", action="store_true", help="compress by the format's default codec")
    group.add_argument("--compress", metavar="CODEC[:LEVEL]", help="compress by deflate or zstd")
    group.add_argument("-B", dest="base", metavar="BASE", help="write only what differs from BASE, as an overlay on it")
    group.add_argument("-F", dest="base_format", metavar="FMT", help="the format of BASE (default: by its content)")
    group.add_argument(
        "--target-passphrase-file",
        metavar="FILE",
        help="what opens the target, with -o encrypt.format=luks (default: the source's passphrase)",
    )
    group.add_argument("--label", metavar="LABEL", help="the volume's label, of an ISO")
    group.add_argument("--size", metavar="SIZE", help="another virtual size; data is never cut off")
    group.add_argument("-S", dest="zero_unit", metavar="SIZE", default="4k", help="unit of zero detection; 0: off")
    group.add_argument("--flatten", action="store_true", help="make one image of a chain (the default)")
    group.add_argument(
        "--also", action="append", default=[], metavar="DST2", help="a further target of the same read; repeatable"
    )
    group.add_argument("--keep-chain", action="store_true", help="each layer of a chain becomes a file of its own")
    group.add_argument("--device", action="store_true", help="DST is a block device, written in place")


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--digest", action="store_true", help="hash the content on the way (SHA-256)")
    group.add_argument("--verify", action="store_true", help="read the target back and compare it")
    group.add_argument(
        "--resume", action="store_true", help="go on where an interrupted conversion stopped, if it was said there too"
    )
    group.add_argument("-r", "--rate", metavar="BYTES", help="at most so many bytes a second")
    group.add_argument("--threads", "-m", type=int, metavar="N", help="worker threads (default: one a core)")
    group.add_argument("-W", action="store_true", help=argparse.SUPPRESS)  # out-of-order writes: always so
    group.add_argument("-C", action="store_true", help=argparse.SUPPRESS)  # copy offloading: wherever it helps
    group.add_argument("-t", dest="cache", choices=CACHE_MODES, help=argparse.SUPPRESS)
    group.add_argument("-T", dest="source_cache", choices=CACHE_MODES, help=argparse.SUPPRESS)


def _snapshot_word(word: str) -> str:
    """Take qemu-img's `snapshot.name=NAME` too."""
    return word.removeprefix("snapshot.name=").removeprefix("snapshot.id=")


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    if asks_for_help(args.options):
        return print_options(args.target_format, args.paths[-1] if args.paths else None, out)
    from diskmorph.formats.errors import OptionError

    source, target = _source_and_target(args)
    if args.flatten and args.keep_chain:
        raise OptionError("--flatten and --keep-chain exclude each other")
    options = options_of(args)
    if out.json and target == "-":
        raise OptionError("--json prints on standard output, where the image goes", hint="write the target to a file")

    import diskmorph
    from diskmorph.commands.progress import progress

    with progress(out, "converting") as tell:
        report = diskmorph.convert(cast("str", source), target, options=options, on_progress=tell)
    print_report(report, out, dry=args.dry_run)
    return 0


def options_of(args: argparse.Namespace) -> ConvertOptions:
    """Return the words as the library's options."""
    from diskmorph.convert.options import ConvertOptions

    compress = args.compress or ("default" if args.compressed else None)
    return ConvertOptions(
        source_format=args.format,
        target_format=args.target_format,
        format_options=format_options(args.options),
        compress=compress,
        base=Path(args.base) if args.base else None,
        base_format=args.base_format,
        snapshot=args.snapshot,
        disk=args.disk,
        size=size_of(args.size, "--size"),
        zero_unit=size_of(args.zero_unit, "-S") or 0,
        profile=args.profile,
        digest=args.digest,
        verify=args.verify,
        reproducible=args.reproducible,
        rate=size_of(args.rate, "--rate"),
        sync=not args.no_sync and args.cache != "unsafe",
        force=args.force,
        dry_run=args.dry_run,
        device=args.device,
        resume=args.resume,
        target_passphrase=passphrase_of(args.target_passphrase_file),
        keep_chain=args.keep_chain,
        also=tuple(args.also),
        label=args.label,
        threads=args.threads,
        parents=parents_of(args),
    )


def _source_and_target(args: argparse.Namespace) -> tuple[str | list[str], str]:
    from diskmorph.formats.errors import OptionError

    if len(args.paths) < 2:
        raise OptionError("convert needs a source and a target", hint="see `diskmorph convert --help`")
    if len(args.paths) > 2:
        return args.paths[:-1], args.paths[-1]
    return args.paths[0], args.paths[1]


def print_options(named: str | None, target: str | None, out: Output) -> int:
    """Print the options of the target's format, which -O or the target's suffix names."""
    from dataclasses import asdict

    from diskmorph.commands.formats import option_lines
    from diskmorph.formats.errors import OptionError
    from diskmorph.formats.probe import format_of_suffix
    from diskmorph.formats.registry import load, require_format

    by_suffix = format_of_suffix(target) if target else None
    if named is None and by_suffix is None:
        raise OptionError("-o help needs a format", hint="name it with -O FMT")
    entry = require_format(named) if named is not None else by_suffix
    assert entry is not None  # noqa: S101 - one of the two
    module = load(entry)
    report = {"format": entry.name, "options": [asdict(option) for option in module.OPTIONS]}
    out.result(report, [f"Options of {entry.name}:", *option_lines(module.OPTIONS)])
    return 0


def print_report(report: ConvertReport, out: Output, *, dry: bool) -> None:
    """Print what a conversion did, or would do: notes and losses on standard error, the rest as a result."""
    every = (report, *report.also)
    for note in dict.fromkeys(note for one in every for note in one.notes):
        out.note(note)
    for loss in dict.fromkeys(loss for one in every for loss in one.lost):
        out.note(f"{'would be lost' if dry else 'lost'}: {loss}")
    if report.target == "-":
        return
    out.report(
        report.as_dict(),
        [line for one in every for line in _report_lines(one, out, dry=dry)],
    )


def _report_lines(report: ConvertReport, out: Output, *, dry: bool) -> Iterator[str]:
    from diskmorph.commands.text import size_text

    moved = {name: value for name, value in report.as_dict()["bytes"].items() if value}
    how = ", ".join(f"{name} {size_text(value)}" for name, value in moved.items()) or "nothing to move"
    done = "would be written" if dry else f"written in {report.seconds:.1f} s"
    sizes = f"{size_text(report.virtual_size)} virtual, {size_text(report.stored_size)} stored"
    yield f"{report.target}: {report.format}, {sizes}; {done} ({how})"
    if report.resumed:
        yield f"  resumed: {size_text(report.resumed)} were done before"
    if report.verified:
        yield "  read back and compared: the same content"
    if report.digest:
        yield f"  sha256 {report.digest}"
    for name, value in report.properties.items():
        yield f"  property {name}={value}"
    if out.verbose and len(report.members) > 1:
        for member in report.members:
            yield f"  member {member}"
