"""What if the tables change between a look and a lock?  A mutant gets each question wrong.

`make mutants` takes one guard out at a time (tests/mutants/) and demands that a test here, or
elsewhere, sees it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint, actors, page_id, touch, until
from hands import Hands, page_out, rows

from pyswap._native import native

pytestmark = pytest.mark.failpoint

WORDS = 512
PROT = mmap.PROT_READ | mmap.PROT_WRITE
MAP_PRIVATE_FIXED_ANONYMOUS = 0x02 | 0x10 | 0x20


class Coverer(Hands):
    """As `Hands`, and ("cover", page)."""

    def __call__(self, question: Any) -> Any:
        if question[0] == "cover":
            return cover(self._a[question[1]])
        return super().__call__(question)


def cover(row: Any) -> bool:
    """Lay memory of another kind over a page's address, as a program may."""
    mmap_ = ctypes.CDLL(None, use_errno=True).mmap
    mmap_.restype = ctypes.c_void_p
    mmap_.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = row.__array_interface__["data"][0]
    got = mmap_(address, WORDS * 8, PROT, MAP_PRIVATE_FIXED_ANONYMOUS, -1, 0)
    return bool(got == address)


# A page is looked up, and is another's before it is locked.


def test_what_if_a_frame_has_another_page_before_it_is_locked(pool: Any) -> None:
    a, b = rows(pool, 1), pool.zeros((4, WORDS), np.int64)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (reader, evictor),
        Failpoint(pool, "entry_read", "park") as point,
    ):
        reader.tell(("read", 0))
        point.wait_parked()
        evictor.ask(("pageout",))
        # The frame that was freed last is claimed first.
        b[:] = 9
        point.release()
        assert reader.answer() == 1
        assert (b == 9).all()


def test_what_if_a_page_is_copied_before_another_thread_locks_the_old_one(pool: Any) -> None:
    a = rows(pool, 1, private=True)
    hands = Hands(pool, a)
    # Three sharers: the old page is shared yet when this process has a copy.
    with actors(2, hands), Failpoint(pool, "entry_read", "park") as point:
        address = a.__array_interface__["data"][0]
        value = (ctypes.c_int64 * 1)(55)

        def store() -> None:
            ctypes.memmove(address, value, 8)

        thread = threading.Thread(target=store)
        thread.start()
        point.wait_parked()
        other = (ctypes.c_int64 * 1)(66)
        ctypes.memmove(address + 8, other, 8)
        point.release()
        thread.join()
        assert a[0, :3].tolist() == [55, 66, 1]
        assert pool.stats().cow_copies == 1


def test_what_if_a_page_is_filled_and_written_before_another_frame_is_installed(pool: Any) -> None:
    a = rows(pool, 1)
    page_out(pool, a)
    hands = Hands(pool, a)
    with (
        actors(2, hands, hands.quiet) as (reader, writer),
        Failpoint(pool, "frame_claimed", "park") as point,
    ):
        reader.tell(("read", 0))
        point.wait_parked()
        assert writer.ask(("write", 0, 77)) == 77
        point.release()
        # Its frame is free again: the page has one.
        assert reader.answer() == 77
        assert pool.stats().slot_reads == 1
        assert pool.stats().resident_pages == 1
        assert writer.ask(("read", 0)) == 77


# A page is filled for an object that has ended.


def test_what_if_an_array_is_released_before_its_page_has_a_frame(pool: Any) -> None:
    a = pool.zeros((4, WORDS), np.int64)
    hands = Hands(pool, a)
    with (
        actors(1, hands, hands.quiet) as (toucher,),
        Failpoint(pool, "frame_claimed", "park") as point,
    ):
        toucher.tell(("read", 2))
        point.wait_parked()
        pool.release(a)
        # A fork waits for its turn behind the release.
        with actors(1, hands):
            pass
        point.release()
        until(lambda: toucher.has_answered() or toucher.has_ended(), "the fault has an end")
        frames = pool.stats().free_frames
        until(lambda: pool.stats().free_frames == 2048, f"its frame is free again, beside {frames}")


# Nothing is published early.


def test_is_a_page_that_is_clean_in_its_slot_at_every_instant(pool: Any) -> None:
    a = rows(pool, 1)
    page = page_id(pool, a)
    hands = Hands(pool, a)
    for value in (1, 2, 3):
        a[:] = value
        with (
            actors(1, hands, hands.quiet) as (evictor,),
            Failpoint(pool, "frame_clean", "park") as point,
        ):
            _, before = native.page_record(pool._control(), page)
            evictor.tell(("pageout",))
            point.wait_parked()
            dirty, slot = native.page_record(pool._control(), page)
            assert not dirty
            assert slot is not None
            assert slot != before
            point.release()
            evictor.answer()
        assert (a == value).all()


def test_is_a_frame_on_the_free_list_nobodys_any_more(pool: Any) -> None:
    a, b = rows(pool, 1), pool.zeros((4, WORDS), np.int64)
    hands = Hands(pool, a)
    with (
        actors(1, hands, hands.quiet) as (evictor,),
        Failpoint(pool, "frame_free", "park") as point,
    ):
        evictor.tell(("pageout",))
        point.wait_parked()
        # Frames are claimed meanwhile, the one that was freed last first.
        b[:] = 9
        point.release()
        evictor.answer()
    assert (a == 1).all()
    assert (b == 9).all()


def test_has_a_process_its_old_page_until_the_copy_is_mapped(pool: Any) -> None:
    a = rows(pool, 1, private=True)
    address = a.__array_interface__["data"][0]

    def look_or_write(question: Any) -> Any:
        if question == "look":
            return touch(a)
        value = (ctypes.c_int64 * 1)(question)
        threading.Thread(target=ctypes.memmove, args=(address + 8, value, 8), daemon=True).start()
        return None

    with (
        actors(1, look_or_write) as (child,),
        Failpoint(pool, "attendant_order", "park") as point,
    ):
        assert child.ask("look") == 1
        child.ask(77)
        point.wait_parked()
        # The child's address has the old page yet: what is written here must not be seen there.
        a[0, 0] = 99
        assert child.ask("look") == 1
        point.release()
        until(lambda: pool.stats().cow_remaps == 2, "both have copies")
        assert child.ask("look") == 1
        assert a[0, :2].tolist() == [99, 1]


# A run is protected that has a gap.


def test_is_a_page_protected_behind_one_that_the_program_mapped_over(pool: Any) -> None:
    a = rows(pool, 8)
    hands = Coverer(pool, a)
    with (
        actors(2, hands) as (writer, evictor),
        Failpoint(pool, "clean_written", "park") as point,
    ):
        for page in range(8):
            writer.ask(("write", page, page + 1))
        assert writer.ask(("cover", 2))
        evictor.tell(("pageout",))
        point.wait_parked()
        writer.ask(("write", 5, 77))
        point.release()
        evictor.answer()
        expected = np.arange(1, 9)
        expected[5] = 77
        page_out(pool, a)
        assert (a == expected[:, None]).all()
