"""`diskmorph ls IMG [PATH]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diskmorph.commands.common import add_output, add_partition, add_source

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from diskmorph.commands.output import Output
    from diskmorph.formats.tree import Entry, Tree

DESCRIPTION = """\
List the files inside a disk (its root file system, or --partition), an ISO, an archive, a container image, a directory.

A directory's entries are listed, or with -R everything below; -l adds modes, owners, sizes and times."""

EXAMPLES = (
    ("diskmorph ls disk.vmdk /etc", "a directory on the root file system"),
    ("diskmorph ls -l installer.iso", "modes, owners, sizes and times"),
    ("diskmorph ls -R oci:app --json", "everything, for a program"),
    ("diskmorph ls docker://docker.io/library/alpine /etc", "an image in a registry"),
    ("diskmorph ls disk.qcow2 --partition 1", "another partition"),
    ("diskmorph ls disk.qcow2 --partition rhel/home", "an LVM2 logical volume"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    parser.add_argument("source", metavar="IMG", help="a disk, ISO, archive, container image or directory")
    parser.add_argument("path", metavar="PATH", nargs="?", default="/", help="a directory or file inside")
    add_inside(parser)
    parser.add_argument("-l", "--long", action="store_true", help="modes, owners, sizes, times and link targets")
    parser.add_argument("-R", "--recursive", action="store_true", help="everything below")
    add_output(parser, progress=False)


def add_inside(parser: argparse.ArgumentParser) -> None:
    """Add what says how the inside is found; `cat` takes it too."""
    add_source(parser)
    add_partition(parser)
    parser.add_argument("--platform", metavar="OS/ARCH", help="which image of a multi-platform index")


def open_inside(args: argparse.Namespace) -> Tree:
    """Open what the words name as a tree."""
    from diskmorph.commands.common import parents_of
    from diskmorph.convert.options import ConvertOptions
    from diskmorph.convert.source_trees import open_source_tree

    options = ConvertOptions(source_format=args.format, parents=parents_of(args))
    return open_source_tree(args.source, options, partition=args.partition, platform=args.platform)


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.formats.errors import SourceError

    with open_inside(args) as tree:
        path = args.path.encode("utf-8", "surrogateescape").strip(b"/")
        node = tree.find(path)
        if node is None:
            raise SourceError(f"has no {args.path}", file=args.source)
        entries = list(_entries(tree, path, recursive=args.recursive))
        rows = [_row(entry) for entry in entries] if out.json else []
        out.result({"file": args.source, "path": args.path, "entries": rows}, _lines(entries, long=args.long))
    return 0


def _entries(tree: Tree, path: bytes, *, recursive: bool) -> Iterator[Entry]:
    from diskmorph.formats.tree import Entry, Tree

    node = tree.find(path)
    assert node is not None  # noqa: S101 - the caller has found it
    if not node.is_dir:
        yield Entry(path, node)
    elif recursive:
        below = Tree(node, name=tree.name, format=tree.format, limits=tree.limits)
        yield from (entry for entry in below.walk(ordered=True) if entry.path)
    else:
        yield from (Entry(name, child) for name, child in sorted(node.children.items()))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _row(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON has it (docs/json.md); bytes that are no UTF-8 as lone surrogates."""
    node = entry.node
    return {
        "path": _text(entry.path),
        "type": _TYPES.get(node.kind, "unknown"),
        "mode": node.mode & 0o7777,
        "uid": node.uid,
        "gid": node.gid,
        "size": node.size,
        "mtime": node.mtime / 10**9,
        "target": _text(node.target) if node.target else None,
        "device": list(node.rdev) if node.kind in _DEVICES else None,
        "xattrs": sorted(_text(name) for name in node.xattrs),
    }


_TYPES = {
    0o100000: "file",
    0o040000: "directory",
    0o120000: "link",
    0o020000: "character device",
    0o060000: "block device",
    0o010000: "fifo",
    0o140000: "socket",
}
_DEVICES = (0o020000, 0o060000)


def _line(name: bytes) -> str:
    """Return a name for people, on one line: a newline in it must not look like another name."""
    from diskmorph.commands.output import printable

    return printable(_text(name)).replace("\n", "\\n")


def _moment(seconds: int) -> str:
    """Return a time for people; seconds since 1970 where the calendar has no such year."""
    import time

    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):
        return f"@{seconds}"


def _lines(entries: list[Entry], *, long: bool) -> Iterator[str]:
    if not long:
        yield from (_line(entry.path) for entry in entries)
        return
    import stat

    for path, node in entries:
        size = f"{node.rdev[0]}, {node.rdev[1]}" if node.kind in _DEVICES else str(node.size)
        arrow = f" -> {_line(node.target)}" if node.target else ""
        name, moment = _line(path), _moment(node.mtime // 10**9)
        yield f"{stat.filemode(node.mode)} {node.uid:>6} {node.gid:>6} {size:>12} {moment} {name}{arrow}"
