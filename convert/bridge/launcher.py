"""Two tiny programs for guests, machine code without a library: they run in any root file system, even an empty one.

`run_program` becomes a user and executes a program with exactly these arguments and this environment: no shell takes
part, so nothing is quoted. `grow_program` enlarges a mounted ext4. Their sources lie beside, in guest/*.s.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from construct import Bytes, Const, Int16ul, Int32ul, Int64ul, Struct

from diskmorph.formats.errors import UnsupportedError

_BASE = 0x400000
_ELF = Struct(
    "magic" / Const(b"\x7fELF\x02\x01\x01\x00"),  # ELF64, little endian
    "padding" / Bytes(8),
    "type" / Const(2, Int16ul),  # ET_EXEC
    "machine" / Int16ul,
    "version" / Const(1, Int32ul),
    "entry" / Int64ul,
    "phoff" / Const(64, Int64ul),
    "shoff" / Const(0, Int64ul),
    "flags" / Const(0, Int32ul),
    "ehsize" / Const(64, Int16ul),
    "phentsize" / Const(56, Int16ul),
    "phnum" / Const(1, Int16ul),
    "shentsize" / Const(0, Int16ul),
    "shnum" / Const(0, Int16ul),
    "shstrndx" / Const(0, Int16ul),
    # the one program header
    "p_type" / Const(1, Int32ul),  # PT_LOAD
    "p_flags" / Const(5, Int32ul),  # readable, executable
    "p_offset" / Const(0, Int64ul),
    "p_vaddr" / Const(_BASE, Int64ul),
    "p_paddr" / Const(_BASE, Int64ul),
    "p_filesz" / Int64ul,
    "p_memsz" / Int64ul,
    "p_align" / Const(0x10000, Int64ul),
)
_HEAD = _ELF.sizeof()
_MACHINES = {"amd64": 62, "arm64": 183}
RUN_CODE = {
    "amd64": bytes.fromhex(
        "4c8d2591000000418b3c24498b742408b8740000000f0585c07854418b7c2410b86a0000000f0585c07844498b7c2420b850"
        "0000000f0585c07834418b7c2418b8690000000f0585c07824498d5c2448488b3b4885ff74174883c308498b742428498b54"
        "2430b83b0000000f05ebe1bf02000000498b742438418b542440b8010000000f05bf7f000000b83c0000000f05cccccccccc"
        "cccc"
    ),
    "arm64": bytes.fromhex(
        "53040010600240f9610640f9e81380d2010000d4a002f8b7600a40f9081280d2010000d42002f8b7601240f9280680d20100"
        "00d4a001f8b7600e40f9481280d2010000d42001f8b774220191808640f8c00000b4611640f9621a40f9a81b80d2010000d4"
        "faffff17400080d2611e40f9622240f9080880d2010000d4e00f80d2a80b80d2010000d4"
    ),
}
GROW_CODE = {
    "amd64": bytes.fromhex(
        "488b7c241031f6b8020000000f0585c0782f89c3488b74241831c00fb60e83e930720c486bc00a4801c848ffc6ebec5089df"
        "be106608404889e2b8100000000f0589c7f7dfb83c0000000f05"
    ),
    "arm64": bytes.fromhex(
        "600c8092e10b40f9020080d2080780d2010000d4e001f8b7e10f40f9030080d2450180d22414403884c00071630000546310"
        "059bfcffff17e30f1ff801c28c520101a872e2030091a80380d2010000d4e00300cba80b80d2010000d4"
    ),
}


@dataclass(frozen=True)
class Program:
    """What is run: files tried in turn, arguments, NAME=VALUE words, directory, numeric user and groups."""

    paths: tuple[bytes, ...]
    arguments: tuple[bytes, ...]
    environment: tuple[bytes, ...]
    directory: bytes = b"/"
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


def run_program(program: Program, architecture: str) -> bytes:
    """Return an executable that becomes `program`; exit status 127 where it cannot. Raises UnsupportedError."""
    code = _code(RUN_CODE, architecture)
    table = _Table(_BASE + _HEAD + len(code), 9 + len(program.paths) + 1)
    groups = struct.pack(f"<{len(program.groups)}I", *program.groups)
    message = b"diskmorph: cannot run " + program.arguments[0] + b"\n"
    values = [len(program.groups), table.data(groups), program.gid, program.uid, table.text(program.directory)]
    values += [table.texts(program.arguments), table.texts(program.environment)]
    values += [table.data(message), len(message), *map(table.text, program.paths), 0]
    return _elf(code + table.built(values), architecture)


def grow_program(architecture: str) -> bytes:
    """Return an executable, `grow MOUNTPOINT BLOCKS`; its status is the error number. Raises UnsupportedError."""
    return _elf(_code(GROW_CODE, architecture), architecture)


def supported(architecture: str) -> bool:
    """Return whether there are programs for it."""
    return architecture in _MACHINES


def _code(codes: dict[str, bytes], architecture: str) -> bytes:
    if architecture not in codes:
        raise UnsupportedError(
            f"machines of architecture {architecture} are not built for",
            feature=architecture,
            hint="amd64 and arm64 are",
        )
    return codes[architecture]


def _elf(content: bytes, architecture: str) -> bytes:
    size = _HEAD + len(content)
    head = _ELF.build(
        {
            "padding": bytes(8),
            "machine": _MACHINES[architecture],
            "entry": _BASE + _HEAD,
            "p_filesz": size,
            "p_memsz": size,
        }
    )
    return bytes(head) + content


class _Table:
    """Words of 64 bits at `base`, with what they point to behind them."""

    def __init__(self, base: int, words: int) -> None:
        self._at = base + 8 * words
        self._behind = bytearray()

    def data(self, data: bytes) -> int:
        """Keep bytes, aligned; return their address."""
        self._behind += bytes(-len(self._behind) % 8)
        address = self._at + len(self._behind)
        self._behind += data
        return address

    def text(self, text: bytes) -> int:
        """Keep a string with its NUL; return its address."""
        return self.data(text + b"\0")

    def texts(self, texts: tuple[bytes, ...]) -> int:
        """Keep strings and the list of their addresses that ends with 0; return its address."""
        addresses = [self.text(text) for text in texts]
        return self.data(struct.pack(f"<{len(addresses) + 1}Q", *addresses, 0))

    def built(self, words: list[int]) -> bytes:
        """Return the words and what is behind them."""
        return struct.pack(f"<{len(words)}Q", *words) + bytes(self._behind)
