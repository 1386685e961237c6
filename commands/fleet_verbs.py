"""What the verbs under `diskmorph fleet` do: one call of the library each, and its result shown."""

from __future__ import annotations

import secrets
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diskmorph.commands.common import size_of
from diskmorph.commands.fleet_progress import fleet_progress, row_line
from diskmorph.commands.fleet_words import rows_of
from diskmorph.commands.text import duration_text, size_text, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from diskmorph.commands.output import Output
    from diskmorph.convert.fleet import ClusterOptions, Row, RunOptions, Summary
    from diskmorph.convert.fleet.foresee import Foreseen

_NO = 3
_MOST_LINES = 50
"""Failures that are told one by one; the ledger has all."""


def run_plan(args: argparse.Namespace, out: Output) -> int:
    """`fleet plan`: status 3 where a row would fail, or there is no room."""
    from diskmorph.commands.progress import progress
    from diskmorph.convert.fleet.foresee import FAIL, shortfalls
    from diskmorph.convert.fleet.foreseeing import foresee_all

    rows = _rows(args)
    with progress(out, "planning") as tell:
        found = foresee_all(rows, _run_options(args), _cluster(args), exact=args.exact, on_progress=tell)
    short = shortfalls(found) if args.scheduler is None else []
    counts = {word: sum(row.will == word for row in found) for word in ("do", "skip", "fail")}
    report = {
        "plan": args.plan,
        "rows": {"total": len(found), **counts},
        "bytes": sum(row.bytes or 0 for row in found),
        "virtual_size": sum(row.virtual_size or 0 for row in found),
        "stored_size": sum(row.stored_size or 0 for row in found),
        "exact": all(row.exact for row in found if row.will == "do"),
        "shortfalls": short,
        "results": [row.as_dict() for row in found],
    }
    out.result(report, _plan_lines(found, report))
    return _NO if short or any(row.will == FAIL for row in found) else 0


def run_run(args: argparse.Namespace, out: Output) -> int:
    """`fleet run`: status 1 where a row failed."""
    from diskmorph.convert.fleet import Ledger, run_fleet

    run, cluster = _run_options(args), _cluster(args)
    rows = _rows(args)
    path = Path(args.ledger or ("fleet.ledger.jsonl" if args.plan == "-" else f"{args.plan}.ledger.jsonl"))
    if args.report:
        _require_page(Path(args.report))
    with Ledger(path) as ledger:
        ledger.begin(run.run, args.plan, len(rows))
        with _ends_told(out, path), fleet_progress(out) as show:
            summary = run_fleet(
                rows,
                run,
                cluster,
                ledger,
                on_result=show.result,
                on_progress=show.progress,
                on_connected=lambda client: _tell_dashboard(out, client.dashboard_link, local=args.scheduler is None),
            )
        ledger.end(run.run, summary.counts())
    if args.report:
        from diskmorph.convert.fleet.report import write_report

        write_report(summary, args.plan, Path(args.report))
    out.report(_summed(args, summary, path), _run_lines(summary, out, path, show.told))
    return 1 if summary.counts()["failed"] else 0


