"""Does a pool make the arrays that NumPy makes, and does it tell the truth about them?

The oracle for arrays is NumPy: each call of the tables runs on both.  The oracle for the numbers
is a workload whose every fault, read and write is known.
"""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from workers import until

import pyswap
from pyswap import config
from pyswap.paged import PagedArray
from pyswap.stats import Stats

pytestmark = pytest.mark.core

PAGE = 4096
NUMPY_1 = np.__version__.startswith("1.")

A = np.arange(24.0).reshape(2, 3, 4)
RECORD = np.dtype([("a", "i4"), ("b", "f8", (2,)), ("c", "S3")])
VALUES = {
    "A": A,
    "T": A.transpose(1, 0, 2),
    "REC": np.zeros((3, 2), RECORD),
    "DAYS": np.arange("2020-01-01", "2020-01-25", dtype="M8[D]").reshape(4, 6),
    "TEXT": np.array([["a", "bcd"], ["", "xy"]]),
    "BIG": A.astype(">f8"),
    "RECORD": RECORD,
    "np": np,
}

# Calls that are made of NumPy and of the pool, and must give the same array.
CALLS = """
zeros(5)
zeros((2, 3))
zeros([2, 3], "i4")
zeros(())
zeros(0)
zeros((0, 5))
zeros((3, 0, 2), order="F")
zeros((2, 3), order="F")
zeros((2, 3), order="f")
zeros((2, 3), order=None)
zeros(np.int64(4))
zeros(np.array([2, 3]))
zeros(shape=(2,), dtype=None)
zeros(3, "S")
zeros(3, "U")
zeros(3, "V")
zeros(3, "S5")
zeros(3, "U5")
zeros(3, "M8[s]")
zeros(3, "m8[ns]")
zeros(3, "M8")
zeros(3, bool)
zeros(3, ">i4")
zeros(3, "c16")
zeros(3, RECORD)
zeros(3, "(2,)f8")
zeros((2, 2), "(2,)f8", order="F")
zeros((1,) * 32)
ones(3)
ones((2, 2), "i2", "F")
ones(2, "U3")
ones(2, "S")
ones(2, "M8[s]")
ones(2, RECORD[["a"]])
ones(2, "(3,)i4")
ones(())
ones((0, 2))
full((2, 2), 7)
full(3, "abc")
full((2, 3), [1, 2, 3])
full((2, 3), [[1], [2]])
full(3, 1.5, int)
full(3, "x", "S")
full(2, "abc", "U")
full(2, b"ab")
full(2, True)
full(2, 1j, "c8", order="F")
full(2, np.datetime64("2020-01-01"))
full(2, "2020", "M8[D]")
full((), 5)
full(0, 5)
array([1, 2, 3])
array([[1, 2], [3, 4]], order="F")
array(5)
array(True)
array([])
array([[]])
array(range(5))
array(b"abc")
array("abc")
array(memoryview(b"abc"))
array(np.float32(3))
array([1, 2], ndmin=3)
array([1.5], dtype=int)
array([1, 2], ndmin=-1)
array(["a", "bcd"])
array(["a", "b"], dtype="S")
array([1, 2], dtype="S")
array([1, 22], dtype="U")
array([b"ab"], dtype="V")
array([(1, [2.0, 3.0], b"x")], dtype=RECORD)
array(["2020-01-01"], dtype="M8")
array([[1, 2]], dtype="(2,)f4")
array(A)
array(A, order="F")
array(A, order=None)
array(A, order="k")
array(A, "f4")
array(A, "f4", order="K")
array(A, dtype="S")
array(A, dtype="S3")
array(A, dtype="(2,)f4")
array(A, ndmin=5)
array(A.T)
array(A.T, order="A")
array(A.T, order="C")
array(T)
array(T, order="A")
array(T, order="F")
array(T, "i8")
array(A[:, ::-1])
array(A[:, :, ::2])
array(A[:, :1, :])
array(A[0, 0, 0])
array(A[..., None])
array(A[:0])
array(REC)
array(REC["b"])
array(REC[::2].T)
array(DAYS)
array(DAYS, "M8[s]")
array(DAYS, "M8")
array(TEXT)
array(TEXT.T, "S")
array(BIG)
array(BIG, "f8")
array(np.broadcast_to(np.arange(3), (4, 3)))
array(np.ma.array([1, 2], mask=[0, 1]))
array(np.matrix([[1, 2]]))
asarray([1, 2])
asarray(A)
asarray(A, "f4")
asarray(A, order="F")
asarray(A.T, order="A")
asarray(A, order=None)
asarray(T)
zeros_like(A)
zeros_like(A, "i4")
zeros_like(A.T)
zeros_like(T)
zeros_like(A[::-1, ::-1])
zeros_like(A[:, :, ::2])
zeros_like(A.T[::2])
zeros_like(A[:, :1, :])
zeros_like(A, order="F")
zeros_like(A.T, order="C")
zeros_like(A.T, order="A")
zeros_like(T, order="A")
zeros_like(A, shape=(4,))
zeros_like(A, shape=())
zeros_like(A, shape=7)
zeros_like(A.T, shape=(4,))
zeros_like(A.T, shape=(4, 2), order="A")
zeros_like(A.T, shape=(4, 2), order="F")
zeros_like(A.T, shape=(4, 5, 6))
zeros_like(T, shape=(4, 5, 6))
zeros_like(A, dtype="S")
zeros_like(A, dtype="U4")
zeros_like(A, dtype="(2,)f8")
zeros_like([1, 2])
zeros_like(3)
zeros_like(REC)
zeros_like(DAYS)
zeros_like(TEXT)
zeros_like(BIG)
zeros_like(np.zeros((0, 3)))
zeros_like(np.broadcast_to(np.arange(3), (4, 3)))
ones_like(A)
ones_like(T, "i4")
ones_like(A, "i4", shape=(2, 2))
ones_like(A, "U3")
ones_like(A, "M8[s]")
full_like(A, 3)
full_like(T, 3, "f4")
full_like(A, [1, 2, 3, 4])
full_like(A, "x", "S")
full_like(TEXT, "wxyz")
full_like(A.astype("i4"), 2.7)
full_like(A, 3, order="F", shape=(3, 2))
"""

