"""What `info` prints of container images, archives and directories."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from diskmorph.commands.text import exact_size_text, properties, size_text, table

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORDS = {
    "Entrypoint": "entrypoint",
    "Cmd": "command",
    "User": "user",
    "WorkingDir": "directory",
    "ExposedPorts": "ports",
    "Volumes": "volumes",
    "StopSignal": "stop signal",
}
_DIGEST = 19  # sha256: and twelve digits, as docker shows them
_STEP = 72


def tree_lines(report: dict[str, Any], *, verbose: bool) -> Iterator[str]:
    """Yield the lines for people of what `describe` returned of a tree."""
    facts = [("file", report["file"]), ("format", report["format"])]
    if "layers" not in report:
        counts = ", ".join(f"{kind} {count}" for kind, count in report["entries"].items() if count)
        facts.append(("stored size", exact_size_text(report["stored_size"])))
        facts += [("holds", counts or "nothing"), ("content", exact_size_text(report["content_size"]))]
        yield from properties(facts)
        return
    yield from properties([*facts, *_image_facts(report), *_config_facts(report["config"])])
    yield ""
    yield f"layers ({len(report['layers'])}, the lowest first):"
    yield from table(("no.", "size", "digest", "made by"), list(_layer_rows(report, verbose=verbose)), right=(0, 1))
    if verbose:
        yield ""
        yield "history:"
        yield from (f"  {step['created'] or '-'}  {_line(step)}" for step in report["history"])


def _image_facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if report["names"]:
        yield "names", ", ".join(report["names"])
    if report["digest"]:
        yield "digest", report["digest"]
    yield "platform", report["platform"] or "not said"
    for word in ("created", "author"):
        if report[word]:
            yield word, _one_line(report[word])
    yield "stored size", exact_size_text(report["stored_size"])


def _config_facts(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, word in _WORDS.items():
        value = config.get(key)
        if not value:
            continue
        if isinstance(value, dict):
            value = ", ".join(value)
        yield word, _one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    for line in _listed(config.get("Env")):
        yield "environment", line
    labels = config.get("Labels")
    for name, value in labels.items() if isinstance(labels, dict) else ():
        yield "label", _one_line(f"{name}={value}")


def _listed(value: Any) -> list[str]:
    return [_one_line(str(one)) for one in value] if isinstance(value, list) else []


def _layer_rows(report: dict[str, Any], *, verbose: bool) -> Iterator[tuple[str, str, str, str]]:
    steps = [step for step in report["history"] if not step["empty_layer"]]
    known = len(steps) == len(report["layers"])
    for number, layer in enumerate(report["layers"], 1):
        digest = layer["digest"] or layer["diff_id"] or "-"
        words = _line(steps[number - 1]) if known else ""
        if not verbose:
            digest = digest[:_DIGEST]
            words = words if len(words) <= _STEP else words[: _STEP - 3] + "..."
        yield str(number), size_text(layer["size"]), digest, words


def _line(step: dict[str, Any]) -> str:
    return _one_line(step["created_by"] or step["comment"] or "-")


def _one_line(text: str) -> str:
    return " ".join(text.split())
