"""The swap file behind the swapper's back, and what a process says when a touch fails."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from failpoints import until

WORDS = 512
"""64-bit words of a page of 4 KiB."""


def numbered(pool: Any, pages: int, **options: Any) -> Any:
    """Return an array of a page a row, row i full of i + 1: resident and dirty."""
    a = pool.zeros((pages, WORDS), np.int64, **options)
    a[:] = np.arange(1, pages + 1)[:, None]
    return a


def is_numbered(a: Any) -> bool:
    """Whether a `numbered` array is as it was made."""
    return bool((a == np.arange(1, len(a) + 1)[:, None]).all())


def page_out(pool: Any, a: Any) -> None:
    """Have every page of a view in swap, and none in memory."""

    def is_out() -> bool:
        pool.advise(a, "pageout")
        return not pool.residency(a).any()

    until(is_out, "the pages are in swap")


class SwapFile:
    """A swap file without a name, by way of a descriptor that the swapper holds.

    Parameters
    ----------
    pool
        Whose swap file it is.
    folder
        Where it was made; of several there, the one with the highest descriptor.
    """

    def __init__(self, pool: Any, folder: Path | str = "/") -> None:
        held = Path(f"/proc/{pool.swapper_pid}/fd")
        self.page_bytes = int(pool.page_size)
        found = [int(fd) for fd in os.listdir(held) if self._is_swap(held / fd, str(folder))]
        assert found, f"the swapper holds no swap file in {folder}"
        self.fd = os.open(held / str(max(found)), os.O_RDWR | os.O_CLOEXEC)

    @staticmethod
    def _is_swap(fd: Path, folder: str) -> bool:
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            return False
        return (
            target.startswith(folder)
            and target.endswith("(deleted)")
            and not target.startswith(("/dev/", "/memfd:", "/proc/"))
        )

    def __enter__(self) -> SwapFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.fd).st_size

    def words(self) -> npt.NDArray[np.int64]:
        """Read all of it: a row of words a slot."""
        content = os.pread(self.fd, self.size, 0)
        return np.frombuffer(content, np.int64).reshape(-1, self.page_bytes // 8)

    def slot_of(self, value: int) -> int:
        """Find the one slot that is full of a value."""
        (slots,) = np.nonzero((self.words() == value).all(axis=1))
        assert len(slots) == 1, f"{len(slots)} slots are full of {value}"
        return int(slots[0])

    def read(self, slot: int) -> bytes:
        """Read the bytes of a slot."""
        return os.pread(self.fd, self.page_bytes, slot * self.page_bytes)

    def write(self, slot: int, content: bytes) -> None:
        """Write over a slot, past whoever thinks that it is his."""
        assert os.pwrite(self.fd, content, slot * self.page_bytes) == self.page_bytes
        os.fdatasync(self.fd)

    def flip(self, slot: int, bit: int) -> None:
        """Change one bit of a slot."""
        content = bytearray(self.read(slot))
        content[bit // 8] ^= 1 << bit % 8
        self.write(slot, bytes(content))


def ending(do: Callable[[], object], told: Path) -> tuple[int, list[str]]:
    """Do something in a forked process, whose stderr goes to the file `told`.

    Returns
    -------
    number : int
        The signal that ended it; 0 if it came to its end.
    lines : list of str
        What it, or its attendant, said.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
            do()
            status = 0
        finally:
            os._exit(status)
    ended: list[int] = []

    def has_ended() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.append(status)
        return bool(found)

    try:
        until(has_ended, "the end of the process that touches")
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    lines = told.read_text().splitlines()
    assert os.WIFSIGNALED(ended[0]) or os.WEXITSTATUS(ended[0]) == 0, lines
    return os.WTERMSIG(ended[0]) if os.WIFSIGNALED(ended[0]) else 0, lines
