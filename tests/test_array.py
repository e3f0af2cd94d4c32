"""Is an array paged exactly where its memory is the pool's, and an ndarray in all else?

Most tests run on a stand-in for a region, a private memory map, so that they ask about the
class alone; those named `..._in_a_real_pool` ask the same of a pool.

The oracle is NumPy: every expression runs on paged arrays and on plain ones with the same
values, and must give equal values of equal dtype, sharing memory in the one case as in the
other.
"""

from __future__ import annotations

import copy
import errno
import io
import mmap
import os
import pickle
import threading
import tracemalloc
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyswap import paged as array
from pyswap.paged import PagedArray

NUMPY_1 = np.__version__.startswith("1.")

PAGED, PLAIN, SCALAR = PagedArray, np.ndarray, np.generic

RECORD = np.dtype([("x", "i4"), ("y", "f8", (2,))])

# What the table's names stand for: shape, dtype, order.
NAMES: dict[str, tuple[tuple[int, ...], Any, str]] = {
    "a": ((4, 6), np.float64, "C"),
    "f": ((4, 6), np.float64, "F"),
    "v": ((24,), np.float64, "C"),
    "o": ((4, 6), np.float64, "C"),
    "m": ((4, 4), np.float64, "C"),
    "i": ((4,), np.intp, "C"),
    "b": ((4, 6), np.bool_, "C"),
    "c": ((4, 6), np.complex128, "C"),
    "s": ((5,), RECORD, "C"),
    "d": ((4,), "M8[s]", "C"),
    "u": ((4,), "U5", "C"),
    "z": ((), np.float64, "C"),
    "e": ((0, 3), np.float64, "C"),
}

