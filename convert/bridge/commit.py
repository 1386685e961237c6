"""`commit`."""

from __future__ import annotations


def commit(): ...
