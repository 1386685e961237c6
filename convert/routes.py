"""Which function carries out a conversion: disks go through the pipeline, trees and packages have their own ways.

A route is a row: it looks at the names, the formats that were asked for and, at the most, at the beginning of a file.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from diskmorph.formats.errors import OptionError
from diskmorph.formats.tree_names import IMAGE_PREFIXES, TREE_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskmorph.convert.options import ConvertOptions, ConvertReport
    from diskmorph.formats.disk import Disk

    Converter = Callable[..., ConvertReport]


class Asked(NamedTuple):
    """What is known of a conversion before anything is opened; names are None for open disks and pipes."""

    source: str | None
    target: str
    options: ConvertOptions


def _to_iso(asked: Asked) -> bool:
    wanted = asked.options.target_format
    return wanted == "iso" or (wanted is None and asked.target.lower().endswith(".iso"))


def _from_iso(asked: Asked) -> bool:
    """Say whether the source is an ISO by its content; `-f raw` takes its bytes as they are."""
    if asked.source is None or asked.options.source_format not in {None, "iso"} or not Path(asked.source).is_file():
        return False
    from diskmorph.formats.probe import signatures  # noqa: PLC0415
    from diskmorph.formats.source import FileSource  # noqa: PLC0415

    with FileSource(asked.source, shared=True) as source:
        outer = next((found for found in signatures(source) if found.outer), None)
    return outer is not None and outer.format == "iso"


def _to_package(asked: Asked) -> bool:
    wanted = asked.options.target_format
    return wanted in {"ova", "ovf"} or (wanted is None and asked.target.lower().endswith((".ova", ".ovf")))


def _to_triple(asked: Asked) -> bool:
    return asked.options.target_format == "ami"


def _package_to_folder(asked: Asked) -> bool:
    """Say whether all disks of a package are to go into a folder: `vm.ova disks/`."""
    if asked.source is None or not (asked.target.endswith("/") or Path(asked.target).is_dir()):
        return False
    from diskmorph.formats.probe import signatures  # noqa: PLC0415
    from diskmorph.formats.source import FileSource  # noqa: PLC0415

    if not Path(asked.source).is_file():
        return False
    with FileSource(asked.source, shared=True) as source:
        kind = asked.options.source_format or next((found.format for found in signatures(source) if found.outer), None)
    return kind in {"ova", "ovf"}


def _shape(asked: Asked) -> str:
    """Return what stands round the disk for the target of `--for`, "disk" where nothing does."""
    if asked.options.profile is None:
        return "disk"
    from diskmorph.convert.targets import profile_named  # noqa: PLC0415 - only with --for

    profile = profile_named(asked.options.profile)
    if profile.shape == "gcp" and (asked.options.target_format == "raw" or asked.target.lower().endswith(_RAW)):
        return "disk"  # the bare disk.raw, to be packed by someone else
    return profile.shape


_RAW = (".raw", ".img", ".dd", ".bin")
_TREES = frozenset({"wsl", "firecracker"})


def _to_tree_shape(asked: Asked) -> bool:
    return _shape(asked) in _TREES


def _to_disk_shape(asked: Asked) -> bool:
    return _shape(asked) not in {"disk", *_TREES}


_TREE_FORMATS = frozenset(TREE_FORMATS) - {"iso"}
_TREE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")


def _to_tree(asked: Asked) -> bool:
    """Say whether a directory, an archive or a container image is asked for."""
    wanted = asked.options.target_format
    if wanted is not None:
        return wanted in _TREE_FORMATS
    return asked.target.startswith(IMAGE_PREFIXES) or asked.target.lower().endswith(_TREE_SUFFIXES)


def _to_url(asked: Asked) -> bool:
    from diskmorph.formats.remote import is_url  # noqa: PLC0415 - loads nothing heavy

    return is_url(asked.target)


def _has_more(asked: Asked) -> bool:
    return bool(asked.options.also)


def _keeps_chain(asked: Asked) -> bool:
    return asked.options.keep_chain


def _to_compressed(asked: Asked) -> bool:
    from diskmorph.convert.wrappers import wrapper_of  # noqa: PLC0415 - loads nothing heavy

    return asked.target != "-" and wrapper_of(asked.target) is not None and not asked.options.device


class Route(NamedTuple):
    """A way: taken when `takes` says so; `function` of `module` is called as `convert` is."""

    takes: Callable[[Asked], bool]
    module: str
    function: str


ROUTES: tuple[Route, ...] = (
    Route(_has_more, "diskmorph.convert.also", "convert_also"),
    Route(_to_url, "diskmorph.convert.to_url", "convert_to_url"),
    Route(_keeps_chain, "diskmorph.convert.chains", "keep_chain"),
    Route(_to_tree_shape, "diskmorph.convert.cloud_trees", "tree_to_shape"),
    Route(_to_disk_shape, "diskmorph.convert.cloud", "disk_to_shape"),
    Route(_to_tree, "diskmorph.convert.bridge.transcode", "convert_tree"),
    Route(_to_compressed, "diskmorph.convert.compressed", "convert_compressed"),
    Route(_to_iso, "diskmorph.convert.iso", "tree_to_iso"),
    Route(_from_iso, "diskmorph.convert.iso", "iso_to_disk"),
    Route(_to_package, "diskmorph.convert.packages", "disks_to_package"),
    Route(_to_triple, "diskmorph.convert.triples", "disk_to_triple"),
    Route(_package_to_folder, "diskmorph.convert.package_disks", "package_to_folder"),
)


def converter(
    source: str | os.PathLike[str] | Disk | Sequence[str | os.PathLike[str] | Disk],
    target: str | os.PathLike[str],
    options: ConvertOptions,
) -> Converter:
    """Return the function that converts `source` to `target`. Raises OptionError for several sources of one disk."""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    asked = Asked(None if name == "-" else name, os.fspath(target), options)
    if isinstance(source, list | tuple) and not _to_package(asked):
        raise OptionError(
            f"several sources make a package, which {asked.target!r} is not",
            hint="name the target NAME.ova or NAME.ovf, or convert the disks one by one",
        )
    return _chosen(asked)


def disk_converter(target: str | os.PathLike[str], options: ConvertOptions) -> Converter:
    """Return the function that writes a disk to `target`: what is left when the source is known to be one."""
    return _chosen(Asked(None, os.fspath(target), options))


def _chosen(asked: Asked) -> Converter:
    for route in ROUTES:
        if route.takes(asked):
            if asked.options.resume:
                raise OptionError(
                    "--resume goes on with the conversion of one disk into local image files; this is another kind"
                )
            return cast("Converter", getattr(importlib.import_module(route.module), route.function))
    from diskmorph.convert.job import convert  # noqa: PLC0415

    return convert
