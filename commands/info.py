"""`diskmorph info IMG`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diskmorph.commands.common import add_output, add_source, parents_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from diskmorph.commands.output import Output
    from diskmorph.formats.source import ByteSource

DESCRIPTION = """\
Tell what an image is: format and subformat, sizes, features, snapshots, its parent, every signature found, and the
partitions and file systems inside; of a package the machines, of a container image its layers, history and
configuration. A parent is named, not opened, unless it is allowed."""

EXAMPLES = (
    ("diskmorph info disk.vmdk", "what it is, for people"),
    ("diskmorph info --json disk.qcow2", "for a program"),
    ("diskmorph info --chain --allow-parent . top.qcow2", "every layer of a chain of backing files"),
    ("diskmorph info -f raw disk.img", "as a plain disk, whatever it looks like"),
    ("diskmorph info vm.ova", "a package: its machines and their disks"),
    ("diskmorph info docker://docker.io/library/alpine", "a container image: layers, history, configuration"),
    ("diskmorph info /boot/vmlinuz", "a Linux kernel; likewise an initial ramdisk, a bundle's manifest"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("image", metavar="IMG", help="the image; `-` is standard input")
    parser.add_argument("--chain", "--backing-chain", action="store_true", help="every layer down to the last parent")
    parser.add_argument("--platform", metavar="OS/ARCH", help="which image of a multi-platform index")
    add_source(parser)
    add_output(parser, progress=False)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    if args.image != "-":
        return _tell(args, out, None)
    from diskmorph.convert.opening import spooled

    with spooled() as source:
        return _tell(args, out, source)


def _tell(args: argparse.Namespace, out: Output, source: ByteSource | None) -> int:
    """Print what the image is; `source`: its bytes, of standard input."""
    from diskmorph.convert.describe import TREE_KINDS, describe

    package = describe(args.image, format=args.format, parents=parents_of(args), source=source, platform=args.platform)
    if package is not None and package["format"] in TREE_KINDS:
        from diskmorph.commands.info_tree import tree_lines

        out.result(package, tree_lines(package, verbose=out.verbose > 0))
        return 0
    if package is not None:
        from diskmorph.commands.info_package import package_lines

        for warning in package["warnings"]:
            out.note(f"{args.image}: {warning}")
        out.result(package, package_lines(package, verbose=out.verbose > 0))
        return 0
    from diskmorph.convert.inspect import inspect

    found = inspect(args.image, format=args.format, parents=parents_of(args), chain=args.chain, source=source)
    report = found.as_dict()
    for warning in report["warnings"]:
        out.note(f"{args.image}: {warning}")
    out.result(report, _lines(report, verbose=out.verbose > 0))
    return 0


def _lines(report: dict[str, Any], *, verbose: bool) -> Iterator[str]:
    from diskmorph.commands.text import properties

    yield from properties(_facts(report, verbose=verbose))
    if report["snapshots"]:
        from diskmorph.commands.snapshot import snapshot_lines

        yield ""
        yield "snapshots:"
        yield from snapshot_lines(report["snapshots"])
    if report["partition_table"]:
        yield ""
        yield from _partition_lines(report)
    for group in report["volume_groups"]:
        yield ""
        yield from _group_lines(group)
    for layer in report.get("chain", ())[1:]:
        yield ""
        yield f"on {layer['file']}"
        yield from ("  " + line for line in properties(_facts(layer, verbose=verbose)[1:]))


def _facts(report: dict[str, Any], *, verbose: bool) -> list[tuple[str, str]]:
    from diskmorph.commands.text import exact_size_text, size_text

    form = report["format"] + (f", {report['subformat']}" if report["subformat"] else "")
    if report["guessed"]:
        form += " (a guess: no format left its mark in it)"
    stored = exact_size_text(report["stored_size"])
    if report["allocated_size"] != report["stored_size"]:
        stored += f", {size_text(report['allocated_size'])} on the file system"
    facts = [
        ("file", report["file"]),
        ("format", form),
        ("virtual size", exact_size_text(report["virtual_size"])),
        ("stored size", stored),
    ]
    if report["sector_size"] != 512 or verbose:
        facts.append(("sector size", f"{report['sector_size']} bytes"))
    if report["allocation_unit"]:
        facts.append(("allocation unit", size_text(report["allocation_unit"])))
    told = {name: value for name, value in report["features"].items() if verbose or value not in (False, None, [], "")}
    facts.extend((name.replace("_", " "), _value_text(value)) for name, value in told.items())
    if report["parent"]:
        facts.append(("parent", _parent_text(report["parent"])))
    if report["bitmaps"]:
        facts.append(("bitmaps", ", ".join(report["bitmaps"])))
    known = {report["format"], "mbr", "gpt"} if report["partition_table"] else {report["format"]}
    if verbose or {signature["format"] for signature in report["signatures"]} - known:
        marks = [f"{signature['what']} at {signature['offset']}" for signature in report["signatures"]]
        facts.append(("signatures", ", ".join(marks) or "none"))
    if report["filesystem"]:
        facts.append(("contains", _filesystem_text(report)))
    if report["os"]:
        facts.append(("system", report["os"]["name"] or f"{report['os']['id']} {report['os']['version_id']}"))
    return facts


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_value_text(each) for each in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value_text(each)}" for name, each in value.items()) or "none"
    return "none" if value is None else str(value)


def _parent_text(parent: dict[str, Any]) -> str:
    names = ", or ".join(parent["names"]) or "not named"
    return names + (f" ({parent['format']})" if parent["format"] else "")


def _filesystem_text(place: dict[str, Any]) -> str:
    if place["filesystem"] is None:
        return "-"
    label = f" {place['filesystem_label']!r}" if place["filesystem_label"] else ""
    return f"{place['filesystem']}{label}"


def _partition_lines(report: dict[str, Any]) -> Iterator[str]:
    from diskmorph.commands.text import size_text, table

    scheme = report["partition_table"]
    yield f"partitions ({scheme['scheme'].upper()}, disk {scheme['id']}):"
    rows = [
        (
            str(partition["number"]),
            str(partition["start"]),
            size_text(partition["length"]),
            _filesystem_text(partition),
            partition["type_name"] + (", bootable" if partition["bootable"] else ""),
            partition["name"],
        )
        for partition in report["partitions"]
    ]
    yield from table(("no.", "start", "size", "holds", "type", "name"), rows, right=(0, 1, 2))


def _group_lines(group: dict[str, Any]) -> Iterator[str]:
    from diskmorph.commands.text import size_text, table

    places = [
        "a missing device"
        if member["missing"]
        else "the whole disk"
        if member["partition"] is None
        else f"partition {member['partition']}"
        for member in group["physical_volumes"]
    ]
    yield f"volume group {group['name']} (LVM2, on {', '.join(places)}):"
    rows = [
        (
            f"{group['name']}/{volume['name']}",
            size_text(volume["size"]),
            _filesystem_text(volume),
            volume["type"] + ("" if volume["readable"] else ", not read"),
        )
        for volume in group["logical_volumes"]
    ]
    yield from table(("logical volume", "size", "holds", "type"), rows, right=(1,))
