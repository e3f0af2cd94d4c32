"""Facts about the machine, for whoever reads the numbers later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil

__all__ = ["facts"]

_SETTINGS = (
    "/proc/sys/vm/page-cluster",
    "/proc/sys/vm/swappiness",
    "/proc/sys/vm/unprivileged_userfaultfd",
    "/sys/module/zswap/parameters/enabled",
    "/sys/kernel/mm/swap/vma_ra_enabled",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/sys/kernel/mm/damon/admin/kdamonds/0/state",
    "/sys/devices/system/clocksource/clocksource0/current_clocksource",
)


def _first_line(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu_model() -> str:
    for line in (_first_line("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _disk(folder: Path) -> dict[str, str | None]:
    """The block device under a folder, and how the kernel queues for it."""
    number = os.stat(folder).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if not (device / "queue").exists():
        device = device.parent
    names = ("rotational", "scheduler", "read_ahead_kb", "nr_requests", "max_sectors_kb")
    told = {name: _first_line(device / "queue" / name) for name in names}
    mounts = [m for m in psutil.disk_partitions(all=True) if _is_on(m.mountpoint, number)]
    return {"device": device.name, "file_system": mounts[0].fstype if mounts else None, **told}


def _is_on(mountpoint: str, number: int) -> bool:
    try:
        return os.stat(mountpoint).st_dev == number
    except OSError:
        return False


def _commit() -> str | None:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return told.stdout.strip() or None


def facts(folder: Path) -> dict[str, object]:
    """Return what about this machine and its settings bears on the numbers.

    Parameters
    ----------
    folder : Path
        Where the swap files are.
    """
    packages = ("numpy", "Cython", "posix-ipc", "psutil")
    return {
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_before": os.getloadavg(),
        "disk": _disk(folder),
        "settings": {name: _first_line(name) for name in _SETTINGS},
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
    }
