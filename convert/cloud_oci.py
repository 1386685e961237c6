"""KubeVirt's containerDisk: an OCI image FROM scratch whose one layer holds /disk/NAME.qcow2 of uid 107."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diskmorph.convert.cloud_facts import facts_of
from diskmorph.convert.cloud_write import (
    DIRECTORY,
    FileSink,
    GzipSink,
    add_source,
    content_of,
    end_archive,
    require_readable,
    tar_header,
    unnamed,
)
from diskmorph.convert.package_disks import new_folder
from diskmorph.formats.errors import OptionError
from diskmorph.formats.oci import schema as oci
from diskmorph.formats.output import FileTarget
from diskmorph.formats.tar.schema import BLOCK

if TYPE_CHECKING:
    from diskmorph.convert.cloud import Shaping
    from diskmorph.convert.options import ConvertReport
    from diskmorph.formats.output import Member
    from diskmorph.formats.source import ByteSource

_QEMU = 107  # uid and gid of qemu in KubeVirt's launcher
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm"}
_LAYER = oci.OCI_LAYER + "+gzip"


def write_kubevirt(shaping: Shaping) -> ConvertReport:
    """Write `oci:DIR[:TAG]` or `oci-archive:FILE[:TAG]`. Raises OptionError for other targets."""
    kind, _, rest = shaping.target.partition(":")
    name, _, tag = rest.partition(":")
    if kind not in {"oci", "oci-archive"} or not name:
        raise OptionError(
            f"{shaping.target!r} names no container image", hint="write to oci:DIR or oci-archive:FILE, a tag behind it"
        )
    image = _Image(shaping, tag or "latest")
    if shaping.options.dry_run:
        moved, sizes = shaping.write_inner(None)
        return shaping.report(kind, sum(sizes), moved, (image.name,))
    path = Path(name)
    with unnamed(path.parent, path.name) as inner:
        moved, sizes = shaping.write_inner(inner)
        with content_of(inner, sizes) as content:
            stored = image.into_folder(path, content) if kind == "oci" else image.into_archive(path, content)
    return shaping.report(kind, stored, moved, (image.name,))


class _Image:
    """The image being written."""

    def __init__(self, shaping: Shaping, tag: str) -> None:
        stem = shaping.words.get("name") or Path(shaping.plan.source.name).stem
        stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem).strip(".-")
        self.name = f"disk/{stem[:80] or 'disk'}.qcow2"
        self._shaping, self._tag = shaping, tag

    def into_folder(self, path: Path, content: ByteSource) -> int:
        """Write a layout into a new folder; return the bytes of its files."""
        options = self._shaping.options
        with new_folder(path, sync=options.sync) as folder:
            blobs = folder / "blobs/sha256"
            blobs.mkdir(parents=True)
            with FileTarget(blobs, ["layer"], sync=options.sync) as target:
                file, plain = self._layer(target.members[0], 0, content)
                target.commit([file.stored])
            (blobs / "layer").rename(blobs / file.sha256)
            small = self._rest(file, plain)
            for name, data in small.items():
                (folder / name).write_bytes(data)
        return file.stored + sum(map(len, small.values()))

    def into_archive(self, path: Path, content: ByteSource) -> int:
        """Write a layout into one tar file, the layer first; return the file's size."""
        options, mtime = self._shaping.options, self._shaping.mtime
        with FileTarget(path.parent, [path.name], force=options.force, sync=options.sync) as target:
            member = target.members[0]
            file, plain = self._layer(member, BLOCK, content)
            member.write(0, tar_header(f"blobs/sha256/{file.sha256}", file.stored, mtime))
            at = BLOCK + file.stored + -file.stored % BLOCK
            for name, data in self._rest(file, plain).items():
                block = tar_header(name, len(data), mtime) + data + bytes(-len(data) % BLOCK)
                member.write(at, block)
                at += len(block)
            member.write(at, bytes(2 * BLOCK))
            at += 2 * BLOCK
            target.commit([at])
        return at

    def _layer(self, member: Member, base: int, content: ByteSource) -> tuple[FileSink, str]:
        """Write the layer; return where it went, and the digest of its tar."""
        mtime = self._shaping.mtime
        file = FileSink(member, base)
        sink = GzipSink(file)
        sink.write(tar_header("disk/", 0, mtime, mode=0o755, owner=_QEMU, flag=DIRECTORY))
        header = tar_header(self.name, content.size, mtime, mode=0o440, owner=_QEMU)
        add_source(sink, header, content, self._shaping.tell)
        end_archive(sink)
        if self._shaping.options.verify and not base:
            require_readable(member, file.stored, sink.sha256)
        return file, sink.sha256

    def _rest(self, layer: FileSink, plain: str) -> dict[str, bytes]:
        """Return configuration, manifest, index and mark of the layout, by name."""
        facts = facts_of(self._shaping.plan.disk)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._shaping.mtime))
        architecture = self._shaping.words.get("architecture")
        config = _json(
            {
                "created": created,
                "architecture": architecture or _ARCHITECTURES.get(facts.architecture, facts.architecture),
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{plain}"]},
                "history": [{"created": created, "created_by": f"diskmorph: {self.name}"}],
            }
        )
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": oci.OCI_MANIFEST,
                "config": _described(oci.OCI_CONFIG, config),
                "layers": [{"mediaType": _LAYER, "digest": f"sha256:{layer.sha256}", "size": layer.stored}],
            }
        )
        entry = {**_described(oci.OCI_MANIFEST, manifest), "annotations": {oci.REF_NAME: self._tag}}
        index = _json({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [entry]})
        return {
            **{f"blobs/sha256/{hashlib.sha256(data).hexdigest()}": data for data in (config, manifest)},
            "index.json": index,
            "oci-layout": oci.LAYOUT,
        }


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _described(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
