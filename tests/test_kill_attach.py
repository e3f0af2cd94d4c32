"""A process goes, or stops, while it comes into a pool that it was not forked into: anywhere."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint, points_met
from workers import Worker, until, workers

import pyswap

pytestmark = pytest.mark.failpoint

PAGES = 24
WORDS = 512
VICTIM = 7
"""The page that a newcomer reads."""
STRIDE = 11
"""One line in so many is where a newcomer goes; where it begins differs from run to run."""
_unread: dict[int, int] = {}


# In the process from which newcomers are forked: it was there before the pool, and has no part
# in it.


def attach(name: str) -> int:
    return int(pyswap.attach(name)[VICTIM, 0])  # type: ignore[index]


def load(data: bytes) -> int:
    return int(pickle.loads(data)[VICTIM, 0])


def start(_: object, do: Callable[[Any], int], argument: Any, line: int, how: int) -> int:
    """Fork a newcomer that is sent a signal at a line of the package's code; its process id."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _come(do, argument, line, how, writing)
    os.close(writing)
    _unread[pid] = reading
    return pid


def _come(do: Callable[[Any], int], argument: Any, line: int, how: int, told: int) -> None:
    seen, status = 0, 1

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal seen
        if "/pyswap/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), how)
        return trace

    try:
        sys.settrace(trace)
        value = do(argument)
        sys.settrace(None)
        os.write(told, seen.to_bytes(4, "little"))
        status = 0 if value == VICTIM else 2
    except BaseException:  # noqa: BLE001 - the status tells.
        traceback.print_exc()
    finally:
        os._exit(status)


def see(_: object, pid: int) -> int | None:
    """How a newcomer ended; None: it has stopped."""
    status = os.waitpid(pid, os.WUNTRACED)[1]
    return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def lines(_: object, pid: int) -> int:
    """How many lines a newcomer has run that has ended; 0: not all of them."""
    told = os.read(_unread[pid], 4)
    os.close(_unread.pop(pid))
    return int.from_bytes(told, "little")


# The test.


class Held:
    """A pool with an array in swap, and the process from which newcomers come."""

    def __init__(self, pool: Any, nobody: Worker) -> None:
        self.pool, self.nobody = pool, nobody
        self.a = pool.zeros((PAGES, WORDS), np.int64, name="kept")
        self.a[:] = np.arange(PAGES)[:, None]
        self.ways = {"attach": (attach, f"{pool.name}/kept"), "load": (load, pickle.dumps(self.a))}
        # The pickle's own reference goes to the first that loads it.
        self.whole("load")

    def start(self, way: str, line: int = 0, how: int = 0) -> int:
        return int(self.nobody.ask(start, *self.ways[way], line, how))

    def whole(self, way: str) -> int:
        """Have a newcomer come whom nothing happens to; its lines."""
        pid = self.start(way)
        assert self.nobody.ask(see, pid) == 0
        return int(self.nobody.ask(lines, pid))

    def page_out(self) -> None:
        def is_out() -> bool:
            self.pool.advise(self.a, "pageout")
            return not self.pool.residency(self.a).any()

        until(is_out, "the array is paged out")

    def check(self) -> None:
        """All that newcomers had is back, and nothing is lost."""
        until(lambda: self.pool.stats().workers == 1, "the newcomers are forgotten")
        now = self.pool.stats()
        assert (now.committed_bytes, now.in_transit_bytes) == (PAGES * 4096, 0)
        self.page_out()
        assert (self.a == np.arange(PAGES)[:, None]).all()
        self.pool.check()


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with workers(None, 1) as (nobody,):
        with pyswap.Pool("8 MiB", "64 MiB", page_size=4096, name="come") as pool:
            yield Held(pool, nobody)
        assert nobody.end() == 0


@pytest.mark.parametrize("way", ["attach", "load"])
def test_harms_a_newcomer_nobody_that_is_killed_at_any_line(
    held: Held, way: str, seed: int
) -> None:
    held.whole(way)
    # Once more: what is imported at first use is there.
    count = held.whole(way)
    assert count > 100
    gone = 0
    for line in range(1 + seed % STRIDE, count + 1, STRIDE):
        pid = held.start(way, line, signal.SIGKILL)
        # The last lines may not be there: other pools' sockets are looked at, and may have gone.
        killed = held.nobody.ask(see, pid) == -signal.SIGKILL
        assert killed == (held.nobody.ask(lines, pid) == 0)
        assert held.a[VICTIM, 1] == VICTIM
        gone += killed
    held.check()
    assert gone > 20
    held.whole(way)
    print(f"{way}: killed at {gone} of {count} lines")


@pytest.mark.parametrize("way", ["attach", "load"])
def test_keeps_a_newcomer_nobody_waiting_that_is_stopped_at_any_line(
    held: Held, way: str, seed: int
) -> None:
    held.whole(way)
    count = held.whole(way)
    gone = 0
    for line in range(1 + seed % STRIDE, count + 1, STRIDE):
        pid = held.start(way, line, signal.SIGSTOP)
        if held.nobody.ask(see, pid) is not None:
            # It had fewer lines than the first, who looked at more pools' sockets.
            assert held.nobody.ask(lines, pid) > 0
            continue
        gone += 1
        # Others come, go, and have their pages.
        held.page_out()
        held.whole(way)
        assert held.a[VICTIM, 1] == VICTIM
        os.kill(pid, signal.SIGCONT)
        assert held.nobody.ask(see, pid) == 0
        assert held.nobody.ask(lines, pid) > 0
    held.check()
    assert gone > 20
    print(f"{way}: stopped at {gone} of {count} lines")


def points_of(held: Held, way: str) -> list[str]:
    """The failpoints that are met while somebody comes."""
    held.page_out()
    with points_met(held.pool) as names:
        held.whole(way)
        until(lambda: held.pool.stats().workers == 1, "it is gone")
    return names


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("way", ["attach", "load"])
def test_harms_a_newcomer_nobody_that_goes_wherever_the_swapper_is(
    held: Held, way: str, how: int
) -> None:
    again = points_of(held, way)
    names = [name for name in points_of(held, way) if name in again]
    for name in names:
        held.page_out()
        with Failpoint(held.pool, name, "park") as point:
            pid = held.start(way)
            point.wait_parked()
            os.kill(pid, how)
            assert held.nobody.ask(see, pid) == (None if how == signal.SIGSTOP else -how)
        held.whole(way)
        assert held.a[VICTIM, 1] == VICTIM
        if how == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
            assert held.nobody.ask(see, pid) == 0
        held.nobody.ask(lines, pid)
        held.check()
    print(f"{way}: {len(names)} of {len(names)} points: {', '.join(names)}")
    assert len(names) >= 3
