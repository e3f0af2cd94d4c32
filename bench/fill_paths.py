"""What a page costs on its way in: read into the store, or read into a buffer and written to it.

Run by `python -m bench.fill_paths`.  Time by GB, elapsed and this process's CPU time, the ways in
turn; the read is O_DIRECT, from a file in the temporary folder, and the pages are punched again
behind, as reclaim does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from .limits import aligned

_TOTAL = 1 << 30
_PIECE = 1 << 20
_RESIDENT = 64
"""Pieces that stay before they are punched."""
_ROUNDS = 5
_PUNCH = 3
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _punch(fd: int, offset: int, size: int) -> None:
    if _libc.fallocate(fd, _PUNCH, offset, size):
        raise OSError(ctypes.get_errno(), "fallocate")


def _measure(store: int, fill: Callable[[int], None]) -> tuple[float, float]:
    """Milliseconds by GB, elapsed and CPU time, of filling the whole store piece by piece."""
    begin, before = time.perf_counter(), _cpu_s()
    for at in range(0, _TOTAL, _PIECE):
        fill(at)
        if at >= _RESIDENT * _PIECE:
            _punch(store, at - _RESIDENT * _PIECE, _PIECE)
    _punch(store, 0, _TOTAL)
    scale = 1e3 / (_TOTAL / 1e9)
    return (time.perf_counter() - begin) * scale, (_cpu_s() - before) * scale


def main() -> None:
    """Print the medians, in milliseconds by GB."""
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir()
    file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    small, huge = (aligned(_PIECE, huge=huge).data for huge in (False, True))
    for at in range(0, _TOTAL, _PIECE):
        os.pwrite(file, small, at)
    store = os.memfd_create("store")
    os.ftruncate(store, _TOTAL)
    alias = mmap.mmap(store, _TOTAL)
    alias.madvise(mmap.MADV_NOHUGEPAGE)
    view = memoryview(alias)

    def straight(at: int) -> None:
        os.posix_fallocate(store, at, _PIECE)
        os.preadv(file, [view[at : at + _PIECE]], at)

    def through(buffer: memoryview) -> Callable[[int], None]:
        def fill(at: int) -> None:
            os.preadv(file, [buffer], at)
            os.pwrite(store, buffer, at)

        return fill

    ways = {
        "straight": straight,
        "through a buffer": through(small),
        "through one in a huge page": through(huge),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, fill in ways.items():
            taken[name].append(_measure(store, fill))
    for name, times in taken.items():
        elapsed, cpu = zip(*times, strict=True)
        print(
            f"{name:27}{statistics.median(elapsed):6.0f} ms/GB ({min(elapsed):.0f}-"
            f"{max(elapsed):.0f}), CPU {statistics.median(cpu):.0f}"
        )


if __name__ == "__main__":
    main()
