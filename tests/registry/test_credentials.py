"""Who is told the user's credentials: the registry that they are for, the token server it names, nobody else."""

from __future__ import annotations

import base64
import json
import os
import ssl
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest
from clikit import dm
from ocikit import folder, oci_layout, sha256
from registrykit import (
    PASSWORD,
    USER,
    Proxy,
    Registry,
    Reply,
    Request,
    behind,
    content,
    get,
    helper,
    login,
    proxy,
    put,
)
from treekit import same, tar_entry, tar_file
from webservers import server_side

from diskmorph.formats.docker_registry.transport import Transport
from diskmorph.formats.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYERS = [tar_file(folder("etc"), tar_entry("etc/word", b"secret"))]
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that asks for user and password."""
    found = Registry(tmp_path_factory.mktemp("registry") / "guarded", password=True)
    yield found
    found.stop()


@pytest.fixture
def closed(guarded: Registry, tmp_path: Path) -> str:
    """An image there, pushed by skopeo; nobody is logged in."""
    name = f"docker://{guarded.host}/closed:1"
    put(oci_layout(tmp_path / "layout", LAYERS), name, "--dest-creds", f"{USER}:{PASSWORD}")
    return name


@pytest.fixture
def open_image(registry: Registry, tmp_path: Path) -> str:
    """An image that needs no credentials."""
    name = f"docker://{registry.host}/open:1"
    put(oci_layout(tmp_path / "layout", LAYERS), name)
    return name


def host_of(image: str) -> str:
    return image.split("/")[2]


def test_credentials_of_docker_login_are_used(closed: str, home: Path) -> None:
    login(home / "docker", host_of(closed))
    same(content(home / "layout"), content(closed))
    dm("convert", home / "layout", f"{closed}-pushed").ok()
    pulled = get(f"{closed}-pushed", home / "pulled", "--src-creds", f"{USER}:{PASSWORD}")
    same(content(home / "layout"), content(pulled))


def test_without_credentials_the_user_is_told_what_to_do(closed: str, home: Path) -> None:
    for words in (("ls", closed), ("convert", home / "layout", f"{closed}x")):
        found = dm(*words)
        assert found.status != 0
        assert "refuses access" in found.err
        assert f"docker login {host_of(closed)}" in found.err


def test_wrong_credentials_are_told_and_not_shown(closed: str, home: Path) -> None:
    login(home / "docker", host_of(closed), password="very wrong")
    found = dm("ls", closed, "-vv")
    assert found.status != 0
    assert "do not suffice" in found.err
    assert "very wrong" not in found.err
    assert base64.b64encode(f"{USER}:very wrong".encode()).decode() not in found.err


def test_credentials_of_another_host_are_not_used(closed: str, home: Path) -> None:
    login(home / "docker", "localhost:1")
    assert "docker login" in dm("ls", closed).err


def test_credentials_in_a_name_are_refused_and_not_shown() -> None:
    found = dm("ls", "docker://me:hidden@registry.example/app")
    assert found.status != 0
    assert "hidden" not in found.err
    assert "docker login" in found.err


@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
def test_a_credential_helper_is_asked(closed: str, home: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    host = host_of(closed)
    answer = json.dumps({"ServerURL": host, "Username": USER, "Secret": PASSWORD})
    helper(home / "bin", "vault", f"[ $1 = get ] && [ $(cat) = {host} ] && echo '{answer}'")
    monkeypatch.setenv("PATH", f"{home}/bin:{os.environ['PATH']}")
    (home / "docker").mkdir()
    (home / "docker/config.json").write_text(json.dumps({key: {host: "vault"} if key == "credHelpers" else "vault"}))
    assert content(closed)[b"etc/word"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'the vault is locked' >&2; exit 1", "the vault is locked"),
        ("echo no", "answers what is no credential"),
        (None, "cannot be run"),
    ],
)
def test_a_helper_that_fails_is_told(
    closed: str, home: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, words: str
) -> None:
    if script is not None:
        helper(home / "bin", "vault", script)
    monkeypatch.setenv("PATH", f"{home}/bin:{os.environ['PATH']}")
    (home / "docker").mkdir()
    (home / "docker/config.json").write_text(json.dumps({"credsStore": "vault"}))
    assert words in dm("ls", closed).err


def test_a_helper_is_a_program_of_its_name_alone(closed: str, home: Path) -> None:
    helper(home / "bin", "x", f"touch {home}/run")
    (home / "docker").mkdir()
    (home / "docker/config.json").write_text(json.dumps({"credsStore": "../bin/docker-credential-x"}))
    assert "is no name of a credential helper" in dm("ls", closed).err
    assert not (home / "run").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": {"HOST": {"auth": "%%%"}}}'])
def test_a_damaged_configuration_is_told(closed: str, home: Path, text: str) -> None:
    (home / "docker").mkdir()
    (home / "docker/config.json").write_text(text.replace("HOST", host_of(closed)))
    found = dm("ls", closed)
    assert found.status != 0
    assert str(home / "docker/config.json") in found.err


# ------------------------------------------------------------ bearer tokens


class TokenServer:
    """Gives tokens to those who say who they are; the registry behind `proxy` lets in who has a fresh one."""

    def __init__(self, gate: Proxy, *, anonymous: bool = False) -> None:
        self.gate, self.anonymous = gate, anonymous
        self.realm = f"http://{gate.host}/token?account=1"
        self.valid: dict[str, int] = {}
        self.uses = 1000
        self.asked: list[dict[str, list[str]]] = []
        self.secrets: list[str | None] = []
        gate.rule = self.rule

    def rule(self, request: Request) -> Reply | None:
        if request.path.startswith("/token"):
            return self._give(request)
        token = (request.secret or "").removeprefix("Bearer ")
        if self.valid.get(token, 0) > 0:
            self.valid[token] -= 1
            return None
        challenge = f'Bearer realm="{self.realm}",service="the \\"service\\"",scope="repository:other:pull"'
        return Reply(401, {"WWW-Authenticate": challenge}, b"{}")

    def _give(self, request: Request) -> Reply:
        words = parse_qs(urlsplit(request.path).query if request.method == "GET" else request.headers["body"])
        self.asked.append(words)
        self.secrets.append(request.secret)
        known = request.secret == BASIC or words.get("refresh_token") == ["identity"]
        if not known and not self.anonymous:
            return Reply(401)
        token = f"token-{len(self.asked)}"
        self.valid[token] = self.uses
        name = "access_token" if request.method == "POST" else "token"
        return Reply(200, {}, json.dumps({name: token, "expires_in": 60}).encode())


def test_a_token_server_gets_the_credentials_the_registry_the_token(
    registry: Registry, open_image: str, home: Path
) -> None:
    with proxy(registry) as gate:
        server = TokenServer(gate)
        login(home / "docker", gate.host)
        same(content(home / "layout"), content(behind(gate, open_image)))
        assert server.secrets == [BASIC]
        (asked,) = server.asked
        assert asked == {"account": ["1"], "scope": ["repository:open:pull"], "service": ['the "service"']}
        told = {one.secret for one in gate.requests if not one.path.startswith("/token")}
        assert told == {None, "Bearer token-1"}


def test_a_token_is_asked_for_pushing(registry: Registry, open_image: str, home: Path) -> None:
    with proxy(registry) as gate:
        server = TokenServer(gate)
        login(home / "docker", gate.host)
        dm("convert", home / "layout", behind(gate, f"{open_image}-token")).ok()
        assert server.asked[0]["scope"] == ["repository:open:pull,push"]
    same(content(home / "layout"), content(f"{open_image}-token"))


def test_a_token_that_expires_is_renewed(registry: Registry, open_image: str, home: Path) -> None:
    with proxy(registry) as gate:
        server = TokenServer(gate)
        server.uses = 1
        login(home / "docker", gate.host)
        same(content(home / "layout"), content(behind(gate, open_image)))
        assert len(server.asked) == 3  # for the manifest, the configuration and the layer


def test_an_anonymous_token(registry: Registry, open_image: str) -> None:
    with proxy(registry) as gate:
        server = TokenServer(gate, anonymous=True)
        assert content(behind(gate, open_image))
        assert server.secrets == [None]


def test_an_identity_token_is_exchanged(registry: Registry, open_image: str, home: Path) -> None:
    with proxy(registry) as gate:
        server = TokenServer(gate)
        (home / "docker").mkdir()
        (home / "docker/config.json").write_text(json.dumps({"auths": {gate.host: {"identitytoken": "identity"}}}))
        assert content(behind(gate, open_image))
        assert server.asked[0]["grant_type"] == ["refresh_token"]
        assert server.secrets == [None]


def test_a_refused_user_is_told(registry: Registry, open_image: str, home: Path) -> None:
    with proxy(registry) as gate:
        TokenServer(gate)
        login(home / "docker", gate.host, password="wrong")
        found = dm("ls", behind(gate, open_image))
        assert "refuses access" in found.err
        assert "do not suffice" in found.err


@pytest.mark.parametrize(
    "realm", ["http://tokens.example/", "http://127.0.0.1:9/", "ftp://localhost/", "", "http://me:x@localhost/"]
)
def test_an_open_token_server_elsewhere_is_told_nothing(
    registry: Registry, open_image: str, home: Path, realm: str
) -> None:
    with proxy(registry) as gate:
        TokenServer(gate).realm = realm
        login(home / "docker", gate.host)
        with pytest.raises(SourceError, match=r"token server without encryption|address that is not taken"):
            content(behind(gate, open_image))


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"token": "a\\r\\nX-Injected: 1"}', b'{"token": 1}'])
def test_what_is_no_token_is_refused(registry: Registry, open_image: str, answer: bytes) -> None:
    with proxy(registry) as gate:
        server = TokenServer(gate)
        inner = server.rule
        gate.rule = lambda one: Reply(200, {}, answer) if one.path.startswith("/token") else inner(one)
        with pytest.raises(SourceError, match="gives no token"):
            content(behind(gate, open_image))


# ------------------------------------------------------------ redirects, encryption


def test_another_host_gets_no_credentials(guarded: Registry, closed: str, home: Path) -> None:
    """Blobs are often kept elsewhere; what that place asks for is not answered either."""
    layer = next((home / "layout/blobs/sha256").glob(sha256(_gzipped(home))[7:])).read_bytes()
    with proxy(guarded) as gate, proxy() as store:
        login(home / "docker", gate.host)
        store.rule = lambda _: Reply(200, {}, layer)
        where = {"Location": f"http://{store.host}/blob?signature=1"}
        gate.rule = lambda one: Reply(307, where) if sha256(layer) in one.path else None
        assert content(behind(gate, closed))[b"etc/word"]
        assert {one.secret for one in store.requests} == {None}
        assert len(store.requests) == 1
        assert {one.secret for one in gate.asked("/blobs/")} == {BASIC}


def test_a_place_that_asks_for_credentials_gets_none(guarded: Registry, closed: str, home: Path) -> None:
    with proxy(guarded) as gate, proxy() as store:
        login(home / "docker", gate.host)
        store.rule = lambda _: Reply(401, {"WWW-Authenticate": 'Basic realm="give"'})
        where = {"Location": f"http://{store.host}/blob"}
        gate.rule = lambda one: Reply(307, where) if "/blobs/" in one.path else None
        with pytest.raises(SourceError, match="refuses access"):
            content(behind(gate, closed))
        assert {one.secret for one in store.requests} == {None}


def test_an_upload_elsewhere_gets_no_credentials(guarded: Registry, home: Path) -> None:
    layout = oci_layout(home / "layout", LAYERS)
    with proxy(guarded) as gate, proxy() as store:
        login(home / "docker", gate.host)
        store.rule = lambda _: Reply(201)
        where = {"Location": f"http://{store.host}/put?signature=1"}
        gate.rule = lambda one: Reply(202, where) if one.method == "POST" else None
        dm("convert", layout, f"docker://{gate.host}/elsewhere")
        assert store.requests
        assert {one.secret for one in store.requests} == {None}


@pytest.mark.parametrize(
    "where", ["http://registry.example/", "file:///etc/passwd", "http://localhost:0/", "//[", "x" * 20000]
)
def test_where_nobody_is_sent(registry: Registry, open_image: str, where: str) -> None:
    with proxy(registry) as gate:
        gate.rule = lambda one: Reply(307, {"Location": where}) if "/blobs/" in one.path else None
        with pytest.raises(
            SourceError, match=r"without encryption|not taken|has not got the blob|cannot be reached|answers"
        ):
            content(behind(gate, open_image))


def test_redirects_that_go_on_for_ever_are_left(registry: Registry, open_image: str) -> None:
    with proxy(registry) as gate:
        gate.rule = lambda one: Reply(307, {"Location": one.path}) if "/blobs/" in one.path else None
        with pytest.raises(SourceError, match="redirects too often"):
            content(behind(gate, open_image))


@pytest.mark.parametrize("host", ["registry.example", "10.0.0.1:5000", "localhost.example", "127.0.0.1.example"])
def test_plain_http_to_other_hosts_is_refused(host: str) -> None:
    transport = Transport(plain=False)
    with pytest.raises(SourceError, match=r"without encryption, which is refused.*docker\+http:// allows it"):
        transport.request("GET", f"http://{host}/v2/", {})
    transport.close()


def test_plain_http_where_the_user_says_so(registry: Registry, open_image: str) -> None:
    assert content(open_image.replace("docker://", "docker+http://"))


@pytest.fixture
def tls(home: Path) -> ssl.SSLContext:
    """A server's side with a certificate of its own."""
    return server_side(home, "localhost")


