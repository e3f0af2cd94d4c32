"""The files behind a pool: shared memory segments and the swap file, none of which has a name.

Every function returns an open file descriptor of something that is already unlinked, or was never
linked, so that whatever ends the process leaves nothing behind. The one exception is a segment's
name between its making and its unlinking, two system calls later: it carries its maker's pid and
start time, and `remove_stale_segments()` recognises what a kill -9 in between left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import re
import resource
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import posix_ipc

from pyswap.settings import Settings, is_tmpfs
from pyswap.sizes import format_size

__all__ = ["create_segment", "open_swap", "remove_stale_segments"]

MAX_SEGMENT_BYTES = 1 << 46
STALE_AGE_S = 60.0
"""Seconds after which a name is taken for left behind though its maker seems to be alive."""

_SHM_FOLDER = Path("/dev/shm")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,32}")
_MADE_NAME = re.compile(r"pyswap\.[A-Za-z0-9_-]{1,32}\.([0-9]{1,10})\.([0-9]{1,20})\.[0-9a-f]{16}")
_MFD_NOEXEC_SEAL = 0x0008
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)

_log = logging.getLogger("pyswap")


def create_segment(label: str, size: int, resident_bytes: int) -> int:
    """Make a shared memory object that is full of zeros, sparse, and has no name.

    Parameters
    ----------
    label : str
        What it is for, in 1 to 32 letters, digits, underscores and hyphens.
    size : int
        Bytes, from 1 to 2^46. A hole costs nothing.
    resident_bytes : int
        The most bytes of it that will be in memory at once. Where ``/dev/shm`` has less room, is
        no tmpfs or cannot be used, the object is made by memfd_create instead, which is logged.

    Returns
    -------
    int
        A file descriptor, open for reading and writing and closed on exec. The caller owns it.

    Raises
    ------
    ValueError
        If the label or one of the sizes is out of bounds.
    OSError
        With errno EFBIG if `size` is over RLIMIT_FSIZE, EMFILE if this process may not open
        another file, and whatever else the kernel says.
    """
    if not _LABEL.fullmatch(label):
        raise ValueError(f"a segment's label must be 1 to 32 letters or digits, not {label!r}")
    if not 0 <= resident_bytes <= size or not 0 < size <= MAX_SEGMENT_BYTES:
        raise ValueError(
            f"a segment has 1 to {MAX_SEGMENT_BYTES} bytes and at most as many resident, "
            f"not {size} and {resident_bytes}"
        )
    what = f"the {label} segment"
    _check_file_limit(size, what)
    fd = _open_in_dev_shm(label, resident_bytes)
    if fd is None:
        fd = _open_memfd(label)
    try:
        # The umask may have taken bits from the mode that was asked for, and a memfd has others.
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        _check_is_ours(fd, size, what)
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove_stale_segments() -> list[str]:
    """Unlink names in ``/dev/shm`` that makers of this user left behind when they were killed.

    A name exists for the time of two system calls, and nobody ever opens a segment by it, so
    that removing one too early does no harm: its maker holds the file descriptor and finds the
    name gone when it comes to unlink it. This is what makes the rule safe across PID namespaces
    that share a ``/dev/shm``, where a living maker looks dead from here:

    * no process of this namespace has the maker's pid and start time: removed at once;
    * one has: removed only when the name is older than `STALE_AGE_S`, for then its maker is
      stopped between the two calls, or is a stranger with the same numbers.

    Returns
    -------
    list of str
        The names removed, with their leading slash.
    """
    return ["/" + name for name in _remove_stale(_SHM_FOLDER, min_age_s=0.0)]


def open_swap(settings: Settings) -> tuple[int, bool]:
    """Make the swap file, with all its room reserved and no name.

    The file has no name from the start (O_TMPFILE), in the folder or beside the new file that
    the settings name. Where the file system has no such files, it is made exclusively under a
    name and unlinked at once.

    Parameters
    ----------
    settings : Settings
        Of these, `swap_path`, `swap_is_file`, `swap_bytes` and `page_size`.

    Returns
    -------
    fd : int
        A file descriptor, open for reading and writing and closed on exec; -1 for no swap. The
        caller owns it.
    is_direct : bool
        Whether transfers bypass the page cache (O_DIRECT). False where the file system cannot,
        which is logged as a warning.

    Raises
    ------
    FileExistsError
        If a new file was asked for and something has that name by now.
    OSError
        With errno ENOSPC and both sizes if the disk has not the room, EFBIG if the size is over
        RLIMIT_FSIZE, and whatever else the kernel says. Nothing is left behind.
    """
    if settings.swap_bytes == 0 or settings.swap_path is None:
        return -1, False
    _check_file_limit(settings.swap_bytes, "the swap file")
    folder = settings.swap_path.parent if settings.swap_is_file else settings.swap_path
    fd = _open_unnamed(settings.swap_path, folder, settings.swap_is_file)
    try:
        _reserve(fd, settings.swap_bytes, folder)
        is_direct = _set_direct(fd, settings.page_size, folder)
    except BaseException:
        os.close(fd)
        raise
    if is_tmpfs(folder):
        _log.warning("swap in %s is on a tmpfs: it takes the memory that it should save", folder)
    return fd, is_direct


def _check_file_limit(size: int, what: str) -> None:
    """Refuse what the kernel would answer with SIGXFSZ, which by default kills a process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and size > limit:
        raise OSError(
            errno.EFBIG,
            f"{what} takes a file of {format_size(size)} ({size} bytes), but this process is "
            f"limited to {limit} bytes a file (RLIMIT_FSIZE, ulimit -f)",
        )


