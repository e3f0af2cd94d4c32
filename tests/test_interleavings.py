"""What if ...: one question a test, with the machinery held or failed at the point in question."""

from __future__ import annotations

import errno
import faulthandler
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Actor, Failpoint, actors, page_id, state_of, until, wait_for_waiters
from hands import Hands, page_out, rows

pytestmark = pytest.mark.failpoint

MANY = 1 << 30
READ_TRIES = 3


# Written out, and touched meanwhile.


def test_what_if_a_page_is_written_before_its_bytes_go_out(pool: Any) -> None:
    a = rows(pool, 1)
    page = page_id(pool, a)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, writer),
        Failpoint(pool, "clean_protected", "park") as point,
    ):
        assert writer.ask(("read", 0)) == 1
        evictor.tell(("pageout",))
        point.wait_parked()
        writer.tell(("write", 0, 77))
        wait_for_waiters(pool, page)
        assert not writer.has_answered()
        point.release()
        assert writer.answer() == 77
        evictor.answer()
        assert (a == 77).all()
        page_out(pool, a)
        assert (a == 77).all()


@pytest.mark.parametrize("point_name", ["clean_write", "clean_written"])
def test_what_if_a_page_is_written_while_its_bytes_go_out(pool: Any, point_name: str) -> None:
    a = rows(pool, 1)
    page = page_id(pool, a)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, writer),
        Failpoint(pool, point_name, "park") as point,
    ):
        assert writer.ask(("read", 0)) == 1
        evictor.tell(("pageout",))
        point.wait_parked()
        assert state_of(pool, page) == "writeback"
        # It need not wait for the write; what was written of the page does not count.
        assert writer.ask(("write", 0, 77)) == 77
        assert pool.stats().redirtied_pages == 0
        point.release()
        evictor.answer()
        assert pool.stats().redirtied_pages == 1
        assert pool.residency(a).all() == bool(pool.stats().dirty_pages)
        assert (a == 77).all()
        page_out(pool, a)
        assert pool.stats().swap_used_bytes == pool.page_size
        assert (a == 77).all()


def test_does_pageout_take_what_was_mapped_while_its_bytes_went_out(pool: Any) -> None:
    a = rows(pool, 2)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, reader),
        Failpoint(pool, "clean_written", "park") as point,
    ):
        evictor.tell(("pageout",))
        point.wait_parked()
        # It looks touched now, as it would after a fault-around that came late.
        assert reader.ask(("read", 0)) == 1
        point.release()
        evictor.answer()
        assert not pool.residency(a).any()
        assert pool.stats().slot_writes == 2
    assert (a[:, 1] == [1, 2]).all()


def test_does_a_page_go_that_was_locked_when_its_bytes_were_out(pool: Any) -> None:
    pages = 4
    a = pool.zeros((pages, pool.page_size // 8), np.int64, private=True)
    a[:] = np.arange(1, pages + 1)[:, None]
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, writer),
        Failpoint(pool, "clean_written", "park") as written,
        Failpoint(pool, "copy_made", "park") as copied,
    ):
        evictor.tell(("pageout",))
        written.wait_parked()
        # A copy of the last page holds its lock, and does not touch it.
        writer.tell(("write", pages - 1, 77))
        copied.wait_parked()
        written.release()
        until(lambda: not pool.residency(a[:-1]).any(), "the others are evicted")
        assert pool.residency(a).sum() == 1
        assert not evictor.has_answered()
        copied.release()
        assert writer.answer() == 77
        evictor.answer()
        assert not pool.residency(a).any()
        # It went as soon as its lock was had, not as one that a later round found clean.
        assert pool.stats().clean_drops == 0
    assert (a[:, 1] == np.arange(1, pages + 1)).all()


def test_what_if_a_page_with_a_slot_is_written_while_its_bytes_go_out(pool: Any) -> None:
    a = rows(pool, 1)
    page_out(pool, a)
    a[:] = 50
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, writer),
        Failpoint(pool, "clean_written", "park") as point,
    ):
        evictor.tell(("pageout",))
        point.wait_parked()
        assert writer.ask(("write", 0, 77)) == 77
        point.release()
        evictor.answer()
    assert (a == 77).all()
    page_out(pool, a)
    assert pool.stats().swap_used_bytes == pool.page_size
    assert (a == 77).all()


def test_what_if_a_page_is_read_while_its_bytes_go_out_and_written_later(pool: Any) -> None:
    a = rows(pool, 1)
    page = page_id(pool, a)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, reader),
        Failpoint(pool, "clean_written", "park") as point,
    ):
        evictor.tell(("pageout",))
        point.wait_parked()
        assert state_of(pool, page) == "writeback"
        assert reader.ask(("read", 0)) == 1
        point.release()
        evictor.answer()
        # The reader made nothing dirty: what went out while it read is right.
        assert pool.stats().redirtied_pages == 0
        assert pool.stats().dirty_pages == 0
        assert pool.stats().slot_writes == 1
        # Its mapping is not writable, or this write would be nobody's business.
        reader.ask(("write", 0, 88))
        assert pool.stats().dirty_pages == 1
    page_out(pool, a)
    assert (a == 88).all()


