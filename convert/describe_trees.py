"""What `info` tells of trees: container images with their layers and history, archives, directories."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import UnsupportedError
from diskmorph.formats.policy import Opener
from diskmorph.formats.tree_names import IMAGE_FORMATS, split_prefix
from diskmorph.formats.trees import open_tree

if TYPE_CHECKING:
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.oci import Image, Layer
    from diskmorph.formats.oci.schema import Fields

_KINDS = {stat.S_IFREG: "files", stat.S_IFDIR: "directories", stat.S_IFLNK: "links"}


def describe_tree(
    path: str | os.PathLike[str], kind: str, *, platform: str | None = None, limits: Limits
) -> dict[str, Any]:
    """Return what `info` shows of a tree of that kind beside the keys of every file (docs/json.md).

    A container image's layers are told by its manifest and configuration; none is read or fetched. Raises FormatError,
    UnsupportedError, SourceError, OptionError.
    """
    if kind not in IMAGE_FORMATS:
        return _tree(path, kind, limits)
    from diskmorph.formats.oci import open_image  # noqa: PLC0415 - container images only

    _, name = split_prefix(os.fspath(path))
    with open_image(name, format=kind, platform=platform, limits=limits) as image:
        return _image(image, limits)


def _image(image: Image, limits: Limits) -> dict[str, Any]:
    from diskmorph.formats.oci.schema import Fields  # noqa: PLC0415 - container images only

    config = Fields(image.config, image.name, "configuration")
    layers = [_layer(image, layer) for layer in image.layers]
    return {
        "stored_size": _stored_size(image, layers, limits),
        "names": list(image.names),
        "digest": image.digest,
        "platform": image.platform,
        "created": config.text("created", "") or None,
        "author": config.text("author", "") or None,
        "config": config.inner("config").value,
        "layers": layers,
        "history": [_step(step) for step in config.objects("history")],
    }


def _layer(image: Image, layer: Layer) -> dict[str, Any]:
    size = layer.size
    if size is None:
        size = image.files.open(layer.file).size
    return {"digest": layer.digest, "diff_id": layer.diff_id, "media_type": layer.media_type or None, "size": size}


def _stored_size(image: Image, layers: list[dict[str, Any]], limits: Limits) -> int:
    """Return the size of the archive; of a layout or in a registry that of the layers."""
    if image.format in {"oci", "docker"}:
        return sum(layer["size"] for layer in layers)
    return _file_size(image.name, limits)


def _file_size(name: str | os.PathLike[str], limits: Limits) -> int:
    with Opener(limits=limits).user_source(name) as source:
        return source.size


def _step(step: Fields) -> dict[str, Any]:
    words = {name: step.text(name, "") or None for name in ("created", "created_by", "author", "comment")}
    return {**words, "empty_layer": step.value.get("empty_layer") is True}


def _tree(path: str | os.PathLike[str], kind: str, limits: Limits) -> dict[str, Any]:
    counts = dict.fromkeys((*_KINDS.values(), "others"), 0)
    content = 0
    package = False
    with open_tree(path, format=kind, limits=limits) as tree:
        for entry in tree.walk():
            if not entry.path:
                continue
            package |= b"/" not in entry.path and entry.path.lower().endswith(b".ovf")
            counts[_KINDS.get(entry.node.kind, "others")] += 1
            content += entry.node.size if entry.node.kind == stat.S_IFREG else 0
    if package and kind == "tar":
        raise UnsupportedError(
            "is an archive of files that holds an OVF package: compressed, or in another order than an OVA's",
            feature="compressed archives",
            file=os.fspath(path),
            hint="decompress or unpack it first",
        )
    stored = content if kind == "directory" else _file_size(path, limits)
    return {"stored_size": stored, "entries": counts, "content_size": content}