# (expression, expected type, does it share memory with a paged array?)
# A list of results has the type and the sharing of each of its items.
TABLE: list[tuple[str, type, bool]] = [
    # Basic indexing.
    ("a[1]", PAGED, True),
    ("a[1:3]", PAGED, True),
    ("a[::-1, ::-2]", PAGED, True),
    ("a[..., 1]", PAGED, True),
    ("a[...]", PAGED, True),
    ("a[()]", PAGED, True),
    ("a[:, None, :]", PAGED, True),
    ("a[4:]", PAGED, False),
    ("a[1, 2]", SCALAR, False),
    ("a[1, 2, ...]", PAGED, True),
    ("v[5]", SCALAR, False),
    ("v[-1]", SCALAR, False),
    ("v[np.int64(3)]", SCALAR, False),
    ("z[()]", SCALAR, False),
    ("z[...]", PAGED, True),
    ("s['x']", PAGED, True),
    ("s['y']", PAGED, True),
    ("s[['x']]", PAGED, True),
    ("s[1]['y']", PLAIN, True),
    ("u[1]", SCALAR, False),
    ("d[1]", SCALAR, False),
    ("e[:]", PAGED, False),
    ("list(a)", PAGED, True),
    ("[row for row in a[:2]]", PAGED, True),
    ("list(v[:3])", SCALAR, False),
    # Fancy and boolean indexing.
    ("a[[1, 2]]", PLAIN, False),
    ("a[[1, 2], 1:3]", PLAIN, False),
    ("a[:, [0, 0]]", PLAIN, False),
    ("a[i]", PLAIN, False),
    ("a[i, i]", PLAIN, False),
    ("a[b]", PLAIN, False),
    ("a[a > 3]", PLAIN, False),
    ("a[True]", PLAIN, False),
    ("a[np.array(1), 1]", SCALAR, False),
    ("v[np.array(1)]", SCALAR, False),
    ("a[np.ix_(i, i)]", PLAIN, False),
    ("s[[0, 1]]", PLAIN, False),
    ("plain[i]", PLAIN, False),
    # Views by method and attribute.
    ("a.T", PAGED, True),
    ("a.reshape(6, 4)", PAGED, True),
    ("a.reshape(-1)", PAGED, True),
    ("a.reshape((4, 6))", PAGED, True),
    ("a.T.reshape(-1)", PLAIN, False),
    ("a.ravel()", PAGED, True),
    ("f.ravel()", PLAIN, False),
    ("f.ravel('K')", PAGED, True),
    ("a.transpose(1, 0)", PAGED, True),
    ("a.swapaxes(0, 1)", PAGED, True),
    ("a[:, :1].squeeze()", PAGED, True),
    ("a[:1, :1].squeeze()", PAGED, True),
    ("a.diagonal()", PAGED, True),
    ("a.view()", PAGED, True),
    ("a.view(np.uint8)", PAGED, True),
    ("a.view(np.int64)", PAGED, True),
    ("a.view(np.ndarray)", PLAIN, True),
    ("a.view(np.ndarray).view(type(a))", PAGED, True),
    ("a.getfield(np.int32)", PAGED, True),
    ("a.real", PAGED, True),
    ("c.real", PAGED, True),
    ("c.imag", PAGED, True),
    ("a.imag", PLAIN, False),
    ("a.flat[2]", SCALAR, False),
    ("a.flat[2:5]", PLAIN, False),
    ("a.flat[[2, 5]]", PLAIN, False),
    ("a.flat.base", PLAIN, True),
    ("a.flat.copy()", PLAIN, False),
    ("a.__array__()", PLAIN, True),
    ("a.__array__(np.float32)", PLAIN, False),
    # Copies by method.
    ("a.copy()", PLAIN, False),
    ("f.copy('K')", PLAIN, False),
    ("a.astype(np.float32)", PLAIN, False),
    ("a.astype(np.float64)", PLAIN, False),
    ("a.astype(np.float64, copy=False)", PAGED, True),
    ("a.astype(np.float32, copy=False)", PLAIN, False),
    ("a.astype(np.float64, subok=False)", PLAIN, False),
    ("a.flatten()", PLAIN, False),
    ("a.take([1, 2])", PLAIN, False),
    ("a.take(i, axis=0)", PLAIN, False),
    ("a.take(3)", SCALAR, False),
    ("a.repeat(2)", PLAIN, False),
    ("a.compress([True, False, True, True], axis=0)", PLAIN, False),
    ("i.choose([i, i, i, i])", PLAIN, False),
    ("a.byteswap()", PLAIN, False),
    ("a.conj()", PAGED, True),
    ("c.conj()", PLAIN, False),
    ("c.conjugate()", PLAIN, False),
    ("a.clip(2, 5)", PLAIN, False),
    ("a.clip(min=a, max=a)", PLAIN, False),
    ("a.round(1)", PLAIN, False),
    ("a.argsort()", PLAIN, False),
    ("a.argpartition(2)", PLAIN, False),
    ("a.nonzero()", PLAIN, False),
    ("v.searchsorted([1, 2])", PLAIN, False),
    ("v.searchsorted(v)", PLAIN, False),
    ("v.searchsorted(3)", SCALAR, False),
    ("a.dot(a.T)", PLAIN, False),
    ("v.dot(v)", SCALAR, False),
    ("plain.dot(f.T)", PLAIN, False),
    ("a.__copy__()", PLAIN, False),
    ("a.__deepcopy__({})", PLAIN, False),
    ("copy.copy(a)", PLAIN, False),
    ("copy.deepcopy(a)", PLAIN, False),
    ("copy.deepcopy([a, a])", PLAIN, False),
    # Reductions and accumulations.
    ("a.sum()", SCALAR, False),
    ("a.sum(axis=0)", PLAIN, False),
    ("a.sum(keepdims=True)", PLAIN, False),
    ("a.sum(axis=1, keepdims=True)", PLAIN, False),
    ("z.sum()", SCALAR, False),
    ("a.prod()", SCALAR, False),
    ("a.mean()", SCALAR, False),
    ("a.mean(axis=0)", PLAIN, False),
    ("a.var()", SCALAR, False),
    ("a.std(axis=1)", PLAIN, False),
    ("a.min()", SCALAR, False),
    ("a.max(axis=0)", PLAIN, False),
    ("a.argmax()", SCALAR, False),
    ("a.argmax(axis=0)", PLAIN, False),
    ("a.argmin(axis=1)", PLAIN, False),
    ("a.all()", SCALAR, False),
    ("b.any(axis=0)", PLAIN, False),
    ("a.trace()", SCALAR, False),
    ("a.cumsum()", PLAIN, False),
    ("a.cumsum(axis=0)", PLAIN, False),
    ("a.cumprod(axis=1)", PLAIN, False),
    # Operators and ufuncs.
    ("a + 1", PLAIN, False),
    ("1 + a", PLAIN, False),
    ("a + a", PLAIN, False),
    ("a + plain", PLAIN, False),
    ("plain + a", PLAIN, False),
    ("-a", PLAIN, False),
    ("+a", PLAIN, False),
    ("abs(a)", PLAIN, False),
    ("a ** 2", PLAIN, False),
    ("a ** 1", PLAIN, False),
    ("a == a", PLAIN, False),
    ("a > 3", PLAIN, False),
    ("u == u", PLAIN, False),
    ("s['x'] == 1", PLAIN, False),
    ("~b", PLAIN, False),
    ("b & b", PLAIN, False),
    ("divmod(a, 7)", PLAIN, False),
    ("m @ m", PLAIN, False),
    ("v @ v", SCALAR, False),
    ("z + 1", SCALAR, False),
    ("z + z", SCALAR, False),
    ("z == z", SCALAR, False),
    ("d - d", PLAIN, False),
    ("np.sin(a)", PLAIN, False),
    ("np.add(a, 1, subok=False)", PLAIN, False),
    ("np.add(plain, 1, where=b)[b]", PLAIN, False),
    ("np.modf(a)", PLAIN, False),
    ("np.frexp(z)", SCALAR, False),
    ("np.add.reduce(a)", PLAIN, False),
    ("np.add.reduce(v)", SCALAR, False),
    ("np.add.reduce(a, axis=None, keepdims=True)", PLAIN, False),
    ("np.add.accumulate(a)", PLAIN, False),
    ("np.add.accumulate(v)", PLAIN, False),
    ("np.add.reduceat(v, [0, 3])", PLAIN, False),
    ("np.add.reduceat(v, i)", PLAIN, False),
    ("np.multiply.outer(i, i)", PLAIN, False),
    ("np.matmul(m, m)", PLAIN, False),
    ("np.frompyfunc(abs, 1, 1)(i)", PLAIN, False),
    ("np.vectorize(abs)(i)", PLAIN, False),
    # Functions whose results are views.
    ("np.asarray(a)", PLAIN, True),
    ("np.asanyarray(a)", PAGED, True),
    ("np.ascontiguousarray(a)", PLAIN, True),
    ("np.ascontiguousarray(f)", PLAIN, False),
    ("np.asfortranarray(f)", PLAIN, True),
    ("np.frombuffer(v)", PLAIN, True),
    ("np.split(a, 2)", PAGED, True),
    ("np.array_split(v, 3)", PAGED, True),
    ("np.split(v, [24])[1]", PAGED, False),
    ("np.hsplit(a, 2)", PAGED, True),
    ("np.reshape(a, (3, 8))", PAGED, True),
    ("np.reshape(a.T, -1)", PLAIN, False),
    ("np.ravel(a)", PAGED, True),
    ("np.transpose(a)", PAGED, True),
    ("np.swapaxes(a, 0, 1)", PAGED, True),
    ("np.moveaxis(a, 0, 1)", PAGED, True),
    ("np.rollaxis(a, 1)", PAGED, True),
    ("np.expand_dims(a, 0)", PAGED, True),
    ("np.squeeze(a[None])", PAGED, True),
    ("np.atleast_3d(a)", PAGED, True),
    ("np.atleast_1d(a)", PAGED, True),
    ("np.atleast_1d(z)", PAGED, True),
    ("np.atleast_2d(v, a)", PAGED, True),
    ("np.broadcast_to(a, (3, 4, 6))", PAGED, True),
    ("np.broadcast_to(a, (3, 4, 6), subok=True)", PAGED, True),
    ("np.broadcast_to(a, (3, 4, 6), subok=False)", PLAIN, True),
    ("np.broadcast_arrays(a, v[:6])", PAGED, True),
    ("np.flip(a)", PAGED, True),
    ("np.fliplr(a)", PAGED, True),
    ("np.rot90(a)", PAGED, True),
    ("np.real(c)", PAGED, True),
    ("np.imag(c)", PAGED, True),
    ("np.imag(a)", PLAIN, False),
    ("np.diagonal(a)", PAGED, True),
    ("np.diag(a)", PAGED, True),
    ("np.diag(i)", PLAIN, False),
    ("np.ix_(i, i)", PAGED, True),
    ("np.lib.stride_tricks.sliding_window_view(v, 3)", PAGED, True),
    ("np.lib.stride_tricks.as_strided(v, (3,), (8,))", PLAIN, True),
    ("np.lib.stride_tricks.as_strided(v, (3,), (8,), subok=True)", PAGED, True),
    ("np.meshgrid(v, i, copy=False)", PAGED, True),
    ("np.nan_to_num(a, copy=False)", PAGED, True),
    ("np.trim_zeros(v[1:])", PAGED, True),
    # Functions whose results are fresh.
    ("np.array(a)", PLAIN, False),
    ("np.array([a, a])", PLAIN, False),
    ("np.copy(a)", PLAIN, False),
    ("np.copy(a, subok=True)", PLAIN, False),
    ("np.empty_like(a)[:0]", PLAIN, False),
    ("np.zeros_like(a)", PLAIN, False),
    ("np.ones_like(a, dtype=int)", PLAIN, False),
    ("np.full_like(a, 7)", PLAIN, False),
    ("np.zeros(3, like=a)", PLAIN, False),
    ("np.array([1, 2], like=a)", PLAIN, False),
    ("np.arange(3, like=a)", PLAIN, False),
    ("np.sort(a)", PLAIN, False),
    ("np.partition(a, 2)", PLAIN, False),
    ("np.argsort(a)", PLAIN, False),
    ("np.sum(a)", SCALAR, False),
    ("np.sum(a, axis=0)", PLAIN, False),
    ("np.mean(a)", SCALAR, False),
    ("np.median(a, axis=0)", PLAIN, False),
    ("np.median(a)", SCALAR, False),
    ("np.percentile(a, 30)", SCALAR, False),
    ("np.nanmean(a, axis=0)", PLAIN, False),
    ("np.ptp(a, axis=0)", PLAIN, False),
    ("np.concatenate([a, a])", PLAIN, False),
    ("np.concatenate((a, plain))", PLAIN, False),
    ("np.concatenate(deque([a, a]))", PLAIN, False),
    ("np.stack([a, a])", PLAIN, False),
    ("np.stack(deque([a, a]))", PLAIN, False),
    ("np.vstack([a, v[:6]])", PLAIN, False),
    ("np.hstack([v, i])", PLAIN, False),
    ("np.block([[a, a], [a, a]])", PLAIN, False),
    ("np.r_[v, 1]", PLAIN, False),
    ("np.c_[v, v]", PLAIN, False),
    ("np.where(b, a, 0)", PLAIN, False),
    ("np.where(b)", PLAIN, False),
    ("np.nonzero(a)", PLAIN, False),
    ("np.argwhere(b)", PLAIN, False),
    ("np.take(a, [1, 2])", PLAIN, False),
    ("np.take_along_axis(a, np.argsort(a), -1)", PLAIN, False),
    ("np.choose(i, [i, i, i, i])", PLAIN, False),
    ("np.select([b], [a])", PLAIN, False),
    ("np.compress([True, False], a, axis=0)", PLAIN, False),
    ("np.extract(b, a)", PLAIN, False),
    ("np.repeat(a, 2)", PLAIN, False),
    ("np.tile(a, 2)", PLAIN, False),
    ("np.tile(a, 1)", PLAIN, False),
    ("np.resize(a, (9, 9))", PLAIN, False),
    ("np.roll(a, 1)", PLAIN, False),
    ("np.pad(a, 1)", PLAIN, False),
    ("np.insert(v, 1, 5)", PLAIN, False),
    ("np.delete(v, 1)", PLAIN, False),
    ("np.append(v, v)", PLAIN, False),
    ("np.unique(i)", PLAIN, False),
    ("np.unique(i, return_counts=True)", PLAIN, False),
    ("np.isin(a, [1, 2])", PLAIN, False),
    ("np.searchsorted(v, v)", PLAIN, False),
    ("np.interp(v, v, v)", PLAIN, False),
    ("np.diff(a)", PLAIN, False),
    ("np.gradient(v)", PLAIN, False),
    ("np.gradient(a)", PLAIN, False),
    ("np.cumsum(a)", PLAIN, False),
    ("np.clip(a, 1, 2)", PLAIN, False),
    ("np.round(a, 1)", PLAIN, False),
    ("np.fix(a)", PLAIN, False),
    ("np.sinc(v)", PLAIN, False),
    ("np.nan_to_num(a)", PLAIN, False),
    ("np.histogram(a)", PLAIN, False),
    ("np.histogramdd(a)[0]", PLAIN, False),
    ("np.bincount(i)", PLAIN, False),
    ("np.digitize(v, v)", PLAIN, False),
    ("np.convolve(v, v)", PLAIN, False),
    ("np.outer(i, i)", PLAIN, False),
    ("np.inner(v, v)", SCALAR, False),
    ("np.dot(a, a.T)", PLAIN, False),
    ("np.vdot(v, v)", SCALAR, False),
    ("np.tensordot(a, a, 2)[()]", SCALAR, False),
    ("np.kron(m, m)", PLAIN, False),
    ("np.cross(a[:, :3], a[:, 3:])", PLAIN, False),
    ("np.einsum('ij,ij->i', a, a)", PLAIN, False),
    ("np.einsum('ij->', a)", SCALAR, False),
    ("np.einsum('ij->ji', a)", PAGED, True),
    ("np.apply_along_axis(sum, 0, a)", PLAIN, False),
    ("np.piecewise(v, [v < 3], [0, 1])", PLAIN, False),
    ("np.polyfit(v, v, 1).round(3)", PLAIN, False),
    ("np.linalg.inv(m + np.eye(4))", PLAIN, False),
    ("np.linalg.solve(m + np.eye(4), i)", PLAIN, False),
    ("np.linalg.norm(a)", SCALAR, False),
    ("np.linalg.det(m)", SCALAR, False),
    ("np.linalg.eigh(m + m.T)[0]", PLAIN, False),
    ("np.linalg.qr(m + np.eye(4))", PLAIN, False),
    ("np.linalg.svd(m + np.eye(4))", PLAIN, False),
    ("np.linalg.matrix_power(m, 3)", PLAIN, False),
    ("np.linalg.multi_dot([m, m, m])", PLAIN, False),
    ("np.fft.fft(v)", PLAIN, False),
    ("np.fft.rfft2(a)", PLAIN, False),
    ("np.fft.fftshift(v)", PLAIN, False),
    ("np.char.upper(u)", PLAIN, False),
    ("np.packbits(b)", PLAIN, False),
    ("np.random.default_rng(1).permutation(v)", PLAIN, False),
    ("np.random.default_rng(1).choice(v, 3)", PLAIN, False),
    ("np.fromiter(iter(v), float)", PLAIN, False),
    ("np.nditer([v, None]).operands[1][:0]", PLAIN, False),
    ("[chunk for chunk in np.nditer(v, flags=['external_loop', 'buffered'])]", PLAIN, True),
    # NumPy asks nobody in these: not exact ndarrays, but not paged either.
    ("np.array(a, subok=True)", array._PlainCopy, False),
    ("np.asanyarray(a, dtype=np.float32)", array._PlainCopy, False),
    ("np.array(a, subok=True) + 1", PLAIN, False),
    ("np.array(a, subok=True).sum()", SCALAR, False),
]

