"""The house's rules, each held by a test: packages, imports, lengths, and that the wheel stands alone."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OTHERS = {"tests", "benchmarks", "fixtures", "scripts", "docs", "build", "dist"}
LAYERS = ("cli", "commands", "convert", "formats")
"""Who may import whom: each only itself and what stands to its right."""
BUILT_ON = {"ovf": {"tar"}, "oci": {"tar", "docker_registry"}, "ami": {"tar"}, "compressed": {"tar"}, "qcow2": {"luks"}}
"""Formats that are defined as archives of another one, and may know it: an OVA is a tar, as are layers,
bundles and the tarballs of clouds; a qcow2 may hold a LUKS header, and a registry keeps container images."""


def sources() -> list[Path]:
    """The package's own modules."""
    top = {path for path in ROOT.iterdir() if path.is_dir() and path.name not in OTHERS and path.name[0] not in "._"}
    folders = [path for path in sorted(top) if not path.name.endswith(".egg-info")]
    return sorted([*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))])


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, without the leading `diskmorph.`; those for types alone do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "diskmorph":
            base = node.module.removeprefix("diskmorph").lstrip(".")
            found |= {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("diskmorph.") for alias in node.names if alias.name.startswith("diskmorph.")
            }
    return found


def test_there_is_something_to_hold() -> None:
    assert len(sources()) > 40
    assert "formats.disk.Disk" in imports(ROOT / "formats/raw.py") | imports(ROOT / "formats/views.py")


def test_packages_are_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in sources() if path.name == "__init__.py"}
    there = {".".join(("diskmorph", *folder.parts)) for folder in folders}
    assert sorted(listed) == sorted(there)
    loose = [path for path in sources() if not (path.parent / "__init__.py").exists()]
    assert not loose, f"modules in folders that are no packages: {loose}"


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sources():
        layer = name_of(path).split(".")[0]
        if layer not in LAYERS:
            continue
        above = LAYERS[: LAYERS.index(layer)]
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in imports(path) if name.split(".")[0] in above]
    assert not wrong


def test_no_format_imports_another() -> None:
    wrong = []
    for path in (ROOT / "formats").rglob("*/*.py"):
        own = path.parent.relative_to(ROOT / "formats").parts[0]
        known = {own, *BUILT_ON.get(own, ())}
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "formats" and (ROOT / "formats" / parts[1]).is_dir() and parts[1] not in known:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


def test_files_and_functions_are_short() -> None:
    long = []
    for path in [*sources(), *(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text()
        lines = text.count("\n")
        if lines > 500:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        spans = {
            f"{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef)
        }
        long += [f"{path.relative_to(ROOT)}:{where}: {span} lines" for where, span in spans.items() if span > 60]
    assert not long


def test_library_code_neither_prints_nor_exits() -> None:
    wrong = []
    for path in sources():
        if path == ROOT / "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in {"print", "exit", "quit", "sys.exit", "os._exit"}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert not wrong


@pytest.mark.parametrize("package", ["formats", "convert"])
def test_a_second_import_by_another_name_is_refused(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"import diskmorph.{package}" in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from diskmorph.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "argparse" in loaded
    assert not loaded & {"numpy", "construct", "rich", "dataclasses", "concurrent.futures", "shtab", "PIL", "isal"}


def test_info_loads_no_more_than_it_needs(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    code = (
        "import sys; from diskmorph.cli import main; main(['info', sys.argv[1]]); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "disk.raw")], capture_output=True, text=True, check=True
    )
    heavy = {"construct", "rich", "concurrent.futures", "shtab", "PIL", "isal", "zstandard", "boto3", "lxml", "pycdlib"}
    assert not set(done.stderr.split()) & heavy


@pytest.mark.slow
def test_the_wheel_stands_alone(tmp_path: Path) -> None:
    """Build the wheel, install it into a new environment, run it away from the checkout."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("diskmorph-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "diskmorph/py.typed" in names
    assert not [name for name in names if name.split("/")[1] in OTHERS]
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin/python", *pip[1:], "install", wheel], check=True)
    command = environment / "bin/diskmorph"
    (tmp_path / "disk.raw").write_bytes(b"content" + bytes(1 << 20))
    subprocess.run([command, "convert", "-q", "disk.raw", "disk.qcow2"], cwd=tmp_path, check=True)
    done = subprocess.run(
        [command, "compare", "disk.raw", "disk.qcow2"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "the same content" in done.stdout
    version = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    assert version.startswith("diskmorph ")


def test_the_library_never_imports_its_front_page() -> None:
    """Such an import makes a cycle, in which mypy takes `bridge.build` for the module at one time, the function at another."""
    wrong = []
    for path in sources():
        if path.parts[len(ROOT.parts)] not in {"formats", "convert"}:
            continue
        wrong += [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module == "diskmorph"
        ]
    assert not wrong
