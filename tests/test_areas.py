"""Swap areas: added and taken away while processes work, every page right and shared as before."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint
from physical import frames_of
from workers import until, workers

import pyswap

WORDS = 512
"""64-bit words of a page."""
FRAMES = 256


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[pyswap.Pool]:
    """A pool of 256 frames of 4 KiB with 8 MiB of swap."""
    with pyswap.Pool("1 MiB", "8 MiB", page_size=4096, swap_path=tmp_path) as made:
        yield made
        made.check()


def numbered(pool: pyswap.Pool, pages: int, private: bool = False) -> Any:
    a = pool.zeros(pages * WORDS, np.int64, private=private)
    a[::WORDS] = np.arange(1, pages + 1)
    a[WORDS - 1 :: WORDS] = np.arange(1, pages + 1)
    return a


def is_numbered(a: Any) -> bool:
    expected = np.arange(1, len(a) // WORDS + 1)
    return bool((a[::WORDS] == expected).all() and (a[WORDS - 1 :: WORDS] == expected).all())


def used(pool: pyswap.Pool) -> list[int]:
    return [area.used // 4096 for area in pool.swaps()]


def swap_files(pool: pyswap.Pool, folder: Path) -> int:
    """How many files of a folder the swapper holds; they have no name."""
    held = 0
    for fd in os.listdir(f"/proc/{pool.swapper_pid}/fd"):
        try:
            held += os.readlink(f"/proc/{pool.swapper_pid}/fd/{fd}").startswith(str(folder))
        except FileNotFoundError:
            continue
    return held


def evict(pool: pyswap.Pool, a: Any) -> None:
    def is_out() -> bool:
        pool.advise(a, "pageout")
        return not pool.residency(a).any()

    until(is_out, "the array is paged out")


@pytest.mark.core
def test_what_is_a_new_area_like(tight: pyswap.Pool, tmp_path: Path) -> None:
    (first,) = tight.swaps()
    assert (first.path, first.size, first.used, first.priority, first.errors) == (
        str(tmp_path),
        8 << 20,
        0,
        0,
        0,
    )
    area = tight.swapon(tmp_path / "more", "2 MiB", 7)
    assert isinstance(area, pyswap.SwapArea)
    assert (area.path, area.size, area.used) == (str(tmp_path / "more"), 2 << 20, 0)
    assert tight.swaps() == (first, area)
    assert tight.stats().swap_bytes == 10 << 20
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AttributeError):
        area.size = 3  # type: ignore[misc]


@pytest.mark.core
def test_are_areas_filled_by_priority_and_in_turn(tight: pyswap.Pool, tmp_path: Path) -> None:
    tight.swapon(tmp_path, 100 * 4096, 5)
    tight.swapon(tmp_path, 400 * 4096, 5)
    a = numbered(tight, 90)
    for low in range(0, 90, 10):
        evict(tight, a[low * WORDS : (low + 10) * WORDS])
    first, one, other = used(tight)
    assert first == 0
    assert one >= 30
    assert other >= 30
    others = []
    for _ in range(12):
        # Few enough to stay in memory until they are all written: a page that is written out twice
        # gives up a slot that nobody may want then.
        others.append(numbered(tight, 100))
        evict(tight, others[-1])
    assert used(tight) == [1290 - 500, 100, 400]
    assert is_numbered(a)
    assert all(is_numbered(b) for b in others)


def write_for_long(inherited: Any, who: int, seed: int) -> int:
    """Write random pages of a quarter of an array until told not to; verify each before."""
    a, told = inherited
    rng = np.random.default_rng(seed + who)
    quarter = len(a) // WORDS // 4
    mine = a[who * quarter * WORDS : (who + 1) * quarter * WORDS]
    model = np.zeros(quarter, np.int64)
    writes = 0
    while not told[0]:
        page = int(rng.integers(quarter))
        assert mine[page * WORDS] == mine[page * WORDS + WORDS - 1] == model[page]
        model[page] += 1
        mine[page * WORDS] = mine[page * WORDS + WORDS - 1] = model[page]
        writes += 1
    assert (mine[::WORDS] == model).all()
    assert (mine[WORDS - 1 :: WORDS] == model).all()
    return writes


@pytest.mark.core
def test_lose_writers_nothing_through_a_swapoff(
    tight: pyswap.Pool, tmp_path: Path, seed: int, require: Callable[[str], None]
) -> None:
    require("root")
    other = tmp_path / "other"
    other.mkdir()
    area = tight.swapon(other, "8 MiB")
    a = tight.zeros(3 * FRAMES * WORDS, np.int64)
    kept = numbered(tight, 60, private=True)
    told = tight.zeros(1, np.int64)
    with workers((a, told), 4) as crew, workers(kept, 1) as (sharer,):
        for who, worker in enumerate(crew):
            worker.send(write_for_long, who, seed)
        evict(tight, kept)
        before = tight.stats()
        until(lambda: tight.swaps()[1].used > 100 * 4096, "the second area is in use")
        reports: list[tuple[int, int]] = []
        tight.swapoff(area, lambda done, total: reports.append((done, total)))
        assert reports
        assert reports[-1][0] == reports[-1][1] > 100
        assert len(tight.swaps()) == 1
        assert swap_files(tight, other) == 0
        evictions = tight.stats().evictions
        until(lambda: tight.stats().evictions > evictions + 500, "the writers go on")
        told[0] = 1
        writes = [worker.answer() for worker in crew]
        assert is_numbered(kept)
        assert sharer.ask(is_numbered)
        # The private pages have been through the area that is gone, and are shared as before.
        evict(tight, kept)
        reads = tight.stats().slot_reads
        assert frames_of(kept) == sharer.ask(frames_of)
        assert tight.stats().slot_reads - reads >= 60
        assert tight.stats().cow_copies == 0
    after = tight.stats()
    print(f"{sum(writes)} writes, {after.evictions - before.evictions} evictions")
    assert after.swap_bytes == 8 << 20
    assert after.evictions - before.evictions > 2000


@pytest.fixture
def disk(tmp_path: Path, require: Callable[[str], None]) -> Iterator[Path]:
    """A file system of its own, where nobody else takes or frees a block."""
    require("root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=False
    )
    if mounted.returncode:
        pytest.skip("root may not mount here")
    try:
        yield folder
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.core
def test_is_nothing_left_of_an_area_that_is_off(tight: pyswap.Pool, disk: Path) -> None:
    blocks = os.statvfs(disk).f_bfree
    area = tight.swapon(disk, "8 MiB", 1)
    a = numbered(tight, 700)
    evict(tight, a)
    assert used(tight) == [0, 700]
    assert os.statvfs(disk).f_bfree <= blocks - 700
    with workers(a, 1) as (worker,):
        tight.swapoff(area)
        # In no process, and on its way to none: a file system that is in use stays mounted.
        assert os.statvfs(disk).f_bfree == blocks
        subprocess.run(["umount", disk], check=True)
        assert worker.ask(is_numbered)
    assert is_numbered(a)


@pytest.mark.core
def test_give_pages_that_are_shared_up_their_slots_once_for_all(
    tight: pyswap.Pool, tmp_path: Path
) -> None:
    area = tight.swapon(tmp_path, "8 MiB", 1)
    a = numbered(tight, 400, private=True)
    evict(tight, a)
    assert used(tight) == [0, 400]
    with workers(a, 2) as crew:
        tight.swapoff(area)
        assert tight.stats().cow_copies == 0
        evict(tight, a)
        assert used(tight) == [400]
        reads = tight.stats().slot_reads
        assert is_numbered(a)
        for worker in crew:
            assert worker.ask(is_numbered)
        # 400 pages in 256 frames, gone through twice by each: no more reads than that.
        assert tight.stats().slot_reads - reads <= 3 * 2 * 400
        assert tight.stats().committed_bytes == 400 * 4096


@pytest.mark.core
def test_is_a_swapoff_that_does_not_fit_refused(tight: pyswap.Pool, tmp_path: Path) -> None:
    area = tight.swapon(tmp_path, "4 MiB")
    a = numbered(tight, (12 << 20) // 4096)
    before = tight.swaps()
    with pytest.raises(pyswap.SwapFullError, match="would have no room"):
        tight.swapoff(area)
    assert [each.number for each in tight.swaps()] == [each.number for each in before]
    assert tight.stats().swap_bytes == 12 << 20
    evict(tight, a)
    assert is_numbered(a)
    del a
    tight.swapoff(area)
    with pytest.raises(ValueError, match="off already"):
        tight.swapoff(area)


@pytest.mark.core
def test_goes_a_pool_on_when_a_swapoff_is_interrupted(tight: pyswap.Pool, tmp_path: Path) -> None:
    area = tight.swapon(tmp_path, "8 MiB", 1)
    a = numbered(tight, 1500)
    evict(tight, a)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tight.swapoff(area, interrupt)
    assert tight.stats().swap_bytes == 16 << 20
    assert is_numbered(a)
    evict(tight, a)
    assert used(tight)[1] > 1000
    tight.swapoff(area)
    assert is_numbered(a)


@pytest.mark.core
def test_may_a_swapoff_be_interrupted_anywhere(
    tight: pyswap.Pool, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    area = tight.swapon(tmp_path, "8 MiB", 1)
    a = numbered(tight, 500)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    ended = 0
    try:
        for _ in range(60):
            evict(tight, a)
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-2))
                tight.swapoff(area)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            # It is on or off, and being taken off in neither case.
            assert tight.stats().swap_bytes == sum(each.size for each in tight.swaps())
            if len(tight.swaps()) == 1:
                ended += 1
                area = tight.swapon(tmp_path, "8 MiB", 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print(f"{ended} of 60 came to their end")
    assert ended < 60
    assert is_numbered(a)
    tight.swapoff(area)
    assert is_numbered(a)


def swap_off(inherited: Any) -> None:
    pool, area = inherited
    pool.swapoff(area)


@pytest.mark.failpoint
def test_goes_a_pool_on_when_who_takes_an_area_off_is_killed(
    tight: pyswap.Pool, tmp_path: Path
) -> None:
    area = tight.swapon(tmp_path, "8 MiB", 1)
    a = numbered(tight, 1500)
    evict(tight, a)
    with workers((tight, area), 1) as (worker,):
        with Failpoint(tight, "drain_page", "park", skip=10) as parked:
            worker.send(swap_off)
            parked.wait_parked()
            assert tight.stats().swap_bytes == 8 << 20
            with pytest.raises(ValueError, match="being taken off already"):
                tight.swapoff(area)
            worker.kill()
            until(lambda: tight.stats().swap_bytes == 16 << 20, "the area is on again")
        assert worker.wait() == -signal.SIGKILL
    assert is_numbered(a)
    tight.swapoff(area)
    assert is_numbered(a)
    assert len(tight.swaps()) == 1


@pytest.mark.failpoint
def test_counts_an_area_its_errors(tight: pyswap.Pool) -> None:
    a = numbered(tight, 300)
    with Failpoint(tight, "clean_write", "errno", error=errno.EIO, limit=2) as failing:
        tight.advise(a, "pageout")
        until(lambda: failing.hits == 2, "two writes have failed")
    evict(tight, a)
    assert tight.swaps()[0].errors == 2
    assert is_numbered(a)


@pytest.mark.core
def test_may_a_pool_without_swap_get_some(tmp_path: Path) -> None:
    with pyswap.Pool("1 MiB", 0, page_size=4096) as pool:
        assert pool.swaps() == ()
        with pytest.raises(MemoryError):
            pool.zeros(600 * WORDS, np.int64)
        area = pool.swapon(tmp_path, "4 MiB")
        a = numbered(pool, 600)
        assert is_numbered(a)
        with pytest.raises(pyswap.SwapFullError):
            pool.swapoff(area)
        del a
        pool.swapoff(area)
        assert pool.swaps() == ()
        with pytest.raises(MemoryError):
            pool.zeros(600 * WORDS, np.int64)


@pytest.mark.core
def test_is_a_wrong_area_refused(tight: pyswap.Pool, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(FileExistsError):
        tight.swapon(tmp_path / "there", "1 MiB")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(ValueError, match="size is 0"):
        tight.swapon(tmp_path, 0)
    with pytest.raises(TypeError):
        tight.swapon(None, "1 MiB")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="32 bits"):
        tight.swapon(tmp_path, "1 MiB", 1 << 31)
    with pytest.raises(OSError, match="free") as caught:
        tight.swapon(tmp_path, 1 << 45)
    assert caught.value.errno == errno.ENOSPC
    for _ in range(15):
        tight.swapon(tmp_path, "1 MiB")
    with pytest.raises(ValueError, match="at most 16"):
        tight.swapon(tmp_path, "1 MiB")
    assert swap_files(tight, tmp_path) == 16


@pytest.mark.core
def test_may_areas_come_and_go_for_long(tight: pyswap.Pool, tmp_path: Path) -> None:
    a = numbered(tight, 700)
    for i in range(12):
        area = tight.swapon(tmp_path, "4 MiB", i % 3 - 1)
        a[::WORDS] += 0
        evict(tight, a)
        assert is_numbered(a)
        tight.swapoff(area if i % 2 else tight.swaps()[0])
    assert is_numbered(a)
    assert len(tight.swaps()) == 1
    assert swap_files(tight, tmp_path) == 1
