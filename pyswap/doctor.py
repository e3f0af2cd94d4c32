"""What this machine allows, what pyswap will therefore do, and the command that would improve it.

Each function here looks at one thing and answers with a `Finding`. What is said of pools is tried
with one, so that it is what happens and not what a table says.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import select
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from . import config
from ._native import native
from .disk import DiskSpeed, measure
from .pool import Pool
from .settings import available_memory, cgroup_limits, file_system, is_tmpfs, swap_folder
from .sizes import format_size

__all__ = ["Finding", "examine"]

Verdict = Literal["good", "limited", "refused"]

MAX_PROCESSES = 256
"""Processes that a pool takes."""
USUAL_MAPPINGS = 65530
"""The kernel's default of vm.max_map_count."""
MANY_MAPPINGS = 1 << 20
WAIT_S = 30.0
"""How long a forked child of the trial may take, in seconds."""

_CAP_SYS_ADMIN = 21
_DEV_SHM = Path("/dev/shm")
_DURABLE = ("ext4", "xfs", "btrfs", "f2fs", "ext3", "zfs")


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes
    ----------
    topic, found : str
        What was looked at, and what is there.
    verdict : str
        "good"; "limited": pools work, with a limit; "refused": `Pool()` will raise.
    therefore : str
        What pyswap does about it.
    better : str, optional
        The shell command that would improve it.
    """

    topic: str
    found: str
    verdict: Verdict
    therefore: str
    better: str | None = None


def examine() -> list[Finding]:
    """Look at all of it; takes about two seconds, most of them for the disk's speed."""
    pool, swapper_files = _trial()
    return [
        _userfaultfd(),
        _dev_shm(),
        _memory(),
        *_swap(),
        _mappings(),
        _open_files(swapper_files),
        _file_size(),
        pool,
    ]


# Faults.


def _userfaultfd() -> Finding:
    topic = "userfaultfd"
    try:
        fd, user_only = native.open_uffd()
    except OSError as error:
        therefore = "Pool() raises pyswap.Error: without it no page fault can be resolved"
        return Finding(
            topic, f"none: {os.strerror(error.errno or 0)}", "refused", therefore, _allow(error)
        )
    os.close(fd)
    if not user_only:
        return Finding(topic, "full", "good", "a system call may be handed any part of an array")
    return Finding(
        topic,
        "user mode only",
        "limited",
        "arrays work; a system call that is handed a part that is not in memory fails with EFAULT, "
        "or does less than asked: with pool.pin(view) around it, it works",
        "sudo sysctl -w vm.unprivileged_userfaultfd=1",
    )


def _allow(error: OSError) -> str | None:
    """The command after which userfaultfd is not refused, as far as the reason can be known."""
    status = Path("/proc/self/status").read_text()
    if error.errno == errno.EPERM and "\nSeccomp:\t2\n" in status:
        return "docker run --security-opt seccomp=unconfined ..."
    return None


# Memory.


def _may_mount() -> bool:
    """Whether root, or whoever may become it, can mount here: not in a usual container."""
    if not Path("/.dockerenv").exists() and not Path("/run/.containerenv").exists():
        return True
    match = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> _CAP_SYS_ADMIN & 1)


def _dev_shm() -> Finding:
    topic = str(_DEV_SHM)
    # A bound takes no memory, and what is available may be more in a moment.
    wanted = -(-int(psutil.virtual_memory().total) >> 30)
    better = f"sudo mount -o remount,size={wanted}G {_DEV_SHM}"
    if not _may_mount():
        better = f"docker run --shm-size={wanted}g ..."
    try:
        room = os.statvfs(_DEV_SHM)
        is_memory = is_tmpfs(_DEV_SHM)
    except OSError as error:
        return Finding(topic, error.strerror or "none", "limited", "pools are kept in memfds")
    if not is_memory:
        return Finding(
            topic, f"is on {file_system(_DEV_SHM)}", "limited", "pools are kept in memfds"
        )
    free_bytes = room.f_bavail * room.f_frsize
    total_bytes = room.f_blocks * room.f_frsize
    found = f"{format_size(total_bytes)}, {format_size(free_bytes)} free"
    if room.f_blocks == 0 or free_bytes >= available_memory():
        return Finding(topic, found, "good", "pools of any budget are kept there")
    return Finding(
        topic,
        found,
        "limited",
        f"a pool with a budget over {format_size(free_bytes)} is kept in memfds instead; one that "
        "is there goes on with fewer frames when others fill it",
        better,
    )


