"""The configuration of images that are written: what the user says, over what the source says."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from diskmorph.convert.bridge.facts import architecture
from diskmorph.formats.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.convert.bridge.options import ExtractOptions
    from diskmorph.formats.allocator import Identity
    from diskmorph.formats.tree import Tree


def timestamp(seconds: float) -> str:
    """Return a time as RFC 3339 has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def new_config(tree: Tree, options: ExtractOptions, identity: Identity) -> dict[str, Any]:
    """Return the configuration of an image of one layer, rootfs left out. Raises OptionError."""
    created = timestamp(identity.time())
    return {
        "created": created,
        **_platform(tree, options),
        "config": changed(tree.config.get("config"), options),
        "history": [{"created": created, "created_by": "diskmorph extract"}],
    }


def _platform(tree: Tree, options: ExtractOptions) -> dict[str, str]:
    if options.platform is None:
        return {"architecture": architecture(tree), "os": "linux"}
    words = options.platform.split("/")
    if len(words) not in {2, 3} or not all(words):
        raise OptionError(f"{options.platform!r} is no platform", hint="os/architecture or os/architecture/variant")
    return dict(zip(("os", "architecture", "variant"), words, strict=False))


def changed(config: Mapping[str, Any] | None, options: ExtractOptions) -> dict[str, Any]:
    """Return the `config` object with what the options say: Entrypoint, Cmd, Env, User, WorkingDir."""
    found = dict(config or {})
    if options.entrypoint is not None:
        found["Entrypoint"] = list(options.entrypoint)
        if options.cmd is None:
            found.pop("Cmd", None)
    if options.cmd is not None:
        found["Cmd"] = list(options.cmd)
    if options.env:
        kept = [word for word in found.get("Env") or [] if word.partition("=")[0] not in options.env]
        found["Env"] = [*kept, *(f"{name}={value}" for name, value in options.env.items())]
    if options.user is not None:
        found["User"] = options.user
    if options.workdir is not None:
        found["WorkingDir"] = options.workdir
    return found
