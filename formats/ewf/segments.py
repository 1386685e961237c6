"""From a first segment file to all of them: sections are walked, where tables lie is noted, hashes are kept."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.ewf import schema as s

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskmorph.formats.registry import OpenContext
    from diskmorph.formats.source import ByteSource

_MOST_CHUNKS = 1 << 20
"""Of one table: EnCase writes at most 65,534."""
_MOST_ERRORS = 1 << 16
_MOST_SECTIONS = 1 << 18
"""Of one segment file: three for each 512 MiB are usual."""
_LETTERS = 26


@dataclass(frozen=True)
class Section:
    """A section: its kind, where its descriptor and its data begin and where it ends, in bytes of the segment file."""

    kind: str
    place: int
    end: int

    @property
    def data(self) -> int:
        """Return where the data begins."""
        return self.place + s.SECTION_SIZE


@dataclass
class Table:
    """Chunks of one table. `first` is the number of the first; they lie in low..high of segment file `file`.

    `place` and `mirror` are where the table and its copy begin (None: no copy), `tail` whether a checksum follows.
    """

    file: int
    place: int
    count: int
    base: int
    low: int
    high: int
    first: int
    tail: bool
    mirror: int | None = None


@dataclass
class Contents:
    """What the sections of all segment files say."""

    files: list[ByteSource] = field(default_factory=list)
    volume: Any = None
    old: bool = False
    tables: list[Table] = field(default_factory=list)
    chunks: int = 0
    hashes: dict[str, bytes] = field(default_factory=dict)
    """"md5" and "sha1" of the disk, as recorded."""
    hash_places: dict[str, tuple[int, int]] = field(default_factory=dict)
    unread: int = 0
    """Sectors that could not be read when the image was made."""
    copies: list[tuple[int, Section]] = field(default_factory=list)


def segment_name(first: str, number: int) -> str:
    """Return the name of segment `number` (from 1) by that of the first: .E01 to .E99, .EAA to .EZZ, .FAA to .ZZZ.

    Raises UnsupportedError where the first's name says nothing, or there are no names left.
    """
    stem, dot, suffix = first.rpartition(".")
    if not dot or len(suffix) != 3 or suffix[1:] != "01" or not suffix[0].isalpha() or not suffix[0].isascii():
        raise UnsupportedError(
            "goes on in further files, but its own name does not end like .E01",
            feature="names of segment files",
            file=first,
            hint="give the segment files the names that they had",
        )
    if number < 100:
        return f"{stem}.{suffix[0]}{number:02d}"
    high, rest = divmod(number - 100, _LETTERS * _LETTERS)
    a = ord("A") if suffix[0].isupper() else ord("a")
    letters = (ord(suffix[0]) - a + high, *divmod(rest, _LETTERS))
    if letters[0] >= _LETTERS:
        raise UnsupportedError("has more segment files than there are names", feature="segment files", file=first)
    return f"{stem}.{''.join(chr(a + letter) for letter in letters)}"


def read_segments(source: ByteSource, context: OpenContext) -> Contents:
    """Open every segment file and walk its sections. On failure, all but `source` are closed. Raises as open_image."""
    contents = Contents()
    try:
        number, more = 1, True
        while more:
            if number > context.limits.members:
                raise FormatError("has too many segment files", file=source.name, expected=context.limits.members)
            following = source if number == 1 else _following(source, number, context)
            contents.files.append(following)
            _require_segment(following, number)
            more = _walk(contents, number - 1)
            number += 1
    except BaseException:
        for one in contents.files[1:]:
            one.close()
        raise
    return contents


def _following(source: ByteSource, number: int, context: OpenContext) -> ByteSource:
    name = source.path.name if source.path is not None else source.name.rpartition("/")[2]
    return context.opener.sibling(segment_name(name, number), source, "segment file")


def _require_segment(source: ByteSource, number: int) -> None:
    head = s.FILE_HEADER.parse(source.read(0, s.FILE_HEADER_SIZE))
    if head.magic in s.OTHERS:
        what = s.OTHERS[head.magic]
        raise UnsupportedError(f"is {what}, which is not read", feature=what, file=source.name, offset=0)
    if head.magic != s.MAGIC or head.number != number:
        is_magic = head.magic == s.MAGIC
        raise FormatError(
            "is not the segment file that is looked for" if number > 1 else "is not the first segment file",
            file=source.name,
            structure="file header",
            field="number" if is_magic else "magic",
            offset=9 if is_magic else 0,
            expected=number if is_magic else s.MAGIC.hex(),
            found=head.number if is_magic else head.magic.hex(),
            hint="name the first segment file (.E01)",
        )


def sections(source: ByteSource) -> Iterator[Section]:
    """Yield the sections of a segment file to the last, "next" or "done". Raises FormatError."""
    at = s.FILE_HEADER_SIZE
    for _ in range(_MOST_SECTIONS):
        raw = source.read_upto(at, s.SECTION_SIZE)
        if len(raw) < s.SECTION_SIZE:
            raise _bad(source, "section", "kind", at, "a section", f"the end at {source.size}")
        head = s.SECTION.parse(raw)
        if zlib.adler32(raw[: s.SECTION_SIZE - 4]) != head.checksum:
            raise _bad(source, "section", "checksum", at, f"{zlib.adler32(raw[:-4]):08x}", f"{head.checksum:08x}")
        kind = head.kind.split(b"\0")[0].decode("ascii", "replace")
        if kind in {"next", "done"}:
            yield Section(kind, at, at + s.SECTION_SIZE)
            return
        if not at + s.SECTION_SIZE <= head.next <= source.size:
            raise _bad(source, f"section {kind}", "next", at + 16, f"{at + s.SECTION_SIZE} to {source.size}", head.next)
        if head.size and at + head.size != head.next:  # Expert Witness 1.35 leaves out sizes
            raise _bad(source, f"section {kind}", "size", at + 24, head.next - at, head.size)
        yield Section(kind, at, head.next)
        at = head.next
    raise _bad(source, "section", "kind", at, f"at most {_MOST_SECTIONS} sections", "another one")


def _bad(source: ByteSource, structure: str, name: str, offset: int, expected: object, found: object) -> FormatError:
    return FormatError(
        "a section is damaged",
        file=source.name,
        structure=structure,
        field=name,
        offset=offset,
        expected=expected,
        found=found,
    )


def checked(source: ByteSource, section: Section, size: int) -> bytes:
    """Return the first `size` bytes of a section's data, whose last 4 are the Adler-32 of the rest."""
    if section.end - section.data < size:
        found = section.end - section.data
        raise _bad(source, f"section {section.kind}", "size", section.place + 24, f"at least {size} bytes", found)
    raw = source.read(section.data, size)
    expected, found = zlib.adler32(raw[:-4]), int.from_bytes(raw[-4:], "little")
    if expected != found:
        place = section.data + size - 4
        raise _bad(source, f"section {section.kind}", "checksum", place, f"{expected:08x}", f"{found:08x}")
    return raw