def _open_in_dev_shm(label: str, resident_bytes: int) -> int | None:
    """Make an unlinked file in /dev/shm; None, with the reason logged, where that cannot be."""
    reason = _why_not_dev_shm(resident_bytes)
    if reason is None:
        name = f"/{_made_name(label)}"
        try:
            return int(posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600).fd)
        except (OSError, posix_ipc.Error) as error:
            reason = f"the system says: {error}"
        finally:
            # By name and in any case: an interrupt may come before the object is returned.
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(name)
    _log.info("the %s segment is a memfd and not in %s: %s", label, _SHM_FOLDER, reason)
    return None


def _why_not_dev_shm(resident_bytes: int) -> str | None:
    try:
        if not is_tmpfs(_SHM_FOLDER):
            return "it is no tmpfs"
        room = os.statvfs(_SHM_FOLDER)
    except OSError as error:
        return f"it cannot be used ({error.strerror})"
    free_bytes = room.f_bavail * room.f_frsize
    # A tmpfs without a bound has 0 blocks.
    if room.f_blocks and free_bytes < resident_bytes:
        return (
            f"up to {format_size(resident_bytes)} ({resident_bytes} bytes) will be resident, "
            f"and it has {format_size(free_bytes)} ({free_bytes} bytes) free"
        )
    return None


