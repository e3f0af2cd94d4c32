"""May arrays be touched from any thread, one that takes no signals too, and in a signal handler?

And does an interrupt get through, whatever the process waits for?
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Actor, Failpoint, actors, touch, until
from workers import is_running

import pyswap

pytestmark = pytest.mark.core

WORDS = 512
PAGES = 6000
"""About three times the frames of the pool fixture."""

TOUCH = r"""
/* Threads and a signal handler that touch pages, and that Python knows nothing of. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>

enum { THREADS = 16, WORDS = 512 };

struct task { int64_t *base; long pages, rounds; int number, blocked; uint64_t seed; };

static uint64_t next(uint64_t *seed) {
    *seed ^= *seed << 13; *seed ^= *seed >> 7; *seed ^= *seed << 17;
    return *seed;
}

/* Adds 1 to its own word of random pages; its first word counts how often. */
static void *work(void *argument) {
    struct task *t = argument;
    if (t->blocked) {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, NULL);
    }
    for (long i = 0; i < t->rounds; i++)
        t->base[next(&t->seed) % t->pages * WORDS + t->number]++;
    return NULL;
}

int run_threads(int64_t *base, long pages, long rounds, int blocked, uint64_t seed) {
    pthread_t threads[THREADS];
    struct task tasks[THREADS];
    for (int k = 0; k < THREADS; k++) {
        tasks[k] = (struct task){base, pages, rounds, k, blocked, seed + k * 7919 + 1};
        int rc = pthread_create(&threads[k], NULL, work, &tasks[k]);
        if (rc) return rc;
    }
    for (int k = 0; k < THREADS; k++) pthread_join(threads[k], NULL);
    return 0;
}

static struct task handled;
static volatile long handler_runs;
static volatile int done;

static void handle(int number) {
    (void)number;
    int before = errno;
    handled.base[next(&handled.seed) % handled.pages * WORDS + 1]++;
    handler_runs++;
    errno = before;
}

static void *signal_it(void *argument) {
    pthread_t target = *(pthread_t *)argument;
    while (!done) {
        pthread_kill(target, SIGUSR2);
        for (volatile int i = 0; i < 20000 && !done; i++) { }
    }
    return NULL;
}

