"""What if ..., while an array of NumPy's moves to other addresses?"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from failpoints import Actor, Failpoint, page_id, state_of, touch, until, wait_for_waiters
from hands import page_out
from test_numpy_memory import grown, idle, is_paged

import pyswap

pytestmark = pytest.mark.failpoint

N = 1 << 16
"""Items of an array of float64 with 128 pages of 4 KiB."""
MANY = 1 << 30


@pytest.fixture
def memory(pool: Any) -> Iterator[Any]:
    """The pool, with NumPy's arrays in it."""
    with pyswap.numpy_memory(pool, "64 KiB"):
        yield pool
        until(lambda: idle(pool), "all memory and swap is free", 20)


class Thread(threading.Thread):
    """A thread whose failure is the test's."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._action = action
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._action()
        except BaseException as error:  # noqa: BLE001 - raised by end().
            self.error = error

    def end(self) -> None:
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def nearly_all_frames(pool: Any) -> Any:
    """An array that takes the frames beside 256 pages of another, but a few: reclaim has to begin.

    Enough are left for who runs with the GIL while reclaim is held.
    """
    return pool.zeros((pool.memory // pool.page_size - 256 - 24, pool.page_size), np.uint8)


@pytest.mark.parametrize("point_name", ["fill_locked", "fill_read"])
def test_what_if_pages_are_being_read_when_their_array_moves(memory: Any, point_name: str) -> None:
    a = np.arange(N)
    page_out(memory, a)
    with (
        Failpoint(memory, point_name, "park") as reads,
        Failpoint(memory, "move_placed", "errno", limit=MANY) as placed,
    ):
        memory.advise(a[:512], "willneed")
        reads.wait_parked()
        mover = Thread(lambda: grown(a, 2 * N))
        # It is told to come again, until who reads them has them.
        until(lambda: placed.hits > 2, "the move is repeated")
        assert mover.is_alive()
        reads.release()
        mover.end()
    assert (a[:N] == np.arange(N)).all()
    a[:] = 3
    page_out(memory, a)
    assert (a == 3).all()


@pytest.mark.parametrize("point_name", ["clean_protected", "frame_evicting", "evict_punched"])
def test_what_if_pages_are_leaving_when_their_array_moves(memory: Any, point_name: str) -> None:
    a = np.arange(2 * N)
    if point_name != "clean_protected":
        # Dirty pages may be write-ahead's when reclaim comes, which takes others then.
        page_out(memory, a)
        assert (a == np.arange(2 * N)).all()
    other = nearly_all_frames(memory)
    # The only pages that nobody has referenced: who reclaims takes these, or who writes ahead.
    memory.advise(a, "dontneed")
    with (
        Failpoint(memory, point_name, "park", limit=MANY) as leaves,
        Failpoint(memory, "move_placed", "errno", limit=MANY) as placed,
    ):
        other[:] = 1
        until(lambda: leaves.parked, "they leave")
        mover = Thread(lambda: grown(a, 2 * N + 512))
        until(lambda: placed.hits > 2, "the move is repeated")
        assert mover.is_alive()
        leaves.release()
        mover.end()
    assert (a[: 2 * N] == np.arange(2 * N)).all()
    a[:] = 3
    page_out(memory, a)
    assert (a == 3).all()


def test_what_if_pages_are_being_written_out_when_their_array_moves(memory: Any) -> None:
    a = np.arange(2 * N)
    other = nearly_all_frames(memory)
    page = page_id(memory, a)
    memory.advise(a, "dontneed")
    with Failpoint(memory, "clean_written", "park", limit=MANY) as written:
        other[:] = 1
        until(lambda: written.parked and state_of(memory, page) == "writeback", "it goes out")
        # Nobody has it locked, so nobody is waited for; what is written now is not lost.
        assert grown(a, 2 * N + 512)
        a[:512] = 8
        written.release()
    page_out(memory, a)
    assert (a[:512] == 8).all()
    assert (a[512 : 2 * N] == np.arange(512, 2 * N)).all()
    assert not a[2 * N :].any()


def test_is_who_waits_for_a_page_woken_that_was_asked_for_before_it_moved(memory: Any) -> None:
    """A read that was begun for the old index has the page when it is touched at the new one."""
    a = np.arange(N)
    page = page_id(memory, a)
    page_out(memory, a)
    with Failpoint(memory, "frame_claimed", "park") as claimed:
        memory.advise(a[:512], "willneed")
        claimed.wait_parked()
        # Nothing names the frame yet: nobody is waited for.
        assert grown(a, N + 512)
        with Failpoint(memory, "fill_locked", "park") as locked:
            claimed.release()
            locked.wait_parked()
            assert state_of(memory, page) == "filling"
            reader = Thread(lambda: touch(a))
            wait_for_waiters(memory, page)
            locked.release()
            reader.end()
    assert (a[:N] == np.arange(N)).all()


def test_is_who_waits_for_a_page_woken_that_was_resident_when_it_moved(memory: Any) -> None:
    a = np.arange(N)
    page = page_id(memory, a)
    assert grown(a, N + 512)
    assert state_of(memory, page) == "present"
    with Failpoint(memory, "frame_evicting", "park") as evicting:
        out = Thread(lambda: memory.advise(a[:512], "pageout"))
        evicting.wait_parked()
        reader = Thread(lambda: touch(a))
        wait_for_waiters(memory, page)
        evicting.release()
        reader.end()
        out.end()
    assert (a[:N] == np.arange(N)).all()


# Deaths.


@pytest.mark.parametrize("skip", [0, 1, 2, 101, 255, 256])
def test_what_if_the_swapper_dies_in_the_middle_of_a_move(memory: Any, skip: int) -> None:
    a = np.arange(N)
    page_out(memory, a[: N // 2])
    # Two entries of the map change for each page: first where it comes to, then where it was.
    with Failpoint(memory, "map_put", "kill", skip=skip):
        grown(a, 2 * N)
    assert is_paged(a)
    assert (a[:N] == np.arange(N)).all()
    assert not a[N:].any()
    assert memory.stats().committed_bytes == a.nbytes
    a[:] = 3
    page_out(memory, a)
    assert (a == 3).all()
    assert grown(a, 3 * N)
    assert (a[: 2 * N] == 3).all()


@pytest.mark.parametrize("point_name", ["move_placed", "references_begun"])
def test_what_if_the_swapper_dies_with_a_move_done(memory: Any, point_name: str) -> None:
    a = np.arange(N)
    with Failpoint(memory, point_name, "kill"):
        grown(a, 2 * N)
    assert is_paged(a)
    assert (a[:N] == np.arange(N)).all()
    assert memory.stats().committed_bytes == a.nbytes


@pytest.mark.parametrize("point_name", ["move_begun", "move_mapped"])
@pytest.mark.parametrize("skip", [0, 1])
def test_what_if_a_process_dies_in_the_middle_of_a_move(
    memory: Any, point_name: str, skip: int
) -> None:
    a = np.arange(N)

    def move(_: object) -> None:
        made = np.arange(N)
        grown(made, 2 * N)

    actor = Actor(move)
    with Failpoint(memory, point_name, "kill", skip=skip):
        actor.tell()
        until(actor.has_ended, "the worker is killed")
    assert actor.status == signal.SIGKILL
    actor.end()
    until(lambda: memory.stats().workers == 1, "it is missed")
    assert (a == np.arange(N)).all()
    assert memory.stats().committed_bytes == a.nbytes


def test_does_a_fork_wait_for_a_move(memory: Any) -> None:
    a, b = np.arange(N), np.arange(N)
    with Failpoint(memory, "move_begun", "park") as begun:
        mover = Thread(lambda: grown(a, 2 * N))
        begun.wait_parked()
        forked: list[int] = []

        def fork() -> None:
            pid = os.fork()
            if pid == 0:
                os._exit(0 if (b == np.arange(N)).all() and np.ones(N).sum() == N else 1)
            forked.append(os.waitpid(pid, 0)[1])

        forker = Thread(fork)
        assert forker.is_alive()
        assert not forked
        begun.release()
        mover.end()
        forker.end()
    assert forked == [0]
    assert (a[:N] == np.arange(N)).all()
