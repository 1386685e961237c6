"""Coverage-guided fuzzing with atheris: `harness.py SECONDS [FORMAT...]`, a process and so many seconds for each format.

Starts from the subjects of the table. A finding (anything but a DiskmorphError, more than 10 s) ends the format's process;
its input, whose first byte is the subject's number, is kept in build/fuzz/.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

KEEP = Path(__file__).parents[2] / "build/fuzz"
READ = 2 << 20
LARGEST = 1 << 20


def one_format(format: str, seconds: str) -> None:
    """Fuzz one format in this process; never returns."""
    import atheris

    with atheris.instrument_imports(include=["diskmorph"]):
        import judge
        from run import group_of

        from diskmorph.formats.errors import DiskmorphError
    judge.READ = READ
    group = [it for it in group_of(format) if len(it.blob) <= LARGEST] or group_of(format)
    where = tempfile.TemporaryDirectory(dir="/dev/shm")
    corpus = Path(where.name, "corpus")
    corpus.mkdir()
    for number, it in enumerate(group):
        (corpus / str(number)).write_bytes(bytes([number]) + it.blob[:LARGEST])
        Path(where.name, str(number)).mkdir()
        it.write(Path(where.name, str(number)))

    def one_input(data: bytes) -> None:
        number = data[0] % len(group) if data else 0
        it, blob = group[number], bytearray(data[1:])
        it.mend(blob)
        folder = Path(where.name, str(number))
        (folder / it.victim).write_bytes(blob)
        try:
            judge.look(it, folder / it.main)
        except DiskmorphError as error:
            assert "\n" not in str(error)

    KEEP.mkdir(parents=True, exist_ok=True)
    words = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", "-rss_limit_mb=1024", "-timeout=10", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={KEEP}/{format}-", *words], one_input)
    atheris.Fuzz()


def main() -> int:
    """Fuzz each format in a process of its own; 1 if one of them found something."""
    import parsers
    from subjects import TABLE

    failed = []
    for name in sys.argv[2:] or [*TABLE, *parsers.MAKERS]:
        done = subprocess.run([sys.executable, __file__, "--one", name, sys.argv[1]], capture_output=True, check=False)
        text = done.stderr.decode(errors="replace")
        print(f"{name}: {'nothing found' if done.returncode == 0 else text[-3000:]}", flush=True)
        failed += [name] if done.returncode else []
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        one_format(sys.argv[2], sys.argv[3])
    else:
        sys.exit(main())
