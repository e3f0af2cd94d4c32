"""Counting in pages that many processes share, each under a lock in the page itself; in C.

A page of the shared array has a lock, the number of the process that holds it, and a counter that
is written eight times over, from the page's beginning to its end: the stamps.  A ledger in plain
shared memory has the same counts once more; only who holds a page's lock looks at both.  A page of
the private array has stamps only, and each process a ledger in memory of its own, which the kernel
copies at a fork as pyswap is to copy the array.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

COUNT_IN_PAGES = r"""
#include <sched.h>
#include <stdint.h>

enum { WORDS = 512, LOCK = 0, STAMPS = 8, SECTOR = WORDS / STAMPS };
enum { FINE, HOLDER, SHARED_STAMPS, GLANCED_STAMPS, PRIVATE_STAMPS };

struct counting {
    uint64_t *shared, *private_;    /* in the pool */
    uint64_t *ledger;               /* in plain memory, for the shared array's pages */
    uint64_t *own;                  /* in plain memory of this process, for the private array's */
    uint64_t *ended;                /* which processes are known to have ended, by number */
    uint64_t *steps, *broken;       /* what each has done; the locks it broke */
    uint64_t shared_pages, private_pages, numbers;
    uint64_t me, random;
    uint64_t found[4 + STAMPS];     /* wrong: page, lock, ledger before and after, stamps */
};

