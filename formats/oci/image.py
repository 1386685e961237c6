"""Opens a container image: finds its manifest, verifies what it names, merges its layers."""

from __future__ import annotations

import os
import platform as machine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diskmorph.formats.errors import FormatError, IntegrityError, OptionError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.oci import schema as s
from diskmorph.formats.oci.archive import (
    ArchiveFiles,
    DirectoryFiles,
    ImageFiles,
    blob_name,
    compare_digest,
    hash_source,
    new_hash,
)
from diskmorph.formats.oci.layers import apply_layer
from diskmorph.formats.policy import Opener
from diskmorph.formats.source import BytesSource
from diskmorph.formats.spool import codec_of, decoded
from diskmorph.formats.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diskmorph.formats.source import ByteSource

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_DEEPEST_INDEX = 8


@dataclass(frozen=True)
class Layer:
    """A layer: the file that holds it, its digest as stored (None where only the content's is known) and decoded."""

    file: str
    digest: str | None
    diff_id: str | None
    media_type: str = ""
    size: int | None = None


@dataclass
class Image:
    """A container image: its configuration as it stands in the image, and its layers, the lowest first.

    `names` are the tags by which it is called, `digest` that of its manifest. Close it, or use it in `with`.
    """

    name: str
    format: str
    files: ImageFiles
    config: dict[str, Any]
    layers: tuple[Layer, ...]
    names: tuple[str, ...] = ()
    digest: str | None = None
    platform: str = ""

    def layer_source(self, layer: Layer) -> ByteSource:
        """Return a layer's archive, decoded, its digests verified. Raises FormatError, IntegrityError."""
        stored = self.files.open(layer.file)
        if layer.size is not None and stored.size != layer.size:
            raise IntegrityError(
                f"the layer {layer.file} has another size than its descriptor says",
                file=self.name,
                expected=layer.size,
                found=stored.size,
            )
        name = f"{self.name}: {layer.file}"
        outer = new_hash(layer.digest) if layer.digest else None
        inner = new_hash(layer.diff_id) if layer.diff_id else None
        if codec_of(stored) is None:
            hash_source(stored, *(one for one in (outer, inner) if one is not None))
            plain = stored
        else:
            plain = decoded(stored, self.files.limits, encoded=outer, content=inner)
        if layer.digest and outer is not None:
            compare_digest(layer.digest, outer, name)
        if layer.diff_id and inner is not None:
            compare_digest(layer.diff_id, inner, name)
        return plain

    def states(self) -> Iterator[Tree]:
        """Yield one tree that grows: as it is after each layer. Closing the tree closes the image."""
        tree = Tree(name=self.name, format=self.format, limits=self.files.limits)
        tree.config = self.config
        tree.sources.append(_Closer(self))
        for number, layer in enumerate(self.layers):
            source = self.layer_source(layer)
            tree.sources.append(source)
            apply_layer(tree, source, number)
            yield tree
        if not self.layers:
            yield tree

    def tree(self) -> Tree:
        """Return the tree of all layers, owner of the image."""
        tree = None
        try:
            for state in self.states():
                tree = state
        except BaseException:
            self.close()
            raise
        assert tree is not None  # noqa: S101 - states() yields at least once
        return tree

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Closer(BytesSource):
    """Closes an image with the tree made of it."""

    def __init__(self, image: Image) -> None:
        super().__init__(b"", image.name)
        self._image = image

    def verify_unchanged(self) -> None:
        """See ByteSource."""
        self._image.files.verify_unchanged()

    def close(self) -> None:
        """See ByteSource."""
        self._image.close()


def open_image(
    path: str | os.PathLike[str],
    *,
    format: str,
    platform: str | None = None,
    limits: Limits | None = None,
    on_fetch: Callable[[int, int], None] | None = None,
) -> Image:
    """Open an image of that format (oci, oci-archive, docker-archive, docker: in a registry).

    A suffix `:NAME` chooses among several in one archive or layout.

    `platform` is `os/architecture[/variant]`; without it an index gives the machine's own. `on_fetch` is told how many
    bytes of a registry's layers are there, of how many. Raises FormatError, IntegrityError, UnsupportedError,
    OptionError.
    """
    limits = limits or Limits()
    if platform is not None and (platform.count("/") not in {1, 2} or not all(platform.split("/"))):
        raise OptionError(f"{platform!r} is no platform", hint="os/architecture or os/architecture/variant")
    name, tag = (os.fspath(path), None) if format == "docker" else _split_tag(os.fspath(path))
    files = _open_files(name, format, limits, on_fetch)
    try:
        if format == "docker-archive" and files.has("manifest.json"):
            return _open_docker(files, tag)
        return _open_layout(files, format, tag, platform)
    except BaseException:
        files.close()
        raise


