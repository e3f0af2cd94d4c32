"""A swapper that is killed, stopped or stuck is replaced, and nobody loses a byte."""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import WAIT_S, Actor, Failpoint, until
from swapfile import ending
from workers import process_state, workers

import pyswap
from pyswap import config, protocol
from pyswap._native import native
from pyswap.worker import _SUCCESSOR, _command

pytestmark = pytest.mark.core

CLONE_NEWPID = 0x20000000
DESCRIPTORS = 400

WORDS = 512
"""64-bit words of a page."""
FRAMES = 256
PAGES = 3 * FRAMES

ELSEWHERE = {"attendant_order", "attendant_mapped", "attendant_done"}
"""Failpoints that a worker's own thread meets: tests of workers' deaths have those."""
UNUSUAL = {"frame_offline", "frame_back", "takeover"}
"""Those that it takes a full /dev/shm, or a takeover, to come to."""
NEVER_IN_PLAY = {
    "file_read",
    "move_placed",
    "move_begun",
    "move_mapped",
    "map_onward",
    "map_for_others",
}
"""Those of arrays that come from files, of NumPy's that grow, of streams where more frames are
mapped at once, and of pages that several processes use: tests of these have them."""


@pytest.fixture
def small() -> Iterator[pyswap.Pool]:
    """A pool of few frames; its counters must add up in the end."""
    with pyswap.Pool(FRAMES * 4096, 8 * FRAMES * 4096, page_size=4096) as made:
        yield made
        made.check()


def kill_swapper(pool: pyswap.Pool) -> int:
    """Kill the swapper, and return its process id."""
    pid = pool.swapper_pid
    os.kill(pid, signal.SIGKILL)
    return pid


def wait_for_other(pool: pyswap.Pool, old: int) -> None:
    until(lambda: pool.swapper_pid != old, "another swapper takes over")


def values(pages: int, first: int = 0) -> np.ndarray[Any, Any]:
    return np.arange(first * WORDS, (first + pages) * WORDS).reshape(pages, WORDS)


def add(a: Any, pages: list[int], n: int) -> None:
    a[pages, 1] += n


def count_up(a: Any, column: int, rounds: int) -> None:
    for _ in range(rounds):
        a[:, column] += 1


def column_of(a: Any, column: int) -> list[int]:
    return [int(value) for value in a[:, column]]


def page_out(pool: pyswap.Pool, a: Any) -> None:
    def is_out() -> bool:
        pool.advise(a, "pageout")
        return not pool.residency(a).any()

    until(is_out, "the array is paged out")


# What a swapper does in a life: each failpoint is met by some part of it.


class Play:
    """Arrays of both kinds, four workers that use them, and what they must hold in the end."""

    def __init__(self, pool: pyswap.Pool) -> None:
        self.pool = pool
        self.shared = pool.zeros((PAGES, WORDS), np.int64)
        self.own = pool.zeros((64, WORDS), np.int64, private=True)
        self.shared[:] = values(PAGES)
        self.own[:] = values(64)
        self.rounds = 0

    def run(self) -> None:
        """Faults, copies, a fork, a pin, a swapoff and a resize: all that changes a table."""
        pool, shared = self.pool, self.shared
        self.rounds += 1
        with workers((shared, self.own), 4) as crew:
            for column, worker in enumerate(crew, 2):
                worker.send(use_both, column)
            with pool.pin(self.own[:8], writable=True):
                self.own[:8, 0] += 1
            area = pool.swapon("/tmp", "1 MiB", priority=1)
            # The workers may have touched all of the one again; the other nobody touches.
            untouched = pool.ones((8, WORDS), np.int64)
            for a in (self.own, untouched):
                pool.advise(a, "pageout")
            pool.swapoff(area)
            assert (untouched == 1).all()
            del a, untouched
            pool.resize((FRAMES - 16) * 4096)
            pool.resize(FRAMES * 4096)
            sent = pickle.dumps(shared)
            assert pickle.loads(sent).base is not None
            assert pool.stats().in_transit_bytes == 0
            lent = self.own.snapshot()
            self.own[8:, 0] += 1
            del lent
            scratch = pool.zeros((40, WORDS), np.int64)
            scratch[:20] = 7
            del scratch
            for worker in crew:
                assert worker.answer() == 64 * 2
                assert worker.end() == 0

    def check(self) -> None:
        """Every byte is as it must be, and every count."""
        expected = values(PAGES)
        expected[:, 2:6] += self.rounds
        assert (np.asarray(self.shared) == expected).all()
        expected = values(64)
        expected[:, 0] += self.rounds
        assert (np.asarray(self.own) == expected).all()
        until(lambda: self.pool.stats().workers == 1, "the children are forgotten")
        self.pool.check()


