"""How trees are named on a command line, apart from their readers, so that asking costs nothing."""

from __future__ import annotations

from pathlib import Path

IMAGE_FORMATS = ("docker-archive", "oci", "oci-archive", "docker")
"""Container images; `docker` is one in a registry."""
TREE_FORMATS = ("directory", "tar", *IMAGE_FORMATS, "iso")
REGISTRY_PREFIXES = ("docker://", "docker+http://")
IMAGE_PREFIXES = (*REGISTRY_PREFIXES, "oci:", "oci-archive:", "docker-archive:")


def split_prefix(path: str) -> tuple[str | None, str]:
    """Split `oci:DIR` and the like; a name that exists as it is has no prefix, one in a registry stays as it is."""
    if path.startswith(REGISTRY_PREFIXES):
        return "docker", path
    for word in ("oci-archive", "docker-archive", "oci"):
        if path.startswith(word + ":") and not Path(path).exists():
            return word, path[len(word) + 1 :]
    return None, path
