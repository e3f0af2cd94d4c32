"""`python -m pyswap run`: a program whose NumPy arrays are in one pool, those of its workers too.

The program runs as it would without: a Python of its own, for which three variables are set.
PYTHONPATH begins with a folder whose `sitecustomize` has every Python that starts there, however it
was started, attach to the pool once it imports NumPy; forked processes are attached anyhow.
LD_PRELOAD has the shim (`_shim.c`). PYSWAP_RUN says which pool, and PYSWAP_POOL that it is the
default one too: what the program makes by `pyswap.zeros` is within the same budget.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from . import shim
from .allocator import numpy_memory
from .default import POOL, RUN
from .errors import Error
from .pool import Pool
from .reference import attach
from .sizes import format_size

__all__ = ["Plan", "join", "run"]

LOOK_S = 0.1
"""Seconds between two looks at what the processes have in memory, at most."""
FIRST_LOOK_S = 0.005
"""Between the first two: the time in between grows with that the program has run."""
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Plan:
    """What `run` was asked for; see `Pool` and `numpy_memory`."""

    memory: int | float | str
    swap: int | str | None
    overcommit: bool
    threshold: int | str
    command: Sequence[str]
    is_module: bool
    report: Path | None = None


@dataclass
class _Usage:
    """The most anonymous memory that each process was seen with; the kernel keeps no record."""

    anonymous: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def look(self, pids: Sequence[int]) -> None:
        """See what processes have now."""
        for pid in pids:
            # It may have ended by now.
            with suppress(OSError, ValueError):
                name, size = Path(f"/proc/{pid}/comm").read_text().strip(), _anonymous_bytes(pid)
                self.names[pid] = name
                self.anonymous[pid] = max(self.anonymous.get(pid, 0), size)


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def join() -> None:
    """Attach this process to the pool of the `run` that it is part of; called by `sitecustomize`.

    Raises
    ------
    pyswap.Error
        If it cannot be: the program is to have a budget, or not to run.
    """
    told = json.loads(os.environ[RUN])
    pool = attach(told["pool"])
    if not isinstance(pool, Pool):
        raise Error(f"{RUN} names no pool: {told['pool']!r}")
    numpy_memory(pool, told["threshold"]).install()


def run(plan: Plan) -> int:
    """Run a program under a budget, and tell on stderr what it used.

    Returns
    -------
    int
        What the program ended with; minus a signal's number where that ended it.
    """
    name = f"run-{os.getpid()}"
    with Pool(plan.memory, plan.swap, name=name, overcommit=plan.overcommit) as pool:
        numpy_memory(pool, plan.threshold)  # which says what is wrong with a threshold
        began = time.monotonic()
        usage = _Usage()
        child = subprocess.Popen(_arguments(plan), env=_environment(plan, pool))
        handlers = _forward(child)
        try:
            _watch(child, pool, usage)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        status = child.wait()
        _tell(plan, pool, usage, status, time.monotonic() - began)
    return status


def _arguments(plan: Plan) -> list[str]:
    return [sys.executable, *(["-m"] if plan.is_module else []), *plan.command]


def _environment(plan: Plan, pool: Pool) -> dict[str, str]:
    """The program's environment: ours, and what has its processes attach."""
    folder = str(Path(__file__).with_name("hook"))
    told = json.dumps({"pool": pool.name, "threshold": plan.threshold})
    return {
        **os.environ,
        RUN: told,
        POOL: json.dumps(pool.address()),
        "PYTHONPATH": _before(folder, os.environ.get("PYTHONPATH")),
        "LD_PRELOAD": _before(str(shim.library()), os.environ.get("LD_PRELOAD")),
    }


def _before(first: str, rest: str | None) -> str:
    return f"{first}{os.pathsep}{rest}" if rest else first


def _forward(child: subprocess.Popen[bytes]) -> dict[int, Any]:
    """Hand signals on; a terminal's interrupt reaches the program by itself."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before: dict[int, Any] = {n: signal.signal(n, hand_on) for n in FORWARDED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    return before


def _watch(child: subprocess.Popen[bytes], pool: Pool, usage: _Usage) -> None:
    """Look at the processes until the program has ended."""
    poll = select.poll()
    pidfd = os.pidfd_open(child.pid)
    began = time.monotonic()
    try:
        poll.register(pidfd, select.POLLIN)
        while True:
            pids = {*pool._control().workers(), child.pid} - {os.getpid()}
            usage.look(sorted(pids))
            pause_s = min(LOOK_S, max(FIRST_LOOK_S, (time.monotonic() - began) / 10))
            if poll.poll(pause_s * 1000):
                return
    finally:
        os.close(pidfd)


def _tell(plan: Plan, pool: Pool, usage: _Usage, status: int, seconds: float) -> None:
    """One line on stderr, and the rest as JSON where that was asked for."""
    stats = pool.stats()
    resident_bytes = stats.peak_resident_pages * stats.page_size
    each = ", ".join(
        f"{usage.names[pid]} {pid} {format_size(size)}"
        for pid, size in sorted(usage.anonymous.items())
    )
    line = (
        f"pyswap: at most {format_size(resident_bytes)} of {format_size(pool.memory)} memory "
        f"and {format_size(stats.peak_swap_used_bytes)} of {format_size(stats.swap_bytes)} swap, "
        f"{stats.evictions} evictions, {seconds:.1f} s; beside it, anonymous memory: {each}\n"
    )
    sys.stderr.write(line)
    if plan.report is None:
        return
    told = {
        "command": _arguments(plan),
        "exit_status": status,
        "seconds": seconds,
        "peak_resident_bytes": resident_bytes,
        "peak_swap_bytes": stats.peak_swap_used_bytes,
        "peak_committed_bytes": stats.peak_committed_bytes,
        "processes": [
            {"pid": pid, "name": usage.names[pid], "peak_anonymous_bytes": size}
            for pid, size in sorted(usage.anonymous.items())
        ],
        "stats": asdict(stats),
    }
    plan.report.write_text(json.dumps(told, indent=2) + "\n")
