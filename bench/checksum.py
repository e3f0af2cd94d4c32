"""What checksums cost: how fast a page's is computed, and its share of a fill and of a write.

Run by `python -m bench.checksum`.  The bytes are those of a buffer far larger than the caches, so
that they come from memory, as a page's do.  A fill is an O_DIRECT read of a page into a buffer and
a write to the store; a write is an O_DIRECT one from the store, eight MiB a call.
"""

from __future__ import annotations

import mmap
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from pyswap._native import native

_TOTAL = 256 << 20
_PAGE = 64 << 10
_BATCH = 8 << 20
_ROUNDS = 5


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _measure(do: Callable[[int], object], step: int) -> tuple[float, float]:
    """Elapsed and CPU seconds by GB of doing it for each piece of _TOTAL; the medians."""
    elapsed, cpu = [], []
    for _ in range(_ROUNDS):
        begin, before = time.perf_counter(), _cpu_s()
        for at in range(0, _TOTAL, step):
            do(at)
        elapsed.append((time.perf_counter() - begin) / (_TOTAL / 1e9))
        cpu.append((_cpu_s() - before) / (_TOTAL / 1e9))
    return statistics.median(elapsed), statistics.median(cpu)


def main() -> None:
    """Print GB/s of the checksum, and what part of a fill's and of a write's time it takes."""
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir()
    file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    store = os.memfd_create("store")
    os.ftruncate(store, _TOTAL)
    alias = mmap.mmap(store, _TOTAL)
    alias.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, _TOTAL, _BATCH):
        alias[at : at + _BATCH] = os.urandom(_BATCH)
    view = memoryview(alias)
    buffer = mmap.mmap(-1, _PAGE)

    def fill(at: int) -> None:
        os.preadv(file, [buffer], at)
        os.pwrite(store, buffer, at)

    for page in (4 << 10, _PAGE):

        def sum_up(at: int, n: int = page) -> int:
            return int(native.checksum(view[at : at + _BATCH], n))

        alone_s, _ = _measure(sum_up, _BATCH)
        print(f"checksums of {page >> 10:2} KiB pages   {1 / alone_s:6.1f} GB/s")

    def write(at: int) -> None:
        os.pwrite(file, view[at : at + _BATCH], at)

    written_s, written_cpu_s = _measure(write, _BATCH)
    filled_s, filled_cpu_s = _measure(fill, _PAGE)
    for name, took_s, cpu_s in (
        ("a write", written_s, written_cpu_s),
        ("a fill", filled_s, filled_cpu_s),
    ):
        print(
            f"{name:8} {1 / took_s:6.2f} GB/s without; the checksum is "
            f"{alone_s / (took_s + alone_s):5.1%} of its time, "
            f"{alone_s / (cpu_s + alone_s):5.1%} of its CPU time"
        )


if __name__ == "__main__":
    main()
