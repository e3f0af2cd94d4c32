"""A worker that is killed or stopped, in the middle of faults too, harms nobody else."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import signal
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint, mappers_of, page_id, waiting_for
from workers import Worker, process_state, until, workers

import pyswap
from pyswap._native import native

pytestmark = pytest.mark.core

WORDS = 512
"""64-bit words of the pages of the `pool` fixture."""
PAGES = 64
VICTIM = 7
"""The page that the worker's fault is about."""
OTHERS = [page for page in range(PAGES) if page != VICTIM]

FILL_POINTS = ["fill_locked", "fallocate", "fill_read", "map_before"]
"""Where the swapper is while it resolves a worker's fault."""
EVICT_POINTS = ["clean_protected", "clean_written", "evict_punched", "evict_entry"]
"""Where the swapper is while it evicts the page that a worker writes to."""
LET_THROUGH = ["clean_written", "evict_entry"]
"""Those at which a write has not to wait: the page is not locked, or is filled in a new frame."""


def read_page(a: Any, page: int) -> list[int]:
    return [int(word) for word in a[page]]


def write_word(a: Any, page: int, value: int) -> None:
    a[page, 1] = value


def add_to_pages(a: Any, pages: list[int], n: int) -> None:
    a[pages, 2] += n


def page_out(held: tuple[pyswap.Pool, Any], page: int) -> None:
    pool, a = held
    pool.advise(a[page], "pageout")


def fill_pages(a: Any) -> None:
    """A value in every word that tells its page and place."""
    a[:] = np.arange(a.size).reshape(a.shape)


def filled(page: int) -> list[int]:
    return list(range(page * WORDS, (page + 1) * WORDS))


def evict(pool: pyswap.Pool, a: Any) -> None:
    """Put all of an array into swap, readahead that was asked for before notwithstanding."""

    def is_out() -> bool:
        pool.advise(a, "pageout")
        return not pool.residency(a).any()

    until(is_out, "the array is paged out")


def use_every_frame(pool: pyswap.Pool) -> None:
    """Write and read back more pages than there are frames."""
    frames = pool.memory // pool.page_size
    more = pool.zeros((2 * frames, WORDS), np.int64)
    more[:, 0] = np.arange(len(more))
    assert (more[:, 0] == np.arange(len(more))).all()


def leave(worker: Worker, how: int) -> None:
    """Kill or stop a worker where it is."""
    if how == signal.SIGKILL:
        worker.kill()
    else:
        worker.stop()


ways = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])


@ways
@pytest.mark.failpoint
@pytest.mark.parametrize("point", FILL_POINTS)
def test_do_others_go_on_when_a_worker_goes_while_its_page_is_filled(
    pool: pyswap.Pool, point: str, how: int
) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill_pages(a)
    pool.advise(a, "random")
    with workers(a, 2) as (lost, other):
        evict(pool, a)
        with Failpoint(pool, point, "park") as held:
            lost.send(write_word, VICTIM, -1)
            held.wait_parked()
            leave(lost, how)
            other.ask(add_to_pages, OTHERS, 1)
            a[OTHERS, 2] += 1
            other.send(read_page, VICTIM)
            until(lambda: waits_for(pool, a[VICTIM]), "the other worker waits for the page")
        seen = other.answer()
        # The write may have come to pass if the fault was served in time, and only as a whole.
        assert seen in (filled(VICTIM), [*filled(VICTIM)[:1], -1, *filled(VICTIM)[2:]])
        finish_without(pool, a, lost, how)


def waits_for(pool: pyswap.Pool, page: Any) -> bool:
    """Whether some worker has left word that it waits for a page."""
    return waiting_for(pool, page) > 0


def finish_without(pool: pyswap.Pool, a: Any, lost: Worker, how: int) -> None:
    """See that pages are evictable and frames usable, and that one that was stopped goes on."""
    evict(pool, a)
    use_every_frame(pool)
    for page in OTHERS:
        expected = filled(page)
        expected[2] += 2
        assert read_page(a, page) == expected
    if how == signal.SIGSTOP:
        evict(pool, a)
        lost.signal(signal.SIGCONT)
        lost.answer()
        assert a[VICTIM, 1] == -1
        lost.ask(add_to_pages, [VICTIM], 5)
        assert a[VICTIM, 2] == filled(VICTIM)[2] + 5
        assert lost.end() == 0
    until(lambda: pool.stats().workers == 2, "the swapper notices the worker's end")
    evict(pool, a)