def test_what_if_one_page_of_a_batch_is_written_while_it_goes_out(pool: Any) -> None:
    a = rows(pool, 64)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, writer),
        Failpoint(pool, "clean_written", "park") as point,
    ):
        evictor.tell(("pageout",))
        point.wait_parked()
        assert writer.ask(("write", 31, 77)) == 77
        point.release()
        evictor.answer()
    page_out(pool, a)
    expected = np.arange(1, 65)
    expected[31] = 77
    assert (a == expected[:, None]).all()


# Evicted, and touched meanwhile.


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("touch", [("read", 0), ("write", 0, 77)])
def test_what_if_a_page_is_touched_between_punch_and_entry(
    pool: Any, touch: tuple[Any, ...], clean: bool
) -> None:
    a = rows(pool, 1)
    if clean:
        page_out(pool, a)
        assert a.sum() == a.size
    before = pool.stats()
    page = page_id(pool, a)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, toucher),
        Failpoint(pool, "evict_punched", "park") as point,
    ):
        evictor.tell(("pageout",))
        point.wait_parked()
        assert state_of(pool, page) == "evicting"
        resident = bool(pool.residency(a).any())
        assert not resident
        assert os.fstat(pool.fileno()).st_blocks == 0
        toucher.tell(touch)
        wait_for_waiters(pool, page)
        assert not toucher.has_answered()
        point.release()
        assert toucher.answer() == touch[-1] or touch == ("read", 0)
        evictor.answer()
        assert pool.stats().slot_reads == before.slot_reads + 1
        assert (a == (1 if touch[0] == "read" else 77)).all()
        page_out(pool, a)
        assert (a == (1 if touch[0] == "read" else 77)).all()


@pytest.mark.parametrize("touch", [("read", 0), ("write", 0, 77)])
def test_what_if_a_page_is_touched_before_its_old_frame_is_free(
    pool: Any, touch: tuple[Any, ...]
) -> None:
    a = rows(pool, 1)
    page = page_id(pool, a)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, toucher),
        Failpoint(pool, "evict_entry", "park") as point,
    ):
        evictor.tell(("pageout",))
        point.wait_parked()
        # The entry names the slot: another frame is filled at once.
        assert state_of(pool, page) is None
        toucher.ask(touch)
        assert state_of(pool, page) == "present"
        assert point.parked == 1
        point.release()
        evictor.answer()
    page_out(pool, a)
    assert (a == (1 if touch[0] == "read" else 77)).all()


def test_what_if_a_zero_page_is_touched_between_punch_and_entry(pool: Any) -> None:
    a = pool.zeros((1, 512), np.int64)
    a[:] = 0
    page = page_id(pool, a)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (evictor, toucher),
        Failpoint(pool, "evict_punched", "park") as point,
    ):
        evictor.tell(("pageout",))
        point.wait_parked()
        toucher.tell(("write", 0, 77))
        wait_for_waiters(pool, page)
        point.release()
        assert toucher.answer() == 77
        evictor.answer()
    page_out(pool, a)
    assert (a == 77).all()
    assert pool.stats().zero_drops == 1


# Released, while something is under way.


def test_what_if_an_array_is_released_while_a_page_of_it_is_filled(pool: Any) -> None:
    a = rows(pool, 1)
    page_out(pool, a)
    hands = Hands(pool, a)
    with (
        actors(1, hands, hands.quiet) as (toucher,),
        Failpoint(pool, "fill_locked", "park") as point,
    ):
        toucher.tell(("read", 0))
        point.wait_parked()
        pool.release(a)
        point.release()
        until(lambda: toucher.has_answered() or toucher.has_ended(), "the fault has an end")
        until(lambda: pool.stats().resident_pages == 0, "its page is freed, though it is mapped")
        until(lambda: pool.stats().swap_used_bytes == 0, "its slot is freed, though it is mapped")


def test_what_if_an_array_is_released_while_a_page_of_it_goes_out(pool: Any) -> None:
    a = rows(pool, 1)
    hands = Hands(pool, a)
    with (
        actors(1, hands, hands.quiet) as (evictor,),
        Failpoint(pool, "clean_written", "park") as point,
    ):
        evictor.tell(("pageout",))
        point.wait_parked()
        pool.release(a)
        point.release()
        evictor.answer()
        until(lambda: pool.stats().resident_pages == 0, "its page is freed, though it is mapped")
        until(lambda: pool.stats().swap_used_bytes == 0, "its slot is freed, though it is mapped")