def _memory() -> Finding:
    machine = psutil.virtual_memory()
    free_bytes = available_memory()
    most_bytes = int(machine.total)
    found = f"{format_size(most_bytes)} in this machine, {format_size(free_bytes)} available"
    therefore = f"Pool(0.5) takes {format_size(free_bytes // 2)}"
    limit = min(cgroup_limits(), key=lambda each: each.limit_bytes, default=None)
    if limit is None or limit.limit_bytes >= most_bytes:
        found += ", no cgroup's limit"
        return Finding("memory", found, "good", f"{therefore}, Pool() at most all of it")
    is_old = limit.file.name == "memory.limit_in_bytes"
    found = (
        f"a cgroup (version {1 if is_old else 2}) is limited to {format_size(limit.limit_bytes)}, "
        f"{format_size(free_bytes)} available"
    )
    more = f"echo {-1 if is_old else 'max'} | sudo tee {limit.file}"
    if os.statvfs(limit.file).f_flag & os.ST_RDONLY:
        # A container cannot change its own.
        more = f"docker update --memory {most_bytes} --memory-swap -1 {os.uname().nodename}"
    return Finding(
        "memory",
        found,
        "limited",
        f"{therefore}, and a budget over the limit is refused; the processes' own memory and the "
        "pool's count together against it",
        more,
    )


# Swap.


def _swap() -> list[Finding]:
    topic = "swap folder"
    other = _other_folder()
    try:
        folder = swap_folder()
        room = os.statvfs(folder)
        kind = file_system(folder)
        speed = measure(folder)
    except (OSError, ValueError) as error:
        refused = "Pool() raises the same, unless swap_path is another folder or swap is 0"
        return [Finding(topic, str(error), "refused", refused, other)]
    free_bytes = room.f_bavail * room.f_frsize
    found = f"{folder}: {kind or 'unknown file system'}, "
    found += f"{format_size(free_bytes)} free" if room.f_blocks else "of unknown size"
    if is_tmpfs(folder):
        therefore = "swap takes the memory that it should save"
        place = Finding(topic, found, "limited", therefore, other)
    else:
        therefore = (
            f"room for the swap of a budget of {format_size(free_bytes // 4)}, at four times"
        )
        place = Finding(topic, found, "good", therefore)
    return [place, _direct(speed, other), _speed(speed, other)]


def _direct(speed: DiskSpeed, other: str | None) -> Finding:
    if speed.is_direct:
        return Finding("O_DIRECT", "yes", "good", "swap does not pass through the page cache")
    therefore = "swap goes through the page cache: pages are in memory twice while they are moved"
    return Finding("O_DIRECT", "no", "limited", therefore, other)


def _speed(speed: DiskSpeed, other: str | None) -> Finding:
    is_slow = min(speed.write_bytes_s, speed.read_bytes_s) < 200e6
    write, read = speed.write_bytes_s / 1e6, speed.read_bytes_s / 1e6
    return Finding(
        "swap speed",
        f"writes {write:,.0f} MB/s, reads {read:,.0f} MB/s, "
        f"64 KiB anywhere in {speed.page_read_s * 1e6:,.0f} us",
        "limited" if is_slow else "good",
        "a scan of what is in swap is no faster than that, and neither is a fault",
        other if is_slow else None,
    )


def _other_folder() -> str | None:
    """The command that puts swap on the disk with the most room, if there is another."""
    rooms = []
    for part in psutil.disk_partitions(all=True):
        if part.fstype in _DURABLE and "ro" not in part.opts.split(","):
            for folder in (part.mountpoint, os.path.join(part.mountpoint, "var/tmp")):
                if os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
                    free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
                    rooms.append((free_bytes, folder))
    return f"export PYSWAP_DIR={max(rooms)[1]}" if rooms else None


