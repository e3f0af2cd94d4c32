"""Plain NumPy with room for everything: what could be had without a budget."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.plan import Plan

from .base import Array, Kind, Make, Peer

__all__ = ["Plain", "mapped"]


def mapped(
    shape: Sequence[int], dtype: np.dtype[Any], *, shared: bool, huge: bool | None = None
) -> Array:
    """Make an array of zeros in anonymous memory of its own; None has the kernel's own pages."""
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=kind | mmap.MAP_ANONYMOUS)
    if huge is not None:
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class Plain(Peer):
    """Arrays as NumPy makes them; several processes share anonymous memory.

    Parameters
    ----------
    huge : bool
        Whether NumPy may ask for huge pages, which it does by default.
    """

    def __init__(self, huge: bool) -> None:
        self.name = "numpy" if huge else "numpy-4k"
        self.title = "plain NumPy" if huge else "plain NumPy, 4 KiB pages"
        self._huge = huge
        self.environment = {} if huge else {"NUMPY_MADVISE_HUGEPAGE": "0"}

    @contextlib.contextmanager
    def opened(self, plan: Plan) -> Iterator[Make]:
        """Yield what makes arrays."""

        def make(shape: Any, dtype: Any, kind: Kind) -> Array:
            if kind == "alone":
                return np.empty(shape, dtype)
            huge = self._huge if kind == "private" else None
            return mapped(shape, np.dtype(dtype), shared=kind == "shared", huge=huge)

        yield make
