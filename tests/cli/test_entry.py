"""The end of the process: quick, but with what was registered for it, and after threads that others began."""

from __future__ import annotations

import subprocess
import sys

import pytest

_WAYS = {
    "registered": "import atexit; atexit.register(lambda: print('bye', file=sys.stderr))",
    "finalized": "import weakref\nclass X: pass\nx = X(); weakref.finalize(x, lambda: print('bye', file=sys.stderr))",
    "thread": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.5), print('bye', file=sys.stderr))).start()"
    ),
}


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize(("word", "status"), [("--version", 0), ("--nonsense", 2)])
def test_what_waits_for_the_end_is_done(way: str, word: str, status: int) -> None:
    code = f"import sys\n{_WAYS[way]}\nsys.argv = ['diskmorph', {word!r}]\nfrom diskmorph.cli import entry\nentry()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "bye" in done.stderr
    assert ("diskmorph" in done.stdout) == (status == 0)


def test_output_that_cannot_be_written_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "diskmorph", "formats"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "No space left" in done.stderr