static uint64_t get(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static void set(uint64_t *word, uint64_t n) { __atomic_store_n(word, n, __ATOMIC_RELEASE); }
static int swap(uint64_t *word, uint64_t *was, uint64_t n) {
    return __atomic_compare_exchange_n(word, was, n, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static uint64_t *stamp(uint64_t *page, int i) { return &page[(i + 1) * SECTOR - 1]; }

static uint64_t draw(struct counting *c, uint64_t below) {
    uint64_t x = c->random;
    x ^= x << 13; x ^= x >> 7; x ^= x << 17;
    c->random = x;
    return (x >> 11) % below;
}

static int wrong(struct counting *c, int what, uint64_t p, uint64_t *page, uint64_t before,
                 uint64_t after) {
    c->found[0] = p; c->found[1] = page[LOCK]; c->found[2] = before; c->found[3] = after;
    for (int i = 0; i < STAMPS; i++) c->found[4 + i] = get(stamp(page, i));
    return what;
}

static void write_stamps(uint64_t *page, int from, int to, uint64_t n) {
    for (int i = from; i < to; i++) set(stamp(page, i), n);
}

/* How many stamps say n + 1; the rest say n, or it is -1. */
static int stamps_ahead(uint64_t *page, uint64_t n) {
    int ahead = 0;
    while (ahead < STAMPS && get(stamp(page, ahead)) == n + 1) ahead++;
    for (int i = ahead; i < STAMPS; i++) if (get(stamp(page, i)) != n) return -1;
    return ahead;
}

static int count_own(struct counting *c, uint64_t p, int add) {
    uint64_t *page = c->private_ + p * WORDS, n = c->own[p];
    if (stamps_ahead(page, n) != 0) return wrong(c, PRIVATE_STAMPS, p, page, n, n);
    if (!add) return FINE;
    write_stamps(page, 0, STAMPS, n + 1);
    c->own[p] = n + 1;
    return FINE;
}

/* Take a page's lock, from a process that has ended too: then its count may be half done. */
static int take(struct counting *c, uint64_t *page, int *from_dead) {
    for (;;) {
        uint64_t holder = 0;
        *from_dead = 0;
        if (swap(&page[LOCK], &holder, c->me)) return FINE;
        if (holder == c->me || holder >= c->numbers) return HOLDER;
        *from_dead = get(&c->ended[holder]) != 0;
        if (*from_dead && swap(&page[LOCK], &holder, c->me)) return FINE;
        sched_yield();
    }
}

/* Count in a page that is locked, and in another that is one's own in the middle of it. */
static int count_shared(struct counting *c, uint64_t p) {
    uint64_t *page = c->shared + p * WORDS;
    int from_dead, rc = take(c, page, &from_dead);
    if (rc != FINE) return wrong(c, rc, p, page, get(&c->ledger[p]), 0);
    uint64_t n = get(&c->ledger[p]);
    int ahead = stamps_ahead(page, n);
    if (ahead < 0 || (ahead && !from_dead)) return wrong(c, SHARED_STAMPS, p, page, n, n);
    if (ahead) {
        write_stamps(page, ahead, STAMPS, n + 1);
        set(&c->ledger[p], ++n);
    }
    c->broken[c->me] += from_dead;
    int half = (int)draw(c, STAMPS + 1);
    write_stamps(page, 0, half, n + 1);
    rc = count_own(c, draw(c, c->private_pages), 1);
    if (rc != FINE) return rc;
    write_stamps(page, half, STAMPS, n + 1);
    set(&c->ledger[p], n + 1);
    set(&page[LOCK], 0);
    return FINE;
}

/* Read without the lock, against the order of writing: what was written earlier is never behind. */
static int glance(struct counting *c, uint64_t p) {
    uint64_t *page = c->shared + p * WORDS, before = get(&c->ledger[p]), last = before;
    for (int i = STAMPS - 1; i >= 0; i--) {
        uint64_t n = get(stamp(page, i));
        if (n < last) return wrong(c, GLANCED_STAMPS, p, page, before, last);
        last = n;
    }
    uint64_t after = get(&c->ledger[p]);
    return last > after + 1 ? wrong(c, GLANCED_STAMPS, p, page, before, after) : FINE;
}

int count_at_random(struct counting *c, uint64_t steps) {
    int rc = FINE;
    while (steps-- && rc == FINE) {
        uint64_t kind = draw(c, 8);
        if (kind < 4) rc = count_shared(c, draw(c, c->shared_pages));
        else if (kind < 6) rc = glance(c, draw(c, c->shared_pages));
        else rc = count_own(c, draw(c, c->private_pages), kind == 6);
        set(&c->steps[c->me], c->steps[c->me] + 1);
    }
    return rc;
}

int count_everywhere(struct counting *c) {
    int rc = FINE;
    for (uint64_t p = 0; p < c->shared_pages && rc == FINE; p++) rc = count_shared(c, p);
    return rc;
}

int check_own(struct counting *c) {
    int rc = FINE;
    for (uint64_t p = 0; p < c->private_pages && rc == FINE; p++) rc = count_own(c, p, 0);
    return rc;
}
"""

WHAT = ("", "lock's holder", "shared stamps", "shared stamps at a glance", "private stamps")
STAMP_WORDS = slice(63, None, 64)
"""Where a page's stamps are."""
MAX_NUMBERS = 1024


class _Counting(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("shared", "private_", "ledger", "own")),
        *((name, ctypes.c_void_p) for name in ("ended", "steps", "broken")),
        *((name, ctypes.c_uint64) for name in ("shared_pages", "private_pages", "numbers")),
        *((name, ctypes.c_uint64) for name in ("me", "random")),
        ("found", ctypes.c_uint64 * 12),
    ]


@pytest.fixture(scope="session")
def page_locks(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """What counts, compiled."""
    folder = tmp_path_factory.mktemp("page_locks")
    source, library = folder / "page_locks.c", folder / "page_locks.so"
    source.write_text(COUNT_IN_PAGES)
    compiler = shutil.which(os.environ.get("CC", "cc")) or "gcc"
    flags = ["-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


class Counters:
    """Two arrays of pages in which the processes that inherit them count, each by its number.

    Parameters
    ----------
    library
        Of the fixture `page_locks`.
    shared, private
        Arrays of a page a row, of zeros.
    """

    def __init__(self, library: ctypes.CDLL, shared: Any, private: Any) -> None:
        self.shared, self.private = shared, private
        self.ledger = _plain_shared(len(shared))
        self.ended = _plain_shared(MAX_NUMBERS)
        self.steps = _plain_shared(MAX_NUMBERS)
        self.broken = _plain_shared(MAX_NUMBERS)
        self._own = np.zeros(len(private), np.uint64)
        self._library = library
        words = (shared, private, self.ledger, self._own, self.ended, self.steps, self.broken)
        sizes = (len(shared), len(private), MAX_NUMBERS)
        addresses = (a.__array_interface__["data"][0] for a in words)
        self._c = _Counting(*addresses, *sizes)

    def begin(self, number: int, seed: int) -> None:
        """Say who this process is."""
        self._c.me = number
        self._c.random = seed * MAX_NUMBERS + number + 1

    def count(self, steps: int) -> None:
        """Count in pages at random, and compare."""
        self._check(self._library.count_at_random(ctypes.byref(self._c), ctypes.c_uint64(steps)))

    def count_everywhere(self) -> None:
        """Count once in every shared page, and compare."""
        self._check(self._library.count_everywhere(ctypes.byref(self._c)))

    def check_own(self) -> None:
        """Compare every private page with what this process has counted."""
        self._check(self._library.check_own(ctypes.byref(self._c)))

    def _check(self, what: int) -> None:
        page, lock, before, after, *stamps = self._c.found
        where = f"page {page}, lock {lock}, ledger {before} to {after}, stamps {stamps}"
        assert what == 0, f"process {self._c.me}: {WHAT[what]} of {where}"


def _plain_shared(words: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(mmap.mmap(-1, words * 8), np.uint64)
