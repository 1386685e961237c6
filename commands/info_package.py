"""What `info` prints of packages, kernels and ramdisks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diskmorph.commands.text import exact_size_text, properties, size_text, table

if TYPE_CHECKING:
    from collections.abc import Iterator


def package_lines(report: dict[str, Any], *, verbose: bool) -> Iterator[str]:
    """Yield the lines for people of what `describe` returned."""
    yield from properties(
        [
            ("file", report["file"]),
            ("format", report["format"]),
            ("stored size", exact_size_text(report["stored_size"])),
            *_facts(report, verbose=verbose),
        ]
    )
    for machine in report.get("machines", ()):
        yield ""
        yield from _machine_lines(machine)
    if "segments" in report:
        yield ""
        yield from _segment_lines(report, verbose=verbose)
    if report.get("bundle") and verbose:
        yield ""
        rows = [(str(part["index"]), part["file"], part["sha1"]) for part in report["bundle"]["parts"]]
        yield from table(("part", "file", "SHA-1"), rows, right=(0,))


def _facts(report: dict[str, Any], *, verbose: bool) -> Iterator[tuple[str, str]]:
    if "ovf_version" in report:
        yield "OVF version", report["ovf_version"]
        yield "manifest", "verified" if report["manifest"] else "none"
    if "kernel" in report:
        yield from _kernel_facts(report["kernel"], verbose=verbose)
    if "segments" in report:
        yield "kernels", ", ".join(report["releases"]) or "none named"
        yield "modules", str(len(report["modules"]))
        yield "entries", str(report["entries"])
        if report["generator"]:
            yield "made by", report["generator"]
    if "bundle" in report:
        yield from _bundle_facts(report["bundle"])


def _kernel_facts(kernel: dict[str, Any], *, verbose: bool) -> Iterator[tuple[str, str]]:
    yield "kind", f"{kernel['kind']}{', EFI program' if kernel['efi_stub'] else ''}"
    yield "version", kernel["banner"] or kernel["version"] or "unknown"
    yield "architecture", kernel["architecture"]
    if kernel["protocol"]:
        yield "boot protocol", kernel["protocol"]
    if kernel["cmdline_size"]:
        yield "command line", f"at most {kernel['cmdline_size']} bytes"
    if kernel["compression"]:
        yield "compressed by", kernel["compression"]
    if verbose:
        for name, value in kernel["header"].items():
            yield name, str(value) if isinstance(value, str) else f"{value:#x}"


def _bundle_facts(bundle: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "image", f"{bundle['name']}, {exact_size_text(bundle['size'])}"
    yield "type", f"{bundle['type']} ({bundle['label']})"
    yield "account", bundle["user"]
    yield "architecture", bundle["architecture"]
    for word in ("kernel_id", "ramdisk_id"):
        if bundle[word]:
            yield word.replace("_", " "), bundle[word]
    for virtual, device in bundle["block_device_mapping"].items():
        yield "device", f"{virtual} = {device}"
    yield "bundled size", f"{exact_size_text(bundle['bundled_size'])} in {len(bundle['parts'])} parts"
    if bundle["bundler"]:
        yield "bundled by", bundle["bundler"]


def _machine_lines(machine: dict[str, Any]) -> Iterator[str]:
    yield f"machine {machine['name']}"
    system = machine["os"] or {}
    facts = [
        ("CPUs", str(machine["cpus"])),
        ("memory", size_text(machine["memory"]) if machine["memory"] else "not said"),
        ("firmware", machine["firmware"] + (", secure boot" if machine["secure_boot"] else "")),
    ]
    if system.get("id") or system.get("description"):
        facts.append(("system", system.get("description") or system["id"]))
    if machine["hardware"]:
        facts.append(("hardware", machine["hardware"]))
    facts.extend(
        ("network card", " on ".join(word for word in (nic["model"], nic["network"]) if word) or "yes")
        for nic in machine["nics"]
    )
    yield from ("  " + line for line in properties(facts))
    buses = {one["id"]: one["model"] or one["bus"] for one in machine["controllers"]}
    rows = [
        (
            str(disk["number"]),
            size_text(disk["virtual_size"]) if disk["virtual_size"] is not None else "unknown",
            disk["file"] or "(empty)",
            _place(disk, buses),
        )
        for disk in machine["disks"]
    ]
    if rows:
        yield from ("  " + line for line in table(("disk", "size", "file", "controller"), rows, right=(0, 1)))


def _segment_lines(report: dict[str, Any], *, verbose: bool) -> Iterator[str]:
    rows = [
        (
            str(segment["offset"]),
            size_text(segment["length"]),
            segment["compression"],
            size_text(segment["decoded"]),
            str(segment["entries"]),
        )
        for segment in report["segments"]
    ]
    yield from table(("offset", "size", "compression", "unpacked", "entries"), rows, right=(0, 1, 3, 4))
    if verbose and report["modules"]:
        yield ""
        yield "modules: " + " ".join(report["modules"])


def _place(disk: dict[str, Any], buses: dict[str, str]) -> str:
    """Return the controller and the place on it."""
    unit = "" if disk["unit"] is None else f" {disk['unit']}"
    return buses.get(disk["controller"], "-") + unit
