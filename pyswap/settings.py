"""What a pool is made with: every argument of `Pool()`, checked before anything changes.

`resolve()` turns the arguments into a `Settings`, with one function for each argument. Nothing
here makes a file, a segment or a process that outlives the call, so a refused argument leaves
nothing behind.
"""

from __future__ import annotations

import errno
import logging
import numbers
import operator
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import SupportsFloat, SupportsIndex

import psutil

from pyswap.sizes import ADDRESS_SPACE_BYTES, format_size, is_bool, parse_size

__all__ = [
    "CgroupLimit",
    "Settings",
    "available_memory",
    "cgroup_limits",
    "file_system",
    "is_tmpfs",
    "resolve",
    "resolve_area",
    "resolve_memory",
    "swap_folder",
]

MIN_FRAME_COUNT = 128
"""Fewest frames of a pool: below that, batches of evictions and of readahead leave no room."""
MIN_PAGE_BYTES = 4 << 10
MAX_PAGE_BYTES = 2 << 20
DEFAULT_PAGE_SIZE = 4 << 10
"""Bytes of a page where the user names none; see ARCHITECTURE.md for why."""
DEFAULT_SWAP_FACTOR = 4
"""Swap by default, in budgets."""

_PROC = Path("/proc")
_DURABLE_FOLDER = Path("/var/tmp")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

_log = logging.getLogger("pyswap")


@dataclass(frozen=True)
class Settings:
    """The checked arguments of a pool.

    Attributes
    ----------
    memory_bytes : int
        The budget: `frame_count * page_size`, never more than was asked for.
    page_size : int
        Bytes of a page, a power of two.
    frame_count : int
        Pages that may be resident at once.
    swap_bytes : int
        The swap area: `slot_count * page_size`, never less than was asked for.
    slot_count : int
        Pages that the swap area holds.
    swap_path : Path or None
        An absolute path: the folder that the swap file is made in, or the new file itself. None
        only for a pool without swap for which none was named.
    swap_is_file : bool
        Whether `swap_path` is the file itself.
    name : str
        The pool's name.
    overcommit : bool
        Whether arrays may be made that frames and swap together could not hold.
    """

    memory_bytes: int
    page_size: int
    frame_count: int
    swap_bytes: int
    slot_count: int
    swap_path: Path | None
    swap_is_file: bool
    name: str
    overcommit: bool


def resolve(
    memory: SupportsIndex | SupportsFloat | str,
    swap: SupportsIndex | str | None = None,
    swap_path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None = None,
    page_size: SupportsIndex | str | None = None,
    name: str | None = None,
    overcommit: object = False,
) -> Settings:
    """Check the arguments of a pool and fill in what was left to the library.

    Parameters
    ----------
    memory : int, str or float
        The budget: a size, or a fraction in (0, 1] of `available_memory()`; rounded down.
    swap : int or str, optional
        A size, rounded up to pages; 0: none. Four budgets by default, or half of a disk's room.
    swap_path : path, optional
        A folder, or a file that does not exist yet. By default ``$PYSWAP_DIR``, else the
        temporary folder, or /var/tmp where that one is on a tmpfs.
    page_size : int or str, optional
        A power of two from 4 KiB to 2 MiB; by default 4 KiB.
    name : str, optional
        1 to 64 letters, digits, dots, underscores and hyphens. Made up by default.
    overcommit : bool, optional
        See `Settings`.

    Returns
    -------
    Settings
        Consistent settings, for which there was room at the moment of the check.

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    ValueError
        If a size is out of its bounds, the budget over RAM or a cgroup's limit, `swap_path` a
        symbolic link or special file, or `name` has other characters.
    OSError
        With its subclasses, if `swap_path` exists as a file, is missing, or this user may not
        make files there; with errno ENOSPC, if the disk has less room than `swap`.
    """
    budget_bytes = _check_memory(memory)
    page_bytes = _check_page_size(page_size)
    frame_count = _check_frame_count(budget_bytes, page_bytes)
    memory_bytes = frame_count * page_bytes
    swap_bytes = _check_swap(swap, memory_bytes, page_bytes)
    step = page_bytes if swap is None else None
    path, is_file, swap_bytes = _check_swap_path(swap_path, swap_bytes, step)
    return Settings(
        memory_bytes=memory_bytes,
        page_size=page_bytes,
        frame_count=frame_count,
        swap_bytes=swap_bytes,
        slot_count=swap_bytes // page_bytes,
        swap_path=path,
        swap_is_file=is_file,
        name=_check_name(name),
        overcommit=_check_overcommit(overcommit),
    )


