"""`diskmorph formats`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diskmorph.commands.common import add_output

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from diskmorph.commands.output import Output
    from diskmorph.formats.allocator import Option
    from diskmorph.formats.probe import Format

DESCRIPTION = """\
List the formats: what is read and written, by which names and suffixes, with which subformats, codecs and options."""

EXAMPLES = (
    ("diskmorph formats", "all formats at a glance"),
    ("diskmorph formats qcow2", "one format and the options that -o takes"),
    ("diskmorph formats --json", "everything, for a program"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("name", nargs="?", metavar="FMT", help="one format, with its options")
    add_output(parser, progress=False)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.formats.probe import FORMATS, RAW
    from diskmorph.formats.registry import load, require_format

    chosen = (require_format(args.name),) if args.name else (RAW, *FORMATS)
    described = [_described(entry, load(entry)) for entry in chosen]
    lines = _one(described[0], load(chosen[0]).OPTIONS) if args.name else _overview(described)
    out.result({"formats": described}, lines)
    return 0


CODECS = {"qcow2": ("deflate", "zstd"), "vmdk": ("deflate",)}
"""What -c may compress by; the formats' allocators hold to it, and a test compares."""


def _described(entry: Format, module: Any) -> dict[str, Any]:
    from dataclasses import asdict

    options: Sequence[Option] = module.OPTIONS if entry.writes else ()
    return {
        "name": entry.name,
        "title": entry.title,
        "aliases": list(entry.aliases),
        "suffixes": list(entry.suffixes),
        "reads": True,
        "writes": entry.writes,
        "subformats": list(module.SUBFORMATS),
        "compression": list(CODECS.get(entry.name, ())) if entry.writes else [],
        "options": [asdict(option) for option in options],
    }


def _overview(described: Sequence[dict[str, Any]]) -> Iterator[str]:
    from diskmorph.commands.text import table

    rows = [
        (
            " ".join([entry["name"], *(f"({alias})" for alias in entry["aliases"])]),
            "read, write" if entry["writes"] else "read",
            " ".join(entry["suffixes"]),
            " ".join(entry["compression"]) or "-",
            entry["title"],
        )
        for entry in described
    ]
    yield from table(("format", "can be", "suffixes", "compression", "known from"), rows, indent=0)
    yield ""
    for entry in described:
        if entry["subformats"]:
            yield f"{entry['name']} subformats: {', '.join(entry['subformats'])}"
    yield ""
    yield "`diskmorph formats FMT` lists the options of a format (-o)."


def _one(entry: dict[str, Any], options: Sequence[Option]) -> Iterator[str]:
    from diskmorph.commands.text import properties

    yield from properties(
        [
            ("format", f"{entry['name']}, {entry['title']}"),
            ("other names", ", ".join(entry["aliases"]) or "none"),
            ("suffixes", " ".join(entry["suffixes"]) or "none"),
            ("can be", "read and written" if entry["writes"] else "read"),
            ("subformats", ", ".join(entry["subformats"]) or "none"),
            ("compression", ", ".join(entry["compression"]) or "none"),
        ]
    )
    if entry["options"]:
        yield "options (-o NAME=VALUE,...):"
        yield from option_lines(options)


def option_lines(options: Sequence[Option]) -> Iterator[str]:
    """Yield a line for each `-o` option."""
    from diskmorph.commands.text import table

    if not options:
        yield "  none"
        return
    rows = [(option.name, option.values, option.default or "-", option.help) for option in options]
    yield from table(("option", "values", "default", "what it does"), rows)