def use_both(held: tuple[Any, Any], column: int) -> int:
    """Count in every page of the shared array; change a private one, and tell by how much."""
    shared, own = held
    before = int(own[:, column].sum())
    for low in range(0, PAGES, 64):
        shared[low : low + 64, column] += 1
    own[:, column] += 2
    assert (own[:, column + 1] == values(64)[:, column + 1]).all()
    return int(own[:, column].sum()) - before


def killed_at(pool: pyswap.Pool, play: Play, point: str, skip: int) -> bool:
    """Kill the swapper at a failpoint while everything is going on; False where none came by."""
    old = pool.swapper_pid
    failpoint = Failpoint(pool, point, "kill", skip=skip)
    failpoint.arm()
    play.run()
    if pool.swapper_pid == old:
        failpoint.release()
        return False
    return True


@pytest.mark.failpoint
@pytest.mark.timeout(600)
def test_does_a_swapper_that_is_killed_anywhere_lose_nothing() -> None:
    left_out = ELSEWHERE | UNUSUAL | NEVER_IN_PLAY
    points = [p for p in native.FAILPOINT_NAMES if p not in left_out]
    killed = []
    for point in points:
        with pyswap.Pool(FRAMES * 4096, 8 * FRAMES * 4096, page_size=4096) as pool:
            play = Play(pool)
            if killed_at(pool, play, point, 0):
                killed.append(point)
            play.run()
            play.check()
            del play
            until(lambda: pool.stats().committed_bytes == 0, "everything is freed")
            now = pool.stats()
            assert (now.swap_used_bytes, now.resident_pages, now.pinned_pages) == (0, 0, 0), point
    missed = sorted(set(points) - set(killed))
    print(f"killed at {len(killed)} of {len(points)} failpoints; missed: {missed}")
    assert not missed


@pytest.mark.failpoint
def test_does_a_swapper_that_is_killed_while_a_streams_thread_goes_on_lose_nothing() -> None:
    pages = 1024
    with pyswap.Pool(2 * pages * 4096, 2 * pages * 4096, page_size=4096) as pool:
        a = pool.zeros((pages, WORDS), np.int64)
        a[:] = values(pages)
        old = pool.swapper_pid
        with workers(a, 1) as (reader,), Failpoint(pool, "map_onward", "kill") as point:
            reader.send(column_of, 3)
            assert reader.answer() == values(pages)[:, 3].tolist()
            assert point.hits == 1
            a[:, 3] += 1
            reader.send(column_of, 3)
            assert reader.answer() == (values(pages)[:, 3] + 1).tolist()
            assert reader.end() == 0
        assert pool.swapper_pid != old
        pool.check()


def word_of(a: Any, page: int) -> int:
    return int(a[page, 3])


@pytest.mark.failpoint
def test_does_a_swapper_that_is_killed_when_it_maps_a_page_for_others_lose_nothing() -> None:
    pages = 64
    with pyswap.Pool(8 * pages * 4096, 8 * pages * 4096, page_size=4096) as pool:
        a = pool.zeros((pages, WORDS), np.int64)
        a[:] = values(pages)
        old = pool.swapper_pid
        with workers(a, 2) as both, Failpoint(pool, "map_for_others", "kill") as point:
            # This process has them all mapped; the second one's page is mapped for the first one.
            for page, worker in zip((5, 50), both, strict=True):
                assert worker.ask(word_of, page) == values(pages)[page, 3]
            until(lambda: point.hits == 1, "it is killed")
            a[:, 3] += 1
            for worker in both:
                assert worker.ask(column_of, 3) == (values(pages)[:, 3] + 1).tolist()
                assert worker.end() == 0
        assert pool.swapper_pid != old
        pool.check()


