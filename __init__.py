"""diskmorph: convert disk images, machine packages and container file systems into each other.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diskmorph._version import __version__

if TYPE_CHECKING:
    from diskmorph.convert.bridge.build import build
    from diskmorph.convert.bridge.commit import commit
    from diskmorph.convert.bridge.extract import extract
    from diskmorph.convert.check import check
    from diskmorph.convert.compare import compare
    from diskmorph.convert.create import create, resize
    from diskmorph.convert.digest import digest
    from diskmorph.convert.job import convert
    from diskmorph.convert.measure import measure
    from diskmorph.convert.opening import probe
    from diskmorph.convert.options import (
        CheckResult,
        Comparison,
        ConvertOptions,
        ConvertReport,
        Digest,
        Measurement,
        Progress,
    )
    from diskmorph.formats import errors
    from diskmorph.formats.extents import ABSENT, DATA, HOLE, ZERO
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.packages import open_package
    from diskmorph.formats.policy import Parents
    from diskmorph.formats.registry import open_disk
    from diskmorph.formats.trees import open_tree

_WHERE = {
    "probe": "convert.opening",
    "ABSENT": "formats.extents",
    "DATA": "formats.extents",
    "HOLE": "formats.extents",
    "ZERO": "formats.extents",
    "open_disk": "formats.registry",
    "open_tree": "formats.trees",
    "open_package": "formats.packages",
    "measure": "convert.measure",
    "check": "convert.check",
    "compare": "convert.compare",
    "digest": "convert.digest",
    "create": "convert.create",
    "resize": "convert.create",
    "build": "convert.bridge",
    "extract": "convert.bridge",
    "commit": "convert.bridge",
    "Limits": "formats.limits",
    "Parents": "formats.policy",
    "ConvertOptions": "convert.options",
    "ConvertReport": "convert.options",
    "CheckResult": "convert.options",
    "Comparison": "convert.options",
    "Digest": "convert.options",
    "Measurement": "convert.options",
    "Progress": "convert.options",
}

__all__ = [
    "ABSENT",
    "DATA",
    "HOLE",
    "ZERO",
    "CheckResult",
    "Comparison",
    "ConvertOptions",
    "ConvertReport",
    "Digest",
    "Limits",
    "Measurement",
    "Parents",
    "Progress",
    "__version__",
    "build",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "digest",
    "errors",
    "extract",
    "measure",
    "open_disk",
    "open_package",
    "open_tree",
    "probe",
    "resize",
]


def __getattr__(name: str) -> Any:
    if name in {"convert", "errors"}:
        return importlib.import_module("diskmorph.convert" if name == "convert" else "diskmorph.formats.errors")
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'diskmorph' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diskmorph.{where}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
