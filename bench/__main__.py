"""The command: `python -m bench`."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console
from rich.logging import RichHandler

from pyswap.settings import is_tmpfs
from pyswap.sizes import parse_size

from . import area, native, undo
from .applications import write_graph
from .limits import LIMITS
from .machine import facts
from .peers import PEERS
from .plan import Plan
from .plots import draw
from .report import print_rows, write_json
from .rows import SUBJECTS, peers_of, rows
from .runner import Runner

_log = logging.getLogger("pyswap.bench")
_RESULTS = Path(__file__).with_name("results")
_ARRAY_BUDGETS = 4
_QUICK_BUDGET_BYTES = 8 << 20
_QUICK_PEERS = ("pyswap", "numpy", *LIMITS)


def _plan(budget_bytes: int, seed: int, folder: Path, *, quick: bool) -> Plan:
    array_bytes = _ARRAY_BUDGETS * budget_bytes
    return Plan(
        workload="",
        peer="",
        budget_bytes=budget_bytes,
        array_bytes=array_bytes,
        # The same room on both sides: the array, and half of it so that slots never run short; four
        # children that each copy half of an array of half the size need as much.
        swap_bytes=array_bytes + 2 * budget_bytes,
        # As many again warm up: with fewer, not all popular rows of Zipf's law are in memory.
        operations=2048 if quick else 4 * budget_bytes // 4096,
        repeats=3 if quick else 9,
        most_seconds=0.2 if quick else 3.0,
        seed=seed,
        folder=str(folder),
        area="",
        native="",
    )


def _folder(given: Path | None) -> Path:
    """Where swap files go: as asked, else as `Pool()` would choose."""
    if given is not None:
        return given.resolve()
    chosen = Path(os.environ.get("PYSWAP_DIR") or tempfile.gettempdir()).resolve()
    return Path("/var/tmp") if is_tmpfs(chosen) else chosen


def _names(
    context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """Take names with commas between them, and refuse one that is none."""
    known = {"subjects": [*SUBJECTS], "peers": [*PEERS, *LIMITS]}[str(option.name)]
    names = tuple(name for text in given for name in text.split(",") if name)
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name} is none of {', '.join(known)}", context, option)
    return names


_HELP = f"""Measure pyswap beside what one would use instead, on the same work and the same disk.

Every run is a fresh process; the peers take turns. As root the kernel's own swap is one of
them: a swap file is in use while it runs, and is taken away again in any case.

One row in a minute: --rows sequential-read --peers pyswap,kernel-swap-5 --budget 128MiB --runs 3.
Below 128 MiB the kernel finds now and then nothing to swap out, and kills its run.

Rows: {", ".join(SUBJECTS)}.

Peers: {", ".join([*PEERS, *LIMITS])}.
"""


@click.command(
    help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.option("--budget", default="256 MiB", help="The memory budget; arrays are four times it.")
@click.option("--runs", default=5, type=click.IntRange(1), help="Runs of each workload and peer.")
@click.option("--rows", "subjects", multiple=True, metavar="ROW,...", callback=_names)
@click.option("--peers", multiple=True, metavar="PEER,...", callback=_names)
@click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--results", default=_RESULTS, type=click.Path(path_type=Path), help="Where reports go."
)
@click.option("--seed", default=20241, help="What all data and accesses follow from.")
@click.option("--quick", is_flag=True, help="Tiny sizes, one run: checks results, times nothing.")
def main(
    budget: str,
    runs: int,
    subjects: tuple[str, ...],
    peers: tuple[str, ...],
    folder: Path | None,
    results: Path,
    seed: int,
    quick: bool,
) -> None:
    """Read the command line, measure, and report."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True))])
    undo.catch_signals()
    begin = time.monotonic()
    place = _folder(folder)
    area.take_stale_away(place)
    budget_bytes = _QUICK_BUDGET_BYTES if quick else parse_size(budget, what="budget")
    plan = _plan(budget_bytes, seed, place, quick=quick)
    runner = Runner(plan, lambda what: console.print(what, style="dim", highlight=False))
    results.mkdir(parents=True, exist_ok=True)
    report = results / ("quick.json" if quick else time.strftime("%Y%m%d-%H%M%S.json"))
    machine = facts(place)
    with ExitStack() as stack:
        subjects = subjects or tuple(SUBJECTS)
        runner.plan = _prepared(stack, plan, subjects)
        try:
            for name in subjects:
                chosen = peers or (_QUICK_PEERS if quick else ())
                try:
                    runner.measure(name, peers_of(name, chosen), 1 if quick else runs)
                finally:
                    # After each, so that whatever ends it loses nothing that was measured.
                    counted, shown = rows(runner.results, runner.failures, runner.plan)
                    write_json(report, runner.plan, machine, runner, [*counted, *shown])
        finally:
            # After an interrupt, too: all rows take hours.
            print_rows(console, counted, shown, runner)
    made = draw(report.parent, report.stem, runner.results, counted)
    minutes = (time.monotonic() - begin) / 60
    told = f"in {results}: {report.name} and {len(made)} plots, after {minutes:.1f} minutes"
    console.print(told, highlight=False)
    if quick:
        count = sum(len(told) for by in runner.results.values() for told in by.values())
        console.print(f"quick: {count} runs gave right results; their times mean nothing")
    if any("pyswap" in by_peer for by_peer in runner.failures.values()):
        raise click.ClickException("a run of pyswap failed")


def _prepared(stack: ExitStack, plan: Plan, subjects: tuple[str, ...]) -> Plan:
    """Build the helpers, write the area and the graph, all gone when the stack unwinds."""
    built = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyswap-bench-")))
    try:
        helpers = native.build(built)
    except RuntimeError as error:
        _log.warning("limits are left out: %s", error)
        helpers = ""
    written = stack.enter_context(area.made(Path(plan.folder), plan.swap_bytes, plan.seed))
    graph = ""
    if "pagerank" in subjects:
        graph = str(stack.enter_context(area.named(Path(plan.folder), ".graph")))
        write_graph(plan, Path(graph))
    return dataclasses.replace(plan, native=helpers, area=str(written), graph=graph)


if __name__ == "__main__":
    main()
