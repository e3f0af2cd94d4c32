"""One swap cache: a page that many processes want comes in once, and all map that one frame."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from failpoints import (
    Actor,
    Failpoint,
    actors,
    mappers_of,
    page_id,
    state_of,
    until,
    wait_for_waiters,
    wait_unlocked,
)
from hands import Hands

pytestmark = pytest.mark.failpoint

PAGES = 1000
WORKERS = 4
KERNEL_PAGE_BYTES = 4096
PRESENT = 1 << 63
NUMBER_MASK = (1 << 55) - 1


@contextlib.contextmanager
def pagemaps(workers: list[Actor]) -> Iterator[Callable[[int], list[int]]]:
    """Give a function that tells, for an address, the physical frame number in each worker."""
    fds = [os.open(f"/proc/{worker.pid}/pagemap", os.O_RDONLY) for worker in workers]

    def numbers(address: int) -> list[int]:
        offset = address // KERNEL_PAGE_BYTES * 8
        entries = [struct.unpack("<Q", os.pread(fd, 8, offset))[0] for fd in fds]
        return [entry & NUMBER_MASK if entry & PRESENT else -1 for entry in entries]

    try:
        yield numbers
    finally:
        for fd in fds:
            os.close(fd)


def swapped_out(pool: Any) -> Any:
    """An array of a page a row, its row number in each, all of it in swap."""
    a = pool.zeros((PAGES, pool.page_size // 8), np.int64)
    a[:] = np.arange(PAGES)[:, None] + 1
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()
    return a


def meet(pool: Any, a: Any, page: int, workers: list[Actor]) -> None:
    """Park a worker's fill of a page until the others have faulted on it; all see its bytes."""
    filler, *others = workers[page % WORKERS :] + workers[: page % WORKERS]
    row = a[page]
    number = page_id(pool, row)
    with Failpoint(pool, "fill_locked", "park") as point:
        filler.tell(page)
        point.wait_parked()
        for other in others:
            other.tell(page)
        wait_for_waiters(pool, number, len(others))
        assert state_of(pool, number) == "filling"
        resident = bool(pool.residency(row).any())
        assert not resident
        assert not any(worker.has_answered() for worker in workers)
    assert [worker.answer() for worker in workers] == [page + 1] * WORKERS
    assert pool.residency(row).all()


def test_is_a_page_that_four_processes_want_read_once_into_one_frame(
    pool: Any, require: Callable[[str], None]
) -> None:
    require("root")
    a = swapped_out(pool)
    assert pool.page_size == KERNEL_PAGE_BYTES
    address = a.__array_interface__["data"][0]
    before = pool.stats()
    store_frames = set()
    with (
        actors(WORKERS, lambda page: int(a[page, -1]), lambda: pool.advise(a, "random")) as workers,
        pagemaps(workers) as numbers,
    ):
        for page in range(PAGES):
            meet(pool, a, page, workers)
            found = numbers(address + page * KERNEL_PAGE_BYTES)
            assert found[0] > 0, "the page is not mapped, or the kernel hides its frame from us"
            assert found == [found[0]] * WORKERS
            store_frames.add(found[0])
        after = pool.stats()
    assert len(store_frames) == PAGES
    assert after.slot_reads - before.slot_reads == PAGES
    assert after.read_calls - before.read_calls == PAGES
    assert after.major_faults - before.major_faults == PAGES
    assert after.fill_waits - before.fill_waits >= PAGES * (WORKERS - 1)
    assert after.evictions == before.evictions


@contextlib.contextmanager
def sharers(pool: Any, a: Any, count: int) -> Iterator[list[Actor]]:
    """Have actors that read and write pages of an array; each has faulted in it once."""
    hands = Hands(pool, a)
    with actors(count, hands, hands.quiet) as workers:
        for far, worker in enumerate(workers):
            assert worker.ask(("read", 10 * far)) == 10 * far + 1
        yield workers


