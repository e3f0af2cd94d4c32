"""A lock and a counter in every page, processes killed and forked at random, eviction all the time.

After the kernel's tools/testing/selftests/mm/uffd-stress.c.  What is counted, and how it is
checked, is in page_locks.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import SYS_USERFAULTFD
from page_locks import MAX_NUMBERS, STAMP_WORDS, Counters, page_locks  # noqa: F401 - a fixture.
from workers import Worker, adopt_orphans, until

import pyswap
from pyswap import worker as worker_module

pytestmark = pytest.mark.core

WORDS = 512
"""64-bit words of a page."""
FRAMES = 256
SHARED_PAGES = 1024
PRIVATE_PAGES = 384
CREW = 4
FAULTS = 100_000
KILLED = FORKED = 12
"""What a run has at least."""

USER_MODE_ONLY = 1
UFFDIO_API = 0xC018AA3F
UFFD_API = 0xAA
FEATURES = 1 << 0 | 1 << 5 | 1 << 10 | 1 << 12
"""Write-protection, missing and minor faults of shared memory, write-protection of it."""


def open_user_mode_only() -> tuple[int, bool]:
    """Open a userfaultfd as one is opened for an ordinary user, whoever runs the test."""
    number = SYS_USERFAULTFD[platform.machine()]
    flags = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY
    fd = ctypes.CDLL(None, use_errno=True).syscall(number, flags)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(fd, UFFDIO_API, struct.pack("QQQ", UFFD_API, FEATURES, 0))
    return fd, True


@pytest.fixture(params=["full", "user mode only"])
def tight(
    request: pytest.FixtureRequest,
    require: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[pyswap.Pool]:
    """A pool with far fewer frames than pages, for each way in which faults are delivered."""
    if request.param == "full":
        require("uffd")
    else:
        monkeypatch.setattr(worker_module, "_open_uffd", open_user_mode_only)
    with pyswap.Pool(FRAMES * 4096, "64 MiB", page_size=4096) as made:
        assert made.attachment.user_only == (request.param != "full")
        yield made
        made.check()


class Bench:
    """What all processes inherit: a pool, the counters, and who is to come back."""

    def __init__(self, pool: pyswap.Pool, library: ctypes.CDLL, seed: int) -> None:
        self.pool, self.seed = pool, seed
        shared = pool.zeros((SHARED_PAGES, WORDS), np.uint64)
        private = pool.zeros((PRIVATE_PAGES, WORDS), np.uint64, private=True)
        self.counters = Counters(library, shared, private)
        self.wanted = pool.zeros(MAX_NUMBERS, np.uint64)

    def page_out(self, rng: random.Random) -> None:
        """Have some pages of either array evicted."""
        a = rng.choice((self.counters.shared, self.counters.private))
        low = rng.randrange(len(a))
        self.pool.advise(a[low : low + 32], "pageout")


def work(bench: Bench, number: int) -> None:
    """Count until this process is wanted back, and evict now and then."""
    rng = random.Random(bench.seed + number)
    bench.counters.begin(number, bench.seed)
    while not bench.wanted[number]:
        bench.counters.count(200)
        bench.page_out(rng)
    bench.counters.check_own()


class Crew:
    """The processes that count: begun, forked, ended and killed, each with a number of its own."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.at_work: dict[int, Worker] = {}
        self.killed = self.forked = 0
        self._numbers = iter(range(1, MAX_NUMBERS))

    def begin(self, worker: Worker | None = None) -> None:
        """Set a worker to work under a number of its own: a new one, or one that is called back."""
        number = next(self._numbers)
        self.at_work[number] = worker or Worker(self.bench)
        self.at_work[number].send(work, number)

    def call_back(self, number: int) -> Worker:
        """Have a worker come to the end of what it does."""
        self.bench.wanted[number] = 1
        self.at_work[number].answer()
        return self.at_work.pop(number)

    def goes_on(self, number: int, steps: int) -> None:
        """Wait until a worker has done so many more steps."""
        done = self.bench.counters.steps
        goal = int(done[number]) + steps
        until(lambda: done[number] >= goal or self.is_done(number), f"{number} goes on")

    def is_done(self, number: int) -> bool:
        """Whether a worker has something to say, which is an error as long as it is not wanted."""
        return self.at_work[number].connection.poll()

    def kill(self, number: int) -> None:
        """Kill a worker wherever it is; from then on the others may break its locks."""
        assert not self.is_done(number), self.at_work[number].answer()
        victim = self.at_work.pop(number)
        victim.kill()
        victim.finish()
        self.bench.counters.ended[number] = 1
        self.killed += 1

    def fork(self, number: int) -> None:
        """Have a worker fork; both go on, with the private pages that there were."""
        parent = self.call_back(number)
        try:
            child = parent.fork()
        finally:
            self.begin(parent)
        self.begin(child)
        self.forked += 1

    def end(self, number: int) -> None:
        """Have a worker end in good order."""
        worker = self.call_back(number)
        try:
            assert worker.end() == 0
        finally:
            worker.finish()

    def finish(self) -> None:
        """Leave nobody behind."""
        for worker in self.at_work.values():
            worker.finish()


