"""This user's live pools, found by their swappers: what the commands `ls` and `stat` show.

A swapper's control segment is opened for reading only, through /proc, as only its user may.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from ._native import native
from .stats import Stats

__all__ = ["LivePool", "live_pools"]

_MARK = "from pyswap.swapper import main"
_CONTROL = ("/dev/shm/pyswap.control.", "/memfd:pyswap.control")


class LivePool:
    """A pool of this user's, seen from outside; it is told nothing, and may end at any time.

    Parameters
    ----------
    name : str
        Its name.
    fd : int
        Its control segment, open for reading; the object's from here on.
    """

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self._fd = fd
        self._control = native.Control(fd)

    def __del__(self) -> None:
        os.close(self._fd)

    @property
    def swapper_pid(self) -> int:
        """The process id of its swapper."""
        return int(self._control.numbers()["swapper_pid"])

    def is_alive(self) -> bool:
        """Tell whether the pool has not ended."""
        return not self._control.ended() and psutil.pid_exists(self.swapper_pid)

    def processes(self) -> list[int]:
        """Return the process ids of its workers."""
        return sorted(self._control.workers())

    def stats(self) -> Stats:
        """Return its numbers now, as `Pool.stats` does."""
        metadata_bytes = os.fstat(self._fd).st_blocks * 512
        return Stats.of(self._control.numbers(), metadata_bytes, len(self.processes()))


def live_pools() -> list[LivePool]:
    """Find this user's live pools, in the order of their names."""
    found = [pool for pid in _swappers() for pool in _opened(pid) if pool.is_alive()]
    return sorted(found, key=lambda pool: (pool.name, pool.swapper_pid))


def _swappers() -> Iterator[int]:
    for process in psutil.process_iter():
        try:
            if process.uids().effective != os.geteuid():
                continue
            if any(_MARK in word for word in process.cmdline()):
                yield process.pid
        except psutil.Error:
            continue


def _opened(pid: int) -> Iterator[LivePool]:
    """Yield the pool of a swapper; nothing where it has just begun or ended."""
    folder = Path(f"/proc/{pid}/fd")
    try:
        name = _name(psutil.Process(pid).cmdline()) or f"swapper-{pid}"
        files = [folder / fd for fd in os.listdir(folder)]
        control = next((f for f in files if os.readlink(f).startswith(_CONTROL)), None)
        if control is not None:
            pool = LivePool(name, os.open(control, os.O_RDONLY | os.O_CLOEXEC))
            if pool.swapper_pid == pid:
                yield pool
    except (OSError, ValueError, psutil.Error):
        return


def _name(command: list[str]) -> str | None:
    """Read a pool's name from what its swapper was started with."""
    try:
        setup = json.loads(command[-1])
    except (IndexError, ValueError):
        return None
    return str(setup["name"]) if isinstance(setup, dict) and "name" in setup else None