def test_is_a_page_mapped_for_all_when_a_second_process_wants_it(pool: Any) -> None:
    """All that have faulted in the array, that is; each would fault for it otherwise."""
    a = swapped_out(pool)
    page = PAGES // 2
    number = page_id(pool, a[page])
    with actors(1, lambda _: None), sharers(pool, a, 3) as (first, second, third):
        assert first.ask(("read", page)) == page + 1
        assert mappers_of(pool, number) == 1
        assert second.ask(("read", page)) == page + 1
        wait_unlocked(pool, number)
        # This process has written it; the other actor has touched nothing.
        assert mappers_of(pool, number) == 4
        before = pool.stats()
        assert third.ask(("read", page)) == page + 1
        assert int(a[page, 0]) == page + 1
        after = pool.stats()
        assert after.minor_faults == before.minor_faults
        assert after.major_faults == before.major_faults
        # Evicted, it is nobody's.
        pool.advise(a, "pageout")
        assert third.ask(("read", page)) == page + 1
        assert mappers_of(pool, number) == 1


def test_is_what_is_written_kept_where_a_page_was_mapped_for_all(pool: Any) -> None:
    """One that is dirty is mapped writable; one that is being written out is not."""
    a = swapped_out(pool)
    page = PAGES // 2
    number = page_id(pool, a[page])

    def faults() -> int:
        wait_unlocked(pool, number)
        now = pool.stats()
        return int(now.write_faults + now.minor_faults + now.major_faults)

    with (
        actors(1, Hands(pool, a)) as (evictor,),
        sharers(pool, a, 3) as (first, second, third),
    ):
        assert first.ask(("write", page, -1)) == -1
        assert second.ask(("read", page)) == -1
        before = faults()
        assert third.ask(("write", page, -2)) == -2
        assert faults() == before
        pool.advise(a, "pageout")
        assert first.ask(("write", page, -3)) == -3
        with Failpoint(pool, "clean_written", "park") as point:
            evictor.tell(("pageout",))
            point.wait_parked()
            assert second.ask(("read", page)) == -3
            before = faults()
            assert third.ask(("write", page, -4)) == -4
            assert faults() == before + 1
            point.release()
            evictor.answer()
        pool.advise(a, "pageout")
        assert not pool.residency(a[page]).any()
        assert first.ask(("read", page)) == -4


def test_is_a_page_mapped_for_nobody_who_has_another_ones_number(pool: Any) -> None:
    """A worker ends when a page is about to be mapped for it: its number may be another's."""
    a = swapped_out(pool)
    page = PAGES // 2
    number = page_id(pool, a[page])
    with sharers(pool, a, 3) as (first, second, third):
        assert first.ask(("read", page)) == page + 1
        with Failpoint(pool, "map_for_others", "park", skip=1) as point:
            second.tell(("read", page))
            point.wait_parked()
            os.kill(third.pid, signal.SIGKILL)
            until(lambda: pool.stats().workers == 3, "its place is free")
            point.release()
            assert second.answer() == page + 1
            wait_unlocked(pool, number)
            # Those two, and this process.
            assert mappers_of(pool, number) == 3


def test_waits_one_thread_at_most_for_a_process_that_a_page_is_mapped_for(pool: Any) -> None:
    """Its memory may be locked for a while, as when it forks; the others serve faults."""
    a = swapped_out(pool)
    page, another = PAGES // 2, PAGES // 4
    with sharers(pool, a, 3) as (first, second, third):
        for either in (page, another):
            assert first.ask(("read", either)) == either + 1
        with Failpoint(pool, "map_for_others", "park", skip=1, limit=1) as point:
            assert second.ask(("read", page)) == page + 1
            point.wait_parked()
            assert second.ask(("read", another)) == another + 1
            number = page_id(pool, a[another])
            wait_unlocked(pool, number)
            # Not for the third one.
            assert mappers_of(pool, number) == 3
            assert point.parked == 1
        assert third.ask(("read", another)) == another + 1
