"""Rules of `lint` for archive and manifest. Each yields (message, place, hint) for what an importer would refuse."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.convert.lint_facts import Facts

    Found = Iterator[tuple[str, str, str]]

_PORTABLE = re.compile(r"[A-Za-z0-9._ ()+-]+")
_ANEW = "write the package anew: `diskmorph convert PKG NEW.ova`"


def _member(facts: Facts, name: str) -> str:
    """Return the place of a member: its name and where its header is."""
    at = next((member.header for member in facts.members if member.name == name), None)
    return f"member {name}" if at is None else f"member {name} at byte {at}"


def descriptor_first(facts: Facts) -> Found:
    """Demand that the descriptor is the first member (DSP0243 6.3)."""
    if facts.archive and facts.members and facts.members[0].name != facts.descriptor:
        yield (
            f"the descriptor {facts.descriptor} is not first: {facts.members[0].name} stands before it",
            _member(facts, facts.descriptor),
            _ANEW,
        )


def manifest_place(facts: Facts) -> Found:
    """Demand that manifest and certificate follow the descriptor at once, or are last (DSP0243 6.3)."""
    if not facts.archive or facts.manifest is None:
        return
    names = [member.name for member in facts.members]
    group = [name for name in (facts.manifest, facts.certificate) if name in names]
    at = names.index(facts.manifest)
    behind = names.index(facts.descriptor) + 1
    if names[at : at + len(group)] == group and at in {behind, len(names) - len(group)}:
        return
    yield (
        f"the manifest {facts.manifest} stands neither behind the descriptor nor last",
        _member(facts, facts.manifest),
        _ANEW,
    )


def disk_order(facts: Facts) -> Found:
    """Demand that files stand in the order of the References: an importer that streams meets them so (DSP0243 6.3)."""
    if not facts.archive or facts.envelope is None:
        return
    wanted = [file.ref.href for file in facts.files]
    found = [member.name for member in facts.members if member.name in wanted]
    expected = [name for name in wanted if name in found]
    if found != expected:
        yield (
            f"the files stand in another order than the descriptor names them: {', '.join(found)}",
            _member(facts, found[0]),
            _ANEW,
        )


def extensions(facts: Facts) -> Found:
    """Demand that headers are ustar; importers read PAX and GNU names as files of their own, or stop."""
    odd = [member for member in facts.members if set(member.extensions) - {"base-256 size"}]
    if odd:
        words = ", ".join(dict.fromkeys(word for member in odd for word in member.extensions))
        yield (
            f"{len(odd)} of its members have extended headers ({words}), which importers do not read",
            _member(facts, odd[0].name),
            f"{_ANEW}; tar needs --format=ustar",
        )


def names(facts: Facts) -> Found:
    """Demand that members have flat, portable names."""
    for member in facts.members:
        if not _PORTABLE.fullmatch(member.name):
            yield f"the member's name {member.name!r} is not flat and portable", _member(facts, member.name), _ANEW


def manifest_form(facts: Facts) -> Found:
    """Demand that lines are `SHA256(name)= hex`, exactly."""
    odd = [line for line in facts.lines if not line.exact]
    if odd:
        yield (
            f"the manifest has {len(odd)} lines in another form than `{odd[0].algorithm}(name)= hex`",
            f"{facts.manifest} line {odd[0].line}",
            "write each as ALGORITHM(name)= hex, in lower case, with one blank behind the sign and none elsewhere",
        )


def manifest_digests(facts: Facts) -> Found:
    """Demand that digests are true."""
    for digest in facts.false_digests:
        yield (
            f"the manifest's {digest.algorithm} of {digest.name} is false: the file was changed or damaged",
            f"{facts.manifest} line {digest.line}",
            "restore the file; or, if it is as it should be, write a new manifest",
        )


def manifest_files(facts: Facts) -> Found:
    """Demand that the manifest names files that are there, and all that are referenced."""
    for digest in facts.missing_digests:
        yield (
            f"the manifest names {digest.name}, which is not in the package",
            f"{facts.manifest} line {digest.line}",
            "add the file, or remove the line",
        )
    if not facts.lines:
        return
    named = {line.name for line in facts.lines}
    wanted = [facts.descriptor]
    wanted += [file.ref.href for file in facts.files if file.size is not None and not file.ref.chunk_size]
    for name in wanted:
        if name not in named:
            yield f"the manifest does not name {name}", str(facts.manifest), "add its digest"