# No memory for the page store.


def test_what_if_there_is_no_memory_for_a_page_of_zeros(pool: Any) -> None:
    a = pool.zeros((8, 512), np.int64)
    with Failpoint(pool, "fallocate", "errno", error=errno.ENOSPC, limit=3) as point:
        a[5] = 6
        assert point.hits == 3
    assert a.sum() == 6 * 512
    assert pool.stats().offline_frames + pool.stats().free_frames <= 2047
    until(lambda: pool.stats().offline_frames == 0, "the frames are tried again")
    page_out(pool, a)
    assert pool.stats().free_frames == 2048
    assert a.sum() == 6 * 512


def test_what_if_there_is_no_memory_for_a_page_in_swap(pool: Any) -> None:
    a = rows(pool, 8)
    page_out(pool, a)
    pool.advise(a, "random")
    before = pool.stats()
    with Failpoint(pool, "fallocate", "errno", error=errno.ENOSPC, limit=3) as point:
        assert (a[5] == 6).all()
        assert point.hits == 3
    after = pool.stats()
    assert after.swap_used_bytes == before.swap_used_bytes
    assert after.poisoned_pages == after.read_errors == 0
    until(lambda: pool.stats().offline_frames == 0, "the frames are tried again")
    assert pool.stats().free_frames == before.free_frames - 1
    assert (a == np.arange(1, 9)[:, None]).all()


def frames_without_memory(pool: Any, toucher: Actor, page: int, refusals: int) -> int:
    """Refuse a fault that many frames, and count those that are offline before it gets one."""
    with (
        Failpoint(pool, "fallocate", "errno", error=errno.ENOSPC, limit=refusals),
        Failpoint(pool, "fill_locked", "park", skip=refusals) as point,
    ):
        toucher.tell(("read", page))
        point.wait_parked()
        stats = pool.stats()
        point.release()
        assert toucher.answer() == page + 1
        return int(stats.offline_frames)


def test_are_frames_without_memory_told_from_free_ones(pool: Any) -> None:
    a = rows(pool, 20)
    page_out(pool, a)
    hands = Hands(pool, a)
    with actors(1, hands, hands.quiet) as (toucher,):
        # Once a second they are tried again, which may be just before we look.
        assert any(frames_without_memory(pool, toucher, page, 50) >= 50 for page in range(20))
    until(lambda: pool.stats().offline_frames == 0, "the frames are tried again")


def test_what_if_readahead_finds_no_memory(pool: Any) -> None:
    a = rows(pool, 64)
    page_out(pool, a)
    with Failpoint(pool, "fallocate", "errno", error=errno.ENOSPC) as point:
        pool.advise(a, "willneed")
        until(lambda: point.hits == 1, "readahead was refused")
        until(lambda: pool.stats().offline_frames == 0, "the frames are tried again")
    pool.check()
    assert (a == np.arange(1, 65)[:, None]).all()


# A slot cannot be read.


class Victim:
    """An actor whose standard error is a file, so that its last words can be read."""

    def __init__(self, pool: Any, a: Any, path: Path) -> None:
        self._path = path
        hands = Hands(pool, a)

        def before() -> None:
            hands.quiet()
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)

        self.actor = Actor(hands, before)

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        self.actor.end()

    def last_words(self) -> list[str]:
        """Wait for its death by SIGBUS, and return the lines it wrote."""
        until(self.actor.has_ended, "the toucher's death")
        assert self.actor.status is not None
        assert os.WIFSIGNALED(self.actor.status)
        assert os.WTERMSIG(self.actor.status) == signal.SIGBUS
        return self._path.read_text().splitlines()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENXIO])
def test_what_if_a_slot_cannot_be_read(pool: Any, tmp_path: Path, error: int) -> None:
    a = rows(pool, 16, name="the tide tables")
    page_out(pool, a)
    hands = Hands(pool, a)
    with (
        Victim(pool, a, tmp_path / "stderr") as victim,
        actors(2, hands, hands.quiet) as (other, waiter),
        Failpoint(pool, "fill_locked", "park") as point,
        Failpoint(pool, "fill_read", "errno", error=error, limit=READ_TRIES) as failing,
    ):
        victim.actor.tell(("read", 7))
        point.wait_parked()
        waiter.tell(("read", 7))
        wait_for_waiters(pool, page_id(pool, a[7]))
        point.release()
        (line,) = victim.last_words()
        area = pool.swaps()[0].path
        for part in (f"{pool.name!r}", "the tide tables", "page 7", area, os.strerror(error)):
            assert part in line
        assert failing.hits == READ_TRIES
        # The others go on: with that page too, once it can be read.
        assert waiter.answer() == 8
        assert [other.ask(("read", page)) for page in range(16)] == list(range(1, 17))
        assert other.ask(("write", 7, 77)) == 77
        assert (a[7] == 77).all()
        stats = pool.stats()
        assert (stats.read_errors, stats.poisoned_pages) == (READ_TRIES, 1)


