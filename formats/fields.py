"""The fields of a parsed structure, to be changed and built again."""

from __future__ import annotations

from typing import Any


def fields_of(parsed: Any) -> dict[str, Any]:
    """Return the named fields of what a Construct has parsed, without what it keeps for itself."""
    return {name: value for name, value in parsed.items() if not name.startswith("_")}
