"""Manifests of EC2 bundles, version 2007-10-10: read as raw slices, since the signature covers their literal bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diskmorph.formats.errors import FormatError, PolicyError
from diskmorph.formats.xmltree import Node, escape, parse_xml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diskmorph.formats.limits import Limits

VERSION = "2007-10-10"
TYPES = ("machine", "kernel", "ramdisk")
FORMAT_OF_TYPE = {"machine": "ami", "kernel": "aki", "ramdisk": "ari"}
PART_SIZE = 10 << 20
_SHA1 = re.compile(r"[0-9a-f]{40}")
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})+")
_ACCOUNT = re.compile(r"[0-9A-Za-z-]{1,64}")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the ciphertext: its number from 0, file name, SHA-1 in lower-case hex."""

    index: int
    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class BundleManifest:
    """What a manifest says. Sizes in bytes; keys, IVs and signature in hex as recorded.

    `digest` is the SHA-1 of the tar archive inside; `signed` are the literal bytes that the signature covers.
    """

    name: str
    user: str
    type: str
    architecture: str
    digest: str
    size: int
    bundled_size: int
    user_key: str
    user_iv: str
    ec2_key: str = ""
    ec2_iv: str = ""
    parts: Sequence[Part] = ()
    kernel_id: str | None = None
    ramdisk_id: str | None = None
    mappings: Mapping[str, str] = field(default_factory=dict)
    bundler: str | None = None
    signature: str = ""
    signed: bytes = b""

    def as_dict(self) -> dict[str, Any]:
        """Return what `info --json` shows under `bundle`; keys are not shown."""
        return {
            "name": self.name,
            "type": self.type,
            "user": self.user,
            "architecture": self.architecture,
            "size": self.size,
            "bundled_size": self.bundled_size,
            "digest": self.digest,
            "kernel_id": self.kernel_id,
            "ramdisk_id": self.ramdisk_id,
            "block_device_mapping": dict(self.mappings),
            "bundler": self.bundler,
            "parts": [{"index": part.index, "file": part.name, "sha1": part.digest} for part in self.parts],
        }


def read_manifest(data: bytes, *, file: str, limits: Limits) -> BundleManifest:
    """Return what a manifest says, nothing verified. Raises FormatError, PolicyError (document types)."""
    return _Reader(data, file, limits).manifest()


class _Reader:
    def __init__(self, data: bytes, file: str, limits: Limits) -> None:
        self._data, self._file, self._limits = data, file, limits
        # The signature covers literal bytes: another encoding, or a prefix, could hide other elements behind them.
        self._root = parse_xml(data, file=file, format="ami", limits=limits, encoding="utf-8")

    def manifest(self) -> BundleManifest:
        """Return everything."""
        if self._root.name != "manifest":
            raise self._fault("is no manifest of a bundle", "manifest", found=f"<{self._root.name}>")
        if any(node.space for node in self._root.walk()):
            raise self._fault("has elements in a namespace, which no manifest has", "manifest")
        version = self._root.value("version")
        if version != VERSION:
            raise self._fault("is of a version that is not known", "version", expected=VERSION, found=version)
        image = self._one(self._root, "image")
        config = self._one(self._root, "machine_configuration")
        name = self._text(image, "name")
        self._flat(name, "name")
        kind = self._text(image, "type")
        if kind not in TYPES:
            raise self._fault("is of a type that is not known", "type", expected=" or ".join(TYPES), found=kind)
        bundler = self._root.find("bundler")
        said = [bundler.value(word) for word in ("name", "version", "release")] if bundler else []
        return BundleManifest(
            name=name,
            user=self._text(image, "user"),
            type=kind,
            architecture=self._text(config, "architecture"),
            digest=self._sha1(image),
            size=self._number(image, "size"),
            bundled_size=self._number(image, "bundled_size"),
            user_key=self._hex(image, "user_encrypted_key"),
            user_iv=self._hex(image, "user_encrypted_iv"),
            ec2_key=self._hex(image, "ec2_encrypted_key"),
            ec2_iv=self._hex(image, "ec2_encrypted_iv"),
            parts=self._parts(self._one(image, "parts")),
            kernel_id=config.value("kernel_id") or image.value("kernel_id"),
            ramdisk_id=config.value("ramdisk_id") or image.value("ramdisk_id"),
            mappings=self._mappings(config),
            bundler=" ".join(word for word in said if word) or None,
            signature=self._signature(),
            signed=self._slice(b"machine_configuration") + self._slice(b"image"),
        )

    def _fault(self, problem: str, field: str, **place: Any) -> FormatError:
        return FormatError(problem, file=self._file, format="ami", structure="manifest", field=field, **place)

    def _one(self, parent: Node, name: str) -> Node:
        found = parent.all(name)
        if len(found) != 1:
            raise self._fault(f"has {'no' if not found else 'more than one'} <{name}>", name)
        return found[0]

    def _text(self, parent: Node, name: str) -> str:
        text = self._one(parent, name).text.strip()
        if not text:
            raise self._fault(f"has an empty <{name}>", name)
        return text

    def _number(self, parent: Node, name: str) -> int:
        text = self._text(parent, name)
        if not (text.isascii() and text.isdigit() and len(text) < 18):
            raise self._fault("has a size that is no number", name, found=text)
        return int(text)

    def _hex(self, parent: Node, name: str) -> str:
        text = self._text(parent, name)
        if not _HEX.fullmatch(text):
            raise self._fault("has a value that is not hexadecimal", name)
        return text

    def _sha1(self, parent: Node) -> str:
        node = self._one(parent, "digest")
        text = node.text.strip().lower()
        if node.attributes.get("algorithm", "SHA1").upper() not in {"SHA1", "SHA-1"} or not _SHA1.fullmatch(text):
            raise self._fault("has a digest that is no SHA-1", "digest", found=text[:50])
        return text

    def _signature(self) -> str:
        """Return the signature; a manifest without one is refused."""
        text = self._root.value("signature")
        if text is None or not _HEX.fullmatch(text):
            raise self._fault("has no signature", "signature")
        return text

    def _parts(self, node: Node) -> tuple[Part, ...]:
        """Return the parts in the order of their numbers, whatever the order of the elements."""
        found = []
        for child in node.all("part"):
            index = child.attributes.get("index", "")
            if not (index.isascii() and index.isdigit() and len(index) < 8):
                raise self._fault("has a part without a number", "part", found=index)
            name = self._text(child, "filename")
            self._flat(name, "filename")
            found.append(Part(int(index), name, self._sha1(child)))
        found.sort(key=lambda part: part.index)
        count = node.attributes.get("count", "")
        if [part.index for part in found] != list(range(len(found))) or count != str(len(found)) or not found:
            raise self._fault(
                "has not as many parts as it says, or not each of them once", "parts", expected=count, found=len(found)
            )
        if len({part.name for part in found}) != len(found):
            raise self._fault("has two parts of one name", "filename")
        return tuple(found)

    def _flat(self, name: str, field: str) -> None:
        if "/" in name or "\\" in name or "\0" in name or name in {"", ".", ".."}:
            raise PolicyError(
                f"names {name!r} as a file of it, which is not a plain name beside it",
                file=self._file,
                format="ami",
                structure="manifest",
                field=field,
                hint="parts lie beside their manifest",
            )

    def _mappings(self, config: Node) -> dict[str, str]:
        block = config.find("block_device_mapping")
        found = {}
        for mapping in block.all("mapping") if block is not None else ():
            virtual, device = mapping.value("virtual"), mapping.value("device")
            if virtual and device:
                found[virtual] = device
        return found

    def _slice(self, name: bytes) -> bytes:
        """Return the literal bytes of an element that occurs once (and, as parsed, is a child of the root)."""
        opening = list(re.finditer(rb"<%s(?=[\s>/])" % name, self._data))
        closing = list(re.finditer(rb"</%s\s*>" % name, self._data))
        if len(opening) != 1 or len(closing) != 1 or closing[0].end() < opening[0].start():
            raise self._fault(f"has not one <{name.decode()}> that could be signed", name.decode())
        return self._data[opening[0].start() : closing[0].end()]


