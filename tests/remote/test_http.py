"""http:// by ranges, against a server that throttles, resets, breaks off and changes its file."""

import hashlib
import random
import re
import socket
import time

import pytest
from clikit import dm
from webservers import Handler, WebServer

import diskmorph
from diskmorph.formats.errors import IntegrityError, SourceError, TargetError
from diskmorph.formats.remote.http import HttpSource

from testkit import MIB, content, data, little_disk, run, write_image


class Server(WebServer):
    """Serves `body`; `faults` are drawn for each request: reset, break, 503, slow."""

    def __init__(self, body: bytes, *, faults: float = 0.0, ranges: bool = True) -> None:
        super().__init__(Serving)
        self.body, self.faults, self.ranges = body, faults, ranges
        self.etag = '"one"'
        self.rng = random.Random(3)
        self.sent = self.requests = 0
        self.pause = 0.0  # seconds between pieces of an answer
        self.total = ""  # what it says of the file's size, where that is not the truth
        self.elsewhere = False  # a cache that answers every range with the first bytes, and says so
        self.most = 1 << 40  # bytes of an answer; fewer than asked for are allowed (RFC 9110, 15.3.7)
        self.busy = ""  # what it says of how long to wait: it has no time at all

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/disk.img"


class Serving(Handler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.requests += 1
        if self.path != "/disk.img":
            self.send_error(404)
            return
        if server.busy:
            self.send_response(503)
            self.send_header("Retry-After", server.busy)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        fault = server.rng.choice(("reset", "break", "503")) if server.rng.random() < server.faults else ""
        if fault == "reset":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not server.ranges:
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.body)))
            self.end_headers()
            return
        first, last = int(asked[1]), min(int(asked[2]), len(server.body) - 1)
        if first > last:  # RFC 9110, 15.5.17
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{server.total or len(server.body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.elsewhere:
            first, last = 0, last - first
        last = min(last, first + server.most - 1)
        piece = server.body[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{server.total or len(server.body)}")
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("ETag", server.etag)
        self.end_headers()
        if fault == "break":
            piece = piece[: len(piece) // 2]
            self.close_connection = True
        server.sent += len(piece)
        for at in range(0, len(piece), 128 << 10):
            time.sleep(server.pause)
            self.wfile.write(piece[at : at + (128 << 10)])


@pytest.fixture
def image(tmp_path) -> bytes:
    (path,) = write_image("qcow2", little_disk(), tmp_path / "disk.qcow2")
    return path.read_bytes()


def test_a_remote_image_is_converted_by_ranges(tmp_path, image):
    with Server(image) as server:
        report = diskmorph.convert(server.url, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == content(little_disk())
        assert report.source == server.url


def test_an_empty_file_is_empty(tmp_path):
    with Server(b"") as server:
        with HttpSource(server.url) as source:
            assert source.size == 0
            source.verify_unchanged()
        (tmp_path / "empty").touch()
        here, there = (dm("info", "--json", name).json for name in (tmp_path / "empty", server.url))
        assert (here["format"], here["virtual_size"]) == (there["format"], there["virtual_size"]) == ("raw", 0)
        server.total = "5"
        with pytest.raises(SourceError, match="416"):
            HttpSource(server.url)


@pytest.mark.parametrize("total", ["*", "-1", "\u00b2", "9" * 5000, str(1 << 63)], ids=lambda text: ascii(text)[:9])
def test_a_size_that_is_none_is_refused(total, image):
    with Server(image) as server:
        server.total = total
        with pytest.raises(SourceError, match="how large"):
            HttpSource(server.url)


def test_a_wait_that_is_no_number_is_an_error(image):
    with Server(image) as server:
        server.busy = "9" * 5000
        with pytest.raises(SourceError, match="cannot be fetched"):
            HttpSource(server.url)


def test_only_what_holds_data_is_fetched(tmp_path):
    size = 512 * MIB
    with (tmp_path / "big.raw").open("wb") as file:
        file.truncate(size)
        file.seek(300 * MIB)
        file.write(data(1, 65536))
    diskmorph.convert(
        tmp_path / "big.raw",
        tmp_path / "big.qcow2",
        options=diskmorph.ConvertOptions(format_options={"preallocation": "metadata"}),
    )
    body = (tmp_path / "big.qcow2").read_bytes()
    with Server(body) as server:
        assert diskmorph.digest(server.url).digest == hashlib.sha256((tmp_path / "big.raw").read_bytes()).hexdigest()


def test_faults_are_lived_through(tmp_path):
    body = data("faults", 12 * MIB + 77)
    with Server(body, faults=0.2) as server:
        report = diskmorph.convert(
            server.url, tmp_path / "out.raw", options=diskmorph.ConvertOptions(source_format="raw")
        )
        assert report.virtual_size == len(body)
        assert (tmp_path / "out.raw").read_bytes() == body


def test_a_throttled_server_that_resets_connections(tmp_path):
    body = data("slow", 6 * MIB)
    with Server(body, faults=0.2) as server:
        server.pause = 0.01
        begun = time.monotonic()
        diskmorph.convert(server.url, tmp_path / "out.raw", options=diskmorph.ConvertOptions(source_format="raw"))
        assert (tmp_path / "out.raw").read_bytes() == body
        assert time.monotonic() - begun > 0.05


def test_what_was_interrupted_goes_on_over_http(tmp_path, monkeypatch):
    from diskmorph.convert import resume

    body = data("resumed", 24 * MIB)
    words = diskmorph.ConvertOptions(source_format="raw", resume=True, threads=1)

    def stop(progress):
        if progress.done > 8 * MIB:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume, "_BYTES", 1)
    with Server(body) as server:
        server.pause = 0.01
        with pytest.raises(KeyboardInterrupt):
            diskmorph.convert(server.url, tmp_path / "out.raw", options=words, on_progress=stop)
        before = server.sent
        server.pause = 0.0
        report = diskmorph.convert(server.url, tmp_path / "out.raw", options=words)
        assert 0 < report.resumed < len(body)
        assert server.sent - before < len(body)
        assert (tmp_path / "out.raw").read_bytes() == body
        with pytest.raises(KeyboardInterrupt):
            server.pause = 0.01
            diskmorph.convert(server.url, tmp_path / "two.raw", options=words, on_progress=stop)
        server.etag = '"two"'
        with pytest.raises(TargetError, match="source"):
            diskmorph.convert(server.url, tmp_path / "two.raw", options=words)


def test_a_changed_file_is_noticed(image):
    with Server(image) as server, HttpSource(server.url) as source:
        source.read(0, 100)
        server.etag = '"two"'
        with pytest.raises(IntegrityError, match="changed"):
            source.verify_unchanged()
        with pytest.raises(IntegrityError, match="changed"):
            source.read(2 * MIB, 100)


def test_what_cannot_be_read_is_one_line(image):
    with Server(image, ranges=False) as server, pytest.raises(SourceError, match="range") as caught:
        HttpSource(server.url)
    assert "\n" not in str(caught.value)
    with Server(image) as server, pytest.raises(SourceError, match="404"):
        HttpSource(server.url.replace("disk.img", "none"))
    with pytest.raises(SourceError, match="cannot be fetched"):
        HttpSource("http://127.0.0.1:1/disk.img")


def test_reading_at_random(image):
    rng = random.Random(1)
    with Server(image, faults=0.05) as server, HttpSource(server.url) as source:
        for _ in range(60):
            at = rng.randrange(len(image))
            length = min(rng.choice((1, 512, 70000, 5 * MIB)), len(image) - at)
            assert source.read(at, length) == image[at : at + length]


def test_another_range_than_was_asked_for_is_no_data(image):
    with Server(image) as server, HttpSource(server.url) as source:
        server.elsewhere = True
        with pytest.raises(SourceError, match="another range"):
            source.read(2 * MIB, 100)


def test_a_server_that_answers_in_small_pieces(image):
    with Server(image) as server, HttpSource(server.url) as source:
        server.most = 50_000
        assert source.read(0, 3 * MIB) == image[: 3 * MIB]
    with Server(image) as server, HttpSource(server.url) as source:
        server.most = 1
        with pytest.raises(SourceError, match="breaks off"):
            source.read(0, MIB)


def test_packages_from_a_server_and_info(tmp_path, image):
    with Server(image) as server:
        assert dm("info", "--json", server.url).ok().json["virtual_size"] == little_disk().size
    (tmp_path / "disk.qcow2").write_bytes(image)
    diskmorph.convert(tmp_path / "disk.qcow2", tmp_path / "vm.ova")
    with Server((tmp_path / "vm.ova").read_bytes()) as server:
        assert dm("info", "--json", server.url).ok().json["machines"][0]["name"] == "vm"
        diskmorph.convert(server.url, tmp_path / "again.ova")
    with Server(image) as server:
        diskmorph.convert(server.url, tmp_path / "disk.ova")


def test_every_verb_that_reads_takes_a_url(tmp_path, image):
    with Server(image) as server:
        assert dm("check", "--json", server.url).ok().json["clean"]
        done = dm("check", "--repair", "all", server.url)
        assert done.status == 2 and "URL" in done.err
        done = dm("rebase", "-b", tmp_path, server.url)
        assert done.status == 1 and "is a URL" in done.err


def test_trees_from_a_server(tmp_path):
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hostname").write_bytes(b"here\n")
    run("tar", "-C", tree, "-cf", tmp_path / "a.tar", "etc")
    run("tar", "-C", tree, "-czf", tmp_path / "a.tar.gz", "etc")
    dm("convert", tree, tmp_path / "a.iso").ok()
    dm("extract", tree, f"oci-archive:{tmp_path / 'o.tar'}").ok()
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, tmp_path / "a.img", "8M")
    formats = {"a.tar": "tar", "a.tar.gz": "tar", "a.iso": "iso", "o.tar": "oci-archive", "a.img": "raw"}
    for name, kind in formats.items():
        with Server((tmp_path / name).read_bytes()) as server:
            assert "hostname" in dm("ls", server.url, "etc").ok().out, name
            with diskmorph.open_tree(server.url) as found:
                assert found.find("etc/hostname").read() == b"here\n", name
            assert dm("info", "--json", server.url).ok().json["format"] == kind, name
