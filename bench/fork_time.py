"""What a fork costs with private arrays, beside the same as anonymous memory.

Run by `python -m bench.fork_time [page size]`.  Both have 8 GiB of addresses, of which 256 MiB are
in memory and were written before each fork; the two in turn.  Printed are the parent's time in
`os.fork`, and the time until the child, which touches nothing, has ended and was waited for.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import pyswap

ADDRESS_BYTES = 8 << 30
RESIDENT_BYTES = 256 << 20
ROUNDS = 15


@contextlib.contextmanager
def paged(page_size: str | None) -> Iterator[Any]:
    """Yield the resident part of a private array."""
    memory = RESIDENT_BYTES * 5 // 4
    with pyswap.Pool(memory, memory, page_size=page_size, overcommit=True) as pool:
        a = pool.zeros(ADDRESS_BYTES, np.uint8, private=True)
        yield a[:RESIDENT_BYTES]


@contextlib.contextmanager
def anonymous() -> Iterator[Any]:
    """Yield the resident part of plain anonymous memory on 4 KiB pages."""
    memory = mmap.mmap(-1, ADDRESS_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    yield np.frombuffer(memory, np.uint8)[:RESIDENT_BYTES]


def fork_once(a: Any) -> tuple[float, float]:
    """Write every page of it, fork, and wait; seconds of the fork, and of all."""
    a[::4096] += 1
    begin = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    forked = time.perf_counter()
    os.waitpid(pid, 0)
    return forked - begin, time.perf_counter() - begin


def main() -> None:
    """Print the medians in milliseconds, and their ratios."""
    page_size = sys.argv[1] if len(sys.argv) > 1 else None
    taken: dict[str, list[tuple[float, float]]] = {"anonymous memory": [], "pyswap": []}
    # The first of each is not counted: page tables are made then.
    for number in range(ROUNDS + 1):
        for name, opened in (("anonymous memory", anonymous()), ("pyswap", paged(page_size))):
            with opened as a:
                fork_once(a)
                times = fork_once(a)
            if number:
                taken[name].append(times)
    for which, what in enumerate(("fork()", "fork to wait")):
        medians = {n: statistics.median(t[which] for t in times) for n, times in taken.items()}
        for name, median in medians.items():
            values = [t[which] * 1e3 for t in taken[name]]
            print(
                f"{what:13} {name:17} {median * 1e3:7.2f} ms ({min(values):.2f}-{max(values):.2f})"
            )
        print(f"{what:13} ratio {medians['anonymous memory'] / medians['pyswap']:19.2f}")


if __name__ == "__main__":
    main()
