"""Linux kernels (aki): what their headers tell. Nothing is executed or unpacked beyond finding the version."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from construct import ConstructError

from diskmorph.formats.ami import schema
from diskmorph.formats.ami.streams import open_stream
from diskmorph.formats.errors import FormatError
from diskmorph.formats.package_probe import compression_of, is_kernel_head

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diskmorph.formats.source import ByteSource

_BANNER = re.compile(rb"Linux version (\d[\w.+~-]*[^\0\n]*)")
_STEP = 1 << 20
_MOST_DECODED = 256 << 20
_LONGEST_VERSION = 512
_DEFAULT_CMDLINE = 255


@dataclass(frozen=True, slots=True)
class Kernel:
    """A Linux kernel.

    `kind` is "bzImage", "zImage", "Image" or "zboot"; `version` its release (`6.1.0-18-amd64`), `banner` the whole
    line; `cmdline_size` the longest command line in bytes without its end; `compression` that of the kernel proper;
    `header` every field of its boot header that its protocol has.
    """

    kind: str
    version: str | None
    banner: str | None
    architecture: str
    protocol: str | None = None
    cmdline_size: int | None = None
    compression: str | None = None
    efi_stub: bool = False
    payload_offset: int | None = None
    payload_size: int | None = None
    header: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return what `info --json` shows under `kernel`."""
        return asdict(self)


def read_kernel(source: ByteSource) -> Kernel:
    """Return what a kernel's headers say. Raises FormatError where it is none, is cut off or damaged."""
    head = source.read_upto(0, schema.BOOT_HEADER_END)
    if head[0x202:0x206] == b"HdrS":
        return _x86(source)
    if head[0x38:0x3C] == b"ARM\x64":
        return _arm64(source, head)
    if head[:2] == b"MZ" and head[4:8] == b"zimg":
        return _zboot(source, head)
    if head[:2] == b"\x1f\x8b":
        return _gzipped(source)
    raise _fault(source, "is no Linux kernel that is known", 0)


def _fault(source: ByteSource, problem: str, offset: int, **place: Any) -> FormatError:
    return FormatError(problem, file=source.name, format="aki", structure="boot header", offset=offset, **place)


def _x86(source: ByteSource) -> Kernel:
    raw = source.read_upto(schema.BOOT_HEADER_OFFSET, schema.BOOT_HEADER.sizeof())
    if len(raw) < schema.BOOT_HEADER.sizeof():
        raise _fault(source, "is cut off within its boot header", schema.BOOT_HEADER_OFFSET)
    header = schema.BOOT_HEADER.parse(raw)
    if header.boot_flag != 0xAA55:
        raise _fault(source, "has no boot signature", 0x1FE, expected="0xaa55", found=hex(header.boot_flag))
    fields: dict[str, Any] = {
        name: value.decode("latin-1") if isinstance(value, bytes) else int(value)
        for name, value in header.items()
        if not name.startswith("_") and header.version >= schema.SINCE.get(name, 0)
    }
    setup = (header.setup_sects or 4) * 512 + 512
    banner = _version_string(source, header.kernel_version, setup)
    payload = _payload(source, fields, setup)
    machine = _pe_machine(source)
    long = bool(fields.get("xloadflags", 0) & schema.XLF_KERNEL_64)
    return Kernel(
        kind="bzImage" if header.loadflags & schema.LOADED_HIGH else "zImage",
        version=banner.split()[0] if banner and banner.split() else None,
        banner=banner,
        architecture="x86_64" if long or machine == "x86_64" else "i386",
        protocol=f"{header.version >> 8}.{header.version & 0xFF:02d}",
        cmdline_size=fields.get("cmdline_size", _DEFAULT_CMDLINE),
        compression=compression_of(source.read_upto(payload[0], 6)) if payload else None,
        efi_stub=machine is not None,
        payload_offset=payload[0] if payload else None,
        payload_size=payload[1] if payload else None,
        header=fields,
    )


def _version_string(source: ByteSource, pointer: int, setup: int) -> str | None:
    """Return the string that kernel_version points to, which lies within the real-mode code."""
    if not pointer:
        return None
    start = pointer + 0x200
    if start >= setup:
        raise _fault(
            source,
            "points to a version outside its real-mode code",
            0x20E,
            field="kernel_version",
            expected=f"less than {setup - 0x200}",
            found=pointer,
        )
    text = source.read_upto(start, _LONGEST_VERSION).split(b"\0", 1)[0]
    return text.decode("utf-8", "replace").strip() or None


