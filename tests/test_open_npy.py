"""Do pages come from an array's file when they are touched, and never from one that changed?"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint
from test_files import ARRAYS
from workers import until, workers

import pyswap

ITEMS = 3 << 20
"""float64 items of an array of three budgets."""


def large(salt: int = 1) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.arange(ITEMS, dtype=np.float64) * 0.5 + salt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three budgets, whose pages are zero nowhere and begin at no page of the file."""
    np.save(tmp_path / "a.npy", large())
    return tmp_path / "a.npy"


def evict(pool: Any, a: Any) -> None:
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()


def swapper_files(pool: Any) -> int:
    """How many arrays' files the swapper has open; its other descriptors come and go meanwhile."""
    folder = Path(f"/proc/{pool.swapper_pid}/fd")
    count = 0
    for fd in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(folder / fd).endswith(".npy")
    return count


@pytest.mark.user
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_is_an_array_opened_as_numpy_opens_it(
    kind: str, mode: Any, pool: Any, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", ARRAYS[kind])
    expected = np.load(tmp_path / "a.npy")
    a = pool.open_npy(tmp_path / "a.npy", mode)
    assert isinstance(a, pyswap.PagedArray)
    assert (a.dtype, a.shape, a.strides) == (expected.dtype, expected.shape, expected.strides)
    assert a.flags.writeable == (mode == "c")
    np.testing.assert_array_equal(a, expected)


@pytest.mark.core
@pytest.mark.user
@pytest.mark.parametrize("mode", ["r", "c"])
def test_do_clean_pages_come_and_go_without_swap(mode: Any, pool: Any, path: Path) -> None:
    before = pool.stats()
    a = pool.open_npy(path, mode)
    assert a.nbytes > 2.9 * pool.memory
    for _ in range(2):
        assert (a == large()).all()
    now = pool.stats()
    pages = a.nbytes // pool.page_size
    assert now.file_reads - before.file_reads > 1.9 * pages
    assert now.clean_drops - before.clean_drops > 1.5 * pages
    assert (now.slot_writes, now.slot_reads, now.swap_used_bytes) == (0, 0, 0)
    # A scan is read ahead; some of what is touched is not.
    assert now.readahead_hits - before.readahead_hits > pages // 2
    assert now.major_faults > before.major_faults


@pytest.mark.user
def test_does_reading_a_file_need_no_swap_and_no_room(path: Path) -> None:
    with pyswap.Pool("8 MiB", 0, page_size=4096) as pool:
        a = pool.open_npy(path)
        assert pool.stats().committed_bytes == 0
        assert (a == large()).all()
        with pytest.raises(pyswap.SwapFullError):
            pool.open_npy(path, "c")
        full = pool.ones(4 << 20, np.uint8)
        assert (a[::-1] == large()[::-1]).all()
        assert full.all()
        pool.check()


@pytest.mark.user
def test_is_what_is_open_for_reading_protected(pool: Any, path: Path) -> None:
    a = pool.open_npy(path)
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        a.flags.writeable = True
    with pytest.raises(ValueError, match="open for reading"), pool.pin(a[:10], writable=True):
        pass
    with pytest.raises(TypeError, match="not writable"):
        ctypes.c_char.from_buffer(memoryview(a))
    with open("/dev/zero", "rb", buffering=0) as zeros, pytest.raises((TypeError, BufferError)):
        zeros.readinto(memoryview(a))
    with workers(a, 1) as (worker,):
        # Nor where C writes to it: here, and in a process that inherited it.
        worker.send(write_by_address)
        assert worker.wait() == -signal.SIGSEGV
    assert (a[:10] == large()[:10]).all()


def write_by_address(a: Any) -> None:
    ctypes.memset(a.__array_interface__["data"][0], 0, 8)


@pytest.mark.core
@pytest.mark.user
def test_is_what_is_written_kept_in_swap_and_the_file_let_be(pool: Any, path: Path) -> None:
    before = path.read_bytes()
    a = pool.open_npy(path, "c")
    a[::2] *= 3
    # Zeros are no untouched page here.
    a[1_000_000:1_100_000] = 0
    expected = large()
    expected[::2] *= 3
    expected[1_000_000:1_100_000] = 0
    evict(pool, a)
    assert pool.stats().swap_used_bytes > 0
    np.testing.assert_array_equal(a, expected)
    evict(pool, a)
    np.testing.assert_array_equal(a[::-1], expected[::-1])
    assert path.read_bytes() == before


@pytest.mark.core
def test_do_zeros_over_a_file_survive_a_full_swap(path: Path) -> None:
    # Without a free slot, zeros would be what can go without one.
    with pyswap.Pool("8 MiB", "17 MiB", page_size=4096, overcommit=True) as pool:
        a = pool.open_npy(path, "c")
        a[: ITEMS // 2] = 0
        other = pool.ones(10 << 20, np.uint8)
        assert (a[: ITEMS // 2] == 0).all()
        assert (a[ITEMS // 2 :] == large()[ITEMS // 2 :]).all()
        assert other.all()
        pool.check()


def add_to_rows(a: Any, first: int, seed: int) -> None:
    order = random.Random(seed)
    rows = list(range(first, len(a), 4))
    for _ in range(2):
        order.shuffle(rows)
        for row in rows:
            a[row] += first + 1


def total_of(a: Any) -> float:
    return float(a.sum())


@pytest.mark.core
def test_do_four_workers_write_what_all_see(pool: Any, path: Path, seed: int) -> None:
    a = pool.open_npy(path, "c").reshape(-1, 512)
    expected = large().reshape(-1, 512)
    with workers(a, 4) as crew:
        for i, worker in enumerate(crew):
            worker.send(add_to_rows, i, seed + i)
            expected[i::4] += 2 * (i + 1)
        for worker in crew:
            worker.answer()
        evict(pool, a)
        np.testing.assert_array_equal(a, expected)
        assert crew[2].ask(total_of) == expected.sum()


def test_do_four_workers_read_one_file_once_in_memory(pool: Any, path: Path) -> None:
    a = pool.open_npy(path)
    with workers(a, 4) as crew:
        for worker in crew:
            worker.send(total_of)
        assert {worker.answer() for worker in crew} == {large().sum()}
    assert os.fstat(pool.fileno()).st_blocks * 512 <= pool.memory


def read_only_reader(a: Any, answers: Any) -> None:
    try:
        a[0] = 1
    except ValueError:
        answers.put(float(a.sum()))
    else:
        answers.put("written")


def test_is_an_array_of_a_spawned_process_read_only_too(pool: Any, path: Path) -> None:
    a = pool.open_npy(path)
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    child = context.Process(target=read_only_reader, args=(a, answers))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answers.get() == large().sum()
    answers.close()
    child.close()


def change(path: Path, how: str) -> None:
    """Change a file, and its time with it: the clocks of file systems are coarse."""
    time_ns = os.stat(path).st_mtime_ns

    def write() -> bool:
        with open(path, "r+b") as file:
            if how == "cut":
                file.truncate(os.stat(path).st_size // 2)
            elif how == "longer":
                file.seek(0, os.SEEK_END)
                file.write(b"more")
            else:
                file.seek(1 << 20)
                file.write(b"other")
        return os.stat(path).st_mtime_ns != time_ns

    until(write, "the file's time changes")


def first_of(a: Any) -> float:
    return float(a[0])


def last_of(a: Any) -> float:
    return float(a[-1])


@pytest.mark.core
@pytest.mark.user
@pytest.mark.parametrize("how", ["cut", "longer", "bytes"])
@pytest.mark.parametrize("touch", [first_of, last_of])
def test_is_a_file_that_changes_an_error(
    touch: Callable[[Any], float],
    how: str,
    pool: Any,
    path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    a = pool.open_npy(path, name="survey")
    other = pool.ones(1000)
    with workers(a, 2) as (worker, second):
        assert worker.ask(touch) == float(touch(large()))
        evict(pool, a)
        change(path, how)
        worker.send(touch)
        assert worker.wait() == -signal.SIGBUS
        said = capfd.readouterr().err
        assert "survey" in said
        assert "the file that it comes from has changed" in said
        with pytest.raises(OSError, match="changed") as caught, pool.pin(a[:10]):
            pass
        assert caught.value.errno == errno.ESTALE
        with pytest.raises(OSError, match="changed"):
            a.tofile(os.devnull)
        # The pool lives on, and so does who touches it not.
        assert second.ask(type) is pyswap.PagedArray
        assert other.all()
        second.kill()


@pytest.mark.user
def test_are_written_pages_right_though_the_file_changes(pool: Any, path: Path) -> None:
    a = pool.open_npy(path, "c")
    a[: 1 << 18] = 7
    evict(pool, a)
    change(path, "bytes")
    assert (a[: 1 << 18] == 7).all()


@pytest.mark.user
def test_does_a_file_that_takes_the_name_not_matter(pool: Any, path: Path) -> None:
    a = pool.open_npy(path)
    np.save(path.with_name("new.npy"), large(2))
    path.with_name("new.npy").rename(path)
    assert (a == large()).all()
    b = pool.open_npy(path)
    os.unlink(path)
    assert (b == large(2)).all()


@pytest.mark.user
def test_is_the_file_closed_with_its_last_array(pool: Any, path: Path) -> None:
    a = pool.open_npy(path)
    view = a[10:]
    assert swapper_files(pool) == 1
    with workers(a, 1) as (worker,):
        del a
        assert (view[:10] == large()[10:20]).all()
        del view
        assert worker.ask(first_of) == 1
        assert swapper_files(pool) == 1
    until(lambda: swapper_files(pool) == 0, "the swapper closes the file")
    assert pool.stats().committed_bytes == 0


def test_does_a_release_end_it_for_all(pool: Any, path: Path) -> None:
    a = pool.open_npy(path, "c")
    with workers(a, 1) as (worker,):
        pool.release(a)
        worker.send(first_of)
        assert worker.wait() == -signal.SIGBUS


@pytest.mark.failpoint
def test_is_a_file_that_cannot_be_read_an_error(
    pool: Any, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a = pool.open_npy(path, name="survey")
    with workers(a, 2) as (worker, second):
        with Failpoint(pool, "file_read", "errno", error=errno.EIO):
            worker.send(first_of)
            assert worker.wait() == -signal.SIGBUS
        said = capfd.readouterr().err
        assert "survey, page 0: it could not be read: Input/output error" in said
        assert second.ask(first_of) == 1


def test_is_bad_input_refused(pool: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(1000))
    whole = (tmp_path / "a.npy").read_bytes()
    with pytest.raises(ValueError, match="mode must be 'r' or 'c', not 'r\\+'"):
        pool.open_npy(tmp_path / "a.npy", "r+")
    with pytest.raises(FileNotFoundError):
        pool.open_npy(tmp_path / "missing.npy")
    with pytest.raises(TypeError, match="name"):
        pool.open_npy(tmp_path / "a.npy", name=5)
    (tmp_path / "a.npy").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="header"):
        pool.open_npy(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        pool.open_npy(tmp_path / "b.npy")
    pool.close()
    np.save(tmp_path / "a.npy", np.arange(1000))
    with pytest.raises(pyswap.PoolClosedError):
        pool.open_npy(tmp_path / "a.npy")
