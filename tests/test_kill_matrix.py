"""A worker goes, wherever the swapper is on its behalf: at every failpoint that its deeds meet."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint, points_met
from workers import Worker, is_running, until, workers

import pyswap

PAGES = 24
WORDS = 512
VICTIM = 7
"""The page that the worker's deed is about."""
NEW = -5
STRIDE = 7
"""One line in so many is where a child stops; where it begins differs from run to run."""
BLOCKS_KEPT: list[Any] = []


class Held:
    """What all processes of a test share: a pool, a shared array and a private one."""

    def __init__(self, pool: pyswap.Pool) -> None:
        self.pool = pool
        self.shared = pool.zeros((PAGES, WORDS), np.int64)
        self.private = pool.zeros((PAGES, WORDS), np.int64, private=True)
        self.untouched = pool.zeros((PAGES, WORDS), np.int64)
        for a in (self.shared, self.private):
            a[:] = np.arange(PAGES)[:, None]
            pool.advise(a, "random")
        pool.advise(self.untouched, "random")


# What a worker does; each has what comes before it, which is not looked at.


def nothing(held: Held) -> None:
    del held


def fill(held: Held) -> int:
    return int(held.shared[VICTIM, 0])


def touch_first(held: Held) -> int:
    return int(held.untouched[VICTIM, 0])


def write_protected(held: Held) -> None:
    held.shared[VICTIM, 1] = NEW


def copy(held: Held) -> None:
    held.private[VICTIM, 1] = NEW


def pin(held: Held) -> None:
    pinned = held.pool.pin(held.private[VICTIM], writable=True)
    pinned.__enter__()
    BLOCKS_KEPT.append(pinned)


def fork(held: Held) -> None:
    del held
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def write_and_evict(held: Held) -> None:
    held.shared[VICTIM, 1] = NEW
    held.pool.advise(held.shared, "pageout")


def make(held: Held) -> None:
    BLOCKS_KEPT.append(held.pool.full((4, WORDS), 1, np.int64, private=True))


def snapshot(held: Held) -> None:
    BLOCKS_KEPT.append(held.private.snapshot())


DEEDS: dict[str, tuple[Callable[[Held], Any], Callable[[Held], Any]]] = {
    "fill": (nothing, fill),
    "first touch": (nothing, touch_first),
    "write to what was read": (fill, write_protected),
    "copy on write": (nothing, copy),
    "pin": (nothing, pin),
    "fork": (nothing, fork),
    "eviction": (fill, write_and_evict),
    "new array": (nothing, make),
    "snapshot": (nothing, snapshot),
}
# Who visits these is the worker itself: it goes there, rather than be held there.
OWN = ("attendant_order", "attendant_mapped", "attendant_done")


def settle(held: Held) -> None:
    """Put the arrays where every case begins: in swap, as they were."""
    for a in (held.shared, held.private):
        a[VICTIM] = VICTIM
    untouched = held.untouched
    untouched[VICTIM] = 0
    for a in (held.shared, held.private, untouched):
        until(lambda a=a: is_out(held.pool, a), "all is paged out")  # type: ignore[misc]


def is_out(pool: pyswap.Pool, a: Any) -> bool:
    pool.advise(a, "pageout")
    return not pool.residency(a).any()


def points_of(held: Held, deed: str) -> list[str]:
    """The failpoints that a deed meets."""
    before, do = DEEDS[deed]
    settle(held)
    with workers(held, 1) as (worker,):
        worker.ask(before)
        with points_met(held.pool) as names:
            worker.ask(do)
        assert worker.end() == 0
    until(lambda: held.pool.stats().workers == 2, "the worker is gone")
    return names


def words_of(held: Held) -> list[tuple[list[int], list[int]]]:
    """Two words of every page but the victim's, in both arrays."""
    rest = [page for page in range(PAGES) if page != VICTIM]
    return [([int(a[p, 0]) for p in rest], [int(a[p, 1]) for p in rest]) for a in arrays(held)]


def arrays(held: Held) -> tuple[Any, Any]:
    return held.shared, held.private


def victim_words(held: Held) -> tuple[int, int, int]:
    return int(held.shared[VICTIM, 0]), int(held.shared[VICTIM, 1]), int(held.private[VICTIM, 1])


RIGHT = [([page for page in range(PAGES) if page != VICTIM],) * 2] * 2


