"""`diskmorph lint PKG --for TARGET`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_parents, parents_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from diskmorph.commands.output import Output
    from diskmorph.convert.lint import LintReport

TARGETS = (
    "esxi",
    "virtualbox",
    "proxmox",
    "aws",
    "azure",
    "gcp",
    "openstack",
    "hyperv",
    "kubevirt",
    "vagrant-libvirt",
    "incus",
)

DESCRIPTION = """\
Tell what an importer would refuse in an OVF package (.ova or .ovf: esxi, virtualbox, proxmox, aws) or of a disk image:
each finding with its rule, the place and the mend.
Exit status 3 if there are findings."""

EXAMPLES = (
    ("diskmorph lint vm.ova --for esxi", "before an upload to VMware"),
    ("diskmorph lint disk.vhd --for azure", "a bare disk"),
    ("diskmorph lint vm.ovf --for proxmox --json", "for a program"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("package", metavar="PKG", help="the package")
    parser.add_argument("--for", dest="target", required=True, metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    group = parser.add_argument_group("source")
    add_parents(group)
    add_output(parser, progress=False)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.convert.lint import lint

    report = lint(args.package, args.target, parents=parents_of(args))
    out.result(report.as_dict(), _lines(report, quiet=out.quiet))
    return 3 if report.findings else 0


def _lines(report: LintReport, *, quiet: bool) -> Iterator[str]:
    for finding in report.findings:
        yield f"{finding.place}: {finding.message} [{finding.rule}]"
        yield f"  mend: {finding.hint}"
    if not report.findings and not quiet:
        yield f"{report.file}: nothing that {report.target} would refuse"
