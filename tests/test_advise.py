"""Does advice do what it says, and do pins hold?"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from typing import Any

import numpy as np
import pytest
from failpoints import until

from pyswap import config

pytestmark = pytest.mark.core


def rows(pool: Any, n: int) -> Any:
    a = pool.zeros((n, pool.page_size), np.uint8)
    a[:] = (np.arange(n) % 251 + 1).astype(np.uint8)[:, None]
    return a


def press(pool: Any) -> None:
    """Use more memory than there is."""
    b = pool.zeros(2 * pool.memory, np.uint8)
    b[:] = 1
    assert b[:: pool.page_size].sum() == 2 * pool.memory // pool.page_size


def test_does_residency_agree_with_a_walk_over_every_byte(pool: Any, seed: int) -> None:
    rng = random.Random(seed)
    a = rows(pool, 60).reshape(12, 5, -1)
    for i in range(60):
        if rng.random() < 0.5:
            pool.advise(a.reshape(60, -1)[i], "pageout")
    flat = pool.residency(a)
    assert 0 < flat.sum() < 60
    start = a.__array_interface__["data"][0]
    size = pool.page_size
    for _ in range(200):
        steps = [
            slice(*sorted(rng.sample(range(n + 1), 2)), rng.choice([1, 1, 2, 3])) for n in a.shape
        ]
        v = a[tuple(steps)]
        for axis in range(3):
            if rng.random() < 0.3:
                v = np.flip(v, axis)
        v = v.transpose(rng.sample(range(3), 3))
        offsets: Any = np.array([v.__array_interface__["data"][0] - start])
        for n, stride in zip(v.shape, v.strides, strict=True):
            offsets = np.add.outer(offsets, np.arange(n) * stride).ravel()
        pages = np.unique(offsets // size) if v.size else np.empty(0, int)
        np.testing.assert_array_equal(pool.residency(v), flat[pages])


def test_does_pageout_evict_before_it_returns(pool: Any) -> None:
    a = rows(pool, 500)
    pool.advise(a[100:200], "pageout")
    np.testing.assert_array_equal(pool.residency(a), [not 100 <= i < 200 for i in range(500)])
    assert (a[:, 0] == np.arange(500) % 251 + 1).all()


def test_does_willneed_bring_pages_before_they_are_touched(pool: Any) -> None:
    a = rows(pool, 300)
    pool.advise(a, "pageout")
    before = pool.stats().major_faults
    pool.advise(a[50:150], "willneed")
    until(lambda: pool.residency(a[50:150]).all(), "the pages to arrive")
    assert pool.residency(a).sum() == 100
    assert (a[50:150, 7] == np.arange(50, 150) % 251 + 1).all()
    assert pool.stats().major_faults == before


def test_does_dontneed_choose_who_goes_first(pool: Any) -> None:
    n = pool.memory // pool.page_size
    a = rows(pool, n // 2)
    unneeded = a[100:900]
    pool.advise(unneeded, "dontneed")
    assert pool.residency(a).all()
    # Not more than the watermarks make reclaim take: the unneeded must be the ones that go.
    b = pool.zeros((n // 2 - 100, pool.page_size), np.uint8)
    b[:] = 3
    until(lambda: not pool.residency(unneeded).all(), "reclaim to begin")
    until(lambda: pool.stats().free_frames >= n // 8, "reclaim to end")
    gone = ~pool.residency(a)
    assert gone[100:900].sum() >= 0.9 * gone.sum()
    assert (a[:, 9] == np.arange(n // 2) % 251 + 1).all()


def test_does_random_stop_readahead_and_sequential_start_it_at_once(pool: Any) -> None:
    a = rows(pool, 1000)
    b = rows(pool, 50)
    for asked_for in (a, b):
        pool.advise(asked_for, "pageout")
    pool.advise(a, "random")
    before = pool.stats()
    assert a[:100, 0].tolist() == list(range(1, 101))
    assert pool.stats().major_faults - before.major_faults == 100
    # Readahead threads take requests in turn: one for `a` would have been before these.
    pool.advise(b, "willneed")
    until(lambda: pool.residency(b).all(), "what was asked for has come")
    assert pool.residency(a).sum() == 100
    assert pool.stats().readahead_pages - before.readahead_pages == 50
    pool.advise(a, "pageout")
    pool.advise(a, "sequential")
    # The second of two neighbours has the whole window asked for, with no third step.
    assert a[:2, 0].tolist() == [1, 2]
    window = config.bounds(pool.memory // pool.page_size, pool.page_size).window_pages
    until(lambda: pool.residency(a[2 : 2 + window]).all(), "the pages beyond to arrive")


def test_do_pinned_pages_stay_while_memory_is_short(pool: Any) -> None:
    a = rows(pool, 700)
    pool.advise(a, "pageout")
    with pool.pin(a[200:600], writable=False):
        assert pool.residency(a[200:600]).all()
        assert pool.stats().pinned_pages == 400
        press(pool)
        assert pool.residency(a[200:600]).all()
        pool.advise(a, "pageout")
        assert pool.residency(a[200:600]).all()
    assert pool.stats().pinned_pages == 0
    press(pool)
    assert pool.residency(a).sum() < 400
    assert (a[:, 5] == np.arange(700) % 251 + 1).all()


def test_is_what_is_written_under_a_pin_kept(pool: Any) -> None:
    a = rows(pool, 300)
    pool.advise(a, "pageout")
    with pool.pin(a):
        faults = pool.stats().write_faults
        a[:] = 77
        assert pool.stats().write_faults == faults, "a writable pin lifts the protection"
    press(pool)
    assert (a == 77).all()


def test_is_a_pin_that_cannot_fit_a_memory_error_that_changes_nothing(pool: Any) -> None:
    a = rows(pool, 3000)
    with pytest.raises(MemoryError, match="pages do not fit"), pool.pin(a):
        pass
    half = a[:900]
    with pool.pin(half), pytest.raises(MemoryError), pool.pin(a[1000:2500]):
        pass
    assert pool.stats().pinned_pages == 0
    press(pool)
    assert (a[:, 0] == np.arange(3000) % 251 + 1).all()


def test_do_pins_nest_and_overlap_between_threads(pool: Any) -> None:
    a = rows(pool, 200)
    barrier = threading.Barrier(4)

    def hold(k: int) -> None:
        for i in range(20):
            with pool.pin(a[k * 20 : k * 20 + 100], writable=bool(i % 2)):
                assert pool.residency(a[k * 20 : k * 20 + 100]).all()
        barrier.wait(60)

    threads = [threading.Thread(target=hold, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert pool.stats().pinned_pages == 0


def test_do_the_pins_of_a_killed_child_come_back(pool: Any) -> None:
    a = rows(pool, 300)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with pool.pin(a):
            os.write(write, b"x")
            signal.pause()
        os._exit(1)
    try:
        assert os.read(read, 1) == b"x"
        assert pool.stats().pinned_pages == 300
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
    until(lambda: pool.stats().pinned_pages == 0, "the pins to come back")
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()


def test_does_an_interrupt_in_a_pin_leave_nothing_pinned(pool: Any, seed: int) -> None:
    a = rows(pool, 500)
    rng = random.Random(seed)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    hit = 0
    try:
        for _ in itertools.repeat(None, 60):
            pool.advise(a, "pageout")
            # A pin that was interrupted before it was granted goes as soon as it comes.
            until(lambda: pool.stats().pinned_pages == 0, "the last one's pins are back")
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 5e-3))
                with pool.pin(a):
                    # Not a pause(), which a signal right before it would not end.
                    while True:
                        pass
            except KeyboardInterrupt:
                hit += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hit == 60
    until(lambda: pool.stats().pinned_pages == 0, "the pins to come back")