@pytest.mark.failpoint
@pytest.mark.parametrize("skip", [0, 7, 40, FRAMES])
def test_is_a_repair_repaired_that_was_cut_short(small: pyswap.Pool, skip: int) -> None:
    play = Play(small)
    old = small.swapper_pid
    with Failpoint(small, "takeover", "kill", skip=skip, limit=3) as held:
        kill_swapper(small)
        play.run()
        assert held.hits == 3, "it died three times in its repair"
    assert small.swapper_pid != old
    play.check()


@pytest.mark.failpoint
def test_is_a_page_left_alone_that_a_claimed_frame_had_before(
    small: pyswap.Pool, tmp_path: Path
) -> None:
    """A frame names its last page until it is filled; that page may be elsewhere by now."""
    a = small.zeros((8, WORDS), np.int64)
    a[:] = values(8)
    small.advise(a, "random")
    page_out(small, a)
    # The frames are free, page 7's on top: page 5 gets that one, and page 0 page 6's.
    a[5, 0] = -5
    a[0, 0] = -1
    old = small.swapper_pid
    with Failpoint(small, "frame_claimed", "kill") as held:
        a[1, 0] = -2
        assert held.hits == 1
    assert small.swapper_pid != old
    expected = values(8)
    expected[[5, 0, 1], 0] = [-5, -1, -2]

    def look() -> None:
        assert (np.asarray(a) == expected).all()

    # A process of its own looks, since it would die of a page that is gone.
    assert ending(look, tmp_path / "told") == (0, [])


@pytest.mark.failpoint
@pytest.mark.parametrize("point", ["fill_locked", "map_before"])
def test_is_a_fault_served_that_a_dead_swapper_had_read(small: pyswap.Pool, point: str) -> None:
    a = small.zeros((8, WORDS), np.int64)
    a[:] = values(8)
    page_out(small, a)
    with workers(a, 1) as (reader,):
        with Failpoint(small, point, "kill") as held:
            reader.send(column_of, 1)
            assert reader.answer() == values(8)[:, 1].tolist()
            assert held.hits == 1
        assert reader.end() == 0


@pytest.mark.failpoint
@pytest.mark.parametrize("point", ["frame_evicting", "evict_punched", "evict_entry"])
def test_has_the_store_no_byte_of_a_page_that_was_on_its_way_out(
    small: pyswap.Pool, point: str
) -> None:
    a = small.zeros((8, WORDS), np.int64)
    a[:] = values(8)
    page_out(small, a)
    assert int(np.asarray(a)[:, 1].sum()) == values(8)[:, 1].sum()
    with Failpoint(small, point, "kill") as held:
        # Asked for again of the next swapper, which finds the pages gone or evicts them.
        small.advise(a, "pageout")
        assert held.hits == 1
    assert small.stats().resident_pages == 0
    assert os.fstat(small.fileno()).st_blocks == 0
    assert (np.asarray(a) == values(8)).all()


@pytest.mark.failpoint
def test_is_a_slot_forgotten_that_was_being_given_up(small: pyswap.Pool) -> None:
    a = small.zeros((1, WORDS), np.int64)
    a[:] = values(1, 1)
    page_out(small, a)
    a[:] = 0
    with workers((small, a), 1) as (evictor,), Failpoint(small, "slot_freed", "kill") as held:
        # A page of zeros gives its slot back first of all.
        evictor.ask(take_out)
        assert held.hits == 1
        assert evictor.end() == 0
    assert small.stats().swap_used_bytes == 0
    assert not np.asarray(a).any()


def take_out(held: tuple[pyswap.Pool, Any]) -> None:
    pool, a = held
    pool.advise(a, "pageout")


@pytest.mark.failpoint
@pytest.mark.parametrize("point", ["copy_made", "copy_ordered"])
def test_is_a_copy_mapped_whose_swapper_died(small: pyswap.Pool, point: str) -> None:
    a = small.zeros((8, WORDS), np.int64, private=True)
    a[:] = values(8)
    with workers(a, 1) as (child,):
        with Failpoint(small, point, "kill") as held:
            child.send(add, [3], 5)
            child.answer()
            assert held.hits == 1
        assert child.ask(column_of, 1) == (values(8)[:, 1] + 5 * (np.arange(8) == 3)).tolist()
        assert column_of(a, 1) == values(8)[:, 1].tolist()
        assert small.stats().pinned_pages == 0
        assert child.end() == 0


