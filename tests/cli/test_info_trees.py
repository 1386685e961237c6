"""`info` of container images, archives and directories, beside what skopeo says of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from clikit import dm
from ocikit import CONFIG, Layout, docker_archive, oci_layout, sha256, tricky_layers
from treekit import tar_entry, tar_file

from testkit import run

LAYERS = tricky_layers()


def info(name: object, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = dm("info", "--json", *words, name).ok().json
    return found


def skopeo(name: str, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("skopeo", "--override-arch", "amd64", "inspect", *words, name).stdout)
    return found


def layout(folder: Path, **config: Any) -> Path:
    return oci_layout(folder / "layout", LAYERS, **config)


def test_a_layout(tmp_path: Path) -> None:
    here = layout(tmp_path)
    for name in (here, f"oci:{here}", f"oci:{here}:latest"):
        found = info(name)
        seen = skopeo(f"oci:{here}:latest")
        assert (found["format"], found["names"], found["platform"]) == ("oci", ["latest"], "linux/amd64")
        assert found["digest"] == seen["Digest"]
        assert [one["digest"] for one in found["layers"]] == seen["Layers"]
        raw = skopeo(f"oci:{here}:latest", "--raw")["layers"]
        assert [one["size"] for one in found["layers"]] == [one["size"] for one in raw]
        assert [one["media_type"] for one in found["layers"]] == [one["mediaType"] for one in raw]
        assert [one["diff_id"] for one in found["layers"]] == [sha256(layer) for layer in LAYERS]
        assert found["config"] == CONFIG
        assert found["created"] == seen["Created"]
        assert found["stored_size"] == sum(one["size"] for one in found["layers"])
        assert [step["created_by"] for step in found["history"]] == ["layer 0", "layer 1", "layer 2"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_docker_archive(packed: bool, tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "d.tar", LAYERS)
    if packed:
        archive = tmp_path / "d.tar.gz"
        archive.write_bytes(gzip.compress((tmp_path / "d.tar").read_bytes()))
    for name in (archive, f"docker-archive:{archive}", f"docker-archive:{archive}:tiny:latest"):
        found = info(name)
        assert (found["format"], found["names"], found["digest"]) == ("docker-archive", ["tiny:latest"], None)
        assert [one["diff_id"] for one in found["layers"]] == [sha256(layer) for layer in LAYERS]
        assert [one["size"] for one in found["layers"]] == [len(layer) for layer in LAYERS]
        assert found["config"] == CONFIG
        assert found["stored_size"] == archive.stat().st_size


def test_an_oci_archive_and_its_platforms(tmp_path: Path) -> None:
    made = Layout()
    for arch in ("amd64", "arm64"):
        one = made.image([LAYERS[0]], architecture=arch)
        made.add(one, platform={"os": "linux", "architecture": arch})
    archive = made.write_archive(tmp_path / "two.tar")
    assert info(archive, "--platform", "linux/arm64")["platform"] == "linux/arm64"
    assert info(archive, "--platform", "linux/amd64")["platform"] == "linux/amd64"
    done = dm("info", archive, "--platform", "linux/s390x")
    assert done.status == 2 and "linux/arm64" in done.err


def test_people_see_layers_and_what_runs(tmp_path: Path) -> None:
    labels = {**CONFIG, "Labels": {"org.example": "a\nb\x1b[31m"}, "ExposedPorts": {"80/tcp": {}}}
    text = dm("info", layout(tmp_path, config=labels)).ok().out
    for word in (
        "layers (3, the lowest first)",
        "layer 2",
        '["/bin/app", "x y"]',
        "PATH=/bin",
        "80/tcp",
        "linux/amd64",
    ):
        assert word in text
    assert "\x1b" not in text
    assert "org.example=a b" in text
    assert "history:" in dm("info", "-v", tmp_path / "layout").ok().out


def test_an_archive_and_a_directory(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/a").write_bytes(b"12345")
    (tree / "etc/b").symlink_to("a")
    run("tar", "-C", tree, "-czf", tmp_path / "a.tar.gz", ".")
    want = {"files": 1, "directories": 1, "links": 1, "others": 0}
    for name, kind in ((tree, "directory"), (tmp_path / "a.tar.gz", "tar")):
        found = info(name)
        assert (found["format"], found["entries"], found["content_size"]) == (kind, want, 5)
    assert "files 1, directories 1, links 1" in dm("info", tree).ok().out


@pytest.mark.parametrize(
    "bent",
    [{"history": "no list"}, {"history": [7]}, {"history": [{"created_by": 7}]}, {"created": []}, {"config": []}],
)
def test_damaged_configurations_are_told(bent: dict[str, Any], tmp_path: Path) -> None:
    done = dm("info", layout(tmp_path, **bent))
    if bent == {"config": []}:  # docker writes null for none, and others an empty list
        done.ok()
        return
    assert done.status == 1 and "configuration" in done.err and "damaged" in done.err


def test_a_layer_that_is_not_there_is_told(tmp_path: Path) -> None:
    done = dm("info", docker_archive(tmp_path / "d.tar", LAYERS))
    done.ok()
    whole = (tmp_path / "d.tar").read_bytes()
    (tmp_path / "d.tar").write_bytes(whole.replace(b'/layer.tar"', b'/other.tar"', 1))
    assert dm("info", tmp_path / "d.tar").status == 1


@pytest.mark.parametrize("field", ["Config", "Layers"])
def test_names_that_no_file_can_have_are_told(field: str, tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "d.tar", LAYERS)
    manifest = {"Config": "a" * 64 + ".json", "RepoTags": ["a"], "Layers": ["l.tar"]}
    manifest[field] = "\ud800" if field == "Config" else ["\ud800"]
    members = [tar_entry("manifest.json", json.dumps([manifest]).encode())]
    archive.write_bytes(tar_file(*members, tar_entry("a" * 64 + ".json", b"{}")))
    for verb in ("info", "ls"):
        done = dm(verb, archive)
        assert done.status == 1 and "fault" not in done.err


def test_what_an_image_says_stays_on_its_line(tmp_path: Path) -> None:
    made = Layout()
    made.add(made.image(LAYERS, architecture="amd64\nstored size:  0 bytes"), "x\nformat:  raw")
    text = dm("info", made.write(tmp_path / "bent")).ok().out
    assert sum(line.startswith(("format:", "stored size:")) for line in text.splitlines()) == 2


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(word: str, tmp_path: Path) -> None:
    made = Layout()
    found = made.image(LAYERS, config={"Labels": {"a": "@"}})
    made.add(found)
    (tmp_path / "blobs").mkdir()
    for digest, content in list(made.blobs.items()):
        if b'"@"' in content:
            made.blobs[digest] = content.replace(b'"@"', word.encode())
    done = dm("info", "--json", made.write(tmp_path / "bent"))
    assert done.status == 1
    assert "NaN" not in done.out and "Infinity" not in done.out


def test_the_format_that_is_said_decides(tmp_path: Path) -> None:
    assert dm("info", "-f", "bogus", tmp_path).status != 0
    assert "directory" in dm("info", "-f", "qcow2", tmp_path).err
    assert info(tmp_path, "-f", "directory")["format"] == "directory"


@pytest.mark.parametrize("platform", ["linux/arm64", "linux", "", "/", "linux//v8", "a/b/c/d"])
def test_another_platform_than_the_one_image_is_for(platform: str, tmp_path: Path) -> None:
    done = dm("info", layout(tmp_path), "--platform", platform)
    assert done.status == 2 and ("no image for" in done.err or "no platform" in done.err)