@ways
@pytest.mark.failpoint
@pytest.mark.parametrize("point", EVICT_POINTS)
def test_do_others_go_on_when_a_worker_goes_while_its_page_is_evicted(
    pool: pyswap.Pool, point: str, how: int
) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill_pages(a)
    with workers(a, 1) as (lost,), workers((pool, a), 1) as (other,):
        # Mapped writable there, so that the eviction has to take that away.
        lost.ask(write_word, VICTIM, filled(VICTIM)[1])
        with Failpoint(pool, point, "park") as held:
            other.send(page_out, VICTIM)
            held.wait_parked()
            lost.send(write_word, VICTIM, -1)
            if point in LET_THROUGH:
                lost.answer()
                assert a[VICTIM, 1] == -1
                lost.send(write_word, VICTIM, -1)
            else:
                until(lambda: waits_for(pool, a[VICTIM]), "the worker waits for the page")
            leave(lost, how)
            a[OTHERS, 2] += 2
        other.answer()
        expected = filled(VICTIM)
        if point in LET_THROUGH:
            expected[1] = -1
        assert read_page(a, VICTIM) == expected
        finish_without(pool, a, lost, how)


@ways
@pytest.mark.failpoint
def test_do_waiting_faults_of_a_lost_worker_leave_the_page_to_others(
    pool: pyswap.Pool, how: int
) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill_pages(a)
    pool.advise(a, "random")
    with workers(a, 4) as (first, *lost):
        evict(pool, a)
        with Failpoint(pool, "fill_locked", "park") as held:
            first.send(read_page, VICTIM)
            held.wait_parked()
            for n, worker in enumerate(lost, 1):
                worker.send(write_word, VICTIM, -1)
                until(lambda n=n: waiting_for(pool, a[VICTIM]) == n, f"{n} wait")
            for worker in lost:
                leave(worker, how)
        assert first.answer()[:1] == filled(VICTIM)[:1]
        a[VICTIM, 3] = -3
        evict(pool, a)
        assert first.ask(read_page, VICTIM)[3] == -3
        for worker in lost if how == signal.SIGSTOP else ():
            worker.signal(signal.SIGCONT)
            worker.answer()
        if how == signal.SIGSTOP:
            assert read_page(a, VICTIM)[1] == -1


def count_on(held: tuple[Any, mmap.mmap], column: int, seed: int, first: int, last: int) -> None:
    """Add 1 to a counter in page after page, in a random order, and tell how far it has come."""
    a, told = held
    pages = np.random.default_rng(seed).permutation(len(a))
    progress = np.frombuffer(told, np.int64)
    for i in range(first, last):
        a[pages[i % len(pages)], column] += 1
        progress[column] = i + 1


