"""Does NumPy make its arrays in the pool's memory, whoever asks, and give it back?"""

from __future__ import annotations

import errno
import fcntl
import gc
import multiprocessing
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import traceback
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from failpoints import until

import pyswap
from pyswap import _allocator, allocator, protocol
from pyswap._native import native

pytestmark = pytest.mark.core

SMALL = "64 KiB"
"""A threshold that lets these tests be quick."""
N = 1 << 17
"""Items of a large array of float64: a mebibyte."""


def address(a: Any) -> int:
    return int(np.asarray(a).__array_interface__["data"][0])


def is_paged(a: Any) -> bool:
    return bool(native.owns(address(a)))


def blocks_bytes() -> int:
    """Bytes of blocks in the arenas of this process."""
    return sum(used for _, _, used, _ in _allocator.arenas_told())


def in_child(action: Callable[[], None]) -> None:
    """Run an action in a forked child; its failure is this process's."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:  # noqa: BLE001 (told, and the status says it)
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def expect(truth: Any) -> None:
    assert truth


def idle(pool: Any) -> bool:
    stats = pool.stats()
    return not (stats.resident_pages or stats.swap_used_bytes or stats.committed_bytes)


# Which arrays.


def test_is_every_large_array_in_the_pools_memory(pool: Any) -> None:
    scipy_signal = pytest.importorskip("scipy.signal")
    with pyswap.numpy_memory(pool, SMALL):
        a = np.random.default_rng(1).random(N)
        made = [a, a + a, np.sort(a), a * 2 - 1, np.zeros(N), a.astype(np.float32), a[a > 0.25]]
        made += [
            np.concatenate([a, a]),
            scipy_signal.fftconvolve(a, a[:9]),
            np.frompyfunc(abs, 1, 1)(a),
        ]
        assert all(is_paged(x) for x in made)
        assert not any(address(x) % 64 for x in made)
        assert all(type(x) is np.ndarray for x in made)
        del made, a


@pytest.fixture(scope="module")
def pandas() -> Any:
    """Imported before a test begins, since it starts threads that stay."""
    return pytest.importorskip("pandas")


def test_are_the_columns_of_a_data_frame_in_the_pools_memory(pool: Any, pandas: Any) -> None:
    import io

    with pyswap.numpy_memory(pool, SMALL):
        text = "a,b\n" + "".join(f"{i},{i}.5\n" for i in range(20000))
        frame = pandas.read_csv(io.StringIO(text))
        assert is_paged(frame["b"].to_numpy())
        assert frame["b"].sum() == sum(range(20000)) + 10000
        del frame


def test_is_a_small_array_where_it_was_before(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        assert not is_paged(np.empty(65535, np.uint8))
        assert is_paged(np.empty(65536, np.uint8))


def test_does_it_hold_in_threads_executors_and_forked_children(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(is_paged(np.ones(N))))
        thread.start()
        thread.join()
        with ThreadPoolExecutor(2) as executor:
            found += executor.map(lambda _: is_paged(np.ones(N)), range(4))
        assert found == [True] * 5

        def child() -> None:
            assert is_paged(np.ones(N))
            with ThreadPoolExecutor(1) as executor:
                assert executor.submit(lambda: is_paged(np.ones(N))).result()

        in_child(child)


def test_does_it_end_with_the_block(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        pass
    assert not is_paged(np.empty(N))
    memory = pyswap.numpy_memory(pool, SMALL)
    memory.install()
    assert is_paged(np.empty(N))
    memory.uninstall()
    memory.uninstall()
    assert not is_paged(np.empty(N))


def test_does_the_one_before_hold_again_after_an_inner_one(pool: Any) -> None:
    made = []
    with pyswap.Pool("1 MiB", "8 MiB", page_size=4096) as inner, pyswap.numpy_memory(pool, SMALL):
        made.append(np.ones(N))
        with pyswap.numpy_memory(inner, "256 KiB"):
            made.append(np.ones(N))
            assert not is_paged(np.ones(N // 16))
        made.append(np.ones(N // 16))
        tokens = [native.find(address(a)) for a in made]
        assert tokens[0][2] == tokens[2][2] != tokens[1][2]
        made.clear()


# Memory: what it costs, and when it is given back.


def test_is_memory_committed_by_what_is_allocated(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        assert pool.stats().committed_bytes == 0
        a = np.empty(N)
        assert pool.stats().committed_bytes == a.nbytes
        b = np.empty(3 * N)
        assert pool.stats().committed_bytes == a.nbytes + b.nbytes
        del a
        assert pool.stats().committed_bytes == b.nbytes
        del b
        assert pool.stats().committed_bytes == 0


def test_are_frames_and_slots_given_back_at_once(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        a = np.arange(4 * 1024 * 1024, dtype=np.float64)  # four times the budget
        stats = pool.stats()
        assert stats.resident_pages > 1000
        assert stats.swap_used_bytes >= a.nbytes - pool.memory
        del a
        # What is being written out at this moment follows as soon as it is.
        until(lambda: idle(pool), "all memory and swap is free")
        pool.check()


def test_is_out_of_swap_a_memory_error_and_nothing_worse(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        kept: list[Any] = []
        with pytest.raises(MemoryError):
            kept.extend(np.ones(8 * N) for _ in range(100))
        assert 60 < sum(a.nbytes for a in kept) >> 20 <= 72
        assert all(a[0] == a[-1] == 1 for a in kept)
        with pytest.raises(MemoryError):
            np.empty(1 << 40)
        kept.pop()
        kept.append(np.ones(8 * N))
        del kept


def test_is_freed_memory_zero_when_it_is_used_again(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        for fill in range(1, 6):
            a = np.empty(N)
            assert not a.any()
            a[:] = fill
            del a


def test_does_the_handler_know_its_own_whenever_they_were_made(pool: Any) -> None:
    before = np.ones(N)
    with pyswap.numpy_memory(pool, SMALL):
        during = np.ones(N)
        del before
    after = np.ones(N)
    assert is_paged(during)
    with pyswap.numpy_memory(pool, SMALL):
        del after, during
    until(lambda: idle(pool), "all memory and swap is free")
    assert _allocator.arenas_told() == []


def test_do_arrays_outlive_the_block_and_the_pool() -> None:
    with pyswap.Pool("1 MiB", "8 MiB", page_size=4096) as pool:
        with pyswap.numpy_memory(pool, SMALL):
            a = np.arange(4 * N, dtype=np.float64)
        assert not is_paged(np.empty(N))
    assert is_paged(a)
    assert a.sum() == sum(range(4 * N))
    a += 1
    assert a[-1] == 4 * N
    del a
    assert _allocator.arenas_told() == []


def test_is_memory_ordinary_once_the_pool_is_closed(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        pool.close()
        a = np.ones(N)
        assert not is_paged(a)


# Resizing.


def test_does_a_resized_array_keep_its_bytes(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        a = np.arange(N, dtype=np.int64)
        start = address(a)
        a.resize(3 * N, refcheck=False)
        assert address(a) == start, "it grows in place where there is room"
        blocker = np.ones(N)
        a.resize(5 * N, refcheck=False)
        assert address(a) != start
        assert (a[:N] == np.arange(N)).all()
        assert not a[N:].any()
        a.resize(N // 2, refcheck=False)
        assert blocks_bytes() == a.nbytes + blocker.nbytes
        a.resize(16, refcheck=False)
        assert (a == np.arange(16)).all()
        del blocker, a


def grown(a: np.ndarray[Any, Any], items: int) -> bool:
    """Grow an array that has something right behind it; whether its address changed."""
    before = address(a)
    blockers = [np.empty(1 << 16, np.uint8)]
    while address(blockers[-1]) < before:
        blockers.append(np.empty(1 << 16, np.uint8))
    a.resize(items, refcheck=False)
    return address(a) != before


def test_does_an_array_that_moves_take_its_pages_with_it(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        a = np.arange(16 * N)  # twice the budget
        before = pool.stats()
        assert grown(a, 16 * N + 1000)
        after = pool.stats()
        assert is_paged(a)
        # No page was read in, none copied, and none of those that are there was touched.
        assert after.slot_reads == before.slot_reads
        assert after.cow_copies == before.cow_copies
        assert after.major_faults == before.major_faults
        assert after.zero_fills - before.zero_fills <= 1 + 8000 // pool.page_size
        assert (a[: 16 * N] == np.arange(16 * N)).all()
        assert not a[16 * N :].any()
        a += 1
        assert a[0] == 1
        del a
        until(lambda: idle(pool), "all memory and swap is free")


def test_are_addresses_used_again_after_moves(pool: Any) -> None:
    """Two arrays that grow in turn are in each other's way; at last all is one free span again."""
    with pyswap.numpy_memory(pool, "4 KiB"):
        pair = [np.arange(1000), np.arange(1000)]
        seen: list[set[int]] = [set(), set()]
        for n in range(2000, 60000, 1000):
            for k in (0, 1):
                seen[k].add(address(pair[k]))
                pair[k].resize(n, refcheck=False)
                pair[k][n - 1000 :] = np.arange(n - 1000, n)
        assert min(map(len, seen)) > 3
        assert all((a == np.arange(59000)).all() for a in pair)
        (arena,) = (told for told in _allocator.arenas_told() if told[3])
        pair.clear()
        until(lambda: idle(pool), "all memory and swap is free")
        # Nearly as long as the arena: in no span but one of all of it.
        assert address(np.empty(arena[1] - (12 << 20), np.uint8)) < arena[0] + (12 << 20)