def resolve_area(settings: Settings, path: object, size: SupportsIndex | str) -> Settings:
    """Check what another swap area is made with.

    Parameters
    ----------
    settings : Settings
        The pool's.
    path : path
        A folder, or a file that does not exist yet.
    size : int or str
        Rounded up to whole pages.

    Returns
    -------
    Settings
        The pool's, with the new area's path and size as its swap.

    Raises
    ------
    TypeError, ValueError, OSError
        As `resolve` does for `swap` and `swap_path`.
    """
    if path is None:
        raise TypeError("path must be a path, not NoneType")
    swap_bytes = _check_swap(size, settings.memory_bytes, settings.page_size)
    if swap_bytes == 0:
        raise ValueError("size is 0, but a swap area must hold a page")
    where, is_file, _ = _check_swap_path(path, swap_bytes)
    return replace(
        settings,
        swap_bytes=swap_bytes,
        slot_count=swap_bytes // settings.page_size,
        swap_path=where,
        swap_is_file=is_file,
    )


def resolve_memory(settings: Settings, memory: SupportsIndex | SupportsFloat | str) -> int:
    """Check another budget of a pool, and return its frames; the errors are those of `resolve`."""
    return _check_frame_count(_check_memory(memory), settings.page_size)


def available_memory() -> int:
    """Measure the memory that a new budget may take.

    Returns
    -------
    int
        Bytes: the smallest of what the machine has available and of what each memory cgroup
        around this process (version 1 or 2, up to the mounted root) has left below its limit.
        Page cache that can be reclaimed counts as available.
    """
    machine_bytes = int(psutil.virtual_memory().available)
    return max(0, min([machine_bytes, *(limit.available_bytes for limit in cgroup_limits())]))


def cgroup_limits() -> list[CgroupLimit]:
    """Read the limits of all memory cgroups around this process, the innermost first."""
    return _cgroup_levels(_PROC)


def swap_folder() -> Path:
    """Return the folder of swap files where nobody names one.

    Raises
    ------
    ValueError, OSError
        As `resolve` does for ``$PYSWAP_DIR``.
    """
    folder = os.environ.get("PYSWAP_DIR")
    if not folder:
        return _default_folder()
    path, is_file = _check_place(folder, "PYSWAP_DIR")
    if is_file:
        raise FileNotFoundError(errno.ENOENT, "PYSWAP_DIR is no existing folder", str(path))
    return path