def test_https(registry: Registry, open_image: str, home: Path, tls, monkeypatch) -> None:
    with proxy(registry, tls) as gate:
        with pytest.raises(SourceError, match="its certificate is refused"):
            content(behind(gate, open_image))
        monkeypatch.setenv("SSL_CERT_FILE", str(home / "certificate"))
        assert content(behind(gate, open_image))


def test_from_https_nothing_goes_on_without(registry: Registry, open_image: str, home: Path, tls, monkeypatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(home / "certificate"))
    with proxy(registry, tls) as gate, proxy() as store:
        store.rule = lambda _: Reply(200)
        gate.rule = lambda one: Reply(307, {"Location": f"http://{store.host}/x"}) if "/blobs/" in one.path else None
        with pytest.raises(SourceError, match="go on without encryption"):
            content(behind(gate, open_image))
        gate.rule = lambda one: Reply(202, {"Location": f"http://{store.host}/x"}) if one.method == "POST" else None
        found = dm("convert", home / "layout", behind(gate, f"{open_image}-tls"))
        assert "send without encryption" in found.err
        login(home / "docker", gate.host)
        TokenServer(gate).realm = f"http://{store.host}/token"
        with pytest.raises(SourceError, match="token server without encryption"):
            content(behind(gate, open_image))
        assert store.requests == []


def _gzipped(home: Path) -> bytes:
    """The layer as it is stored in the layout."""
    index = json.loads((home / "layout/index.json").read_text())
    manifest = json.loads((home / "layout/blobs" / index["manifests"][0]["digest"].replace(":", "/")).read_text())
    return (home / "layout/blobs" / manifest["layers"][0]["digest"].replace(":", "/")).read_bytes()
