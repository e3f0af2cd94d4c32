"""How fast a folder's disk is for swap: transfers of a file without a name, past the page cache."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["DiskSpeed", "measure"]

CHUNK_BYTES = 4 << 20
PAGE_BYTES = 64 << 10
MOST_BYTES = 256 << 20
"""The largest file; a disk with less than four times that free gets a smaller one."""
STEP_S = 0.3
"""Seconds that each of the four measurements may take."""


@dataclass(frozen=True)
class DiskSpeed:
    """What a folder's disk does.

    Attributes
    ----------
    is_direct : bool
        Whether transfers bypass the page cache (O_DIRECT).
    write_bytes_s, read_bytes_s : float
        Bytes a second, of long transfers one after the other.
    page_read_s : float
        Seconds that reading 64 KiB somewhere takes: the least that a fault from swap costs.
    """

    is_direct: bool
    write_bytes_s: float
    read_bytes_s: float
    page_read_s: float


def measure(folder: str | os.PathLike[str]) -> DiskSpeed:
    """Measure a folder's disk, in little more than a second and at most 256 MiB of its room.

    Raises
    ------
    OSError
        If this user can make no file there, or it has room for less than a transfer.
    """
    room = os.statvfs(folder)
    most = min(MOST_BYTES, room.f_bavail * room.f_frsize // 4) if room.f_blocks else MOST_BYTES
    count = most // CHUNK_BYTES
    if count == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with (
        tempfile.TemporaryFile(dir=folder, buffering=0) as file,
        mmap.mmap(-1, CHUNK_BYTES) as buffer,
    ):
        fd = file.fileno()
        # A disk or a file system that compresses would do nothing with zeros.
        buffer[:] = random.Random(1).randbytes(CHUNK_BYTES)
        is_direct = _set_direct(fd, buffer)

        def write(i: int) -> int:
            return os.pwrite(fd, buffer, i * CHUNK_BYTES)

        def read(i: int) -> int:
            return os.preadv(fd, [buffer], i * CHUNK_BYTES)

        def read_page(i: int) -> int:
            return os.preadv(fd, [page], i * PAGE_BYTES)

        # Extending a file is slower than writing over it, which is what swap does.
        written = _steps(write, iter(range(count)))[0]
        filled = written // CHUNK_BYTES
        os.fsync(fd)
        done, took_s = _steps(write, iter(range(filled)), lambda: os.fdatasync(fd))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        got, read_s = _steps(read, iter(range(filled)))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        somewhere = random.Random(2)
        places = (somewhere.randrange(written // PAGE_BYTES) for _ in range(1 << 20))
        with memoryview(buffer)[:PAGE_BYTES] as page:
            pages, page_s = _steps(read_page, places)
    return DiskSpeed(is_direct, done / took_s, got / read_s, page_s / (pages // PAGE_BYTES))


def _set_direct(fd: int, buffer: mmap.mmap) -> bool:
    """Switch the page cache off; some file systems take the flag and refuse the transfer."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.pwrite(fd, buffer, 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def _steps(
    step: Callable[[int], int], places: Iterator[int], after: Callable[[], object] | None = None
) -> tuple[int, float]:
    """Do steps until there are no more or the time is over: bytes done, and seconds it took."""
    done = 0
    begin = time.perf_counter()
    for place in places:
        done += step(place)
        if time.perf_counter() - begin > STEP_S:
            break
    if after is not None:
        after()
    return done, time.perf_counter() - begin
