"""docs/cookbook-boot.md, word by word: every command in it is run, with `docker save` standing in for itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bootkit import LINE, tiny_image

PAGE = Path(__file__).parents[2] / "docs/cookbook-boot.md"


@pytest.mark.slow
def test_from_docker_save_to_a_machine_that_boots(tmp_path: Path) -> None:
    commands = [
        line for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL) for line in block.splitlines()
    ]
    assert commands[0] == "docker save -o app.tar app:latest"
    tiny_image(tmp_path / "app.tar")
    tmp_path.chmod(0o777)  # apt-get downloads as another user
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = {}
    for command in commands[1:]:
        done = subprocess.run(
            ["sh", "-euc", command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-500:]}"
        said[command] = done.stdout
    machine = next(out for command, out in said.items() if command.startswith("qemu-system"))
    assert LINE in machine and "exited with status 7" in machine
    assert sorted(path.name for path in (tmp_path / "triple").iterdir()) == ["aki", "ami", "ari"]
    assert (tmp_path / "app-again.tar").stat().st_size > 1 << 20
