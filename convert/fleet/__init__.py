"""Many conversions on a Dask cluster: a plan becomes rows, each row a task, what became of it a line of the ledger."""

from __future__ import annotations

from diskmorph.convert.fleet.cluster import ClusterOptions
from diskmorph.convert.fleet.expand import Draft, expand
from diskmorph.convert.fleet.ledger import Ledger, read_ledger
from diskmorph.convert.fleet.plan_file import Entry, PlanFile, parse_plan, read_plan
from diskmorph.convert.fleet.rows import FleetError, Result, Row, RunOptions, SnapshotOptions, failed, fault_of
from diskmorph.convert.fleet.run import run_fleet
from diskmorph.convert.fleet.summary import FleetProgress, Summary

__all__ = [
    "ClusterOptions",
    "Draft",
    "Entry",
    "FleetError",
    "FleetProgress",
    "Ledger",
    "PlanFile",
    "Result",
    "Row",
    "RunOptions",
    "SnapshotOptions",
    "Summary",
    "expand",
    "failed",
    "fault_of",
    "parse_plan",
    "read_ledger",
    "read_plan",
    "run_fleet",
]