def test_do_ten_deaths_in_a_row_lose_nothing(small: pyswap.Pool) -> None:
    a = small.zeros((PAGES, WORDS), np.int64)
    a[:] = values(PAGES)
    with workers(a, 4) as crew:
        for column, worker in enumerate(crew, 2):
            worker.send(count_up, column, 12)
        for _ in range(10):
            old = kill_swapper(small)
            wait_for_other(small, old)
        for worker in crew:
            worker.answer()
            assert worker.end() == 0
    expected = values(PAGES)
    expected[:, 2:6] += 12
    assert (np.asarray(a) == expected).all()
    now = small.stats()
    print(f"{now.major_faults} major faults, {now.evictions} evictions")
    assert now.evictions > PAGES


def compute(told: Any) -> float:
    """Work on memory of one's own, and fault on no array."""
    os.write(told, b"x")
    x = np.random.default_rng(1).random(1 << 16)
    for _ in range(200):
        x = np.sqrt(x * x + 1e-3)
    return float(x[0])


def test_are_the_pages_of_a_stopped_worker_evicted_after_a_takeover(small: pyswap.Pool) -> None:
    a = small.zeros((PAGES, WORDS), np.int64)
    a[:] = values(PAGES)
    some = list(range(40))
    reading, writing = os.pipe()
    with workers(a, 4) as (stopped, *others), workers(writing, 1) as (busy,):
        # Mapped writable there, and nobody can ask it to let go.
        stopped.ask(add, some, 1)
        stopped.stop()
        busy.send(compute)
        os.read(reading, 1)
        for column, worker in enumerate(others, 2):
            worker.send(count_up, column, 3)
        old = kill_swapper(small)
        for worker in others:
            worker.answer()
        wait_for_other(small, old)
        busy.answer()
        page_out(small, a)
        stopped.signal(signal.SIGCONT)
        stopped.ask(add, some, 1)
        for worker in (stopped, *others, busy):
            assert worker.end() == 0
    os.close(reading)
    os.close(writing)
    expected = values(PAGES)
    expected[:40, 1] += 2
    expected[:, 2:5] += 3
    assert (np.asarray(a) == expected).all()


def test_does_a_death_together_with_a_workers_lose_nothing(small: pyswap.Pool) -> None:
    a = small.zeros((PAGES, WORDS), np.int64)
    a[:] = values(PAGES)
    with workers(a, 2) as (lost, other):
        lost.send(count_up, 2, 10**6)
        other.send(count_up, 3, 5)
        until(lambda: small.stats().evictions > PAGES, "they use more than there is")
        os.kill(lost.pid, signal.SIGKILL)
        old = kill_swapper(small)
        other.answer()
        wait_for_other(small, old)
        assert other.end() == 0
    until(lambda: small.stats().workers == 1, "the dead one is forgotten")
    found = np.asarray(a)
    assert (np.delete(found, [2], axis=1) == np.delete(expected_five(), [2], axis=1)).all()
    assert np.ptp(found[:, 2] - values(PAGES)[:, 2]) <= 1


def expected_five() -> np.ndarray[Any, Any]:
    expected = values(PAGES)
    expected[:, 3] += 5
    return expected


def test_is_a_stopped_swapper_replaced(small: pyswap.Pool) -> None:
    a = small.zeros((PAGES, WORDS), np.int64)
    a[:] = values(PAGES)
    old = small.swapper_pid
    os.kill(old, signal.SIGSTOP)
    # The first page that is not here waits until the heartbeat has been missed.
    assert (np.asarray(a) == values(PAGES)).all()
    assert small.swapper_pid != old
    # Nobody may have waited for it yet.
    until(lambda: process_state(old) in "XZ", "the stopped one is gone for certain")


@pytest.mark.failpoint
def test_is_a_swapper_replaced_that_is_stuck_in_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "STUCK_MS", 1000)
    with pyswap.Pool(FRAMES * 4096, 8 * FRAMES * 4096, page_size=4096) as pool:
        a = pool.zeros((PAGES, WORDS), np.int64)
        a[:] = values(PAGES)
        page_out(pool, a)
        old = pool.swapper_pid
        # Nobody releases the thread: only the heartbeat that ends can help.
        Failpoint(pool, "map_before", "park").arm()
        assert (np.asarray(a) == values(PAGES)).all()
        assert pool.swapper_pid != old
        pool.check()


