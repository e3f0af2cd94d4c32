"""Do the constructors do what NumPy's do, and do the pool's numbers tell the truth?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import pyswap

SOURCES = {
    "c": np.arange(24.0).reshape(2, 3, 4),
    "f": np.asfortranarray(np.arange(24).reshape(2, 3, 4)),
    "strided": np.arange(96, dtype=np.int16).reshape(4, 6, 4)[::2, ::3],
    "transposed": np.arange(24, dtype=complex).reshape(2, 3, 4).transpose(1, 2, 0),
    "negative": np.arange(10)[::-1],
    "zero-d": np.array(7.5),
    "empty": np.empty((3, 0, 2)),
    "text": np.array([["a", "bcd"], ["", "e"]]),
    "dates": np.array(["2026-11-22", "NaT"], "datetime64[D]"),
    "records": np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i2"), ("b", "f8")]),
    "big-endian": np.arange(5, dtype=">i4"),
    "bool": np.array([True, False]),
}


def assert_like(made: Any, want: Any) -> None:
    assert type(made) is pyswap.PagedArray
    assert made.dtype == want.dtype
    assert made.shape == want.shape
    np.testing.assert_array_equal(np.asarray(made), want)
    if want.size:
        assert steps(made) == steps(want)


def steps(a: Any) -> list[int]:
    """The strides that matter: a dimension of one may have any."""
    return [stride for stride, n in zip(a.strides, a.shape, strict=True) if n > 1]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("order", ["K", "A", "C", "F"])
def test_does_array_copy_as_numpys_does(pool: Any, source: str, order: str) -> None:
    a = SOURCES[source]
    assert_like(pool.array(a, order=order), np.array(a, order=order))  # type: ignore[call-overload]
    assert_like(pool.array(a, ndmin=5), np.array(a, ndmin=5))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("order", ["K", "A", "C", "F"])
def test_are_the_likes_like_numpys(pool: Any, source: str, order: Any) -> None:
    a = SOURCES[source]
    made = pool.empty_like(a, order=order)
    want = np.empty_like(a, order=order)
    assert made.shape == want.shape
    assert made.dtype == want.dtype
    assert not want.size or steps(made) == steps(want)
    assert_like(pool.zeros_like(a, order=order), np.zeros_like(a, order=order))
    assert_like(
        pool.zeros_like(a, np.int32, order, shape=(4, 5)),
        np.zeros_like(a, np.int32, order, shape=(4, 5)),
    )
    if a.dtype.kind in "if":
        assert_like(pool.ones_like(a, order=order), np.ones_like(a, order=order))
        assert_like(pool.full_like(a, 3, order=order), np.full_like(a, 3, order=order))


@pytest.mark.parametrize("shape", [5, (), (3,), (2, 0), (2, 3, 4), [4, 2], np.int64(6)])
@pytest.mark.parametrize("dtype", [float, "i1", np.complex64, "U3", "V7", "M8[s]"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_do_the_constructors_make_what_numpys_make(
    pool: Any, shape: Any, dtype: Any, order: Any
) -> None:
    assert_like(pool.zeros(shape, dtype, order), np.zeros(shape, dtype, order))
    made, want = pool.empty(shape, dtype, order), np.empty(shape, dtype, order)
    assert not want.size or steps(made) == steps(want)
    if np.dtype(dtype).kind in "ifc":
        assert_like(pool.ones(shape, dtype, order), np.ones(shape, dtype, order))
        assert_like(pool.full(shape, 2, dtype, order), np.full(shape, 2, dtype, order))


def test_does_full_take_its_dtype_from_the_value(pool: Any) -> None:
    assert_like(pool.full(3, 2), np.full(3, 2))
    assert_like(pool.full((2, 2), [1.5, 2.5]), np.full((2, 2), [1.5, 2.5]))
    assert_like(pool.ones(3), np.ones(3))


def test_does_asarray_copy_only_where_it_must(pool: Any) -> None:
    a = pool.zeros((3, 4))
    assert pool.asarray(a) is a
    assert pool.asarray(a[1:]).base is not None
    assert np.shares_memory(pool.asarray(a[1:]), a)
    assert not np.shares_memory(pool.asarray(a, np.float32), a)
    assert not np.shares_memory(pool.asarray(a, order="F"), a)
    assert_like(pool.asarray([1, 2, 3]), np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="copy=False"):
        pool.array(np.zeros(3), copy=False)
    with pyswap.Pool("2 MiB", 0, page_size=4096) as other:
        assert not np.shares_memory(other.asarray(a), a)


def test_is_a_new_array_zero_though_its_memory_was_anothers(pool: Any) -> None:
    for _ in range(5):
        a = pool.empty(pool.memory * 2, np.uint8)
        assert not a.any()
        a[:] = 255
        del a


def test_do_the_facts_hold(pool: Any) -> None:
    assert (pool.page_size, pool.memory) == (4096, 8 << 20)
    s = pool.stats()
    assert (s.memory_bytes, s.page_size, s.swap_bytes, s.workers) == (8 << 20, 4096, 64 << 20, 1)
    assert s.metadata_bytes > 0
    assert pool.name in repr(pool)
    with pytest.raises(AttributeError):
        s.evictions = 5
    with pyswap.Pool("2 MiB", 0, name="mine", page_size=4096) as named:
        assert named.name == "mine"


def test_do_the_numbers_follow_a_known_workload(pool: Any) -> None:
    n = 100
    a = pool.zeros((n, pool.page_size), np.uint8)
    assert pool.stats().committed_bytes == n * pool.page_size
    assert pool.stats().resident_pages == 0
    pool.advise(a, "random")
    a[:, 0] = 1
    s = pool.stats()
    assert (s.resident_pages, s.dirty_pages, s.zero_fills, s.major_faults) == (n, n, n, 0)
    pool.advise(a, "pageout")
    s = pool.stats()
    assert (s.resident_pages, s.slot_writes, s.evictions, s.zero_drops) == (0, n, n, 0)
    assert s.swap_used_bytes == n * pool.page_size
    assert a[:, 0].sum() == n
    s = pool.stats()
    assert (s.major_faults, s.slot_reads, s.dirty_pages) == (n, n, 0)
    a[:, 0] = 0
    assert pool.stats().write_faults == n
    pool.advise(a, "pageout")
    s = pool.stats()
    assert (s.zero_drops, s.swap_used_bytes, s.slot_writes) == (n, 0, n)
    del a
    s = pool.stats()
    assert (s.committed_bytes, s.resident_pages, s.evictions) == (0, 0, 2 * n)


@pytest.mark.parametrize("memory", ["1 MiB", "1 GiB"])
def test_does_a_pool_start_whatever_its_sizes(memory: str) -> None:
    start = time.perf_counter()
    with pyswap.Pool(memory, "8 GiB", overcommit=True) as pool:
        took = time.perf_counter() - start
        sparse = pool.zeros(1 << 40, np.uint8)
        sparse[1 << 39] = 7
        assert sparse[1 << 39] == 7
    print(f"Pool({memory!r}, '8 GiB') took {took:.3f} s")