def file_system(path: str | os.PathLike[str]) -> str:
    """Return the kind of the file system that `path`, which must exist, is on; "" if unknown."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((mount.kind for mount in _mounts(_PROC) if mount.device == number), "")


def is_tmpfs(path: str | os.PathLike[str]) -> bool:
    """Tell whether `path`, which must exist, is on a file system that is itself in memory."""
    return file_system(path) in ("tmpfs", "ramfs")


def _check_memory(memory: object) -> int:
    """Return the budget in bytes, not yet in whole pages."""
    if isinstance(memory, numbers.Real) and not isinstance(memory, numbers.Integral):
        return _fraction_of_memory(float(memory))
    if not isinstance(memory, (str, bool)) and not hasattr(memory, "__index__"):
        raise TypeError(
            'memory must be an int of bytes, a string such as "256 MiB" or a fraction in (0, 1], '
            f"not {type(memory).__name__}"
        )
    budget_bytes = parse_size(memory, what="memory")
    if budget_bytes == 0:
        raise ValueError("memory is 0, but a pool needs a budget")
    ram_bytes = int(psutil.virtual_memory().total)
    if budget_bytes > ram_bytes:
        raise ValueError(_too_much(budget_bytes, "this machine has only", ram_bytes, "of RAM"))
    limit_bytes = min((limit.limit_bytes for limit in cgroup_limits()), default=ram_bytes)
    if budget_bytes > limit_bytes:
        raise ValueError(_too_much(budget_bytes, "its cgroup is limited to", limit_bytes, ""))
    available_bytes = available_memory()
    if budget_bytes > available_bytes:
        _log.warning(_too_much(budget_bytes, "at the moment only", available_bytes, "is free"))
    return budget_bytes


def _fraction_of_memory(fraction: float) -> int:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(
            f"memory as a float is a fraction in (0, 1] of the memory available, not {fraction}; "
            "a size in bytes is an int"
        )
    return int(fraction * available_memory())


def _too_much(budget_bytes: int, but: str, bound_bytes: int, of_what: str) -> str:
    text = (
        f"memory is {format_size(budget_bytes)} ({budget_bytes} bytes), "
        f"but {but} {format_size(bound_bytes)} ({bound_bytes} bytes) {of_what}"
    )
    return text.rstrip()


def _check_page_size(page_size: object) -> int:
    smallest = max(MIN_PAGE_BYTES, os.sysconf("SC_PAGE_SIZE"))
    if page_size is None:
        return max(DEFAULT_PAGE_SIZE, smallest)
    page_bytes = parse_size(page_size, what="page_size")  # type: ignore[arg-type]
    if not MIN_PAGE_BYTES <= page_bytes <= MAX_PAGE_BYTES or page_bytes & (page_bytes - 1):
        raise ValueError(
            f"page_size must be a power of two from {MIN_PAGE_BYTES} to {MAX_PAGE_BYTES} bytes, "
            f"not {page_bytes}"
        )
    if page_bytes < smallest:
        raise ValueError(f"page_size is {page_bytes}, below the kernel's page of {smallest} bytes")
    return page_bytes


def _check_frame_count(budget_bytes: int, page_bytes: int) -> int:
    frame_count = budget_bytes // page_bytes
    if frame_count < MIN_FRAME_COUNT:
        raise ValueError(
            f"memory of {budget_bytes} bytes is {frame_count} pages of {page_bytes} bytes, but a "
            f"pool needs at least {MIN_FRAME_COUNT} ({MIN_FRAME_COUNT * page_bytes} bytes)"
        )
    return frame_count


def _check_swap(swap: object, memory_bytes: int, page_bytes: int) -> int:
    if swap is None:
        swap_bytes = DEFAULT_SWAP_FACTOR * memory_bytes
    else:
        swap_bytes = parse_size(swap, what="swap")  # type: ignore[arg-type]
    swap_bytes = -(-swap_bytes // page_bytes) * page_bytes
    if memory_bytes + swap_bytes >= ADDRESS_SPACE_BYTES:
        raise ValueError(
            f"memory and swap are {format_size(memory_bytes + swap_bytes)} together, which does "
            f"not fit in the address space of {format_size(ADDRESS_SPACE_BYTES)}"
        )
    return swap_bytes


def _check_name(name: object) -> str:
    if name is None:
        return f"pyswap-{os.getpid()}-{secrets.token_hex(4)}"
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(
            "name must be 1 to 64 ASCII letters, digits, dots, underscores and hyphens, "
            f"not {name[:80]!r}"
        )
    return name


def _check_overcommit(overcommit: object) -> bool:
    """Take a bool, NumPy's bool, 0 or 1; but no text, for "no" would count as true."""
    if is_bool(overcommit):
        return bool(overcommit)
    try:
        number = operator.index(overcommit)  # type: ignore[arg-type]
    except TypeError:
        kind = type(overcommit).__name__
        raise TypeError(f"overcommit must be True or False, not {kind}") from None
    if number not in (0, 1):
        raise ValueError(f"overcommit must be True or False, not {overcommit!r}")
    return bool(number)


