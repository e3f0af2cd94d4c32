"""The workloads: each a function of an ndarray, the same one on every peer.

A work function gets the array and a `Share`, makes its random numbers, and returns the part that
is timed; that one reports its progress to the share and checks what it read. Arrays are rows of
512 words; a row's first word is its number, the others are random. The column-major pass has a
square array of floats instead, and so has each of `applications` what it needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import applications
from .plan import ROW_BYTES, Plan
from .share import Array, Share, Timed, Work, check

if TYPE_CHECKING:
    from .peers.base import Kind

__all__ = ["WORKLOADS", "Workload"]

ROW_WORDS = ROW_BYTES // 8
CHUNK_ROWS = 1024
BATCH_ROWS = 64
ZIPF_EXPONENT = 0.99
WARM_COLUMNS = 2
CHECKED_ROWS = 64
RANDOM_BITS = 63
FEW_BITS = 4
"""Random bits of a word that compresses."""


def _block(plan: Plan) -> npt.NDArray[np.uint64]:
    """4 MiB of random words, whose first column is overwritten by row numbers."""
    bits = WORKLOADS[plan.workload].word_bits if plan.workload in WORKLOADS else RANDOM_BITS
    return np.random.default_rng(plan.seed).integers(
        0, 1 << bits, (CHUNK_ROWS, ROW_WORDS), dtype=np.uint64
    )


def _chunks(a: Array) -> list[tuple[int, int]]:
    return [(i, min(i + CHUNK_ROWS, len(a))) for i in range(0, len(a), CHUNK_ROWS)]


def _check_rows(a: Array, share: Share, added: int) -> None:
    """Compare some rows with what was written to them, plus what was added to every word."""
    block = _block(share.plan)
    for i in np.random.default_rng(share.plan.seed + 1).integers(0, len(a), CHECKED_ROWS):
        expected = block[i % CHUNK_ROWS].copy()
        expected[0] = i
        check(np.array_equal(a[i], expected + np.uint64(added)), f"row {i} is not what it was")


def fill(a: Array, share: Share) -> Timed:
    """Write every row once, in order."""
    block = _block(share.plan)

    def timed() -> None:
        for start, stop in _chunks(a):
            block[: stop - start, 0] = np.arange(start, stop, dtype=np.uint64)
            a[start:stop] = block[: stop - start]
            share.add((stop - start) * ROW_BYTES)

    return timed


def read(a: Array, share: Share) -> Timed:
    """Sum every row, in order."""
    block = _block(share.plan)
    sums = np.cumsum(block[:, 1:].sum(axis=1, dtype=np.uint64), dtype=np.uint64)

    def timed() -> None:
        for start, stop in _chunks(a):
            found = int(a[start:stop].sum(dtype=np.uint64))
            numbers = (start + stop - 1) * (stop - start) // 2
            expected = (int(sums[stop - start - 1]) + numbers) % (1 << 64)
            check(found == expected, f"rows {start} to {stop} sum up to {found}, not {expected}")
            share.add((stop - start) * ROW_BYTES)

    return timed


def modify(a: Array, share: Share) -> Timed:
    """Add one to every word, in order."""

    def timed() -> None:
        for start, stop in _chunks(a):
            a[start:stop] += np.uint64(1)
            share.add((stop - start) * ROW_BYTES)

    return timed


def _uniform(a: Array, share: Share, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, len(a), share.operations)


def _zipf(a: Array, share: Share, seed: int) -> npt.NDArray[np.int64]:
    """Draw rows whose ranks follow Zipf's law; every process agrees which rows are popular."""
    weights = np.cumsum(np.arange(1, len(a) + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
    popular = np.random.default_rng(share.plan.seed).permutation(len(a))
    draws = np.random.default_rng(seed).random(share.operations) * weights[-1]
    rows: npt.NDArray[np.int64] = popular[np.searchsorted(weights, draws)]
    return rows


def accesses(
    draw: Callable[[Array, Share, int], npt.NDArray[np.int64]], written: float, salt: int
) -> Work:
    """Make a work function of random accesses to whole rows.

    Parameters
    ----------
    draw : callable
        Returns the rows to access, for an array, a share and a seed.
    written : float
        The part of the accesses that are writes.
    salt : int
        What tells the seeds of warm-up and timed part apart.
    """

    def work(a: Array, share: Share) -> Timed:
        seed = share.plan.seed + 1000 * salt + share.rank
        rows = draw(a, share, seed)
        # Numbers of their own: of those that drew the rows, the small ones are the popular rows.
        is_write = np.random.default_rng((seed, 1)).random(len(rows)) < written
        source = _block(share.plan)[:BATCH_ROWS]
        target = np.empty_like(source)

        def timed() -> None:
            deadline = time.monotonic() + share.plan.most_seconds
            for i in range(0, len(rows), BATCH_ROWS):
                batch, writes = rows[i : i + BATCH_ROWS], is_write[i : i + BATCH_ROWS]
                reads, stores = batch[~writes], batch[writes]
                if len(reads):
                    found = target[: len(reads)]
                    np.take(a, reads, axis=0, out=found, mode="clip")
                    check(np.array_equal(found[:, 0], reads), "a row has another row's number")
                if len(stores):
                    source[: len(stores), 0] = stores
                    a[stores] = source[: len(stores)]
                share.add(len(batch))
                if time.monotonic() > deadline:
                    break

        return timed

    return work


def fill_square(a: Array, share: Share) -> Timed:
    """Write a row of random floats, plus the row's number, to every row."""
    base = np.random.default_rng(share.plan.seed).random(a.shape[1])

    def timed() -> None:
        for i in range(len(a)):
            np.add(base, i, out=a[i])

    return timed


def _columns(first: int, is_bounded: bool) -> Work:
    def work(a: Array, share: Share) -> Timed:
        n = len(a)
        base = np.random.default_rng(share.plan.seed).random((1, a.shape[1]))[0]
        last = n if is_bounded else first + WARM_COLUMNS

        def timed() -> None:
            deadline = time.monotonic() + share.plan.most_seconds
            for j in range(first, last):
                expected = n * base[j] + n * (n - 1) / 2
                found = float(a[:, j].sum())
                check(math.isclose(found, expected, rel_tol=1e-9), f"column {j} sums up wrongly")
                share.add(1)
                if is_bounded and time.monotonic() > deadline:
                    break

        return timed

    return work


def fill_and_read(a: Array, share: Share) -> Timed:
    """Write every row, then read all: what is in memory has been written out already."""
    parts = fill(a, share), read(a, share)

    def timed() -> None:
        for part in parts:
            part()

    return timed


def storm(a: Array, share: Share) -> Timed:
    """Write half of the rows, from a place of this process's own, and look at all that it sees."""
    block = _block(share.plan)
    first = share.rank * len(a) // (2 * share.count)
    last = first + len(a) // 2
    own = np.uint64((share.rank + 1) << 32)

    def timed() -> None:
        for start in range(first, last, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, last)
            block[: stop - start, 0] = np.arange(start, stop, dtype=np.uint64) + own
            a[start:stop] = block[: stop - start]
            share.add((stop - start) * ROW_BYTES)
        for i in np.random.default_rng(share.plan.seed + 1).integers(0, len(a), CHECKED_ROWS):
            expected = np.uint64(i) + (own if first <= i < last else np.uint64(0))
            check(a[i, 0] == expected, f"row {i} is {a[i, 0]}, not {expected}")

    return timed


def _rows_shape(plan: Plan) -> tuple[tuple[int, ...], type]:
    return (plan.array_bytes // ROW_BYTES, ROW_WORDS), np.uint64


def _half_shape(plan: Plan) -> tuple[tuple[int, ...], type]:
    return (plan.array_bytes // ROW_BYTES // 2, ROW_WORDS), np.uint64


def _square_shape(plan: Plan) -> tuple[tuple[int, ...], type]:
    n = math.isqrt(plan.array_bytes // 8)
    return (n, n), np.float64


@dataclass(frozen=True)
class Workload:
    """What is done to an array, by how many processes, and what is counted.

    Attributes
    ----------
    name, title : str
        For the command line; for tables.
    processes : int
        One works in the process that made the array, several in processes forked from it.
    unit : str
        What progress counts: "bytes", "operations" or "columns".
    work : callable
        The timed part.
    prepare : callable or None
        Done once before, in the process that made the array.
    warm_up : callable or None
        Done before, by every process.
    verify : callable or None
        Done after, in the process that made the array; it raises where data is wrong.
    shape : callable
        Shape and dtype of the array, for a plan.
    word_bits : int
        Random bits of each word; few of them compress.
    is_private : bool
        Whether each process has its own copy after the fork.
    """

    name: str
    title: str
    processes: int
    unit: str
    work: Work
    prepare: Work | None = fill
    warm_up: Work | None = None
    verify: Callable[[Array, Share], None] | None = None
    shape: Callable[[Plan], tuple[tuple[int, ...], type]] = _rows_shape
    word_bits: int = RANDOM_BITS
    is_private: bool = False

    @property
    def kind(self) -> Kind:
        """Who uses the array."""
        if self.is_private:
            return "private"
        return "shared" if self.processes > 1 else "alone"


def _random(
    name: str, title: str, processes: int, draw: Any, written: float, bits: int = RANDOM_BITS
) -> Workload:
    return Workload(
        name,
        title,
        processes,
        "operations",
        accesses(draw, written, salt=2),
        prepare=fill_and_read,
        warm_up=accesses(draw, written, salt=1),
        word_bits=bits,
    )


_ALL = (
    Workload("sequential-read", "sequential read", 1, "bytes", read, fill_and_read),
    Workload(
        "sequential-fill",
        "sequential fill",
        1,
        "bytes",
        fill,
        None,
        verify=lambda a, share: _check_rows(a, share, added=0),
    ),
    Workload(
        "sequential-modify",
        "sequential read-modify-write",
        1,
        "bytes",
        modify,
        verify=lambda a, share: _check_rows(a, share, added=1),
    ),
    _random("random-read-1", "random 4 KiB reads, 1 process", 1, _uniform, 0.0),
    _random("random-read-4", "random 4 KiB reads, 4 processes", 4, _uniform, 0.0),
    _random("random-mixed-4", "random reads and writes, 4 processes", 4, _uniform, 0.5),
    _random("zipf-4", "Zipf 0.99, 90 % reads, 4 processes", 4, _zipf, 0.1),
    Workload("scan-4", "4 forked workers each scan", 4, "bytes", read, fill_and_read),
    Workload(
        "copy-storm",
        "4 children each write half of a private array of 2x",
        4,
        "bytes",
        storm,
        verify=lambda a, share: _check_rows(a, share, added=0),
        shape=_half_shape,
        is_private=True,
    ),
    Workload(
        "column-major",
        "column-major pass",
        1,
        "columns",
        _columns(WARM_COLUMNS, is_bounded=True),
        fill_square,
        warm_up=_columns(0, is_bounded=False),
        shape=_square_shape,
    ),
    Workload(
        "matmul",
        "blocked matmul",
        1,
        "operations",
        applications.multiply,
        applications.fill_matrices,
        verify=applications.check_product,
        shape=applications.matrices_shape,
    ),
    Workload(
        "sort",
        "external sort",
        1,
        "bytes",
        applications.sort,
        applications.fill_keys,
        verify=applications.check_order,
        shape=applications.words_shape,
    ),
    Workload(
        "pagerank",
        "PageRank, R-MAT graph",
        1,
        "operations",
        applications.rank_pages,
        applications.load_graph,
        verify=applications.check_ranks,
        shape=applications.words_shape,
    ),
    Workload(
        "sequential-modify-compressible",
        "sequential read-modify-write, compressible",
        1,
        "bytes",
        modify,
        verify=lambda a, share: _check_rows(a, share, added=1),
        word_bits=FEW_BITS,
    ),
    _random(
        "random-read-1-compressible",
        "random 4 KiB reads, 1 process, compressible",
        1,
        _uniform,
        0.0,
        FEW_BITS,
    ),
)

WORKLOADS = {workload.name: workload for workload in _ALL}
"""The workloads on an array larger than memory, by name."""
