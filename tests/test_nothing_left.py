"""Nothing is left: after close and the last array, after exceptions, after kill -9 of everything.

For the kills a *reaper* process adopts every orphan of the trees that it starts, the swapper too,
so that it can find and kill a whole tree, and see that none of it is there afterwards.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import posix_ipc
import psutil
import pytest
from conftest import leftovers, snapshot
from workers import Worker, adopt_orphans, is_running, until, workers

import pyswap
from pyswap import worker as worker_module

SHM = Path("/dev/shm")
PHASES = ["pool", "fork", "touch", "close"]
LETTERS = [*"pftce"]
"""What a tree's creator writes at the beginning of each phase, and at the end."""
INSTANTS = 200
ARRAY_PAGES = 512
"""Pages of the tree's array: twice its budget."""


def names(creators: Iterable[int]) -> set[str]:
    """Names of segments that these processes have made."""
    return {path.name for pid in creators for path in SHM.glob(f"pyswap.*.{pid}.*.*")}


def sockets(creators: Iterable[int]) -> set[str]:
    """Abstract sockets of pools that these processes have made, held by anybody or on their way."""
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    found = (line for line in lines if "@" in line)
    return {line for line in found if any(f"pyswap-{pid}-" in line for pid in creators)}


@contextmanager
def nothing_more(swap: Path) -> Iterator[None]:
    """See that the block leaves nothing, not even for a moment longer than a swapper's end."""
    gc.collect()
    before = snapshot()
    yield
    gc.collect()
    assert not leftovers(before, settle_s=20.0)
    assert not list(swap.iterdir())


# In good order, and after exceptions.


def test_is_nothing_left_after_close_and_the_last_array(tmp_path: Path) -> None:
    for last in ("close", "array", "view", "child"):
        with nothing_more(tmp_path):
            pool = pyswap.Pool("1 MiB", "8 MiB", swap_path=tmp_path, page_size=4096)
            swapper = pool.swapper_pid
            # While it lives neither has a name already.
            assert not names([os.getpid()])
            assert sockets([os.getpid()]), "one that is left would be missed"
            assert not list(tmp_path.iterdir())
            a = pool.ones((ARRAY_PAGES, 512))
            with workers(a, 1) as (child,):
                child.ask(np.sum)
                if last != "child":
                    assert child.end() == 0
                if last == "close":
                    del a
                    pool.close()
                else:
                    pool.close()
                    view = a[3:5, ::7]
                    del a
                    if last == "view":
                        assert is_running(swapper)
                        assert view.sum() == view.size
                    del view
                if last == "child":
                    assert is_running(swapper)
                    assert child.ask(np.sum) == ARRAY_PAGES * 512
                    assert child.end() == 0
            until(lambda s=swapper: not is_running(s), f"the swapper ends after {last}")
            del pool