def _walk(contents: Contents, number: int) -> bool:
    """Take in the sections of a segment file; return whether another one follows."""
    source = contents.files[number]
    held: Section | None = None
    last: Table | None = None
    for section in sections(source):
        if section.kind in {"volume", "disk"}:
            _take_volume(contents, source, section)
        elif section.kind == "data":
            _take_copy(contents, number, section)
        elif section.kind == "sectors":
            held = section
        elif section.kind == "table":
            last = _take_table(contents, number, section, held)
        elif section.kind == "table2" and last is not None:
            last.mirror, last = section.data, None
        elif section.kind in {"hash", "digest", "error2"}:
            _take_words(contents, number, section)
        elif section.kind == "next":
            return True
    return False


def _take_volume(contents: Contents, source: ByteSource, section: Section) -> None:
    if contents.volume is not None:
        raise _bad(source, f"section {section.kind}", "kind", section.place, "one volume", "another one")
    contents.old = section.end - section.data < s.VOLUME_SIZE
    schema, size = (s.OLD_VOLUME, s.OLD_VOLUME_SIZE) if contents.old else (s.VOLUME, s.VOLUME_SIZE)
    contents.volume = schema.parse(checked(source, section, size))


def _take_copy(contents: Contents, number: int, section: Section) -> None:
    """Require that a segment file is of the same set: the first segment's volume comes before. The rest is check's."""
    contents.copies.append((number, section))
    if contents.old or contents.volume is None or section.end - section.data < s.VOLUME_SIZE:
        return
    source = contents.files[number]
    copy = s.VOLUME.parse(source.read(section.data, s.VOLUME_SIZE))
    ours = contents.volume.set_id
    if any(ours) and any(copy.set_id) and ours != copy.set_id:
        raise _bad(source, "section data", "set_id", section.data + 64, ours.hex(), copy.set_id.hex())


def _take_table(contents: Contents, number: int, section: Section, held: Section | None) -> Table:
    """Note a table; `held` is the section that holds its chunks, None where they are in the table's own."""
    source = contents.files[number]
    head = s.TABLE.parse(checked(source, section, s.TABLE_SIZE))
    end = section.data + s.TABLE_SIZE + head.entries * s.ENTRY.itemsize
    if head.entries > _MOST_CHUNKS or end > section.end:
        most = min((section.end - section.data - s.TABLE_SIZE) // s.ENTRY.itemsize, _MOST_CHUNKS)
        raise _bad(source, "section table", "entries", section.data, f"at most {most}", head.entries)
    low, high = (end, section.end) if held is None else (held.data, held.end)
    base = 0 if contents.old else head.base
    tail = section.end - end == s.CHECKSUM
    table = Table(number, section.data, head.entries, base, low, high, contents.chunks, tail)
    if head.entries:
        contents.tables.append(table)
        contents.chunks += head.entries
    return table


def _take_words(contents: Contents, number: int, section: Section) -> None:
    source = contents.files[number]
    if section.kind == "error2":
        count = s.ERRORS.parse(checked(source, section, s.ERRORS.sizeof())).entries
        room = (section.end - section.data - s.ERRORS.sizeof()) // s.ERROR.itemsize
        if count > min(room, _MOST_ERRORS):
            raise _bad(source, "section error2", "entries", section.data, f"at most {min(room, _MOST_ERRORS)}", count)
        raw = source.read(section.data + s.ERRORS.sizeof(), count * s.ERROR.itemsize)
        contents.unread += int(np.frombuffer(raw, s.ERROR)["sectors"].astype(np.uint64).sum())
        return
    schema = s.HASH if section.kind == "hash" else s.DIGEST
    words = schema.parse(checked(source, section, schema.sizeof()))
    for name in ("md5", "sha1"):
        value = words.get(name)
        if value is not None and any(value):
            contents.hashes[name] = value
            contents.hash_places[name] = (number, section.data + (16 if name == "sha1" else 0))