def _open_files(name: str, format: str, limits: Limits, on_fetch: Callable[[int, int], None] | None) -> ImageFiles:
    if format == "docker":
        from diskmorph.formats.oci.remote import RegistryFiles  # noqa: PLC0415 - what is used is loaded

        return RegistryFiles(name, limits, on_fetch)
    if format == "oci":
        return DirectoryFiles(name, limits)
    return ArchiveFiles(decoded(Opener(limits=limits).user_source(name), limits), limits)


def _split_tag(path: str) -> tuple[str, str | None]:
    """Split `FILE:NAME:TAG` or `DIR:TAG`, where the part before is what exists."""
    parts = path.split(":")
    for count in range(len(parts), 0, -1):
        name = ":".join(parts[:count])
        if name and Path(name).exists():
            return name, ":".join(parts[count:]) or None
    return path, None


def _open_docker(files: ImageFiles, tag: str | None) -> Image:
    listed = files.json("manifest.json")
    if not isinstance(listed, list) or not listed:
        raise FormatError("manifest.json names no image", file=files.name, structure="manifest.json")
    images = [s.Fields(item, files.name, "manifest.json") for item in listed]
    chosen = [one for one in images if tag is None or tag in {*one.texts("RepoTags")}]
    if len(chosen) != 1:
        tags = ", ".join(name for one in images for name in one.texts("RepoTags"))
        raise OptionError(
            f"{files.name} holds {len(images)} images, {len(chosen)} of which are called {tag or 'nothing'}",
            hint=f"add one of these after a colon: {tags}",
        )
    one = chosen[0]
    name = one.text("Config")
    stem = name.removesuffix(".json").rsplit("/", 1)[-1].removeprefix("sha256:")
    digest = f"sha256:{stem}" if len(stem) == 64 and all(c in "0123456789abcdef" for c in stem) else None
    config = s.Fields(files.json(name, digest), files.name, "configuration")
    layers = one.texts("Layers")
    ids = _diff_ids(config, len(layers), files.name)
    return Image(
        name=files.name,
        format="docker-archive",
        files=files,
        config=config.value,
        layers=tuple(Layer(file, None, diff_id) for file, diff_id in zip(layers, ids, strict=True)),
        names=tuple(one.texts("RepoTags")),
        platform=_platform_of(config),
    )


def _diff_ids(config: s.Fields, count: int, file: str) -> list[str | None]:
    found = config.inner("rootfs").texts("diff_ids")
    if len(found) != count:
        raise FormatError(
            "the image's configuration does not match its layers",
            file=file,
            structure="configuration",
            field="rootfs.diff_ids",
            expected=f"{count} layers",
            found=len(found),
        )
    for digest in found:
        blob_name(digest, file)  # refuses what is no digest
    return list(found)


def _platform_of(config: s.Fields) -> str:
    words = (config.text("os", ""), config.text("architecture", ""), config.text("variant", ""))
    return "/".join(word for word in words if word)


