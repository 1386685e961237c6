"""`commit`."""

from __future__ import annotations


def commit() -> None:
    """Not there yet."""
