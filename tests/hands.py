"""What tests of interleavings do to an array, in actors that run into failpoints."""

from __future__ import annotations

from typing import Any

import numpy as np


def rows(pool: Any, pages: int, name: str | None = None, *, private: bool = False) -> Any:
    """An array of a page a row, row i full of i + 1; resident and dirty."""
    a = pool.zeros((pages, pool.page_size // 8), np.int64, name=name, private=private)
    a[:] = np.arange(1, pages + 1)[:, None]
    return a


def page_out(pool: Any, a: Any) -> None:
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()


class Hands:
    """What an `Actor` does: ("read", page), ("write", page, value), or the name of an advice."""

    def __init__(self, pool: Any, a: Any) -> None:
        self._pool = pool
        self._a = a

    def quiet(self) -> None:
        """No readahead and no fault-around: one page a fault."""
        self._pool.advise(self._a, "random")

    def __call__(self, question: Any) -> Any:
        if question[0] == "read":
            return int(self._a[question[1], 0])
        if question[0] == "write":
            self._a[question[1]] = question[2]
            return question[2]
        return self._pool.advise(self._a, question[0])
