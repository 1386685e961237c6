"""Writing images into a registry: skopeo reads them, layers that are there are not sent, the tag comes last."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from clikit import dm
from ocikit import CONFIG, folder, oci_layout, sha256, tricky_layers
from registrykit import Registry, Reply, Request, behind, content, get, proxy, put, skopeo
from treekit import same, sample_tree, tar_entry, tar_file

from diskmorph.convert.bridge import BuildOptions, CommitOptions, ExtractOptions, build, commit, extract
from diskmorph.convert.bridge.options import Size
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import IntegrityError, OptionError, SourceError, TargetError

from testkit import data, run

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
QUICK = ConvertOptions(sync=False)


def layout(tmp_path: Path, name: str = "layout", word: bytes = b"x") -> Path:
    return oci_layout(tmp_path / name, [tar_file(folder("etc"), tar_entry("etc/word", word))])


def sent(registry: Registry) -> int:
    """How many blobs and manifests were written since the last look."""
    return len([one for one in registry.seen() if one.method == "PUT" and one.status == 201])


def manifest(image: str) -> dict:
    return json.loads(skopeo("inspect", "--raw", "--tls-verify=false", image))


def test_skopeo_reads_what_was_pushed(tmp_path: Path, image: str) -> None:
    source = oci_layout(tmp_path / "source", tricky_layers())
    report = dm("convert", source, "-O", "docker", f"{image}:1.0", "--json").ok().json
    assert report["target"] == f"{image}:1.0"
    same(content(source), content(get(f"{image}:1.0", tmp_path / "pulled")))
    config = json.loads(skopeo("inspect", "--config", "--tls-verify=false", f"{image}:1.0"))
    assert config["config"] == CONFIG


def test_every_kind_of_file_comes_back(tmp_path: Path, image: str) -> None:
    sample_tree(tmp_path / "tree")
    dm("convert", tmp_path / "tree", f"{image}:1").ok()
    same(content(tmp_path / "tree"), content(get(f"{image}:1", tmp_path / "pulled")), seconds=True)
    same(content(f"{image}:1"), content(tmp_path / "pulled"))


def test_a_disk_is_built_from_a_registry_changed_and_committed_there(
    tmp_path: Path, registry: Registry, image: str
) -> None:
    base = oci_layout(tmp_path / "base", tricky_layers())
    put(base, f"{image}:1")
    disk = tmp_path / "disk.raw"
    build(f"{image}:1", disk, options=BuildOptions(boot=(), size=Size(slack=16 * MIB), convert=QUICK))
    run("debugfs", "-w", "-R", "rm /etc/late", f"{disk}?offset={MIB}")
    registry.seen()
    options = CommitOptions(base=f"{image}:1", message="m", extract=ExtractOptions(convert=QUICK))
    commit(disk, f"{image}:2", options=options)
    assert sent(registry) == 3  # one layer, the configuration, the manifest
    before, after = manifest(f"{image}:1"), manifest(f"{image}:2")
    assert [one["digest"] for one in after["layers"][:-1]] == [one["digest"] for one in before["layers"]]
    expected = content(base)
    del expected[b"etc/late"]
    found = content(get(f"{image}:2", tmp_path / "pulled"))
    assert set(found) == set(expected)
    extract(disk, f"{image}:flat", options=ExtractOptions(convert=QUICK))
    assert set(content(f"{image}:flat")) == set(expected)


def test_into_another_repository_the_base_goes_too(tmp_path: Path, registry: Registry, image: str) -> None:
    base = layout(tmp_path)
    put(base, f"{image}:1")
    registry.seen()
    options = CommitOptions(base=f"{image}:1", extract=ExtractOptions(convert=QUICK))
    report = commit(base, f"{image}/elsewhere:2", options=options)
    assert any("nothing changed" in note for note in report.notes)
    same(content(base), content(get(f"{image}/elsewhere:2", tmp_path / "pulled")))


def test_a_tag_that_exists_is_refused_without_force(tmp_path: Path, registry: Registry, image: str) -> None:
    put(layout(tmp_path, "old", b"old"), f"{image}:1")
    before = manifest(f"{image}:1")
    new = layout(tmp_path, "new", b"new")
    registry.seen()
    refused = dm("convert", new, f"{image}:1")
    assert refused.status != 0
    assert "exists already; replace it with --force" in refused.err
    assert manifest(f"{image}:1") == before
    assert sent(registry) == 0
    dm("convert", new, f"{image}:1", "--force").ok()
    same(content(new), content(get(f"{image}:1", tmp_path / "pulled")))


def test_a_dry_run_sends_nothing(tmp_path: Path, registry: Registry, image: str) -> None:
    registry.seen()
    dm("convert", layout(tmp_path), f"{image}:1", "--dry-run").ok()
    assert [one for one in registry.seen() if one.method != "GET"] == []


def test_an_upload_that_breaks_off_is_made_again(tmp_path: Path, registry: Registry, image: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "big").write_bytes(data("big", 3 * MIB))
    with proxy(registry) as server:
        server.drops = 2
        dm("convert", tree, behind(server, f"{image}:1")).ok()
        assert server.drops == 0
    same(content(tree), content(f"{image}:1"), seconds=True)


def test_a_busy_registry_is_asked_again(tmp_path: Path, registry: Registry, image: str) -> None:
    busy = [503, 500]
    source = layout(tmp_path)
    with proxy(registry) as server:
        server.rule = lambda one: Reply(busy.pop()) if busy and one.method == "PUT" else None
        dm("convert", source, behind(server, f"{image}:1")).ok()
    same(content(source), content(f"{image}:1"))


def test_a_refusal_in_the_middle_leaves_no_tag(tmp_path: Path, registry: Registry, image: str) -> None:
    said = b'{"errors": [{"code": "DENIED", "message": "quota\\u001b[2J exceeded"}]}'
    with proxy(registry) as server:
        server.rule = lambda one: Reply(403, {}, said) if one.method == "PUT" and "/blobs/" in one.path else None
        found = dm("convert", layout(tmp_path), behind(server, f"{image}:1"))
    assert found.status != 0
    assert "DENIED: quota[2J exceeded" in found.err
    with pytest.raises(SourceError, match="has not got such an image"):
        content(f"{image}:1")


def test_another_digest_than_ours_is_an_error(tmp_path: Path, registry: Registry, image: str) -> None:
    with proxy(registry) as server:
        wrong = {"Docker-Content-Digest": sha256(b"other")}
        server.rule = lambda one: Reply(201, wrong) if one.method == "PUT" and "/manifests/" in one.path else None
        with pytest.raises(IntegrityError, match="stored the manifest otherwise"):
            extract(layout(tmp_path), behind(server, f"{image}:1"), options=ExtractOptions(convert=QUICK))


def test_a_digest_is_no_target(tmp_path: Path, image: str) -> None:
    with pytest.raises(OptionError, match="name a tag"):
        extract(layout(tmp_path), f"{image}@{sha256(b'')}", options=ExtractOptions(convert=QUICK))


def test_a_source_that_changes_meanwhile_makes_no_tag(tmp_path: Path, registry: Registry, image: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"one")

    def change(request: Request) -> Reply | None:
        if request.method == "PUT":
            (tree / "file").write_bytes(b"other")
        return None

    with proxy(registry) as server:
        server.rule = change
        with pytest.raises(IntegrityError):
            extract(tree, behind(server, f"{image}:1"), options=ExtractOptions(convert=QUICK))
    with pytest.raises(SourceError, match="has not got such an image"):
        content(f"{image}:1")


def test_where_pushing_is_forbidden(tmp_path: Path, image: str, registry: Registry) -> None:
    with proxy(registry) as server:
        server.rule = lambda one: Reply(405) if one.method == "POST" else None
        with pytest.raises(TargetError, match="the registry answers 405 for an upload"):
            extract(layout(tmp_path), behind(server, f"{image}:1"), options=ExtractOptions(convert=QUICK))
