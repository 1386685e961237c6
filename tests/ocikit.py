"""Container images made by hand, for tests."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import zstandard
from treekit import CAPABILITY, EPOCH, tar_entry, tar_file

CONFIG = {"Env": ["PATH=/bin", 'A=it\'s "me"'], "Entrypoint": ["/bin/app", "x y"], "Cmd": ["z"], "User": "5:6"}
LAYER = "application/vnd.oci.image.layer.v1.tar"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def folder(name: str, mode: int = 0o755, **more: Any) -> bytes:
    return tar_entry(name + "/", type=b"5", mode=mode, **more)


def tricky_layers() -> list[bytes]:
    """Layers that use every rule of the layer format."""
    capability = {"SCHILY.xattr.security.capability": CAPABILITY, "SCHILY.xattr.user.x": b"\0\xff"}
    one = [
        folder("etc"),
        tar_entry("etc/keep", b"keep"),
        tar_entry("etc/gone", b"gone"),
        tar_entry("etc/change", b"old" * 999, mode=0o600),
        folder("opaque", 0o700),
        tar_entry("opaque/hidden", b"h"),
        folder("opaque/sub"),
        tar_entry("opaque/sub/deep", b"d"),
        folder("dir-to-file"),
        tar_entry("dir-to-file/x", b"x"),
        tar_entry("file-to-dir", b"f"),
        folder("dir-to-link"),
        tar_entry("dir-to-link/y", b"y"),
        folder("target"),
        tar_entry("hard-a", b"hard" * 2000, uid=5),
        tar_entry("hard-b", type=b"1", link="hard-a"),
        tar_entry("cap", b"\x7fELF", mode=0o755, pax=capability),
        tar_entry("null", type=b"3", mode=0o666, dev=(1, 3)),
        folder("gone-dir"),
        tar_entry("gone-dir/a", b"a"),
        tar_entry("re", b"1"),
        folder("keepmode", 0o1777),
        tar_entry("keepmode/in", b"i"),
        folder("usr/lib"),
        tar_entry("lib", type=b"2", link="usr/lib"),
        tar_entry("moved-from", b"moved"),
    ]
    two = [
        tar_entry("etc/.wh.gone"),
        tar_entry("etc/change", b"new", mode=0o640, gid=7),
        folder("opaque", 0o750),
        tar_entry("opaque/shown", b"s"),
        tar_entry("opaque/.wh..wh..opq"),  # hides what is below, not what came before it in its own layer
        tar_entry("dir-to-file", b"now a file"),
        folder("file-to-dir"),
        tar_entry("file-to-dir/z", b"z"),
        tar_entry("dir-to-link", type=b"2", link="target"),
        tar_entry(".wh.gone-dir"),
        tar_entry("hard-c", type=b"1", link="hard-a"),
        tar_entry(".wh.re"),
        tar_entry(".wh..wh.plnk"),  # aufs's own
        tar_entry("lib/through", b"through a link"),
    ]
    three = [
        tar_entry("re", b"2"),
        tar_entry(".wh.hard-b"),
        tar_entry("implicit/parent/file", b"p"),
        tar_entry("./etc/late", b"l"),
        folder("keepmode", 0o711, mtime=EPOCH + 9),
    ]
    return [tar_file(*entries) for entries in (one, two, three)]


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def packed(layer: bytes, compress: str) -> tuple[bytes, str]:
    if compress == "gzip":
        return gzip.compress(layer, 1, mtime=0), LAYER + "+gzip"
    if compress == "zstd":
        return zstandard.ZstdCompressor().compress(layer), LAYER + "+zstd"
    return layer, LAYER


def config_of(layers: list[bytes], config: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "architecture": "amd64",
        "os": "linux",
        "created": "2023-11-14T22:13:20Z",
        "config": CONFIG if config is None else config,
        "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
        "history": [{"created_by": f"layer {number}"} for number in range(len(layers))],
        **more,
    }


class Layout:
    """An OCI layout being put together; `blobs` by digest."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.entries: list[dict[str, Any]] = []

    def blob(self, content: bytes | dict[str, Any]) -> dict[str, Any]:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        digest = sha256(data)
        self.blobs[digest] = data
        return {"digest": digest, "size": len(data)}

    def image(self, layers: list[bytes], compress: str = "gzip", **config: Any) -> dict[str, Any]:
        described = []
        for layer in layers:
            stored, media = packed(layer, compress)
            described.append({"mediaType": media, **self.blob(stored)})
        body = self.blob(config_of(layers, **config))
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **body},
            "layers": described,
        }
        return {"mediaType": MANIFEST, **self.blob(manifest)}

    def add(self, descriptor: dict[str, Any], ref: str | None = None, **more: Any) -> None:
        found = {**descriptor, **more}
        if ref is not None:
            found["annotations"] = {"org.opencontainers.image.ref.name": ref}
        self.entries.append(found)

    def files(self) -> dict[str, bytes]:
        index = {"schemaVersion": 2, "manifests": self.entries}
        files = {f"blobs/{digest.replace(':', '/')}": data for digest, data in self.blobs.items()}
        return {**files, "index.json": json.dumps(index).encode(), "oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}

    def write(self, path: Path) -> Path:
        for name, content in self.files().items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path

    def write_archive(self, path: Path) -> Path:
        path.write_bytes(tar_file(*(tar_entry(name, content) for name, content in self.files().items())))
        return path


def oci_layout(path: Path, layers: list[bytes], compress: str = "gzip", ref: str = "latest", **config: Any) -> Path:
    layout = Layout()
    layout.add(layout.image(layers, compress, **config), ref)
    return layout.write(path)


def docker_archive(path: Path, layers: list[bytes], tag: str = "tiny:latest", **config: Any) -> Path:
    """What `docker save` wrote before version 25."""
    body = json.dumps(config_of(layers, **config)).encode()
    name = hashlib.sha256(body).hexdigest() + ".json"
    names = [f"{sha256(layer)[7:]}/layer.tar" for layer in layers]
    manifest = json.dumps([{"Config": name, "RepoTags": [tag], "Layers": names}]).encode()
    members = [tar_entry(name, body)]
    for one, layer in zip(names, layers, strict=True):
        members += [folder(one.split("/")[0]), tar_entry(one, layer)]
    path.write_bytes(tar_file(*members, tar_entry("manifest.json", manifest)))
    return path


__all__ = ["CONFIG", "Layout", "docker_archive", "folder", "oci_layout", "sha256", "tricky_layers"]
