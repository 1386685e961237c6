"""`Allocator`: what a writer is. It decides where bytes go and what the tables say; it moves no data.

One owner thread calls, in this order: `begin` once; then for ascending disk ranges `place`, `frame` and `settle`; then
`finish` once. What the methods yield is written by the pipeline, which also writes the data where `place` said.
"""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diskmorph.formats.errors import OptionError
from diskmorph.formats.extents import PLAIN
from diskmorph.formats.numbers import whole_number

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from diskmorph.formats.bitmaps import DirtyBitmap
    from diskmorph.formats.source import Buffer

# A run that the pipeline asks a place for. Plain runs are any number of grains long; encoded ones are one unit each,
# `size` being the bytes that `frame` returned. Plain runs begin and end on multiples of `grain`, or at the disk's end.
RUN = np.dtype([("start", "<u8"), ("length", "<u8"), ("size", "<u8"), ("kind", "u1"), ("codec", "u1")], align=True)

# Where it goes. A run may come back as several rows; DATA rows cover all DATA runs. ZERO rows are places that exist in
# the file and must read as zeroes (flat formats, preallocation); other zeroes and holes have no row.
PLACED = np.dtype(
    [("start", "<u8"), ("length", "<u8"), ("offset", "<u8"), ("member", "<u4"), ("kind", "u1"), ("codec", "u1")],
    align=True,
)


_LATEST = 0xFFFF_FFFF  # seconds since 1970: what file systems and archives hold in 32 bits


class Write(NamedTuple):
    """Bytes to be written at `offset` of member number `member`."""

    member: int
    offset: int
    data: Buffer


class Allocator(ABC):
    """Lays out one image, of one or several files.

    - `size`: the disk's size in bytes as the image will record it; `sector_size`.
    - `unit`: bytes that are allocated together (cluster, block, grain); a power of two, or the whole disk's size.
    - `grain`: the smallest piece with a presence of its own (bitmap bit, subcluster); divides `unit`. All pieces of one
      unit come in one `place` call.
    - `codecs`: the encodings it takes, PLAIN among them where data may be stored plain; `codec`, `level`: what data
      should be encoded with (PLAIN: not at all).
    - `window_bits`: the largest window of deflate streams that its readers take, as a power of two.
    - `sequential`: every write comes at the end of what was written before, so a pipe can take it.
    - `members`: the names of the files, the first being the one the user named. Members are committed last to first.
    - `overlay`: the image has a parent: HOLE may not be placed, ABSENT may.
    - `alignment`: data offsets are multiples of it, where the format allows.
    - `preallocation`: "off", "metadata", "falloc" or "full": what is done about ZERO rows.
    """

    size: int
    sector_size: int = 512
    unit: int
    grain: int
    codecs: frozenset[int] = frozenset({PLAIN})
    codec: int = PLAIN
    level: int | None = None
    window_bits: int = 15
    sequential: bool = False
    members: Sequence[str] = ()
    overlay: bool = False
    alignment: int = 512
    preallocation: str = "off"
    bitmaps: frozenset[str] = frozenset()
    """Names of the dirty bitmaps that the image holds too."""
    encrypted: bool = False
    """Whether data is written as `seal` returns it, the zeroes in stored units too."""

    def begin(self) -> Iterator[Write]:
        """Yield what must precede data."""
        return iter(())

    @abstractmethod
    def place(self, runs: NDArray[np.void]) -> NDArray[np.void]:
        """Return PLACED rows for RUN rows, ascending in `start`; record every run in the tables."""

    def frame(self, start: int, payload: Buffer) -> Buffer:
        """Return what is written for an encoded unit: its payload with a marker in front or padding behind.

        Called before `place`; the RUN's `size` and the place are those of the framed bytes.
        """
        del start
        return payload

    def seal(self, offset: int, data: Buffer) -> Buffer:
        """Return data as it is stored at `offset` of the file; from any thread, after `begin`."""
        del offset
        return data

    def settle(self, upto: int) -> Iterator[Write]:
        """Yield tables that no later place can change, every range before disk offset `upto` being placed."""
        del upto
        return iter(())

    @abstractmethod
    def finish(self) -> Iterator[Write]:
        """Yield the rest in commit order: the header last, unless the format is sequential."""

    @abstractmethod
    def sizes(self) -> Sequence[int]:
        """Return the final size of each member in bytes; after `finish` is exhausted."""


@dataclass(frozen=True, slots=True)
class Option:
    """One `-o` option of a format: its name, the values it takes ("SIZE", "on|off", ...), its default, what it does."""

    name: str
    values: str
    default: str
    help: str


@dataclass(frozen=True, slots=True)
class NewParent:
    """The parent of a new overlay: the name to record, its format, size in bytes, `identity` and real path."""

    name: str
    format: str
    size: int
    identity: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    def unicode_name(self) -> str:
        """Return the name for formats that store names as Unicode. Raises OptionError: its bytes are no UTF-8."""
        try:
            self.name.encode()
        except UnicodeEncodeError:
            raise OptionError(
                f"{self.format} cannot record the parent's name {self.name!r}, which is not UTF-8",
                hint="rename the parent, or write the overlay as qcow2",
            ) from None
        return self.name


