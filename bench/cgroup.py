"""`Cgroup`: a memory control group of the bench's own, version 1 or 2."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from .undo import undone

__all__ = ["Cgroup", "join", "parents"]

_REMOVE_S = 10.0
_POLL_S = 0.02


def join(folder: str) -> None:
    """Put this process into the control group at `folder`."""
    Path(folder, "cgroup.procs").write_text(str(os.getpid()))


def parents() -> Iterator[tuple[Path, int]]:
    """Yield folders in which to make a group, this process's own first, and their version."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for mount in psutil.disk_partitions(all=True):
        root = Path(mount.mountpoint)
        if mount.fstype == "cgroup" and "memory" in mount.opts.split(","):
            yield root / own.get("memory", "/").lstrip("/"), 1
            yield root, 1
        elif mount.fstype == "cgroup2":
            yield root / own.get("", "/").lstrip("/"), 2
            yield root, 2


class Cgroup:
    """A memory control group.

    Parameters
    ----------
    folder : Path
        Where it is mounted.
    version : int
        1 or 2.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self.folder = folder
        self.version = version

    @classmethod
    @contextlib.contextmanager
    def made(cls, limit_bytes: int) -> Iterator[Cgroup]:
        """Make a group with a memory limit; it is empty and gone after the block.

        Raises
        ------
        OSError
            If this user may make none: the reason for the last place tried.
        """
        last = OSError(errno.ENOENT, "no memory controller is mounted")
        for parent, version in parents():
            group = cls(parent / f"pyswap-bench-{os.getpid()}", version)
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(undone(group.remove))
                    group.folder.mkdir()
                    group.limit(limit_bytes)
                except OSError as error:
                    last = error
                    continue
                yield group
                return
        raise last

    def limit(self, limit_bytes: int) -> None:
        """Set the memory limit; swap is not limited."""
        if self.version == 1:
            (self.folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
            return
        if not (self.folder / "memory.max").exists():
            (self.folder.parent / "cgroup.subtree_control").write_text("+memory")
        (self.folder / "memory.max").write_text(str(limit_bytes))

    def settings(self) -> dict[str, object]:
        """Return what the kernel says about the group's limits."""
        names = (
            ("memory.limit_in_bytes", "memory.swappiness")
            if self.version == 1
            else ("memory.max", "memory.swap.max")
        )
        told = {n: (self.folder / n).read_text().strip() for n in names}
        return {"version": self.version, **told}

    def kills(self) -> int:
        """Return how many of its processes the kernel killed because the limit was reached."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        lines = (line.split() for line in (self.folder / name).read_text().splitlines())
        return sum(int(value) for key, value in lines if key == "oom_kill")

    def remove(self) -> None:
        """End the group's processes and take it away.

        Raises
        ------
        OSError
            If it stays: a process cannot end.
        """
        deadline = time.monotonic() + _REMOVE_S
        while self.folder.exists():
            for pid in (self.folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self.folder.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)
