"""Copies on write at the moments that matter: threads, forks, stops and deaths in the middle."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint, page_id, state_of
from hands import page_out
from workers import Worker, process_state, until, workers

import pyswap
from pyswap import protocol

WORDS = 512
"""64-bit words of a page."""
PAGES = 400
POINTS = ("copy_made", "copy_ordered", "copy_answered")


@pytest.fixture
def tight() -> Iterator[pyswap.Pool]:
    """A pool whose 256 frames are fewer than the pages of the arrays in it."""
    with pyswap.Pool("1 MiB", "64 MiB", page_size=4096) as made:
        yield made
        made.check()


def first_words(a: Any) -> list[int]:
    return [int(n) for n in a[::WORDS]]


def set_page(a: Any, page: int, value: int) -> None:
    a[page * WORDS] = value


def set_pages(a: Any, low: int, high: int, value: int) -> None:
    for page in range(low, high):
        set_page(a, page, value)


def made(pool: pyswap.Pool, pages: int = PAGES) -> Any:
    a = pool.zeros(pages * WORDS, np.int64, private=True)
    a[::WORDS] = np.arange(1, pages + 1)
    return a


def is_balanced(pool: pyswap.Pool, pages: int) -> bool:
    """Whether one process has one array of so many pages, and nothing else is left."""
    now = pool.stats()
    return (now.workers, now.committed_bytes, now.pinned_pages) == (1, pages * 4096, 0)


def add_one_everywhere(a: Any, column: int, seed: int) -> None:
    """Add one to a word of each page, in random order, a page at a time."""
    for page in np.random.default_rng(seed).permutation(len(a) // WORDS):
        a[page * WORDS + column] += 1


def in_threads(functions: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.core
def test_lose_threads_nothing_while_their_pages_are_copied(tight: pyswap.Pool, seed: int) -> None:
    a = tight.zeros(PAGES * WORDS, np.int64, private=True)
    rounds, columns = 12, (0, 1, 255, 511)
    for i in range(rounds):
        with workers(a, 1) as (child,):
            in_threads(
                [
                    lambda column=column, i=i: add_one_everywhere(a, column, seed + i)  # type: ignore[misc]
                    for column in columns
                ]
            )
            # The child has what was there before.
            assert all(set(child.ask(column_of, column)) == {i} for column in columns)
    for column in columns:
        assert set(column_of(a, column)) == {rounds}
    now = tight.stats()
    print(f"{now.cow_copies} copies, {now.cow_remaps} remaps, {now.evictions} evictions")
    assert now.cow_copies >= rounds * PAGES * 0.9
    assert now.evictions > 2000


def column_of(a: Any, column: int) -> list[int]:
    return [int(n) for n in a[column::WORDS]]


@pytest.mark.core
def test_is_a_childs_array_still_while_the_parents_threads_write(
    tight: pyswap.Pool, seed: int
) -> None:
    a = tight.zeros(PAGES * WORDS, np.int64, private=True)
    ended = threading.Event()
    passes = [0, 0]

    def write(column: int) -> None:
        while not ended.is_set():
            add_one_everywhere(a, column, seed + passes[column])
            passes[column] += 1

    threads = [threading.Thread(target=write, args=(column,)) for column in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            with workers(a, 1) as (child,):
                seen = [child.ask(column_of, column) for column in range(2)]
                before = list(passes)
                until(lambda n=before: min(passes) > max(n) + 1, "the threads go on")  # type: ignore[misc]
                assert [child.ask(column_of, column) for column in range(2)] == seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    for column in range(2):
        assert set(column_of(a, column)) == {passes[column]}
    now = tight.stats()
    print(f"{now.cow_copies} copies, {now.evictions} evictions")
    assert now.cow_copies > 1000
    assert now.evictions > 2000


@pytest.mark.failpoint
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("fate", ["lives", "is killed", "is stopped"])
def test_delays_a_copy_under_way_nobody_else(tight: pyswap.Pool, point: str, fate: str) -> None:
    a = made(tight)
    b = made(tight, 20)
    words = first_words(a)
    with workers((a, b), 3) as (writer, other, witness):
        with Failpoint(tight, point, "park") as parked:
            writer.send(set_page_of, 7, -1)
            parked.wait_parked()
            if fate != "lives":
                # Its attendant will not answer.
                writer.stop()
            # The others write, copy and evict meanwhile; but the page itself is locked.
            other.ask(set_pages_of, 20, PAGES, -2)
            set_pages(a, 30, PAGES, -3)
            set_page(b, 0, 5)
            assert witness.ask(words_of, 20) == words[20:]
        if fate != "lives":
            # The order waits for it; nobody else does.
            other.ask(set_pages_of, 0, 20, -2)
            assert witness.ask(words_of) == words
        if fate == "is killed":
            writer.kill()
        else:
            writer.signal(signal.SIGCONT)
            assert writer.answer() is None
            assert writer.ask(words_of) == [*words[:7], -1, *words[8:]]
        assert witness.ask(words_of) == words
        assert other.ask(words_of, 20) == [-2] * (PAGES - 20)
    assert first_words(a) == [*words[:30], *[-3] * (PAGES - 30)]
    until(lambda: is_balanced(tight, PAGES + 20), "all that the workers had is back")


def set_page_of(arrays: Any, page: int, value: int) -> None:
    set_page(arrays[0], page, value)


def set_pages_of(arrays: Any, low: int, high: int, value: int) -> None:
    set_pages(arrays[0], low, high, value)


def words_of(arrays: Any, low: int = 0) -> list[int]:
    return first_words(arrays[0][low * WORDS :])


@pytest.mark.failpoint
def test_has_a_child_forked_in_the_middle_of_a_copy_what_was_there(tight: pyswap.Pool) -> None:
    a = made(tight)
    words = first_words(a)
    with workers(a, 1), Failpoint(tight, "copy_answered", "park") as parked:
        thread = threading.Thread(target=store_without_gil, args=(a, 7, -1))
        thread.start()
        parked.wait_parked()
        copies = tight.stats().cow_copies
        with workers(a, 1) as (child,):
            # Its copy of the copy was made at once.
            assert tight.stats().cow_copies == copies + 1
            assert child.ask(first_words) == words
            parked.release()
            thread.join()
            assert first_words(a) == [*words[:7], -1, *words[8:]]
            assert child.ask(first_words) == words


def write_all(a: Any) -> None:
    a[::WORDS] += 1


@pytest.mark.failpoint
def test_is_a_fork_granted_that_waits_to_copy_a_page_whose_pin_ends(tight: pyswap.Pool) -> None:
    children: list[Worker] = []
    more = tight.zeros(2 * PAGES * WORDS, np.int64)
    with workers(more, 1) as (other,):
        other.ask(write_all)
        a = made(tight, 20)
        tight.advise(a, "random")
        page_out(tight, a)
        set_page(a, 0, -1)
        first, numbers = page_id(tight, a), tight._control().numbers
        forking = threading.Thread(target=lambda: children.append(Worker(a)))

        def is_evicted() -> bool:
            other.ask(write_all)
            return state_of(tight, first) is None

        with (
            Failpoint(tight, "fill_locked", "park") as fill,
            # The second page cannot be read, so that the pin of both comes to nothing.
            Failpoint(tight, "fill_read", "errno", error=errno.EIO, limit=3),
        ):
            begin_pin(tight, a, 2)
            fill.wait_parked()
            assert numbers()["pinned_pages"] == 1
            with Failpoint(tight, "frame_claim", "park") as claim:
                # The child is to have a copy of the first, since it is pinned.
                forking.start()
                claim.wait_parked()
                fill.release()
                until(lambda: numbers()["pinned_pages"] == 0, "its pin has ended")
                until(is_evicted, "the page is evicted")
            forking.join()
        try:
            assert children[0].ask(first_words) == [-1, *range(2, 21)] == first_words(a)
        finally:
            children.pop().finish()


def begin_pin(pool: pyswap.Pool, a: Any, pages: int) -> None:
    """Ask for a pin and wait for no answer, as who is interrupted then."""
    address = a.__array_interface__["data"][0]
    message = {"op": "pin", "address": address, "ranges": [[0, pages]], "write": True}
    assert pool._attachment._sock is not None
    protocol.send(pool._attachment._sock, {**message, "pin": 0, "seq": 0})


def store_without_gil(a: Any, page: int, value: int) -> None:
    import ctypes

    word = ctypes.c_int64(value)
    ctypes.memmove(a.ctypes.data + page * WORDS * 8, ctypes.byref(word), 8)


@pytest.mark.failpoint
def test_takes_a_fill_the_frame_that_was_claimed_for_the_copy(tight: pyswap.Pool) -> None:
    """Who waited for a frame to copy into finds the page gone: it does not wait for a second."""
    a = made(tight, 20)
    tight.advise(a, "random")
    page = page_id(tight, a)
    with workers(a, 1) as (child,):
        writing = threading.Thread(target=store_without_gil, args=(a, 0, -1))
        with Failpoint(tight, "frame_claimed", "park") as claimed:
            # Once for the thread that leaves it to the patient ones, once for one of those.
            with Failpoint(tight, "frame_claim", "errno", error=errno.ENOMEM, limit=2):
                writing.start()
                claimed.wait_parked()
            page_out(tight, a)
            assert state_of(tight, page) is None
            with Failpoint(tight, "frame_claim", "errno", error=errno.ENOMEM, limit=1 << 30):
                claimed.release()
                until(lambda: state_of(tight, page) == "present", "the page is back")
                assert writing.is_alive()
        writing.join()
        assert first_words(a) == [-1, *range(2, 21)]
        assert child.ask(first_words) == list(range(1, 21))


@pytest.mark.failpoint
def test_do_two_threads_write_the_page_that_is_copied(tight: pyswap.Pool) -> None:
    a = made(tight)
    with workers(a, 1) as (child,), Failpoint(tight, "copy_answered", "park") as parked:
        copies = tight.stats().cow_copies
        one = threading.Thread(target=store_without_gil, args=(a, 7, -1))
        one.start()
        parked.wait_parked()
        # Its fault meets the copy under way, and is let be until that is done.
        two = threading.Thread(target=store_without_gil, args=(a[1:], 7, -2))
        two.start()
        parked.release()
        one.join()
        two.join()
        assert a[7 * WORDS : 7 * WORDS + 2].tolist() == [-1, -2]
        assert tight.stats().cow_copies == copies + 1
        assert child.ask(first_words) == list(range(1, PAGES + 1))


@pytest.mark.failpoint
def test_is_a_page_pinned_that_is_shared_when_its_copy_is_there(tight: pyswap.Pool) -> None:
    a = made(tight)
    with workers((tight, a), 1) as (pinner,):
        with Failpoint(tight, "copy_answered", "park") as parked:
            pinner.send(pin_and_set, 2)
            parked.wait_parked()
            assert not pinner.connection.poll()
        assert pinner.answer() == [-5, -5, 3]
        assert first_words(a)[:3] == [1, 2, 3]
        assert tight.stats().pinned_pages == 0


@pytest.mark.failpoint
def test_is_one_page_copied_where_there_is_no_memory_for_a_run(tight: pyswap.Pool) -> None:
    a = made(tight, 64)
    with workers(a, 1) as (child,):
        # A stream, whose next fault would have a dozen copied.
        set_pages(a, 0, 8, -1)
        before = tight.stats()
        with Failpoint(tight, "fallocate", "errno", error=errno.ENOSPC) as point:
            set_page(a, before.cow_copies, -1)
            assert point.hits == 1
        now = tight.stats()
        assert before.cow_copies > 8
        assert now.cow_copies == before.cow_copies + 1
        assert now.committed_bytes == before.committed_bytes + 4096
        set_pages(a, 0, 64, -2)
        assert tight.stats().cow_copies == 64
        assert first_words(a) == [-2] * 64
        assert child.ask(first_words) == list(range(1, 65))
    until(lambda: tight.stats().offline_frames == 0, "the frames are tried again")


@pytest.mark.core
def test_are_pages_copied_by_the_dozen_when_memory_is_short() -> None:
    """Four children overtake readahead and reclaim: page by page, a copy is four wake-ups."""
    frames = 1024
    with pyswap.Pool(frames * 4096, "64 MiB", page_size=4096) as pool:
        a = made(pool, 2 * frames)
        pool.advise(a, "pageout")
        before = pool.stats()
        with workers(a, 4) as children:
            for rank, child in enumerate(children):
                child.send(fill_half, rank)
            for rank, child in enumerate(children):
                child.answer()
                first = rank * frames // 4
                assert child.ask(first_words)[first : first + frames] == [-rank] * frames
        now = pool.stats()
        assert first_words(a) == list(range(1, 2 * frames + 1))
    copies, remaps = now.cow_copies - before.cow_copies, now.cow_remaps - before.cow_remaps
    print(f"{copies} copies in {remaps} runs, {now.frame_waits} waits for frames")
    assert copies >= 4 * frames
    assert now.evictions - before.evictions >= 4 * frames
    assert copies / remaps >= 12


def fill_half(a: Any, rank: int) -> None:
    half = len(a) // 2
    first = rank * half // 4
    for start in range(first, first + half, 64 * WORDS):
        a[start : start + 64 * WORDS] = -rank


def pin_and_set(inherited: Any, pages: int) -> list[int]:
    pool, a = inherited
    with pool.pin(a[: pages * WORDS], writable=True):
        pool.advise(a, "pageout")
        assert pool.residency(a)[: pages + 1].tolist() == [True] * pages + [False]
        set_pages(a, 0, pages, -5)
        return first_words(a)[: pages + 1]


@pytest.mark.core
def test_stays_a_process_under_the_limit_of_mappings(require: Callable[[str], None]) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 100_000:
        pytest.skip(f"vm.max_map_count is {limit}: an array with so many pieces takes too long")
    pages = 2 * limit + 2000
    with pyswap.Pool("64 MiB", pages * 4096 * 2, page_size=4096) as pool:
        a = pool.zeros(pages * WORDS, np.int64, private=True)
        a[::WORDS] = np.arange(pages)
        with workers(a, 1) as (child,):
            mappings = child.ask(set_every_second_page)
            print(f"{mappings} mappings of {limit}, {pool.stats().cow_copies} copies")
            assert limit // 2 < mappings < limit
            # It went on by copying what lies between, too.
            assert pool.stats().cow_copies > pages // 2
            expected = np.arange(pages)
            assert (a[::WORDS] == expected).all()
            assert child.ask(is_every_second_page_set)


def set_every_second_page(a: Any) -> int:
    a[:: 2 * WORDS] = -1
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def is_every_second_page_set(a: Any) -> bool:
    expected = np.arange(len(a) // WORDS)
    expected[::2] = -1
    return bool((a[::WORDS] == expected).all())


@pytest.mark.core
def test_does_a_worker_that_dies_while_it_writes_leave_nothing(
    tight: pyswap.Pool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a = made(tight)
    for _ in range(10):
        with workers(a, 3) as crew:
            copies = tight.stats().cow_copies
            for worker in crew:
                worker.send(set_pages, 0, PAGES, -9)
            goal = copies + int(rng.integers(1, 600))
            until(lambda goal=goal: tight.stats().cow_copies > goal, "copies are made")  # type: ignore[misc]
            for worker in crew:
                worker.kill()
    assert first_words(a) == list(range(1, PAGES + 1))
    until(lambda: is_balanced(tight, PAGES), "all that the workers had is back")
    until(lambda: swap_is_ours(tight), "no slot is left")


def swap_is_ours(pool: pyswap.Pool) -> bool:
    return pool.stats().swap_used_bytes <= PAGES * 4096


@pytest.mark.core
def test_is_an_array_of_a_stopped_child_no_burden(tight: pyswap.Pool) -> None:
    a = made(tight)
    child = Worker(a)
    try:
        child.stop()
        set_pages(a, 0, PAGES, -1)
        assert first_words(a) == [-1] * PAGES
        tight.advise(a, "pageout")
        assert process_state(child.pid) == "T"
        child.signal(signal.SIGCONT)
        assert child.ask(first_words) == list(range(1, PAGES + 1))
    finally:
        child.finish()
    assert os.getpid() != child.pid


@pytest.mark.long
@pytest.mark.timeout(900)
def test_is_no_byte_torn_or_lost_in_a_hundred_thousand_remaps(seed: int) -> None:
    pages, remaps = 4096, 100_000
    columns = range(4)
    with pyswap.Pool("24 MiB", "256 MiB", page_size=4096) as pool:
        a = pool.zeros(pages * WORDS, np.int64, private=True)
        # Each thread writes every page, in its own order, while neighbours are copied.
        rounds = 0
        while pool.stats().cow_remaps < remaps:
            held = a.snapshot()
            in_threads(
                [
                    lambda c=c, n=rounds: add_one_everywhere(a, c, seed + 7 * n + c)  # type: ignore[misc]
                    for c in columns
                ]
            )
            for column in columns:
                assert set(column_of(held, column)) == {rounds}
            del held
            rounds += 1
        for column in columns:
            assert set(column_of(a, column)) == {rounds}
        # Nothing else was written to any page.
        assert a.sum() == rounds * pages * len(columns)
        now = pool.stats()
        print(f"{now.cow_remaps} remaps of {now.cow_copies} copies, {now.evictions} evictions")
        assert now.evictions > pages
        pool.check()
