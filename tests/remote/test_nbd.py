"""NBD both ways: our server is used by qemu and libnbd, our client reads from qemu-nbd and nbdkit."""

import errno
import json
import socket
import threading
from pathlib import Path

import pytest
from nbdservers import nbd_server

import diskmorph
from diskmorph.convert.serve import Server
from diskmorph.formats.disk import checked
from diskmorph.formats.errors import OptionError, SourceError, TargetError, UnsupportedError
from diskmorph.formats.remote.nbd import NbdSource, address
from diskmorph.formats.views import SourceDisk

from testkit import MIB, content, data, little_disk, run, write_image


@pytest.fixture
def served(tmp_path):
    (image,) = write_image("qcow2", little_disk(), tmp_path / "disk.qcow2")
    disk = diskmorph.open_disk(image)
    server = Server(disk, path=tmp_path / "sock")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield server
    server.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert not (tmp_path / "sock").exists()
    disk.close()


def test_qemu_reads_what_is_served(served, tmp_path):
    (tmp_path / "want.raw").write_bytes(content(little_disk()))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "want.raw", served.url)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", served.url, tmp_path / "got.raw")
    assert (tmp_path / "got.raw").read_bytes() == content(little_disk())
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", served.url).stdout)
    assert any(not e["data"] for e in extents)


def test_a_client_too_many_does_not_end_the_server(tmp_path, monkeypatch):
    """Descriptors have run out for a moment."""
    refusals = [errno.EMFILE, errno.ECONNABORTED]
    accept = socket.socket.accept

    def refusing(listener):
        if refusals:
            raise OSError(refusals.pop(), "not now")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", refusing)
    server = Server(little_disk(), path=tmp_path / "sock")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert "export-size" in run("nbdinfo", "--json", server.url).stdout
    finally:
        server.stop()
        thread.join(5)
    assert not refusals


def test_libnbd_reads_what_is_served(served, tmp_path):
    info = json.loads(run("nbdinfo", "--json", served.url).stdout)
    export = info["exports"][0]
    assert export["export-size"] == little_disk().size
    assert export["is_read_only"]
    assert "base:allocation" in json.dumps(export)
    run("nbdcopy", served.url, tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes()[: little_disk().size] == content(little_disk())


def test_writing_is_refused(served):
    assert run("qemu-io", "-f", "raw", "-c", "write 0 512", served.url, ok=False).returncode != 0


def test_our_client_reads_our_server(served):
    with NbdSource(served.url) as source:
        disk = checked(SourceDisk(source))
        assert content(disk) == content(little_disk())
        assert any(not allocated for _, _, allocated in source.runs(0, source.size))


@pytest.mark.parametrize("peer", ["qemu-nbd", "nbdkit"])
def test_our_client_reads_other_servers(tmp_path, peer):
    size = 24 * MIB
    with (tmp_path / "disk.raw").open("wb") as file:
        file.truncate(size)
        for at in (0, 5 * MIB, size - 4096):
            file.seek(at)
            file.write(data(at, 4096))
    sock = tmp_path / "sock"
    words = ["qemu-nbd", "-t", "-r", "-f", "raw", "-k", sock, "-e", "8", tmp_path / "disk.raw"]
    if peer == "nbdkit":
        words = ["nbdkit", "-f", "-r", "-U", sock, "file", tmp_path / "disk.raw"]
    with nbd_server(sock, *words) as url:
        report = diskmorph.convert(url, tmp_path / "out.qcow2", options=diskmorph.ConvertOptions(source_format="raw"))
        assert report.virtual_size == size
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "disk.raw", tmp_path / "out.qcow2")
        with NbdSource(url) as source:
            runs = list(source.runs(0, size))
        assert sum(length for _, length, _ in runs) == size
        assert sum(length for _, length, allocated in runs if allocated) < MIB
        with pytest.raises(SourceError):
            NbdSource(f"nbd+unix:///nosuchexport?socket={sock}" if peer == "qemu-nbd" else "nbd://127.0.0.1:1/")


def test_urls():
    assert address("nbd://host/a%20b") == (("host", 10809), "a b")
    assert address("nbd+unix:///x?socket=/tmp/s") == ("/tmp/s", "x")
    for bad in ("nbd+unix:///x", "nbd:///x", "nbd://[x/", "nbd://host:\u00b2/", "nbd://host:99999/"):
        with pytest.raises(OptionError):
            address(bad)
    with pytest.raises(SourceError, match="cannot be reached"):
        NbdSource("nbd://127.0.0.1:1/")


def test_a_server_that_speaks_something_else_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            peer, _ = listener.accept()
            peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            peer.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(SourceError, match="protocol"):
            NbdSource(f"nbd://127.0.0.1:{listener.getsockname()[1]}/")


# --- exports as targets