class Identity:
    """Where a new image's UUIDs, CIDs and times come from: chance and the clock, or a seed.

    With a `seed` (of the content, for `--reproducible`) the same seed and label give the same values, and the time is
    SOURCE_DATE_EPOCH, or the first second of 2000 where that is not set. With `now` too, seed and time are a former
    run's (of `--resume`), and values are by chance as far as anyone can tell.
    """

    def __init__(self, seed: bytes | None = None, *, now: float | None = None) -> None:
        self._seed = seed
        self._fixed = now is not None
        self._now = time.time() if now is None else now

    @property
    def reproducible(self) -> bool:
        """Whether values derive from a seed."""
        return self._seed is not None and not self._fixed

    def bytes(self, label: str, length: int) -> bytes:
        """Return `length` bytes (at most 64) for `label`."""
        if self._seed is None:
            return os.urandom(length)
        import hashlib  # noqa: PLC0415 - it loads OpenSSL, and most images are not reproducible

        return hashlib.blake2b(label.encode(), key=self._seed[:64], digest_size=length).digest()

    def uuid(self, label: str) -> uuid.UUID:
        """Return a version 4 UUID for `label`."""
        import uuid  # noqa: PLC0415 - not every format has one

        return uuid.UUID(bytes=self.bytes(f"uuid/{label}", 16), version=4)

    def u32(self, label: str) -> int:
        """Return a number of 32 bits for `label`, neither 0 nor all ones."""
        value = int.from_bytes(self.bytes(f"u32/{label}", 4), "little")
        return value if value not in {0, 0xFFFFFFFF, 0xFFFFFFFE} else 0x1234ABCD

    def time(self) -> float:
        """Return the seconds since 1970 that count as now. Raises OptionError: SOURCE_DATE_EPOCH is none."""
        if self._seed is None or self._fixed:
            return self._now
        said = os.environ.get("SOURCE_DATE_EPOCH", "946684800")
        found = whole_number(said, _LATEST)
        if found is None:
            raise OptionError(
                f"SOURCE_DATE_EPOCH={said[:40]!r} is no time", hint=f"whole seconds since 1970, at most {_LATEST}"
            )
        return float(found)


@dataclass(frozen=True, slots=True)
class NewImage:
    """What a format's `new_allocator` is asked for.

    `size` in bytes (a writer rounds it up to its sector where it must), `name` the target's file name without folder,
    `options` the `-o` words, `codec` and `level` from `-c` (None: not asked), `parent` for overlays.
    """

    size: int
    name: str
    sector_size: int = 512
    options: Mapping[str, str] = field(default_factory=dict)
    codec: int | None = None
    level: int | None = None
    parent: NewParent | None = None
    identity: Identity = field(default_factory=Identity)
    bitmaps: Sequence[DirtyBitmap] = ()
    passphrase: bytes | None = None


_DIGITS = frozenset("0123456789.")
_SUFFIXES = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


def parse_size(text: str, name: str = "size") -> int:
    """Return bytes of `10G`, `512M`, `1.5T`, `512KiB` or plain digits (powers of 1024). Raises OptionError."""
    word = text.upper().removesuffix("IB")
    digits = word.rstrip("BKMGTP")
    unit = word[len(digits) :].rstrip("B") if len(word) - len(digits) > 1 else word[len(digits) :]
    try:
        if not set(digits) <= _DIGITS:  # int() takes signs, spaces and underscores too
            raise ValueError(digits)
        value = float(digits) * _SUFFIXES[unit] if "." in digits else int(digits) * _SUFFIXES[unit]
    except (ValueError, KeyError, OverflowError):
        raise OptionError(f"{name} {text!r} is not a size", hint="write bytes, or a number with K, M, G or T") from None
    if not 0 <= value < math.inf or value != int(value):
        raise OptionError(f"{name} {text!r} is not a whole number of bytes")
    return int(value)


class OptionReader:
    """Reads a format's `-o` words one by one; `done` refuses what nobody asked for."""

    def __init__(self, format: str, options: Mapping[str, str]) -> None:
        self._format = format
        self._left = dict(options)

    def text(self, name: str, default: str, allowed: Sequence[str] | None = None) -> str:
        """Return the value of `name`, which must be one of `allowed`, if given."""
        value = self._left.pop(name, default)
        if allowed is not None and value not in allowed:
            known = ", ".join(filter(None, allowed))  # an empty word stands for what is not said
            raise OptionError(f"{self._format} option {name}={value} is not known", hint=f"one of {known}")
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return whether `name` is on."""
        words = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}
        value = self._left.pop(name, "on" if default else "off")
        if value not in words:
            raise OptionError(f"{self._format} option {name}={value} is neither on nor off")
        return words[value]

    def size(self, name: str, default: int, *, least: int, most: int, power_of_two: bool = True) -> int:
        """Return a size in bytes between `least` and `most`."""
        text = self._left.pop(name, None)
        value = default if text is None else parse_size(text, f"{self._format} option {name}")
        if not least <= value <= most or (power_of_two and value & (value - 1)):
            shape = "a power of two " if power_of_two else ""
            raise OptionError(
                f"{self._format} option {name}={text} is out of range", hint=f"{shape}from {least} to {most}"
            )
        return value

    def number(self, name: str, default: int, *, least: int, most: int) -> int:
        """Return a whole number between `least` and `most`."""
        text = self._left.pop(name, str(default))
        found = whole_number(text, most)
        if found is None or found < least:
            raise OptionError(f"{self._format} option {name}={text} is out of range", hint=f"from {least} to {most}")
        return found

    def done(self) -> None:
        """Raise OptionError for options that are left over."""
        if self._left:
            raise OptionError(f"{self._format} has no option {', '.join(sorted(self._left))}", hint="see -o help")