def _open_layout(files: ImageFiles, format: str, tag: str | None, platform: str | None) -> Image:
    index = s.Fields(files.json("index.json"), files.name, "index.json")
    listed = [d for d in index.objects("manifests") if d.text("mediaType", s.OCI_MANIFEST) in s.INDEXES | s.MANIFESTS]
    names = [d.inner("annotations").text(s.REF_NAME, "") for d in listed]
    if tag is not None:
        listed = [d for d, name in zip(listed, names, strict=True) if name == tag]
    if not listed:
        what = f"no image called {tag}" if tag else "no image"
        raise FormatError(f"the layout holds {what}", file=files.name, structure="index.json", hint=", ".join(names))
    chosen = _choose(files, listed, platform, depth=0, tagged=tag is not None)
    digest = chosen.text("digest")
    manifest = s.Fields(files.json(blob_name(digest, files.name), digest), files.name, "manifest")
    described = manifest.inner("config")
    kind = described.text("mediaType", s.OCI_CONFIG)
    if kind not in {s.OCI_CONFIG, s.DOCKER_CONFIG}:
        raise UnsupportedError(f"holds no image but {kind}", feature=kind, file=files.name)
    config_digest = described.text("digest")
    config = s.Fields(files.json(blob_name(config_digest, files.name), config_digest), files.name, "configuration")
    if platform is not None and not chosen.value.get("platform"):
        _require_platform(files, config, platform)
    layers = manifest.objects("layers")
    ids = _diff_ids(config, len(layers), files.name)
    found = []
    for layer, diff_id in zip(layers, ids, strict=True):
        media = layer.text("mediaType", s.OCI_LAYER)
        if "encrypted" in media:
            raise UnsupportedError("a layer is encrypted", feature="encrypted layers", file=files.name)
        blob = layer.text("digest")
        found.append(Layer(blob_name(blob, files.name), blob, diff_id, media, layer.number("size")))
    return Image(
        name=files.name,
        format=format,
        files=files,
        config=config.value,
        layers=tuple(found),
        names=tuple(name for name in [chosen.inner("annotations").text(s.REF_NAME, "")] if name),
        digest=digest,
        platform=_platform_of(config),
    )


def _choose(files: ImageFiles, listed: list[s.Fields], platform: str | None, *, depth: int, tagged: bool) -> s.Fields:
    """Return the descriptor of the image's manifest, through nested indexes."""
    if depth > _DEEPEST_INDEX:
        raise FormatError("indexes are nested too deeply", file=files.name, structure="index")
    usable = [d for d in listed if d.inner("platform").text("os", "") != "unknown"]  # attestations
    found = usable[0] if len(usable) == 1 else _of_platform(files, usable, platform, tagged=tagged or depth > 0)
    if found.text("mediaType", s.OCI_MANIFEST) in s.INDEXES:
        digest = found.text("digest")
        index = s.Fields(files.json(blob_name(digest, files.name), digest), files.name, "index")
        return _choose(files, index.objects("manifests"), platform, depth=depth + 1, tagged=tagged)
    if platform is not None and found.value.get("platform") and not _matches(found, platform):
        raise _no_platform(files, usable, platform)
    return found


def _of_platform(files: ImageFiles, listed: list[s.Fields], platform: str | None, *, tagged: bool) -> s.Fields:
    wanted = platform or f"linux/{_ARCHITECTURES.get(machine.machine(), machine.machine())}"
    matching = [d for d in listed if _matches(d, wanted)]
    indexes = [d for d in listed if d.text("mediaType", "") in s.INDEXES]
    if matching:
        found = matching
    elif indexes:
        found = indexes
    elif any(d.value.get("platform") for d in listed):
        raise _no_platform(files, listed, wanted)
    else:
        found = listed
    names = [d.inner("annotations").text(s.REF_NAME, "") for d in found]
    if len(set(names)) > 1 and not tagged:
        raise OptionError(
            f"{files.name} holds several images",
            hint=f"add one of these after a colon: {', '.join(filter(None, names))}",
        )
    if not found:
        raise FormatError("an index names no image", file=files.name, structure="index")
    return found[0]


def _matches(descriptor: s.Fields, wanted: str) -> bool:
    found = descriptor.inner("platform")
    words = wanted.split("/")
    have = [found.text("os", ""), found.text("architecture", ""), found.text("variant", "")]
    return have[: len(words)] == words


def _require_platform(files: ImageFiles, config: s.Fields, wanted: str) -> None:
    """Raise OptionError where the one image there is says itself that it is for another platform."""
    have = _platform_of(config)
    if have and not f"{have}/".startswith(f"{wanted}/"):
        raise OptionError(f"{files.name} holds no image for {wanted}", hint=f"it is for {have}")


def _no_platform(files: ImageFiles, listed: list[s.Fields], wanted: str) -> OptionError:
    fields = ("os", "architecture", "variant")
    have = sorted({"/".join(filter(None, (d.inner("platform").text(f, "") for f in fields))) for d in listed} - {""})
    return OptionError(f"{files.name} holds no image for {wanted}", hint=f"--platform takes one of {', '.join(have)}")