def lose(held: Held, deed: str, name: str, other: Worker, how: int) -> None:
    """Have a worker go while its deed is at a point."""
    before, do = DEEDS[deed]
    settle(held)
    action = "park"
    if name in OWN:
        action = "kill" if how == signal.SIGKILL else "stop"
    with workers(held, 1) as (worker,):
        worker.ask(before)
        with Failpoint(held.pool, name, action) as point:
            worker.send(do)
            until(lambda: point.hits > 0, f"{deed} comes to {name}")
            if name in OWN:
                if how == signal.SIGKILL:
                    assert worker.wait() == -signal.SIGKILL
            elif how == signal.SIGKILL:
                worker.kill()
            else:
                worker.stop()
        # The others go on while it is stopped, and after it was killed.
        assert other.ask(words_of) == RIGHT
        assert words_of(held) == RIGHT
        assert other.ask(victim_words) in [(VICTIM, VICTIM, VICTIM), (VICTIM, NEW, VICTIM)]
        if how == signal.SIGSTOP:
            worker.signal(signal.SIGCONT)
            worker.answer()
            assert worker.ask(words_of) == RIGHT
            assert worker.end() == 0


def balanced(held: Held) -> bool:
    """Whether all that a lost worker had is back: this process has a copy of one page."""
    now = held.pool.stats()
    pages = (now.committed_bytes, now.pinned_pages)
    return now.workers == 2 and pages == ((3 * PAGES + 1) * 4096, 0)


@pytest.mark.failpoint
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("deed", DEEDS)
def test_harms_a_worker_nobody_that_goes_wherever_the_swapper_is(
    pool: pyswap.Pool, deed: str, how: int
) -> None:
    held = Held(pool)
    with workers(held, 1) as (other,):
        # Twice: what is met by chance, readahead's say, is left out.
        again = points_of(held, deed)
        names = [name for name in points_of(held, deed) if name in again]
        for name in names:
            lose(held, deed, name, other, how)
            until(lambda: balanced(held), f"what it had is back after {deed} at {name}")
            pool.check()
        settle(held)
        assert other.ask(words_of) == RIGHT
    print(f"{deed}: {len(names)} of {len(names)} points: {', '.join(names)}")
    assert len(names) >= 3


# In the child's own code, a line at a time.


def gone_at(
    held: Held, line: int, how: int = signal.SIGKILL, meanwhile: Callable[[], None] = lambda: None
) -> int:
    """Fork a child that is killed, or stopped for a while, at a line of its after-fork hook.

    Returns how many lines it had; 0 if it was killed.
    """
    parent, seen = os.getpid(), 0
    counted, count_end = os.pipe()

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal seen
        if os.getpid() == parent or "/pyswap/" not in frame.f_code.co_filename:
            return None if event == "call" and os.getpid() != parent else trace
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), how)
        return trace

    sys.settrace(trace)
    child = os.fork()
    sys.settrace(None)
    if child == 0:
        os.write(count_end, seen.to_bytes(4, "little"))
        os._exit(int(held.private[VICTIM, 0]))
    os.close(count_end)
    if line and how == signal.SIGSTOP:
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        meanwhile()
        os.kill(child, signal.SIGCONT)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    told = os.read(counted, 4)
    os.close(counted)
    assert status == (VICTIM if told else -signal.SIGKILL)
    return int.from_bytes(told, "little")


@pytest.mark.failpoint
def test_harms_a_child_nobody_that_is_killed_at_any_line_of_its_fork_hook(
    pool: pyswap.Pool,
) -> None:
    held = Held(pool)
    with workers(held, 1) as (other,):
        settle(held)
        lines = gone_at(held, 0)
        assert lines > 50
        for line in range(1, lines + 1):
            assert gone_at(held, line) == 0
        until(lambda: balanced(held), "what the children had is back")
        pool.check()
        settle(held)
        assert other.ask(words_of) == RIGHT
    print(f"killed at {lines} of {lines} lines")


@pytest.mark.failpoint
def test_keeps_a_child_nobody_waiting_that_is_stopped_at_any_line_of_its_fork_hook(
    pool: pyswap.Pool, seed: int
) -> None:
    held = Held(pool)
    with workers(held, 1) as (other,):
        settle(held)
        lines = gone_at(held, 0)

        def others_go_on() -> None:
            """They evict, fault, copy, make arrays and fork."""
            settle(held)
            assert other.ask(words_of) == RIGHT
            assert (pool.full((2, WORDS), 1, np.int64) == 1).all()
            assert gone_at(held, 0) > 0

        places = range(1 + seed % STRIDE, lines + 1, STRIDE)
        for line in places:
            assert gone_at(held, line, signal.SIGSTOP, others_go_on) >= lines
        until(lambda: balanced(held), "what the children had is back")
        pool.check()
        assert other.ask(words_of) == RIGHT
    print(f"stopped at {len(places)} of {lines} lines")