@contextmanager
def _ends_told(out: Output, ledger: Path) -> Iterator[None]:
    """Tell how to go on when a run is broken off."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        out.note(f"{ledger} has the rows that ended; say it again to go on")
        raise


def _tell_dashboard(out: Output, link: str, *, local: bool) -> None:
    """Tell where Dask shows what it does; on this machine only where Bokeh, which draws it, is there."""
    import importlib.util

    if not local or importlib.util.find_spec("bokeh") is not None:
        out.note(f"Dask's dashboard: {link}")
    else:
        out.detail("Dask's dashboard needs Bokeh: pip install bokeh")


def _rows(args: argparse.Namespace) -> list[Row]:
    from diskmorph.convert.fleet import expand, read_plan
    from diskmorph.formats.errors import OptionError

    plan = read_plan(args.plan, args.plan_format)
    if not plan.entries:
        raise OptionError("the plan has no rows", file=args.plan)
    return rows_of(expand(plan), plan.folder)


def _run_options(args: argparse.Namespace) -> RunOptions:
    from diskmorph.convert.fleet import RunOptions
    from diskmorph.formats.errors import OptionError

    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
    if args.fleet_verb == "plan":
        return RunOptions(name, digest=False)
    part = size_of(args.part, "--part") or 0
    if part < 1 << 20:
        raise OptionError("--part takes at least 1M")
    return RunOptions(
        name, digest=not args.no_digest, split=size_of(args.split, "--split"), part=part, per_host=_leases(args)
    )


def _leases(args: argparse.Namespace) -> int | None:
    """Return what bounds rows on a machine; here the number of processes does it."""
    per_host: int | None = args.per_host
    return None if args.scheduler is None else per_host


def _cluster(args: argparse.Namespace) -> ClusterOptions:
    from diskmorph.convert.fleet import ClusterOptions
    from diskmorph.convert.fleet.cluster import require_options

    options = ClusterOptions(
        scheduler=args.scheduler,
        workers=args.workers,
        per_host=args.per_host,
        retries=getattr(args, "retries", 0),
        patience=args.patience,
    )
    require_options(options)
    return options


def _require_page(path: Path) -> None:
    """Raise TargetError before hours of work where the page cannot be written after them."""
    from diskmorph.formats.errors import TargetError

    if not path.absolute().parent.is_dir():
        raise TargetError("the report's folder does not exist", file=str(path))


# --- showing


def _name(name: str | None) -> str:
    return "-" if name is None else name if len(name) <= 48 else f"...{name[-45:]}"


def _plan_lines(found: Sequence[Foreseen], report: dict[str, Any]) -> Iterator[str]:
    cells = []
    for row in found:
        stored = "-" if row.stored_size is None else f"{'' if row.exact else '<= '}{size_text(row.stored_size)}"
        size, data = (("-" if count is None else size_text(count)) for count in (row.virtual_size, row.bytes))
        cells.append((str(row.number), row.will, _name(row.source), _name(row.target), size, data, stored))
    yield from table(("row", "will", "source", "target", "size", "data", "stored"), cells, right=(0, 4, 5, 6), indent=0)
    for row in found:
        for loss in row.lost:
            yield f"row {row.number}: would be lost: {loss}"
        if row.error is not None:
            yield f"row {row.number}: would fail: {row.error['message']}"
    for one in report["shortfalls"]:
        yield f"{one['folder']}: no room: {size_text(one['needed'])} at the most, {size_text(one['free'])} free"
    rows = report["rows"]
    most = "" if report["exact"] else "at most "
    yield (
        f"{rows['do']} to do, {rows['skip']} done already, {rows['fail']} would fail; "
        f"{size_text(report['bytes'])} to be read, {most}{size_text(report['stored_size'])} to be stored"
    )


def _summed(args: argparse.Namespace, summary: Summary, ledger: Path) -> dict[str, Any]:
    return {
        "run": summary.run,
        "plan": args.plan,
        "ledger": str(ledger),
        "report": args.report,
        "scheduler": args.scheduler,
        "rows": summary.counts(),
        "bytes": summary.bytes(),
        "seconds": round(summary.seconds, 3),
        "results": [result.as_dict() for result in summary.results],
    }


def _run_lines(summary: Summary, out: Output, ledger: Path, told: set[int]) -> Iterator[str]:
    failures = [one for one in summary.results if one.status == "failed" and one.number not in told]
    for result in failures[:_MOST_LINES]:
        yield row_line(result)
    if len(failures) > _MOST_LINES:
        yield f"and {len(failures) - _MOST_LINES} more failures"
    if out.verbose:
        for result in summary.results:
            for loss in result.lost:
                yield f"row {result.number}: lost: {loss}"
    counts = summary.counts()
    yield (
        f"{counts['done']} done, {counts['skipped']} done before, {counts['failed']} failed; "
        f"{size_text(summary.bytes())} in {duration_text(summary.seconds)}; {ledger} has every row"
    )