def _check_swap_path(
    given: object, swap_bytes: int, step_bytes: int | None = None
) -> tuple[Path | None, bool, int]:
    """Return where the swap file goes, whether that is the file and not its folder, and its size.

    With a step, for nobody said how much, it is no more than half of what is free.
    """
    if given is not None:
        path, is_file = _check_place(given, "swap_path")
    elif swap_bytes == 0:
        return None, False, 0
    else:
        path, is_file = swap_folder(), False
    folder_path = path.parent if is_file else path
    _check_writable(folder_path)
    return path, is_file, _check_room(folder_path, swap_bytes, step_bytes)


def _check_place(given: object, what: str) -> tuple[Path, bool]:
    """Return an absolute path, and whether it is a new file and not an existing folder."""
    try:
        text = os.fsdecode(given)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{what} must be a path, not {type(given).__name__}") from None
    if not text or "\0" in text:
        raise ValueError(f"{what} must be the path of a folder or of a new file, not {text!r}")
    path = Path(text).absolute()
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        # A slash at the end asks for a folder; without one this is the name of a new file.
        has_folder = os.path.isdir(path.parent)
        if text.endswith("/") or not has_folder:
            reason = "does not exist" if has_folder else "is in a folder that does not exist"
            raise FileNotFoundError(errno.ENOENT, f"{what} {reason}", str(path)) from None
        return path, True
    if stat.S_ISDIR(mode):
        return path, False
    if stat.S_ISREG(mode):
        reason = f"{what} exists already; pyswap takes a folder or makes a new file"
        raise FileExistsError(errno.EEXIST, reason, str(path))
    kind = "symbolic link" if stat.S_ISLNK(mode) else "device or other special file"
    raise ValueError(f"{what} {text!r} is a {kind}, not a folder or the name of a new file")


def _default_folder() -> Path:
    """Choose the temporary folder, or /var/tmp where that one is memory."""
    folder = Path(os.path.realpath(tempfile.gettempdir()))
    if is_tmpfs(folder) and os.access(_DURABLE_FOLDER, os.W_OK | os.X_OK, effective_ids=True):
        durable = Path(os.path.realpath(_DURABLE_FOLDER))
        if not is_tmpfs(durable):
            return durable
    return folder


def _check_writable(folder: Path) -> None:
    """Refuse a folder in which this process cannot make files.

    `os.access` lets root pass where the kernel would not (a read-only attribute, a dropped
    capability under an older C library), so a file without a name is opened as well, and closed.
    """
    reason = "this user may not make files in the folder for swap"
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, reason, str(folder))
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionError(error.errno, reason, str(folder)) from None
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise


