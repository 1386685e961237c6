"""Reading images from a registry: what skopeo pushed, no layer twice, nothing that is damaged."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from clikit import dm
from ocikit import Layout, folder, oci_layout, sha256, tricky_layers
from registrykit import Proxy, Registry, Reply, Request, behind, content, proxy, put, skopeo
from treekit import same, tar_entry, tar_file

from diskmorph.convert.bridge import BuildOptions, extract
from diskmorph.convert.fleet.expand import absolute, is_pattern
from diskmorph.convert.fleet.identity import source_state
from diskmorph.convert.fleet.rows import Row
from diskmorph.formats.docker_registry import BlobCache
from diskmorph.formats.errors import FormatError, IntegrityError, OptionError, SourceError, UnsupportedError

from testkit import data

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def small(word: str = "x") -> bytes:
    return tar_file(folder("etc"), tar_entry("etc/word", word.encode()))


def cached(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "cache/diskmorph/blobs").rglob("*") if path.is_file())


@pytest.mark.parametrize("compress", ["gzip", "zstd", "none"])
def test_what_skopeo_pushed_is_read(tmp_path: Path, image: str, compress: str) -> None:
    layout = oci_layout(tmp_path / "layout", tricky_layers(), compress)
    put(layout, f"{image}:1")
    same(content(layout), content(f"{image}:1"))


def test_the_older_manifests_of_docker_are_read(tmp_path: Path, image: str) -> None:
    layout = oci_layout(tmp_path / "layout", tricky_layers())
    put(layout, f"{image}:1", "--format", "v2s2")
    same(content(layout), content(f"{image}:1"))


def test_without_a_tag_the_latest_is_meant(tmp_path: Path, image: str) -> None:
    put(oci_layout(tmp_path / "layout", [small()]), f"{image}:latest")
    assert content(image)[b"etc/word"]


def test_the_second_reading_fetches_no_layers(tmp_path: Path, registry: Registry, image: str) -> None:
    layout = oci_layout(tmp_path / "layout", tricky_layers())
    put(layout, f"{image}:1")
    registry.seen()
    content(f"{image}:1")
    assert len(registry.blobs_fetched()) == 4  # three layers and the configuration
    same(content(layout), content(f"{image}:1"))
    assert registry.blobs_fetched() == []


def test_by_its_digest_a_known_image_is_read_without_the_registry(
    tmp_path: Path, registry: Registry, image: str
) -> None:
    put(oci_layout(tmp_path / "layout", [small()]), f"{image}:1")
    digest = json.loads(skopeo("inspect", "--tls-verify=false", f"{image}:1"))["Digest"]
    content(f"{image}@{digest}")
    registry.seen()
    content(f"{image}:other@{digest}")  # the digest decides
    assert registry.seen() == []


def test_only_layers_that_are_lacking_are_fetched(tmp_path: Path, registry: Registry, image: str) -> None:
    one, two, three = tricky_layers()
    put(oci_layout(tmp_path / "old", [one, two]), f"{image}:1")
    put(oci_layout(tmp_path / "new", [one, two, three]), f"{image}:2")
    content(f"{image}:1")
    registry.seen()
    content(f"{image}:2")
    assert len(registry.blobs_fetched()) == 2  # a layer and a configuration


def test_the_same_layers_in_another_repository_are_not_fetched(tmp_path: Path, registry: Registry, image: str) -> None:
    layout = oci_layout(tmp_path / "layout", tricky_layers())
    put(layout, f"{image}:1")
    put(layout, f"{image}/elsewhere:2")
    content(f"{image}:1")
    registry.seen()
    same(content(layout), content(f"{image}/elsewhere:2"))
    assert registry.blobs_fetched() == []


def test_a_platform_is_chosen_from_an_index(tmp_path: Path, image: str) -> None:
    layout = Layout()
    inner = []
    for architecture in ("amd64", "arm64", "riscv64"):
        found = layout.image([small(architecture)], architecture=architecture)
        inner.append({**found, "platform": {"os": "linux", "architecture": architecture}})
    media = "application/vnd.oci.image.index.v1+json"
    index = layout.blob({"schemaVersion": 2, "mediaType": media, "manifests": inner})
    layout.add({"mediaType": media, **index}, "latest")
    put(layout.write(tmp_path / "layout"), f"{image}:1", "--all")
    for architecture in ("arm64", "riscv64"):
        found = content(f"{image}:1", platform=f"linux/{architecture}")
        assert found[b"etc/word"]["sha256"] == sha256(architecture.encode())[7:]
    with pytest.raises(OptionError) as raised:
        content(f"{image}:1", platform="linux/s390x")
    assert "--platform takes one of linux/amd64, linux/arm64, linux/riscv64" in str(raised.value)


def test_what_breaks_off_goes_on_from_there(tmp_path: Path, registry: Registry, image: str, home: Path) -> None:
    layer = tar_file(tar_entry("big", data("big", 3 * MIB)))
    put(oci_layout(tmp_path / "layout", [layer], "none"), f"{image}:1")
    with proxy(registry) as server:
        server.cut, server.cuts = MIB, 2
        found = content(behind(server, f"{image}:1"))
        assert server.cuts == 0
        asked = [one.headers.get("Range") for one in server.asked(sha256(layer))]
    assert found[b"big"]["size"] == 3 * MIB
    assert asked == [None, f"bytes={MIB}-", f"bytes={2 * MIB}-"]
    assert sha256(layer)[7:] in cached(home)


def test_what_breaks_off_goes_on_where_ranges_are_unknown(tmp_path: Path, registry: Registry, image: str) -> None:
    layer = tar_file(tar_entry("big", data("big", 2 * MIB)))
    layout = oci_layout(tmp_path / "layout", [layer], "none")
    put(layout, f"{image}:1")
    with proxy(registry) as server:
        server.cut, server.cuts, server.ranges = MIB + 77, 1, False
        same(content(layout), content(behind(server, f"{image}:1")))
        assert server.cuts == 0


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, registry: Registry, image: str) -> None:
    put(oci_layout(tmp_path / "layout", [small()]), f"{image}:1")
    refusals = [503, 429]
    with proxy(registry) as server:
        server.rule = lambda _: Reply(refusals.pop()) if refusals else None
        assert content(behind(server, f"{image}:1"))


@pytest.mark.parametrize("what", ["bit", "short", "long"])
def test_a_damaged_blob_is_refused(tmp_path: Path, registry: Registry, image: str, home: Path, what: str) -> None:
    layer = small("damaged")
    put(oci_layout(tmp_path / "layout", [layer], "none"), f"{image}:1")

    def mend(request: Request, body: bytes) -> bytes:
        if sha256(layer) not in request.path or request.method != "GET":
            return body
        return {"bit": body[:600] + b"\1" + body[601:], "short": body[:-512], "long": body + b"\0"}[what]

    with proxy(registry) as server:
        server.mend = mend
        with pytest.raises(IntegrityError) as raised:
            content(behind(server, f"{image}:1"))
    assert sha256(layer) in str(raised.value)
    assert not {name for name in cached(home) if name == sha256(layer)[7:] or name.startswith(".")}


def test_a_damaged_manifest_is_refused(tmp_path: Path, registry: Registry, image: str) -> None:
    put(oci_layout(tmp_path / "layout", [small()]), f"{image}:1")
    with proxy(registry) as server:
        server.mend = lambda request, body: body + b" " if "/manifests/" in request.path else body
        with pytest.raises(IntegrityError, match="a manifest's digest is wrong"):
            content(behind(server, f"{image}:1"))


def test_what_is_damaged_in_the_cache_is_fetched_again(
    tmp_path: Path, registry: Registry, image: str, home: Path
) -> None:
    layer = small()
    layout = oci_layout(tmp_path / "layout", [layer], "none")
    put(layout, f"{image}:1")
    content(f"{image}:1")
    held = home / "cache/diskmorph/blobs/sha256" / sha256(layer)[7:]
    held.write_bytes(held.read_bytes()[:-1] + b"\1")
    registry.seen()
    same(content(layout), content(f"{image}:1"))
    assert registry.blobs_fetched() == [sha256(layer)]


def test_without_a_cache_nothing_is_kept(
    tmp_path: Path, image: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = oci_layout(tmp_path / "layout", tricky_layers())
    put(layout, f"{image}:1")
    monkeypatch.setenv("DISKMORPH_CACHE", "off")
    same(content(layout), content(f"{image}:1"))
    assert cached(home) == []


def test_the_cache_stays_within_its_bound(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "blobs", 3000)
    names = []
    for number in range(5):
        blob = data(number, 1000)
        names.append(sha256(blob))
        cache.store(names[-1], len(blob), iter((blob,)), "test").close()
    held = [cache.find(name) for name in names]
    assert [one is not None for one in held] == [False, False, True, True, True]
    blob = data("more", 2000)
    cache.store(sha256(blob), len(blob), iter((blob,)), "test").close()  # what is in use is not removed
    for name, one in zip(names[2:], held[2:], strict=True):
        assert one is not None
        one.close()
        again = cache.find(name)
        assert again is not None
        again.close()


def test_what_does_not_fit_into_the_cache_is_read_all_the_same(tmp_path: Path) -> None:
    blob = data("large", 5000)
    with BlobCache(tmp_path / "blobs", 3000).store(sha256(blob), 5000, iter((blob,)), "test") as source:
        assert source.read(0, 5000) == blob
    assert not list((tmp_path / "blobs").rglob("*"))


def served(manifest: object, *, index: bool = False) -> tuple[Proxy, dict[str, bytes]]:
    """A registry that gives one manifest, whatever it is asked for, and of blobs those in the dictionary."""
    server = Proxy()
    blobs: dict[str, bytes] = {}
    media = "application/vnd.oci.image." + ("index" if index else "manifest") + ".v1+json"
    body = json.dumps(manifest).encode()

    def rule(request: Request) -> Reply:
        if "/manifests/" in request.path:
            return Reply(200, {"Content-Type": media}, body)
        name = request.path.rpartition("/")[2]
        return Reply(200, {}, blobs[name]) if name in blobs else Reply(404 if "/blobs/" in request.path else 200)

    server.rule = rule
    return server, blobs


def test_addresses_inside_an_image_are_not_asked() -> None:
    """Descriptors may hold `urls`; what the registry itself does not have is not fetched from there."""
    layer = small()
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [sha256(layer)]}}).encode()
    with proxy() as other:
        other.rule = lambda _: Reply(200, {}, layer)
        found = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": sha256(layer), "size": len(layer)}
        server, blobs = served(
            {
                "schemaVersion": 2,
                "config": {"digest": sha256(config), "size": len(config)},
                "layers": [{**found, "urls": [f"http://{other.host}/layer"]}],
            }
        )
        with server:
            blobs[sha256(config)] = config
            with pytest.raises(SourceError, match="the registry has not got the blob"):
                content(f"docker://{server.host}/x")
            blobs[sha256(layer)] = layer  # it can be read where the registry has it
            assert content(f"docker://{server.host}/x")[b"etc/word"]
        assert other.requests == []


@pytest.mark.parametrize("digest", ["sha256:../../../../precious", "sha256:" + "0" * 63, "md5:" + "0" * 32, "../x:y"])
def test_what_is_no_digest_becomes_no_file_name(home: Path, digest: str) -> None:
    (home / "precious").write_text("kept")
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": 4}
    server, _ = served({"schemaVersion": 2, "config": {"digest": "sha256:" + "0" * 64, "size": 2}, "layers": [layer]})
    with server, pytest.raises((FormatError, UnsupportedError), match="digest"):
        content(f"docker://{server.host}/x")
    assert (home / "precious").read_text() == "kept"
    assert not [one for one in server.asked("/blobs/") if "0000" not in one.path]


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ([], "manifest"),
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
        ({"manifests": [], "layers": []}, "manifest and index at once"),
        ({"mediaType": "application/vnd.cncf.helm", "layers": []}, "holds no image but"),
        ({"config": {"digest": "sha256:" + "0" * 64, "size": 1 << 40}, "layers": []}, "configuration is too large"),
        ({"config": {}, "layers": [{"digest": "sha256:" + "1" * 64, "size": -1}]}, "a size"),
        (
            {
                "config": {"digest": "sha256:" + "0" * 64, "size": 2},
                "layers": [{"digest": "sha256:" + "1" * 64, "size": size} for size in (1, 2)],
            },
            "with two sizes",
        ),
        ({"manifests": []}, "names no image"),
    ],
)
def test_manifests_that_are_none_are_refused(manifest: object, words: str) -> None:
    server, _ = served(manifest)
    with server, pytest.raises((FormatError, UnsupportedError), match=words):
        content(f"docker://{server.host}/x")


def test_a_manifest_without_end_is_refused() -> None:
    server = Proxy()
    server.rule = lambda _: Reply(200, {}, b"[" + b" " * (20 << 20) + b"]")
    with server, pytest.raises(SourceError, match="too long"):
        content(f"docker://{server.host}/x")


def test_what_is_not_there_is_told(registry: Registry, image: str) -> None:
    found = dm("ls", f"{image}:no")
    assert found.status != 0
    assert found.err.count("\n") == 1
    assert f"{image}:no: " in found.err
    assert "MANIFEST_UNKNOWN" in found.err or "NAME_UNKNOWN" in found.err


def test_no_server_is_told() -> None:
    with proxy() as server:
        host = server.host
    found = dm("ls", f"docker://{host}/x")
    assert found.status != 0
    assert "cannot be reached" in found.err


def test_fetching_is_told(tmp_path: Path, registry: Registry, image: str) -> None:
    layer = tar_file(tar_entry("big", data("big", MIB)))
    put(oci_layout(tmp_path / "layout", [layer], "none"), f"{image}:1")
    said = []

    def slowly(request: Request) -> None:
        if sha256(layer) in request.path:
            time.sleep(0.5)

    with proxy(registry) as server:
        server.rule = slowly
        extract(behind(server, f"{image}:1"), tmp_path / "out.tar", on_progress=said.append)
    fetched = [now for now in said if now.phase == "fetch"]
    assert {now.total for now in fetched} == {len(layer)}
    assert fetched[0].done == 0
    assert fetched[-1].done == len(layer)
    said.clear()
    extract(f"{image}:1", tmp_path / "again.tar", on_progress=said.append)
    assert said
    assert [now.done for now in said if now.phase == "fetch"] in ([], [len(layer)])


def test_a_fleet_knows_an_image_by_its_digest(tmp_path: Path, image: str) -> None:
    layout = oci_layout(tmp_path / "layout", [small()])
    put(layout, f"{image}:1")
    digest = json.loads(skopeo("inspect", "--tls-verify=false", f"{image}:1"))["Digest"]
    row = Row(1, "build", f"{image}:1", str(tmp_path / "out.qcow2"), BuildOptions())
    assert source_state(row) == [digest]
    assert absolute(f"{image}:1", tmp_path) == f"{image}:1"
    assert not is_pattern("docker://[::1]:5000/app")


def test_info_fetches_no_layer(image: str, tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", tricky_layers())
    put(layout, image)
    found = dm("info", "--json", image).ok().json
    assert found["format"] == "docker"
    assert [one["created_by"] for one in found["history"]] == ["layer 0", "layer 1", "layer 2"]
    assert found["stored_size"] == sum(one["size"] for one in found["layers"])
    held = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not any(one["digest"].removeprefix("sha256:") in held for one in found["layers"])
