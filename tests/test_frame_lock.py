"""Only the frame's lock: what holds one page holds up nothing else.

As many faults are parked as there are fault threads but one, each with its frame locked, and more
faults wait for these pages than there are threads. Everything else must go on with the one thread
that is left.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from failpoints import Actor, Failpoint, actors, page_id, state_of, touch, wait_for_waiters

from pyswap import config

pytestmark = pytest.mark.failpoint

PARKED = config.FAULT_THREADS - 1
NEEDED = 1000
AREA_PAGES = 4096
MOST_TOUCHES = 20_000


def filled(pool: Any, pages: int) -> Any:
    """An array of a page a row, its row number in each, all of it in swap."""
    a = pool.zeros((pages, pool.page_size // 8), np.int64)
    for first in range(0, pages, 256):
        a[first : first + 256] = np.arange(first, min(first + 256, pages))[:, None] + 1
    pool.advise(a, "pageout")
    return a


class Work:
    """Writes to pages of an area twice the budget until enough was faulted, evicted and written."""

    def __init__(self, pool: Any, area: Any, seed: int) -> None:
        self._pool = pool
        self._area = area
        self._rng = np.random.default_rng(seed)

    def __call__(self) -> int:
        """Return how many pages were touched.

        Raises
        ------
        AssertionError
            If so many touches made too few faults, evictions or slot allocations, or bytes are
            wrong.
        """
        before = self._pool.stats()
        for touches in range(1, MOST_TOUCHES):
            page = int(self._rng.integers(len(self._area)))
            assert self._area[page, 0] == page + 1
            self._area[page, 1] += 1
            if touches >= NEEDED and touches % 100 == 0 and self._enough(before):
                return touches
        raise AssertionError(f"from {before} to {self._pool.stats()} in {MOST_TOUCHES} touches")

    def _enough(self, before: Any) -> bool:
        now = self._pool.stats()
        return bool(
            now.major_faults - before.major_faults >= NEEDED
            and now.evictions - before.evictions >= NEEDED
            and now.slot_writes - before.slot_writes >= NEEDED
        )


class Threads:
    """An `Actor`'s answers: it has threads that touch parked pages without the GIL."""

    def __init__(self, held: Any, work: Callable[[], int]) -> None:
        self._held = held
        self._work = work
        self._threads: ThreadPoolExecutor | None = None
        self._touches: list[Future[int]] = []

    def __call__(self, question: Any) -> Any:
        if question == "work":
            return self._work()
        if question == "fork":
            return self._fork()
        if question == "join":
            return [touched.result() for touched in self._touches]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(64)
        self._touches.append(self._threads.submit(touch, self._held[question]))
        return threading.active_count()

    def _fork(self) -> int:
        """Fork here, with threads of ours parked; returns what the child could touch."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(theirs, b"%d" % self._work())
            finally:
                os._exit(0)
        os.close(theirs)
        try:
            return int(os.read(ours, 64) or -1)
        finally:
            os.close(ours)
            os.waitpid(pid, 0)


def held_by_parked_faults(
    pool: Any, pages: list[int], owner: Actor, others: list[Actor], point: Failpoint, state: str
) -> None:
    """Park a worker's threads on a page each; another thread and another worker wait for each."""
    for page in range(PARKED):
        owner.ask(page)
    point.wait_parked(PARKED)
    for page, other in enumerate(others):
        owner.ask(page)
        other.tell(page)
        wait_for_waiters(pool, pages[page], 2)
    assert [state_of(pool, page) for page in pages] == [state] * PARKED


@pytest.mark.parametrize(("name", "state"), [("fill_locked", "filling"), ("map_before", "present")])
def test_does_everything_else_go_on_while_all_fault_threads_but_one_are_parked(
    pool: Any, seed: int, name: str, state: str
) -> None:
    area = filled(pool, AREA_PAGES)
    held = filled(pool, PARKED)
    pages = [page_id(pool, row) for row in held]
    work = Work(pool, area, seed)

    def quiet() -> None:
        pool.advise(held, "random")

    with (
        actors(1, Threads(held, work), quiet) as (owner,),
        actors(PARKED, lambda page: touch(held[page]), quiet) as others,
        Failpoint(pool, name, "park", limit=PARKED) as point,
    ):
        held_by_parked_faults(pool, pages, owner, others, point, state)
        # Another thread of that worker; its child; a child of ours; we.
        touched = [owner.ask("work"), owner.ask("fork")]
        with actors(1, lambda _: work()) as (forked,):
            touched.append(forked.ask())
        touched.append(work())
        assert min(touched) >= NEEDED
        print(f"pages touched: {touched}; {pool.stats()}")
        assert point.parked == PARKED
        assert [state_of(pool, page) for page in pages] == [state] * PARKED
        assert not any(other.has_answered() for other in others)
        point.release()
        expected = [page + 1 for page in range(PARKED)]
        assert [other.answer() for other in others] == expected
        assert sorted(owner.ask("join")) == sorted(expected * 2)
