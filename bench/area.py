"""`Area`: a file written in full once, for the kernel to swap to and to measure the device with."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .undo import undone

__all__ = ["made", "named", "swapped_on", "take_stale_away"]

_log = logging.getLogger("pyswap.bench")
_PREFIX = "pyswap-bench-"
_PIECE_BYTES = 4 << 20
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def named(folder: Path, suffix: str) -> Iterator[Path]:
    """Make an empty file of the bench's; it is gone after the block."""
    fd, name = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}-", suffix=suffix, dir=folder)
    os.close(fd)
    path = Path(name)
    with undone(lambda: path.unlink(missing_ok=True)):
        yield path


@contextlib.contextmanager
def made(folder: Path, size_bytes: int, seed: int) -> Iterator[Path]:
    """Make a file of random bytes, none of them in the page cache; it is gone after the block.

    Raises
    ------
    OSError
        If the disk has no room, or no direct I/O.
    """
    with named(folder, ".area") as path:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            _write(path, size_bytes, seed)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield path


def _write(path: Path, size_bytes: int, seed: int) -> None:
    piece = mmap.mmap(-1, _PIECE_BYTES)
    piece.write(np.random.default_rng(seed).bytes(_PIECE_BYTES))
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        for offset in range(0, size_bytes, _PIECE_BYTES):
            left = min(_PIECE_BYTES, size_bytes - offset)
            with memoryview(piece) as whole, whole[:left] as part:
                written = os.pwrite(fd, part, offset)
            if written != left:
                raise OSError(f"{path}: {written} of {left} bytes written at {offset}")
    finally:
        os.close(fd)
        piece.close()


def _swap_off(path: str) -> None:
    """Take a swap file out of use; what is in it comes back into memory."""
    is_on = any(line.startswith(path) for line in Path("/proc/swaps").read_text().splitlines())
    if is_on and _libc.swapoff(os.fsencode(path)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"swapoff: {os.strerror(number)}", path)


@contextlib.contextmanager
def swapped_on(area: str) -> Iterator[None]:
    """Have the kernel swap to an area inside the block.

    Raises
    ------
    OSError
        If this user may not, or the file system cannot hold swap.
    """
    tool = shutil.which("mkswap", path=os.environ.get("PATH", os.defpath) + ":/sbin:/usr/sbin")
    if tool is None:
        raise OSError("mkswap is not installed")
    told = subprocess.run([tool, "-f", area], capture_output=True, text=True, check=False)
    if told.returncode != 0:
        raise OSError(f"mkswap: {told.stderr.strip()}")
    with undone(lambda: _swap_off(area)):
        if _libc.swapon(os.fsencode(area), 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"swapon: {os.strerror(number)}", area)
        yield


def take_stale_away(folder: Path) -> None:
    """Remove what a bench that was killed in the middle left in `folder`."""
    for path in folder.glob(f"{_PREFIX}*.*"):
        owner = re.match(rf"{_PREFIX}(\d+)-", path.name)
        if owner and not Path("/proc", owner[1]).exists():
            _log.warning("%s was left by a bench that was killed: it is removed", path)
            with contextlib.suppress(OSError):
                _swap_off(str(path))
                path.unlink()