def counts(pages: int, seed: int, done: int) -> np.ndarray[Any, Any]:
    """What `count_on` leaves in the pages after so many additions."""
    order = np.random.default_rng(seed).permutation(pages)
    expected = np.full(pages, done // pages)
    expected[order[: done % pages]] += 1
    return expected


@contextmanager
def told_progress(columns: int) -> Iterator[tuple[mmap.mmap, np.ndarray[Any, Any]]]:
    """Plain shared memory in which workers tell their progress, a word each."""
    told = mmap.mmap(-1, mmap.PAGESIZE)
    yield told, np.frombuffer(told, np.int64)[:columns]


def test_is_a_worker_that_ends_no_mapper_of_what_it_had_mapped(pool: Any) -> None:
    """Its number will be another's, which would be taken to have the pages mapped."""
    a = pool.ones((1000, pool.page_size), np.uint8)
    pages = [page_id(pool, a[i]) for i in range(0, 1000, 50)]
    with workers(a[::50], 1) as (reader,):
        assert reader.ask(np.sum) == len(pages) * pool.page_size
        assert {mappers_of(pool, page) for page in pages} == {2}
    # It counts as gone a moment before its number is free.
    until(lambda: {mappers_of(pool, page) for page in pages} == {1}, "one mapper is left")
    assert pool.stats().workers == 1


def test_are_all_counts_right_when_workers_are_killed_and_stopped_at_random(
    pool: pyswap.Pool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    goal, rounds = 4000, 14
    a = pool.zeros((4 * pool.memory // pool.page_size, WORDS), np.int64)
    pool.advise(a, "random")
    dead: list[int] = []
    with told_progress(4 + rounds) as (told, progress):
        crew: dict[int, Worker] = {}
        try:

            def begin(column: int) -> None:
                crew[column] = Worker((a, told))
                crew[column].send(count_on, column, seed + column, 0, goal)

            def goes_on(columns: list[int], steps: int) -> None:
                goals = {c: min(goal, int(progress[c]) + steps) for c in columns}
                until(lambda: all(progress[c] >= n for c, n in goals.items()), f"go on: {goals}")

            for column in range(4):
                begin(column)
            for column in range(4, 4 + rounds):
                victim = int(rng.choice(list(crew)))
                others = [c for c in crew if c != victim]
                goes_on([victim], int(rng.integers(1, 300)))
                crew[victim].stop()
                goes_on(others, 100)
                if rng.random() < 0.4:
                    crew[victim].signal(signal.SIGCONT)
                else:
                    crew[victim].kill()
                    crew.pop(victim).finish()
                    dead.append(victim)
                    goes_on(others, 100)
                    begin(column)
            for worker in crew.values():
                worker.answer()
            assert all(worker.end() == 0 for worker in crew.values())
        finally:
            for worker in crew.values():
                worker.finish()
        check_counts(a, seed, goal, progress, crew, dead)
    now = pool.stats()
    print(f"{len(dead)} killed, {now.major_faults} major faults, {now.evictions} evictions")
    assert dead
    assert now.evictions > 10_000
    until(lambda: pool.stats().workers == 1, "the swapper notices the workers' ends")
    evict(pool, a)


def check_counts(
    a: Any, seed: int, goal: int, progress: Any, crew: dict[int, Worker], dead: list[int]
) -> None:
    """Compare every counter; a killed worker may have made one addition that it did not tell."""
    found = np.array([a[low : low + 256, : len(progress)] for low in range(0, len(a), 256)])
    found = found.reshape(len(a), -1)
    for column in crew:
        np.testing.assert_array_equal(found[:, column], counts(len(a), seed + column, goal))
    for column in dead:
        done = int(progress[column])
        as_told, one_more = (counts(len(a), seed + column, n) for n in (done, done + 1))
        is_right = (found[:, column] == as_told).all() or (found[:, column] == one_more).all()
        assert is_right, f"the counters of a worker killed after {done} additions"


def make_and_fill(pool: pyswap.Pool, pages: int) -> None:
    """Fill an array of this worker's own, kept until its end."""
    global _kept
    _kept = pool.full((pages, WORDS), 1, np.int64)


_kept: Any = None


@ways
def test_are_the_frames_of_a_killed_workers_own_array_usable(how: int) -> None:
    with pyswap.Pool("1 MiB", 0, page_size=4096) as pool, workers(pool, 1) as (lost,):
        room = pool._control().numbers()["memory_pages"] * 3 // 4
        lost.ask(make_and_fill, room)
        with pytest.raises(pyswap.SwapFullError):
            pool.zeros((room, WORDS), np.int64)
        lost.stop()
        if how == signal.SIGSTOP:
            # One that is only stopped keeps what it has.
            with pytest.raises(pyswap.SwapFullError):
                pool.zeros((room, WORDS), np.int64)
        lost.kill()
        until(lambda: pool.stats().committed_bytes == 0, "the dead worker's array is freed")
        until(lambda: pool.stats().resident_pages == 0, "its frames are free")
        a = pool.full((room, WORDS), 3, np.int64)
        assert (a == 3).all()
        assert pool.stats().resident_pages == room


def pin_and_wait(held: tuple[pyswap.Pool, Any], pipe: int) -> None:
    """Pin an array, say so, and never let go."""
    pool, a = held
    with pool.pin(a, writable=True):
        a[:] += 1
        os.write(pipe, b"x")
        signal.pause()


def test_are_a_killed_workers_pinned_pages_evictable(pool: pyswap.Pool) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill_pages(a)
    reading, writing = os.pipe()
    try:
        with workers((pool, a), 1) as (lost,):
            lost.send(pin_and_wait, writing)
            assert os.read(reading, 1) == b"x"
            lost.stop()
            pool.advise(a, "pageout")
            assert pool.residency(a).all(), "a pin holds while its process is only stopped"
            assert pool.stats().pinned_pages == PAGES
            lost.kill()
            until(lambda: pool.stats().pinned_pages == 0, "the dead worker's pins end")
        evict(pool, a)
        assert a[VICTIM].tolist() == [word + 1 for word in filled(VICTIM)]
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.failpoint
def test_is_a_pin_undone_whose_worker_is_killed_before_it_is_granted(pool: pyswap.Pool) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill_pages(a)
    pool.advise(a, "random")
    evict(pool, a)
    reading, writing = os.pipe()
    try:
        with workers((pool, a), 1) as (lost,):
            with Failpoint(pool, "fill_read", "park", skip=PAGES // 2) as held:
                lost.send(pin_and_wait, writing)
                held.wait_parked()
                lost.kill()
                until(lambda: pool.stats().workers == 1, "the swapper notices the worker's end")
            until(lambda: pool.stats().pinned_pages == 0, "the pin is taken back")
        evict(pool, a)
        assert a[VICTIM].tolist() == filled(VICTIM)
    finally:
        os.close(reading)
        os.close(writing)


def test_is_a_child_forgotten_that_dies_before_it_attaches(
    pool: pyswap.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [pool.full((PAGES, WORDS), 1, np.int64)]
    adopt = type(pool._attachment)._adopt

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(type(pool._attachment), "_adopt", die)
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    monkeypatch.setattr(type(pool._attachment), "_adopt", adopt)
    held.clear()
    until(lambda: pool.stats().committed_bytes == 0, "the promised references are dropped")
    until(lambda: pool.stats().workers == 1, "no place is kept")
    until(lambda: pool.stats().resident_pages == 0, "its frames are free")


def control_mappings(pool: pyswap.Pool) -> list[tuple[int, int, str]]:
    """Where this process maps the control segment: start, end and modes."""
    inode = str(os.fstat(pool._attachment.control_fd).st_ino)
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, modes, _, _, line_inode, *_ = line.split(None, 5)
        if line_inode == inode and "pyswap" in line:
            low, high = (int(place, 16) for place in places.split("-"))
            found.append((low, high, modes))
    return found


# In the debug build the header is writable: workers visit failpoints too.
READ_ONLY = ["rw-s", "r--s"] if native.debug_build else ["r--s"]


def control_modes(pool: pyswap.Pool) -> list[str]:
    return [modes for _, _, modes in control_mappings(pool)]


def write_to_control(pool: pyswap.Pool) -> None:
    """Write a byte of the tables over itself, through the mapping."""
    first = control_mappings(pool)[-1][0]
    ctypes.memset(first, ctypes.c_ubyte.from_address(first).value, 1)


def map_control_writable(pool: pyswap.Pool) -> None:
    mmap.mmap(pool._attachment.control_fd, mmap.PAGESIZE).close()


def test_is_the_control_segment_read_only_in_workers(pool: pyswap.Pool) -> None:
    a = pool.full(WORDS, 1, np.int64)
    with workers(pool, 2) as (first, second):
        for modes in (control_modes(pool), first.ask(control_modes), second.ask(control_modes)):
            assert modes == READ_ONLY
        for worker in (first, second):
            with pytest.raises(PermissionError):
                worker.ask(map_control_writable)
        first.send(write_to_control)
        assert first.wait() == -signal.SIGSEGV
        until(lambda: pool.stats().workers == 2, "the swapper notices the worker's end")
        assert second.ask(control_modes) == READ_ONLY
    evict(pool, a)
    assert (a == 1).all()


def test_does_a_stopped_worker_hold_up_nothing(pool: pyswap.Pool, seed: int) -> None:
    """Forks, new arrays, frees and closing of others, while one sleeps on what it has mapped."""
    a = pool.zeros((PAGES, WORDS), np.int64)
    with workers(a, 3) as crew:
        for worker in crew:
            worker.ask(add_to_pages, list(range(PAGES)), 1)
            worker.stop()
        use_every_frame(pool)
        for n in range(20):
            with workers(a, 1) as (child,):
                child.ask(add_to_pages, [n], 1)
                assert child.end() == 0
            b = pool.full((PAGES, WORDS), n, np.int64)
            assert (b == n).all()
            del b
        assert all(process_state(worker.pid) == "T" for worker in crew)
        expected = np.full(PAGES, 3)
        expected[:20] += 1
        assert a[:, 2].tolist() == expected.tolist()
        evict(pool, a)
        for worker in crew:
            worker.signal(signal.SIGCONT)
            worker.ask(add_to_pages, [0], 1)
            assert worker.end() == 0
        assert a[0, 2] == 7


def test_is_who_closed_its_connection_served_until_it_needs_its_attendant(
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Made here: its swapper's stderr is to be the one that is captured.
    with pyswap.Pool("8 MiB", "64 MiB", page_size=4096) as pool:
        a = pool.zeros((PAGES, WORDS), np.int64)
        own = pool.ones((PAGES, WORDS), np.int64, private=True)
        a[:] = 1
        evict(pool, a)
        pid = os.fork()
        if pid == 0:
            # As a daemon does, whose files are all its own.
            os.closerange(3, 65536)
            a[:, 0] += own[:, 0]
            a[:, 1] += int(a[0, 2])
            own[0, 0] = 5
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS
        assert f"process {pid} closed its connection" in capfd.readouterr().err
        until(lambda: pool.stats().workers == 1, "the swapper notices the worker's end")
        evict(pool, a)
        assert (a[:, :2] == 2).all()
        assert (own == 1).all()
        own[:] = 2
        until(lambda: pool.stats().resident_pages <= 2 * PAGES, "its copies are freed")
        pool.check()


def looks_of_the_attendant() -> int:
    """How often this process's attendant has gone to sleep; -1 once it has ended."""
    told = ""
    for task in {*os.listdir("/proc/self/task")} - {str(os.getpid())}:
        with contextlib.suppress(OSError):
            told += Path(f"/proc/self/task/{task}/status").read_text()
    slept = re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", told, re.MULTILINE)
    return sum(map(int, slept)) if slept else -1


def test_is_a_daemon_served_on_under_whose_descriptors_are_other_files(pool: pyswap.Pool) -> None:
    """Its attendant takes nothing for its own that is not; another worker's sees to the swapper."""
    a = pool.zeros((PAGES, WORDS), np.int64)
    a[:] = 1
    evict(pool, a)
    here, there = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(there[0], 0)
            os.dup2(here[1], 1)
            os.closerange(3, 65536)
            first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            second.send(b"nobody else's")
            for _ in range(90):
                os.dup(first.fileno())
            begun = looks_of_the_attendant()
            # Its look that was under way at the close, and one that it began after.
            until(lambda: looks_of_the_attendant() >= begun + 3, "the attendant looks again")
            a[:, 0] += a[:, 1]
            os.write(1, b"x")
            os.read(0, 1)
            a[:, 1] += a[:, 0]
            assert first.recv(100) == b"nobody else's"
            second.send(b"another")
            assert first.recv(100) == b"another"
            os._exit(0)
        except BaseException:  # noqa: BLE001 - it must not return into pytest.
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)
    for fd in (there[0], here[1]):
        os.close(fd)
    try:
        assert os.read(here[0], 1) == b"x"
        evict(pool, a)
        os.kill(pool.swapper_pid, signal.SIGKILL)
        assert (a[:, :2] == [2, 1]).all()
        os.write(there[1], b"x")
    finally:
        status = os.waitpid(pid, 0)[1]
        for fd in (here[0], there[1]):
            os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (a[:, :2] == [2, 3]).all()


@pytest.mark.failpoint
def test_is_every_failpoint_of_faults_and_evictions_tried() -> None:
    kinds = "fill|map_before|evict|clean"
    names = {name for name in native.FAILPOINT_NAMES if re.match(kinds, name)}
    # The write that fails is no place to be killed at: the batch is in the kernel, or is not.
    assert {*FILL_POINTS, *EVICT_POINTS} >= names - {"clean_write"}