@pytest.mark.parametrize("forked", ["before it moves", "after it has moved"])
def test_has_each_process_its_own_array_when_it_moves(pool: Any, forked: str) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        a = np.arange(12 * N)
        if forked == "after it has moved":
            assert grown(a, 13 * N)
            a[12 * N :] = np.arange(12 * N, 13 * N)
        go, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(told)
            os.read(go, 1)
            right = (a == np.arange(len(a))).all()
            a[::1000] = 7
            os._exit(0 if right and (a[::1000] == 7).all() else 1)
        os.close(go)
        a[: 2 * N] = 5
        kept = len(a)
        assert grown(a, 14 * N)
        os.close(told)
        assert (a[: 2 * N] == 5).all()
        assert (a[2 * N : kept] == np.arange(2 * N, kept)).all()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        # The child's pages are gone: what is copied now moves, or not, and is right.
        assert grown(a, 15 * N)
        assert (a[2 * N : kept] == np.arange(2 * N, kept)).all()
        del a
        until(lambda: idle(pool), "all memory and swap is free")


def test_does_an_array_move_back_and_forth_between_forks(pool: Any, seed: int) -> None:
    rng = random.Random(seed)
    with pyswap.numpy_memory(pool, "16 KiB"):
        held = [np.full(4000, k) for k in range(12)]

        def child() -> None:
            for k, a in enumerate(held):
                assert (a == k).all()
                a[:: rng.randrange(1, 700)] = -1
                a.resize(len(a) + rng.randrange(5000), refcheck=False)
            for _ in range(30):
                held[rng.randrange(12)].resize(rng.randrange(4000, 40000), refcheck=False)

        moves = 0
        for _ in range(12):
            for _ in range(40):
                k = rng.randrange(12)
                n, start, size = rng.randrange(3000, 50000), address(held[k]), len(held[k])
                held[k].resize(n, refcheck=False)
                assert (held[k][:size] == k).all()
                held[k][:] = k
                moves += n > size and address(held[k]) != start
            in_child(child)
        assert moves > 10
        held.clear()
        until(lambda: idle(pool), "all memory and swap is free")


