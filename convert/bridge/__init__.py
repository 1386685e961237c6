"""The bridge: a container's root file system becomes a bootable disk, and a disk's becomes a container image."""

from __future__ import annotations

from diskmorph.convert.bridge.build import build
from diskmorph.convert.bridge.commit import commit
from diskmorph.convert.bridge.extract import extract
from diskmorph.convert.bridge.options import BuildOptions, CommitOptions, ExtractOptions

__all__ = ["BuildOptions", "CommitOptions", "ExtractOptions", "build", "commit", "extract"]
