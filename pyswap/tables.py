"""Tables of pools and their numbers, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.table import Table

from .pools import LivePool
from .sizes import format_size
from .stats import Stats

__all__ = ["pools_table", "stats_table"]


def pools_table(pools: Sequence[LivePool]) -> Table:
    """Return a row for each pool."""
    table = Table("pool", box=None, pad_edge=False)
    for title in ("memory", "in use", "swap", "in use", "arrays", "processes", "swapper"):
        table.add_column(title, justify="right")
    for pool in pools:
        now = pool.stats()
        sizes = (
            now.memory_bytes,
            now.resident_pages * now.page_size,
            now.swap_bytes,
            now.swap_used_bytes,
            now.committed_bytes,
        )
        table.add_row(pool.name, *map(format_size, sizes), str(now.workers), str(pool.swapper_pid))
    return table


def stats_table(
    pool: LivePool, now: Stats, before: Stats | None = None, seconds: float = 1
) -> Table:
    """Return a row for each number, with its change a second where there is an earlier one."""
    table = Table(
        "number", title=f"pool {pool.name}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("now", justify="right")
    if before is not None:
        table.add_column("a second", justify="right")
    for each in fields(Stats):
        value = getattr(now, each.name)
        row = [each.name, format_size(value) if each.name.endswith("_bytes") else f"{value:,}"]
        if before is not None:
            change = (value - getattr(before, each.name)) / seconds
            row.append("" if change == 0 else f"{change:+,.0f}")
        table.add_row(*row)
    table.add_row("processes", " ".join(map(str, pool.processes())))
    return table
