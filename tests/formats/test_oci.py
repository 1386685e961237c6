"""Container images: layers merged as umoci merges them, digests verified, indexes chosen from, images written."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from ocikit import CONFIG, INDEX, LAYER, Layout, docker_archive, folder, oci_layout, sha256, tricky_layers
from treekit import same, sample_tree, snapshot, tar_entry, tar_file, told, without_acls

from diskmorph.convert.bridge.outputs import LAYER_TAR, parse_output, write_image
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.errors import FormatError, IntegrityError, OptionError, UnsupportedError
from diskmorph.formats.oci import open_image
from diskmorph.formats.oci.schema import Fields
from diskmorph.formats.oci.writer import NewImage, NewLayer, OldLayer, encoded
from diskmorph.formats.tar import tar_disk
from diskmorph.formats.tree import Tree, file_node
from diskmorph.formats.trees import open_tree, tree_format

from testkit import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TRICKY = {
    b"etc/keep": b"keep",
    b"etc/change": b"new",
    b"etc/late": b"l",
    b"re": b"2",
    b"opaque/shown": b"s",
    b"dir-to-file": b"now a file",
    b"file-to-dir/z": b"z",
    b"implicit/parent/file": b"p",
    b"usr/lib/through": b"through a link",
}


def content(tree: Tree, path: bytes) -> bytes:
    node = tree.find(path)
    assert node is not None, path
    return node.read()


# ---------------------------------------------------------------- layers

_FORMS: dict[str, Callable[[Path], Path]] = {
    "gzip": lambda path: oci_layout(path, tricky_layers(), "gzip"),
    "zstd": lambda path: oci_layout(path, tricky_layers(), "zstd"),
    "plain": lambda path: oci_layout(path, tricky_layers(), "none"),
    "docker": lambda path: docker_archive(path, tricky_layers()),
}


@pytest.mark.parametrize("form", _FORMS)
def test_layers_merged_by_every_rule(tmp_path: Path, form: str) -> None:
    path = _FORMS[form](tmp_path / "image")
    assert tree_format(path) == ("docker-archive" if form == "docker" else "oci")
    with open_tree(path) as tree:
        for name, want in TRICKY.items():
            assert content(tree, name) == want
        for name in ("etc/gone", "opaque/hidden", "opaque/sub", "gone-dir", "hard-b"):
            assert tree.find(name) is None, name
        names = [name for name, _ in tree.walk()]
        assert not [name for name in names if b".wh." in name]
        assert tree.find("hard-a") is tree.find("hard-c")
        keep = tree.find("keepmode")
        assert keep is not None
        assert (keep.mode & 0o7777, list(keep.children)) == (0o711, [b"in"])
        assert tree.find("opaque").mode & 0o7777 == 0o750  # type: ignore[union-attr]
        assert tree.config["config"] == CONFIG


def test_layers_as_umoci_unpacks_them(tmp_path: Path) -> None:
    path = oci_layout(tmp_path / "image", tricky_layers())
    run("umoci", "unpack", "--image", f"{path}:latest", tmp_path / "bundle")
    with open_tree(path) as tree:
        same(snapshot(tmp_path / "bundle/rootfs"), told(tree), "mtime")


def test_numbers_of_layers_stand_in_the_nodes(tmp_path: Path) -> None:
    with open_tree(oci_layout(tmp_path / "image", tricky_layers())) as tree:
        layers = {name: node.layer for name, node in tree.walk()}
    assert (layers[b"etc/keep"], layers[b"etc"], layers[b"etc/change"], layers[b"re"]) == (0, 0, 1, 2)


def test_a_name_moved_by_one_layer_keeps_its_content(tmp_path: Path) -> None:
    layers = [tar_file(tar_entry("a", b"x")), tar_file(tar_entry(".wh.a"), tar_entry("b", type=b"1", link="a"))]
    with open_tree(oci_layout(tmp_path / "image", layers)) as tree:
        assert [name for name, _ in tree.walk()] == [b"", b"b"]
        assert content(tree, b"b") == b"x"


@pytest.mark.parametrize("name", [".wh.", ".wh..", "d/.wh...", "../.wh.a"])
def test_odd_whiteouts_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError):
        open_tree(oci_layout(tmp_path / "image", [tar_file(folder("d"), tar_entry(name))]))


def test_states_grow_layer_by_layer(tmp_path: Path) -> None:
    with open_image(oci_layout(tmp_path / "image", tricky_layers()), format="oci") as image:
        seen = [(tree.find("etc/gone") is not None, tree.find("re") is not None) for tree in image.states()]
    assert seen == [(True, True), (False, False), (False, True)]


# ---------------------------------------------------------------- damage


def damaged(tmp_path: Path, change: Callable[[dict[str, bytes], Layout], Any], compress: str = "gzip") -> Path:
    layout = Layout()
    layout.add(layout.image([tar_file(tar_entry("a", b"x" * 2000))], compress))
    files = layout.files()
    change(files, layout)
    for name, data in files.items():
        (tmp_path / "image" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "image" / name).write_bytes(data)
    return tmp_path / "image"


def layer_name(files: dict[str, bytes]) -> str:
    return next(name for name, data in files.items() if data[:2] == b"\x1f\x8b" or data[257:262] == b"ustar")


def other_content(files: dict[str, bytes], _: Layout) -> None:
    data = bytearray(gzip.decompress(files[layer_name(files)]))
    data[600] ^= 1
    files[layer_name(files)] = gzip.compress(bytes(data), 1, mtime=0)


def other_byte(files: dict[str, bytes], _: Layout) -> None:
    data = bytearray(files[layer_name(files)])
    data[600] ^= 1
    files[layer_name(files)] = bytes(data)


def json_of(files: dict[str, bytes], key: str) -> str:
    return next(name for name, data in files.items() if data[:1] == b"{" and key.encode() in data)


def test_damage_is_refused(tmp_path: Path) -> None:
    cases: dict[str, tuple[Callable[[dict[str, bytes], Layout], Any], type[Exception], str]] = {
        "layer": (other_content, IntegrityError, "another size|digest"),
        "missing layer": (lambda f, _: f.pop(layer_name(f)), FormatError, "lacks"),
        "config": (lambda f, _: f.update({json_of(f, "rootfs"): b"{}"}), IntegrityError, "digest"),
        "manifest": (lambda f, _: f.update({json_of(f, "layers"): b"{}"}), IntegrityError, "digest"),
        "index": (lambda f, _: f.update({"index.json": b"[1"}), FormatError, "JSON"),
        "index empty": (lambda f, _: f.update({"index.json": b'{"manifests": []}'}), FormatError, "no image"),
        "index wrong": (lambda f, _: f.update({"index.json": b'{"manifests": [5]}'}), FormatError, "an object"),
        "deep": (lambda f, _: f.update({"index.json": b"[" * 100_000}), FormatError, "JSON"),
        "digest": (
            lambda f, _: f.update({"index.json": b'{"manifests": [{"digest": "../../etc/passwd", "size": 1}]}'}),
            FormatError,
            "no digest",
        ),
        "digest kind": (
            lambda f, _: f.update({"index.json": b'{"manifests": [{"digest": "md5:abcd", "size": 1}]}'}),
            UnsupportedError,
            "unknown kind",
        ),
    }
    for name, (change, kind, words) in cases.items():
        with pytest.raises(kind, match=words):
            open_tree(damaged(tmp_path / name, change))


def test_a_plain_layer_of_another_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="digest is wrong"):
        open_tree(damaged(tmp_path, other_byte, "none"))


def test_a_diff_id_that_does_not_match_is_refused(tmp_path: Path) -> None:
    layer = tar_file(tar_entry("a", b"x"))
    rootfs = {"type": "layers", "diff_ids": [sha256(b"something else")]}
    with pytest.raises(IntegrityError, match="digest is wrong"):
        open_tree(oci_layout(tmp_path / "a", [layer], rootfs=rootfs))
    with pytest.raises(IntegrityError, match="digest is wrong"):
        open_tree(docker_archive(tmp_path / "b", [layer], rootfs=rootfs))
    with pytest.raises(FormatError, match="does not match its layers"):
        open_tree(oci_layout(tmp_path / "c", [layer], rootfs={"type": "layers", "diff_ids": []}))


def test_layers_that_are_no_tar_and_archives_cut(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        open_tree(oci_layout(tmp_path / "a", [b"this is no tar" * 100]))
    whole = docker_archive(tmp_path / "b", [tar_file(tar_entry("a", b"x" * 5000))]).read_bytes()
    for part in (4, 2):
        (tmp_path / "c").write_bytes(whole[: len(whole) * (part - 1) // part])
        with pytest.raises(FormatError):
            open_tree(tmp_path / "c", format="docker-archive")


def test_a_blob_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    path = oci_layout(tmp_path / "image", [tar_file(tar_entry("a", b"x"))])
    blob = next(p for p in (path / "blobs/sha256").iterdir() if p.read_bytes()[:2] == b"\x1f\x8b")
    blob.rename(tmp_path / "outside")
    blob.symlink_to(tmp_path / "outside")
    with pytest.raises(FormatError, match="lacks"):
        open_tree(path)


def test_artifacts_and_encrypted_layers_are_named(tmp_path: Path) -> None:
    layout = Layout()
    body = layout.blob({"x": 1})
    manifest = {"config": {"mediaType": "application/vnd.example.chart", **body}, "layers": []}
    layout.add({"mediaType": "application/vnd.oci.image.manifest.v1+json", **layout.blob(manifest)})
    with pytest.raises(UnsupportedError, match="chart"):
        open_tree(layout.write(tmp_path / "a"))
    layout = Layout()
    image = layout.image([tar_file()])
    manifest = json.loads(layout.blobs[image["digest"]])
    manifest["layers"][0]["mediaType"] = LAYER + "+encrypted"
    layout.add({"mediaType": image["mediaType"], **layout.blob(manifest)})
    with pytest.raises(UnsupportedError, match="encrypted"):
        open_tree(layout.write(tmp_path / "b"))


def test_fields_of_json_are_typed() -> None:
    fields = Fields({"a": 1, "b": [1], "c": True, "d": -1}, "file", "thing")
    for call in (
        lambda: fields.text("a"),
        lambda: fields.texts("b"),
        lambda: fields.number("c"),
        lambda: fields.number("d"),
        lambda: fields.objects("b"),
        lambda: fields.inner("a"),
        lambda: fields.text("none"),
    ):
        with pytest.raises(FormatError, match="JSON is damaged"):
            call()


# ---------------------------------------------------------------- indexes


def platforms(tmp_path: Path, *names: str) -> Path:
    layout = Layout()
    described = []
    for name in names:
        system, architecture, *variant = name.split("/")
        image = layout.image([tar_file(tar_entry("which", name.encode()))], architecture=architecture)
        platform = {"os": system, "architecture": architecture, **({"variant": variant[0]} if variant else {})}
        described.append({**image, "platform": platform})
    attestation = layout.image([tar_file(tar_entry("attestation"))])
    described.append({**attestation, "platform": {"os": "unknown", "architecture": "unknown"}})
    layout.add({"mediaType": INDEX, **layout.blob({"schemaVersion": 2, "manifests": described})}, "latest")
    return layout.write(tmp_path / "image")


@pytest.mark.parametrize("platform", ["linux/arm64/v8", "linux/amd64", "linux/arm/v7", "linux/arm"])
def test_a_platform_is_chosen_from_a_nested_index(tmp_path: Path, platform: str) -> None:
    path = platforms(tmp_path, "linux/amd64", "linux/arm64/v8", "linux/arm/v6", "linux/arm/v7")
    with open_tree(path, platform=platform) as tree:
        assert content(tree, b"which").decode().startswith(platform)


def test_without_a_platform_the_machines_own_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    path = platforms(tmp_path, "linux/amd64", "linux/arm64/v8")
    with open_tree(path) as tree:
        assert content(tree, b"which") == b"linux/arm64/v8"


def test_a_platform_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = platforms(tmp_path, "linux/amd64", "linux/arm64/v8")
    with pytest.raises(OptionError, match="linux/s390x") as caught:
        open_tree(path, platform="linux/s390x")
    assert "linux/arm64/v8" in str(caught.value)
    single = platforms(tmp_path / "one", "linux/amd64")
    with open_tree(single) as tree:
        assert content(tree, b"which") == b"linux/amd64"
    with pytest.raises(OptionError):
        open_tree(single, platform="windows/amd64")


def test_several_names_must_be_chosen_from(tmp_path: Path) -> None:
    layout = Layout()
    for name in ("one", "two"):
        layout.add(layout.image([tar_file(tar_entry("which", name.encode()))]), name)
    path = layout.write(tmp_path / "image")
    with pytest.raises(OptionError, match="several images") as caught:
        open_tree(path)
    assert "one, two" in str(caught.value)
    with open_tree(f"oci:{path}:two") as tree:
        assert content(tree, b"which") == b"two"
    with pytest.raises(FormatError, match="no image called three"):
        open_tree(f"oci:{path}:three")
    archive = layout.write_archive(tmp_path / "image.tar")
    assert tree_format(archive) == "oci-archive"
    with open_tree(f"oci-archive:{archive}:one") as tree:
        assert content(tree, b"which") == b"one"


def test_indexes_that_loop_end(tmp_path: Path) -> None:
    layout = Layout()
    inner = layout.image([tar_file()])
    for _ in range(20):
        inner = {"mediaType": INDEX, **layout.blob({"manifests": [inner]})}
    layout.add(inner)
    with pytest.raises(FormatError, match="nested too deeply"):
        open_tree(layout.write(tmp_path / "image"))


def test_sha512_digests(tmp_path: Path) -> None:
    import hashlib

    layout = Layout()
    image = layout.image([tar_file(tar_entry("a", b"x"))])
    manifest = layout.blobs.pop(image["digest"])
    digest = "sha512:" + hashlib.sha512(manifest).hexdigest()
    layout.blobs[digest] = manifest
    layout.add({**image, "digest": digest})
    with open_tree(layout.write(tmp_path / "image")) as tree:
        assert content(tree, b"a") == b"x"


def test_both_kinds_of_index_in_one_archive(tmp_path: Path) -> None:
    """docker save since version 25: blobs in an OCI layout, and manifest.json beside."""
    layout = Layout()
    layer = tar_file(tar_entry("a", b"x"))
    image = layout.image([layer], "none")
    layout.add(image, "latest")
    manifest = json.loads(layout.blobs[image["digest"]])
    names = [f"blobs/{one['digest'].replace(':', '/')}" for one in (manifest["config"], *manifest["layers"])]
    docker = json.dumps([{"Config": names[0], "RepoTags": ["x:y"], "Layers": names[1:]}]).encode()
    files = {**layout.files(), "manifest.json": docker}
    path = tmp_path / "x.tar"
    path.write_bytes(tar_file(folder("blobs"), *(tar_entry(name, data) for name, data in files.items())))
    assert tree_format(path) == "docker-archive"
    for prefix in ("", "oci-archive:", "docker-archive:"):
        with open_tree(f"{prefix}{path}") as tree:
            assert content(tree, b"a") == b"x"


def test_several_docker_images_must_be_chosen_from(tmp_path: Path) -> None:
    members = []
    listed = []
    for tag in ("a:1", "b:2"):
        archive = docker_archive(tmp_path / "x", [tar_file(tar_entry("which", tag.encode()))], tag).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                data = tar.extractfile(member).read() if member.isfile() else b""  # type: ignore[union-attr]
                if member.name == "manifest.json":
                    listed += json.loads(data)
                elif member.isfile():
                    members.append(tar_entry(member.name, data))
    path = tmp_path / "both.tar"
    path.write_bytes(tar_file(*members, tar_entry("manifest.json", json.dumps(listed).encode())))
    with pytest.raises(OptionError, match="holds 2 images"):
        open_tree(path)
    with open_tree(f"docker-archive:{path}:b:2") as tree:
        assert content(tree, b"which") == b"b:2"


# ---------------------------------------------------------------- writing


def new_image(tree: Tree, **more: Any) -> NewImage:
    config = {"architecture": "amd64", "os": "linux", "config": CONFIG}
    return NewImage(config=config, layers=[NewLayer(tar_disk(tree.walk(ordered=True), LAYER_TAR))], **more)


def write(image: NewImage, target: str) -> None:
    write_image(image, parse_output(target), ConvertOptions(sync=False), tree=Tree(), total=0)


@pytest.mark.parametrize("compress", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
def test_peers_read_what_is_written(tmp_path: Path, kind: str, compress: str) -> None:
    with open_tree(sample_tree(tmp_path / "tree", special=False)) as tree:
        write(new_image(tree, compress=compress), f"{kind}:{tmp_path}/image:app:1")
        expected = without_acls(told(tree))
    source = f"{kind}:{tmp_path}/image" + (":app:1" if kind != "docker-archive" else "")
    config = json.loads(run("skopeo", "inspect", "--config", source).stdout)
    assert config["config"]["Entrypoint"] == CONFIG["Entrypoint"]
    if compress == "zstd":  # which umoci does not know
        run("skopeo", "copy", "-q", "--dest-decompress", source, f"dir:{tmp_path}/plain")
        source = f"dir:{tmp_path}/plain"
    run("skopeo", "copy", "-q", source, f"oci:{tmp_path}/copy:latest")
    run("umoci", "unpack", "--image", f"{tmp_path}/copy:latest", tmp_path / "bundle")
    same(expected, without_acls(snapshot(tmp_path / "bundle/rootfs")), "mtime")
    with open_tree(f"{kind}:{tmp_path}/image") as again:
        same(expected, without_acls(told(again)))


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
def test_the_same_tree_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    written = []
    for name in "ab":
        tree = Tree()
        for number in range(50):
            tree.put(f"d/{number * 7 % 50 if name == 'a' else number}", file_node(b"x"))
        write(new_image(tree), f"{kind}:{tmp_path}/{name}")
        files = sorted((tmp_path / name).rglob("*")) if kind == "oci" else [tmp_path / name]
        base = tmp_path / name
        written.append([(str(p.relative_to(base)), p.read_bytes()) for p in files if p.is_file()])
    assert written[0] == written[1]


def test_old_layers_are_taken_over_as_they_are(tmp_path: Path) -> None:
    layers = tricky_layers()
    with open_image(oci_layout(tmp_path / "base", layers, "zstd"), format="oci") as base:
        old = [OldLayer(base.files.open(one.file), str(one.diff_id), one.media_type) for one in base.layers]
        write(NewImage({"config": {}}, old), f"oci:{tmp_path}/oci")
        write(NewImage({"config": {}, "os": "linux", "architecture": "amd64"}, old), f"docker-archive:{tmp_path}/d.tar")
        with open_image(tmp_path / "oci", format="oci") as again:
            assert [one.digest for one in again.layers] == [one.digest for one in base.layers]
            assert [one.media_type for one in again.layers] == [LAYER + "+zstd"] * 3
    with open_image(tmp_path / "d.tar", format="docker-archive") as again:
        assert [one.diff_id for one in again.layers] == [sha256(layer) for layer in layers]
        assert content(again.tree(), b"re") == b"2"


def test_errors_of_the_thread_that_reads_are_raised() -> None:
    def chunks() -> Any:
        yield b"x" * 100_000
        raise FormatError("broken")

    with pytest.raises(FormatError, match="broken"):
        list(encoded(chunks(), "gzip"))
    with pytest.raises(OptionError):
        list(encoded(chunks(), "lzma"))
    assert gzip.decompress(b"".join(encoded(iter([b"a", b"b"]), "gzip"))) == b"ab"


def test_outputs_by_name() -> None:
    found = {name: parse_output(name) for name in ("a.tar", "a.tar.zst", "a.TGZ", "dir", "dir/", "oci:x:v1")}
    assert [one.kind for one in found.values()] == ["tar", "tar", "tar", "directory", "directory", "oci"]
    assert (str(found["oci:x:v1"].path), found["oci:x:v1"].tag) == ("x", "v1")
    docker = parse_output("docker-archive:x.tar:name:tag")
    assert (str(docker.path), docker.tag) == ("x.tar", "name:tag")
    assert parse_output("x", "tar").kind == "tar"
    with pytest.raises(OptionError):
        parse_output("oci:")
    with pytest.raises(OptionError):
        parse_output("x", "vmdk")
