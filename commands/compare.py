"""`diskmorph compare A B`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskmorph.commands.common import add_output, add_parents, parents_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from diskmorph.commands.output import Output
    from diskmorph.convert.options import Comparison

DESCRIPTION = """\
Compare the contents of two images, whatever their formats. Where the sizes differ, the rest of the longer one must
read as zeroes. Exit status 0: the same, 3: they differ."""

EXAMPLES = (
    ("diskmorph compare disk.vmdk disk.qcow2", "whether they hold the same bytes"),
    ("diskmorph compare --max 5 a.raw b.vhdx", "the first five ranges that differ"),
    ("diskmorph compare --strict a.raw b.raw", "sizes must be equal too"),
    ("diskmorph compare -f raw -F vmdk a.img b.img", "formats said, not guessed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("first", metavar="A", help="one image")
    parser.add_argument("second", metavar="B", help="the other")
    parser.add_argument("--max", type=int, metavar="N", help="stop after N differing ranges")
    parser.add_argument("-s", "--strict", action="store_true", help="demand equal sizes")
    group = parser.add_argument_group("source")
    group.add_argument("-f", "--format", metavar="FMT", help="A's format (default: by its content)")
    group.add_argument("-F", dest="second_format", metavar="FMT", help="B's format (default: by its content)")
    add_parents(group)
    add_output(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    import diskmorph
    from diskmorph.commands.progress import progress

    with progress(out, "comparing") as tell:
        found = diskmorph.compare(
            args.first,
            args.second,
            formats=(args.format, args.second_format),
            parents=parents_of(args),
            max_ranges=args.max,
            strict=args.strict,
            on_progress=tell,
        )
    report = {
        "identical": found.identical,
        "first_difference": found.first_difference,
        "ranges": [{"start": start, "length": length} for start, length in found.ranges],
        "sizes": list(found.sizes),
    }
    out.report(report, _lines(found, args.max))
    return 0 if found.identical else 3


def _lines(found: Comparison, most: int | None) -> Iterator[str]:
    from diskmorph.commands.text import exact_size_text, size_text

    a, b = found.sizes
    if found.identical:
        yield "the same content" + ("" if a == b else f"; the sizes differ: {size_text(a)} and {size_text(b)}")
        return
    if a != b:
        yield f"the sizes differ: {exact_size_text(a)} and {exact_size_text(b)}"
    for start, length in found.ranges:
        yield f"differs from {start} to {start + length} ({size_text(length)})"
    if most is not None and len(found.ranges) >= most:
        yield f"the comparison stopped after {most} ranges"