def test_is_a_slot_that_could_not_be_read_tried_again(pool: Any) -> None:
    a = rows(pool, 4)
    page_out(pool, a)
    with Failpoint(pool, "fill_read", "errno", error=errno.EIO, limit=READ_TRIES - 1) as point:
        assert (a[2] == 3).all()
        assert point.hits == READ_TRIES - 1
    assert pool.stats().poisoned_pages == 0


def test_what_if_readahead_cannot_read(pool: Any) -> None:
    a = rows(pool, 64)
    page_out(pool, a)
    with Failpoint(pool, "fill_read", "errno", error=errno.EIO) as point:
        pool.advise(a, "willneed")
        until(lambda: point.hits == 1, "readahead failed")
    # Nobody had asked for these pages: nobody is told.
    assert (a == np.arange(1, 65)[:, None]).all()
    assert pool.stats().poisoned_pages == 0


def test_what_if_a_page_to_be_pinned_cannot_be_read(pool: Any) -> None:
    a = rows(pool, 8)
    page_out(pool, a)
    with (
        Failpoint(pool, "fill_read", "errno", error=errno.EIO, skip=4, limit=READ_TRIES),
        pytest.raises(OSError, match=os.strerror(errno.EIO)),
        pool.pin(a),
    ):
        raise AssertionError("it was pinned")
    assert pool.stats().pinned_pages == 0
    with pool.pin(a):
        assert pool.stats().pinned_pages == 8
    assert (a == np.arange(1, 9)[:, None]).all()


# A batch cannot be written.


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_what_if_a_batch_cannot_be_written(pool: Any, error: int) -> None:
    a = rows(pool, 100)
    with Failpoint(pool, "clean_write", "errno", error=error, limit=MANY) as point:
        pool.advise(a, "pageout")
        assert point.hits >= 1
        assert pool.residency(a).all()
        stats = pool.stats()
        assert stats.write_errors == point.hits
        assert stats.slot_writes == stats.evictions == stats.swap_used_bytes == 0
        assert stats.dirty_pages == 100
        a[50] = 7777
    page_out(pool, a)
    expected = np.arange(1, 101)
    expected[50] = 7777
    assert (a == expected[:, None]).all()


def test_what_if_a_page_with_a_slot_cannot_be_written(pool: Any) -> None:
    a = rows(pool, 100)
    page_out(pool, a)
    a[:] += 1000
    with Failpoint(pool, "clean_write", "errno", error=errno.EIO, limit=MANY):
        pool.advise(a, "pageout")
        assert pool.residency(a).all()
    page_out(pool, a)
    assert (a == np.arange(1001, 1101)[:, None]).all()
    assert pool.stats().swap_used_bytes == 100 * pool.page_size


def test_are_bytes_right_when_reclaim_meets_write_errors(pool: Any, seed: int) -> None:
    pages = 3 * 2048
    a = pool.zeros((pages, 512), np.int64)
    expected = np.zeros(pages, np.int64)
    rng = np.random.default_rng(seed)
    with Failpoint(pool, "clean_write", "errno", error=errno.EIO, skip=5, limit=20) as point:
        for value in (1, 2):
            for page in rng.permutation(pages).tolist():
                a[page] = expected[page] = value * pages + page
        assert point.hits == 20
    assert pool.stats().write_errors == 20
    assert pool.stats().evictions >= pages
    assert (a == expected[:, None]).all()


# The n-th call fails, for every n, until a run meets no failure.


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fallocate", errno.ENOSPC),
        ("fill_read", errno.EIO),
        ("clean_write", errno.EIO),
        ("clean_write", errno.ENOSPC),
    ],
)
def test_are_bytes_right_whichever_call_fails(pool: Any, name: str, error: int, seed: int) -> None:
    expected = np.random.default_rng(seed).integers(1, 1 << 40, 40)

    def failures_met(skip: int) -> int:
        a = pool.zeros((40, 512), np.int64)
        with Failpoint(pool, name, "errno", error=error, skip=skip) as point:
            for _ in range(2):
                a[:] = expected[:, None]
                # A write that failed leaves its pages resident; the second try succeeds.
                pool.advise(a, "pageout")
                pool.advise(a, "pageout")
                assert (a == expected[:, None]).all()
                expected[:] += 1
            return point.hits

    calls = next(skip for skip in range(1000) if failures_met(skip) == 0)
    print(f"each of {calls} calls failed once")
    assert calls >= 2
    until(lambda: pool.stats().offline_frames == 0, "the frames are tried again")
