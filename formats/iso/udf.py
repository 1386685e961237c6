"""UDF, through pycdlib: for discs whose ISO 9660 side is nearly empty, as Windows' are. Loads pycdlib when used."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError
from diskmorph.formats.tree import Node, Piece, Tree, dir_node

if TYPE_CHECKING:
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.source import ByteSource


def open_udf(source: ByteSource, limits: Limits) -> Tree:
    """Return the files of a disc's UDF side. Raises FormatError."""
    import pycdlib  # noqa: PLC0415 - heavy, and only for UDF
    from pycdlib.pycdlibexception import PyCdlibException  # noqa: PLC0415

    from diskmorph.formats.views import SourceDisk  # noqa: PLC0415

    disc = pycdlib.PyCdlib()
    try:
        disc.open_fp(SourceDisk(source).open_stream())
        tree = _tree(disc, source, limits)
    except PyCdlibException as error:
        raise FormatError(
            f"its UDF file system is damaged: {error}", file=source.name, format="iso", structure="UDF"
        ) from error
    except (IndexError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        # pycdlib trusts what it reads; whatever breaks in it is the image's doing
        raise FormatError("its UDF file system is damaged", file=source.name, format="iso", structure="UDF") from error
    tree.sources.append(source)
    return tree


def _tree(disc: Any, source: ByteSource, limits: Limits) -> Tree:
    tree = Tree(dir_node(0o555), name=source.name, format="iso", limits=limits)
    for folder, names, files in disc.walk(udf_path="/"):
        prefix = folder.rstrip("/")
        for name in names:
            _put(tree, f"{prefix}/{name}", dir_node(0o555))
        for name in files:
            record = disc.get_record(udf_path=f"{prefix}/{name}")
            if record is not None:
                _put(tree, f"{prefix}/{name}", _file(record, source))
    return tree


def _put(tree: Tree, path: str, node: Node) -> None:
    tree.put(path.encode("utf-8", "surrogateescape"), node)


def _file(record: Any, source: ByteSource) -> Node:
    size = record.get_data_length()
    if not size or record.inode is None:
        return Node(stat.S_IFREG | 0o444)
    offset = record.inode.fp_offset
    if offset + size > source.size:
        raise FormatError(
            "a file lies beyond the end of the image",
            file=source.name,
            format="iso",
            structure="UDF file entry",
            offset=offset,
            expected=f"{size} bytes",
            found=f"the end at {source.size}",
        )
    return Node(stat.S_IFREG | 0o444, size=size, pieces=[Piece(0, size, source, offset)])