def test_can_there_be_two_swappers(small: pyswap.Pool) -> None:
    attachment = small._attachment
    old, before = small.swapper_pid, small._control().numbers()
    fds = [*attachment._vault, attachment.control_fd]
    setup = {"vault": fds[:2], "control_fd": fds[2], "successor": True}
    second = subprocess.run(
        _command(_SUCCESSOR, setup),
        pass_fds=fds,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    assert second.returncode == 1
    assert "another swapper is there" in second.stderr
    assert small._control().numbers()["swapper_pid"] == before["swapper_pid"] == old
    a = small.full((8, WORDS), 5, np.int64)
    assert (a == 5).all()


def test_is_there_an_end_where_no_other_swapper_can_be_started() -> None:
    text = f"""
import os, signal, sys
import numpy as np
import pyswap
from pyswap import worker
real, worker._command = worker._command, lambda program, setup: (
    ["/nonexistent"] if setup.get("successor") else real(program, setup))
pool = pyswap.Pool({FRAMES * 4096}, {8 * FRAMES * 4096}, page_size=4096)
a = pool.ones(({PAGES}, {WORDS}), np.int64)
pids = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        int(a.sum())
        int(a.sum())
        while True:
            int(a[::7].sum())
    pids.append(pid)
pool.stats()
os.kill(pool.swapper_pid, signal.SIGKILL)
for pid in pids:
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
try:
    pool.zeros(5)
except pyswap.Error as error:
    print(error)
sys.stdout.flush()
os._exit(0)
"""
    told = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False
    )
    lines = told.stdout.splitlines()
    assert lines[:2] == [str(-signal.SIGBUS)] * 2, told.stderr
    assert re.fullmatch(r"the swapper of pool '.*' died", lines[2])
    assert told.stderr.count("no other could be started") == 3


def test_does_a_process_whose_channel_ends_say_so_while_the_swapper_lives() -> None:
    text = f"""
import socket
import numpy as np
import pyswap
pool = pyswap.Pool({FRAMES * 4096}, {8 * FRAMES * 4096}, page_size=4096)
a = pool.ones(({PAGES}, {WORDS}), np.int64)
pool._attachment._channel.shutdown(socket.SHUT_RDWR)
while True:
    int(a.sum())
"""
    told = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False
    )
    assert told.returncode == -signal.SIGBUS
    assert "has ended (0), though the swapper lives" in told.stderr
    assert "died" not in told.stderr


def test_do_pins_outlive_a_swapper(small: pyswap.Pool) -> None:
    a = small.zeros((PAGES, WORDS), np.int64)
    a[:] = values(PAGES)
    address = a.__array_interface__["data"][0]
    with small.pin(a[10:30:2], writable=True):
        old = kill_swapper(small)
        wait_for_other(small, old)
        # It answers once all is as it was; the numbers can be read before.
        small.advise(a, "pageout")
        assert small.stats().pinned_pages == 10
        assert small.residency(a).sum() == 10
        # A pinned page can be written by the kernel, too.
        with open("/dev/zero", "rb", buffering=0) as zeros:
            os.readv(zeros.fileno(), [(ctypes.c_char * 4096).from_address(address + 10 * 4096)])
    assert small.stats().pinned_pages == 0
    page_out(small, a)
    assert not a[10].any()
    assert (a[11:] == values(PAGES)[11:]).all()


def test_are_private_pages_shared_yet_after_a_takeover(small: pyswap.Pool) -> None:
    a = small.zeros((PAGES, WORDS), np.int64, private=True)
    a[:] = values(PAGES)
    clone = a.snapshot()
    with workers(a, 1) as (child,):
        a[:10, 0] = -1
        page_out(small, a)
        copies = small.stats().cow_copies
        old = kill_swapper(small)
        assert (np.asarray(clone) == values(PAGES)).all()
        wait_for_other(small, old)
        assert child.ask(column_of, 0) == values(PAGES)[:, 0].tolist()
        assert small.stats().cow_copies == copies, "what is read stays shared"
        child.ask(add, [3, 20], 5)
        assert small.stats().cow_copies > copies
        assert column_of(a, 1)[20] == values(PAGES)[20, 1]
        assert child.end() == 0
    used = small.stats().committed_bytes
    del clone
    until(lambda: small.stats().committed_bytes < used, "the clone's pages are given up")
    assert column_of(a, 0)[:11] == [-1] * 10 + [int(values(PAGES)[10, 0])]


