"""Where the files of an OVF package are: members of an OVA, or neighbours of an .ovf file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING
from urllib.parse import unquote

from diskmorph.formats.errors import DiskmorphError, FormatError, PolicyError
from diskmorph.formats.ovf.archive import TarMember, read_index
from diskmorph.formats.ovf.sources import GzipSource, JoinedSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diskmorph.formats.limits import Limits
    from diskmorph.formats.ovf.model import FileRef
    from diskmorph.formats.policy import Opener
    from diskmorph.formats.source import ByteSource


_LOOK_AHEAD = 8


class Container(ABC):
    """The files of one package. `descriptor` is the name of its .ovf file, `base` that name without the suffix."""

    descriptor: str

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        self._source = source
        self._limits = limits

    @property
    def base(self) -> str:
        """The descriptor's name without its suffix."""
        return self.descriptor.rpartition(".")[0]

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return whether a file of that plain name is there, without opening anything outside the package."""

    @abstractmethod
    def open(self, name: str) -> ByteSource:
        """Open a file that the package names. Raises PolicyError for names outside, FormatError or SourceError."""

    @abstractmethod
    def manifest(self) -> str | None:
        """Return the manifest's name, None if there is none."""

    def read(self, name: str) -> bytes:
        """Return a text file's bytes, at most `limits.descriptor` of them. Raises FormatError."""
        source = self.open(name)
        try:
            if source.size > self._limits.descriptor:
                raise FormatError(
                    f"{name} is too large for what it is",
                    file=self._source.name,
                    format="ovf",
                    structure=name,
                    expected=f"at most {self._limits.descriptor} bytes",
                    found=source.size,
                )
            return source.read(0, source.size)
        finally:
            if source is not self._source:
                source.close()

    def locate(self, href: str) -> str:
        """Return the name that an href means: itself, or with its %-escapes resolved where only that is there."""
        plain = unquote(href)
        return plain if plain != href and not self.has(href) and self.has(plain) else href

    def open_reference(self, file: FileRef, most: int | None = None) -> ByteSource:
        """Open what a `File` refers to: put together from its chunks, decompressed to at most `most` bytes.

        Raises FormatError, PolicyError, SourceError.
        """
        name = self.locate(file.href)
        source = self._chunks(file, name) if file.chunk_size else self.open(name)
        try:
            self._require_size(file, source)
            return self._decompressed(file, source, most)
        except BaseException:
            source.close()
            raise

    def _require_size(self, file: FileRef, source: ByteSource) -> None:
        if file.size is None or file.size <= source.size or (file.compression and not file.chunk_size):
            return
        raise FormatError(
            f"its file {file.href} is cut off",
            file=self._source.name,
            format="ovf",
            structure="File",
            field="size",
            expected=f"{file.size} bytes",
            found=source.size,
        )

    def _decompressed(self, file: FileRef, source: ByteSource, most: int | None) -> ByteSource:
        word = (file.compression or "identity").lower()
        if word in {"identity", "none"}:
            return source
        if word != "gzip":
            raise PolicyError(
                f"its file {file.href} is compressed by {file.compression}, which is not supported",
                file=self._source.name,
                format="ovf",
                structure="File",
                field="compression",
                hint="decompress it and describe it without compression",
            )
        return GzipSource(source, self._limits, most)

    def chunk_names(self, file: FileRef, name: str) -> list[str]:
        """Return the names of a file's chunks: NAME.000000000 and so on (DSP0243 7.1)."""
        assert file.chunk_size  # noqa: S101 - asked of chunked files only
        if file.size is not None:
            count = max(1, -(-file.size // file.chunk_size))
        else:
            count = 1
            while count <= self._limits.members and self._has_chunk(name, count):
                count += 1
        if count > self._limits.members:
            raise FormatError(
                f"its file {file.href} is cut into more than {self._limits.members} chunks",
                file=self._source.name,
                format="ovf",
                structure="File",
                field="chunkSize",
                found=file.chunk_size,
            )
        return [f"{name}.{number:09d}" for number in range(count)]

    def _has_chunk(self, name: str, number: int) -> bool:
        """Return whether a chunk, or one of the next behind it, is there: one missing in between must be missed."""
        return any(self.has(f"{name}.{later:09d}") for later in range(number, number + _LOOK_AHEAD))

    def _chunks(self, file: FileRef, name: str) -> ByteSource:
        parts: list[ByteSource] = []
        try:
            names = self.chunk_names(file, name)
            for number, part in enumerate(names, 1):
                parts.append(self.open(part))
                self._require_chunk(file, part, parts[-1].size, last=number == len(names))
        except BaseException:
            for opened in parts:
                opened.close()
            raise
        return JoinedSource(parts, f"{self._source.name}:{name}")

    def _require_chunk(self, file: FileRef, name: str, size: int, *, last: bool) -> None:
        assert file.chunk_size  # noqa: S101
        if size == file.chunk_size or (last and 0 < size < file.chunk_size):
            return
        raise FormatError(
            f"its chunk {name} has the wrong size",
            file=self._source.name,
            format="ovf",
            structure="File",
            field="chunkSize",
            expected=f"{'at most ' if last else ''}{file.chunk_size} bytes",
            found=size,
        )

    def verify_unchanged(self) -> None:
        """Raise IntegrityError if the package's file changed since it was opened."""
        self._source.verify_unchanged()

    def close(self) -> None:
        """Close the package's file."""
        self._source.close()


class ArchiveContainer(Container):
    """An OVA: its members, read in place."""

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        super().__init__(source, limits)
        self.members = read_index(source, limits)
        descriptors = [name for name in self.members if name.lower().endswith(".ovf")]
        if len(descriptors) != 1:
            raise FormatError(
                "holds no descriptor" if not descriptors else "holds several descriptors",
                file=source.name,
                format="ova",
                structure="archive",
                expected="one member that ends in .ovf",
                found=", ".join(descriptors[:4]) or ", ".join(list(self.members)[:4]) or "no member",
            )
        self.descriptor = descriptors[0]

    def has(self, name: str) -> bool:
        """See Container."""
        return name in self.members

    def member(self, name: str) -> TarMember:
        """Return a member by its name. Raises FormatError, and PolicyError for names that are not flat."""
        if "/" in name or "\\" in name or name in {"", ".", ".."}:
            raise PolicyError(
                f"names {name!r} as a file of it, which is not the plain name of a member",
                file=self._source.name,
                format="ova",
                structure="File",
                field="href",
                hint="name its files without folders",
            )
        found = self.members.get(name)
        if found is None:
            raise FormatError(
                f"names {name}, which is not in it",
                file=self._source.name,
                format="ova",
                structure="archive",
                expected=f"a member {name}",
                found=", ".join(list(self.members)[:8]),
            )
        return found

    def open(self, name: str) -> ByteSource:
        """See Container."""
        member = self.members[name] if name == self.descriptor else self.member(name)
        return self._source.window(member.offset, member.size, f"{self._source.name}:{name}")

    def manifest(self) -> str | None:
        """See Container: the one named like the descriptor, else the only one."""
        return _only([name for name in self.members if name.lower().endswith(".mf")], f"{self.base}.mf")


class FolderContainer(Container):
    """An .ovf file and its neighbours."""

    def __init__(self, source: ByteSource, opener: Opener, limits: Limits) -> None:
        super().__init__(source, limits)
        self._opener = opener
        self.descriptor = source.path.name if source.path is not None else source.name

    def has(self, name: str) -> bool:
        """See Container."""
        if self._source.path is None or "/" in name or "\\" in name or "\0" in name or name in {"", ".", ".."}:
            return False
        try:
            return (self._source.path.parent / name).is_file()
        except OSError:
            return False

    def open(self, name: str) -> ByteSource:
        """See Container."""
        if name == self.descriptor:
            return self._source
        try:
            return self._opener.sibling(name, self._source, "file")
        except DiskmorphError as error:
            error.format = "ovf"
            raise

    def manifest(self) -> str | None:
        """See Container."""
        name = f"{self.base}.mf"
        return name if self.has(name) else None


def _only(names: Sequence[str], preferred: str) -> str | None:
    if preferred in names:
        return preferred
    return names[0] if len(names) == 1 else None