# Other ends than SIGKILL.


def exit_at_once(held: Held) -> None:
    del held
    os._exit(3)


def become_another(held: Held) -> None:
    del held
    os.execv(sys.executable, [sys.executable, "-S", "-c", "raise SystemExit(3)"])


def crash(held: Held) -> None:
    del held
    import ctypes

    ctypes.string_at(0)


def terminate(held: Held) -> None:
    del held
    os.kill(os.getpid(), signal.SIGTERM)


def dirty(held: Held) -> None:
    """Have a page of every kind, a copy, and a pin."""
    held.shared[VICTIM, 1] = NEW
    copy(held)
    pin(held)
    make(held)


@pytest.mark.core
@pytest.mark.parametrize(
    ("end", "status"),
    [
        (exit_at_once, 3),
        (become_another, 3),
        (crash, -signal.SIGSEGV),
        (terminate, -signal.SIGTERM),
    ],
)
def test_comes_all_back_however_a_worker_ends(
    pool: pyswap.Pool, end: Callable[[Held], None], status: int
) -> None:
    held = Held(pool)
    with workers(held, 2) as (other, lost):
        settle(held)
        lost.ask(dirty)
        with contextlib.suppress(OSError):
            lost.send(end)
        assert lost.wait() == status
        until(lambda: balanced(held), "what it had is back")
        # What it wrote into the shared array is there; its copy is gone with it.
        assert other.ask(victim_words) == (VICTIM, NEW, VICTIM)
        assert other.ask(words_of) == RIGHT
        pool.check()


def leave_open(held: Held) -> int:
    """Start a program that keeps all that this process has of the pool open, and outlives it."""
    attachment = held.pool._attachment
    assert attachment._sock is not None
    assert attachment._channel is not None
    ends = [attachment._sock.fileno(), attachment._channel.fileno(), attachment.uffd]
    fds = [*ends, *attachment._vault, attachment.control_fd, attachment.store_fd]
    program = subprocess.Popen(["sleep", "600"], pass_fds=fds, start_new_session=True)
    BLOCKS_KEPT.append(program)
    return program.pid


@pytest.mark.core
def test_comes_all_back_though_a_grandchild_holds_the_socket(pool: pyswap.Pool) -> None:
    held = Held(pool)
    with workers(held, 2) as (other, lost):
        settle(held)
        lost.ask(dirty)
        program = lost.ask(leave_open)
        try:
            lost.kill()
            # There is no end of file: the process's own descriptor tells.
            until(lambda: balanced(held), "what it had is back")
            assert is_running(program)
            assert other.ask(victim_words) == (VICTIM, NEW, VICTIM)
            assert other.ask(words_of) == RIGHT
            pool.check()
        finally:
            os.kill(program, signal.SIGKILL)
        until(lambda: not is_running(program), "the program is gone")


def soil(_: int) -> None:
    """Write to both arrays without end."""
    held = BLOCKS_KEPT[0]
    n = 0
    while True:
        n += 1
        held.shared[:, 2:] = n
        held.private[:, 2:] = n


@pytest.mark.core
def test_comes_all_back_when_a_pool_of_processes_is_terminated(pool: pyswap.Pool) -> None:
    held = Held(pool)
    before = pool.stats().committed_bytes
    BLOCKS_KEPT[:] = [held]
    try:
        with multiprocessing.get_context("fork").Pool(3) as processes:
            processes.map_async(soil, range(3), chunksize=1)
            # All three have copies, and dirty pages, and go on.
            until(
                lambda: pool.stats().committed_bytes == before + 3 * PAGES * 4096, "all have copied"
            )
            processes.terminate()
            processes.join()
    finally:
        BLOCKS_KEPT.clear()
    until(lambda: pool.stats().workers == 1, "the processes are forgotten")
    until(lambda: pool.stats().committed_bytes == before, "their copies are freed")
    for a in arrays(held):
        until(lambda a=a: is_out(pool, a), "all is paged out")  # type: ignore[misc]
    assert (held.private == np.arange(PAGES)[:, None]).all()
    assert (held.shared[:, :2] == np.arange(PAGES)[:, None]).all()
    assert held.shared[:, 2:].min() > 0
    pool.check()
