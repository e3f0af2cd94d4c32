"""The command line: a click group, with a module's work behind each command."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from .pools import LivePool

__all__ = ["cli"]

WATCH_S = 1.0
"""Seconds between two looks of `stat --watch`."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pyswap")
def cli() -> None:
    """Swap, as a library: programs and pools under a memory budget."""


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--memory", default="0.5", show_default=True, help="Budget: bytes, a size as 2G, or a share."
)
@click.option(
    "--swap", help="Size of swap; four times the memory, or half of what the disk has free."
)
@click.option(
    "--overcommit", is_flag=True, help="Allow arrays that memory and swap could not hold."
)
@click.option(
    "--threshold", default="1 MiB", show_default=True, help="Arrays from this size on are paged."
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all numbers there, as JSON.",
)
@click.option("-m", "is_module", is_flag=True, help="The program is a module, as python -m has it.")
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    memory: str,
    swap: str | None,
    overcommit: bool,
    threshold: str,
    report: Path | None,
    is_module: bool,
    program: tuple[str, ...],
) -> None:
    """Run PROGRAM, a script and its arguments, with NumPy's arrays under a budget.

    Its worker processes share the budget, however they start. One line at the end tells what it
    used, and the exit status is the program's.
    """
    from .errors import Error
    from .run import Plan, run

    budget = float(memory) if re.fullmatch(r"[01]?\.\d+", memory) else memory
    plan = Plan(budget, swap, overcommit, threshold, program, is_module, report)
    try:
        status = run(plan)
    except (Error, OSError, TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if status < 0:
        # As the program ended, so does this: a shell is to see the same.
        with suppress(OSError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


@cli.command()
def ls() -> None:
    """List this user's live pools."""
    from .pools import live_pools
    from .tables import pools_table

    _console().print(pools_table(live_pools()))


@cli.command()
@click.argument("name")
@click.option("--watch", is_flag=True, help="Show them again every second, until the pool ends.")
def stat(name: str, watch: bool) -> None:
    """Show the numbers of the pool NAME, which may also be its swapper's process id."""
    from .pools import live_pools
    from .tables import stats_table

    found = [pool for pool in live_pools() if name in (pool.name, str(pool.swapper_pid))]
    if len(found) != 1:
        pids = ", ".join(str(pool.swapper_pid) for pool in found)
        why = f"several are: name one by its swapper, {pids}" if found else "see ls"
        raise click.ClickException(f"no one live pool of this user is {name!r}: {why}")
    if watch:
        _watch(found[0])
    else:
        _console().print(stats_table(found[0], found[0].stats()))


def _console() -> Console:
    """Where tables go: as wide as they want to be, unless that is a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def _watch(pool: LivePool) -> None:
    from rich.live import Live

    from .tables import stats_table

    before, then = pool.stats(), time.monotonic()
    with Live(stats_table(pool, before, before), console=_console(), auto_refresh=False) as live:
        while pool.is_alive():
            time.sleep(WATCH_S)
            now, at = pool.stats(), time.monotonic()
            live.update(stats_table(pool, now, before, at - then), refresh=True)
            before, then = now, at


@cli.command()
def doctor() -> None:
    """Say what this machine allows, what pyswap does about it, and what would improve it.

    Takes about two seconds. The exit status is 1 if pools cannot be made here.
    """
    from rich.console import Console
    from rich.text import Text

    from .doctor import examine

    colours = {"good": "green", "limited": "yellow", "refused": "bold red"}
    # A command is to be copied: no line is broken.
    console = Console(soft_wrap=True, highlight=False)
    findings = examine()
    for each in findings:
        verdict = (each.verdict.ljust(9), colours[each.verdict])
        console.print(Text.assemble((each.topic.ljust(18), "bold"), verdict, each.found))
        console.print(Text(f"    {each.therefore}", "dim"))
        if each.better is not None:
            console.print(Text.assemble("    $ ", (each.better, "cyan")))
    sys.exit(any(each.verdict == "refused" for each in findings))
