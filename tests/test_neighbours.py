"""Do other libraries work on an array's own memory, while its pages come and go?

Each neighbour gets the array without a copy: the same address on both sides. Then everything is
evicted, and each side reads what the other wrote. `make test-extras` installs the neighbours.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.extras

ROWS, COLUMNS = 3000, 1024
"""An array of 24 MB, three times the budget."""


@pytest.fixture(scope="module", autouse=True)
def neighbours() -> None:
    """Import all of them first: some start threads that stay."""
    import joblib  # noqa: F401
    import pandas as pd  # noqa: F401
    import pyarrow as pa  # noqa: F401
    import sklearn.decomposition
    import sklearn.ensemble
    import sklearn.model_selection  # noqa: F401
    import torch

    # fork() hangs while another thread is inside a library for linear algebra.
    torch.set_num_threads(1)


def values(salt: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (np.arange(ROWS * COLUMNS, dtype=np.float64) * 0.25 + salt).reshape(ROWS, COLUMNS)


@pytest.fixture
def a(pool: Any) -> Any:
    return pool.array(values())


def evict(pool: Any, a: Any) -> None:
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()


def address(a: Any) -> int:
    return int(a.__array_interface__["data"][0])


def check_both_ways(
    pool: Any, a: Any, read: Callable[[], Any], write: Callable[[Any], None]
) -> None:
    """Each side reads what the other wrote, with everything evicted in between."""
    evict(pool, a)
    np.testing.assert_array_equal(np.asarray(read()), values())
    write(values(1))
    evict(pool, a)
    np.testing.assert_array_equal(a, values(1))
    a[:] = values(2)
    evict(pool, a)
    np.testing.assert_array_equal(np.asarray(read()), values(2))


def test_is_a_memoryview_the_arrays_memory(pool: Any, a: Any) -> None:
    view = memoryview(a)
    assert view.shape == a.shape
    assert address(np.asarray(view)) == address(a)
    flat = view.cast("B")
    assert ctypes.addressof(ctypes.c_char.from_buffer(flat)) == address(a)

    def write(new: Any) -> None:
        flat[:] = new.tobytes()

    check_both_ways(pool, a, lambda: np.frombuffer(flat).reshape(a.shape), write)


def test_does_dlpack_hand_the_memory_over(pool: Any, a: Any) -> None:
    import torch

    plain = np.from_dlpack(a)
    tensor = torch.from_dlpack(a)
    assert address(plain) == tensor.data_ptr() == address(a)
    check_both_ways(pool, a, lambda: plain, functools.partial(np.copyto, plain))
    a[:] = values()
    check_both_ways(pool, a, tensor.numpy, lambda new: tensor.copy_(torch.asarray(new)))


def test_does_torch_compute_on_the_arrays_memory(pool: Any, a: Any) -> None:
    import torch

    tensor = torch.from_numpy(a)
    assert tensor.data_ptr() == address(a)
    assert tensor.numpy().shape == a.shape
    check_both_ways(pool, a, tensor.numpy, lambda new: tensor.copy_(torch.asarray(new)))
    evict(pool, a)
    tensor.mul_(2).add_(1)
    np.testing.assert_array_equal(a, values(2) * 2 + 1)


def test_does_a_tensor_keep_the_array(pool: Any) -> None:
    import torch

    tensor = torch.from_numpy(pool.array(values()))
    pool.close()
    assert torch.equal(tensor, torch.asarray(values()))


class Rows:
    """A torch dataset of the rows of an array."""

    def __init__(self, a: Any) -> None:
        self.a = a

    def __len__(self) -> int:
        return len(self.a)

    def __getitem__(self, i: int) -> Any:
        import torch

        return i, torch.from_numpy(self.a[i])


# It warns of more workers than processors.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_do_four_loader_workers_share_a_dataset_of_three_budgets(pool: Any, a: Any) -> None:
    from torch.utils.data import DataLoader

    assert a.nbytes > 2.9 * pool.memory
    evict(pool, a)
    before = pool.stats()
    loader = DataLoader(
        Rows(a),  # type: ignore[arg-type]
        batch_size=60,
        shuffle=True,
        num_workers=4,
        multiprocessing_context="fork",
    )
    seen = np.zeros(ROWS, int)
    most_workers = 0
    for indices, batch in loader:
        most_workers = max(most_workers, pool.stats().workers)
        np.testing.assert_array_equal(batch.numpy(), values()[indices.numpy()])
        seen[indices.numpy()] += 1
    assert (seen == 1).all()
    assert most_workers == 5
    # The workers read the pages; nobody was sent the array.
    assert pool.stats().slot_reads > before.slot_reads + a.nbytes // pool.page_size // 2


# Each worker is a new process that imports torch: they are told the array, not sent it.
SPAWNED = """
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import pyswap


