"""Glance triples: a root file system (ami), its kernel (aki) and ramdisk (ari), tied by kernel_id and ramdisk_id.

The identifiers are chosen beforehand, so that three `openstack image create --id` tie the images without looking back.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskmorph.formats.allocator import Identity

AMI, AKI, ARI = "ami", "aki", "ari"
LABELS = (AKI, ARI, AMI)
"""Disk and container formats of Glance, in the order in which the images are created."""
MANIFEST = "images.json"


@dataclass(frozen=True, slots=True)
class GlanceImage:
    """One image as `openstack image create` takes it; `file` lies beside the JSON."""

    id: str
    name: str
    disk_format: str
    container_format: str
    file: str
    properties: Mapping[str, str] = field(default_factory=dict)

    def command(self) -> str:
        """Return the command that creates it."""
        words = ["openstack", "image", "create", "--id", self.id]
        words += ["--disk-format", self.disk_format, "--container-format", self.container_format, "--file", self.file]
        for key, value in self.properties.items():
            words += ["--property", f"{key}={value}"]
        return shlex.join([*words, self.name])

    def as_dict(self) -> dict[str, Any]:
        """Return the image's object in the JSON."""
        return {
            "id": self.id,
            "name": self.name,
            "disk_format": self.disk_format,
            "container_format": self.container_format,
            "file": self.file,
            "properties": dict(self.properties),
            "command": self.command(),
        }


def new_triple(
    name: str,
    identity: Identity,
    *,
    kernel: bool,
    ramdisk: bool,
    architecture: str | None = None,
    cmdline: str | None = None,
    properties: Mapping[str, str] | None = None,
) -> tuple[GlanceImage, ...]:
    """Return the images of a triple, the root file system last; without a ramdisk, or a kernel, there are fewer."""
    identifiers = {label: str(identity.uuid(f"glance/{label}")) for label in LABELS}
    shared = {"architecture": architecture} if architecture else {}
    own = dict(properties or {})
    if kernel:
        own["kernel_id"] = identifiers[AKI]
    if ramdisk:
        own["ramdisk_id"] = identifiers[ARI]
    if cmdline:
        own["os_command_line"] = cmdline
    images = [GlanceImage(identifiers[AMI], name, AMI, AMI, AMI, {**shared, **own})]
    if ramdisk:
        images.insert(0, GlanceImage(identifiers[ARI], f"{name}-ramdisk", ARI, ARI, ARI, shared))
    if kernel:
        images.insert(0, GlanceImage(identifiers[AKI], f"{name}-kernel", AKI, AKI, AKI, shared))
    return tuple(images)


def triple_json(images: tuple[GlanceImage, ...]) -> bytes:
    """Return the JSON that describes a triple."""
    return json.dumps({"images": [image.as_dict() for image in images]}, indent=2).encode() + b"\n"


def read_triple(data: bytes, *, file: str) -> tuple[GlanceImage, ...]:
    """Return the images that such JSON describes. Raises FormatError."""
    try:
        said = json.loads(data)["images"]
        images = tuple(
            GlanceImage(
                _word(entry["id"]),
                _word(entry["name"]),
                _word(entry["disk_format"]),
                _word(entry["container_format"]),
                _word(entry["file"]),
                {_word(key): _word(value) for key, value in entry["properties"].items()},
            )
            for entry in said
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError("is no description of a triple", file=file, format="ami", structure=MANIFEST) from error
    for image in images:
        if "/" in image.file or image.file in {"", ".", ".."} or image.disk_format not in LABELS:
            raise FormatError(
                "describes an image that is none of a triple",
                file=file,
                format="ami",
                structure=MANIFEST,
                found=image.file,
            )
    return images


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value
