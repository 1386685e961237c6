"""The header of a qcow2 file, read and checked: what all other structures are found by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError, UnsupportedError
from diskmorph.formats.qcow2 import schema as s
from diskmorph.formats.qcow2.extensions import Extensions, read_extensions

if TYPE_CHECKING:
    from diskmorph.formats.limits import Limits
    from diskmorph.formats.source import ByteSource


@dataclass(frozen=True)
class Header:
    """The fields of "Header", with those that version 2 lacks filled in. Offsets and sizes in bytes."""

    version: int
    size: int
    cluster_bits: int
    crypt_method: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshot_count: int
    snapshot_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = s.V2_LENGTH
    compression: int = 0
    backing: str | None = None
    extensions: Extensions = field(default_factory=Extensions)

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def extended(self) -> bool:
        """Whether L2 entries are 16 bytes, with 32 subclusters each."""
        return bool(self.incompatible & s.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Whether guest data lies in another file."""
        return bool(self.incompatible & s.DATA_FILE)

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster // (16 if self.extended else 8)

    @property
    def coverage(self) -> int:
        """Bytes of the disk that one L2 table maps."""
        return self.l2_entries * self.cluster

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount."""
        return 1 << self.refcount_order

    @property
    def block_entries(self) -> int:
        """Refcounts of one refcount block."""
        return self.cluster * 8 // self.refcount_bits

    @property
    def encryption(self) -> str | None:
        """The encryption's name."""
        return s.CRYPT_METHODS.get(self.crypt_method, f"method {self.crypt_method}") if self.crypt_method else None


def bad(problem: str, source: ByteSource, structure: str, **place: Any) -> FormatError:
    """Return a FormatError about this file."""
    return FormatError(problem, file=source.name, format="qcow2", structure=structure, **place)


def read_header(source: ByteSource, limits: Limits) -> Header:
    """Read and check the header with its extensions.

    Raises FormatError (damaged, pointing beyond the file), UnsupportedError (version, unknown incompatible features).
    """
    head = source.read_upto(0, s.V2_LENGTH)
    if head[:4] != s.MAGIC:
        raise bad(
            "not a qcow2 image", source, "header", field="magic", offset=0, expected="514649fb", found=head[:4].hex()
        )
    version = int.from_bytes(head[4:8], "big") if len(head) >= 8 else None
    if version is not None and version not in {2, 3}:
        raise UnsupportedError(
            f"qcow2 version {version} is not supported",
            feature=f"version {version}",
            file=source.name,
            format="qcow2",
            structure="header",
            field="version",
            offset=4,
            expected="2 or 3",
            found=version,
        )
    if len(head) < s.V2_LENGTH:
        raise bad("the file ends inside its header", source, "header", offset=len(head), expected=s.V2_LENGTH)
    raw = s.HEADER.parse(head)
    fields: dict[str, Any] = {name: int(raw[name]) for name in _COMMON}
    if version == 3:
        fields |= _version_3(source)
    header = Header(**fields)
    _check_shape(header, source)
    extensions = read_extensions(source, header.header_length, _extensions_end(header, raw, source), limits)
    _refuse_unknown(header, extensions, source)
    _check_places(header, source, limits)
    return replace(header, extensions=extensions, backing=_backing(raw, source))


_COMMON = (
    "version",
    "size",
    "cluster_bits",
    "crypt_method",
    "l1_size",
    "l1_offset",
    "refcount_offset",
    "refcount_clusters",
    "snapshot_count",
    "snapshot_offset",
)


def _version_3(source: ByteSource) -> dict[str, int]:
    raw = s.HEADER_V3.parse(_part(source, s.V2_LENGTH, s.V3_LENGTH - s.V2_LENGTH))
    length = int(raw.header_length)
    if length < s.V3_LENGTH or length % 8:
        raise bad(
            "the header's length is impossible",
            source,
            "header",
            field="header_length",
            offset=100,
            expected=f"at least {s.V3_LENGTH}, a multiple of 8",
            found=length,
        )
    fields = {name: int(raw[name]) for name in ("incompatible", "compatible", "autoclear", "refcount_order")}
    compression = 0
    if length > s.V3_LENGTH:
        compression = int(s.HEADER_MORE.parse(_part(source, s.V3_LENGTH, 8)).compression)
    if compression and not fields["incompatible"] & s.COMPRESSION:
        raise bad(
            "a compression type without its feature bit",
            source,
            "header",
            field="compression_type",
            offset=104,
            expected=0,
            found=compression,
        )
    if compression >= len(s.COMPRESSIONS):
        raise UnsupportedError(
            f"compression type {compression} is not supported",
            feature=f"compression type {compression}",
            file=source.name,
            format="qcow2",
            structure="header",
            field="compression_type",
            offset=104,
        )
    return {**fields, "header_length": length, "compression": compression}


def _part(source: ByteSource, offset: int, length: int) -> bytes:
    data = source.read_upto(offset, length)
    if len(data) < length:
        raise bad(
            "the file ends inside its header", source, "header", offset=source.size, expected=f"{offset + length} bytes"
        )
    return data


