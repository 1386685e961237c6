"""`diskmorph fleet plan PLAN` and `diskmorph fleet run PLAN`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from diskmorph.commands.aws_words import add_common
from diskmorph.commands.common import add_output

if TYPE_CHECKING:
    from diskmorph.commands.output import Output

DESCRIPTION = """\
Do many conversions, each a row of PLAN, on a Dask cluster: a running one, or the cores of this machine.

PLAN is TOML, CSV or JSON lines; a row has a source (patterns and S3 prefixes stand for many), a target (with {stem} and
the like), a verb (convert, build, extract, aws upload) and its options. A ledger keeps what became of each row; said
again, a run goes on where it was cut off. docs/fleet.md explains plans, ledgers and clusters."""

_PLAN = (
    ("diskmorph fleet plan move.toml", "bytes, sizes, losses, and what would fail"),
    ("diskmorph fleet plan move.csv --exact", "every source read, sizes exact"),
)
_RUN = (
    ("diskmorph fleet run move.toml", "a process a core; said again, it goes on"),
    ("diskmorph fleet run move.toml --scheduler tcp://10.0.0.1:8786 --per-host 4", "on a running cluster"),
    ("diskmorph fleet run move.toml --report fleet.html", "with a page of times and failures"),
    ("diskmorph fleet run move.toml --split 64G", "large disks by ranges, each done by any worker"),
)

EXAMPLES = (*_PLAN, *_RUN)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See diskmorph.commands."""
    add_output(parser)
    verbs = parser.add_subparsers(metavar="VERB", dest="fleet_verb", required=True, prog="diskmorph fleet")

    def verb(name: str, help: str, examples: tuple[tuple[str, str], ...]) -> argparse.ArgumentParser:
        text = "examples:\n" + "\n".join(f"  {line}\n      {what}" for line, what in examples)
        made = verbs.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.add_argument("plan", metavar="PLAN", help="TOML, CSV or JSON lines; `-` is standard input")
        made.add_argument(
            "--plan-format", choices=("toml", "csv", "jsonl"), help="how PLAN is written (default: by its suffix)"
        )
        return made

    plan = verb("plan", "tell what a run would do, and what would fail; nothing is written", _PLAN)
    plan.add_argument("--exact", action="store_true", help="read every source, so that sizes are exact")
    _add_cluster(plan)
    add_common(plan, manual="docs/json.md")
    run = verb("run", "do every row of a plan that is not done", _RUN)
    group = run.add_argument_group("run")
    group.add_argument("--ledger", metavar="FILE", help="what became of each row (default: PLAN.ledger.jsonl)")
    group.add_argument("--report", metavar="FILE.html", help="a page with a table, times and failures")
    group.add_argument("--no-digest", action="store_true", help="leave out the SHA-256 of every disk")
    group.add_argument(
        "--split",
        metavar="SIZE",
        help="disks of this size and more go by ranges where targets take them",
    )
    group.add_argument("--part", metavar="SIZE", default="1G", help="the size of a range (default: 1G)")
    _add_cluster(run)
    group.add_argument(
        "--retries", type=int, default=2, metavar="N", help="further tries of what may pass (default: 2)"
    )
    add_common(run, manual="docs/json.md")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument("--scheduler", metavar="ADDRESS", help="a running one, such as tcp://10.0.0.1:8786")
    group.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: one a core)")
    group.add_argument("--per-host", type=int, metavar="N", help="at most so many rows at once on one machine")
    group.add_argument(
        "--patience", type=float, default=60.0, metavar="S", help="seconds to wait for a scheduler (default: 60)"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """See diskmorph.commands."""
    from diskmorph.commands import fleet_verbs

    verb: Any = getattr(fleet_verbs, f"run_{args.fleet_verb}")
    return int(verb(args, out))