# Expressions that answer with the very object named.
IDENTITIES = [
    ("np.asanyarray(a)", "a"),
    ("np.atleast_1d(a)", "a"),
    ("np.asarray_chkfinite(a).base", "a"),
    ("a.astype(float, copy=False)", "a"),
    ("a.conj()", "a"),
    ("a.real", "a"),
    ("a.byteswap(inplace=True)", "a"),
    ("v.sum(out=answer)", "answer"),
    ("np.add(z, z, out=answer)", "answer"),
    ("a.__iadd__(1)", "a"),
    ("a.__imul__(plain)", "a"),
    ("b.__iand__(True)", "b"),
    ("m.__imatmul__(plain[:, :4])", "m"),
    ("np.add(a, 1, out=o)", "o"),
    ("np.add(a, 1, o)", "o"),
    ("np.add(plain, 1, out=o)", "o"),
    ("np.add(a, 1, out=target)", "target"),
    ("np.add(z, z, out=z)", "z"),
    ("np.add.reduce(a, axis=0, out=o[0]).base", "o"),
    ("np.add.reduce(v, out=z)", "z"),
    ("np.add.accumulate(a, out=o)", "o"),
    ("np.modf(a, o, target)[0]", "o"),
    ("np.modf(a, o, target)[1]", "target"),
    ("np.matmul(m, a, out=o)", "o"),
    ("np.sum(v, out=z)", "z"),
    ("v.sum(out=z)", "z"),
    ("v.sum(None, None, z)", "z"),
    ("np.mean(v, out=z)", "z"),
    ("a.cumsum(axis=0, out=o)", "o"),
    ("np.cumsum(a, axis=0, out=o)", "o"),
    ("np.cumsum(a, 0, None, o)", "o"),
    ("a.clip(1, 2, out=o)", "o"),
    ("np.clip(plain, 1, 2, out=o)", "o"),
    ("a.round(1, o)", "o"),
    ("a.take(i, axis=0, out=o)", "o"),
    ("np.take(a, i, axis=0, out=o, mode='clip')", "o"),
    ("plain.take(i, axis=0, out=o)", "o"),
    ("a.argmax(axis=1, out=i)", "i"),
    ("np.concatenate([a[:2], a[2:]], out=o)", "o"),
    ("np.stack([v[:6]] * 4, out=o)", "o"),
    ("np.dot(m, a, out=o)", "o"),
    ("m.dot(a, out=o)", "o"),
    ("np.einsum('ij,jk->ik', m, a, out=o)", "o"),
    ("np.median(v, out=z)", "z"),
    ("np.compress([True] * 4, a, axis=0, out=o)", "o"),
]


