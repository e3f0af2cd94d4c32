"""What a page costs on its way in: read into the store, or read into a buffer and written to it.

Run by `python -m bench.fill_paths`.  CPU time of this process by GB, the two ways in turn; the
read is O_DIRECT, from a file in the temporary folder, and the pages are punched again behind, as
reclaim does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable

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


def _measure(store: int, fill: Callable[[int], None]) -> float:
    """CPU seconds by GB of filling the whole store piece by piece."""
    before = _cpu_s()
    for at in range(0, _TOTAL, _PIECE):
        fill(at)
        if at >= _RESIDENT * _PIECE:
            _punch(store, at - _RESIDENT * _PIECE, _PIECE)
    _punch(store, 0, _TOTAL)
    return (_cpu_s() - before) / (_TOTAL / 1e9)


def main() -> None:
    """Print the medians, in milliseconds of CPU time by GB, and their ratio."""
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir()
    file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    buffer = mmap.mmap(-1, _PIECE)
    buffer.write(os.urandom(_PIECE))
    for at in range(0, _TOTAL, _PIECE):
        os.pwrite(file, buffer, at)
    store = os.memfd_create("store")
    os.ftruncate(store, _TOTAL)
    alias = mmap.mmap(store, _TOTAL)
    alias.madvise(mmap.MADV_NOHUGEPAGE)
    view = memoryview(alias)

    def straight(at: int) -> None:
        os.posix_fallocate(store, at, _PIECE)
        os.preadv(file, [view[at : at + _PIECE]], at)

    def through_a_buffer(at: int) -> None:
        os.preadv(file, [buffer], at)
        os.pwrite(store, buffer, at)

    ways = {"straight": straight, "through a buffer": through_a_buffer}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, fill in ways.items():
            taken[name].append(_measure(store, fill) * 1e3)
    for name, times in taken.items():
        print(
            f"{name:18} {statistics.median(times):6.0f} ms/GB ({min(times):.0f}-{max(times):.0f})"
        )
    pairs = zip(taken["through a buffer"], taken["straight"], strict=True)
    print(f"ratio              {statistics.median(a / b for a, b in pairs):6.2f}")


if __name__ == "__main__":
    main()
