"""Help, completion and bad usage: what a newcomer meets first."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from clikit import NAMES, ROOT, dm

from diskmorph._version import __version__
from diskmorph.cli import load, parse, verb_parser
from diskmorph.commands import VERBS


def options_of(name: str) -> set[str]:
    """The words of a verb's parser that help shows."""
    import argparse

    verb = next(verb for verb in VERBS if verb.name == name)
    parser = verb_parser(verb, load(verb))
    return {word for action in parser._actions if action.help != argparse.SUPPRESS for word in action.option_strings}


def test_top_help_names_every_verb() -> None:
    for words in (["--help"], ["help"], ["-h"]):
        text = dm(*words).ok().out
        for verb in VERBS:
            assert re.search(rf"^  {verb.name} +{re.escape(verb.help)}$", text, re.MULTILINE)


def test_version() -> None:
    assert dm("--version").ok().out == f"diskmorph {__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_verb_help(name: str) -> None:
    text = dm(name, "--help").ok().out
    assert text == dm("help", name).ok().out
    verb = next(verb for verb in VERBS if verb.name == name)
    command = load(verb)
    for words, what in command.EXAMPLES:
        assert words.startswith(f"diskmorph {name}"), words
        assert words in text and what in text
    assert command.DESCRIPTION.strip() in text
    for word in options_of(name):
        assert word in text


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_good_usage(name: str) -> None:
    """Examples cannot go stale: each is parsed by the verb's own parser."""
    import shlex

    verb = next(verb for verb in VERBS if verb.name == name)
    command = load(verb)
    for words, _ in command.EXAMPLES:
        one = re.split(r" [|<>] ", words)[0]
        parse(verb_parser(verb, command), shlex.split(one)[2:])


def test_every_verb_takes_the_common_words() -> None:
    for name in NAMES:
        options = options_of(name)
        assert {"--json", "-q", "-v", "--help"} <= options, name
    for name in ("convert", "info", "map", "measure", "check", "digest", "resize", "snapshot"):
        assert {"-f", "--allow-parent", "--backing", "-U"} <= options_of(name), name
    for name in ("convert", "create", "resize", "snapshot", "check"):
        assert {"--force", "--reproducible", "--dry-run"} <= options_of(name), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "verb"),
        (["nosuchverb"], "nosuchverb"),
        (["convrt"], "`convert`"),
        (["convert"], "source"),
        (["convert", "one"], "target"),
        (["convert", "a", "b", "c"], "several"),
        (["convert", "--nosuch", "a", "b"], "--nosuch"),
        (["convert", "-O", "nosuchformat", "a", "b"], "nosuchformat"),
        (["convert", "--size", "big", "a", "b.raw"], "big"),
        (["convert", "--for", "mars", "a", "b"], "mars"),
        (["info"], "IMG"),
        (["create", "a.qcow2"], "size"),
        (["check", "-o", "b", "a"], "--repair"),
        (["check", "--repair", "some", "a"], "some"),
        (["map", "--plot", "map.gif", "a"], ".png"),
        (["completion", "tcl"], "tcl"),
        (["-x", "info"], "-x"),
    ],
)
def test_bad_usage_is_one_line_and_two(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(bytes(512))
    done = dm(*words)
    assert done.status == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("diskmorph: ") and said in line
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_parse_and_know_the_words(shell: str, tmp_path: Path) -> None:
    script = dm("completion", shell).ok().out
    path = tmp_path / "script"
    path.write_text(script)
    subprocess.run([shell, "-n", path], check=True)
    for word in (*NAMES, "allow-parent", "reproducible", "qcow2"):
        assert word in script


def test_bash_completion_completes(tmp_path: Path) -> None:
    """The script, loaded into bash, offers verbs, options, formats and files."""
    (tmp_path / "complete.sh").write_text(dm("completion", "bash").ok().out)
    (tmp_path / "disk.qcow2").touch()

    def offers(*words: str) -> set[str]:
        ask = f"source complete.sh; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        ask += 'fn=$(complete -p diskmorph | sed "s/.*-F \\([^ ]*\\) .*/\\1/"); $fn diskmorph "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"; '
        ask += 'printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=False)
        return set(done.stdout.split())

    assert {"convert", "compare", "completion"} <= offers("diskmorph", "co")
    assert "--allow-parent" in offers("diskmorph", "info", "--al")
    assert {"qcow2", "qcow"} <= offers("diskmorph", "convert", "-O", "qc")
    assert "disk.qcow2" in offers("diskmorph", "info", "di")


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "diskmorph", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"diskmorph {__version__}\n"


def test_readme_and_cookbook_examples_are_good_usage() -> None:
    """Every `diskmorph ...` line in code blocks of the documents is parsed."""
    import shlex

    seen = 0
    for document in ("README.md", "docs/cookbook.md"):
        for block in re.findall(r"```(?:sh|console)?\n(.*?)```", (ROOT / document).read_text(), re.DOTALL):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                match = re.search(r"(?:^|\| |\$ )(diskmorph [a-z].*)", line)
                if match is None:
                    continue
                words = shlex.split(re.split(r" [|<>]|>> | && ", match[1])[0], comments=True)
                verb = next((verb for verb in VERBS if verb.name == words[1]), None)
                assert verb is not None, f"{document}: no verb {words[1]}: {line}"
                parse(verb_parser(verb, load(verb)), words[2:])
                seen += 1
    assert seen > 20


def make(path: str, folder: Path) -> None:
    """An image of the format that a name says, so that an example can be planned on it."""
    where = folder / path
    if where.exists() or not re.fullmatch(r"[\w.-]+\.(qcow2|raw|vmdk|vdi|vhdx?|img)", path):
        return
    dm("create", where, "1M").ok()


def examples() -> list[str]:
    """The examples of conversions in every help text, without those that need a network, a device, or special images."""
    from diskmorph import cli

    top = re.findall(r"^  (diskmorph convert .*?)(?:  .*)?$", cli._FOOT, re.MULTILINE)
    others = [
        words for name in ("convert", "create") for words, _ in load(next(v for v in VERBS if v.name == name)).EXAMPLES
    ]
    needs = ("://", "--device", "--snapshot", "vm.ova d", "seed/", "--passphrase-file", "-o help", " - disk", "new/top")
    return [words for words in [*top, *others] if not any(word in words for word in needs)]


@pytest.mark.parametrize("words", examples())
def test_every_example_can_be_planned(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    monkeypatch.chdir(tmp_path)
    argv = shlex.split(re.split(r" [|<>] ", words)[0])[1:]
    target = next((word for word in reversed(argv) if re.search(r"\.\w+$", word)), "") if argv[-1] != "-" else "-"
    for word in argv if argv[0] == "convert" else [word for word in argv if "base" in word]:
        if word != target and not word.startswith("-"):
            make(word, tmp_path)
    assert list(tmp_path.iterdir()) or argv[0] == "create"
    dm(*argv, "--dry-run").ok()


def test_options_are_listed_by_every_verb_that_takes_them() -> None:
    listed = dm("create", "-f", "qcow2", "-o", "help", "x").ok().out
    assert listed == dm("convert", "-O", "qcow2", "-o", "help").ok().out and "cluster_size" in listed
