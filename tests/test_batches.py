"""Eviction in batches: few large writes; none for what is clean; no slot for what is zero."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import actors

import pyswap

pytestmark = pytest.mark.core


def seen_by_the_kernel(pool: Any) -> dict[str, int]:
    """What the kernel counted of the swapper's I/O.

    `syscw` and `wchar`, `syscr` and `rchar` count write and read system calls of any kind and their
    bytes; `write_bytes` and `read_bytes` what went to and came from a disk.
    """
    lines = Path(f"/proc/{pool.swapper_pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


class Growth:
    """How much a pool's numbers, and the kernel's of its swapper, grow from now on."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._before = self._now()

    def _now(self) -> dict[str, int]:
        return {**dataclasses.asdict(self._pool.stats()), **seen_by_the_kernel(self._pool)}

    def __call__(self) -> dict[str, int]:
        return {name: value - self._before[name] for name, value in self._now().items()}


def rows(pool: Any, pages: int, first: int = 1) -> Any:
    """An array of a page a row, row i full of first + i; resident, never written out."""
    a = pool.zeros((pages, pool.page_size // 8), np.int64)
    a[:] = np.arange(first, first + pages)[:, None]
    return a


# Where pages are evicted at random, long runs of free slots need an area that is half empty.
@pytest.mark.parametrize(("order", "swap"), [("as they lie", 10), ("at random", 16)])
def test_do_victims_go_out_in_large_writes_while_workers_come_and_go(
    seed: int, order: str, swap: int
) -> None:
    frames, rounds, at_once = 512, 3, 3
    pages = 8 * frames
    with pyswap.Pool(frames * 4096, swap * frames * 4096, page_size=4096) as pool:
        counters = pool.zeros((pages, 512), np.int64)

        def add(worker: int) -> int:
            # Each worker has a column of its own: paging is under test, not atomic addition.
            rng = np.random.default_rng(seed + worker)
            todo = rng.permutation(pages) if order == "at random" else np.arange(pages)
            for page in np.roll(todo, rng.integers(pages)).tolist():
                counters[page, worker % at_once] += 1
            return worker

        growth = Growth(pool)
        for first in range(0, rounds * at_once, at_once):
            with actors(at_once, add) as workers:
                for number, worker in enumerate(workers):
                    worker.tell(first + number)
                assert [w.answer() for w in workers] == [first + n for n in range(at_once)]
        grown = growth()
        print(grown)
        assert (counters[:, :at_once] == rounds).all()
        assert not counters[:, at_once:].any()
        pool.check()
    assert grown["evictions"] >= 2 * pages
    assert grown["slot_writes"] >= 2 * pages
    assert grown["slot_writes"] >= 8 * grown["write_calls"]
    # The kernel counted the same, and one more for each read that is no run: it goes on into the
    # page store by a write, which a run does not.
    assert grown["slot_writes"] >= 8 * (grown["syscw"] - grown["read_calls"])
    assert grown["wchar"] >= grown["slot_writes"] * 4096
    assert grown["rchar"] >= grown["slot_reads"] * 4096


def test_do_the_library_and_the_kernel_count_the_same_writes(pool: Any) -> None:
    a = rows(pool, 1000)
    growth = Growth(pool)
    pool.advise(a, "pageout")
    grown = growth()
    assert grown["slot_writes"] == grown["evictions"] == 1000
    # Pages that a fault had still locked go out after the others.
    assert 1 <= grown["write_calls"] <= 16
    # And one that tells the swapper's main thread that the work is done.
    assert grown["syscw"] == grown["write_calls"] + 1
    assert grown["wchar"] == 1000 * 4096 + 1
    assert grown["write_bytes"] == 1000 * 4096


def test_are_clean_pages_evicted_without_io(pool: Any) -> None:
    a = rows(pool, 1000)
    pool.advise(a, "pageout")
    assert a.sum() == 512 * 1000 * 1001 // 2
    assert pool.stats().resident_pages == 1000
    assert pool.stats().dirty_pages == 0
    growth = Growth(pool)
    pool.advise(a, "pageout")
    grown = growth()
    assert grown["evictions"] == 1000
    assert grown["slot_writes"] == grown["write_calls"] == grown["slot_reads"] == 0
    assert grown["swap_used_bytes"] == grown["write_bytes"] == grown["read_bytes"] == 0
    assert grown["wchar"] < 4096
    assert a.sum() == 512 * 1000 * 1001 // 2


def test_does_reclaim_drop_clean_pages_without_io(pool: Any) -> None:
    a = pool.zeros((4096, 512), np.int64)
    a[:] = np.arange(1, 4097)[:, None]
    pool.advise(a, "pageout")
    growth = Growth(pool)
    for _ in range(2):
        assert a.sum() == 512 * 4096 * 4097 // 2
    grown = growth()
    print(grown)
    assert grown["clean_drops"] == grown["evictions"]
    assert grown["clean_drops"] >= 4096
    assert grown["slot_writes"] == grown["write_calls"] == grown["write_bytes"] == 0


def test_do_zero_pages_get_no_slot(pool: Any) -> None:
    a = pool.zeros((1000, 512), np.int64)
    a[:] = 0
    assert pool.stats().resident_pages == pool.stats().dirty_pages == 1000
    growth = Growth(pool)
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()
    assert not a.any()
    grown = growth()
    assert grown["evictions"] == grown["zero_drops"] == 1000
    assert grown["slot_writes"] == grown["write_calls"] == grown["slot_reads"] == 0
    assert grown["major_faults"] == grown["write_bytes"] == grown["read_bytes"] == 0
    assert grown["wchar"] < 4096
    assert grown["rchar"] < 4096
    assert pool.stats().swap_used_bytes == 0


@pytest.mark.parametrize("place", [0, 511])
def test_is_a_page_with_one_byte_at_an_end_not_taken_for_zero(pool: Any, place: int) -> None:
    a = pool.zeros((4, 512), np.int64)
    a[2, place] = 1 << 56 if place else 1
    pool.advise(a, "pageout")
    assert pool.stats().slot_writes == 1
    assert a[2, place] == (1 << 56 if place else 1)


def test_does_a_page_that_becomes_zero_give_its_slot_back(pool: Any) -> None:
    a = rows(pool, 100)
    pool.advise(a, "pageout")
    assert pool.stats().swap_used_bytes == 100 * 4096
    a[::2] = 0
    pool.advise(a, "pageout")
    assert pool.stats().swap_used_bytes == 50 * 4096
    assert (a[::2] == 0).all()
    assert (a[1::2] == np.arange(1, 101)[1::2, None]).all()


def fragmented(pool: Any, slots: int) -> Any:
    """An array that has every second slot of the area; the others are free, each alone."""
    a = pool.zeros((slots, 512), np.int64)
    # Page by page: a stream's fault may still hold its neighbours when the array goes out, and they
    # get their slots after the others.
    pool.advise(a, "random")
    a[:] = np.arange(1, slots + 1)[:, None]
    pool.advise(a, "pageout")
    assert pool.stats().swap_used_bytes == slots * 4096
    a[::2] = 0
    pool.advise(a, "pageout")
    assert pool.stats().swap_used_bytes == slots // 2 * 4096
    return a


def test_are_slots_found_when_only_single_ones_are_free() -> None:
    slots = 1024
    with pyswap.Pool("8 MiB", slots * 4096, page_size=4096) as pool:
        a = fragmented(pool, slots)
        growth = Growth(pool)
        b = rows(pool, slots // 2, first=5000)
        pool.advise(b, "pageout")
        grown = growth()
        assert not pool.residency(b).any()
        # Each page went out alone: there were no two neighbouring slots.
        assert grown["slot_writes"] == grown["write_calls"] == slots // 2
        assert grown["syscw"] >= slots // 2
        assert pool.stats().swap_used_bytes == pool.stats().swap_bytes
        assert (b == np.arange(5000, 5000 + slots // 2)[:, None]).all()
        assert not a[::2].any()
        assert (a[1::2] == np.arange(1, slots + 1)[1::2, None]).all()
        pool.check()


def test_are_pages_exchanged_when_every_slot_is_taken(seed: int) -> None:
    slots = 1024
    with pyswap.Pool("2 MiB", slots * 4096, page_size=4096) as pool:
        pages = slots + 512 - 128
        a = pool.zeros((pages, 512), np.int64)
        expected = np.zeros(pages, np.int64)
        rng = np.random.default_rng(seed)
        for value in range(1, 6):
            for page in rng.permutation(pages).tolist():
                assert a[page, 511] == expected[page]
                a[page] = expected[page] = value * pages + page
        assert (a == expected[:, None]).all()
        print(pool.stats())
        assert pool.stats().evictions >= 4 * pages
        assert pool.stats().swap_used_bytes >= (pages - 512) * 4096
        # Reclaim has no rest before the pages are gone, and only then do the counts stand still.
        del a
        pool.check()


def test_does_a_worker_that_only_reads_leave_pages_clean(pool: Any) -> None:
    a = rows(pool, 500)
    pool.advise(a, "pageout")
    with actors(1, lambda _: int(a.sum())) as (reader,):
        assert reader.ask() == 512 * 500 * 501 // 2
    assert pool.stats().resident_pages == 500
    assert pool.stats().dirty_pages == 0
