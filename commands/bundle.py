"""`diskmorph bundle IMAGE DIR`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_parents, parents_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from diskmorph.commands.output import Output

DESCRIPTION = """\
Make an EC2 bundle of an image: tar, gzip, AES-128-CBC, parts of 10 MiB and a signed manifest, in a new folder. The
image is read as the guest sees it, whatever its format; kernels and ramdisks are taken as they are."""

_KEYS = "--key key.pem --cert cert.pem --ec2-cert ec2.pem"

EXAMPLES = (
    (
        f"diskmorph bundle root.img out --type machine --user 123456789012 --arch x86_64 {_KEYS}",
        "a machine image (ami)",
    ),
    (
        f"diskmorph bundle vmlinuz out --type kernel --user 123456789012 --arch x86_64 {_KEYS}",
        "a kernel (aki); likewise --type ramdisk (ari)",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMAGE", help="the disk image, kernel or ramdisk")
    parser.add_argument("folder", metavar="DIR", help="the new folder for the parts and NAME.manifest.xml")
    group = parser.add_argument_group("bundle")
    group.add_argument("--type", choices=("machine", "kernel", "ramdisk"), default="machine", help="what IMAGE is")
    group.add_argument("--user", required=True, metavar="ACCOUNT", help="the account's number, twelve digits")
    group.add_argument("--arch", required=True, choices=("i386", "x86_64", "arm64"), help="the architecture")
    group.add_argument("--key", required=True, metavar="PEM", help="the account's private key, which signs")
    group.add_argument("--cert", required=True, metavar="PEM", help="the account's certificate")
    group.add_argument("--ec2-cert", required=True, metavar="PEM", help="Amazon's certificate for the region")
    group.add_argument("--kernel-id", metavar="AKI", help="the kernel that a machine image boots")
    group.add_argument("--ramdisk-id", metavar="ARI", help="the ramdisk that goes with it")
    group.add_argument(
        "--block-device-mapping",
        action="append",
        default=[],
        metavar="VIRTUAL=DEVICE",
        help="such as root=/dev/sda1; repeatable",
    )
    group = parser.add_argument_group("source and target")
    group.add_argument("-f", "--format", metavar="FMT", help="the image's format (default: by its content)")
    add_parents(group)
    group.add_argument(
        "--force", action="store_true", help="taken for uniformity; a folder with files is refused still"
    )
    group.add_argument("--no-sync", action="store_true", help="leave writing back to the kernel")
    group.add_argument(
        "--reproducible", action="store_true", help="same image, same parts: key and IV from the content"
    )
    group.add_argument("--dry-run", action="store_true", help="write nothing; tell what would happen")
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.commands.progress import progress
    from diskmorph.convert.bundles import BundleOptions, bundle

    options = BundleOptions(
        type=args.type,
        user=args.user,
        architecture=args.arch,
        key=args.key,
        certificate=args.cert,
        ec2_certificate=args.ec2_cert,
        kernel_id=args.kernel_id,
        ramdisk_id=args.ramdisk_id,
        mappings=_mappings(args.block_device_mapping),
        source_format=args.format,
        reproducible=args.reproducible,
        sync=not args.no_sync,
        dry_run=args.dry_run,
        parents=parents_of(args),
    )
    with progress(out, "bundling") as tell:
        report = bundle(args.image, args.folder, options, on_progress=tell)
    for warning in report.warnings:
        out.note(f"warning: {warning}")
    out.report(report.as_dict(), _lines(report.as_dict()))
    return 0


def _mappings(words: list[str]) -> dict[str, str]:
    from diskmorph.formats.errors import OptionError

    found = {}
    for word in words:
        for pair in word.split(","):
            virtual, sign, device = pair.partition("=")
            if not sign or not virtual or not device:
                raise OptionError(f"--block-device-mapping {pair!r} is not VIRTUAL=DEVICE")
            found[virtual] = device
    return found


def _lines(report: dict[str, object]) -> Iterator[str]:
    from diskmorph.commands.text import size_text

    size, stored = report["virtual_size"], report["stored_size"]
    assert isinstance(size, int)  # noqa: S101
    assert isinstance(stored, int)  # noqa: S101
    yield f"{report['target']}: {report['type']}, {size_text(size)} in {report['parts']} parts of {size_text(stored)}"
