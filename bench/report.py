"""The report: a table on the terminal, everything in JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .plan import Plan
from .rows import Measured, Row
from .runner import Runner

__all__ = ["print_rows", "write_json"]

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_RATES = {
    "bytes": "B/s",
    "operations": "/s",
    "columns": "columns/s",
    "calls": "/s",
    "children": "/s",
}


def _number(value: float, unit: str) -> str:
    if unit == "nanoseconds":
        return f"{value / 1000:.2f} us"
    if unit not in _RATES:
        return f"{value:.3g} {unit}"
    for scale, prefix in _PREFIXES:
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{_RATES[unit]}"
    return f"{value:.3g} {_RATES[unit]}"


def _measured(m: Measured | None) -> str:
    """The median, and the spread in percent of it."""
    if m is None:
        return ""
    below, above = (100 * abs(end / m.median - 1) for end in (m.least, m.most))
    return f"{_number(m.median, m.unit)}  -{below:.0f}/+{above:.0f} %"


def _table(title: str, rows: list[Row], *, is_counted: bool) -> Table:
    table = Table(title=title, title_justify="left")
    names = ["workload", "against", "pyswap", "the other", "ratio"]
    for name in [*names, "target", "met"] if is_counted else names:
        table.add_column(name, justify="left" if name in names[:2] else "right")
    for row in rows:
        cells = [row.title, row.against, _measured(row.ours), _measured(row.theirs)]
        cells.append("" if row.ratio is None else f"{row.ratio:.2f}")
        if is_counted:
            cells.append(f"{'>=' if row.is_least else '<='} {row.bound:g}")
            cells.append("[green]yes[/green]" if row.is_met else "[red]no[/red]")
        table.add_row(*cells)
    return table


def print_rows(console: Console, counted: list[Row], shown: list[Row], runner: Runner) -> None:
    """Print both tables, who was left out and why, and how many rows are met."""
    if shown:
        console.print(_table("Shown, not counted", shown, is_counted=False))
    if counted:
        title = "Medians with the spread of all runs; a ratio over 1 is faster, of times slower"
        console.print(_table(title, counted, is_counted=True))
    for peer, reason in runner.left_out.items():
        console.print(f"left out: {peer}: {reason}")
    for workload, by_peer in runner.failures.items():
        for peer, reasons in by_peer.items():
            console.print(f"failed: {workload} on {peer}, {len(reasons)} runs: {reasons[-1]}")
    met = sum(row.is_met is True for row in counted)
    console.print(f"rows met / rows printed: {met} / {len(counted)}", highlight=False)


def write_json(
    path: Path, plan: Plan, machine: dict[str, object], runner: Runner, rows: list[Row]
) -> None:
    """Write the machine's facts, the settings of all sides, every run and every row."""
    told = {
        "machine": machine,
        "plan": dataclasses.asdict(plan),
        "environment": {"OPENBLAS_NUM_THREADS": 1, "OMP_NUM_THREADS": 1},
        "settings": runner.settings,
        "left_out": runner.left_out,
        "failures": runner.failures,
        "rows": [dataclasses.asdict(row) for row in rows],
        "runs": runner.results,
    }
    path.write_text(json.dumps(told, indent=1) + "\n")
