"""Coverage-guided fuzzing of one format's reader and check with atheris: `harness.py FORMAT SECONDS`.

Starts from the format's fixtures. A finding (anything but a DiskmorphError) stops the run and is kept by atheris.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["diskmorph"]):
    from diskmorph.formats.errors import DiskmorphError
    from diskmorph.formats.registry import OpenContext, load, open_disk, require_format
    from diskmorph.formats.source import BytesSource

from mutants import FIXTURES, MENDERS

READ = 4 << 20
ROWS = 1 << 16
LARGEST = 1 << 20


def one_input(format: str, data: bytes) -> None:
    """Open, map, read and check an image given as bytes; only a DiskmorphError may come of it."""
    blob = bytearray(data)
    mend = MENDERS.get(format)
    if mend is not None and len(blob) >= 1536:
        mend(blob)
    try:
        with open_disk(BytesSource(bytes(blob), f"fuzz.{format}"), format=format) as disk:
            rows = 0
            for batch in disk.extents():
                rows += len(batch)
                if rows > ROWS:
                    break
            disk.read(0, min(disk.size, READ))
    except DiskmorphError as error:
        assert "\n" not in str(error)
    with contextlib.suppress(DiskmorphError):
        load(require_format(format)).check_image(BytesSource(bytes(blob)), OpenContext())


def main() -> None:
    """Run for the seconds given."""
    word, seconds = sys.argv[1], sys.argv[2]
    with tempfile.TemporaryDirectory() as corpus:
        for path in (FIXTURES / word).iterdir():
            if path.suffix not in {".toml", ".sh"} and path.stat().st_size:
                Path(corpus, path.name).write_bytes(path.read_bytes()[:LARGEST])
        words = [
            sys.argv[0],
            corpus,
            f"-max_total_time={seconds}",
            f"-max_len={LARGEST}",
            "-rss_limit_mb=1024",
            "-timeout=10",
        ]
        atheris.Setup([*words, "-verbosity=0"], lambda data: one_input(word, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
