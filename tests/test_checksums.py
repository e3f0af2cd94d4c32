"""Is what comes back from swap what went there?  If not: an error for who touches it, no data."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import page_id, until
from swapfile import SwapFile, ending, is_numbered, numbered, page_out

import pyswap

pytestmark = pytest.mark.core

READ_TRIES = 3
PAGE_BITS = 4096 * 8


@pytest.fixture
def roomy(folder: Path) -> Iterator[Any]:
    """A pool of 2,048 frames of 4 KiB, its swap where a test can find it."""
    with pyswap.Pool("8 MiB", "16 MiB", page_size=4096, swap_path=folder) as made:
        yield made
        made.check()


def line_names(line: str, pool: Any, array: str, page: int, folder: Path) -> bool:
    why = f"its slot in swap area {str(folder)[:127]} holds other bytes than were written there"
    wanted = f"{array}, page {page}: {why}: {os.strerror(errno.EBADMSG)}; "
    return line.startswith(f"pyswap: pool {pool.name!r}, ") and wanted in line


def touched_by_the_kernel(a: Any, wrong: list[int]) -> None:
    """Have the kernel read each page, since it answers a poisoned one with EFAULT and goes on."""
    sink = os.memfd_create("sink")
    for i in range(len(a)):
        try:
            os.pwrite(sink, a[i], 0)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            wrong.append(i)


def test_is_a_flipped_bit_an_error_in_each_of_a_thousand_slots(
    roomy: Any, tmp_path: Path, folder: Path, seed: int, require: Callable[[str], None]
) -> None:
    require("uffd")
    pages = 1000
    chance = random.Random(seed)
    a = numbered(roomy, pages, name="the tide tables")
    roomy.advise(a, "random")
    page_out(roomy, a)
    flipped = [(slot, chance.randrange(PAGE_BITS)) for slot in range(pages)]
    wrong: list[int] = []

    def touch_all() -> None:
        touched_by_the_kernel(a, wrong)
        assert wrong == list(range(pages)), f"{len(wrong)} pages answered with an error"

    with SwapFile(roomy, folder) as swap:
        slots = {int(row[0]) for row in swap.words() if row[0]}
        assert slots == set(range(1, pages + 1))
        places = {int(row[0]): slot for slot, row in enumerate(swap.words()) if row[0]}
        for value, bit in flipped:
            swap.flip(places[value + 1], bit)
        number, lines = ending(touch_all, tmp_path / "told")
        assert number == 0
        stats = roomy.stats()
        assert stats.poisoned_pages == len(lines) == pages
        assert stats.checksum_errors == stats.read_errors == READ_TRIES * pages
        assert roomy.swaps()[0].errors == stats.read_errors
        for page, line in enumerate(lines):
            assert line_names(line, roomy, "the tide tables", page, folder), line
        # Nothing but those bits was wrong: the pool has every page once they are right.
        for value, bit in flipped:
            swap.flip(places[value + 1], bit)
    assert is_numbered(a)
    assert roomy.stats().checksum_errors == READ_TRIES * pages


def test_does_who_touches_a_wrong_page_alone_die_of_it(
    roomy: Any, tmp_path: Path, folder: Path
) -> None:
    a = numbered(roomy, 64, name="tides")
    roomy.advise(a, "random")
    page_out(roomy, a)
    with SwapFile(roomy, folder) as swap:
        slot = swap.slot_of(8)
        swap.flip(slot, 77)
        number, (line,) = ending(a[7].sum, tmp_path / "told")
        assert number == signal.SIGBUS
        assert line_names(line, roomy, "tides", 7, folder), line
        number, lines = ending(lambda: a[:7].sum() + a[8:].sum(), tmp_path / "told")
        assert (number, lines) == (0, [])
        assert is_numbered(a[:7])
        swap.flip(slot, 77)
    assert is_numbered(a)


@pytest.mark.parametrize("bring", ["old", "other", "zeros", "shifted"])
def test_is_what_belongs_elsewhere_an_error(
    roomy: Any, tmp_path: Path, folder: Path, bring: str
) -> None:
    a = numbered(roomy, 16)
    roomy.advise(a, "random")
    page_out(roomy, a)
    with SwapFile(roomy, folder) as swap:
        old = swap.read(swap.slot_of(5))
        a[4] = 5000
        page_out(roomy, a)
        slot = swap.slot_of(5000)
        right = swap.read(slot)
        content = {
            # A write that was lost, or went to another place.
            "old": old,
            "other": swap.read(swap.slot_of(9)),
            "zeros": bytes(4096),
            "shifted": right[-512:] + b"\1" + right[1:-512],
        }[bring]
        swap.write(slot, content)
        number, lines = ending(a[4].sum, tmp_path / "told")
        assert number == signal.SIGBUS
        assert len(lines) == 1
        assert "page 4" in lines[0]
        swap.write(slot, right)
    assert (a[4] == 5000).all()
    assert is_numbered(a[:4])
    assert (a[5:] == np.arange(6, 17)[:, None]).all()


def test_do_two_pages_of_equal_bytes_have_checksums_of_their_own(roomy: Any) -> None:
    a = roomy.full((64, 512), 7, np.int64)
    page_out(roomy, a)
    found = [roomy._control().slot(page_id(roomy, a[i])) for i in range(64)]
    assert len({slot for slot, _ in found}) == 64
    assert len({checksum for _, checksum in found}) == 64


def test_does_readahead_over_a_wrong_page_harm_anybody(
    roomy: Any, tmp_path: Path, folder: Path
) -> None:
    a = numbered(roomy, 64)
    page_out(roomy, a)
    with SwapFile(roomy, folder) as swap:
        slot = swap.slot_of(31)
        swap.flip(slot, 5)
        roomy.advise(a, "willneed")
        until(lambda: roomy.residency(a).sum() == 63, "all but the wrong page are read ahead")
        assert not roomy.residency(a[30]).any()
        assert is_numbered(a[:30])
        # A scan up to the page, and one from behind it, both with readahead under way.
        page_out(roomy, a)
        assert is_numbered(a[:30])
        assert (a[31:] == np.arange(32, 65)[:, None]).all()
        assert roomy.stats().poisoned_pages == 0
        number, lines = ending(a[::-1].sum, tmp_path / "told")
        assert number == signal.SIGBUS
        assert len(lines) == 1
        assert "page 30" in lines[0]
        swap.flip(slot, 5)
    assert is_numbered(a)


def test_what_if_an_area_with_a_wrong_page_is_taken_off(
    roomy: Any, folder: Path, tmp_path: Path
) -> None:
    a = numbered(roomy, 64, name="tides")
    page_out(roomy, a)
    (area,) = roomy.swaps()
    roomy.swapon(tmp_path, "16 MiB", -1)
    with SwapFile(roomy, folder) as swap:
        slot = swap.slot_of(31)
        swap.flip(slot, 5)
        with pytest.raises(pyswap.SwapIOError, match="tides, page 30") as caught:
            roomy.swapoff(area)
        assert caught.value.errno == errno.EBADMSG
        assert str(folder) in str(caught.value)
        # The area is on as before, and the pages that had left it have not lost anything.
        assert roomy.swaps()[0].number == area.number
        assert roomy.stats().swap_bytes == 32 << 20
        a[:30] += 0
        page_out(roomy, a)
        assert is_numbered(a[:30])
        assert roomy.swaps()[0].used > 0
        swap.flip(slot, 5)
        roomy.swapoff(area)
    assert is_numbered(a)


def test_is_a_wrong_page_of_a_private_array_named_by_its_index(
    roomy: Any, tmp_path: Path, folder: Path
) -> None:
    a = numbered(roomy, 32, private=True, name="drafts")
    mine = a.snapshot()
    a[9] = 9000
    for view in (a, mine):
        roomy.advise(view, "random")
        page_out(roomy, view)
    with SwapFile(roomy, folder) as swap:
        # The copy, and then the page that the snapshot alone has.
        for value, view in ((9000, a), (10, mine)):
            slot = swap.slot_of(value)
            swap.flip(slot, 4095)
            number, lines = ending(view[9].sum, tmp_path / "told")
            assert number == signal.SIGBUS
            assert len(lines) == 1
            assert line_names(lines[0], roomy, "drafts", 9, folder), lines
            swap.flip(slot, 4095)
    assert (a[9] == 9000).all()
    assert is_numbered(mine)


def test_what_if_a_wrong_page_is_to_be_copied_on_write(
    roomy: Any, tmp_path: Path, folder: Path
) -> None:
    a = numbered(roomy, 32, private=True, name="drafts")
    roomy.advise(a, "random")
    page_out(roomy, a)

    def write() -> None:
        a[3] = 1

    with SwapFile(roomy, folder) as swap:
        slot = swap.slot_of(4)
        swap.flip(slot, 0)
        number, lines = ending(write, tmp_path / "told")
        assert number == signal.SIGBUS
        assert len(lines) == 1
        assert line_names(lines[0], roomy, "drafts", 3, folder), lines
        swap.flip(slot, 0)
    assert is_numbered(a)


def test_does_a_call_that_waits_for_a_wrong_page_raise(
    roomy: Any, folder: Path, tmp_path: Path
) -> None:
    a = numbered(roomy, 32, name="tides")
    page_out(roomy, a)
    with SwapFile(roomy, folder) as swap:
        slot = swap.slot_of(20)
        swap.flip(slot, 100)
        with pytest.raises(pyswap.SwapIOError, match="tides, page 19") as caught:
            a.tofile(tmp_path / "out")
        assert caught.value.errno == errno.EBADMSG
        with pytest.raises(pyswap.SwapIOError), roomy.pin(a):
            raise AssertionError("it was pinned")
        assert roomy.stats().pinned_pages == 0
        swap.flip(slot, 100)
    a.tofile(tmp_path / "out")
    assert (np.fromfile(tmp_path / "out", np.int64).reshape(32, 512) == a).all()


def test_is_a_page_whose_bytes_were_wrong_once_read_again(roomy: Any, folder: Path) -> None:
    """Wrong, and right again: nothing of the error stays with the page or its frame."""
    a = numbered(roomy, 8)
    roomy.advise(a, "random")
    page_out(roomy, a)
    with SwapFile(roomy, folder) as swap:
        slot = swap.slot_of(3)
        for bit in (0, 1, PAGE_BITS - 1):
            swap.flip(slot, bit)
            with pytest.raises(pyswap.SwapIOError), roomy.pin(a[2]):
                pass
            swap.flip(slot, bit)
            assert (a[2] == 3).all()
            page_out(roomy, a)
    assert is_numbered(a)


def test_is_the_checksum_that_of_the_xxhash_library() -> None:
    from pyswap._native import native

    content = bytes(i * 7 % 256 for i in range(4096))
    assert native.checksum(content, 4096) == 0x8FB047A89E810965
    assert native.checksum(content[:4095] + b"\0", 4096) != 0x8FB047A89E810965
