"""Do a user's own types hold under `mypy --strict`, and does mypy see what is wrong?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a user writes, in full; mypy infers the rest from the package.
RIGHT = """
from __future__ import annotations

import numpy as np
import numpy.typing as npt

import pyswap


def work(pool: pyswap.Pool) -> float:
    a: pyswap.PagedArray = pool.zeros((100, 200), "f4", name="a")
    b = pool.array([[1, 2], [3, 4]], dtype=float, private=True)
    c: pyswap.PagedArray = b.snapshot()
    plain: npt.NDArray[np.generic] = a
    pool.advise(a[10:], "sequential")
    with pool.pin(a[0], writable=True):
        a[0] = 1
    resident: npt.NDArray[np.bool_] = pool.residency(a)
    stats: pyswap.Stats = pool.stats()
    loaded = pool.load("a.npy", progress=lambda done, total: print(done, total))
    opened = pool.open_npy("a.npy", mode="c")
    area: pyswap.SwapArea = pool.swapon("/var/tmp", "1 GiB", priority=1)
    pool.swapoff(area)
    pool.resize("64 MiB")
    pool.release(a)
    count: int = stats.evictions + len(resident) + plain.size + loaded.size + opened.size
    return float(c.sum()) + count


try:
    with pyswap.Pool("32 MiB", swap="64 MiB", page_size=4096, overcommit=True) as pool:
        reveal = work(pool)
except (pyswap.SwapFullError, pyswap.GoneError, pyswap.PoolClosedError) as error:
    known: pyswap.Error = error
mode: str = pyswap.engine_mode()


def by_the_default_pool(path: str) -> int:
    pyswap.configure("32 MiB", swap="64 MiB")
    a: pyswap.PagedArray = pyswap.zeros_like(pyswap.full((2, 3), 1.0))
    name: str | None = a.name
    found: pyswap.Pool | pyswap.PagedArray = pyswap.attach(name or "pool/array")
    block = pyswap.SharedMemory(create=True, size=100)
    view: memoryview = block.buf
    items = pyswap.ShareableList([1, "two", None])
    block.close()
    block.unlink()
    with pyswap.numpy_memory(pyswap.default_pool(), threshold="1 MiB"):
        np.ones(3)
    pyswap.numpy_memory(pyswap.default_pool()).install()
    read: pyswap.PagedArray = pyswap.fromfile(path, np.int64, count=3)
    dropped: int = pyswap.default_pool().drop_transit(older_than_s=1.0)
    return len(view) + len(items) + read.size + dropped + isinstance(found, pyswap.Pool)
"""

WRONG = {
    "pool.advise(a, 'soon')": "arg-type",
    "pool.open_npy('a.npy', mode='r+')": "arg-type",
    "pool.zeros(3, order='X')": "arg-type",
    "pool.load('a.npy', progress=lambda done: None)": "arg-type",
    "pool.stats().nothing": "attr-defined",
    "pool.release('a')": "arg-type",
    "pyswap.SharedMemory(create=True, size='8')": "arg-type",
    "pyswap.numpy_memory(a)": "arg-type",
    "pyswap.attach(pool)": "arg-type",
}


HEAD = "import pyswap\n\npool = pyswap.Pool('8 MiB')\na = pool.zeros(3)\n"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mypy says of both programs."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(HEAD + "\n".join(WRONG) + "\n")
    answer = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "right.py", "wrong.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=240,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert answer.returncode == 1, answer.stdout + answer.stderr
    return answer.stdout


def test_do_a_users_types_hold(told: str) -> None:
    assert "checked 2 source files" in told
    assert "right.py" not in told


@pytest.mark.parametrize("line", WRONG)
def test_does_mypy_see_a_users_mistake(line: str, told: str) -> None:
    number = HEAD.count("\n") + 1 + list(WRONG).index(line)
    assert re.search(rf"^wrong\.py:{number}: error: .*\[{WRONG[line]}\]$", told, re.MULTILINE), told
