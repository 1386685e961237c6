"""The variant of an image: the options that write it again, and what of it no option can say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from diskmorph.formats.extents import CODEC_NAMES, DATA, HOLE, PLAIN, ZSTD
from diskmorph.formats.probe import RAW
from diskmorph.formats.registry import load, require_format

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diskmorph.convert.opening import Opened
    from diskmorph.convert.options import ConvertOptions, ConvertReport
    from diskmorph.convert.plan import Plan
    from diskmorph.formats.disk import Disk, ImageInfo

_SPARSE_VMDK = ("monolithicSparse", "twoGbMaxExtentSparse")
_UNIT_WORDS = {"cluster_size", "block_size"}


@dataclass(slots=True)
class Stored:
    """How a disk's bytes are stored, by its own extents: encodings in use, and whether some have no place."""

    codecs: set[int] = field(default_factory=set)
    holes: bool = False
    whole: bool = True
    """Every byte has a place, and is stored as it is."""


def stored(disk: Disk) -> Stored:
    """Look through a disk's extents. Raises what `extents` raises."""
    found = Stored()
    for rows in disk.extents():
        data = rows["kind"] == DATA
        found.codecs.update(np.unique(rows["codec"][data]).tolist())
        found.holes |= bool((rows["kind"] == HOLE).any())
        found.whole &= bool(data.all())
    found.codecs.discard(PLAIN)
    found.whole &= not found.codecs
    return found


@dataclass(slots=True)
class Variant:
    """What writes an image's variant again: `options`; `lost` names what they cannot say."""

    options: ConvertOptions
    lost: list[str]
    stored: Stored


def variant_of(opened: Opened, options: ConvertOptions) -> Variant:
    """Return the options that write an image of the same format and variant; what `options` say goes before.

    Raises OptionError (the format is not written), and what reading the image's tables raises.
    """
    entry = require_format(opened.format)
    own: Disk = opened.layers[0] if opened.layers else opened.disk
    found = Variant(replace(options, target_format=opened.format), [], stored(own))
    if opened.info is None or not entry.writes:
        return found
    known = {option.name: option.values.split("|") for option in load(entry).OPTIONS}
    words = dict(options.format_options)
    for name, value in _words(opened.info, opened.format).items():
        if name in known and (len(known[name]) == 1 or value in known[name]):
            words.setdefault(name, value)
        else:
            found.lost.append(f"{name}={value}, which is read but not written")
    if opened.format == RAW.name and found.stored.holes and _has_all_blocks(opened):
        words.setdefault("preallocation", "falloc")
    if "data_file" in opened.info.features:
        found.lost.append("the data file: the new image holds the data itself")
    found.options = replace(found.options, format_options=words)
    _keep_compression(found, opened.format)
    return found


def _words(info: ImageInfo, format: str) -> Mapping[str, str]:
    """Return the `-o` words that describe an image, those of its parent aside."""
    table = _TABLE.get(format)
    words = {} if table is None else table(info)
    if words.get("subformat") == "differencing":  # the new image is flat
        del words["subformat"]
    return words


def _qcow2(info: ImageInfo) -> dict[str, str]:
    features = info.features
    words = {"compat": str(features["compat"]), "cluster_size": str(features["cluster_size"])}
    if words["compat"] == "0.10":
        return words
    for name in ("extended_l2", "lazy_refcounts"):
        words[name] = _flag(features[name])
    return words | {
        "refcount_bits": str(features["refcount_bits"]),
        "compression_type": str(features["compression"]),
    }


def _vmdk(info: ImageInfo) -> dict[str, str]:
    words = {name: str(info.features[name]) for name in ("adapter_type", "hwversion") if name in info.features}
    if info.subformat is not None:
        words["subformat"] = info.subformat
    if info.subformat in _SPARSE_VMDK:
        words["zeroed_grain"] = _flag(info.features.get("zeroed_grain"))
    return words


def _vhd(info: ImageInfo) -> dict[str, str]:
    words = {"subformat": str(info.subformat)}
    if info.allocation_unit:
        words["block_size"] = str(info.allocation_unit)
    return words


def _vhdx(info: ImageInfo) -> dict[str, str]:
    return {
        "subformat": str(info.subformat),
        "block_size": str(info.allocation_unit),
        "logical_sector_size": str(info.sector_size),
        "physical_sector_size": str(info.features["physical_sector_size"]),
        "log_size": str(info.features["log_size"]),
    }


def _vdi(info: ImageInfo) -> dict[str, str]:
    return {"static": _flag(info.subformat == "static"), "block_size": str(info.allocation_unit)}


_TABLE: Mapping[str, Callable[[ImageInfo], dict[str, str]]] = {
    "qcow2": _qcow2,
    "vmdk": _vmdk,
    "vhd": _vhd,
    "vhdx": _vhdx,
    "vdi": _vdi,
}


def _flag(value: object) -> str:
    return "on" if value else "off"


def _has_all_blocks(opened: Opened) -> bool:
    """Whether the file system keeps room for all of a file, its holes too."""
    paths = [source.path for source in opened.files]
    if len(paths) != 1 or paths[0] is None:
        return False
    status = paths[0].stat()
    return status.st_size > 0 and status.st_blocks * 512 >= status.st_size


def _keep_compression(found: Variant, format: str) -> None:
    """Ask for the codec of compressed clusters, so that they pass through."""
    options, codecs = found.options, found.stored.codecs
    if format != "qcow2" or not codecs or options.compress is not None:
        return
    if "encrypt.format" in options.format_options or options.format_options.get("preallocation", "off") != "off":
        found.lost.append(f"compression ({', '.join(CODEC_NAMES[codec] for codec in sorted(codecs))})")
        return
    found.options = replace(options, compress="zstd" if ZSTD in codecs else "deflate")


def lost_by_plan(opened: Opened, variant: Variant, plan: Plan, asked: Mapping[str, str]) -> list[str]:
    """Return what is lost of a variant, the new image's layout being known; `asked` are the user's own words."""
    lost = list(variant.lost)
    unit = opened.info.allocation_unit if opened.info is not None else None
    said = _UNIT_WORDS & set(plan.options.format_options) or "subformat" in asked
    if unit and unit != plan.allocator.unit and not said:
        lost.append(f"the allocation unit of {unit} bytes becomes {plan.allocator.unit}")
    return lost


def lost_room(variant: Variant, report: ConvertReport, size: int) -> list[str]:
    """Return what is lost where every byte had a place: zeroes are not stored. `size`: the disk's, before."""
    if report.format not in {RAW.name, "qcow2"} or not variant.stored.whole:
        return []
    if report.bytes.skipped <= max(report.virtual_size - size, 0):
        return []
    return ["preallocation: every byte had room in the file, and zeroes have none now"]