/* Touches pages while a handler that comes in between touches others; how often that ran. */
long run_handler(int64_t *base, long pages, long rounds, uint64_t seed) {
    struct sigaction now = {.sa_handler = handle, .sa_flags = SA_RESTART}, before;
    struct task own = {base, pages, rounds, 0, 0, seed + 1};
    pthread_t self = pthread_self(), thread;
    handled = (struct task){base, pages, 0, 1, 0, seed + 2};
    handler_runs = 0;
    done = 0;
    sigaction(SIGUSR2, &now, &before);
    if (pthread_create(&thread, NULL, signal_it, &self)) return -errno;
    work(&own);
    done = 1;
    pthread_join(thread, NULL);
    /* Taken by now: a signal to oneself comes before pthread_kill returns. */
    pthread_kill(self, SIGUSR2);
    sigaction(SIGUSR2, &before, NULL);
    return handler_runs;
}
"""


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("touch")
    source, library = folder / "touch.c", folder / "touch.so"
    source.write_text(TOUCH)
    compiler = shutil.which(os.environ.get("CC", "cc")) or "gcc"
    flags = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library))
    pointer, word = ctypes.c_void_p, ctypes.c_long
    loaded.run_threads.argtypes = [pointer, word, word, ctypes.c_int, ctypes.c_uint64]
    loaded.run_handler.argtypes = [pointer, word, word, ctypes.c_uint64]
    loaded.run_handler.restype = word
    return loaded


@pytest.fixture
def large(pool: pyswap.Pool) -> Any:
    """An array of zeros larger than memory, all in swap or nowhere."""
    a = pool.zeros((PAGES, WORDS), np.int64)
    pool.advise(a, "pageout")
    return a


@pytest.mark.parametrize("blocked", [False, True], ids=["plain", "every signal blocked"])
def test_may_c_threads_touch_pages_at_once(
    pool: pyswap.Pool, large: Any, in_c: Any, blocked: bool, seed: int
) -> None:
    threads, rounds = 16, 1500
    before = pool.stats()
    failed = in_c.run_threads(large.ctypes.data, PAGES, rounds, blocked, seed)
    assert failed == 0, os.strerror(failed)
    after = pool.stats()
    assert after.evictions - before.evictions > PAGES
    assert large[:, :threads].sum(axis=0).tolist() == [rounds] * threads
    assert not large[:, threads:].any()


def test_may_python_threads_touch_pages_at_once(pool: pyswap.Pool, large: Any, seed: int) -> None:
    threads, rounds = 16, 300

    def work(number: int) -> None:
        rng = np.random.default_rng(seed + number)
        for page in rng.integers(0, PAGES, rounds):
            # Without the GIL, so that the faults of several are under way at once.
            at = large.ctypes.data + (int(page) * WORDS + number) * 8
            ctypes.memset(at, 1 + ctypes.string_at(at, 1)[0] % 255, 1)

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for number in range(threads):
        pages = np.random.default_rng(seed + number).integers(0, PAGES, rounds)
        expected = np.bincount(pages, minlength=PAGES)
        assert (large[:, number] == expected).all()


def test_may_a_c_signal_handler_touch_pages_while_a_fault_is_under_way(
    pool: pyswap.Pool, large: Any, in_c: Any, seed: int
) -> None:
    rounds = 4000
    runs = in_c.run_handler(large.ctypes.data, PAGES, rounds, seed)
    print(f"the handler ran {runs} times")
    assert runs > 10
    assert large[:, :2].sum(axis=0).tolist() == [rounds, runs]
    assert pool.stats().evictions > PAGES


def test_may_a_python_signal_handler_touch_pages(pool: pyswap.Pool, large: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs = 0

    def handle(*_: object) -> None:
        nonlocal runs
        large[int(rng.integers(PAGES)), 1] += 1
        runs += 1

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        turns = 0
        while runs < 50:
            large[:: PAGES // 500, 0] += 1
            turns += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert large[:, 1].sum() == runs
    assert (large[:: PAGES // 500, 0] == turns).all()


# Pools.


def use_another_pool(a: Any, folder: Path) -> int:
    """In a child: a pool of its own, a child of its own in it, and the inherited array beside."""
    with pyswap.Pool("1 MiB", "16 MiB", swap_path=folder, page_size=4096) as own:
        b = own.zeros((1000, WORDS), np.int64)
        b[:, 0] = np.arange(1000)
        both = [a, b]
        with actors(1, lambda _: sum(int(each[:, 0].sum()) for each in both)) as (grandchild,):
            total: int = grandchild.ask()
        both.clear()
        a[:, 1] = b[: len(a), 0]
        assert own.stats().evictions > 0
        assert (b[:, 0] == np.arange(1000)).all()
        swapper = own.swapper_pid
        del b
    until(lambda: not is_running(swapper), "the child's pool ends")
    return total


def test_may_a_forked_child_open_a_pool_of_its_own(pool: pyswap.Pool, tmp_path: Path) -> None:
    a = pool.zeros((300, WORDS), np.int64)
    a[:, 0] = 2
    with actors(2, lambda _: use_another_pool(a, tmp_path)) as children:
        for child in children:
            child.tell()
        assert [child.answer() for child in children] == [600 + sum(range(1000))] * 2
    assert (a[:, 1] == np.arange(300)).all()
    pool.advise(a, "pageout")
    assert (a[:, 1] == np.arange(300)).all()
    until(lambda: pool.stats().workers == 1, "the children are gone")


# An interrupt.


def answered(work: Callable[[], object]) -> str:
    """In a child: how a wait ended."""
    try:
        work()
    except KeyboardInterrupt:
        return "interrupted"
    return "done"


def hold(pool: pyswap.Pool, a: Any) -> None:
    with pool.pin(a):
        pass


WAITS: dict[str, tuple[str, Callable[[pyswap.Pool, Any], object]]] = {
    "pin": ("fill_locked", hold),
    "pageout": ("clean_write", lambda pool, a: pool.advise(a, "pageout")),
    "swapoff": ("drain_page", lambda pool, a: pool.swapoff(pool.swaps()[1])),
    "resize": ("frame_retired", lambda pool, a: pool.resize("4 MiB")),
}


@pytest.mark.failpoint
@pytest.mark.parametrize("wait", WAITS)
def test_does_an_interrupt_end_a_long_wait(pool: pyswap.Pool, wait: str, tmp_path: Path) -> None:
    point, work = WAITS[wait]
    pool.swapon(tmp_path, "8 MiB", 1)
    a = pool.zeros((300, WORDS), np.int64)
    a[:, 0] = np.arange(300)
    if wait != "pageout":
        pool.advise(a, "pageout")
    with actors(1, lambda _: answered(lambda: work(pool, a))) as (child,):
        with Failpoint(pool, point, "park") as parked:
            child.tell()
            parked.wait_parked()
            os.kill(child.pid, signal.SIGINT)
            assert child.answer() == "interrupted"
            # It did not come from the end of the wait.
            assert parked.parked == 1
        until(lambda: pool.stats().pinned_pages == 0, "nothing is pinned")
        # And the next time it is let do it.
        until(lambda: again(child) == "done", f"{wait} works after that")
    assert (a[:, 0] == np.arange(300)).all()


def again(child: Actor) -> str:
    try:
        return str(child.ask())
    except ValueError as error:
        if "already" in str(error):
            # The one that was interrupted is under way yet.
            return "not yet"
        raise


@pytest.mark.failpoint
def test_is_an_interrupt_lost_that_comes_during_a_fault(pool: pyswap.Pool) -> None:
    a = pool.zeros((300, WORDS), np.int64)
    a[:, 0] = np.arange(300)
    pool.advise(a, "pageout")
    seen: list[int] = []

    def work(_: object) -> tuple[str, list[int]]:
        return answered(lambda: seen.extend(int(each) for each in a[7:9, 0])), seen

    with actors(1, work) as (child,):
        with Failpoint(pool, "fill_locked", "park") as parked:
            child.tell()
            parked.wait_parked()
            for _ in range(3):
                os.kill(child.pid, signal.SIGINT)
            # A fault is not given up: another would have to be begun for the same instruction.
            assert not child.has_answered()
        assert child.answer()[0] == "interrupted"
        assert child.ask()[0] == "done"
        assert child.ask()[1][-2:] == [7, 8]
    assert touch(a[7]) == 7
