"""Shared arrays: one memory for every process, through evictions, exits and deletions."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint
from workers import Worker, until, workers

import pyswap

pytestmark = pytest.mark.core

WORDS = 512
"""64-bit words of the pages of the `pool` fixture."""


def read(a: Any, low: int, high: int) -> bytes:
    """The bytes of items of an array, as this process sees them."""
    return bytes(a[low:high].tobytes())


def write(a: Any, low: int, values: np.ndarray[Any, Any]) -> None:
    a[low : low + len(values)] = values


def add(a: Any, index: int, n: int) -> int:
    a[index] += n
    return int(a[index])


def evict(pool: pyswap.Pool, a: Any) -> None:
    """Put all of an array into swap, and see that it is there.

    Readahead that faults had asked for before may bring a page back: then once more.
    """

    def is_out() -> bool:
        pool.advise(a, "pageout")
        return not pool.residency(a).any()

    until(is_out, "the array is paged out")


def is_empty(pool: pyswap.Pool) -> bool:
    """Whether no array has anything in the pool: no commitment, frame, slot or stored byte."""
    now = pool.stats()
    in_store = os.fstat(pool.fileno()).st_blocks
    return (now.committed_bytes, now.resident_pages, now.swap_used_bytes, in_store) == (0, 0, 0, 0)


def test_does_every_process_see_every_write_before_and_after_eviction(
    pool: pyswap.Pool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a = pool.zeros(64 * WORDS, np.int64)
    model = np.zeros(len(a), np.int64)
    with workers(a, 3) as crew:

        def ask(who: int, function: Any, *args: Any) -> Any:
            return function(a, *args) if who == len(crew) else crew[who].ask(function, *args)

        everyone = range(len(crew) + 1)
        for _ in range(60):
            for _ in range(rng.integers(1, 4)):
                low = int(rng.integers(len(a)))
                # From one word to several pages, at any place in a page.
                values = rng.integers(1 << 62, size=min(int(rng.integers(1, 2500)), len(a) - low))
                ask(int(rng.choice(everyone)), write, low, values)
                model[low : low + len(values)] = values
            if rng.random() < 0.5:
                # Some of it first, so that later sights mix resident pages and swapped ones.
                evict(pool, a[: int(rng.integers(1, len(a)))])
            for who in everyone:
                low = int(rng.integers(len(a) // 2))
                assert ask(who, read, low, len(a)) == model[low:].tobytes(), f"process {who}"
            if rng.random() < 0.5:
                evict(pool, a)
        evict(pool, a)
        for who in everyone:
            assert ask(who, read, 0, len(a)) == model.tobytes(), f"process {who}"
            assert pool.residency(a).all()
            evict(pool, a)
    now = pool.stats()
    print(f"{now.major_faults} major faults, {now.evictions} evictions")
    assert now.evictions > 1000


def test_does_a_word_written_in_turn_by_all_keep_every_addition(
    pool: pyswap.Pool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a = pool.zeros(WORDS, np.int64)
    with workers(a, 3) as crew:
        for expected in range(1, 401):
            # The page is mapped writable, mapped read-only, unmapped or swapped out, by turns.
            assert crew[int(rng.integers(3))].ask(add, 7, 1) == expected
            if rng.random() < 0.3:
                evict(pool, a)
            if rng.random() < 0.3:
                assert a[7] == expected
    assert a[7] == 400
    assert pool.stats().evictions > 50


@pytest.mark.parametrize("ending", ["returns", "os._exit", "sys.exit", "kill -9"])
def test_do_an_exited_childs_writes_stay(pool: pyswap.Pool, ending: str) -> None:
    a = pool.zeros((32, WORDS), np.int64)
    a[::2] = 1
    evict(pool, a[:16])

    def child() -> None:
        a[:, 3] += np.arange(32)
        if ending == "kill -9":
            os.kill(os.getpid(), signal.SIGKILL)
        elif ending == "os._exit":
            os._exit(0)
        elif ending == "sys.exit":
            raise SystemExit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if ending == "kill -9" else 0)
    process.close()
    until(lambda: pool.stats().workers == 1, "the swapper notices the child's end")
    expected = np.zeros((32, WORDS), np.int64)
    expected[::2] = 1
    expected[:, 3] += np.arange(32)
    np.testing.assert_array_equal(a, expected)
    evict(pool, a)
    np.testing.assert_array_equal(a, expected)


def test_does_a_grandchilds_write_reach_everybody(pool: pyswap.Pool) -> None:
    a = pool.zeros(8 * WORDS, np.int64)
    with workers(a, 1) as (child,):
        child.ask(fork_and_add, [0, WORDS, 2 * WORDS])
        assert a[::WORDS][:4].tolist() == [3, 2, 1, 0]
        evict(pool, a)
        assert child.ask(read, 0, 1) == a[:1].tobytes() == np.int64(3).tobytes()


def fork_and_add(a: Any, indices: list[int]) -> None:
    """Add in this process to the first index, in its child to the first two, and so on."""
    if not indices:
        return
    with workers(a, 1) as (child,):
        for index in indices:
            a[index] += 1
            break
        child.ask(fork_and_add, indices[1:])
        child.ask(add, indices[0], len(indices) - 1)
        assert child.end() == 0


def test_is_a_childs_view_right_after_the_parents_del(pool: pyswap.Pool, seed: int) -> None:
    values = np.random.default_rng(seed).integers(1 << 62, size=64 * WORDS)
    a = pool.zeros(len(values), np.int64)
    a[:] = values
    # Some pages are in frames, some in slots, some in both when the parent lets go.
    evict(pool, a[: 40 * WORDS])
    assert a[20 * WORDS : 30 * WORDS].sum() == values[20 * WORDS : 30 * WORDS].sum()
    with workers(a, 2) as (first, second):
        del a
        # Other arrays take what was freed, if anything was: all frames and more.
        other = pool.full(3 * pool.memory // 8, -1, np.int64)
        assert first.ask(read, 0, len(values)) == values.tobytes()
        first.ask(write, 5 * WORDS, values[:WORDS])
        assert first.end() == 0
        until(lambda: pool.stats().workers == 2, "the swapper notices the first child's end")
        values[5 * WORDS : 6 * WORDS] = values[:WORDS]
        assert (other[::WORDS] == -1).all()
        assert second.ask(read, 0, len(values)) == values.tobytes()
        del other
        assert pool.stats().committed_bytes == values.nbytes
        assert second.end() == 0
    until(lambda: is_empty(pool), "the pages come back when the last one ends")


@pytest.mark.parametrize("ending", ["ends", "is killed", "lets go"])
def test_do_the_pages_come_back_when_the_last_one_goes(pool: pyswap.Pool, ending: str) -> None:
    held = [pool.full(64 * WORDS, 7, np.int64)]
    evict(pool, held[0][: 32 * WORDS])
    with workers(held, 1) as (child,):
        child.ask(add_to_held, 3)
        held.clear()
        assert pool.stats().committed_bytes == 64 * pool.page_size
        if ending == "ends":
            assert child.end() == 0
        elif ending == "is killed":
            child.kill()
        else:
            child.ask(let_go)
        until(lambda: is_empty(pool), "the pages come back")


def add_to_held(held: list[Any], n: int) -> None:
    held[0] += n


def let_go(held: list[Any]) -> None:
    held.clear()


def test_does_del_in_the_last_process_free_at_once(pool: pyswap.Pool) -> None:
    a = pool.full(64 * WORDS, 7, np.int64)
    evict(pool, a[: 32 * WORDS])
    part = a[10 * WORDS :: 3]
    del a
    assert pool.stats().committed_bytes == 64 * pool.page_size
    assert (part == 7).all(), "a view keeps all that it may touch"
    del part
    assert is_empty(pool)


def test_is_there_one_frame_for_all_processes(pool: pyswap.Pool) -> None:
    a = pool.zeros(100 * WORDS, np.int64)
    a[::WORDS] = 1
    with workers(a, 4) as crew:
        for worker in crew:
            worker.ask(read, 0, len(a))
        assert pool.stats().resident_pages == 100
        assert os.fstat(pool.fileno()).st_blocks * 512 == 100 * pool.page_size
        evict(pool, a)
        before = pool.stats().slot_reads
        for worker in crew:
            worker.ask(read, 0, len(a))
        assert pool.stats().slot_reads - before == 100
        assert os.fstat(pool.fileno()).st_blocks * 512 == 100 * pool.page_size


@pytest.mark.failpoint
def test_does_pageout_wait_for_a_page_that_a_fault_holds(pool: pyswap.Pool) -> None:
    a = pool.full(64 * WORDS, 7, np.int64)
    pool.advise(a, "random")
    evict(pool, a)
    with workers(a, 1) as (reader,), workers((pool, a), 1) as (evictor,):
        with Failpoint(pool, "map_before", "park") as held:
            reader.send(read, 5 * WORDS, 5 * WORDS + 1)
            held.wait_parked()
            a[:WORDS] = 8
            evictor.send(page_out)
            until(lambda: not pool.residency(a[:WORDS]).any(), "what is not held is paged out")
            # Else its read would bring the page back.
            reader.kill()
        evictor.answer()
        assert not pool.residency(a).any()


def page_out(held: tuple[pyswap.Pool, Any]) -> None:
    pool, a = held
    pool.advise(a, "pageout")


def test_does_a_worker_see_what_was_made_before_it_only(pool: pyswap.Pool) -> None:
    a = pool.full(WORDS, 1, np.int64)
    worker = Worker(a)
    try:
        later = pool.full(4 * WORDS, 2, np.int64)
        address = later.__array_interface__["data"][0]
        assert worker.ask(read, 0, 1) == np.int64(1).tobytes()
        assert not worker.ask(knows, address)
        assert (later == 2).all()
    finally:
        worker.finish()


def knows(_: Any, address: int) -> bool:
    from pyswap._native import native

    return bool(native.owns(address))
