"""Three programs on more data than memory: a blocked matrix product, an external sort, PageRank.

Their scratch memory is as large as it is however small the array is, so that it counts as the
script's own on every side.
"""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .graph import CHUNK_EDGES, Graph, make_graph
from .plan import Plan
from .share import Array, Share, Timed, check

__all__ = [
    "check_order",
    "check_product",
    "check_ranks",
    "fill_keys",
    "fill_matrices",
    "load_graph",
    "matrices_shape",
    "multiply",
    "rank_pages",
    "sort",
    "words_shape",
    "write_graph",
]

PIECE_WORDS = (4 << 20) // 8
BLOCKS_IN_BUDGET = 48
"""Of the matrix product's blocks: an 8 x 8 grid of them where three matrices are four budgets."""
RUNS_IN_BUDGET = 4
"""What is sorted in memory at once is a quarter of the budget."""
CHECKED_ROWS = 4
ROUNDS = 3
PIECE_VERTICES = 1 << 16
DAMPING = 0.85


def words_shape(plan: Plan) -> tuple[tuple[int, ...], type]:
    """Return the shape and dtype of an array of words."""
    return (plan.array_bytes // 8,), np.uint64


# The matrix product.


def matrices_shape(plan: Plan) -> tuple[tuple[int, ...], type]:
    """Return the shape and dtype of two square factors and their product, one below the other."""
    n = math.isqrt(plan.array_bytes // 8 // 3)
    return (3 * n, n), np.float64


def _matrices(a: Array) -> tuple[Array, Array, Array]:
    n = a.shape[1]
    return a[:n], a[n : 2 * n], a[2 * n :]


def fill_matrices(a: Array, share: Share) -> Timed:
    """Write random floats to the factors; the product is left alone."""

    def timed() -> None:
        random = np.random.default_rng(share.plan.seed)
        for i in range(2 * a.shape[1]):
            a[i] = random.random(a.shape[1])

    return timed


def multiply(a: Array, share: Share) -> Timed:
    """Compute the product block by block, as it is done where three blocks fit in memory."""
    left, right, product = _matrices(a)
    n = a.shape[1]
    side = math.isqrt(share.plan.budget_bytes // 8 // BLOCKS_IN_BUDGET)
    scratch = np.full((side, side), 0.0)
    pieces = [slice(i, min(i + side, n)) for i in range(0, n, side)]

    def timed() -> None:
        for i in pieces:
            for j in pieces:
                target = product[i, j]
                part = scratch[: i.stop - i.start, : j.stop - j.start]
                target[:] = 0.0
                for k in pieces:
                    np.matmul(left[i, k], right[k, j], out=part)
                    target += part
                    share.add(2 * part.size * (k.stop - k.start))

    return timed


def check_product(a: Array, share: Share) -> None:
    """Compute some rows of the product otherwise, and compare."""
    left, right, product = _matrices(a)
    n = a.shape[1]
    rows = np.random.default_rng(share.plan.seed + 1).integers(0, n, CHECKED_ROWS)
    factors, expected = np.array(left[rows]), np.zeros((CHECKED_ROWS, n))
    step = max(1, PIECE_WORDS // n)
    for k in range(0, n, step):
        expected += factors[:, k : k + step] @ right[k : k + step]
    check(np.allclose(product[rows], expected, rtol=1e-9), "the product is wrong")


# The external sort: the first half of the array is sorted into the second.


def _key_pieces(a: Array, seed: int) -> list[tuple[slice, np.random.Generator]]:
    half = len(a) // 2
    starts = range(0, half, PIECE_WORDS)
    return [
        (slice(i, min(i + PIECE_WORDS, half)), np.random.default_rng((seed, i))) for i in starts
    ]


def _keys(random: np.random.Generator, place: slice) -> npt.NDArray[np.uint64]:
    return random.integers(0, 1 << 63, place.stop - place.start, dtype=np.uint64)


def fill_keys(a: Array, share: Share) -> Timed:
    """Write random keys to the first half."""

    def timed() -> None:
        for place, random in _key_pieces(a, share.plan.seed):
            a[place] = _keys(random, place)

    return timed


def sort(a: Array, share: Share) -> Timed:
    """Sort runs in place, then merge them all at once into the second half.

    The keys of a piece of the result are found in every run by splitters, which are drawn from
    all runs, and merged in a buffer.
    """
    half = len(a) // 2
    keys, result = a[:half], a[half : 2 * half]
    run = share.plan.budget_bytes // 8 // RUNS_IN_BUDGET
    runs = [keys[i : i + run] for i in range(0, half, run)]
    buffer = np.full(2 * PIECE_WORDS, 0, np.uint64)

    def timed() -> None:
        for one in runs:
            one.sort()
            share.add(one.nbytes)
        # A piece of the result that a splitter begins is as large as planned, within some percent.
        count = -(-half // PIECE_WORDS)
        samples = np.sort(np.concatenate([one[:: max(1, len(one) // 4096)] for one in runs]))
        splitters = samples[np.arange(1, count) * len(samples) // count]
        bounds = [[0, *np.searchsorted(one, splitters).tolist(), len(one)] for one in runs]
        done = 0
        for piece in range(count):
            parts = [one[b[piece] : b[piece + 1]] for one, b in zip(runs, bounds, strict=True)]
            size = sum(map(len, parts))
            merged = buffer[:size]
            np.concatenate(parts, out=merged)
            merged.sort(kind="stable")
            result[done : done + size] = merged
            done += size
            share.add(merged.nbytes)

    return timed


def check_order(a: Array, share: Share) -> None:
    """Check that the second half is in order, and sums up to what the keys do."""
    half = len(a) // 2
    result = a[half : 2 * half]
    expected = found = last = 0
    for place, random in _key_pieces(a, share.plan.seed):
        expected += int(_keys(random, place).sum(dtype=np.uint64))
        piece = np.array(result[place])
        found += int(piece.sum(dtype=np.uint64))
        check(piece[0] >= last and bool(np.all(piece[1:] >= piece[:-1])), "keys are out of order")
        last = piece[-1]
    check((found - expected) % (1 << 64) == 0, "the sorted keys are not those that there were")


# PageRank.


def load_graph(a: Array, share: Share) -> Timed:
    """Have the plan's graph in the array, read past the page cache; a small one is made here."""
    path = share.plan.graph
    memory = mmap.mmap(-1, PIECE_WORDS * 8)

    def timed() -> None:
        if not path:
            plain = np.zeros_like(a, subok=False)
            make_graph(plain, share.plan.seed)
            a[:] = plain
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            for i in range(0, len(a), PIECE_WORDS):
                size = min(PIECE_WORDS, len(a) - i)
                os.preadv(fd, [memory], i * 8)
                a[i : i + size] = np.frombuffer(memory, np.uint64, size)
        finally:
            os.close(fd)

    return timed


def rank_pages(a: Array, share: Share) -> Timed:
    """Have every vertex collect from those that point to it, for some rounds."""
    graph = Graph(a)
    drawn, places = np.full(4 * CHUNK_EDGES, 0.0), np.full(4 * CHUNK_EDGES, 0)

    def collect(first: int, last: int, base: float) -> None:
        starts = np.array(graph.starts[first : last + 1])
        begin, end = int(starts[0]), int(starts[-1])
        found = drawn[: end - begin]
        places[: end - begin] = graph.sources[begin:end]
        np.take(graph.parts, places[: end - begin], out=found, mode="clip")
        has_any = starts[1:] > starts[:-1]
        ranks = np.full(last - first, base)
        if end > begin:
            ranks[has_any] += DAMPING * np.add.reduceat(found, starts[:-1][has_any] - begin)
        graph.ranks[first:last] = ranks
        share.add(end - begin)

    def timed() -> None:
        chunks = graph.chunks()
        graph.ranks[:] = 1.0 / graph.count
        for _ in range(ROUNDS):
            np.multiply(graph.ranks, graph.inverse, out=graph.parts)
            lost = 0.0
            for first in range(0, graph.count, PIECE_VERTICES):
                place = slice(first, first + PIECE_VERTICES)
                lost += float(graph.ranks[place][graph.inverse[place] == 0].sum())
            for first, last in chunks:
                collect(first, last, (1.0 - DAMPING + DAMPING * lost) / graph.count)

    return timed


def write_graph(plan: Plan, path: Path) -> None:
    """Make the graph for a plan's array, and what its ranks come to, in a file."""
    shape, dtype = words_shape(plan)
    a = np.zeros(shape, dtype)
    make_graph(a, plan.seed)
    rank_pages(a, Share(plan, 0, 1))()
    with path.open("wb") as file:
        a.tofile(file)
        _ranks_of(a).tofile(file)


def _ranks_of(a: Array) -> npt.NDArray[np.float64]:
    """Return what is compared of the ranks: sums over 64 parts of the vertices."""
    graph = Graph(a)
    return np.add.reduceat(np.array(graph.ranks), np.arange(64) * graph.count // 64)


def check_ranks(a: Array, share: Share) -> None:
    """Compare the ranks with those that were computed when the graph was made."""
    found = _ranks_of(a)
    check(math.isclose(found.sum(), 1.0, rel_tol=1e-9), f"the ranks sum up to {found.sum()}")
    if share.plan.graph:
        expected = np.fromfile(share.plan.graph, np.float64, 64, offset=a.nbytes)
        check(np.allclose(found, expected, rtol=1e-9), "the ranks are not what they were")