def raise_instead(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


class Interrupted(BaseException):
    """What no part of the library expects."""


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (worker_module, "_open_uffd"),
        (worker_module, "remove_stale_segments"),
        (worker_module, "create_segment"),
        (worker_module, "_probe_store"),
        (worker_module, "open_swap"),
        (worker_module.protocol, "pair"),
        (worker_module.subprocess, "run"),
        (worker_module.protocol, "send"),
        (worker_module.protocol, "receive"),
        (worker_module.native, "Control"),
        (worker_module.native, "Attendant"),
        (worker_module.os, "pidfd_open"),
        (worker_module.os, "memfd_create"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_is_nothing_left_when_a_step_of_pool_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    for error in (OSError(12, "no memory"), Interrupted()):
        with nothing_more(tmp_path):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, raise_instead(error))
                with pytest.raises((OSError, pyswap.Error, Interrupted)):
                    pyswap.Pool("1 MiB", "8 MiB", swap_path=tmp_path, page_size=4096)
            error.__traceback__ = None


def test_is_nothing_left_when_the_swapper_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for boot in ("", "raise SystemError('no swapper')", "import os; os.abort()"):
        with nothing_more(tmp_path):
            monkeypatch.setattr(worker_module, "_BOOT", boot)
            with pytest.raises((pyswap.Error, subprocess.CalledProcessError)):
                pyswap.Pool("1 MiB", "8 MiB", swap_path=tmp_path, page_size=4096)
    capfd.readouterr()


def fail_in(step: str, pool: pyswap.Pool) -> None:
    """Raise in the middle of something; where that is a call of the library, it raises."""
    if step == "body":
        raise ValueError(step)
    if step == "worker":
        with workers(pool.ones((ARRAY_PAGES, 512)), 1) as (child,):
            child.ask(raise_value_error)
    elif step == "full":
        pool.full((ARRAY_PAGES, 512), "no number", float)
    elif step == "pin":
        a = pool.ones((ARRAY_PAGES, 512))
        with pool.pin(a[:10]):
            a[:] = 3
            raise ValueError(step)
    elif step == "room":
        kept = []
        with pytest.raises(MemoryError):  # noqa: PT012
            while True:
                kept.append(pool.ones((ARRAY_PAGES, 512)))
        raise ValueError(step)


def raise_value_error(_: Any) -> None:
    raise ValueError("in the worker")


@pytest.mark.parametrize("step", ["body", "worker", "full", "pin", "room"])
def test_is_nothing_left_after_an_exception(tmp_path: Path, step: str) -> None:
    with nothing_more(tmp_path):
        with (  # noqa: PT012
            pytest.raises(ValueError, match=r".") as raised,
            pyswap.Pool("1 MiB", "8 MiB", swap_path=tmp_path, page_size=4096) as pool,
        ):
            swapper = pool.swapper_pid
            a = pool.ones((ARRAY_PAGES, 512))
            fail_in(step, pool)
        # The traceback holds the frames, and they the arrays.
        del raised, a
        gc.collect()
        until(lambda: not is_running(swapper), "the swapper ends")
        del pool


# After kill -9.


def test_does_the_next_pool_clean_up_a_name_that_a_kill_left(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            posix_ipc.unlink_shared_memory = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            pyswap.Pool("1 MiB", 0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(names([pid])) == 1
    with pyswap.Pool("1 MiB", "8 MiB", swap_path=tmp_path, page_size=4096) as pool:
        assert not names([pid])
        assert pool.ones(5).sum() == 5


def live(swap: str, tell: Callable[[str], None]) -> None:
    """One tree's life: a pool, workers, faults and evictions in all of them, and the end."""
    tell("p")
    pool = pyswap.Pool("1 MiB", "8 MiB", swap_path=swap, page_size=4096)
    a = pool.zeros((ARRAY_PAGES, 512), np.int64)
    tell("f")
    crew = [Worker(a) for _ in range(2)]
    tell("t")
    for k, worker in enumerate(crew):
        worker.send(add_to_column, k)
    add_to_column(a, 2)
    for worker in crew:
        worker.answer()
    tell("c")
    del a
    crew[0].end()
    pool.close()
    crew[1].end()
    tell("e")


def add_to_column(a: Any, k: int) -> None:
    a[:, k] += 1


def descendants() -> list[psutil.Process]:
    """Every process of the tree that has not ended, orphans included: they are our children."""
    return [p for p in psutil.Process().children(recursive=True) if is_running(p.pid)]


def has_children() -> bool:
    """Take note of those that have ended; whether others are left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def kill_tree() -> list[str]:
    """Kill until nobody is left; returns what the first look found, by what they run."""
    found = descendants()
    first = [what(process) for process in found]
    while True:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if not has_children():
            return first
        found = descendants()


def what(process: psutil.Process) -> str:
    try:
        return "swapper" if "pyswap.swapper" in " ".join(process.cmdline()) else "worker"
    except psutil.Error:
        return "gone"


def start_tree(swap: str) -> tuple[int, int]:
    """Fork a tree's creator; returns its pid, and a pipe's end that tells of its phases."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            os.setpgid(0, 0)
            live(swap, lambda letter: os.write(writing, letter.encode()) and None)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def times_of_phases(swap: str) -> dict[str, float]:
    """How long each phase of an undisturbed life takes at least, in seconds."""
    least = dict.fromkeys(PHASES, 60.0)
    for _ in range(3):
        _, pipe = start_tree(swap)
        at = []
        while letter := os.read(pipe, 1):
            at.append((letter, time.monotonic()))
        os.close(pipe)
        assert [letter for letter, _ in at] == [b"p", b"f", b"t", b"c", b"e"]
        until(lambda: not descendants(), "an undisturbed tree ends by itself")
        kill_tree()
        for i, phase in enumerate(PHASES):
            least[phase] = min(least[phase], at[i + 1][1] - at[i][1])
    return least


def kill_at(swap: str, phase: str, delay_s: float) -> tuple[int, list[str], str]:
    """Kill a tree so long after a phase began; tells whose it was, whom it killed, and when."""
    creator, pipe = start_tree(swap)
    try:
        for _ in range(PHASES.index(phase) + 1):
            assert os.read(pipe, 1), "the creator has failed"
        # The random instant itself: nothing is waited for here.
        select.select([], [], [], delay_s)
        killed = kill_tree()
        passed = len(os.read(pipe, len(LETTERS)))
    finally:
        os.close(pipe)
    return creator, killed, [*PHASES, "end"][PHASES.index(phase) + passed]


@adopt_orphans()
def reap(seed: int, swap: str) -> dict[str, int]:
    """Kill trees at random instants of every phase; returns how many died how."""
    rng = random.Random(seed)
    times = times_of_phases(swap)
    counts = dict.fromkeys(["swapper", "worker", "gone", "names", *PHASES, "end"], 0)
    # Those that came too late for the phase they were meant for are tried again.
    while sum(counts[phase] for phase in PHASES) < INSTANTS and counts["end"] < INSTANTS:
        aim = min(PHASES, key=lambda phase: counts[phase])
        creator, killed, phase = kill_at(swap, aim, rng.uniform(0, times[aim]))
        counts[phase] += 1
        for kind in killed:
            counts[kind] += 1
        assert not descendants()
        assert not os.listdir(swap), "a swap file has a name"
        assert not sockets([creator])
        left = names([creator])
        if left:
            counts["names"] += len(left)
            pyswap.Pool("1 MiB", 0).close()
            assert not names([creator]), "a name survived the next Pool()"
            kill_tree()
    return counts


@pytest.mark.timeout(240)
def test_is_nothing_left_after_a_kill_of_the_whole_tree(tmp_path: Path, seed: int) -> None:
    """At random instants of Pool(), fork, first faults and close; creator, workers and swapper."""
    with nothing_more(tmp_path):
        with workers(seed, 1) as (reaper,):
            reaper.connection.send((reap, (str(tmp_path),)))
            while not reaper.connection.poll(1):
                assert is_running(reaper.pid)
            counts = reaper.answer()
            assert reaper.end() == 0
        print(counts)
    # Every instant met a living tree, many a whole one.
    assert sum(counts[phase] for phase in PHASES) == INSTANTS
    assert all(counts[phase] > INSTANTS // 8 for phase in PHASES)
    assert counts["swapper"] > INSTANTS // 2
    assert counts["worker"] > INSTANTS