class Rows(Dataset):
    def __init__(self, a):
        self.a = a

    def __len__(self):
        return len(self.a)

    def __getitem__(self, i):
        return i, torch.from_numpy(self.a[i])


if __name__ == "__main__":
    with pyswap.Pool("8 MiB", "64 MiB", page_size=4096) as pool:
        a = pool.array(np.arange(3_000 * 1024, dtype=float).reshape(3_000, 1024))
        pool.advise(a, "pageout")
        before = pool.stats()
        loader = DataLoader(Rows(a), 100, num_workers=4, multiprocessing_context="spawn")
        workers = 0
        for indices, batch in loader:
            workers = max(workers, pool.stats().workers)
            expected = indices[:, None] * 1024 + torch.arange(1024)
            assert torch.equal(batch, expected.double())
        assert workers == 5, workers
        assert pool.stats().slot_reads > before.slot_reads + 3_000
        print("the same")
"""


def test_do_four_spawned_loader_workers_share_it_by_reference(tmp_path: Path) -> None:
    program = tmp_path / "spawned.py"
    program.write_text(SPAWNED)
    told = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == "the same\n"


def test_is_a_dataframe_on_the_arrays_memory(pool: Any, a: Any) -> None:
    import pandas as pd

    frame = pd.DataFrame(a, copy=False)
    assert address(frame.to_numpy()) == address(a)
    assert address(frame[3].to_numpy()) == address(a[:, 3])

    def write(new: Any) -> None:
        frame.iloc[:, :] = new

    check_both_ways(pool, a, frame.to_numpy, write)
    evict(pool, a)
    np.testing.assert_allclose(frame.mean().to_numpy(), values(2).mean(axis=0))


def test_is_an_arrow_buffer_the_arrays_memory(pool: Any, a: Any) -> None:
    import pyarrow as pa

    buffer = pa.py_buffer(a)
    assert (buffer.address, buffer.size) == (address(a), a.nbytes)
    assert buffer.is_mutable
    column = pa.Array.from_buffers(pa.float64(), a.size, [None, buffer])

    def read() -> Any:
        found = column.to_numpy(zero_copy_only=True)
        assert address(found) == address(a)
        return found.reshape(a.shape)

    check_both_ways(pool, a, read, functools.partial(np.copyto, a))


def test_does_incremental_pca_fit_three_budgets(pool: Any, seed: int) -> None:
    from sklearn.decomposition import IncrementalPCA

    plain = np.random.default_rng(seed).normal(size=(12_000, 256)) * np.linspace(1, 3, 256)
    a = pool.array(plain)
    assert a.nbytes > 2.9 * pool.memory
    evict(pool, a)
    fit = IncrementalPCA(8, batch_size=1000).fit(a)
    expected = IncrementalPCA(8, batch_size=1000).fit(plain)
    np.testing.assert_allclose(fit.components_, expected.components_)
    evict(pool, a)
    np.testing.assert_allclose(fit.transform(a), expected.transform(plain))


def test_do_four_jobs_vote_on_the_arrays_memory(pool: Any, seed: int) -> None:
    from sklearn.ensemble import RandomForestClassifier

    plain = np.random.default_rng(seed).normal(size=(24_000, 128)).astype(np.float32)
    kinds = (plain[:, 0] + plain[:, 1] > 0).astype(int)
    a = pool.array(plain)
    evict(pool, a)
    # Trees are grown by threads, on the array itself: its dtype is what they want.
    forest = RandomForestClassifier(4, max_depth=4, n_jobs=4, random_state=seed, max_samples=0.1)
    expected = RandomForestClassifier(4, max_depth=4, random_state=seed, max_samples=0.1)
    forest.fit(a, kinds)
    expected.fit(plain, kinds)
    evict(pool, a)
    np.testing.assert_array_equal(forest.predict(a), expected.predict(plain))


# joblib keeps its processes and folders until a program's end.
SCORES = """
import sys
import numpy as np
import pyswap
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_score

with pyswap.Pool("8 MiB", "64 MiB", page_size=4096) as pool:
    plain = np.random.default_rng(int(sys.argv[1])).normal(size=(12_000, 256))
    target = plain @ np.arange(256.0)
    a = pool.array(plain)
    assert a.nbytes > 2.9 * pool.memory
    pool.advise(a, "pageout")
    scores = cross_val_score(Ridge(), a, target, cv=4, n_jobs=4)
    np.testing.assert_allclose(scores, cross_val_score(Ridge(), plain, target, cv=4))
    print("the same")
"""


def test_do_four_processes_of_joblib_score_an_array(seed: int) -> None:
    told = subprocess.run(
        [sys.executable, "-c", SCORES, str(seed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == "the same\n"
