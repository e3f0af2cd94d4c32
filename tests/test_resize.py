"""The budget raised and lowered while processes work, sampled from outside all the time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint
from workers import until, workers

import pyswap

WORDS = 512
"""64-bit words of a page."""
PAGE = 4096


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[pyswap.Pool]:
    """A pool of 512 frames of 4 KiB with 16 MiB of swap."""
    with pyswap.Pool(512 * PAGE, "16 MiB", page_size=PAGE, swap_path=tmp_path) as made:
        yield made
        made.check()


@contextmanager
def sampled(pool: pyswap.Pool) -> Iterator[list[int]]:
    """Sample the pages that the store holds, into a list whose first item is the most so far."""
    most, fd, ended = [0], pool.fileno(), threading.Event()

    def sample() -> None:
        while not ended.is_set():
            most[0] = max(most[0], os.fstat(fd).st_blocks * 512 // PAGE)
            most.append(most[0])

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def work(inherited: Any, who: int, seed: int) -> int:
    """Write random pages of a quarter of an array until told not to; verify each before."""
    a, told = inherited
    rng = np.random.default_rng(seed + who)
    quarter = len(a) // WORDS // 4
    mine = a[who * quarter * WORDS : (who + 1) * quarter * WORDS]
    model = np.zeros(quarter, np.int64)
    while not told[0]:
        page = int(rng.integers(quarter))
        assert mine[page * WORDS] == mine[page * WORDS + WORDS - 1] == model[page]
        model[page] += 1
        mine[page * WORDS] = mine[page * WORDS + WORDS - 1] = model[page]
    assert (mine[::WORDS] == model).all()
    return int(model.sum())


@pytest.mark.core
def test_lose_workers_nothing_while_the_budget_goes_up_and_down(
    pool: pyswap.Pool, seed: int
) -> None:
    a = pool.zeros(2000 * WORDS, np.int64)
    told = pool.zeros(1, np.int64)
    with workers((a, told), 4) as crew:
        for who, worker in enumerate(crew):
            worker.send(work, who, seed)
        frames = 512
        for wanted in (256, 1024, 300, 3000, 512, 160):
            until(lambda: pool.stats().evictions > 0, "there is more than fits")
            with sampled(pool) as most:
                pool.resize(wanted * PAGE)
                assert most[0] <= max(frames, wanted)
            frames = wanted
            assert pool.memory == pool.stats().memory_bytes == frames * PAGE
            minor = pool.stats().minor_faults
            with sampled(pool) as most:
                until(lambda n=minor: pool.stats().minor_faults > n, "they go on")  # type: ignore[misc]
                until(lambda most=most: len(most) > 50, "there are samples")  # type: ignore[misc]
                assert most[0] <= frames
        told[0] = 1
        writes = [worker.answer() for worker in crew]
        assert crew[0].ask(memory_of, pool.memory)
    now = pool.stats()
    print(f"{sum(writes)} writes, {now.evictions} evictions")
    assert now.evictions > 2000
    assert os.fstat(pool.fileno()).st_blocks * 512 <= 160 * PAGE
    assert now.free_frames + now.resident_pages <= 160


def memory_of(inherited: Any, expected: int) -> bool:
    a, _ = inherited
    return bool(pyswap.pool.pool_of(a).memory == expected)


@pytest.mark.core
def test_is_a_budget_refused_that_is_too_small(pool: pyswap.Pool) -> None:
    with pytest.raises(ValueError, match="at least 128"):
        pool.resize(100 * PAGE)
    with workers(None, 30), pytest.raises(ValueError, match="too few for 31 processes"):
        pool.resize(150 * PAGE)
    a = pool.zeros(300 * WORDS, np.int64)
    with pool.pin(a[: 250 * WORDS]), pytest.raises(MemoryError, match="250 pages are pinned"):
        pool.resize(256 * PAGE)
    assert pool.memory == 512 * PAGE
    pool.resize("1 MiB")
    assert pool.memory == 1 << 20
    with pytest.raises(MemoryError), pool.pin(a[: 250 * WORDS]):
        pass


@pytest.mark.core
def test_is_a_budget_refused_that_arrays_are_too_large_for(pool: pyswap.Pool) -> None:
    room = pool.stats().swap_bytes // PAGE + 512 - 100
    a = pool.zeros(room * WORDS, np.int64)
    with pytest.raises(pyswap.SwapFullError, match="add a swap area first"):
        pool.resize(256 * PAGE)
    assert pool.memory == 512 * PAGE
    pool.resize(2048 * PAGE)
    b = pool.zeros(1300 * WORDS, np.int64)
    a[::WORDS] = 1
    b[::WORDS] = 2
    assert (a[::WORDS] == 1).all()
    assert (b[::WORDS] == 2).all()


@pytest.mark.core
def test_is_a_budget_a_size_as_any(pool: pyswap.Pool) -> None:
    pool.resize("2 MB")
    assert pool.memory == 2_000_000 // PAGE * PAGE
    with pytest.raises(TypeError):
        pool.resize(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory"):
        pool.resize("-1 MiB")


@pytest.mark.failpoint
def test_is_the_budget_the_old_one_until_the_last_frame_is_out(pool: pyswap.Pool) -> None:
    a = pool.zeros(600 * WORDS, np.int64)
    a[::WORDS] = 7
    with workers(pool, 1) as (resizer,):
        with Failpoint(pool, "frame_retired", "park", skip=100) as parked:
            resizer.send(shrink, 256)
            parked.wait_parked()
            assert pool.memory == 512 * PAGE
            with pytest.raises(ValueError, match="already"):
                pool.resize(400 * PAGE)
            # Nobody waits for it.
            assert (a[::WORDS] == 7).all()
        resizer.answer()
        assert pool.memory == 256 * PAGE
    assert (a[::WORDS] == 7).all()


def shrink(pool: Any, frames: int) -> None:
    pool.resize(frames * PAGE)


# The commitment.


@pytest.mark.core
def test_can_a_pool_that_is_full_to_its_limit_exchange_pages(pool: pyswap.Pool, seed: int) -> None:
    pages = 128
    arrays = []
    while pages:
        try:
            arrays.append(pool.zeros(pages * WORDS, np.int64))
        except MemoryError:
            pages //= 2
    with pytest.raises(pyswap.SwapFullError):
        pool.zeros(1)
    rng = np.random.default_rng(seed)
    models = [rng.integers(1, 1 << 62, len(a)) for a in arrays]
    for a, model in zip(arrays, models, strict=True):
        a[:] = model
    before = pool.stats()
    with workers(arrays, 4) as crew:
        for who, worker in enumerate(crew):
            worker.send(exchange, who, seed)
        for worker in crew:
            assert worker.answer() == 1500
    for i, (a, model) in enumerate(zip(arrays, models, strict=True)):
        model[i % 4 :: WORDS] = a[i % 4 :: WORDS]
        assert (a == model).all()
    after = pool.stats()
    print(f"{after.major_faults - before.major_faults} major faults, {after.slot_steals} steals")
    assert after.major_faults - before.major_faults > 2000
    assert after.evictions - before.evictions > 2000


def exchange(arrays: Any, who: int, seed: int) -> int:
    """Add one to this worker's word of random pages of its arrays, and read others'."""
    rng = np.random.default_rng(seed + who + 1)
    own = arrays[who::4]
    for _ in range(1500):
        a = own[int(rng.integers(len(own)))]
        page = int(rng.integers(len(a) // WORDS))
        a[page * WORDS + who] += 1
        other = arrays[int(rng.integers(len(arrays)))]
        assert other[int(rng.integers(len(other) // WORDS)) * WORDS + 100] != 0
    return 1500