def _check_shape(header: Header, source: ByteSource) -> None:
    low, high = s.CLUSTER_BITS
    checks = (
        ("cluster_bits", 20, header.cluster_bits, low <= header.cluster_bits <= high, f"{low}..{high}"),
        ("refcount_order", 96, header.refcount_order, header.refcount_order <= 6, "0..6"),
        ("size", 24, header.size, header.size < 1 << 63, "below 2^63"),
        ("crypt_method", 32, header.crypt_method, header.crypt_method <= max(s.CRYPT_METHODS), "0, 1 or 2"),
    )
    for name, offset, value, good, expected in checks:
        if not good:
            raise bad(
                "a header field is impossible",
                source,
                "header",
                field=name,
                offset=offset,
                expected=expected,
                found=value,
            )
    if header.header_length > header.cluster:
        raise bad(
            "the header is longer than its cluster",
            source,
            "header",
            field="header_length",
            offset=100,
            expected=f"at most {header.cluster}",
            found=header.header_length,
        )
    if header.extended and header.cluster < s.EXTENDED_LEAST:
        raise bad(
            "extended L2 entries need larger clusters",
            source,
            "header",
            field="cluster_bits",
            offset=20,
            expected="at least 14",
            found=header.cluster_bits,
        )


def _extensions_end(header: Header, raw: Any, source: ByteSource) -> int:
    """Extensions end where the backing file's name begins, or with the first cluster."""
    offset, length = int(raw.backing_offset), int(raw.backing_length)
    if not offset:
        return header.cluster
    if length > s.BACKING_NAME_MOST:
        raise bad(
            "the backing file's name is too long",
            source,
            "header",
            field="backing_file_size",
            offset=16,
            expected=f"at most {s.BACKING_NAME_MOST}",
            found=length,
        )
    if offset < header.header_length or offset + length > header.cluster:
        raise bad(
            "the backing file's name lies outside the header's cluster",
            source,
            "header",
            field="backing_file_offset",
            offset=8,
            expected=f"{header.header_length}..{header.cluster - length}",
            found=offset,
        )
    return offset


def _backing(raw: Any, source: ByteSource) -> str | None:
    if not raw.backing_offset or not raw.backing_length:
        return None
    return _part(source, int(raw.backing_offset), int(raw.backing_length)).decode("utf-8", "surrogateescape")


def _refuse_unknown(header: Header, extensions: Extensions, source: ByteSource) -> None:
    unknown = header.incompatible & ~s.KNOWN_INCOMPATIBLE
    if not unknown:
        return
    bits = [bit for bit in range(64) if unknown >> bit & 1]
    names = [extensions.feature_names.get((0, bit)) or f"incompatible feature bit {bit}" for bit in bits]
    raise UnsupportedError(
        f"uses features that are not supported: {', '.join(names)}",
        feature=names[0],
        file=source.name,
        format="qcow2",
        structure="header",
        field="incompatible_features",
        offset=72,
        found=f"{header.incompatible:#x}",
    )


def _check_places(header: Header, source: ByteSource, limits: Limits) -> None:
    needed = -(-header.size // header.coverage)
    if header.l1_size < needed:
        raise bad(
            "the L1 table is too short for the disk",
            source,
            "header",
            field="l1_size",
            offset=36,
            expected=f"at least {needed}",
            found=header.l1_size,
        )
    l1 = Place("L1 table", header.l1_offset, header.l1_size * 8, "l1_table_offset", 40)
    require_table(source, l1, header.cluster, min(limits.resident_table, s.L1_MOST))
    length = header.refcount_clusters << header.cluster_bits
    table = Place("refcount table", header.refcount_offset, length, "refcount_table_offset", 48)
    require_table(source, table, header.cluster, min(limits.resident_table, s.REFCOUNT_TABLE_MOST))
    if header.snapshot_count > limits.snapshots:
        raise bad(
            "has too many snapshots",
            source,
            "header",
            field="nb_snapshots",
            offset=60,
            expected=f"at most {limits.snapshots}",
            found=header.snapshot_count,
        )
    if header.snapshot_count:
        first = Place("snapshot table", header.snapshot_offset, s.SNAPSHOT.sizeof(), "snapshots_offset", 64)
        require_table(source, first, header.cluster, limits.resident_table)
    if header.has_data_file and header.crypt_method:
        raise bad("an encrypted image with a data file", source, "header", field="crypt_method", offset=32, expected=0)


@dataclass(frozen=True)
class Place:
    """Where a table is said to lie: `offset` and `length` in bytes; `field`, at `at` in the file, says so."""

    structure: str
    offset: int
    length: int
    field: str
    at: int


def require_table(source: ByteSource, table: Place, cluster: int, most: int) -> None:
    """Raise FormatError unless a table begins on a cluster, lies in the file and has at most `most` bytes."""
    problem, offset, expected, found = "", table.at, "", str(table.offset)
    if table.length > most:
        problem, expected, found = "is too large", f"at most {most} bytes", str(table.length)
    elif table.offset % cluster:
        problem, expected = "does not begin on a cluster", f"a multiple of {cluster}"
    elif table.length and not table.offset:
        problem, expected = "has no place", "an offset"
    elif table.length and table.offset + table.length > source.size:
        problem, offset = "lies beyond the end of the file", table.offset
        expected, found = f"{table.length} bytes", f"the end at {source.size}"
    if problem:
        raise bad(
            f"the {table.structure} {problem}",
            source,
            table.structure,
            field=table.field,
            offset=offset,
            expected=expected,
            found=found,
        )
