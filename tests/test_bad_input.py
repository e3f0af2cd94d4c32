"""Is bad input refused with a clear exception, before anything changes, and is nothing left?"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import pyswap

MIB = 1 << 20


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"memory": -1}, ValueError, "-1"),
        ({"memory": 0}, ValueError, "0"),
        ({"memory": 0.0}, ValueError, r"\(0, 1\]"),
        ({"memory": 1.5}, ValueError, r"\(0, 1\]"),
        ({"memory": float("nan")}, ValueError, r"\(0, 1\]"),
        ({"memory": "lots"}, ValueError, "lots"),
        ({"memory": "-3 MiB"}, ValueError, "-3 MiB"),
        ({"memory": 1 << 60}, ValueError, "address space"),
        ({"memory": None}, TypeError, "memory"),
        ({"memory": psutil.virtual_memory().total + (64 << 20)}, ValueError, "RAM"),
        ({"memory": 127 * 4096}, ValueError, "128"),
        ({"memory": 8 * MIB, "page_size": 128 << 10}, ValueError, "128"),
        ({"swap": -1}, ValueError, "-1"),
        ({"swap": "many"}, ValueError, "many"),
        ({"swap": 1 << 60}, ValueError, "address space"),
        ({"page_size": 5000}, ValueError, "power of two"),
        ({"page_size": 2048}, ValueError, "power of two|kernel"),
        ({"page_size": 4 << 20}, ValueError, "power of two"),
        ({"swap_path": "/nowhere/at/all"}, FileNotFoundError, "does not exist"),
        ({"swap_path": "/dev/null"}, ValueError, "device"),
        ({"swap_path": 5}, TypeError, "path"),
        ({"name": ""}, ValueError, "name"),
        ({"name": "a/b"}, ValueError, "name"),
        ({"overcommit": "no"}, TypeError, "overcommit"),
    ],
)
def test_is_a_bad_argument_of_a_pool_refused(
    arguments: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        pyswap.Pool(**{"memory": 8 * MIB, "swap": 8 * MIB, **arguments})


def test_is_a_swap_path_refused_that_exists_or_is_a_link(tmp_path: Path) -> None:
    file = tmp_path / "swap"
    file.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        pyswap.Pool(8 * MIB, swap_path=file)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="symbolic link"):
        pyswap.Pool(8 * MIB, swap_path=link)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "swap"]
    assert file.read_bytes() == b"mine"


def test_is_a_disk_without_the_room_refused_with_both_numbers(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    wanted = (room.f_bavail * room.f_frsize + (1 << 30)) // 65536 * 65536
    with pytest.raises(OSError, match=rf"{wanted} bytes.*\d+ bytes") as caught:
        pyswap.Pool(8 * MIB, wanted, swap_path=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_is_memory_of_no_pool_or_of_another_refused(pool: Any) -> None:
    plain = np.zeros(10)
    with pyswap.Pool(8 * MIB, 0, page_size=4096) as other:
        foreign = other.zeros(10)
        for a, says in ((plain, "no pool's"), (foreign, "another pool's")):
            with pytest.raises(ValueError, match=says):
                pool.residency(a)
            with pytest.raises(ValueError, match=says):
                pool.advise(a, "pageout")
            with pytest.raises(ValueError, match=says):
                pool.release(a)
            with pytest.raises(ValueError, match=says), pool.pin(a):
                pass
        with pytest.raises(TypeError, match="array"):
            pool.residency([1, 2])
        assert foreign.sum() == 0


def test_is_what_is_of_another_kind_refused(pool: Any) -> None:
    area = pool.swaps()
    for use in (
        lambda: pool.pin(5).__enter__(),
        lambda: pool.swapoff("/tmp"),
        lambda: pool.load(5),
        lambda: pool.release([1]),
        lambda: pyswap.attach(None),  # type: ignore[arg-type]
        lambda: pyswap.numpy_memory("a pool"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError):
            use()
    with pytest.raises(pyswap.GoneError, match="no array ''"):
        pyswap.attach(f"{pool.name}/")
    assert pool.swaps() == area
    assert pool.stats().committed_bytes == 0


def test_is_bad_advice_refused(pool: Any) -> None:
    with pytest.raises(ValueError, match="sometimes"):
        pool.advise(pool.zeros(10), "sometimes")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda p: p.zeros(-1), ValueError),
        (lambda p: p.zeros((3, -1)), ValueError),
        (lambda p: p.zeros("ab"), (TypeError, AttributeError)),
        (lambda p: p.zeros(3, dtype=object), TypeError),
        (lambda p: p.zeros(3, dtype=[("a", object)]), TypeError),
        (lambda p: p.zeros(3, dtype="no such"), TypeError),
        (lambda p: p.zeros(3, order="X"), ValueError),
        (lambda p: p.zeros(3, name=5), TypeError),
        (lambda p: p.zeros(1 << 50), ValueError),
        (lambda p: p.zeros(80 << 20, np.uint8), pyswap.SwapFullError),
        (lambda p: p.array([1, "a", None]), TypeError),
        (lambda p: p.full(3, "x", dtype=float), ValueError),
    ],
)
def test_is_a_bad_array_refused_and_nothing_kept(pool: Any, make: Any, kind: Any) -> None:
    before = pool.stats().committed_bytes
    with pytest.raises(kind):
        make(pool)
    assert pool.stats().committed_bytes == before
    assert pool.zeros(3).sum() == 0


def test_does_swap_full_say_that_it_is_memory(pool: Any) -> None:
    with pytest.raises(MemoryError, match="does not fit"):
        pool.empty(1 << 33, np.uint8)


def test_is_the_use_of_a_closed_pool_refused() -> None:
    pool = pyswap.Pool(8 * MIB, 0, page_size=4096)
    pool.close()
    pool.close()
    for use in (
        lambda: pool.zeros(3),
        pool.stats,
        pool.fileno,
        lambda: pool.swapper_pid,
        pool.check,
    ):
        with pytest.raises(pyswap.PoolClosedError):
            use()
    assert "closed" in repr(pool)


def test_is_an_array_refused_after_close_while_the_old_ones_stay_right() -> None:
    with pyswap.Pool(8 * MIB, 0, page_size=4096) as pool:
        a = pool.array(np.arange(5))
    with pytest.raises(pyswap.PoolClosedError):
        pool.zeros(3)
    assert a.tolist() == [0, 1, 2, 3, 4]