# Limits.


def _mappings() -> Finding:
    count = int(Path("/proc/sys/vm/max_map_count").read_text())
    better = f"sudo sysctl -w vm.max_map_count={MANY_MAPPINGS}" if count < MANY_MAPPINGS else None
    return Finding(
        "vm.max_map_count",
        str(count),
        "good" if count >= USUAL_MAPPINGS else "limited",
        f"a process can have about {count // 2:,} pages of private arrays that it alone copied, "
        "each apart from the others; near that, runs of 64 pages are copied",
        better,
    )


def _open_files(swapper_files: tuple[int, int] | None) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} (ulimit -n), {_limit(hard)} at most"
    if hard == resource.RLIM_INFINITY or swapper_files is None:
        return Finding("open files", found, "good", "the swapper takes as many as it needs")
    # Open now, or set aside: the swapper takes no process that would leave it without.
    own = config.own_descriptors(hard)
    base = max(swapper_files[0], own + config.PROCESS_DESCRIPTORS)
    each = max(swapper_files[1], config.PROCESS_DESCRIPTORS)
    most = max(0, (hard - base) // each)
    therefore = f"a pool's swapper needs {base}, and {each} for each process: "
    if most >= MAX_PROCESSES:
        return Finding("open files", found, "good", f"{therefore}enough for {MAX_PROCESSES}")
    therefore += f"at most {most} processes can use a pool"
    needed = 1 << (base + each * MAX_PROCESSES).bit_length()
    better = f"sudo prlimit --pid $$ --nofile={needed}:{needed}"
    return Finding("open files", found, "limited" if most else "refused", therefore, better)


def _file_size() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return Finding("file size", "unlimited", "good", "pools of any size")
    better = "ulimit -f unlimited"
    if hard != resource.RLIM_INFINITY:
        better = "sudo prlimit --pid $$ --fsize=unlimited:unlimited"
    therefore = f"files of {format_size(soft)} hold the largest swap"
    if soft < config.STORE_BYTES:
        size = format_size(config.STORE_BYTES)
        therefore = f"Pool() raises OSError: its page store is a sparse file of {size}"
    verdict: Verdict = "refused" if soft < config.STORE_BYTES else "limited"
    return Finding("file size", f"{format_size(soft)} (ulimit -f)", verdict, therefore, better)


def _limit(count: int) -> str:
    return "unlimited" if count == resource.RLIM_INFINITY else str(count)


# A pool.


def _trial() -> tuple[Finding, tuple[int, int] | None]:
    """Make the smallest pool, fork, and count the swapper's open files: without, and a process."""
    begin = time.perf_counter()
    try:
        with Pool("8 MiB", 0, page_size="64 KiB") as pool:
            pool.ones(1 << 16)
            took_ms = (time.perf_counter() - begin) * 1e3
            files = _swapper_files(pool)
            budget = pool.stats().metadata_bytes
    except Exception as error:  # noqa: BLE001 (whatever a user would meet is what is to be told)
        return Finding("a pool", f"{type(error).__name__}: {error}", "refused", "see above"), None
    found = f"made and used in {took_ms:.0f} ms"
    return Finding("a pool", found, "good", f"{format_size(budget)} of tables beside 8 MiB"), files


def _swapper_files(pool: Pool) -> tuple[int, int] | None:
    """Files that a swapper has open without a process, and for each; None where none can tell."""
    here, there = os.pipe()
    leave, end = os.pipe()
    folder = f"/proc/{pool.swapper_pid}/fd"
    try:
        alone = len(os.listdir(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os.write(there, b".")
            os.close(end)
            os.read(leave, 1)
            os._exit(0)
        try:
            if not select.select([here], [], [], WAIT_S)[0]:
                return None
            each = len(os.listdir(folder)) - alone
        finally:
            os.write(end, b".")
            os.waitpid(child, 0)
    except OSError:
        return None
    finally:
        for fd in (here, there, leave, end):
            os.close(fd)
    return (alone - each, each) if each > 0 else None