class FakeNative:
    """Answers for one range of addresses, as the native module does for regions."""

    def __init__(self, memory: mmap.mmap) -> None:
        whole = np.frombuffer(memory, np.uint8)
        self.start = whole.__array_interface__["data"][0]
        self.end = self.start + whole.size

    def owns(self, address: int) -> bool:
        return self.start <= address < self.end


class FakePool:
    """Remembers what is pinned, and refuses a pin while `full`."""

    memory, page_size = 64 << 10, 4096

    def __init__(self) -> None:
        self.pinned: list[PagedArray] = []
        self.sizes: list[int] = []
        self.full = False

    @contextmanager
    def pin(self, a: PagedArray, writable: bool | None = None) -> Iterator[None]:
        assert type(a) is PagedArray
        assert writable is False
        if self.full:
            raise MemoryError("too many pins")
        self.pinned.append(a)
        self.sizes.append(a.nbytes)
        try:
            yield
        finally:
            self.pinned.pop()


Make = Callable[..., PagedArray]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make paged arrays one behind the other in one stand-in for a region."""
    memory = mmap.mmap(-1, 4 << 20)
    monkeypatch.setattr(array, "native", FakeNative(memory))
    position = 0

    def make_array(shape: Any, dtype: Any = np.float64, order: Any = "C") -> PagedArray:
        nonlocal position
        made: PagedArray = np.ndarray.__new__(
            PagedArray, shape, dtype, memory, position, None, order
        )
        position += max(-made.nbytes // 64 * -64, 64)
        return made

    return make_array


@pytest.fixture
def fake_pool(monkeypatch: pytest.MonkeyPatch) -> FakePool:
    pool = FakePool()
    monkeypatch.setattr(array, "_pool_of", lambda a: pool)
    return pool


def fill(a: np.ndarray[Any, Any]) -> None:
    """Give `a` values that tell its items apart, the same whatever its class."""
    steps = np.arange(a.size).reshape(a.shape)
    if a.dtype == RECORD:
        a["x"] = steps
        a["y"] = steps[:, None] + [0.25, 0.5]
    elif a.dtype.kind == "c":
        a[...] = steps + 0.5j * steps
    elif a.dtype.kind == "b":
        a[...] = steps % 3 == 0
    elif a.dtype.kind == "i":
        a[...] = steps % 4
    elif a.dtype.kind == "f":
        a[...] = (steps * steps) % 29 if a.shape == (4, 4) else steps
    else:
        a[...] = steps.astype(a.dtype)


def names_for(make_array: Callable[..., Any]) -> dict[str, Any]:
    names = {name: make_array(*recipe) for name, recipe in NAMES.items()}
    for made in names.values():
        fill(made)
    plain = np.arange(24.0).reshape(4, 6)
    others = {"plain": plain, "target": np.zeros((4, 6)), "answer": np.zeros(())}
    return {**names, **others, "np": np, "copy": copy, "deque": deque}


def run(expression: str, names: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return eval(expression, dict(names))


def leaves(value: Any) -> list[Any]:
    """Return the arrays and scalars in nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def shares_memory(value: Any, names: dict[str, Any]) -> bool:
    """Whether `value` shares memory with an array that is paged, or stands for a paged one."""
    return isinstance(value, np.ndarray) and any(
        np.may_share_memory(value, names[name]) for name in NAMES
    )


def check_equal(got: Any, expected: Any) -> None:
    assert isinstance(expected, np.ndarray) == isinstance(got, np.ndarray)
    if not isinstance(expected, np.ndarray):
        assert type(got) is type(expected)
    else:
        assert got.shape == expected.shape
        assert got.strides == expected.strides or not got.size
        with warnings.catch_warnings():
            # NumPy warns whoever asks this of what `broadcast_arrays` made.
            warnings.simplefilter("ignore")
            assert got.flags.writeable == expected.flags.writeable
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    assert np.asarray(got).dtype == np.asarray(expected).dtype


def check_row(expression: str, kind: type, shared: bool, names: dict[str, Any]) -> None:
    oracle = names_for(np.empty)
    oracle_results = leaves(run(expression, {**oracle, "type": lambda a: np.ndarray}))
    results = leaves(run(expression, names))
    assert len(results) == len(oracle_results) > 0
    for got, expected in zip(results, oracle_results, strict=True):
        if kind is SCALAR:
            assert isinstance(got, np.generic)
        else:
            assert type(got) is kind
        assert shares_memory(got, names) == shared
        assert shares_memory(expected, oracle) == shared
        check_equal(got, expected)


@pytest.mark.parametrize(("expression", "kind", "shared"), TABLE, ids=[row[0] for row in TABLE])
def test_is_it_paged_exactly_where_its_memory_is(
    make: Make, expression: str, kind: type, shared: bool
) -> None:
    check_row(expression, kind, shared, names_for(make))


@pytest.mark.parametrize(("expression", "name"), IDENTITIES, ids=[row[0] for row in IDENTITIES])
def test_do_in_place_and_out_give_the_same_object(make: Make, expression: str, name: str) -> None:
    names, oracle = names_for(make), names_for(np.empty)
    assert run(expression, names) is names[name]
    run(expression, oracle)
    assert type(names[name]) is (PagedArray if name in NAMES else np.ndarray)
    np.testing.assert_array_equal(np.asarray(names[name]), oracle[name])


def test_does_every_row_hold_in_a_real_pool(pool: Any) -> None:
    def make_array(shape: Any, dtype: Any, order: Any) -> Any:
        return pool.empty(shape, dtype, order=order)

    for expression, kind, shared in TABLE:
        print(expression)
        check_row(expression, kind, shared, names_for(make_array))
    for expression, name in IDENTITIES:
        print(expression)
        names = names_for(make_array)
        assert run(expression, names) is names[name]


