"""What importers refuse of a VMDK's own header, descriptor and end, in a package or by itself.

Each function yields (what is wrong, where, how to mend it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.convert.lint_facts import VmdkFacts

    Found = Iterator[tuple[str, str, str]]

_SCSI_ADAPTERS = {"lsilogic", "buslogic", "pvscsi", "legacyesx"}


@dataclass(frozen=True, slots=True)
class Judged:
    """A VMDK: what it is called, the file's bytes, what its header says, and how it can be written anew."""

    name: str
    size: int
    facts: VmdkFacts
    anew: str


def versions(vmdk: Judged) -> Found:
    """Demand that the sparse header is of version 3; of older ones VMware says "sparse VMDK version too old"."""
    found = vmdk.facts.version
    if vmdk.facts.compressed and found < 3:
        wrong = f"the header of {vmdk.name} is of version {found}, which is too old: 3 is taken"
        yield wrong, f"{vmdk.name} byte 4", vmdk.anew


def ends(vmdk: Judged) -> Found:
    """Demand that the stream ends the file: bytes behind it break the digests of VMware's importers."""
    trailing = vmdk.facts.trailing
    if trailing == 0:
        return
    if trailing is None or trailing < 0:
        what = "is cut off" if trailing is None else "lacks its end-of-stream marker"
        yield f"the stream in {vmdk.name} {what}", f"{vmdk.name} byte {vmdk.size}", vmdk.anew
        return
    at = vmdk.size - trailing
    wrong = f"{trailing} bytes follow the end of the stream in {vmdk.name}"
    yield wrong, f"{vmdk.name} byte {at}", f"cut the file at byte {at}, or {vmdk.anew}"


def adapters(vmdk: Judged) -> Found:
    """Demand that the disk's own descriptor names a SCSI adapter."""
    said = vmdk.facts.settings.get("ddb.adapterType")
    if said is not None and said.strip().lower() not in _SCSI_ADAPTERS:
        wrong = f"the disk {vmdk.name} names the adapter {said.strip()}; a SCSI adapter is taken"
        yield wrong, f"{vmdk.name}, its descriptor", vmdk.anew
