"""One registry for the tests of a file, and a home of its own for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from registrykit import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    found = Registry(tmp_path_factory.mktemp("registry") / "open")
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where cache and credentials are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("DISKMORPH_CACHE", raising=False)
    return tmp_path


@pytest.fixture
def image(registry: Registry, request: pytest.FixtureRequest) -> str:
    """A repository that no other test writes."""
    name = request.node.name.replace("[", "-").replace("]", "").replace("_", "-").lower()
    return f"docker://{registry.host}/tests/{name}"
