"""Which names ask for compression round a single image."""

from __future__ import annotations

SUFFIXES = (".gz", ".xz", ".zst", ".bz2")


def wrapper_of(name: str) -> str | None:
    """Return the suffix of a name that asks for compression round a single image; archives' names do not."""
    word = name.lower()
    suffix = next((suffix for suffix in SUFFIXES if word.endswith(suffix)), None)
    return None if suffix is None or word.removesuffix(suffix).endswith(".tar") else suffix
