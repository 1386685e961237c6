"""`convert` between trees: a directory, an archive, a container image or an ISO becomes another of these."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from diskmorph.convert.bridge.extract import extract, opened_tree, write_output
from diskmorph.convert.bridge.options import ExtractOptions
from diskmorph.convert.bridge.outputs import parse_output
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.tree import Tree
from diskmorph.formats.tree_names import TREE_FORMATS
from diskmorph.formats.trees import tree_format

if TYPE_CHECKING:
    from collections.abc import Callable

    from diskmorph.convert.options import ConvertReport, Progress
    from diskmorph.formats.disk import Disk


def convert_tree(
    source: str | os.PathLike[str] | Disk | Tree,
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Write a tree in another form, nothing left out; of a disk its root file system is extracted.

    Raises DiskmorphError as `extract` does.
    """
    begun = time.monotonic()
    wanted = ExtractOptions(convert=options or ConvertOptions())
    if isinstance(source, Tree):
        tree = source
    else:
        kind = wanted.convert.source_format or _kind(source)
        if kind not in TREE_FORMATS:
            return extract(source, target, options=wanted, on_progress=on_progress)
        tree = opened_tree(source, wanted, on_progress)
    try:
        output = parse_output(os.fspath(target), wanted.convert.target_format)
        report = write_output(tree, output, wanted, on_progress)
    finally:
        if tree is not source:
            tree.close()
    return replace(report, source=tree.name, target=os.fspath(target), seconds=time.monotonic() - begun)


def _kind(source: str | os.PathLike[str] | Disk) -> str | None:
    return tree_format(source) if isinstance(source, str | os.PathLike) else None
