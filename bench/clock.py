"""CPU time of a process, read off the kernel's clock for it."""

from __future__ import annotations

import time

__all__ = ["cpu_seconds"]


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process, its threads together, to the nanosecond.

    Raises
    ------
    OSError
        If there is no such process.
    """
    # See clock_getcpuclockid(3): the complement of the id, and 2 for the scheduler's own count.
    return time.clock_gettime((~pid << 3) | 2)
