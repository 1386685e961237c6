"""Which files an image's own words may open: none, but plain sibling names and what the user allowed.

Names inside an image are data, perhaps hostile. Every file that an image names is opened here and nowhere else.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias

from diskmorph.formats.errors import PolicyError, SourceError
from diskmorph.formats.limits import Limits
from diskmorph.formats.remote import is_url
from diskmorph.formats.source import ByteSource, FilePool, FileSource, refuse_special
from diskmorph.formats.tree_names import IMAGE_PREFIXES

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Parents:
    """What the user allows: directories that may hold parents and extents, and the top image's own parent.

    `backing` replaces what the top image says of its parent. `shared` (`-U`) reads images that a process has locked.
    `passphrase` opens encrypted images.
    """

    allow: tuple[Path, ...] = ()
    backing: Path | None = None
    shared: bool = False
    passphrase: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Take one directory for a tuple of one: a string's letters would allow "/"."""
        if isinstance(self.allow, str | os.PathLike):
            object.__setattr__(self, "allow", (Path(self.allow),))

    @classmethod
    def of(cls, what: Allowed) -> Parents:
        """Return `what` as Parents: one as it is, a directory or several as `allow`, None as nothing allowed."""
        if what is None:
            return cls()
        if isinstance(what, Parents):
            return what
        if isinstance(what, str | os.PathLike):
            return cls(allow=(Path(what),))
        return cls(allow=tuple(Path(directory) for directory in what))


Allowed: TypeAlias = "Parents | str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None"
"""What `Parents.of` takes, and everything that opens an image."""


OR_BACKING = ", or name it with --backing FILE"
"""Ends hints on the parent of the image that a user named; the parents of parents cannot be named."""


@dataclass(frozen=True)
class Opener:
    """Opens the files of one disk under one policy, at most `limits.open_files` of them at once."""

    parents: Parents = field(default_factory=Parents)
    limits: Limits = field(default_factory=Limits)
    pool: FilePool = field(default_factory=FilePool)

    def user_file(self, path: str | os.PathLike[str]) -> FileSource:
        """Open a file that the user named. Raises SourceError."""
        if isinstance(path, str) and path.startswith(IMAGE_PREFIXES) and not Path(path).exists():
            raise SourceError(
                "names a container image, which is no disk",
                file=path,
                hint="`build` makes a disk of it, `ls`, `cat` and `extract` look into it",
            )
        if is_url(path) and not Path(path).exists():
            raise SourceError("is a URL, which is not read here", file=os.fspath(path), hint="fetch it to a file first")
        return FileSource(path, pool=self.pool, shared=self.parents.shared)

    def user_source(self, name: str | os.PathLike[str]) -> ByteSource:
        """Open what the user named: a file, or a URL (http, https, s3, nbd, nbd+unix)."""
        if is_url(name):
            from diskmorph.formats.remote import open_url  # noqa: PLC0415 - local files need none of it

            return open_url(os.fspath(name))
        return self.user_file(name)

    def sibling(self, name: str, near: ByteSource, what: str = "extent") -> FileSource:
        """Open a file that the image `near` names as a part of itself.

        A plain name means a regular file beside the image, never through a link; anything else must lie in an allowed
        directory. Raises PolicyError or SourceError naming `name`.
        """
        plain = name not in {"", ".", ".."} and "/" not in name and "\\" not in name and "\0" not in name
        if not plain or near.path is None:
            return self.allowed(name, near, what)
        path = near.path.parent / name
        status = _status(path, follow=False)
        if status is None:
            raise SourceError(f"its {what} {name!r} does not exist at {path}", file=near.name, hint="restore it")
        if stat.S_ISLNK(status.st_mode):
            return self.allowed(name, near, what)
        return FileSource(path, pool=self.pool, devices=False, shared=self.parents.shared, follow=False)

    def allowed(self, name: str, near: ByteSource, what: str = "backing file") -> FileSource:
        """Open a file that `near` names, if it lies in a directory that the user allowed.

        Raises PolicyError naming `--allow-parent` and, for parents, `--backing`.
        """
        path = self._locate(name, near, what)
        if not any(_within(path, directory) for directory in self.parents.allow):
            raise PolicyError(
                f"names {name!r} as its {what}, which is not opened without leave",
                option="--allow-parent",
                file=near.name,
                hint=f"allow its directory with --allow-parent DIR{self._or_backing(what)}",
            )
        status = _status(path, follow=True)
        if status is None:
            raise SourceError(
                f"its {what} {name!r} does not exist at {path}",
                file=near.name,
                hint=f"restore it{self._or_backing(what)}",
            )
        refuse_special(status.st_mode, str(path), devices=False)
        return FileSource(path, pool=self.pool, devices=False, shared=self.parents.shared, follow=False)

    def _or_backing(self, what: str) -> str:
        return OR_BACKING if what in {"backing file", "parent"} else ""

    def _locate(self, name: str, near: ByteSource, what: str) -> Path:
        if name.startswith(("json:", "nbd:")) or "://" in name or not _can_be_a_file(name):
            raise PolicyError(
                f"names {name!r} as its {what}, which is not a file name",
                option="--backing",
                file=near.name,
                hint=f"allow a plain file with --allow-parent DIR{self._or_backing(what)}",
            )
        path = PurePosixPath(name.removeprefix("file:"))
        base = near.path.parent if near.path is not None else Path.cwd()
        return Path(os.path.realpath(base / path))


def _can_be_a_file(name: str) -> bool:
    try:
        return bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _status(path: Path, *, follow: bool) -> os.stat_result | None:
    """Return what stands at a path, None for nothing: names in images may be longer than any file's can be."""
    try:
        return path.stat(follow_symlinks=follow)
    except (OSError, ValueError):
        return None


def _within(path: Path, directory: Path) -> bool:
    return path.is_relative_to(os.path.realpath(directory))