def _open_memfd(label: str) -> int:
    try:
        # Without NOEXEC_SEAL the call is refused where the sysctl vm.memfd_noexec is 2.
        return os.memfd_create(f"pyswap.{label}", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        reason = f"cannot make the {label} segment: {error.strerror}"
        if error.errno == errno.EMFILE:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            reason += f" (this process is limited to {limit}, RLIMIT_NOFILE, ulimit -n)"
        raise OSError(error.errno, reason) from None


def _check_is_ours(fd: int, size: int, what: str) -> None:
    """Refuse an object that is not exactly what was asked for, whoever made it so."""
    found = os.fstat(fd)
    is_private = stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    if found.st_uid != os.geteuid() or not is_private or found.st_size != size:
        raise OSError(
            errno.EPERM,
            f"{what} is not as it was made: owner {found.st_uid}, mode {found.st_mode:o}, "
            f"{found.st_size} of {size} bytes",
        )


def _made_name(label: str) -> str:
    pid = os.getpid()
    return f"pyswap.{label}.{pid}.{_start_time(pid)}.{secrets.token_hex(8)}"


def _start_time(pid: int) -> int | None:
    """Read when a process started, in clock ticks from boot; None where none such lives."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name, which may hold blanks and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    is_dead = fields[0] in "ZX"
    return None if is_dead else int(fields[19])


def _remove_stale(folder: Path, min_age_s: float) -> list[str]:
    """Unlink stale names in `folder` that are at least `min_age_s` old; the names removed."""
    removed = []
    for name in _stale_names(folder, min_age_s):
        try:
            os.unlink(folder / name)
        except OSError as error:
            if error.errno != errno.ENOENT:
                _log.warning(
                    "cannot remove %s, left by a dead process: %s", folder / name, str(error)
                )
            continue
        _log.info("removed %s, left by a dead process", folder / name)
        removed.append(name)
    return removed


def _stale_names(folder: Path, min_age_s: float) -> Iterator[str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        match = _MADE_NAME.fullmatch(name)
        if match is None:
            continue
        try:
            found = os.lstat(folder / name)
        except OSError:
            continue
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            continue
        age_s = time.time() - found.st_mtime
        is_alive = _start_time(int(match[1])) == int(match[2])
        if age_s >= (STALE_AGE_S if is_alive else min_age_s):
            yield name


def _open_unnamed(path: Path, folder: Path, is_file: bool) -> int:
    """Make a file without a name in `folder`, open for reading and writing."""
    if is_file and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "swap_path exists by now", str(path))
    # With O_EXCL nobody can give the file a name later, through /proc.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_EXCL
    try:
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    # Hosts may share the folder, and another host's processes all look dead: wait for an age.
    _remove_stale(folder, min_age_s=STALE_AGE_S)
    name = path if is_file else folder / _made_name("swap")
    fd = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    os.unlink(name)
    return fd


def _reserve(fd: int, swap_bytes: int, folder: Path) -> None:
    """Give the file its size and, where the file system can, its blocks, without writing them."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    # Where the kernel cannot, glibc writes to every block, which takes minutes. It gives up with
    # EBADF, before the first write, for a file that is open for appending.
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_APPEND)
    try:
        os.posix_fallocate(fd, 0, swap_bytes)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EOPNOTSUPP):
            raise _cannot_reserve(error, swap_bytes, folder) from None
        _log.warning(
            "the file system of %s cannot reserve the %s of swap: it may run out of room later",
            folder,
            format_size(swap_bytes),
        )
        try:
            os.ftruncate(fd, swap_bytes)
        except OSError as truncate_error:
            raise _cannot_reserve(truncate_error, swap_bytes, folder) from None
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _cannot_reserve(error: OSError, swap_bytes: int, folder: Path) -> OSError:
    room = os.statvfs(folder)
    free_bytes = room.f_bavail * room.f_frsize
    return OSError(
        error.errno,
        f"cannot reserve {format_size(swap_bytes)} ({swap_bytes} bytes) of swap, where "
        f"{format_size(free_bytes)} ({free_bytes} bytes) are free: {error.strerror}",
        str(folder),
    )


def _set_direct(fd: int, page_size: int, folder: Path) -> bool:
    """Switch the page cache off for `fd`, and say whether that worked.

    Some file systems accept the flag and refuse the transfer, so one page is written as well:
    zeros at the start of a file that is all zeros.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, page_size) as zeros:
            os.pwrite(fd, zeros, 0)
        return True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            reason = f"cannot write a page of swap: {error.strerror}"
            raise OSError(error.errno, reason, str(folder)) from None
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    _log.warning("no O_DIRECT in %s: swap goes through the page cache, twice in memory", folder)
    return False
