"""Directories of the machine as trees: read without following links, written without leaving the target."""

from __future__ import annotations

from diskmorph.formats.directory.reader import read_directory
from diskmorph.formats.directory.writer import DirectoryTarget

__all__ = ["DirectoryTarget", "read_directory"]
