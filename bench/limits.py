"""The limits: what the device, the memory and userfaultfd could do with nothing above them."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .native import load
from .plan import ROW_BYTES, Plan

__all__ = ["LIMITS", "SPOT_BYTES", "Limit", "aligned"]

LARGE_BYTES = 1 << 20
_HUGE_BYTES = 2 << 20
SPOT_BYTES = 2 << 20
"""How far apart the pages are that measure a fault: further than anyone maps around one."""
_SPOTS = 1024


def aligned(size_bytes: int, *, huge: bool) -> npt.NDArray[Any]:
    """Random bytes in memory that direct I/O can use, in huge pages if the kernel has any."""
    whole = -(-size_bytes // _HUGE_BYTES) * _HUGE_BYTES
    memory = mmap.mmap(-1, whole + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    view = np.frombuffer(memory, np.uint8)
    begin = -view.ctypes.data % _HUGE_BYTES
    view = view[begin : begin + size_bytes]
    view[:] = np.random.default_rng(1).integers(0, 256, size_bytes, dtype=np.uint8)
    return view


def device_rate(
    plan: Plan, *, writing: bool, piece_bytes: int, threads: int, huge: bool = True
) -> float:
    """Transfer by direct I/O between memory and the plan's area.

    Parameters
    ----------
    plan : Plan
        Its array's size is what is transferred in order, in pieces over 4 KiB; smaller ones are
        an eighth of its operations, at random.
    writing : bool
        Whether the area is written or read.
    piece_bytes : int
        Bytes of one system call.
    threads : int
        Calls in flight.
    huge : bool
        Whether the memory is in huge pages: to a disk each is one piece, which takes less time.

    Returns
    -------
    float
        Bytes a second.
    """
    native = load(plan.native)
    pieces = plan.array_bytes // piece_bytes
    if piece_bytes > ROW_BYTES:
        numbers = np.arange(pieces)
    else:
        numbers = np.random.default_rng(plan.seed).integers(0, pieces, plan.operations // 8)
    offsets = numbers.astype(np.int64) * piece_bytes
    fd = os.open(plan.area, (os.O_RDWR if writing else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC)
    try:
        memory = aligned(piece_bytes * threads, huge=huge)
        address = memory.ctypes.data
        workers = [
            threading.Thread(
                target=native.transfer,
                args=(fd, writing, offsets[i::threads].copy(), address + i * piece_bytes),
                kwargs={"size_bytes": piece_bytes},
            )
            for i in range(threads)
        ]
        begin = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return len(offsets) * piece_bytes / (time.monotonic() - begin)
    finally:
        os.close(fd)


def memory_copy_rate(plan: Plan) -> float:
    """Copy the budget's bytes from one plain array to another; return bytes a second."""
    source = np.ones(plan.budget_bytes // 8)
    target = np.zeros_like(source)
    begin = time.monotonic()
    np.copyto(target, source)
    return source.nbytes / (time.monotonic() - begin)


def round_trip_ns(plan: Plan) -> float:
    """Measure a minor fault that another process resolves, doing nothing else.

    Returns
    -------
    float
        Nanoseconds from the touch of a resident page that is not mapped to its bytes: a wake-up
        of the other process, one UFFDIO_CONTINUE, a wake-up of this one.
    """
    native = load(plan.native)
    page_bytes = mmap.PAGESIZE
    store = os.memfd_create("pyswap-bench", os.MFD_CLOEXEC)
    os.ftruncate(store, _SPOTS * SPOT_BYTES)
    for i in range(_SPOTS):
        os.pwrite(store, b"\1" * page_bytes, i * SPOT_BYTES)
    view = np.frombuffer(mmap.mmap(store, _SPOTS * SPOT_BYTES), np.uint8)
    start = view.ctypes.data
    fd = native.open_registered(start, view.size)
    child = os.fork()
    if child == 0:
        try:
            native.serve(fd, _SPOTS, page_bytes)
        finally:
            os._exit(0)
    spots = np.random.default_rng(plan.seed).permutation(_SPOTS).astype(np.uint64)
    taken = native.touch_all(np.uint64(start) + spots * np.uint64(SPOT_BYTES))
    os.waitpid(child, 0)
    os.close(fd)
    os.close(store)
    return float(taken) / _SPOTS


@dataclass(frozen=True)
class Limit:
    """Something that the machine can do at best.

    Attributes
    ----------
    name, title : str
        For the command line; for tables.
    unit : str
        Of what `measure` returns: "bytes" or "operations" a second, or "nanoseconds".
    measure : callable
        Measures it as a plan says.
    """

    name: str
    title: str
    unit: str
    measure: Callable[[Plan], float]


def _accesses(threads: int) -> Callable[[Plan], float]:
    def measure(plan: Plan) -> float:
        rate = device_rate(plan, writing=False, piece_bytes=ROW_BYTES, threads=threads)
        return rate / ROW_BYTES

    return measure


def _stream(*, writing: bool, huge: bool = True) -> Callable[[Plan], float]:
    return lambda plan: device_rate(
        plan, writing=writing, piece_bytes=LARGE_BYTES, threads=4, huge=huge
    )


_ALL = (
    Limit("device-read", "device, read 1 MiB x 4", "bytes", _stream(writing=False)),
    Limit("device-write", "device, write 1 MiB x 4", "bytes", _stream(writing=True)),
    Limit(
        "device-read-small",
        "device, read 1 MiB x 4 into 4 KiB pages",
        "bytes",
        _stream(writing=False, huge=False),
    ),
    Limit(
        "device-write-small",
        "device, write 1 MiB x 4 from 4 KiB pages",
        "bytes",
        _stream(writing=True, huge=False),
    ),
    Limit("device-4k-1", "device, read 4 KiB x 1", "operations", _accesses(1)),
    Limit("device-4k-8", "device, read 4 KiB x 8", "operations", _accesses(8)),
    Limit("memory-copy", "memory copy", "bytes", memory_copy_rate),
    Limit("userfaultfd", "bare userfaultfd round trip", "nanoseconds", round_trip_ns),
)

LIMITS = {limit.name: limit for limit in _ALL}
"""The limits, by name."""
