"""What is asked of build, extract and commit: plain, frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.allocator import parse_size
from diskmorph.formats.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

BOOT_WORDS = ("bios", "uefi", "uki")
DEFAULT_SLACK = 512 << 20


@dataclass(frozen=True, slots=True)
class Size:
    """How large a disk becomes: `total` bytes exactly, or as small as can be with `slack` bytes left free."""

    total: int | None = None
    slack: int = DEFAULT_SLACK

    @classmethod
    def parse(cls, text: str | None) -> Size:
        """Return what `3G`, `min` or `+500M` says; None is the default. Raises OptionError."""
        if text is None:
            return cls()
        if text == "min":
            return cls(slack=0)
        if text.startswith("+"):
            return cls(slack=parse_size(text[1:]))
        return cls(total=parse_size(text))


def parse_boot(text: str) -> tuple[str, ...]:
    """Return the words of `bios,uefi`, `uki` or `none` (no word). Raises OptionError."""
    words = tuple(word for word in text.split(",") if word)
    if words == ("none",):
        return ()
    if not words or set(words) - set(BOOT_WORDS) or {"uefi", "uki"} <= set(words):
        raise OptionError(f"--boot {text} is not known", hint="bios,uefi, bios, uefi, uki, bios,uki or none")
    return words


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a disk is built from a tree.

    - `convert`: how it is written: target format and options, compression, force, reproducible, verify, ...;
      `convert.source_format` is the tree's.
    - `size`; `fs`: the root's file system; `boot`: "bios", "uefi", "uki"; empty: nothing is put into the tree.
    - `kernel`: a vmlinuz or a distribution's package; `modules`: a directory such as lib/modules/VERSION; `initrd`: an
      initial ramdisk to be used as it is; `cmdline`: instead of the default kernel command line.
    - `hostname`; `ssh_keys`: lines of root's authorized_keys; `entrypoint`: "auto", "always" or "never": whether the
      image's ENTRYPOINT runs instead of an init.
    - `layers`: a chain of overlays, one an image layer; `triple`: a directory for ami, aki and ari.
    - `platform`: which image of a multi-platform index; `parts`: packages (.deb) that boot parts may come from.
    """

    convert: ConvertOptions = field(default_factory=ConvertOptions)
    size: Size = field(default_factory=Size)
    fs: str = "ext4"
    boot: tuple[str, ...] = ("bios", "uefi")
    kernel: Path | None = None
    modules: Path | None = None
    initrd: Path | None = None
    cmdline: str | None = None
    hostname: str | None = None
    ssh_keys: tuple[str, ...] = ()
    entrypoint: str = "auto"
    layers: bool = False
    triple: Path | None = None
    platform: str | None = None
    label: str = ""
    parts: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """How a tree is taken out of a disk.

    - `convert`: source format, parents, limits, force, sync, reproducible.
    - `partition`: its number, or a logical volume's GROUP/NAME; None: the root is found. `strip_boot`: kernel, modules,
      firmware and boot loader stay.
    - `entrypoint`, `cmd`, `env` (NAME -> value), `user`, `workdir`: of the image's configuration.
    - `compress`: of layers: "gzip", "zstd" or "none"; `platform`: os/architecture of the image, else found out.
    """

    convert: ConvertOptions = field(default_factory=ConvertOptions)
    partition: int | str | None = None
    strip_boot: bool = False
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    workdir: str | None = None
    compress: str = "gzip"
    platform: str | None = None


@dataclass(frozen=True, slots=True)
class CommitOptions:
    """How a layer is made of what changed on a disk: the base image, message and author of the history entry."""

    base: str = ""
    message: str = ""
    author: str = ""
    extract: ExtractOptions = field(default_factory=ExtractOptions)
