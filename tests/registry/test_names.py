"""Names of images in registries."""

from __future__ import annotations

import pytest

from diskmorph.formats.docker_registry.reference import is_reference, parse_reference
from diskmorph.formats.errors import OptionError
from diskmorph.formats.pools import is_local

SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "host", "name", "tag", "digest"),
    [
        ("debian", "docker.io", "library/debian", "latest", None),
        ("team/app:1.0", "docker.io", "team/app", "1.0", None),
        ("docker.io/debian:12", "docker.io", "library/debian", "12", None),
        ("index.docker.io/team/app", "docker.io", "team/app", "latest", None),
        ("registry.example/app", "registry.example", "app", "latest", None),
        ("registry.example:5000/a/b__c/d--e:X_1.y", "registry.example:5000", "a/b__c/d--e", "X_1.y", None),
        ("localhost/app", "localhost", "app", "latest", None),
        ("localhost:5000/app:1", "localhost:5000", "app", "1", None),
        ("[::1]:5000/app", "[::1]:5000", "app", "latest", None),
        (f"registry.example/app@{SHA}", "registry.example", "app", None, SHA),
        (f"registry.example/app:1@{SHA}", "registry.example", "app", "1", SHA),
    ],
)
def test_what_names_say(text: str, host: str, name: str, tag: str | None, digest: str | None) -> None:
    found = parse_reference(f"docker://{text}")
    assert (found.host, found.name, found.tag, found.digest, found.plain) == (host, name, tag, digest, False)
    assert found.wanted == (digest or tag)
    assert parse_reference(str(found)) == found
    assert parse_reference(f"docker+http://{text}").plain


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "registry.example/", "registry.example/App", "registry.example/a//b", "registry.example/../x",
        "registry.example/a/../b", "registry.example/app:", "registry.example/app:a/b", "registry.example/app:" + "x" * 129,
        "registry.example/app@sha256:1", "registry.example/app@", "me:x@registry.example/app", "registry.example/a?b=c",
        "registry.example/a#b", "registry.example/a b", "registry.example/a\nb", "registry example/a", "-x.example/app",
        "registry.example:port/app", "registry.example/" + "a" * 256, "[::1/app", "registry.example/%2e%2e/x",
    ],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(OptionError):
        parse_reference(f"docker://{text}")


def test_only_the_scheme_makes_a_name() -> None:
    assert is_reference("docker://x")
    assert is_reference("docker+http://x")
    assert not is_reference("docker-archive:x")
    assert not is_reference("http://x")
    with pytest.raises(OptionError):
        parse_reference("http://registry.example/app")


def test_which_hosts_are_this_machine() -> None:
    assert all(
        is_local(host) for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "127.1.2.3:5000", "[::1]", "[::1]:5000")
    )
    others = (
        "localhost.example",
        "example",
        "10.0.0.1:80",
        "[fe80::1]:80",
        "127.0.0.1.example:80",
        "0.0.0.0",
        "2130706433",
    )
    assert not any(is_local(host) for host in others)
