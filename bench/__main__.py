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
        # The same room on both sides: the array, and a quarter of it so that slots never run short.
        swap_bytes=array_bytes + budget_bytes,
        # In steady state half the accesses would do; as many again warm up.
        operations=2048 if quick else budget_bytes // 4096 // 2,
        repeats=3 if quick else 9,
        most_seconds=0.2 if quick else 5.0,
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


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--budget", default="256 MiB", help="The memory budget; arrays are four times it.")
@click.option("--runs", default=5, type=click.IntRange(1), help="Runs of each workload and peer.")
@click.option(
    "--workload", "workloads", multiple=True, type=click.Choice([*SUBJECTS]), help="Only these."
)
@click.option(
    "--peer", "peers", multiple=True, type=click.Choice([*PEERS, *LIMITS]), help="Only these."
)
@click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--results", default=_RESULTS, type=click.Path(path_type=Path), help="Where reports go."
)
@click.option("--seed", default=20241, help="What all data and accesses follow from.")
@click.option("--quick", is_flag=True, help="Tiny sizes, one run: checks results, times nothing.")
def main(
    budget: str,
    runs: int,
    workloads: tuple[str, ...],
    peers: tuple[str, ...],
    folder: Path | None,
    results: Path,
    seed: int,
    quick: bool,
) -> None:
    """Measure pyswap beside what one would use instead, on the same work and the same disk.

    Every run is a fresh process; the peers take turns. As root the kernel's own swap is one of
    them: a swap file is in use while it runs, and is taken away again in any case.
    """
    console = Console(width=None if sys.stdout.isatty() else 150)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True))])
    undo.catch_signals()
    place = _folder(folder)
    area.take_stale_away(place)
    budget_bytes = _QUICK_BUDGET_BYTES if quick else parse_size(budget, what="budget")
    plan = _plan(budget_bytes, seed, place, quick=quick)
    runner = Runner(plan, lambda what: console.print(what, style="dim", highlight=False))
    results.mkdir(parents=True, exist_ok=True)
    report = results / ("quick.json" if quick else time.strftime("%Y%m%d-%H%M%S.json"))
    machine = facts(place)
    with ExitStack() as stack:
        runner.plan = _prepared(stack, plan)
        for name in workloads or SUBJECTS:
            chosen = peers or (_QUICK_PEERS if quick else ())
            runner.measure(name, peers_of(name, chosen), 1 if quick else runs)
            # After each, so that an interrupt loses nothing that was measured.
            counted, shown = rows(runner.results, runner.failures, runner.plan)
            write_json(report, runner.plan, machine, runner, [*counted, *shown])
    made = draw(report.parent, report.stem, runner.results, counted)
    print_rows(console, counted, shown, runner)
    console.print(f"in {results}: {report.name} and {len(made)} plots", highlight=False)
    if quick:
        count = sum(len(told) for by in runner.results.values() for told in by.values())
        console.print(f"quick: {count} runs gave right results; their times mean nothing")
    if any("pyswap" in by_peer for by_peer in runner.failures.values()):
        raise click.ClickException("a run of pyswap failed")


def _prepared(stack: ExitStack, plan: Plan) -> Plan:
    """Build the helpers and write the area, both gone when the stack unwinds."""
    built = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyswap-bench-")))
    try:
        helpers = native.build(built)
    except RuntimeError as error:
        _log.warning("limits are left out: %s", error)
        helpers = ""
    written = stack.enter_context(area.made(Path(plan.folder), plan.swap_bytes, plan.seed))
    return dataclasses.replace(plan, native=helpers, area=str(written))


if __name__ == "__main__":
    main()
