"""What CPU time a fault and an eviction take, alone and with much around them.

Three pools have the same budget and get the same accesses: one with one worker and as much address
space as the plan's array has; one with 64 workers, of which one is active; one with 1,024 times the
address space. Besides: what each further process costs that maps a page which is evicted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import pyswap

from .clock import cpu_seconds
from .plan import Plan
from .share import Array, check

__all__ = ["measure"]

WORKERS = 64
SPACE_TIMES = 1024
MAPPERS = 33
BUDGET_PART = 4
LEAST_BYTES = 32 << 20
PASSES = 4


@contextlib.contextmanager
def _idle(count: int, touched: Array | None) -> Iterator[None]:
    """Have forked processes there, which read an array, if any, and then do nothing."""
    pids = []
    reader, writer = os.pipe()
    try:
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                if touched is not None:
                    touched.sum()
                os.write(writer, b".")
                signal.pause()
                os._exit(0)
            pids.append(pid)
            check(os.read(reader, 1) == b".", "an idle worker did not start")
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


@dataclass
class Clock:
    """CPU time of a pool's swapper and of this process, and the pool's numbers."""

    pool: pyswap.Pool

    def __enter__(self) -> Clock:
        self.before = self.pool.stats()
        self.seconds = -self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds += self._now()
        self.after = self.pool.stats()

    def _now(self) -> float:
        return cpu_seconds(self.pool.swapper_pid) + cpu_seconds(os.getpid())

    def grown(self, name: str) -> int:
        """Return how much one of the pool's numbers grew."""
        return int(getattr(self.after, name)) - int(getattr(self.before, name))


def _budget(plan: Plan) -> int:
    return max(plan.budget_bytes // BUDGET_PART, LEAST_BYTES)


def _costs(plan: Plan, workers: int, space: int) -> dict[str, float]:
    """Microseconds of CPU time by fault, and by fault with an eviction."""
    budget = _budget(plan)
    # More address space than memory and swap could hold is what `overcommit` is for.
    with pyswap.Pool(budget, 4 * budget, overcommit=True) as pool:
        frames = budget // pool.page_size
        pages = 2 * frames
        space = max(space, 2 * pages * pool.page_size)
        a = pool.empty(space, np.uint8)
        order = np.random.default_rng(plan.seed).permutation(pages) * (space // pages)
        with _idle(workers - 1, None):
            check(pool.stats().workers == workers, "not all workers are attached")
            firsts = []
            for _ in range(PASSES):
                b = pool.empty(space, np.uint8)
                with Clock(pool) as first:
                    b[order[: frames // 4]].sum()
                firsts.append(first)
                del b
            a[order] = 1
            a[order] = 1
            with Clock(pool) as steady:
                for _ in range(PASSES):
                    a[order] += 1
        faults = sum(first.grown("minor_faults") for first in firsts)
        fault_s = sum(first.seconds for first in firsts)
        evictions = steady.grown("evictions")
        check(faults >= PASSES * frames // 8, f"{faults} faults in {PASSES} x {frames // 4} pages")
        check(evictions >= PASSES * pages // 2, f"{evictions} evictions in {PASSES} x {pages}")
        check(int(a[order[0]]) == 1 + PASSES, "a write was lost")
        del a
    return {"fault_us": fault_s / faults * 1e6, "evict_us": steady.seconds / evictions * 1e6}


def _mapped_us(plan: Plan, mappers: int) -> float:
    """Microseconds of the swapper's CPU time by evicted page that so many processes map."""
    budget = _budget(plan)
    with pyswap.Pool(budget, 2 * budget) as pool:
        pages = budget // pool.page_size // 2
        a = pool.empty(pages * pool.page_size, np.uint8)
        a[:] = 1
        with _idle(mappers - 1, a):
            a[:] = 2
            before = cpu_seconds(pool.swapper_pid)
            evicted = pool.stats().evictions
            pool.advise(a, "pageout")
            taken_s = cpu_seconds(pool.swapper_pid) - before
            evicted = pool.stats().evictions - evicted
        check(evicted >= pages // 2, f"{evicted} of {pages} pages left")
        check(int(a[-1]) == 2, "a write was lost")
        del a
    return taken_s / evicted * 1e6


def measure(plan: Plan) -> dict[str, Any]:
    """Measure all of it, one after the other."""
    warnings.simplefilter("ignore", DeprecationWarning)  # Forking beside threads is the point.
    space = plan.array_bytes
    alone = _mapped_us(plan, 1)
    _costs(plan, 1, space)  # The first pool of a process takes more, and is not counted.
    budget = _budget(plan)
    return {
        "settings": {
            "memory": budget,
            "swap": 4 * budget,
            "overcommit": True,
            "workers": WORKERS,
            "mappers": MAPPERS,
            "space_bytes": space,
            "large_space_bytes": SPACE_TIMES * space,
        },
        "alone": _costs(plan, 1, space),
        "workers": _costs(plan, WORKERS, space),
        "space": _costs(plan, 1, SPACE_TIMES * space),
        "mapper_us": (_mapped_us(plan, MAPPERS) - alone) / (MAPPERS - 1),
    }