# Methods that ndarray has and PagedArray leaves as they are, with the reason.
LEFT_ALONE = {
    "a view": "T mT diagonal getfield newbyteorder real squeeze swapaxes to_device transpose view",
    "asks __array_wrap__, or is plain": "all any clip conj conjugate cumprod cumsum max mean min "
    "nonzero prod ptp round searchsorted std sum trace var",
    "in place": "fill itemset partition put resize setfield setflags sort",
    "no array": "base ctypes data device dtype dump dumps flags item itemsize nbytes ndim shape "
    "size strides tobytes tolist tostring",
    "written here": "tofile",
}


def test_is_every_method_of_ndarray_accounted_for() -> None:
    left_alone = {name for names in LEFT_ALONE.values() for name in names.split()}
    ours = {*array._METHODS, *array._ATTRIBUTES}
    assert not left_alone & ours
    public = {name for name in dir(np.ndarray) if not name.startswith("_")}
    assert public <= left_alone | ours


def functions_of_numpy() -> dict[str, Callable[..., Any]]:
    """Return every ufunc and every function that dispatches by `__array_function__`."""
    found = {}
    for room, module in (("np", np), ("linalg", np.linalg), ("fft", np.fft)):
        for name in dir(module):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function = getattr(module, name)
            if isinstance(function, np.ufunc) or hasattr(function, "_implementation"):
                found[f"{room}.{name}"] = function
    # These write files, print, or give back what memory held.
    for name in ("save", "savez", "savez_compressed", "savetxt", "empty_like", "array_repr"):
        found.pop(f"np.{name}", None)
    return found


CALLS = ["(a)", "(a, a)", "(m)", "(m, m)", "(v)", "(v, v)", "(v, 2)", "(a, 1)", "([a, a])"]
CALLS += ["(z)", "(i)", "(i, i)", "(b)", "(c)", "(u)", "(d)", "(a, axis=0)", "(e)", "(b, a)"]

# For those that none of the calls above suits.
OWN_CALLS = {
    "np.apply_along_axis": "(sum, 0, a)",
    "np.apply_over_axes": "(np.sum, a, [0, 1])",
    "np.astype": "(a, np.float64, copy=False)",
    "np.block": "([[a, a], [a, a]])",
    "np.broadcast_to": "(a, (3, 4, 6))",
    "np.busday_offset": "(d.astype('M8[D]'), i, roll='forward')",
    "np.can_cast": "(a.dtype, 'f4')",
    "np.choose": "(i, [i, i, i, i])",
    "np.clip": "(a, 2, 5)",
    "np.cross": "(a[:, :3], a[:, 3:])",
    "np.dsplit": "(a[None], 3)",
    "np.einsum": "('ij->ji', a)",
    "np.einsum_path": "('ij,jk->ik', a, a.T)",
    "np.geomspace": "(v + 1, 5)",
    "np.insert": "(v, 1, 5)",
    "np.interp": "(v, v, v)",
    "np.is_busday": "(d.astype('M8[D]'))",
    "np.moveaxis": "(a, 0, 1)",
    "np.piecewise": "(v, [v < 3], [0, 1])",
    "np.place": "(a, b, [1, 2])",
    "np.polyfit": "(v, v, 1)",
    "np.put": "(a, [1, 2], 7)",
    "np.put_along_axis": "(a, i[:, None], 8, 1)",
    "np.putmask": "(a, b, 4)",
    "np.ravel_multi_index": "((i, i), (4, 4))",
    "np.reshape": "(a, (6, 4))",
    "np.rollaxis": "(a, 1)",
    "np.select": "([b], [a])",
    "np.swapaxes": "(a, 0, 1)",
    "np.take_along_axis": "(a, i[:, None], 1)",
    "np.unpackbits": "(b.view(np.uint8))",
    "np.unravel_index": "(i, (2, 2))",
    "linalg.cholesky": "(np.eye(4) + 0 * m)",
    "linalg.cross": "(a[:, :3], a[:, 3:])",
    "linalg.matrix_power": "(m, 3)",
    "linalg.multi_dot": "([m, m, m])",
    "linalg.tensorinv": "((m + 99 * np.eye(4)).reshape(2, 2, 2, 2))",
    "linalg.tensorsolve": "(m + 99 * np.eye(4), i)",
}


def call_or_error(call: str, names: dict[str, Any], function: Callable[..., Any]) -> Any:
    """Return the leaves of what the call gives, or the class of what it raises."""
    try:
        return leaves(run("call" + call, {**names, "call": function}))
    except Exception as error:  # noqa: BLE001 (whatever NumPy raises is the answer)
        return type(error)


def calls_for(name: str) -> list[str]:
    return [OWN_CALLS[name], *CALLS] if name in OWN_CALLS else CALLS


@pytest.mark.parametrize("name", functions_of_numpy())
def test_does_every_numpy_function_keep_the_rule(make: Make, name: str) -> None:
    function = functions_of_numpy()[name]
    for call in calls_for(name):
        print(call)
        oracle, names = names_for(np.empty), names_for(make)
        expected = call_or_error(call, oracle, function)
        got = call_or_error(call, names, function)
        if isinstance(expected, type):
            assert got is expected
            continue
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            if not isinstance(theirs, np.ndarray):
                assert type(ours) is type(theirs)
                continue
            shared = shares_memory(theirs, oracle)
            assert shares_memory(ours, names) == shared
            if shared or ours.size:
                assert type(ours) is (PagedArray if shared else np.ndarray)
            np.testing.assert_array_equal(np.asarray(ours), theirs)
        for key in NAMES:
            np.testing.assert_array_equal(np.asarray(names[key]), oracle[key])


def test_does_nearly_every_numpy_function_have_a_call_that_suits_it() -> None:
    functions = functions_of_numpy()
    unanswered = [
        name
        for name, function in functions.items()
        if all(
            isinstance(call_or_error(call, names_for(np.empty), function), type)
            for call in calls_for(name)
        )
    ]
    print(unanswered)
    assert len(functions) > 250
    assert len(unanswered) <= 3


