"""This user's living pools, and shared memory by name: files that only this user can read.

A pool's file has its address, and goes with its swapper.  What a kill -9 of everything leaves is
recognised by its socket, which the kernel took back, and removed by whoever looks next.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .address import Address, is_gone
from .errors import Error, PoolClosedError

__all__ = ["claim", "find_pool", "folder", "look_up", "register", "withdraw"]

_log = logging.getLogger("pyswap")

_FILE_BYTES = 1 << 16


def folder() -> Path:
    """Return where this user's files are: ``$XDG_RUNTIME_DIR/pyswap`` or ``/tmp/pyswap-<uid>``."""
    given = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    with suppress(OSError):
        found = os.stat(given)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            return Path(given) / "pyswap"
    return Path(f"/tmp/pyswap-{os.geteuid()}")


@contextmanager
def _opened() -> Iterator[int]:
    """Open the folder, made where it is not there, if it is this user's and nobody else's."""
    path = folder()
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    # A link that somebody planted is not followed.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(
                f"{path} must be this user's alone: it is of uid {found.st_uid}, mode "
                f"{stat.S_IMODE(found.st_mode):o}; remove it, or set XDG_RUNTIME_DIR"
            )
        yield fd
    finally:
        os.close(fd)


def register(address: Address) -> Path | None:
    """Note a new pool; None, with the reason logged, where that cannot be."""
    name = f"{address.socket}.pool"
    try:
        with _opened() as where:
            _remove_stale(where)
            _write(where, name, {"address": address})
    except OSError as error:
        _log.warning("pyswap: pool %r cannot be attached by its name: %s", address.pool, str(error))
        return None
    return folder() / name


def find_pool(name: str) -> Address:
    """Find a living pool of this user by its name.

    Raises
    ------
    PoolClosedError
        If there is none.
    Error
        If there are several of this name.
    """
    with _opened() as where:
        _remove_stale(where)
        records = [_read(where, each) for each in os.listdir(where) if each.endswith(".pool")]
    addresses: list[Address] = [record["address"] for record in records if record is not None]
    found = [address for address in addresses if address.pool == name]
    if not found:
        raise PoolClosedError(f"this user has no pool {name!r} here, or it is closed")
    if len(found) > 1:
        raise Error(f"{len(found)} pools are called {name!r}: give each a name of its own")
    return found[0]


# Shared memory by name.


def claim(name: str, record: dict[str, Any]) -> None:
    """Take a name for what `record`, with the pool's address in it, tells of.

    Raises
    ------
    FileExistsError
        If it is taken.
    """
    with _opened() as where:
        _remove_stale(where)
        _write(where, f"{_quoted(name)}.shm", record)


def look_up(name: str) -> dict[str, Any]:
    """Read what a name stands for.

    Raises
    ------
    FileNotFoundError
        If nobody has taken it, or its pool has ended.
    """
    with _opened() as where:
        record = _read(where, f"{_quoted(name)}.shm")
        if record is None or is_gone(record["address"]):
            raise FileNotFoundError(f"no shared memory of this user is called {name!r}")
        return record


def withdraw(name: str) -> None:
    """Give a name back; FileNotFoundError where nobody has it."""
    with _opened() as where:
        os.unlink(f"{_quoted(name)}.shm", dir_fd=where)


def _quoted(name: str) -> str:
    """A name as a file's: any text, and none with a meaning to file systems."""
    name = name.lstrip("/")
    return "shm-" + name.encode().hex() if len(name) <= 100 else "shm-" + _digest(name)


def _digest(name: str) -> str:
    import hashlib

    return hashlib.sha256(name.encode()).hexdigest()


def _write(where: int, name: str, record: dict[str, Any]) -> None:
    """Make a file in one step: nobody ever reads half of it."""
    data = json.dumps(record).encode()
    draft = f"{name}.{os.getpid()}.draft"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(draft, flags, 0o600, dir_fd=where)
    try:
        os.write(fd, data)
        os.link(draft, name, src_dir_fd=where, dst_dir_fd=where)
    finally:
        os.close(fd)
        os.unlink(draft, dir_fd=where)


def _read(where: int, name: str) -> dict[str, Any] | None:
    """Read a file; None where it is not there, or not one of ours."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return None
        record = json.loads(os.read(fd, _FILE_BYTES))
        record["address"] = Address(*record["address"])
    except (ValueError, TypeError, KeyError):
        return None
    else:
        return dict(record)
    finally:
        os.close(fd)


def _remove_stale(where: int) -> None:
    for name in os.listdir(where):
        record = _read(where, name)
        if record is not None and is_gone(record["address"]):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=where)