def build_body(manifest: BundleManifest) -> tuple[bytes, bytes]:
    """Return the literal bytes of `machine_configuration` and of `image`, which are signed."""
    config = [_element("architecture", manifest.architecture)]
    if manifest.mappings:
        inside = "".join(
            f"<mapping>{_element('virtual', virtual)}{_element('device', device)}</mapping>"
            for virtual, device in manifest.mappings.items()
        )
        config.append(f"<block_device_mapping>{inside}</block_device_mapping>")
    config += [_element(word, text) for word in ("kernel_id", "ramdisk_id") if (text := getattr(manifest, word))]
    parts = "".join(
        f'<part index="{part.index}">{_element("filename", part.name)}{_digest(part.digest)}</part>'
        for part in manifest.parts
    )
    image = (
        _element("name", manifest.name),
        _element("user", manifest.user),
        _element("type", manifest.type),
        _digest(manifest.digest),
        _element("size", str(manifest.size)),
        _element("bundled_size", str(manifest.bundled_size)),
        f'<ec2_encrypted_key algorithm="AES-128-CBC">{manifest.ec2_key}</ec2_encrypted_key>',
        f'<user_encrypted_key algorithm="AES-128-CBC">{manifest.user_key}</user_encrypted_key>',
        _element("ec2_encrypted_iv", manifest.ec2_iv),
        _element("user_encrypted_iv", manifest.user_iv),
        f'<parts count="{len(manifest.parts)}">{parts}</parts>',
    )
    return (
        f"<machine_configuration>{''.join(config)}</machine_configuration>".encode(),
        f"<image>{''.join(image)}</image>".encode(),
    )


def build_manifest(body: tuple[bytes, bytes], signature: str, bundler: tuple[str, str]) -> bytes:
    """Return a whole manifest round its signed parts; `bundler` is the maker's name and version."""
    maker = f"{_element('name', bundler[0])}{_element('version', bundler[1])}{_element('release', '1')}"
    return b"".join(
        (
            b'<?xml version="1.0" encoding="UTF-8"?>\n',
            f"<manifest>{_element('version', VERSION)}<bundler>{maker}</bundler>".encode(),
            *body,
            f"{_element('signature', signature)}</manifest>\n".encode(),
        )
    )


def _element(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _digest(value: str) -> str:
    return f'<digest algorithm="SHA1">{value}</digest>'