def random_index(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Draw an index of any kind: integers, slices, lists, masks, None and an ellipsis."""
    parts: list[Any] = []
    for length in shape[: rng.integers(0, len(shape) + 1)]:
        kind = rng.integers(0, 6)
        if kind == 0:
            parts.append(int(rng.integers(-length, length)))
        elif kind <= 2:
            start, stop = rng.integers(-length - 1, length + 2, 2)
            parts.append(slice(int(start), int(stop), int(rng.choice([-2, -1, 1, 2]))))
        elif kind == 3:
            parts.append(rng.integers(-length, length, rng.integers(0, 4)).tolist())
        elif kind == 4:
            parts.append(rng.random(length) < 0.5)
        else:
            parts.append(slice(None))
    if rng.random() < 0.3:
        parts.insert(int(rng.integers(0, len(parts) + 1)), None)
    if rng.random() < 0.3:
        parts.insert(int(rng.integers(0, len(parts) + 1)), Ellipsis)
    return tuple(parts)


@pytest.mark.filterwarnings("ignore:Out of bound index found:DeprecationWarning")
@pytest.mark.parametrize("seed", range(20))
def test_do_random_indices_agree_with_ndarray(make: Make, seed: int) -> None:
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    shape = (5, 4, 6)
    a, plain = make(shape, np.int64), np.arange(120).reshape(shape)
    fill(a)
    plain %= 4
    tried = 0
    for _ in range(200):
        index = random_index(rng, shape)
        try:
            expected = plain[index]
        except IndexError:
            with pytest.raises(IndexError):
                a[index]
            continue
        tried += 1
        got = a[index]
        check_equal(got, expected)
        if isinstance(got, np.ndarray) and got.size:
            shared = np.may_share_memory(expected, plain)
            assert np.may_share_memory(got, a) == shared, index
            assert type(got) is (PagedArray if shared else np.ndarray), index
    assert tried > 50


def test_can_a_paged_array_be_made_by_calling_the_class() -> None:
    with pytest.raises(TypeError, match="arrays come from a pool"):
        PagedArray((3,))


def test_can_other_memory_be_viewed_as_paged(make: Make) -> None:
    a = make((3,))
    fill(a)
    for other in (np.zeros(3), np.frombuffer(b"12345678"), a.copy(), a + 1, a[[0, 1]]):
        with pytest.raises(TypeError, match="this memory is not"):
            other.view(PagedArray)
    for make_it in (
        lambda: np.ndarray.__new__(PagedArray, (3,)),
        lambda: np.ndarray.__new__(PagedArray, (0,)),
        lambda: np.ndarray.__new__(PagedArray, (3,), float, bytearray(24)),
    ):
        with pytest.raises(TypeError, match="this memory is not"):
            make_it()


def test_can_an_array_of_no_bytes_be_paged() -> None:
    a: Any = np.ndarray.__new__(PagedArray, (0, 3), float, b"")
    assert type(a) is PagedArray
    assert type(a.T) is PagedArray
    assert type(a.reshape(3, 0)) is PagedArray
    assert type(a + 1) is np.ndarray
    assert a.sum() == 0


def test_does_a_copy_own_its_data_as_ndarrays_do(make: Make) -> None:
    names, oracle = names_for(make), names_for(np.empty)
    for expression in ("a.copy()", "a[[1, 2]]", "a[b]", "a + 1", "np.empty_like(a)", "np.sort(a)"):
        assert run(expression, names).flags.owndata == run(expression, oracle).flags.owndata
        assert run(expression, oracle).flags.owndata


def test_does_a_view_keep_its_region_alive(make: Make) -> None:
    a = make((4, 6))
    region = a.base
    for view in (a.T, a[1:], a.reshape(-1), np.split(a, 2)[0], np.asarray(a), np.flip(a)):
        root = view
        while isinstance(root, np.ndarray):
            root = root.base
        assert root is region


def test_do_writes_through_attributes_reach_the_array(make: Make) -> None:
    names = names_for(make)
    names["a"].flat = 3
    assert (np.asarray(names["a"]) == 3).all()
    names["c"].imag = 7
    assert (np.asarray(names["c"]).imag == 7).all()
    names["c"].real[:] = 2
    assert (np.asarray(names["c"]).real == 2).all()
    names["a"].flat[2:4] = 9
    assert np.asarray(names["a"])[0].tolist() == [3, 3, 9, 9, 3, 3]


IN_PLACE = [
    "np.copyto(a, 5)",
    "np.copyto(a, -plain, where=b)",
    "np.put(a, [1, 2], 7)",
    "np.place(a, b, [1, 2])",
    "np.putmask(a, b, 4)",
    "np.fill_diagonal(a, 9)",
    "np.put_along_axis(a, i[:, None], 8, axis=1)",
    "np.add.at(a, (i, i), 1)",
    "np.random.default_rng(3).shuffle(a)",
    "a[::-1].sort(axis=0)",
    "a[:, ::-1].partition(2)",
    "np.negative(a, a).sort()",
    "a.fill(3)",
    "a.put([0], 4)",
    "a.__setitem__((i, i), 2)",
    "a.__setitem__(b, 2)",
    "a.T.__setitem__(0, 3)",
    "np.reshape(a, -1).__setitem__(5, 11)",
    "np.clip(a, 3, 9, a)",
]


@pytest.mark.parametrize("expression", IN_PLACE)
def test_do_functions_that_write_in_place_write_in_the_array(make: Make, expression: str) -> None:
    names, oracle = names_for(make), names_for(np.empty)
    run(expression, names)
    run(expression, oracle)
    np.testing.assert_array_equal(np.asarray(names["a"]), oracle["a"])
    assert not np.array_equal(oracle["a"], names_for(np.empty)["a"])


def test_does_it_print_as_an_ndarray_of_its_name(make: Make) -> None:
    names, oracle = names_for(make), names_for(np.empty)
    for name in NAMES:
        a, plain = names[name], oracle[name]
        assert str(a) == str(plain)
        assert repr(a).startswith("PagedArray(")
        # The longer name moves the line breaks, nothing else.
        assert repr(a).replace("PagedArray", "array").split() == repr(plain).split()
        assert np.array_repr(a) == repr(a)
        assert np.array_str(a) == str(plain)
        assert np.array2string(a) == np.array2string(plain)
    assert f"{names['z']:.2f}" == "0.00"


class AnswersAll:
    """Another array class that answers every ufunc and function itself."""

    seen: tuple[Any, ...] = ()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> str:
        self.seen = inputs
        return "its ufunc"

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> str:
        self.seen = args
        return "its function"


class RefusesUfuncs:
    __array_ufunc__ = None

    def __radd__(self, other: Any) -> str:
        return f"its sum with a {type(other).__name__}"


class AnswersFunctions(np.ndarray):
    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return "the subclass"


def test_do_other_array_classes_get_their_turn(make: Make) -> None:
    a, other = make((3,)), AnswersAll()
    for answer in (lambda: a + other, lambda: other + a, lambda: np.add(a, other)):
        assert answer() == "its ufunc"
        assert any(value is a for value in other.seen)
    for answer in (lambda: np.concatenate([a, other]), lambda: np.dot(other, a)):
        assert answer() == "its function"
    assert other.seen[1] is a
    assert a + RefusesUfuncs() == "its sum with a PagedArray"
    with pytest.raises(TypeError):
        np.add(a, RefusesUfuncs())
    sub = np.zeros(3).view(AnswersFunctions)
    assert np.concatenate([a, sub]) == "the subclass"
    assert np.concatenate([sub, a]) == "the subclass"


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore:Importing from numpy.matlib:PendingDeprecationWarning")
def test_do_other_subclasses_answer_as_they_do_to_ndarrays(make: Make, tmp_path: Path) -> None:
    names = names_for(make)
    paged, plain = names["m"], np.array(names["m"])
    mapped = np.memmap(tmp_path / "mapped", float, "w+", shape=(4, 4))
    others = [
        np.matrix(plain),
        np.ma.masked_array(plain, plain > 3),
        mapped,
        np.rec.fromarrays([plain[0]], names="x").x,
    ]
    for other in others:
        for combine in (
            lambda x, y: x + y,
            lambda x, y: y * x,
            lambda x, y: np.vstack([x, y]),
            np.maximum,
        ):
            got, expected = combine(paged, other), combine(plain, other)
            # Of a memmap and a paged array, neither lends its class to what is in fresh memory.
            mapped_only = type(expected) is np.memmap
            assert type(got) is (np.ndarray if mapped_only else type(expected))
            np.testing.assert_array_equal(got, expected)
    assert type(paged.view(np.matrix)) is np.matrix
    assert type(np.ma.masked_array(paged).data) is PagedArray


def test_does_a_subclass_of_a_users_own_keep_the_rule(make: Make) -> None:
    class Mine(PagedArray):
        pass

    a = make((4, 6))
    fill(a)
    mine = a.view(Mine)
    assert type(mine) is Mine
    assert type(mine[1:]) is Mine
    assert type(mine + 1) is np.ndarray
    assert type(mine.copy()) is np.ndarray
    assert type(np.sort(mine)) is np.ndarray
    with pytest.raises(TypeError, match="arrays come from a pool"):
        Mine((3,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", NAMES)
def test_does_it_pickle_by_value_as_a_plain_array(make: Make, name: str, protocol: int) -> None:
    a = names_for(make)[name]
    loaded = pickle.loads(pickle.dumps(a, protocol))
    assert type(loaded) is np.ndarray
    assert loaded.dtype == a.dtype
    assert loaded.flags.f_contiguous == a.flags.f_contiguous
    np.testing.assert_array_equal(loaded, np.asarray(a))
    assert b"pyswap" not in pickle.dumps(a, protocol)
    assert b"pyswap" not in pickle.dumps(np.array(a, subok=True), protocol)


class ChecksBuffers:
    """A file that asks of each large write whether it is the array's own memory."""

    def __init__(self, a: PagedArray) -> None:
        self.a, self.own = np.asarray(a), 0

    def write(self, data: Any) -> int:
        seen = np.frombuffer(data, np.uint8)
        if np.may_share_memory(seen, self.a):
            self.own += seen.nbytes
        return seen.nbytes


@pytest.mark.parametrize("order", ["C", "F"])
def test_does_protocol_5_pickle_without_a_copy(make: Make, order: str) -> None:
    a = make((256, 512), np.float64, order)
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(a, 5, buffer_callback=buffers.append)
    assert len(head) < 1000
    assert np.may_share_memory(np.frombuffer(buffers[0].raw(), np.uint8), a)
    again = pickle.loads(head, buffers=[bytearray(buffers[0].raw())])
    assert type(again) is np.ndarray
    np.testing.assert_array_equal(again, np.asarray(a))
    sink = ChecksBuffers(a)
    tracemalloc.start()
    try:
        pickle.dump(a, sink, 5)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sink.own == a.nbytes
    assert peak_bytes < a.nbytes // 4


def test_does_cloudpickle_take_it_by_value(make: Make) -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    a = names_for(make)["a"]
    loaded = pickle.loads(cloudpickle.dumps({"a": a, "f": lambda: a}))
    assert type(loaded["a"]) is np.ndarray
    assert type(loaded["f"]()) is np.ndarray


TO_WRITE = {
    "C order": lambda n: n["a"],
    "F order": lambda n: n["f"],
    "one axis": lambda n: n["v"],
    "a step": lambda n: n["v"][::3],
    "backwards": lambda n: n["v"][::-1],
    "a window": lambda n: n["a"][1:3, 2:5],
    "one item of a step": lambda n: n["v"][::20][:1],
    "no axes": lambda n: n["z"],
    "no items": lambda n: n["e"],
    "an empty view": lambda n: n["v"][24:],
    "broadcast": lambda n: np.broadcast_to(n["i"], (3, 4)),
    "bool": lambda n: n["b"],
    "complex": lambda n: n["c"],
    "records": lambda n: n["s"],
    "a field": lambda n: n["s"]["y"],
    "times": lambda n: n["d"],
    "text": lambda n: n["u"],
}


@pytest.mark.parametrize("which", TO_WRITE)
def test_does_tofile_write_what_ndarray_writes(
    make: Make, fake_pool: FakePool, tmp_path: Path, which: str
) -> None:
    a = TO_WRITE[which](names_for(make))
    assert type(a) is PagedArray
    path = tmp_path / "out"
    for target in (path, str(path), os.fsencode(path)):
        path.write_bytes(b"longer than what is written" * 100)
        a.tofile(target)
        assert path.read_bytes() == np.asarray(a).tobytes()
    for sep, form in ((" ", "%s"), (",\n", "<%s>")):
        if a.dtype != RECORD:
            a.tofile(path, sep, form)
            expected = tmp_path / "expected"
            np.asarray(a).tofile(expected, sep, form)
            assert path.read_bytes() == expected.read_bytes()


MODES = ["wb", "w+b", "ab", "r+b", "raw wb", "raw r+b"]


@pytest.mark.parametrize("mode", MODES)
def test_does_tofile_leave_a_file_object_where_ndarray_does(
    make: Make, fake_pool: FakePool, tmp_path: Path, mode: str
) -> None:
    a = names_for(make)["a"]
    results = []
    for number, writes in enumerate((a, np.asarray(a))):
        path = tmp_path / str(number)
        path.write_bytes(bytes(range(250)) * 4)
        buffering = 0 if mode.startswith("raw") else -1
        with open(path, mode.removeprefix("raw "), buffering=buffering) as file:
            file.write(b"head")
            if "r+" in mode:
                file.seek(100)
                file.read(7)
            writes.tofile(file)
            positions = [file.tell()]
            file.write(b"tail")
            writes[1:].tofile(file)
            positions.append(file.tell())
        results.append((path.read_bytes(), positions))
    assert results[0] == results[1]


def test_does_tofile_write_to_a_pipe(make: Make, fake_pool: FakePool) -> None:
    a = make((256, 512))
    fill(a)
    reading, writing = os.pipe()
    got: list[bytes] = []
    with open(reading, "rb") as source, open(writing, "wb") as sink:
        reader = threading.Thread(target=lambda: got.append(source.read()))
        reader.start()
        sink.write(b"head")
        a.tofile(sink)
        sink.close()
        reader.join()
    assert got[0] == b"head" + np.asarray(a).tobytes()


def test_does_tofile_refuse_what_is_no_file(
    make: Make, fake_pool: FakePool, tmp_path: Path
) -> None:
    a = make((3,))
    with pytest.raises(io.UnsupportedOperation):
        a.tofile(io.BytesIO())
    with pytest.raises(TypeError):
        a.tofile(5)
    with pytest.raises(FileNotFoundError):
        a.tofile(tmp_path / "missing" / "file")
    path = tmp_path / "read only"
    path.write_bytes(b"kept")
    with open(path, "rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        a.tofile(file)
    assert path.read_bytes() == b"kept"


class Writes:
    """Stands in for os.write: takes a few bytes a call, and checks that they are safe."""

    def __init__(self, pool: FakePool, a: PagedArray, at_most_bytes: int) -> None:
        self.pool, self.a, self.at_most_bytes = pool, a, at_most_bytes
        self.write = os.write
        self.room_bytes = 1 << 30
        self.calls = self.from_pool = 0

    def __call__(self, descriptor: int, data: Any) -> int:
        self.calls += 1
        if self.room_bytes <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        seen = np.frombuffer(data, np.uint8)
        assert seen.nbytes <= FakePool.memory // 4
        if np.may_share_memory(seen, self.a):
            self.from_pool += 1
            assert any(np.may_share_memory(seen, piece) for piece in self.pool.pinned)
        written = self.write(descriptor, data[: min(self.at_most_bytes, self.room_bytes)])
        self.room_bytes -= written
        return written


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("at_most_bytes", [1000, 1 << 30])
def test_is_what_tofile_hands_to_the_kernel_pinned_or_private(
    make: Make,
    fake_pool: FakePool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    at_most_bytes: int,
) -> None:
    a = make((100, 513), np.float64, order)
    fill(a)
    writes = Writes(fake_pool, a, at_most_bytes)
    monkeypatch.setattr(os, "write", writes)
    a.tofile(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == np.asarray(a).tobytes()
    assert fake_pool.pinned == []
    if order == "C":
        assert writes.from_pool == writes.calls
        assert sum(fake_pool.sizes) == a.nbytes
        assert set(fake_pool.sizes[:-1]) == {FakePool.memory // 4}
    else:
        assert writes.from_pool == 0
        assert fake_pool.sizes == []


def test_is_a_piece_never_smaller_than_a_page_nor_larger_than_the_bound(
    make: Make, fake_pool: FakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = make((100, 512))
    monkeypatch.setattr(array, "PIN_PIECE_BYTES", 8192)
    a.tofile(tmp_path / "out")
    assert set(fake_pool.sizes) == {8192}
    fake_pool.sizes.clear()
    monkeypatch.setattr(FakePool, "memory", 8192)
    a.tofile(tmp_path / "out")
    assert set(fake_pool.sizes) == {4096}


def test_does_tofile_do_without_pins_when_there_is_no_room(
    make: Make, fake_pool: FakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = make((100, 513))
    fill(a)
    fake_pool.full = True
    writes = Writes(fake_pool, a, 1 << 30)
    monkeypatch.setattr(os, "write", writes)
    a.tofile(tmp_path / "out")
    assert writes.calls > 1
    assert writes.from_pool == 0
    assert (tmp_path / "out").read_bytes() == np.asarray(a).tobytes()


@pytest.mark.parametrize("order", ["C", "F"])
def test_does_a_full_disk_leave_the_file_at_what_was_written(
    make: Make,
    fake_pool: FakePool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
) -> None:
    a = make((100, 513), np.float64, order)
    fill(a)
    writes = Writes(fake_pool, a, 1 << 30)
    writes.room_bytes = 50_000
    with open(tmp_path / "out", "w+b") as file:
        file.write(b"head")
        monkeypatch.setattr(os, "write", writes)
        with pytest.raises(OSError, match="No space left"):
            a.tofile(file)
        monkeypatch.undo()
        assert file.tell() == 50_004
    assert fake_pool.pinned == []
    assert (tmp_path / "out").read_bytes() == b"head" + np.asarray(a).tobytes()[:50_000]


def test_does_a_file_that_takes_nothing_end_tofile(
    make: Make, fake_pool: FakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(OSError, match="24 bytes not written"):
        make((3,)).tofile(tmp_path / "out")


@pytest.mark.parametrize("which", ["C order", "F order", "a window", "records", "no items"])
def test_does_save_write_through_tofile(
    make: Make, fake_pool: FakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    a = TO_WRITE[which](names_for(make))
    called: list[PagedArray] = []
    tofile = PagedArray.tofile
    monkeypatch.setattr(
        PagedArray, "tofile", lambda self, *args: [called.append(self), tofile(self, *args)][1]
    )
    path = tmp_path / "a.npy"
    np.save(path, a)
    np.save(tmp_path / "expected.npy", np.asarray(a))
    assert path.read_bytes() == (tmp_path / "expected.npy").read_bytes()
    assert len(called) == 1
    with open(path, "wb") as file:
        np.save(file, a)
        np.save(file, a)
    with open(path, "rb") as file:
        for _ in range(2):
            np.testing.assert_array_equal(np.load(file), np.asarray(a))


def test_do_archives_and_buffers_take_a_paged_array(
    make: Make, fake_pool: FakePool, tmp_path: Path
) -> None:
    names = names_for(make)
    buffer = io.BytesIO()
    np.save(buffer, names["f"])
    buffer.seek(0)
    np.testing.assert_array_equal(np.load(buffer), np.asarray(names["f"]))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "both.npz", names["a"], f=names["f"])
        with np.load(tmp_path / "both.npz") as archive:
            np.testing.assert_array_equal(archive["arr_0"], np.asarray(names["a"]))
            np.testing.assert_array_equal(archive["f"], np.asarray(names["f"]))


def test_does_an_array_larger_than_memory_reach_a_file_in_a_real_pool(
    pool: Any, tmp_path: Path
) -> None:
    a = pool.empty((256, 8192), np.float64)
    assert a.nbytes == 2 * pool.memory
    expected = np.arange(a.size, dtype=np.float64).reshape(a.shape)
    a[...] = expected
    path = tmp_path / "out"
    a.tofile(path)
    np.testing.assert_array_equal(np.fromfile(path).reshape(a.shape), expected)
    a.T.tofile(path)
    np.testing.assert_array_equal(np.fromfile(path).reshape(a.T.shape), expected.T)
    for saved, wanted in ((a, expected), (a.T, expected.T), (a[:, 1:], expected[:, 1:])):
        np.save(tmp_path / "a.npy", saved)
        loaded = np.load(tmp_path / "a.npy", mmap_mode="r")
        assert loaded.flags.f_contiguous == wanted.flags.f_contiguous
        np.testing.assert_array_equal(loaded, wanted)


def test_do_results_of_an_array_larger_than_memory_agree_in_a_real_pool(pool: Any) -> None:
    a = pool.zeros((256, 8192), np.float64)
    expected = np.arange(a.size, dtype=np.float64).reshape(a.shape)
    a[...] = expected
    a += 1
    assert type(a) is PagedArray
    np.testing.assert_array_equal(a.sum(axis=0), (expected + 1).sum(axis=0))
    np.testing.assert_array_equal(a[::7, [5, 3]], expected[::7, [5, 3]] + 1)
    halves = np.split(a, 2)
    assert [type(half) for half in halves] == [PagedArray, PagedArray]
    halves[1][...] = 5
    assert (np.asarray(a)[128:] == 5).all()
    loaded = pickle.loads(pickle.dumps(a[:4], 5))
    assert type(loaded) is PagedArray
    assert np.shares_memory(loaded, a[:4])
    np.testing.assert_array_equal(loaded, expected[:4] + 1)