def test_stays_a_pinned_page_where_it_is_when_its_array_moves(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        a = np.arange(2 * N)
        with pool.pin(a[:1000]):
            assert grown(a, 3 * N)
            assert (a[: 2 * N] == np.arange(2 * N)).all()
        until(lambda: pool.stats().pinned_pages == 0, "nothing is pinned")
        del a
        until(lambda: idle(pool), "all memory and swap is free")


def test_does_an_array_that_grows_over_the_threshold_become_paged(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        a = np.arange(100)
        a.resize(N, refcheck=False)
        assert is_paged(a)
        assert (a[:100] == np.arange(100)).all()
        assert not a[100:].any()
        b = np.fromiter((i for i in range(N)), np.int64)
        assert is_paged(b)
        assert (b == np.arange(N)).all()
        del a, b


def test_is_the_array_whole_when_there_is_no_room_to_resize_it(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        a = np.arange(2 * N)
        with pytest.raises(MemoryError):
            a.resize(80 * N, refcheck=False)
        assert (a == np.arange(2 * N)).all()
        del a


# Fork.


def write_half(held: list[Any]) -> None:
    a = held[0]
    assert (a == 1).all()
    a[: 4 * N] = 2
    b = a + 1
    assert b[0] == 3
    assert b[-1] == 2


def test_has_each_process_its_own_array_after_a_fork(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        held = [np.full(8 * N, 1.0)]  # 8 MiB, as much as memory
        in_child(lambda: write_half(held))
        assert (held[0] == 1).all()
        held[0][:] = 4
        in_child(lambda: expect((held[0] == 4).all()))
        held.clear()
        until(lambda: idle(pool), "all memory and swap is free")


def test_may_a_child_free_what_it_inherited(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        held = [np.full(2 * N, 7.0)]

        def child() -> None:
            held.clear()
            gc.collect()
            assert blocks_bytes() == 0

        in_child(child)
        assert (held[0] == 7).all()
        held.clear()
        until(lambda: idle(pool), "all memory and swap is free")


def test_may_the_parent_free_what_a_child_still_has(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        a = np.full(2 * N, 7.0)
        go, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(told)
            os.read(go, 1)
            os._exit(0 if (a == 7).all() else 1)
        os.close(go)
        start = address(a)
        del a
        b = np.empty(2 * N)
        assert address(b) != start, "the child's pages are not given to anybody"
        assert not b.any()
        b[:] = 9
        os.close(told)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (b == 9).all()
        del b
        until(lambda: idle(pool), "all memory and swap is free")


def test_do_pool_workers_return_what_they_computed(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        base = np.arange(N, dtype=np.float64)
        with multiprocessing.get_context("fork").Pool(2) as workers:
            results = workers.map(base.__mul__, range(6))
        assert all((r == base * k).all() for k, r in enumerate(results))
        del base, results


def test_may_another_thread_allocate_while_one_forks(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        stop = threading.Event()
        rounds = [0, 0]

        def churn(k: int) -> None:
            while not stop.is_set():
                a = np.full(N // 4, float(k))
                assert a[0] == a[-1] == k
                del a
                rounds[k] += 1

        threads = [threading.Thread(target=churn, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                in_child(lambda: expect(np.ones(N).sum() == N))
            until(lambda: min(rounds) > 3, "both threads allocate")
        finally:
            stop.set()
            for thread in threads:
                thread.join()


class _Fat:
    """Garbage that frees a large array, and makes one, when it is collected."""

    def __init__(self) -> None:
        self.cycle = self
        self.data = np.ones(N // 4)

    def __del__(self) -> None:
        np.ones(N // 4)


def test_may_garbage_be_collected_in_the_middle_of_a_request(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        before = gc.get_threshold()
        gc.set_threshold(3, 2, 2)
        try:
            for _ in range(60):
                _Fat()
                pool.swaps()
            for _ in range(3):
                _Fat()
                in_child(lambda: expect(np.ones(N).sum() == N))
        finally:
            gc.set_threshold(*before)
        gc.collect()
        assert blocks_bytes() == 0


def test_do_arrays_and_allocation_survive_a_dead_swapper(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        held = [np.arange(16 * N)]  # twice the budget
        os.kill(pool.swapper_pid, signal.SIGKILL)
        held.append(np.arange(N))
        assert is_paged(held[1])
        assert all((a == np.arange(a.size)).all() for a in held)
        assert pool.stats().committed_bytes == sum(a.nbytes for a in held)
        held.clear()
        until(lambda: idle(pool), "all memory and swap is free")


# What comes to pass while no swapper is there.


@contextmanager
def no_successor(pool: Any) -> Iterator[None]:
    """Kill the swapper, and have no other elected inside the block: its name is taken."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taken:
        taken.bind(f"\0pyswap-takeover-{pool._attachment.control.mark():016x}")
        kill_for_certain(pool.swapper_pid)
        yield


def kill_for_certain(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 60)[0]
    finally:
        os.close(pidfd)


def committed(pool: Any) -> int:
    return int(pool.stats().committed_bytes)


@pytest.fixture
def paged(pool: Any) -> Iterator[Any]:
    """A pool whose memory NumPy uses, with an array in it, so that the arena stays."""
    with pyswap.numpy_memory(pool, SMALL):
        kept = np.ones(N)
        yield pool
        assert kept.sum() == N


def test_is_the_swapper_told_later_what_was_freed_while_there_was_none(paged: Any) -> None:
    before = committed(paged)
    held = [np.ones(N), np.ones(2 * N)]
    blocks = blocks_bytes()
    thread = threading.Thread(target=held.clear)
    with no_successor(paged):
        thread.start()
        until(lambda: blocks_bytes() < blocks, "it is freed here")
    thread.join(60)
    until(lambda: committed(paged) == before, "the swapper knows")
    again = np.zeros(N)
    assert not again.any()
    assert committed(paged) == before + again.nbytes


def test_is_told_later_what_a_resize_gave_back_while_there_was_no_swapper(paged: Any) -> None:
    held = [np.ones(2 * N)]
    before, blocks = committed(paged), blocks_bytes()

    def shrink() -> None:
        held[0].resize(N, refcheck=False)

    thread = threading.Thread(target=shrink)
    with no_successor(paged):
        thread.start()
        until(lambda: blocks_bytes() < blocks, "it is freed here")
    thread.join(60)
    until(lambda: committed(paged) == before - 8 * N, "the swapper knows")
    assert held[0].sum() == N


def test_is_told_with_the_next_block_what_a_request_kept_from_being_told(paged: Any) -> None:
    """Garbage that is collected in the middle of a request cannot ask for another line."""
    before = committed(paged)
    held = [np.ones(N)]
    with no_successor(paged):
        paged._attachment.caller = threading.get_ident()
        held.clear()
        paged._attachment.caller = None
    assert committed(paged) == before + 8 * N
    another = np.ones(N)
    assert committed(paged) == before + another.nbytes


def test_frees_a_child_what_its_parent_could_not_tell_of(paged: Any) -> None:
    before = committed(paged)
    held = [np.ones(N)]
    with no_successor(paged):
        paged._attachment.caller = threading.get_ident()
        held.clear()
        paged._attachment.caller = None
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    # The parent tells now; of the page that both have the child has told.
    another = np.ones(N)
    until(lambda: committed(paged) == before + another.nbytes, "both have freed it")
    os.close(writing)
    os.close(reading)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def sent_over(pool: Any) -> int:
    """Bytes of orders that the swapper has not read."""
    line = allocator._house.lines.open[pool._attachment.token]
    count = array("i", [0])
    fcntl.ioctl(line, termios.TIOCOUTQ, count)
    return count[0]


@pytest.mark.parametrize("what", ["begin", "end"])
def test_is_an_order_given_again_whose_answer_is_lost(paged: Any, what: str) -> None:
    held = [np.ones(N)]
    before = committed(paged)

    def order() -> None:
        if what == "begin":
            held.append(np.ones(N))
        else:
            held.clear()

    thread = threading.Thread(target=order)
    old = paged.swapper_pid
    os.kill(old, signal.SIGSTOP)
    try:
        thread.start()
        until(lambda: sent_over(paged) > 0, "the order is sent")
    finally:
        kill_for_certain(old)
    thread.join(60)
    expected = before + 8 * N if what == "begin" else before - 8 * N
    until(lambda: committed(paged) == expected, "it is obeyed once")
    assert all(a.sum() == N for a in held)
    more = [np.zeros(N) for _ in range(3)]
    assert not any(a.any() for a in more)
    assert committed(paged) == expected + 3 * 8 * N


# Many, at random.


def test_do_blocks_never_overlap_or_lose_bytes(pool: Any, seed: int) -> None:
    rng = random.Random(seed)
    with pyswap.numpy_memory(pool, "4 KiB"):
        held: list[tuple[np.ndarray[Any, Any], int]] = []
        for step in range(400):
            if held and rng.random() < 0.45:
                a, mark = held.pop(rng.randrange(len(held)))
                if rng.random() < 0.3:
                    n = rng.randrange(512, 60000)
                    kept = min(n, len(a))
                    a.resize(n, refcheck=False)
                    assert (a[:kept] == mark).all()
                    a[:] = mark
                    held.append((a, mark))
                else:
                    assert (a == mark).all(), "another array was written over it"
            else:
                a = np.empty(rng.randrange(512, 60000), np.int64)
                assert is_paged(a)
                a[:] = step
                held.append((a, step))
            del a
        assert all((a == mark).all() for a, mark in held)
        spans = sorted((address(a), a.nbytes) for a, _ in held)
        ends = [start + size for start, size in spans]
        assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))
        held.clear()
        until(lambda: idle(pool), "all memory and swap is free")


# What is refused, and the end.


@pytest.mark.parametrize("threshold", [0, -1, "no size", 1.5, None])
def test_is_a_bad_threshold_refused(pool: Any, threshold: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="threshold"):
        pyswap.numpy_memory(pool, threshold)
    assert _allocator.arenas_told() == []


def test_is_an_order_refused_that_no_allocator_gives(pool: Any) -> None:
    with pyswap.numpy_memory(pool, SMALL):
        a, shared = np.arange(N), pool.zeros(N)
        line = socket.socket(fileno=pool._attachment.open_line())

        def order(what: int, address: int, first: int, count: int, to: int) -> int:
            line.send(struct.pack("=5Q", what, address, first, count, to))
            return int(struct.unpack("=q", line.recv(8))[0])

        arena, size, *_ = _allocator.arenas_told()[0]
        first, pages = (address(a) - arena) // pool.page_size, size // pool.page_size
        hole = first + N * 8 // pool.page_size
        for what in (protocol.LINE_BEGIN, protocol.LINE_END, protocol.LINE_MOVE):
            assert order(what, address(shared), 0, 1, 5) == -errno.ESRCH
            assert order(what, arena, pages - 1, 2, 0) == -errno.EINVAL
            assert order(what, arena, 1 << 63, 1 << 63, 0) == -errno.EINVAL
            assert order(what, arena, first, 0, 0) == -errno.EINVAL
        move = protocol.LINE_MOVE
        assert order(move, arena, first, 10, first + 9) == -errno.EINVAL
        assert order(move, arena, first, 10, pages - 9) == -errno.EINVAL
        assert order(move, arena, first, 10, 1 << 63) == -errno.EINVAL
        assert order(move, arena, first, 2, first + 2) == -errno.EINVAL, "those are no holes"
        assert order(move, arena, hole, 2, hole + 2) == -errno.EINVAL, "nor are those pages"
        assert order(protocol.LINE_LOOK, arena, pages - 1, 1, 0) & 0xFFFF == 1
        line.send(b"x" * 40)
        assert line.recv(8) == b""
        line.close()
        assert (a == np.arange(N)).all()


@pytest.mark.parametrize("version", ["1.25.2", "3.0.0"])
def test_is_an_unknown_numpy_refused(
    pool: Any, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "__version__", version)
    with pytest.raises(pyswap.Error, match=version):
        pyswap.numpy_memory(pool).install()
    assert _allocator.arenas_told() == []


def test_is_a_closed_pool_refused() -> None:
    pool = pyswap.Pool("1 MiB", "4 MiB", page_size=4096)
    pool.close()
    with pytest.raises(pyswap.PoolClosedError):
        pyswap.numpy_memory(pool).install()
    assert _allocator.arenas_told() == []


EXIT = """
import atexit, threading
import numpy as np
import pyswap
from pyswap._native import native

pool = pyswap.Pool("4 MiB", "32 MiB")
pyswap.numpy_memory(pool, "256 KiB").install()
kept = [np.ones(1 << 20)]
kept.append(kept)

class Late:
    data = np.ones(1 << 18)
    def __del__(self):
        self.data = None

late = Late()

def last():
    a = np.ones(1 << 18) + kept[0][0]
    assert native.owns(a.ctypes.data)
    print(a.sum() == 2 << 18)

atexit.register(last)

def churn():
    while True:
        np.ones(1 << 17).sum()

threading.Thread(target=churn, daemon=True).start()
"""


def test_does_a_program_end_in_silence_with_arrays_alive() -> None:
    told = subprocess.run(
        [sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=120, check=False
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, "True\n", "")