def test_is_memory_for_the_next_fork_given_back_whose_swapper_dies(small: pyswap.Pool) -> None:
    a = small.zeros(4 * FRAMES * WORDS, np.int64, private=True)
    a[::WORDS] = np.arange(4 * FRAMES)
    with workers(a, 1) as (child,):
        assert child.ask(np.sum) == 2 * FRAMES * (4 * FRAMES - 1)
    until(lambda: small.stats().workers == 1, "the child is gone")
    kept = small.stats().metadata_bytes
    pid = kill_swapper(small)
    until(lambda: small.swapper_pid != pid, "another swapper has taken over")
    # A map of a child, and two runs of page ids.
    spare = (8 + 2 * (8 + 4)) * 4 * FRAMES
    until(lambda: small.stats().metadata_bytes <= kept - spare, "what was kept is given back")
    assert a[WORDS * 127] == 127


def test_does_a_fork_during_a_takeover_get_its_arrays(small: pyswap.Pool) -> None:
    a = small.zeros((PAGES, WORDS), np.int64)
    b = small.ones((20, WORDS), np.int64, private=True)
    a[:] = values(PAGES)
    for n in range(4):
        kill_swapper(small)
        with workers((a, b), 1) as (child,):
            assert child.ask(sum_of_both) == (int(values(PAGES).sum()), 20 * WORDS + n)
            assert child.end() == 0
        b[0, 0] += 1


def sum_of_both(held: tuple[Any, Any]) -> tuple[int, int]:
    a, b = held
    a, b = np.asarray(a), np.asarray(b)
    b[5] = b[5]
    return int(a.sum()), int(b.sum())


def test_does_a_takeover_keep_what_another_process_was_making(small: pyswap.Pool) -> None:
    """Requests that come again are answered once: no array, area or pin is there twice."""

    def make(_: object) -> tuple[int, int]:
        made = [small.full((4, WORDS), n, np.int64) for n in range(60)]
        return sum(int(a.sum()) for a in made), len(made)

    actor = Actor(make)
    kills = 0
    try:
        for _ in range(3):
            actor.tell()
            while not actor.has_answered():
                old = kill_swapper(small)
                wait_for_other(small, old)
                small.swaps()
                kills += 1
                # On a slow machine it would hardly get on between two deaths, however many.
                enough = small.stats().committed_bytes + 5 * 4 * WORDS * 8
                until(
                    lambda: actor.has_answered() or small.stats().committed_bytes >= enough,  # noqa: B023
                    "it has made some more",
                )
            assert actor.answer() == (sum(range(60)) * 4 * WORDS, 60)
    finally:
        actor.end()
    print(f"{kills} deaths")
    until(lambda: small.stats().committed_bytes == 0, "its arrays are freed")
    until(lambda: small.stats().workers == 1, "its end is noticed")


def test_is_a_pickle_on_its_way_kept_through_a_takeover(small: pyswap.Pool) -> None:
    a = small.full((8, WORDS), 9, np.int64, name="kept")
    sent = pickle.dumps(a)
    del a
    old = kill_swapper(small)
    wait_for_other(small, old)
    small.swaps()
    assert small.stats().in_transit_bytes > 0
    found = pyswap.attach(f"{small.name}/kept")
    assert (found == 9).all()
    assert found.shape == (8, WORDS)
    loaded = pickle.loads(sent)
    assert loaded.__array_interface__["data"] == found.__array_interface__["data"]
    assert small.stats().in_transit_bytes == 0


def test_is_nothing_left_in_the_vault_of_those_that_are_gone(small: pyswap.Pool) -> None:
    """Two hundred children come and go; the vault has room for the next, and lets go of an area."""
    a = small.ones(WORDS, np.int64)
    for _ in range(200):
        pid = os.fork()
        if pid == 0:
            os._exit(int(a[0]))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    small.swapoff(small.swapon("/tmp", "1 MiB"))
    until(lambda: small.stats().workers == 1, "the children are forgotten")
    before = len(os.listdir(f"/proc/{small.swapper_pid}/fd"))
    old = kill_swapper(small)
    wait_for_other(small, old)
    small.check()
    fds = Path(f"/proc/{small.swapper_pid}/fd")
    until(lambda: len(list(fds.iterdir())) <= before + 1, "the next one has no more descriptors")
    assert (a == 1).all()


