"""`lint`: what an importer would refuse in a package. The rules are data: a name, the targets, a judge."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from diskmorph.convert import lint_archive, lint_descriptor
from diskmorph.convert.lint_disk import DISK_TARGETS, disk_findings
from diskmorph.convert.lint_facts import gather
from diskmorph.formats.errors import OptionError
from diskmorph.formats.limits import Limits
from diskmorph.formats.policy import Opener, Parents
from diskmorph.formats.probe import signatures

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from diskmorph.convert.lint_facts import Facts
    from diskmorph.formats.policy import Allowed

    Judge = Callable[[Facts], Iterator[tuple[str, str, str]]]

TARGETS = ("esxi", "virtualbox", "proxmox", "aws")
ESXI, VIRTUALBOX, PROXMOX, AWS = (frozenset({name}) for name in TARGETS)
ALL = frozenset(TARGETS)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that an importer would refuse: the rule, what is wrong, where, and how to mend it."""

    rule: str
    message: str
    place: str
    hint: str


@dataclass(frozen=True, slots=True)
class LintReport:
    """What was found in a package for a target."""

    file: str
    target: str
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of docs/json.md."""
        return {"file": self.file, "target": self.target, "findings": [asdict(finding) for finding in self.findings]}


class Rule(NamedTuple):
    """A rule: its name, the targets that it holds for, and its judge, which yields (message, place, hint)."""

    name: str
    targets: frozenset[str]
    judge: Judge


RULES: tuple[Rule, ...] = (
    Rule("archive-order", ALL, lint_archive.descriptor_first),
    Rule("archive-manifest-place", ALL, lint_archive.manifest_place),
    Rule("archive-disk-order", ESXI | AWS, lint_archive.disk_order),
    Rule("archive-pax", ALL, lint_archive.extensions),
    Rule("archive-names", ALL, lint_archive.names),
    Rule("manifest-form", ALL, lint_archive.manifest_form),
    Rule("manifest-digest", ALL, lint_archive.manifest_digests),
    Rule("manifest-files", ALL, lint_archive.manifest_files),
    Rule("ovf-version", ESXI | PROXMOX | AWS, lint_descriptor.version),
    Rule("envelope-order", ALL, lint_descriptor.envelope_order),
    Rule("item-order", ESXI, lint_descriptor.item_order),
    Rule("foreign-elements", ESXI, lint_descriptor.foreign_elements),
    Rule("href-flat", ALL, lint_descriptor.hrefs),
    Rule("file-missing", ALL, lint_descriptor.missing_files),
    Rule("file-size", ALL, lint_descriptor.file_sizes),
    Rule("file-compressed", PROXMOX | AWS, lint_descriptor.compressed_files),
    Rule("file-chunks", VIRTUALBOX | PROXMOX | AWS, lint_descriptor.chunked_files),
    Rule("capacity-units", PROXMOX | VIRTUALBOX, lint_descriptor.capacity_units),
    Rule("capacity", ALL, lint_descriptor.capacities),
    Rule("disk-format", ESXI | VIRTUALBOX | AWS, lint_descriptor.disk_formats),
    Rule("disk-stream", ESXI | AWS, lint_descriptor.disk_streams),
    Rule("vmdk-version", ESXI | AWS, lint_descriptor.vmdk_versions),
    Rule("vmdk-trailing", ESXI | VIRTUALBOX | AWS, lint_descriptor.vmdk_ends),
    Rule("vmdk-adapter", ESXI, lint_descriptor.vmdk_adapters),
    Rule("hardware-family", ESXI, lint_descriptor.families),
    Rule("one-machine", ESXI | PROXMOX | AWS, lint_descriptor.one_machine),
    Rule("controller-esxi", ESXI, lint_descriptor.controllers_esxi),
    Rule("controller-virtualbox", VIRTUALBOX, lint_descriptor.controllers_virtualbox),
    Rule("disk-place", ALL, lint_descriptor.disk_places),
    Rule("network", ESXI | VIRTUALBOX, lint_descriptor.networks),
    Rule("memory", ALL, lint_descriptor.memory),
    Rule("memory-multiple", ESXI, lint_descriptor.memory_multiple),
    Rule("firmware", ESXI, lint_descriptor.firmware),
    Rule("volumes", AWS, lint_descriptor.volumes),
)


def _is_disk(path: str | os.PathLike[str], target: str, parents: Parents, limits: Limits) -> bool:
    """Whether a file is a disk image with the mark of one; a target that takes no packages judges all as disks."""
    if target not in TARGETS:
        return True
    with Opener(parents, limits).user_file(path) as source:
        return any(found.outer and found.format not in {"ova", "ovf", "ami"} for found in signatures(source))


def lint(
    path: str | os.PathLike[str],
    target: str,
    *,
    parents: Allowed = None,
    limits: Limits | None = None,
) -> LintReport:
    """Judge a package by what `target` (one of TARGETS) takes, or a disk by what one of DISK_TARGETS takes.

    Packages are read leniently, nothing is changed.

    Raises OptionError (no such target), SourceError, UnsupportedError (no OVF package).
    """
    parents = Parents.of(parents)
    if target in DISK_TARGETS and _is_disk(path, target, parents, limits or Limits()):
        found = [Finding(*words) for words in disk_findings(path, target, parents=parents, limits=limits)]
        return LintReport(str(path), target, tuple(found))
    if target not in TARGETS:
        raise OptionError(f"unknown target {target!r} for --for", hint=f"one of {', '.join(DISK_TARGETS)}")
    limits = limits or Limits()
    facts = gather(path, Opener(parents, limits), limits)
    found = [
        Finding(rule, problem, facts.path, "repair it, or write it anew with `diskmorph convert`")
        for rule, problem in facts.unreadable
    ]
    for rule in RULES:
        if target in rule.targets:
            found += [Finding(rule.name, *words) for words in rule.judge(facts)]
    return LintReport(str(path), target, tuple(found))
