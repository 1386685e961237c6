"""What happens between formats. The package is itself the function `convert`: `diskmorph.convert(source, target)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

assert __name__ == "diskmorph.convert", "import diskmorph.convert, not convert"  # noqa: S101

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from diskmorph.convert.options import ConvertOptions, ConvertReport, Progress
    from diskmorph.formats.disk import Disk


class _ConvertModule(ModuleType):
    """A package that can be called: importing `diskmorph.convert.copy` must not take `diskmorph.convert()` away."""

    def __call__(
        self,
        source: str | os.PathLike[str] | Disk | Sequence[str | os.PathLike[str] | Disk],
        target: str | os.PathLike[str],
        *,
        options: ConvertOptions | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> ConvertReport:
        """Convert anything to anything; of disks see `diskmorph.convert.job.convert`, of the rest convert/routes.py.

        Several sources make one package.
        """
        from diskmorph.convert.options import ConvertOptions  # noqa: PLC0415 - NumPy loads when it is needed
        from diskmorph.convert.routes import converter  # noqa: PLC0415

        chosen = options or ConvertOptions()
        convert = converter(source, target, chosen)
        return convert(source, target, options=chosen, on_progress=on_progress)


sys.modules[__name__].__class__ = _ConvertModule
