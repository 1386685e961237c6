"""The text descriptor of a VMDK (VDF "The Descriptor File"): what the disk is made of, in its own words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diskmorph.formats.errors import FormatError, TargetError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.formats.limits import Limits

NO_PARENT = 0xFFFFFFFF
MAGIC = "# disk descriptorfile"

_EXTENT = re.compile(
    r'(RW|RDONLY|NOACCESS)\s+(\d+)\s+([A-Z0-9]+)(?:\s+"(.*)"(?:\s+(\d+))?(?:\s.*)?)?\s*\Z', re.IGNORECASE
)
_ACCESS = re.compile(r"(RW|RDONLY|NOACCESS)(?:\s|\Z)", re.IGNORECASE)
_PAIR = re.compile(r"([A-Za-z_][\w.:-]*)\s*=\s*(.*)\Z")
_ENCODING = re.compile(rb'^[ \t]*encoding[ \t]*=[ \t]*"?([^"\r\n]*)"?', re.IGNORECASE | re.MULTILINE)
_CID = re.compile(r"[0-9a-fA-F]{1,8}\Z")
_MOST_SECTORS = 1 << 52


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One line of the extent description: `sectors` of the disk, of which kind, in which file from which sector."""

    access: str
    sectors: int
    kind: str
    name: str | None
    offset: int
    line: int


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A parsed descriptor. `values` has lower-case keys; `strange` lists lines that say nothing known."""

    create_type: str | None
    cid: int | None
    parent_cid: int | None
    parent_hint: str | None
    extents: tuple[ExtentLine, ...]
    values: Mapping[str, str] = field(default_factory=dict)
    strange: tuple[str, ...] = ()

    @property
    def has_parent(self) -> bool:
        """Whether the disk is a difference to a parent."""
        return self.parent_cid is not None and self.parent_cid != NO_PARENT

    @property
    def sectors(self) -> int:
        """Sectors of the whole disk."""
        return sum(line.sectors for line in self.extents)


def parse(raw: bytes, file: str, limits: Limits) -> Descriptor:
    """Return what a descriptor's bytes say; what follows a NUL byte is ignored.

    Raises FormatError for extent lines and CIDs that make no sense or contradict each other, UnsupportedError for an
    unknown encoding.
    """
    raw = raw.split(b"\0", 1)[0]
    try:
        return _parse(_decode(raw, file), file, limits)
    except FormatError as error:
        field = error.field or ""
        line = int(field.removeprefix("line ")) if field.startswith("line ") else 1
        starts = [0, *(end.end() for end in re.finditer(rb"\r\n|\n|\r", raw))]
        raise error.located(offset=starts[min(line, len(starts)) - 1]) from error.__cause__


def _parse(whole: str, file: str, limits: Limits) -> Descriptor:
    lines = re.split(r"\r\n|\n|\r", whole)
    extents: list[ExtentLine] = []
    values: dict[str, str] = {}
    strange: list[str] = []
    for number, text in enumerate(lines, 1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        if _ACCESS.match(line):
            extents.append(_extent(line, number, file))
            if len(extents) > limits.members:
                raise _fault(file, "extents", f"at most {limits.members}", "more", "names too many extents")
        elif (pair := _PAIR.match(line)) is not None:
            _note(values, pair[1].lower(), pair[2].strip(), file)
        else:
            strange.append(line[:80])
    return Descriptor(
        create_type=values.get("createtype"),
        cid=_cid(values, "cid", file),
        parent_cid=_cid(values, "parentcid", file),
        parent_hint=values.get("parentfilenamehint"),
        extents=tuple(extents),
        values=values,
        strange=tuple(strange[:100]),
    )


def _fault(file: str, name: str, expected: str, found: str, problem: str) -> FormatError:
    return FormatError(
        problem, file=file, format="vmdk", structure="descriptor", field=name, expected=expected, found=found
    )


def _decode(raw: bytes, file: str) -> str:
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.isascii():
        return raw.decode("ascii")
    found = _ENCODING.search(raw)
    name = found[1].decode("ascii", "replace").strip() if found else "UTF-8"
    codec = re.sub(r"^windows-", "cp", name.lower())
    try:
        # Only encodings that keep ASCII as it is can stand in a text whose keywords are ASCII.
        ascii_ = bytes(range(48, 123)).replace(b"\\", b"")
        if ascii_.decode(codec) != ascii_.decode("ascii") or len(b"\\x41".decode(codec)) != 4:
            raise LookupError(codec)
        return raw.decode(codec)
    except UnicodeDecodeError as error:
        raise _fault(file, "encoding", name, repr(raw[error.start : error.start + 4]), "is not text") from error
    except (LookupError, ValueError) as error:
        raise UnsupportedError(
            f"the descriptor's encoding {name!r} is not known",
            feature="encoding",
            file=file,
            format="vmdk",
            structure="descriptor",
            field="encoding",
        ) from error


def _extent(line: str, number: int, file: str) -> ExtentLine:
    match = _EXTENT.match(line)
    if match is None or len(match[2]) > 18 or len(match[5] or "") > 18:
        raise _fault(
            file, f"line {number}", 'ACCESS SECTORS KIND "FILE" OFFSET', line[:100], "an extent makes no sense"
        )
    sectors, offset = int(match[2]), int(match[5] or 0)
    if sectors > _MOST_SECTORS or offset > _MOST_SECTORS:
        raise _fault(file, f"line {number}", f"at most {_MOST_SECTORS} sectors", line[:100], "an extent is too large")
    kind = match[3].upper()
    if match[4] is None and kind != "ZERO":
        raise _fault(file, f"line {number}", "a file name in quotes", line[:100], "an extent names no file")
    return ExtentLine(match[1].upper(), sectors, kind, match[4], offset, number)


_SINGLE = frozenset({"cid", "parentcid", "createtype", "parentfilenamehint"})


def _note(values: dict[str, str], key: str, text: str, file: str) -> None:
    value = text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text
    if key in _SINGLE and values.get(key, value) != value:
        raise _fault(file, key, values[key], value, "the descriptor contradicts itself")
    values.setdefault(key, value)


def _cid(values: Mapping[str, str], key: str, file: str) -> int | None:
    text = values.get(key)
    if text is None:
        return None
    if not _CID.match(text):
        raise _fault(
            file, {"cid": "CID"}.get(key, "parentCID"), "8 hexadecimal digits", text[:20], "a CID is malformed"
        )
    return int(text, 16)


@dataclass(frozen=True, slots=True)
class NewDescriptor:
    """What a new descriptor says. `extents` are ready lines; `uuid` and `content_id` are 16 and 12 bytes."""

    create_type: str
    cid: int
    sectors: int
    extents: tuple[str, ...]
    adapter_type: str
    hwversion: str
    toolsversion: str
    uuid: bytes
    content_id: bytes
    parent_cid: int = NO_PARENT
    parent_hint: str | None = None
    thin: bool = False

    def text(self) -> bytes:
        """Return the descriptor as VMware writes it. Raises TargetError for file names that are not UTF-8."""
        cylinders, heads, track = geometry(self.sectors, self.adapter_type)
        hexes = [f"{byte:02x}" for byte in self.uuid]
        hint = [] if self.parent_hint is None else [f'parentFileNameHint="{self.parent_hint}"']
        ddb = {
            "adapterType": self.adapter_type,
            "geometry.cylinders": cylinders,
            "geometry.heads": heads,
            "geometry.sectors": track,
            "longContentID": f"{self.content_id.hex()}{self.cid:08x}",
            **({"thinProvisioned": 1} if self.thin else {}),
            "toolsVersion": self.toolsversion,
            "uuid": f"{' '.join(hexes[:8])}-{' '.join(hexes[8:])}",
            "virtualHWVersion": self.hwversion,
        }
        lines = [
            "# Disk DescriptorFile",
            "version=1",
            'encoding="UTF-8"',
            f"CID={self.cid:08x}",
            f"parentCID={self.parent_cid:08x}",
            'isNativeSnapshot="no"',
            f'createType="{self.create_type}"',
            *hint,
            "",
            "# Extent description",
            *self.extents,
            "",
            "# The Disk Data Base",
            "#DDB",
            "",
            *(f'ddb.{key} = "{value}"' for key, value in ddb.items()),
            "",
        ]
        try:
            return "\n".join(lines).encode("utf-8")
        except UnicodeEncodeError as error:
            name = next(line for line in lines if error.object[error.start] in line)
            raise TargetError(
                "a name that is not UTF-8 cannot stand in a VMDK descriptor",
                format="vmdk",
                found=name,
                hint="rename it",
            ) from None


def geometry(sectors: int, adapter_type: str) -> tuple[int, int, int]:
    """Return cylinders, heads and sectors of a track: 16/63 and at most 16383 cylinders for IDE, else 255/63, 65535."""
    heads, most = (16, 16383) if adapter_type == "ide" else (255, 65535)
    return min(max(sectors // (heads * 63), 1), most), heads, 63