# Calls that NumPy refuses, and the pool by the same exception.
REFUSED = """
zeros(-1)
zeros((2, -1))
zeros((-1, 0))
zeros(3.0)
zeros("ab")
zeros((2, "3"))
zeros({1.5: 2})
zeros(3, "nonsense")
zeros(3, order="K")
zeros(3, order="A")
zeros(3, order="X")
zeros(3, order="")
zeros(3, order="CF")
zeros(3, order=3)
zeros((1,) * 65)
zeros()
zeros(3, nonsense=1)
full(3)
full((2, 3), [1, 2])
full(3, "abc", int)
array([[1], [2, 3]])
array(["x"], dtype=int)
array([1, 2], order="Z")
array()
empty_like()
empty_like(A, order="Z")
empty_like(A, shape=-3)
full_like(A, "x")
full_like(A, [1, 2])
"""


def lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line]


def call(maker: Any, text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return eval(f"maker.{text}", {**VALUES, "maker": maker})


def strides_that_matter(a: npt.NDArray[Any]) -> list[int]:
    """Those that address something; of an axis of one item, or an empty array, NumPy's differ."""
    return [s for s, n in zip(a.strides, a.shape, strict=True) if n > 1] if a.size else []


@pytest.mark.parametrize("maker", sorted({text.partition("(")[0] for text in lines(CALLS)}))
def test_is_the_array_the_one_that_numpy_makes(pool: Any, maker: str) -> None:
    for text in lines(CALLS):
        if text.partition("(")[0] != maker:
            continue
        expected, made = call(np, text), call(pool, text)
        assert type(made) is PagedArray, text
        assert made.dtype == expected.dtype, text
        assert made.shape == expected.shape, text
        assert strides_that_matter(made) == strides_that_matter(expected), text
        assert made.flags.writeable, text
        assert repr(made.tolist()) == repr(expected.tolist()), text


@pytest.mark.parametrize("maker", ["zeros", "zeros_like"])
def test_is_an_empty_array_of_the_shape_that_numpy_makes(pool: Any, maker: str) -> None:
    calls = [text for text in lines(CALLS) if text.partition("(")[0] == maker]
    for text in [text.replace("zeros", "empty", 1) for text in calls]:
        expected, made = call(np, text), call(pool, text)
        assert type(made) is PagedArray, text
        assert (made.dtype, made.shape) == (expected.dtype, expected.shape), text
        assert strides_that_matter(made) == strides_that_matter(expected), text
        assert not made.tobytes().strip(b"\0"), text


def refusal(maker: Any, text: str) -> type[Exception] | None:
    try:
        call(maker, text)
    except Exception as error:  # noqa: BLE001 (whichever NumPy raises)
        return type(error)
    return None


def test_is_refused_what_numpy_refuses(pool: Any) -> None:
    for text in lines(REFUSED):
        expected, found = refusal(np, text), refusal(pool, text)
        assert expected in (TypeError, ValueError, IndexError), text
        assert found in (TypeError, ValueError), text
        assert pool.stats().committed_bytes == 0, text


def test_do_random_views_keep_the_order_that_numpy_keeps(pool: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        shape = rng.integers(0, 5, rng.integers(0, 5))
        whole = np.asarray(rng.integers(0, 100, shape), order=rng.choice(["C", "F"]))
        view: Any = whole.transpose(rng.permutation(whole.ndim))
        view = view[tuple(slice(None, None, rng.choice([1, 2, -1, -2])) for _ in view.shape)]
        order = rng.choice(["K", "A", "C", "F"])
        for text in (f"array(V, order='{order}')", f"zeros_like(V, order='{order}')"):
            expected, made = (eval(f"m.{text}", {"m": maker, "V": view}) for maker in (np, pool))
            note = f"{text}: {view.shape} {view.strides}"
            assert made.shape == expected.shape, note
            assert strides_that_matter(made) == strides_that_matter(expected), note
            assert np.array_equal(made, expected), note


@pytest.mark.parametrize(
    "text",
    [
        'zeros(3, "O")',
        'zeros(3, [("a", object)])',
        "empty(3, object)",
        "full(3, None)",
        "ones(3, object)",
        'array([1, "a", None])',
        "array([1, 2], dtype=object)",
        "array(A, dtype=object)",
        "array(np.array([None]))",
        "asarray([object()])",
        "zeros_like(A, object)",
        "zeros_like(np.array([None]))",
        "full_like(A, 1, dtype=object)",
        'fromfile("/dev/null", object)',
    ],
)
def test_is_an_object_dtype_a_type_error(pool: Any, text: str) -> None:
    with pytest.raises(TypeError, match="Python objects"):
        call(pool, text)
    assert pool.stats().committed_bytes == 0


def test_is_an_array_of_the_pool_returned_as_it_is_where_numpy_does(pool: Any) -> None:
    a = pool.array(A)
    f = pool.array(A, order="F")
    for same in (
        pool.asarray(a),
        pool.asarray(a, float),
        pool.asarray(a, order="C"),
        pool.asarray(a, copy=False),
        pool.array(a, copy=None),
        pool.array(a, copy=False),
        pool.asarray(a, order="K"),
    ):
        assert same is a
    assert pool.asarray(f, order="F") is f
    assert pool.asarray(f, order="A") is f
    part = a[:, ::2]
    assert pool.asarray(part) is part
    assert pool.asarray(part, order="A") is part
    assert np.shares_memory(pool.array(a, copy=None, ndmin=5), a)


def test_is_an_array_of_the_pool_copied_where_numpy_does(pool: Any) -> None:
    a = pool.array(A)
    with pyswap.Pool("8 MiB", 0, page_size=PAGE) as other:
        for made in (
            pool.array(a),
            pool.array(a, copy=True),
            pool.asarray(a, "f4"),
            pool.asarray(a, order="F"),
            pool.asarray(a[:, ::2], order="C"),
            pool.asarray(a, copy=True),
            other.asarray(a),
        ):
            assert type(made) is PagedArray
            assert not np.shares_memory(made, a)
            assert np.array_equal(made, a if made.shape == a.shape else a[:, ::2])
        for impossible in ({"dtype": "f4"}, {"order": "F"}):
            with pytest.raises(ValueError, match="copy=False"):
                pool.asarray(a, copy=False, **impossible)
        with pytest.raises(ValueError, match="copy=False"):
            other.asarray(a, copy=False)
        with pytest.raises(ValueError, match="copy=False"):
            pool.array([1, 2], copy=False)
        del made


def test_are_arrays_of_no_bytes_arrays_in_every_way(pool: Any) -> None:
    for shape in (0, (0, 3), (3, 0), (2, 0, 4)):
        a = pool.zeros(shape)
        for view in (a, a[:0], a.T, a.reshape(-1), a[...]):
            assert view.sum() == 0
            assert pool.residency(view).tolist() == []
            pool.advise(view, "pageout")
            pool.advise(view, "willneed")
            with pool.pin(view):
                pass
        assert pickle.loads(pickle.dumps(a)).shape == a.shape
    page = pool.ones(PAGE // 8)
    # Its address is the one behind the array.
    for nothing in (page[PAGE // 8 :], page[PAGE // 8 :][::-1], page[5:5]):
        assert pool.residency(nothing).tolist() == []
        pool.advise(nothing, "dontneed")
        with pool.pin(nothing):
            pass


def test_is_a_new_array_zero_where_another_was_before(pool: Any) -> None:
    for size in (PAGE, 5 * PAGE, 3 * PAGE + 1):
        a = pool.full(size, 255, np.uint8)
        pool.advise(a[: size // 2], "pageout")
        del a
        again = pool.empty(size, np.uint8)
        assert not again.any()
        del again


# Names.


TOUCH_RELEASED = """
import pyswap, sys
pool = pyswap.Pool("8 MiB", 0, page_size=4096, name="lake")
a = pool.zeros(10, name=sys.argv[1])
pool.release(a)
a[0]
"""


@pytest.mark.parametrize(("name", "shown"), [("depths", "depths"), ("\u6df1" * 500, "\u6df1")])
def test_does_a_name_show_in_messages_of_its_array(name: str, shown: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", TOUCH_RELEASED, name],
        capture_output=True,
        check=False,
        timeout=120,
        cwd=Path(pyswap.__file__).parent.parent,
    )
    assert told.returncode == -signal.SIGBUS, told.stderr
    assert b"lake" in told.stderr
    assert shown.encode() in told.stderr


@pytest.mark.parametrize("name", [1, b"a", ["a"], object()])
def test_is_a_name_that_is_no_text_refused(pool: Any, name: Any) -> None:
    for make in (pool.zeros, pool.empty, pool.ones, pool.array, pool.zeros_like):
        with pytest.raises(TypeError, match="name must be a str"):
            make([2], name=name)
    with pytest.raises(TypeError, match="name must be a str"):
        pool.full(2, 1, name=name)
    assert pool.stats().committed_bytes == 0


def test_is_any_text_a_name(pool: Any) -> None:
    for name in ("", "a", "x" * 200_000, "a\nb\0c", "\u6df1" * 100, "%s%n"):
        assert pool.zeros(3, name=name).sum() == 0


# Room.


@pytest.fixture
def small() -> Iterator[Any]:
    with pyswap.Pool("1 MiB", "1 MiB", page_size=PAGE) as made:
        yield made


def test_does_an_array_that_does_not_fit_say_so(small: Any) -> None:
    with pytest.raises(pyswap.SwapFullError, match="does not fit") as told:
        small.zeros(3 << 20, np.uint8)
    assert isinstance(told.value, MemoryError)
    assert small.stats().committed_bytes == 0


def test_is_the_last_byte_of_room_given_out_and_come_back(small: Any) -> None:
    bounds = config.bounds(256, PAGE)
    room = (512 - bounds.reserve_pages) * PAGE
    a = small.zeros(room - PAGE, np.uint8)
    b = small.zeros(PAGE, np.uint8)
    with pytest.raises(pyswap.SwapFullError):
        small.zeros(1, np.uint8)
    # All of it can really be written, and read.
    a[:] = 7
    b[:] = 8
    assert (a == 7).all()
    assert (b == 8).all()
    del b
    assert (small.ones(PAGE, np.uint8) == 1).all()


def test_may_a_pool_promise_more_where_it_was_told_to() -> None:
    with pyswap.Pool("1 MiB", "1 MiB", page_size=PAGE, overcommit=True) as pool:
        a = pool.zeros(1 << 30, np.uint8)
        a[:: 1 << 24] = 1
        assert a[:: 1 << 24].sum() == 64


def test_can_an_array_be_larger_than_what_a_pool_addresses() -> None:
    with pyswap.Pool("1 MiB", 0, page_size=PAGE, overcommit=True) as pool:
        for shape in (config.STORE_BYTES, 2**62, (2**40, 2**40), (2**63, 2), 2**100):
            with pytest.raises(ValueError, match="that a pool can address"):
                pool.zeros(shape)


# Facts.


def test_are_the_facts_those_that_were_asked_for(tmp_path: Any) -> None:
    with pyswap.Pool("10 MiB", "3 MiB", page_size="16 KiB", name="facts", swap_path=tmp_path) as p:
        assert (p.name, p.memory, p.page_size) == ("facts", 10 << 20, 16 << 10)
        assert os.stat(f"/proc/{p.swapper_pid}").st_uid == os.geteuid()
        assert p.swapper_pid != os.getpid()
        assert "facts" in repr(p)
        assert "open" in repr(p)
        stats = p.stats()
        assert (stats.memory_bytes, stats.swap_bytes) == (10 << 20, 3 << 20)
        assert list(tmp_path.iterdir()) == []
    assert "closed" in repr(p)


def test_does_each_thread_of_a_swapper_tell_its_work_by_its_name(pool: Any) -> None:
    tasks = Path(f"/proc/{pool.swapper_pid}/task")
    expected = {"fault", "starved", "readahead", "reclaim", "write_ahead", "beat"}

    def names() -> set[str]:
        return {(task / "comm").read_text().strip() for task in tasks.iterdir()}

    until(lambda: names() >= expected, "all threads run under their names")


def test_is_a_budget_rounded_to_whole_pages() -> None:
    with pyswap.Pool((1 << 20) + 5000, 5000, page_size=PAGE) as pool:
        assert pool.memory == (1 << 20) + PAGE
        assert pool.stats().swap_bytes == 2 * PAGE


def test_is_fileno_the_store_whose_blocks_are_the_memory_in_use(pool: Any) -> None:
    fd = pool.fileno()
    assert os.fstat(fd).st_blocks == 0
    a = pool.ones(10 * PAGE, np.uint8)
    pool.check()
    assert os.fstat(fd).st_blocks * 512 == pool.stats().resident_pages * PAGE == 10 * PAGE
    inode = os.fstat(fd).st_ino
    with open("/proc/self/maps") as maps:
        assert any(f" {inode} " in line for line in maps)
    pool.advise(a[: 4 * PAGE], "pageout")
    pool.check()
    assert os.fstat(fd).st_blocks * 512 == 6 * PAGE
    del a
    pool.check()
    assert os.fstat(fd).st_blocks == 0


def test_how_long_does_a_pool_take_to_make(tmp_path: Any) -> None:
    """Printed, not asserted: the bound is half a second, whatever the sizes."""
    for memory, swap in (("1 MiB", 0), ("64 MiB", "1 GiB"), ("256 MiB", "2 GiB")):
        before = time.perf_counter()
        with pyswap.Pool(memory, swap, swap_path=tmp_path) as pool:
            print(f"Pool({memory!r}, {swap!r}): {time.perf_counter() - before:.3f} s")
            assert pool.stats().free_frames * pool.page_size == pool.memory


# Numbers.

# fmt: off
NUMBERS = (
    "memory_bytes", "metadata_bytes", "page_size", "resident_pages", "free_frames", "dirty_pages",
    "swap_bytes", "swap_used_bytes", "committed_bytes", "minor_faults", "major_faults",
    "write_faults", "slot_reads", "slot_writes", "clean_drops", "zero_drops", "write_ahead_pages",
    "readahead_pages", "readahead_hits", "evictions", "frame_waits", "workers",
)
# fmt: on


def test_do_the_numbers_have_every_field_and_no_setter(pool: Any) -> None:
    stats = pool.stats()
    assert isinstance(stats, Stats)
    assert set(NUMBERS) <= {field.name for field in fields(stats)}
    for field in fields(stats):
        assert type(getattr(stats, field.name)) is int
    with pytest.raises(FrozenInstanceError):
        stats.evictions = 0
    assert copy.copy(stats) == pickle.loads(pickle.dumps(stats)) == stats


def changes(before: Stats, after: Stats) -> dict[str, int]:
    pairs = {f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(before)}
    return {name: change for name, change in pairs.items() if change}


def page_out(pool: Any, whole: Any, pages: list[int]) -> None:
    for page in pages:
        pool.advise(whole[page], "pageout")


def test_do_the_numbers_follow_a_known_workload(pool: Any) -> None:
    """One page a time, in an order that is no stream, so that each step's numbers are known."""
    pages = [0, 900, 300, 1500, 77, 1201, 450]
    whole = pool.empty((1600, PAGE), np.uint8)
    pool.advise(whole, "random")
    before = start = pool.stats()
    assert start.committed_bytes == start.peak_committed_bytes == whole.nbytes
    assert start.workers == 1
    assert start.resident_pages == start.dirty_pages == start.swap_used_bytes == 0

    def step() -> dict[str, int]:
        nonlocal before
        pool.check()
        now = pool.stats()
        told = changes(before, now)
        before = now
        # A page may be touched again before the thread that mapped it has unlocked it.
        return {k: v for k, v in told.items() if k not in ("metadata_bytes", "fill_waits")}

    for page in pages:
        whole[page, 5] = page % 251 + 1
    n = len(pages)
    assert step() == {
        "minor_faults": n, "zero_fills": n, "resident_pages": n, "free_frames": -n,
        "dirty_pages": n, "peak_resident_pages": n,
    }  # fmt: skip
    # To swap: as many slots as pages, and few calls.
    page_out(pool, whole, pages)
    assert step() == {
        "evictions": n, "slot_writes": n, "write_calls": n, "swap_used_bytes": n * PAGE,
        "resident_pages": -n, "free_frames": n, "dirty_pages": -n,
        "peak_swap_used_bytes": n * PAGE,
    }  # fmt: skip
    # Back by reading: a read each, and clean.
    assert [whole[page, 5] for page in pages] == [page % 251 + 1 for page in pages]
    assert step() == {
        "major_faults": n, "slot_reads": n, "read_calls": n, "resident_pages": n,
        "free_frames": -n,
    }  # fmt: skip
    # Out again: nothing was written, so nothing is.
    page_out(pool, whole, pages)
    assert step() == {
        "evictions": n, "clean_drops": n, "resident_pages": -n, "free_frames": n,
    }  # fmt: skip
    # Read, then written: the protection is met.
    for page in pages:
        assert whole[page, 5] == page % 251 + 1
        whole[page, 5] = 0
    assert step() == {
        "major_faults": n, "write_faults": n, "slot_reads": n, "read_calls": n,
        "resident_pages": n, "free_frames": -n, "dirty_pages": n,
    }  # fmt: skip
    # All zeros again: out without a slot, and the old slots are free.
    page_out(pool, whole, pages)
    assert step() == {
        "evictions": n, "zero_drops": n, "swap_used_bytes": -n * PAGE, "resident_pages": -n,
        "free_frames": n, "dirty_pages": -n,
    }  # fmt: skip
    del whole
    assert step() == {"committed_bytes": -1600 * PAGE}


def test_are_dead_processes_in_the_numbers(pool: Any) -> None:
    a = pool.empty((64, PAGE), np.uint8)
    pool.advise(a, "random")
    before = pool.stats()
    child = os.fork()
    if child == 0:
        os._exit(0 if a[::2].sum() == 0 and pool.stats().workers == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    while pool.stats().workers > 1:
        os.sched_yield()
    told = changes(before, pool.stats())
    assert told["minor_faults"] == told["zero_fills"] == told["resident_pages"] == 32


def settled(pool: Any, a: Any) -> tuple[Stats, int, int]:
    """The numbers, `a`'s resident pages and the store's bytes, once reclaim has gone to its end.

    It goes on after the last fault, until as many frames are free as it wants.
    """
    seen: list[tuple[Stats, int, int]] = []

    def stands_still() -> bool:
        before = pool.stats()
        pool.check()
        resident, held = int(pool.residency(a).sum()), os.fstat(pool.fileno()).st_blocks * 512
        after = pool.stats()
        seen[:] = [(after, resident, held)]
        accounted = after.resident_pages + after.free_frames + after.offline_frames
        return bool(before == after and accounted == pool.memory // PAGE)

    until(stands_still, "nothing is under way")
    return seen[0]


def test_do_the_numbers_agree_with_each_other_under_pressure(pool: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = pool.zeros((6000, PAGE), np.uint8)
    for page in rng.integers(0, len(a), 12_000):
        a[page, 17] += 1
    s, resident, held = settled(pool, a)
    print(f"{s.minor_faults + s.major_faults + s.write_faults} faults, {s.evictions} evictions")
    assert s.evictions > 2000
    assert s.resident_pages == resident
    assert held == resident * PAGE
    assert s.resident_pages <= s.peak_resident_pages <= pool.memory // PAGE
    assert s.swap_used_bytes <= s.peak_swap_used_bytes <= s.swap_bytes
    assert s.dirty_pages <= s.resident_pages
    assert s.swap_used_bytes <= s.slot_writes * PAGE
    assert s.swap_used_bytes <= s.swap_bytes
    assert s.readahead_hits <= s.readahead_pages
    # Every page that came in is there or went out: from a slot, or as zeros, at first or after it
    # went out as such; a neighbour that came as zeros with a fault is no fault of its own.
    came = len(a) + s.zero_drops + s.slot_reads
    assert came >= s.evictions + s.resident_pages
    assert s.zero_fills <= len(a) + s.zero_drops
    assert s.slot_reads >= s.major_faults
    assert s.read_calls <= s.slot_reads
    assert s.write_calls <= s.slot_writes
    assert s.clean_drops + s.zero_drops <= s.evictions
    assert s.committed_bytes == a.nbytes
    assert s.metadata_bytes > 0
    assert (a[:, 17].sum(dtype=int), a.sum(dtype=int)) == (12_000, 12_000)


def test_may_the_numbers_be_read_while_others_work(pool: Any) -> None:
    a = pool.zeros((4000, PAGE), np.uint8)
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            a[:, 0] += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        last = pool.stats()
        while last.evictions < 20_000:
            now = pool.stats()
            assert 0 <= now.free_frames <= pool.memory // PAGE
            for name in ("minor_faults", "major_faults", "evictions", "slot_reads", "slot_writes"):
                assert getattr(now, name) >= getattr(last, name)
            last = now
    finally:
        stop.set()
        thread.join()


# Residency.


def pages_of_bytes(view: npt.NDArray[Any], start: int) -> list[int]:
    """Every byte of every item, one by one."""
    base = view.__array_interface__["data"][0] - start
    found = set()
    for index in np.ndindex(view.shape):
        item = base + sum(i * s for i, s in zip(index, view.strides, strict=True))
        found |= {item // PAGE, (item + view.itemsize - 1) // PAGE}
    return sorted(found)


def test_is_residency_that_of_the_pages_of_any_view(pool: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pages = 60
    a = pool.zeros(pages * PAGE // 8, "f8")
    pool.advise(a, "random")
    start = a.__array_interface__["data"][0]
    touched = rng.choice(pages, pages // 2, replace=False)
    for page in touched:
        a[page * PAGE // 8] = 1
    square = a.reshape(60, 512)
    expected = np.isin(np.arange(pages), touched)
    assert pool.residency(a).tolist() == expected.tolist()
    assert pool.residency(a).dtype == bool
    views: list[Any] = [
        a[::-1], a[100:101], a[511:513], a[512:1024], a[::512], a[::-700], a[::1300], a[5::2048],
        square.T, square[::7], square[::-3, ::-5], square[:, 3], square[3, :], square[1:1],
        a.view("u1")[4095:4097], a.view("f4")[1023::4096], a.view("V16"), square[5:20:4, 100:200],
        np.asarray(a)[3000:3001], a.reshape(3, 20, 512)[::2, ::-3], square[:, -1:],
    ]  # fmt: skip
    for _ in range(40):
        first, last = np.sort(rng.integers(0, a.size, 2))
        views.append(a[first : last + 1 : rng.integers(1, 3000)])
        rows, columns = rng.integers(1, 40), rng.integers(1, 400)
        views.append(square[::rows, ::columns][:: rng.choice([1, -1])])
    for view in views:
        found = pages_of_bytes(view, start)
        told = pool.residency(view)
        note = f"{view.shape} {view.strides}"
        assert told.tolist() == expected[found].tolist(), note


def test_does_asking_for_residency_touch_nothing(pool: Any) -> None:
    a = pool.zeros((100, PAGE), np.uint8)
    before = pool.stats()
    assert not pool.residency(a).any()
    assert pool.stats() == before
    a[:] = 1
    pool.advise(a, "pageout")
    before = pool.stats()
    assert not pool.residency(a).any()
    assert pool.stats() == before


def test_is_residency_the_same_in_a_child(pool: Any) -> None:
    a = pool.zeros((100, PAGE), np.uint8)
    pool.advise(a, "random")
    a[10, 0] = 1
    child = os.fork()
    if child == 0:
        a[20, 0] = 1
        os._exit(0 if np.flatnonzero(pool.residency(a)).tolist() == [10, 20] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.flatnonzero(pool.residency(a)).tolist() == [10, 20]
