"""A fake account for each test, and the command line led to it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aws.fake import Fake, Serving


@pytest.fixture(scope="session", autouse=True)
def one_loader() -> Iterator[None]:
    """Parse botocore's service models once, not for each session: they are most of what a command costs."""
    import botocore.session

    shared = botocore.session.create_loader()
    kept = botocore.session.create_loader
    botocore.session.create_loader = lambda *_, **__: shared
    yield
    botocore.session.create_loader = kept


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    made = Fake()
    made.reset()
    serving = Serving(made)
    settings = {
        "AWS_ENDPOINT_URL": serving.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield made
    made.faults.clear()
    serving.close()


@pytest.fixture
def spawn() -> Any:
    """Start `diskmorph aws ...` as a process of its own."""

    def start(*words: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "diskmorph", "aws", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