def old(path: Path, size: int) -> Path:
    """A file full of what must not show through."""
    path.write_bytes(b"\xa5" * size)
    return path


def test_an_export_of_qemu_nbd_is_written(tmp_path):
    disk = little_disk()
    (image,) = write_image("qcow2", disk, tmp_path / "disk.qcow2")
    tail = 1 * MIB
    target = old(tmp_path / "out.raw", disk.size + tail)
    sock = tmp_path / "sock"
    with nbd_server(sock, "qemu-nbd", "-t", "-f", "raw", "-k", sock, "-e", "8", target) as url:
        report = diskmorph.convert(image, url, options=diskmorph.ConvertOptions(verify=True, digest=True))
        assert report.format == "raw"
        assert report.target == url
        assert report.verified
    got = target.read_bytes()
    assert got[: disk.size] == content(disk)
    assert got[disk.size :] == b"\xa5" * tail  # as `qemu-img convert -n`: what is beyond stays


@pytest.mark.parametrize(
    "words",
    [
        ("memory", "size=10M"),
        ("--filter=nozero", "memory", "size=10M", "zeromode=none"),
        ("--filter=nozero", "--filter=noextents", "split", "FILE"),  # which cannot trim
    ],
)
def test_zeroes_are_zeroes_whatever_the_server_can(tmp_path, words):
    disk = little_disk()
    (image,) = write_image("qcow2", disk, tmp_path / "disk.qcow2")
    sock = tmp_path / "sock"
    filters = [word for word in words if word.startswith("--")]
    file = old(tmp_path / "backing.raw", 10 * MIB)
    rest = [file if word == "FILE" else word for word in words if not word.startswith("--")]
    with nbd_server(sock, "nbdkit", "-f", "-U", sock, *filters, *rest) as url:
        run("qemu-io", "-f", "raw", "-c", "write -P 0xa5 0 10M", url)
        diskmorph.convert(image, url, options=diskmorph.ConvertOptions(verify=True))
        run("nbdcopy", url, tmp_path / "got.raw")
    got = (tmp_path / "got.raw").read_bytes()
    assert got[: disk.size] == content(disk)
    assert got[disk.size :] == b"\xa5" * (10 * MIB - disk.size)


def test_exports_that_cannot_be_written(tmp_path):
    (image,) = write_image("qcow2", little_disk(), tmp_path / "disk.qcow2")
    sock, target = tmp_path / "sock", old(tmp_path / "out.raw", 2 * MIB)
    with nbd_server(sock, "qemu-nbd", "-t", "-f", "raw", "-k", sock, target) as url:
        with pytest.raises(TargetError, match="too small"):
            diskmorph.convert(image, url)
        with pytest.raises(UnsupportedError, match="plain bytes"):
            diskmorph.convert(image, url, options=diskmorph.ConvertOptions(target_format="qcow2"))
        with pytest.raises(OptionError, match="-B"):
            diskmorph.convert(image, url, options=diskmorph.ConvertOptions(base=image))
    assert target.read_bytes() == b"\xa5" * 2 * MIB
    sock.unlink(missing_ok=True)
    big = old(tmp_path / "big.raw", 10 * MIB)
    with (
        nbd_server(sock, "qemu-nbd", "-t", "-r", "-f", "raw", "-k", sock, big) as url,
        pytest.raises(TargetError, match="read-only"),
    ):
        diskmorph.convert(image, url)
    with pytest.raises(TargetError, match="cannot be reached") as caught:
        diskmorph.convert(image, "nbd://127.0.0.1:1/")
    assert "undefined" not in str(caught.value), "nothing was written"


def test_a_server_that_fails_is_told(tmp_path):
    (image,) = write_image("qcow2", little_disk(), tmp_path / "disk.qcow2")
    sock = tmp_path / "sock"
    with (
        nbd_server(
            sock, "nbdkit", "-f", "-U", sock, "--filter=error", "memory", "size=10M", "error-pwrite-rate=100%"
        ) as url,
        pytest.raises(TargetError, match="content is undefined"),
    ):
        diskmorph.convert(image, url)


def test_from_export_to_export(tmp_path):
    (image,) = write_image("qcow2", little_disk(), tmp_path / "disk.qcow2")
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        nbd_server(one, "qemu-nbd", "-t", "-r", "-f", "qcow2", "-k", one, image) as source,
        nbd_server(two, "nbdkit", "-f", "-U", two, "memory", "size=10M") as target,
    ):
        diskmorph.convert(source, target, options=diskmorph.ConvertOptions(source_format="raw"))
        run("nbdcopy", target, tmp_path / "got.raw")
        with pytest.raises(TargetError, match="same as the source"):
            diskmorph.convert(target, target, options=diskmorph.ConvertOptions(source_format="raw"))
    assert (tmp_path / "got.raw").read_bytes()[: little_disk().size] == content(little_disk())
