"""Registries of container images by the OCI distribution API: names, credentials, transport, blobs and their cache."""

from __future__ import annotations

from diskmorph.formats.docker_registry.cache import BlobCache
from diskmorph.formats.docker_registry.client import Repository
from diskmorph.formats.docker_registry.reference import Reference, is_reference, parse_reference

__all__ = ["BlobCache", "Reference", "Repository", "is_reference", "parse_reference"]