def say_twice(pool: pyswap.Pool, **fields: Any) -> None:
    """Make a request whose answer is lost with the swapper that has carried it out."""
    attachment = pool._attachment
    with attachment._lock:
        sock = attachment._sock
        assert sock is not None
        attachment._seq += 1
        message = {**fields, "seq": attachment._seq}
        protocol.send(sock, message)
        protocol.raise_reply(protocol.receive(sock)[0])
        wait_for_other(pool, kill_swapper(pool))
        while "again" not in protocol.receive(sock)[0]:
            pass
        protocol.send(sock, message)
        protocol.raise_reply(protocol.receive(sock)[0])


@pytest.mark.parametrize("op", ["send", "receive"])
def test_counts_a_request_once_that_comes_again(small: pyswap.Pool, op: str) -> None:
    a = small.full((8, WORDS), 9, np.int64)
    for _ in range(2 if op == "receive" else 0):
        pickle.dumps(a)
    say_twice(small, op=op, address=a.__array_interface__["data"][0])
    assert small.drop_transit() == 1


@pytest.mark.failpoint
@pytest.mark.parametrize("pickles", [1, 2])
def test_takes_a_load_one_pickles_reference_whose_swapper_dies_in_it(
    small: pyswap.Pool, pickles: int
) -> None:
    """It dies when the array is mapped, and the reference is about to be taken over."""

    def load(sent: bytes) -> int:
        return int(pickle.loads(sent).sum())

    actor = Actor(load)
    try:
        a = small.ones((8, WORDS), np.int64)
        sent = [pickle.dumps(a) for _ in range(pickles)]
        old = small.swapper_pid
        with Failpoint(small, "hold_noted", "kill"):
            assert actor.ask(sent[0]) == 8 * WORDS
        assert small.swapper_pid != old
        assert small.drop_transit() == pickles - 1
    finally:
        actor.end()


@pytest.mark.failpoint
def test_commits_a_sparse_object_nothing_whose_swapper_dies_at_its_beginning(
    small: pyswap.Pool,
) -> None:
    before = small.stats().committed_bytes
    old = small.swapper_pid
    with (
        Failpoint(small, "references_begun", "kill"),
        pyswap.numpy_memory(small, "64 KiB"),
    ):
        a = np.ones(1 << 20, np.uint8)
        assert small.swapper_pid != old
        assert int(a.sum()) == 1 << 20
        del a
    until(lambda: small.stats().committed_bytes == before, "what was committed is given back")


