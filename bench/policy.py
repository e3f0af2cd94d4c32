"""Hit rates of the pool's own reclaim on known traces, beside LRU and FIFO.

Run by `python -m bench.policy`.  A trace is replayed by touching the pages of an array in a pool,
with readahead and fault-around off, so that a miss is a major fault and a hit is not; the same
trace runs through exact LRU and FIFO with as many frames.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import pyswap

FRAMES = 8192
PAGE_BYTES = 4096
_ZIPF = 0.99
_PIECE = 4096
"""Touches in one call of NumPy's."""

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Trace:
    """Pages touched one after another.

    Attributes
    ----------
    pages
        Page indices, shape (touches,).
    warm_up
        Touches at the beginning that are not counted.
    scanned
        Of the counted touches, those of pages that are touched this once: misses in any policy,
        and left out of the rate.
    hot_pages
        The first pages of the array, so many, are a set that ought to survive; 0: none.
    """

    name: str
    pages: Ints
    warm_up: int
    scanned: int = 0
    hot_pages: int = 0


def traces(frames: int, seed: int) -> Iterator[Trace]:
    """Make the traces for a pool of so many frames."""
    rng = np.random.default_rng(seed)
    hot = frames // 2
    mixed = np.empty(20 * frames, np.int64)
    mixed[0::2] = rng.integers(0, hot, 10 * frames)
    mixed[1::2] = hot + np.arange(10 * frames)
    warm = rng.integers(0, hot, 4 * frames)
    yield Trace(
        "hot half, and a scan of 10x",
        np.concatenate([warm, mixed]),
        len(warm),
        10 * frames,
        hot,
    )
    weights = 1 / np.arange(1, 4 * frames + 1) ** _ZIPF
    ranks = rng.choice(4 * frames, 40 * frames, p=weights / weights.sum())
    yield Trace("Zipf 0.99 over 4x", rng.permutation(4 * frames)[ranks], 8 * frames)
    loop = np.arange(frames * 6 // 5)
    yield Trace("a loop over 1.2x", np.tile(loop, 12), 4 * len(loop))
    yield Trace("a scan alone of 10x", np.arange(10 * frames), 0)
    yield Trace("uniform over 4x", rng.integers(0, 4 * frames, 40 * frames), 8 * frames)
    half = frames * 7 // 16
    starts = range(len(loop), len(loop) + 20 * frames, half)
    windows = [first + np.arange(2 * half) for first in starts]
    # Until the loop's pages have made room.
    settled = 16
    yield Trace(
        "after it, 0.9x that moves on",
        np.concatenate([np.tile(loop, 4), *windows]),
        4 * len(loop) + settled * 2 * half,
        half * (len(windows) - settled),
    )
    phases = [start + rng.integers(0, frames * 3 // 4, 20 * frames) for start in (0, frames)]
    yield Trace("two phases of 0.75x", np.concatenate(phases), 0)


def rate(trace: Trace, misses: int) -> float:
    """Hits among the counted touches."""
    counted = len(trace.pages) - trace.warm_up - trace.scanned
    return 1 - (misses - trace.scanned) / counted


def lru(trace: Trace, frames: int) -> float:
    """Replay under exact least-recently-used."""
    kept: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for at, page in enumerate(trace.pages.tolist()):
        if page in kept:
            kept.move_to_end(page)
            continue
        misses += at >= trace.warm_up
        if len(kept) == frames:
            kept.popitem(last=False)
        kept[page] = None
    return rate(trace, misses)


def fifo(trace: Trace, frames: int) -> float:
    """Replay under exact first-in-first-out."""
    kept: set[int] = set()
    order: deque[int] = deque()
    misses = 0
    for at, page in enumerate(trace.pages.tolist()):
        if page in kept:
            continue
        misses += at >= trace.warm_up
        if len(kept) == frames:
            kept.remove(order.popleft())
        kept.add(page)
        order.append(page)
    return rate(trace, misses)


def _touch(a: Any, pages: Ints) -> None:
    for at in range(0, len(pages), _PIECE):
        a[pages[at : at + _PIECE], 0].sum()


@dataclass(frozen=True)
class Replayed:
    """What a pool did with a trace: hit rate, share of the hot set resident at the end, faults."""

    rate: float
    survived: float
    faults: int


def replay(trace: Trace, frames: int, *, advice: str = "random") -> Replayed:
    """Replay in a pool of so many frames, whose pages are all in swap at first."""
    pages = int(trace.pages.max()) + 1
    memory = frames * PAGE_BYTES
    with pyswap.Pool(memory, pages * PAGE_BYTES + memory, page_size=PAGE_BYTES) as pool:
        a = pool.empty((pages, PAGE_BYTES // 8), np.int64)
        for at in range(0, pages, _PIECE):
            a[at : at + _PIECE] = np.arange(1, len(a[at : at + _PIECE]) + 1)[:, None]
        pool.advise(a, "pageout")
        pool.advise(a, advice)
        _touch(a, trace.pages[: trace.warm_up])
        before = pool.stats().major_faults
        _touch(a, trace.pages[trace.warm_up :])
        misses = pool.stats().major_faults - before
        hot = a[: trace.hot_pages]
        survived = pool.residency(hot).mean() if trace.hot_pages else 0.0
        return Replayed(rate(trace, misses), float(survived), misses)


def main() -> None:
    """Print the table."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    print(f"seed {seed}, {FRAMES} frames of {PAGE_BYTES} bytes; hits in percent")
    print(f"{'trace':30} {'pyswap':>7} {'LRU':>7} {'FIFO':>7}  hot set resident at the end")
    for trace in traces(FRAMES, seed):
        ours = replay(trace, FRAMES)
        print(
            f"{trace.name:30} {100 * ours.rate:7.1f} {100 * lru(trace, FRAMES):7.1f}"
            f" {100 * fifo(trace, FRAMES):7.1f}"
            + (f"  {100 * ours.survived:.1f}" if trace.hot_pages else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()