def faults(pool: pyswap.Pool) -> int:
    now = pool.stats()
    return now.minor_faults + now.major_faults + now.write_faults


def stir(crew: Crew, pool: pyswap.Pool, rng: random.Random) -> None:
    """Kill, fork and end until there were enough faults, and somebody was killed who had a lock."""
    broken = crew.bench.counters.broken
    while faults(pool) < FAULTS or crew.killed < KILLED or crew.forked < FORKED or not broken.any():
        while len(crew.at_work) < CREW:
            crew.begin()
        number = rng.choice(list(crew.at_work))
        crew.goes_on(number, rng.randrange(1, 400))
        deed = crew.fork if len(crew.at_work) < 2 * CREW else crew.end
        rng.choice((crew.kill, crew.kill, deed, deed, crew.end))(number)
        crew.bench.page_out(rng)


def is_balanced(pool: pyswap.Pool, pages: int) -> bool:
    """Whether there is this process with so many pages, and nothing else."""
    now = pool.stats()
    return (now.workers, now.committed_bytes, now.pinned_pages) == (1, pages * 4096, 0)


def test_is_every_count_right_whoever_is_killed_and_forked(
    tight: pyswap.Pool,
    page_locks: ctypes.CDLL,  # noqa: F811 - the fixture.
    seed: int,
) -> None:
    bench = Bench(tight, page_locks, seed)
    counters = bench.counters
    counters.begin(0, seed)
    counters.count(2000)
    crew = Crew(bench)
    with adopt_orphans():
        try:
            stir(crew, tight, random.Random(seed))
            for number in list(crew.at_work):
                crew.end(number)
        finally:
            crew.finish()
    counters.check_own()
    # Every lock can be taken, and every count is in all its places.
    counters.count_everywhere()
    assert not counters.shared[:, 0].any()
    assert (counters.shared[:, STAMP_WORDS] == counters.ledger[:, None]).all()
    now, broken = tight.stats(), int(counters.broken.sum())
    print(f"{crew.killed} killed, {crew.forked} forked, {broken} locks of the dead taken")
    print(f"{now.cow_copies} copies, {faults(tight)} faults, {now.evictions} evictions")
    assert broken > 0
    assert now.evictions > FAULTS // 4
    until(lambda: is_balanced(tight, SHARED_PAGES + PRIVATE_PAGES + 2), "the workers' is back")
    del bench, counters, crew
    until(lambda: is_empty(tight), "frames, slots and all that was committed are back")


def is_empty(pool: Any) -> bool:
    now = pool.stats()
    frames = now.memory_bytes // now.page_size
    return (now.committed_bytes, now.swap_used_bytes, now.free_frames) == (0, 0, frames)