def _check_room(folder: Path, swap_bytes: int, step_bytes: int | None) -> int:
    room = os.statvfs(folder)
    # Some network file systems do not know their size, and answer 0 blocks.
    if not room.f_blocks:
        return swap_bytes
    free_bytes = room.f_bavail * room.f_frsize
    if step_bytes is not None:
        swap_bytes = min(swap_bytes, max(1, free_bytes // 2 // step_bytes) * step_bytes)
    if free_bytes < swap_bytes:
        raise OSError(
            errno.ENOSPC,
            f"swap needs {format_size(swap_bytes)} ({swap_bytes} bytes), but the disk has only "
            f"{format_size(free_bytes)} ({free_bytes} bytes) free",
            str(folder),
        )
    return swap_bytes


@dataclass(frozen=True)
class _Mount:
    """One line of mountinfo: what is mounted, and which part of it, where."""

    device: str
    root: str
    point: str
    kind: str
    options: str


@dataclass(frozen=True)
class CgroupLimit:
    """The limit of one memory cgroup, this process's own or an ancestor of it.

    Attributes
    ----------
    limit_bytes, available_bytes : int
        The limit, and what is left below it.
    file : Path
        Where the limit is set.
    """

    limit_bytes: int
    available_bytes: int
    file: Path


def _mounts(proc: Path) -> Iterator[_Mount]:
    try:
        lines = (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        # Optional fields of any number end with a lone hyphen.
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), after.split(" ", 2)
        yield _Mount(fields[2], _unescape(fields[3]), _unescape(fields[4]), kind, options)


def _unescape(field: str) -> str:
    """Decode a field of mountinfo, where blanks and backslashes are three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _cgroup_levels(proc: Path) -> list[CgroupLimit]:
    """Read every memory cgroup around this process that has a limit, the innermost first."""
    try:
        lines = (proc / "self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    levels: list[CgroupLimit | None] = []
    for line in lines:
        _, controllers, cgroup = line.split(":", 2)
        if controllers == "":
            mounts = [mount for mount in _mounts(proc) if mount.kind == "cgroup2"]
            levels += [_read_level_v2(folder) for folder in _level_folders(mounts, cgroup)]
        elif "memory" in controllers.split(","):
            mounts = [
                mount
                for mount in _mounts(proc)
                if mount.kind == "cgroup" and "memory" in mount.options.split(",")
            ]
            levels += [_read_level_v1(folder) for folder in _level_folders(mounts, cgroup)]
    return [level for level in levels if level is not None]


def _level_folders(mounts: list[_Mount], cgroup: str) -> list[Path]:
    """Return the folders of `cgroup` and its ancestors, up to the mounted root.

    In a container the hierarchy may be mounted from somewhere in its middle, and `cgroup` may be
    a path outside of what is mounted; then the mounted root is the closest that can be seen.
    """
    for mount in mounts:
        below = os.path.relpath(cgroup, mount.root)
        if ".." not in Path(below).parts:
            top = Path(mount.point)
            folder = top / below
            return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return [Path(mount.point) for mount in mounts[:1]]


def _read_level_v2(folder: Path) -> CgroupLimit | None:
    # Going over memory.high does not kill, but the process then does little but reclaim.
    read = [(_read_number(folder / name), name) for name in ("memory.max", "memory.high")]
    limits = [(number, name) for number, name in read if number is not None]
    used_bytes = _read_number(folder / "memory.current")
    if not limits or used_bytes is None:
        return None
    limit_bytes, name = min(limits)
    facts = _read_stat(folder / "memory.stat")
    cache = ("inactive_file", "active_file", "slab_reclaimable")
    used_bytes -= sum(facts.get(key, 0) for key in cache)
    return CgroupLimit(limit_bytes, limit_bytes - max(0, used_bytes), folder / name)


def _read_level_v1(folder: Path) -> CgroupLimit | None:
    file = folder / "memory.limit_in_bytes"
    limit_bytes = _read_number(file)
    used_bytes = _read_number(folder / "memory.usage_in_bytes")
    if limit_bytes is None or used_bytes is None:
        return None
    facts = _read_stat(folder / "memory.stat")
    # The limit of an ancestor that is not mounted here shows in this line only.
    limit_bytes = min(limit_bytes, facts.get("hierarchical_memory_limit", limit_bytes))
    used_bytes -= sum(facts.get(key, 0) for key in ("total_inactive_file", "total_active_file"))
    return CgroupLimit(limit_bytes, limit_bytes - max(0, used_bytes), file)


def _read_number(path: Path) -> int | None:
    """Read the number in `path`; None where there is no such file, or no limit ("max")."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_stat(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
