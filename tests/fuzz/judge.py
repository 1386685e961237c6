"""Judges one mutant in a process of its own, so that its memory, its time and its end are its own.

A reader may refuse (a DiskmorphError) or answer; anything else, more than the time or more than the memory is a finding.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import time
import traceback
from pathlib import Path

import parsers
from subjects import Subject, words

from diskmorph.formats.errors import DiskmorphError
from diskmorph.formats.policy import Opener
from diskmorph.formats.registry import OpenContext, identify, load, open_disk, require_format
from diskmorph.formats.source import FileSource

TIME = 10
MEMORY = 256 << 20
READ = 96 << 20
"""At most so much of a disk is read: a mutant may claim terabytes of holes."""

_STEP = 8 << 20


def look(it: Subject, path: Path) -> dict[str, object]:
    """Open, map, read and check an image; return what came of it."""
    if it.format in parsers.LOOKS:
        return {"outcome": "read", "sha256": parsers.look(it.format, path), "found": []}
    how = words(path.parent, it.open)
    with open_disk(path, format=it.format, **how) as disk:
        total = rows = 0
        sha = hashlib.sha256()
        for batch in disk.extents():
            rows += len(batch)
            if total < READ:
                begin, stop = int(batch["start"][0]), int(batch["start"][-1] + batch["length"][-1])
                stop = min(stop, begin + READ - total)
                for at in range(begin, stop, _STEP):
                    sha.update(disk.read(at, min(_STEP, stop - at)))
                total += stop - begin
            if rows > 1 << 22:
                break
        size = disk.size
    with FileSource(path) as source:
        report = load(require_format(it.format)).check_image(source, OpenContext(Opener(how["parents"])))
        identify(source)
    found = [f"{finding.severity}: {finding.message}" for finding in report.findings]
    return {"outcome": "read", "size": size, "sha256": sha.hexdigest() if size <= READ else None, "found": found}


def judged(it: Subject, path: Path) -> dict[str, object]:
    """Return the outcome of one file."""
    out, back = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(out)
        _child(back, it, path)
    os.close(back)
    with os.fdopen(out, "rb") as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(child, 0)
    outcome = json.loads(text) if text else {"outcome": "crash", "detail": f"status {status}"}
    outcome["seconds"] = round(time.monotonic() - begun, 3)
    outcome["peak"] = usage.ru_maxrss * 1024
    if os.WIFSIGNALED(status):
        outcome["outcome"] = "timeout" if os.WTERMSIG(status) == signal.SIGALRM else "crash"
    elif outcome["peak"] > MEMORY:
        outcome["outcome"] = "memory"
    return outcome


def _child(back: int, it: Subject, path: Path) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(TIME)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = look(it, path)
    except DiskmorphError as error:
        text = str(error)
        answer = {"outcome": "refused" if "\n" not in text else "traceback", "detail": text[:300], "kind": error.kind}
    except BaseException:  # noqa: BLE001 - that is what is looked for
        answer = {"outcome": "traceback", "detail": traceback.format_exc()[-900:]}
    os.write(back, json.dumps(answer).encode())
    os._exit(0)
