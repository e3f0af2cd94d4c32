"""np.memmap: a file of the array's size, and as much page cache as the budget allows."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.plan import Plan

from .base import Array, Counters, Kind, Make, Peer

__all__ = ["MemoryMapped"]


class MemoryMapped(Peer):
    """A memory-mapped file in the bench's folder, in a control group as the kernel's swap is."""

    name = "memmap"
    title = "np.memmap"
    limits_memory = True

    @contextlib.contextmanager
    def arranged(self, plan: Plan) -> Iterator[dict[str, object]]:
        """Tell the settings."""
        yield {"file": "preallocated by ftruncate", "flags": "MAP_SHARED"}

    @contextlib.contextmanager
    def opened(self, plan: Plan) -> Iterator[Make]:
        """Yield what maps a new file, which is gone in the end."""
        with tempfile.TemporaryFile(prefix="pyswap-bench-", dir=plan.folder) as file:

            def make(shape: Any, dtype: Any, kind: Kind) -> Array:
                return np.memmap(file, dtype, "r+", shape=_grown(file, shape, dtype))

            yield make

    def counters(self) -> Counters:
        """Return this machine's counters of KiB read and written by all devices."""
        lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return {name: int(value) for name, value in lines if name in ("pgpgin", "pgpgout")}

    def moved(self, grown: Counters) -> bool:
        """Say whether pages were written and read."""
        return grown["pgpgin"] > 0 and grown["pgpgout"] > 0


def _grown(file: Any, shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    """Make the file as long as the array, and return the array's shape."""
    file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return shape