def _payload(source: ByteSource, fields: Mapping[str, Any], setup: int) -> tuple[int, int] | None:
    """Return where the compressed kernel is; raise where the file ends before it does."""
    code = fields.get("syssize", 0) * 16
    if setup + code > source.size + 15:
        raise _fault(
            source,
            "is cut off: its protected-mode code lies beyond its end",
            0x1F4,
            field="syssize",
            expected=f"{setup + code} bytes",
            found=source.size,
        )
    length = fields.get("payload_length", 0)
    if not length:
        return None
    start = setup + fields["payload_offset"]
    if start + length > source.size:
        raise _fault(
            source,
            "is cut off: its payload lies beyond its end",
            0x248,
            field="payload_offset",
            expected=f"{start + length} bytes",
            found=source.size,
        )
    return start, length


def _pe_machine(source: ByteSource) -> str | None:
    """Return the architecture that a PE header names: the file is an EFI program; None if it is none."""
    if source.read_upto(0, 2) != b"MZ":
        return None
    at = int.from_bytes(source.read_upto(schema.PE_OFFSET, 4), "little")
    raw = source.read_upto(at, schema.PE_HEADER.sizeof())
    if len(raw) < schema.PE_HEADER.sizeof():
        return None
    found = schema.PE_HEADER.parse(raw)
    if found.signature != b"PE\0\0":
        return None
    return schema.MACHINES.get(found.machine, f"machine {found.machine:#06x}")


def _arm64(source: ByteSource, head: bytes, *, read: Callable[[int], bytes] | None = None) -> Kernel:
    if len(head) < schema.ARM64_HEADER.sizeof():
        raise _fault(source, "is cut off within its header", 0)
    header = schema.ARM64_HEADER.parse(head)
    banner = _banner(read or _reader(source, 0, source.size))
    fields = {name: int(header[name]) for name in ("text_offset", "image_size", "flags", "pe_offset")}
    return Kernel(
        kind="Image",
        version=banner.split()[0] if banner else None,
        banner=banner,
        architecture="arm64",
        cmdline_size=2048 - 1,  # COMMAND_LINE_SIZE of arm64, with its NUL
        efi_stub=head[:2] == b"MZ",
        header=fields,
    )


def _gzipped(source: ByteSource) -> Kernel:
    stream = open_stream(source, 0, "gzip")
    head = b""
    while len(head) < schema.BOOT_HEADER_END and (piece := stream.read(schema.BOOT_HEADER_END - len(head))):
        head += piece
    if not is_kernel_head(head) or head[0x38:0x3C] != b"ARM\x64":
        raise _fault(source, "is no Linux kernel that is known", 0)
    kernel = _arm64(source, head, read=_limited(stream.read))
    return Kernel(**{**asdict(kernel), "compression": "gzip"})


def _zboot(source: ByteSource, head: bytes) -> Kernel:
    try:
        header = schema.ZBOOT_HEADER.parse(head)
    except (ConstructError, UnicodeDecodeError) as error:
        raise _fault(source, "has a damaged zboot header", 0) from error
    start, size = int(header.payload_offset), int(header.payload_size)
    if start + size > source.size or not size:
        raise _fault(
            source,
            "is cut off: its payload lies beyond its end",
            8,
            field="payload_offset",
            expected=f"{start + size} bytes",
            found=source.size,
        )
    codec = compression_of(source.read_upto(start, 6))
    banner = None
    if codec is not None:
        banner = _banner(_limited(open_stream(source.window(start, size), 0, codec).read))
    return Kernel(
        kind="zboot",
        version=banner.split()[0] if banner else None,
        banner=banner,
        architecture=_pe_machine(source) or "unknown",
        compression=codec or str(header.compression),
        efi_stub=True,
        payload_offset=start,
        payload_size=size,
    )


def _reader(source: ByteSource, start: int, stop: int) -> Callable[[int], bytes]:
    at = start

    def read(most: int) -> bytes:
        nonlocal at
        data = source.read_upto(at, min(most, stop - at, _MOST_DECODED - at))
        at += len(data)
        return data

    return read


def _limited(read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Return a reader that ends after so many bytes that no kernel has more."""
    left = _MOST_DECODED

    def limited(most: int) -> bytes:
        nonlocal left
        data = read(min(most, left)) if left > 0 else b""
        left -= len(data)
        return data

    return limited


def _banner(read: Callable[[int], bytes]) -> str | None:
    """Return what follows "Linux version " in a kernel, searching it from front to back."""
    tail = b""
    while data := read(_STEP):
        block = tail + data
        found = _BANNER.search(block)
        if found is not None and (found.end() < len(block) or len(data) < _STEP):
            return found[1][:_LONGEST_VERSION].decode("utf-8", "replace").strip()
        tail = block[-2 * _LONGEST_VERSION :]
    return None