@pytest.mark.failpoint
def test_has_an_area_all_its_slots_that_takes_the_place_of_one_with_bad_slots(
    small: pyswap.Pool,
) -> None:
    """The swapper dies when the area with bad slots is off."""
    a = small.zeros((PAGES, WORDS), np.int64)
    a[:] = values(PAGES)
    area = small.swapon("/tmp", 128 * 4096, priority=1)
    with Failpoint(small, "clean_write", "errno", error=errno.EIO, limit=16) as failing:
        page_out(small, a)
        assert failing.hits
    assert small.swaps()[1].bad > 0
    old = small.swapper_pid
    # The first visit is its being shut.
    with Failpoint(small, "area_state", "kill", skip=1):
        small.swapoff(area)
    assert small.swapper_pid != old
    small.swapon("/tmp", 128 * 4096, priority=1)
    # Pages that have no slot yet: none comes free meanwhile.
    page_out(small, a)
    b = small.ones((FRAMES // 2 + 32, WORDS), np.int64)
    page_out(small, b)
    assert small.swaps()[1].used == small.swaps()[1].size
    assert (b == 1).all()
    assert (a == values(PAGES)).all()


BORN = f"""
import ctypes, os, resource, signal
import numpy as np
import pyswap
pool = pyswap.Pool({FRAMES * 4096}, {8 * FRAMES * 4096}, page_size=4096)
a = pool.ones(({PAGES}, {WORDS}), np.int64)

def born(pid):
    text = lambda name: open(f"/proc/{{pid}}/{{name}}").read()
    status = dict(line.split(":", 1) for line in text("status").splitlines())
    wanted = "Umask", "Cpus_allowed", "SigBlk", "SigIgn"
    nice = text("stat").rpartition(")")[2].split()[16]
    return [text("limits"), sorted(text("environ").split(chr(0))), nice,
            os.readlink(f"/proc/{{pid}}/cwd"), *(status[name] for name in wanted)]

old = pool.swapper_pid
before = born(old)
os.environ["LD_PRELOAD"] = "/nonexistent/preloaded.so"
os.environ["PYSWAP_TEST"] = "of a worker"
os.chdir("/tmp")
os.umask(0o777)
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
if os.geteuid() == 0:
    os.nice(3)
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR1, signal.SIGTERM}})
for what, low in (("FSIZE", 4096), ("CPU", 50), ("NOFILE", 40), ("CORE", 0), ("DATA", 1 << 34)):
    number = getattr(resource, f"RLIMIT_{{what}}")
    resource.setrlimit(number, (low, resource.getrlimit(number)[1]))
os.kill(old, signal.SIGKILL)
assert int(a.sum()) == a.size
assert pool.swapper_pid != old
for was, now in zip(before, born(pool.swapper_pid), strict=True):
    assert was == now, (was, now)
"""


def test_is_a_successor_started_as_the_first_swapper_was() -> None:
    told = subprocess.run(
        [sys.executable, "-c", BORN], capture_output=True, text=True, timeout=120, check=False
    )
    assert told.returncode == 0, told.stderr


def test_lets_a_worker_of_another_pid_namespace_the_others_take_over(
    small: pyswap.Pool, require: Callable[[str], None]
) -> None:
    """The swapper's process id is nobody's there, or a stranger's: it kills nobody, is no heir."""
    require("root")
    a = small.ones((PAGES, WORDS), np.int64)

    def elsewhere(_: object) -> int:
        if ctypes.CDLL(None).unshare(CLONE_NEWPID) != 0:
            return -1
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                assert os.getpid() == 1
                ours.close()
                theirs.sendall(bytes([int(a[0, 0])]))
                theirs.recv(1)
                status = int(a.sum() != a.size)
            finally:
                os._exit(status)
        theirs.close()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    ours, theirs = socket.socketpair()
    actor = Actor(elsewhere)
    try:
        actor.tell()
        with ours:
            theirs.close()
            ours.settimeout(60)
            assert ours.recv(1) == b"\1"
            for _ in range(3):
                old = kill_swapper(small)
                wait_for_other(small, old)
                assert "pyswap.swapper" in Path(f"/proc/{small.swapper_pid}/cmdline").read_text()
                small.swaps()
            page_out(small, a)
            ours.sendall(b"x")
            assert actor.answer() == 0
    finally:
        actor.end()


def open_until_refused(pool: pyswap.Pool, path: Path) -> tuple[list[Any], str]:
    """Arrays from a file, as many as there may be, and why there is not one more."""
    arrays: list[Any] = []
    while len(arrays) < DESCRIPTORS:
        try:
            arrays.append(pool.open_npy(path))
        except OSError as error:
            return arrays, str(error)
    return arrays, ""


def with_few_descriptors(path: Path) -> None:
    """Two pools of one who may have few descriptors; `test_user` has an ordinary user run it."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    with (
        pyswap.Pool(1 << 20, 0, page_size=4096) as pool,
        pyswap.Pool(1 << 20, 0, page_size=4096) as other,
    ):
        arrays, why = open_until_refused(pool, path)
        assert "raise the hard limit on open files" in why
        assert DESCRIPTORS // 2 < len(arrays) < DESCRIPTORS
        # What one pool has the other lacks, of those that the kernel keeps for a user.
        others, why = open_until_refused(other, path)
        assert "raise the hard limit on open files" in why
        if os.geteuid() != 0:
            assert "the pools of this user keep" in why
        for each in (pool, other):
            wait_for_other(each, kill_swapper(each))
        assert {int(a[-1]) for a in [*arrays, *others]} == {7}
        del arrays[20:], others[:]
        actor = Actor(lambda _: int(arrays[0][-1]))
        try:
            assert actor.ask() == 7
        finally:
            actor.end()


def test_is_there_an_error_in_time_where_there_may_be_few_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "file.npy"
    np.save(path, np.full(1000, 7))
    actor = Actor(with_few_descriptors)
    try:
        actor.ask(path)
    finally:
        actor.end()
