"""Do arrays come from files, and go to them, as NumPy reads and writes them?"""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyswap

Make = Callable[[Path, Any], None]

ITEMS = 3 << 20
"""float64 items of an array of three budgets."""

ARRAYS = {
    "one dimension": np.arange(1000, dtype=np.int32),
    "rows": np.arange(60, dtype="<f8").reshape(3, 4, 5),
    "columns": np.asfortranarray(np.arange(35, dtype=np.complex64).reshape(5, 7)),
    "big-endian": np.arange(9, dtype=">i2"),
    "no axes": np.array(2.5),
    "no items": np.zeros((3, 0, 2)),
    "text": np.array(["a", "bcd"]),
    "fields": np.array([(1, 2.5)], dtype=[("a", "u1"), ("b", "f4", (2,))]),
    "fields in UTF-8": np.array([(1,)], dtype=[("\N{SNOWMAN}", "u8")]),
    "dates": np.array(["2001-02-03", "NaT"], dtype="M8[D]"),
    "a longer header": np.zeros(2, dtype=[(f"field {i:04}", "u1") for i in range(300)]),
}


def large() -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.arange(ITEMS, dtype=np.float64) * 0.5 - 7


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "large.npy"
    np.save(path, large())
    return path


def same(found: Any, expected: Any) -> None:
    assert isinstance(found, pyswap.PagedArray)
    assert (found.dtype, found.shape, found.strides) == (
        expected.dtype,
        expected.shape,
        expected.strides,
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.user
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
@pytest.mark.parametrize("kind", ARRAYS)
def test_is_an_array_loaded_as_numpy_loads_it(kind: str, pool: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    if "longer" in kind:
        # A header over 64 KiB makes NumPy write version 2.0; this one is read, not written, so.
        with open(path, "wb") as file:
            np.lib.format.write_array(file, ARRAYS[kind], version=(2, 0))
    else:
        np.save(path, ARRAYS[kind])
    same(pool.load(path), np.load(path))
    with open(path, "rb") as file:
        same(pool.load(file), np.load(path))
        assert file.tell() == os.path.getsize(path)


@pytest.mark.user
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", ["rows", "columns", "no items"])
def test_is_a_member_of_an_archive_loaded(
    kind: str, save: Callable[..., None], pool: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    save(path, ARRAYS["text"], wanted=ARRAYS[kind])
    expected = np.load(path)
    same(pool.load(path, "wanted"), expected["wanted"])
    same(pool.load(path, "wanted.npy"), expected["wanted"])
    same(pool.load(path, "arr_0"), expected["arr_0"])
    with pytest.raises(KeyError, match="no member 'other', but wanted, arr_0"):
        pool.load(path, "other")
    with pytest.raises(ValueError, match="name its member"):
        pool.load(path)
    expected.close()


@pytest.mark.user
def test_is_an_array_of_three_budgets_loaded_with_progress(pool: Any, large_file: Path) -> None:
    told: list[tuple[int, int]] = []
    a = pool.load(large_file, progress=lambda *now: told.append(now))
    assert a.nbytes > 2.9 * pool.memory
    assert (a == large()).all()
    total = a.nbytes
    assert [n for _, n in told] == [total] * len(told)
    done = [n for n, _ in told]
    assert done == sorted(set(done))
    assert done[-1] == total
    assert len(done) >= 8


@pytest.mark.user
def test_is_a_member_of_three_budgets_loaded_with_progress(
    pool: Any, large_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.write(large_file, "large.npy")
    told: list[tuple[int, int]] = []
    a = pool.load(path, "large", progress=lambda *now: told.append(now))
    assert (a == large()).all()
    assert told[-1] == (a.nbytes, a.nbytes)
    assert len(told) >= a.nbytes >> 20


@pytest.mark.user
def test_does_fromfile_tell_its_progress(pool: Any, large_file: Path) -> None:
    told: list[tuple[int, int]] = []
    a = pool.fromfile(large_file, np.uint8, offset=128, progress=lambda *now: told.append(now))
    assert (a.view(np.float64) == large()).all()
    assert told[-1] == (a.nbytes, a.nbytes)
    assert len(told) >= 8


def test_does_an_exception_of_progress_leave_nothing(pool: Any, large_file: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt(done)

    before = pool.stats().committed_bytes
    for load in (pool.load, pool.fromfile):
        with pytest.raises(KeyboardInterrupt):
            load(large_file, progress=stop)
    assert pool.stats().committed_bytes == before
    assert pool.stats().pinned_pages == 0


@pytest.mark.user
@pytest.mark.parametrize("order", ["C", "F"])
def test_does_numpy_save_an_array_of_three_budgets(order: Any, pool: Any, tmp_path: Path) -> None:
    a = pool.empty((ITEMS // 1024, 1024), order=order)
    rows = large().reshape(a.shape)
    a[:] = rows
    path = tmp_path / "a.npy"
    np.save(path, a)
    found = np.load(path, mmap_mode="r")
    assert found.flags.f_contiguous == a.flags.f_contiguous
    assert (found == rows).all()
    same(pool.load(path)[:2], found[:2])


def test_does_numpy_save_archives_of_them(pool: Any, tmp_path: Path) -> None:
    a = pool.array(large())
    np.savez(tmp_path / "a.npz", a=a, half=a[::2])
    assert (pool.load(tmp_path / "a.npz", "half") == large()[::2]).all()


@pytest.mark.user
def test_is_what_is_compressed_or_in_memory_loaded_too(pool: Any, tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, ARRAYS["rows"])
    stream.seek(0)
    same(pool.load(stream), ARRAYS["rows"])
    path = tmp_path / "a.npy.gz"
    path.write_bytes(gzip.compress(stream.getvalue()))
    with gzip.open(path) as file:
        same(pool.load(file), ARRAYS["rows"])


def test_are_arrays_loaded_that_follow_each_other(pool: Any, tmp_path: Path) -> None:
    with open(tmp_path / "two.npy", "wb") as file:
        np.save(file, ARRAYS["rows"])
        np.save(file, ARRAYS["columns"])
    with open(tmp_path / "two.npy", "rb") as file:
        same(pool.load(file), ARRAYS["rows"])
        same(pool.load(file), ARRAYS["columns"])


def spoil(path: Path, kind: str) -> None:
    """Make a file that is no good array."""
    np.save(path, np.arange(1000))
    whole = path.read_bytes()
    spoiled = {
        "empty": b"",
        "no array": b"something else",
        "half a header": whole[:40],
        "half an array": whole[:-1],
        "a later version": whole[:6] + b"\x09" + whole[7:],
        "a header of 3.0 that is none": b"\x93NUMPY\x03\x00\x04\x00\x00\x00{{{{",
        "a header of 3.0 without a shape": b"\x93NUMPY\x03\x00\x02\x00\x00\x00{}",
    }
    path.write_bytes(spoiled[kind])


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "no array",
        "half a header",
        "half an array",
        "a later version",
        "a header of 3.0 that is none",
        "a header of 3.0 without a shape",
    ],
)
def test_is_a_file_that_is_no_whole_array_refused(kind: str, pool: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    spoil(path, kind)
    before = pool.stats().committed_bytes
    with pytest.raises(ValueError, match=r"."):
        pool.load(path)
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        file.write(path.read_bytes())
    with gzip.open(tmp_path / "a.gz") as file, pytest.raises(ValueError, match=r"."):
        pool.load(file)
    assert pool.stats().committed_bytes == before


def test_are_python_objects_refused(pool: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        pool.load(tmp_path / "a.npy")


def test_is_a_damaged_archive_refused(pool: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(1000))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    before = pool.stats().committed_bytes
    with pytest.raises(zipfile.BadZipFile):
        pool.load(path, "a")
    assert pool.stats().committed_bytes == before


def test_is_bad_input_refused_as_numpy_refuses_it(pool: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(FileNotFoundError):
        pool.load(tmp_path / "missing.npy")
    with pytest.raises(IsADirectoryError):
        pool.load(tmp_path)
    with pytest.raises(ValueError, match="no archive"):
        pool.load(tmp_path / "a.npy", "a")
    with pytest.raises(TypeError):
        pool.load(5)
    header = {"descr": "<f8", "fortran_order": False, "shape": (1 << 30,)}
    with open(tmp_path / "big.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + (8 << 30))
    with pytest.raises(pyswap.SwapFullError):
        pool.load(tmp_path / "big.npy")
