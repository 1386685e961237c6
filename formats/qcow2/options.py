"""What can be asked of a new qcow2 image: the `-o` words, read and judged together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diskmorph.formats.allocator import Option, OptionReader
from diskmorph.formats.errors import OptionError, TargetError
from diskmorph.formats.extents import CODEC_NAMES, DEFLATE, PLAIN, ZSTD
from diskmorph.formats.qcow2 import schema as s

if TYPE_CHECKING:
    from diskmorph.formats.allocator import NewImage

OPTIONS = (
    Option("compat", "0.10|1.1|v2|v3", "1.1", "version 2 (0.10) for very old readers, or 3"),
    Option("cluster_size", "SIZE", "64K", "512 to 2M, a power of two"),
    Option("extended_l2", "on|off", "off", "32 subclusters in each cluster (QEMU 5.2); clusters of 16K and more"),
    Option("refcount_bits", "1|2|4|8|16|32|64", "16", "width of a refcount"),
    Option("compression_type", "zlib|zstd", "zlib", "how compressed clusters are encoded (zstd: QEMU 5.1)"),
    Option(
        "deflate_window",
        "4K|32K",
        "4K",
        "32K: levels 2 to 9 are faster and smaller, for QEMU; strict readers refuse it",
    ),
    Option("lazy_refcounts", "on|off", "off", "let QEMU postpone refcount updates"),
    Option("preallocation", "off|metadata|falloc|full", "off", "give every cluster a place; reserve or write the room"),
    Option("encrypt.format", "luks", "", "encrypt by LUKS (AES-256 in XTS mode); needs a passphrase"),
    Option("encrypt.iter-time", "MILLISECONDS", "2000", "how long a try of the passphrase shall take"),
)
SUBFORMATS = ("v2", "v3")
_WINDOWS = {"4K": 12, "32K": 15}
_COMPAT = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


@dataclass(frozen=True)
class Shape:
    """How a new image is laid out. `codec` is what its clusters are encoded with, PLAIN for not at all."""

    version: int
    cluster: int
    extended: bool
    refcount_bits: int
    zstd: bool
    lazy: bool
    preallocation: str
    codec: int
    window_bits: int = 12
    """Of deflate streams; QEMU's own, which every reader takes, have 12."""
    luks: int = 0
    """Milliseconds that deriving the key shall take, 0: not encrypted."""

    @property
    def entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.extended else 8

    @property
    def grain(self) -> int:
        """Bytes of what has a presence of its own: a cluster or a subcluster."""
        return self.cluster // s.SUBCLUSTERS if self.extended else self.cluster

    @property
    def coverage(self) -> int:
        """Bytes of the disk that one L2 table maps."""
        return self.cluster // self.entry_size * self.cluster

    @property
    def l1_entries_most(self) -> int:
        """Entries of the largest L1 table that QEMU opens."""
        return s.L1_MOST // 8


def read_shape(image: NewImage) -> Shape:
    """Return the shape that the options ask for. Raises OptionError, and TargetError for a disk that is too large."""
    options = OptionReader("qcow2", image.options)
    version = _COMPAT[options.text("compat", "1.1", tuple(_COMPAT))]
    cluster = options.size("cluster_size", 1 << 16, least=1 << s.CLUSTER_BITS[0], most=1 << s.CLUSTER_BITS[1])
    extended = options.flag("extended_l2")
    bits = int(options.text("refcount_bits", "16", tuple(str(1 << order) for order in range(7))))
    compression = options.text("compression_type", "", ("", *s.COMPRESSIONS))
    window = options.text("deflate_window", "4K", tuple(_WINDOWS))
    lazy = options.flag("lazy_refcounts")
    luks = options.text("encrypt.format", "", ("", "luks"))
    wait = options.size("encrypt.iter-time", 2000, least=1, most=60_000, power_of_two=False)
    preallocation = options.text("preallocation", "off", ("off", "metadata", "falloc", "full"))
    _refuse_others(image)
    options.done()
    codec = _codec(image.codec, compression)
    zstd = compression == "zstd" or codec == ZSTD
    if "deflate_window" in image.options and codec != DEFLATE:
        raise OptionError("qcow2 option deflate_window is for deflate alone", hint="add --compress deflate")
    luks_wait = wait if luks else 0
    shape = Shape(version, cluster, extended, bits, zstd, lazy, preallocation, codec, _WINDOWS[window], luks_wait)
    _judge(shape, image)
    return shape


def _refuse_others(image: NewImage) -> None:
    if {"backing_file", "backing_fmt"} & set(image.options):
        raise OptionError("qcow2 option backing_file is not taken", hint="write an overlay with -B BASE")
    if {"data_file", "data_file_raw"} & set(image.options):
        raise OptionError("qcow2 images with a data file are read, but not written", hint="leave data_file out")


def _codec(asked: int | None, compression: str) -> int:
    if asked is None:
        return PLAIN
    if asked not in {DEFLATE, ZSTD}:
        raise OptionError(f"qcow2 cannot be compressed with {CODEC_NAMES[asked]}", hint="deflate or zstd")
    if asked == ZSTD and compression == "zlib":
        raise OptionError("compression with zstd contradicts compression_type=zlib", hint="leave one of them out")
    return ZSTD if compression == "zstd" else asked


def _judge_encryption(shape: Shape, image: NewImage) -> None:
    if shape.codec != PLAIN or shape.preallocation != "off" or shape.version < 3:
        raise OptionError("encrypt.format=luks goes neither with compression nor preallocation nor compat=0.10")
    if image.passphrase is None:
        raise OptionError("encrypt.format=luks needs a passphrase", hint="give it with --target-passphrase-file FILE")
    if image.identity.reproducible:
        raise OptionError("encrypt.format=luks contradicts --reproducible: keys are by chance")


def _judge(shape: Shape, image: NewImage) -> None:
    if shape.luks:
        _judge_encryption(shape, image)
    if shape.version < 3:
        late = {
            "compression_type=zstd": shape.zstd,
            "extended_l2": shape.extended,
            "lazy_refcounts": shape.lazy,
            "refcount_bits": shape.refcount_bits != 16,
        }
        for word, wanted in late.items():
            if wanted:
                raise OptionError(f"qcow2 option {word} is not possible with compat=0.10", hint="use compat=1.1")
    if shape.extended and shape.cluster < s.EXTENDED_LEAST:
        raise OptionError("qcow2 option extended_l2 needs clusters of 16K or more", hint="use a larger cluster_size")
    if shape.preallocation != "off" and image.parent is not None:
        raise OptionError("qcow2 option preallocation is not possible in an overlay", hint="leave it out")
    if shape.preallocation != "off" and shape.codec != PLAIN:
        raise OptionError("qcow2 option preallocation contradicts compression", hint="leave one of them out")
    most = shape.l1_entries_most * shape.coverage
    if image.size > most:
        raise TargetError(
            f"qcow2 with clusters of {shape.cluster} bytes holds at most {most} bytes, the disk has {image.size}",
            file=image.name,
            format="qcow2",
            hint="use a larger cluster_size",
        )
