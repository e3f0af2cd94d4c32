"""Ten NumPy kernels on arrays that are resident: what paged memory costs when all fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .plan import Plan
from .share import check

__all__ = ["KERNELS", "measure"]

Array = npt.NDArray[Any]
SQUARE = 768
"""Rows and columns of the matrices multiplied, at most."""


class Operands:
    """Three arrays of floats, and what indexes them.

    Parameters
    ----------
    make : callable
        Returns an array of a shape and dtype, as `numpy.empty` does.
    plan : Plan
        For the sizes and the seed: all three arrays fit the budget half.
    """

    def __init__(self, make: Callable[[Any, Any], Array], plan: Plan) -> None:
        count = plan.budget_bytes // 8 // 6
        random = np.random.default_rng(plan.seed)
        self.a, self.b, self.c = (make(count, np.float64) for _ in range(3))
        self.a[:] = random.random(count)
        self.b[:] = random.random(count)
        self.c[:] = 0.0
        side = min(SQUARE, math.isqrt(count))
        self.squares = [x[: side * side].reshape(side, side) for x in (self.a, self.b, self.c)]
        self.picks = random.integers(0, count, count // 4)
        self.mask = random.random(count) < 0.5

    def unsort(self) -> None:
        """Undo what sorting did."""
        self.c[:] = self.a


def _multiply_add(o: Operands) -> Array:
    np.multiply(o.a, o.b, out=o.c)
    return np.add(o.c, o.a, out=o.c)


def _sort(o: Operands) -> Array:
    o.c.sort()
    return o.c


def _assign(o: Operands) -> Array:
    o.c[:] = o.b
    return o.c


KERNELS: dict[str, Callable[[Operands], Any]] = {
    "sum": lambda o: o.a.sum(),
    "add": lambda o: np.add(o.a, o.b, out=o.c),
    "multiply-add": _multiply_add,
    "dot": lambda o: np.dot(o.a, o.b),
    "matmul": lambda o: np.matmul(o.squares[0], o.squares[1], out=o.squares[2]),
    "sort": _sort,
    "cumsum": lambda o: np.cumsum(o.a, out=o.c),
    "take": lambda o: np.take(o.a, o.picks),
    "boolean mask": lambda o: o.a[o.mask],
    "assignment": _assign,
}


def measure(make: Callable[[Any, Any], Array], plan: Plan) -> dict[str, float]:
    """Time every kernel.

    Returns
    -------
    dict
        Seconds of the fastest of `plan.repeats`, by kernel: what disturbs a run only adds to it.

    Raises
    ------
    WrongResultError
        If a kernel's result is not what it is on plain arrays.
    """
    operands = Operands(make, plan)
    plain = Operands(np.empty, plan)
    expected = {}
    for name, kernel in KERNELS.items():
        plain.unsort()
        expected[name] = np.array(kernel(plain)).sum()
    del plain
    seconds = {}
    for name, kernel in KERNELS.items():
        times = []
        for _ in range(plan.repeats + 1):
            operands.unsort()
            begin = time.perf_counter()
            result = kernel(operands)
            times.append(time.perf_counter() - begin)
        check(np.allclose(np.array(result).sum(), expected[name]), f"{name} is wrong")
        seconds[name] = min(times[1:])
    return seconds
