"""The page store: runs of pages are copied to it; buffers lie in huge pages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import page_id

pytestmark = pytest.mark.core

WORDS = 512
PAGES = 1024
"""Half of the pool's frames: a scan of so many evicts nothing."""
JUNK = 0xA5
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def swapped_out(pool: Any) -> Any:
    """An array of a page a row, the row's number in each of its words, all of it in swap."""
    a = pool.empty((PAGES, WORDS), np.int64)
    a[:] = np.arange(PAGES)[:, None] + 1
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()
    return a


def mappings(pid: int) -> Iterator[tuple[str, int, list[str]]]:
    """Yield a process's mappings: name, KiB present, flags."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    pattern = r"^[0-9a-f]+-[0-9a-f]+(.*)$(?:\n[A-Z].*)*?\nRss: +(\d+)(?:.*\n)*?VmFlags: (.*)$"
    for name, present, flags in re.findall(pattern, text, re.MULTILINE):
        yield name, int(present), flags.split()


def scanned(pool: Any, a: Any) -> None:
    """Read an array in order; most of it is read ahead, in runs."""
    before = pool.stats()
    rows = np.array([int(row.sum()) for row in a])
    assert np.array_equal(rows, (np.arange(PAGES) + 1) * WORDS)
    after = pool.stats()
    assert after.slot_reads - before.slot_reads == PAGES
    assert after.read_calls - before.read_calls < PAGES // 8, "these were no runs"


def test_is_what_lies_in_the_store_already_written_over_by_a_run(pool: Any) -> None:
    a = swapped_out(pool)
    first = page_id(pool, a)
    # What a swapper may have left that died: bytes, but no entry of the page table that says so.
    for page in (first + 100, first + 501, first + PAGES - 1):
        os.pwrite(pool.fileno(), bytes([JUNK]) * pool.page_size, page * pool.page_size)
    scanned(pool, a)


def test_keeps_the_swapper_no_mapping_of_what_it_has_read(pool: Any) -> None:
    a = swapped_out(pool)
    scanned(pool, a)
    assert pool.residency(a).all()
    kib = PAGES * pool.page_size >> 10
    store = [
        present
        for name, present, flags in mappings(pool.swapper_pid)
        if "pyswap" in name and "um" in flags
    ]
    assert len(store) == 1, "one mapping is registered with userfaultfd: the store's"
    assert store[0] < kib // 8, f"a punch would have to unmap {store[0]} KiB of it"


@pytest.mark.skipif(not HUGE.exists(), reason="this kernel has no transparent huge pages")
def test_lies_what_is_read_into_in_memory_that_may_have_huge_pages(pool: Any) -> None:
    a = swapped_out(pool)
    scanned(pool, a)
    wants = sum(present for _, present, flags in mappings(pool.swapper_pid) if "hg" in flags)
    # Four threads read ahead, each into a MiB of its own.
    assert wants >= 4096
    assert wants < 12 << 10, "which is not counted as the pool's memory"
