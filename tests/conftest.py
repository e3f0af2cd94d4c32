"""What every test gets: a pool, a seed, what the machine must offer, a look at what is left.

Environment
-----------
PYSWAP_ENGINE=debug   the tests run on the debug extension; tests marked `failpoint` need it.
PYSWAP_REQUIRE        capabilities (`root,uffd,memcg,user`) whose absence is a failure, not a skip.
PYSWAP_SEED           the seed of the `seed` fixture, to run a random test once more as it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib.util
import multiprocessing.resource_tracker
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

# A BLAS starts its threads when it is first imported, which would look like a test's leak, and
# fork() hangs while another thread is inside one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import pytest

# A shell starts background commands with SIGINT ignored, which programs would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The attendant is a thread, so Python 3.12 and newer warn where a test's script forks.  The filter
# in pyproject.toml is for the tests themselves, this is for the programs that they start.
os.environ["PYTHONWARNINGS"] = "ignore:This process:DeprecationWarning"

NOBODY_UID = 65534
SYSTEM_PYTHON = "/usr/bin/python3"

# How long what a test used has to end by itself: a swapper notices its last worker's end.
SETTLE_S = 10.0
SETTLE_POLL_S = 0.01

# Every process of this run carries the mark in its environment, so that the swappers of another
# run on the same machine are told apart from ours.
RUN_VARIABLE = "PYSWAP_TEST_RUN"
RUN_MARK = uuid.uuid4().hex
os.environ[RUN_VARIABLE] = RUN_MARK

# _IO(0xAA, 0) on /dev/userfaultfd opens a userfaultfd.
USERFAULTFD_IOC_NEW = 0xAA00
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}

CALL_FAILED = pytest.StashKey[bool]()


def is_debug_engine() -> bool:
    return os.environ.get("PYSWAP_ENGINE") == "debug"


# What the machine offers.


def _missing_root() -> str | None:
    return None if os.geteuid() == 0 else f"runs as uid {os.geteuid()}, not as root"


def _missing_uffd() -> str | None:
    """Why full userfaultfd, which resolves the kernel's own accesses too, cannot be had."""
    number = SYS_USERFAULTFD.get(platform.machine())
    if number is not None:
        fd = ctypes.CDLL(None, use_errno=True).syscall(number, os.O_CLOEXEC)
        if fd >= 0:
            os.close(fd)
            return None
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"full userfaultfd is refused, and /dev/userfaultfd: {error.strerror}"
    try:
        os.close(fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/userfaultfd refuses: {error.strerror}"
    finally:
        os.close(device)
    return None


def memcg_candidates() -> Iterator[tuple[Path, str]]:
    """Control groups to make one's own in, each with the name of its memory limit's file."""
    own = dict(
        line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()
    )
    for mount in psutil.disk_partitions(all=True):
        root = Path(mount.mountpoint)
        if mount.fstype == "cgroup" and "memory" in mount.opts.split(","):
            yield root / own.get("memory", "/").lstrip("/"), "memory.limit_in_bytes"
            yield root, "memory.limit_in_bytes"
        elif mount.fstype == "cgroup2":
            yield root / own.get("", "/").lstrip("/"), "memory.max"
            yield root, "memory.max"


@functools.cache
def memcg_parent() -> Path | None:
    """Find a control group in which this process may make one with a memory limit."""
    for parent, limit in memcg_candidates():
        probe = parent / f"pyswap-probe-{os.getpid()}"
        try:
            probe.mkdir()
        except OSError:
            continue
        try:
            if os.access(probe / limit, os.W_OK):
                return parent
        finally:
            probe.rmdir()
    return None


def _missing_memcg() -> str | None:
    return None if memcg_parent() else "no control group here lets us limit memory"


def _missing_user() -> str | None:
    """Why no other user can run a Python here that pyswap supports."""
    if os.geteuid() != 0:
        return "only root can become another user"
    if not os.access(SYSTEM_PYTHON, os.X_OK):
        return f"there is no {SYSTEM_PYTHON}"
    told = subprocess.run(
        [SYSTEM_PYTHON, "-c", "import os, sys; print(os.geteuid(), sys.version_info >= (3, 10))"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PATH": os.defpath},
        user=NOBODY_UID,
        group=NOBODY_UID,
        extra_groups=[],
    )
    if told.stdout.split() != [str(NOBODY_UID), "True"]:
        return f"uid {NOBODY_UID} cannot run {SYSTEM_PYTHON} of version 3.10 or newer"
    return None


CAPABILITIES: dict[str, Callable[[], str | None]] = {
    "root": _missing_root,
    "uffd": _missing_uffd,
    "memcg": _missing_memcg,
    "user": _missing_user,
}


@functools.cache
def missing(capability: str) -> str | None:
    """Say why this machine, or this user, lacks a capability; None where it is there."""
    return CAPABILITIES[capability]()


def required() -> set[str]:
    """Read the capabilities that must be there from PYSWAP_REQUIRE."""
    names = {name.strip() for name in os.environ.get("PYSWAP_REQUIRE", "").split(",")} - {""}
    unknown = names - set(CAPABILITIES)
    if unknown:
        raise pytest.UsageError(f"PYSWAP_REQUIRE names {sorted(unknown)}: not in {[*CAPABILITIES]}")
    return names


def require(capability: str) -> None:
    """Skip the test where a capability is missing, or fail where PYSWAP_REQUIRE names it.

    Parameters
    ----------
    capability
        ``root``, ``uffd`` (full userfaultfd), ``memcg`` (a memory control group that we may
        make) or ``user`` (another uid that can run Python).
    """
    reason = missing(capability)
    if reason is None:
        return
    if capability in required():
        pytest.fail(f"PYSWAP_REQUIRE names {capability}, but {reason}", pytrace=False)
    pytest.skip(f"needs {capability}: {reason}")


@pytest.fixture(name="require")
def require_fixture() -> Callable[[str], None]:
    return require


# What a test must not leave behind.


def _read(path: str) -> bytes:
    """The bytes of a file in /proc; none where its process is gone or another user's."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _is_foreign(pid: int) -> bool:
    """True for a process of another user or another test run.

    What this run executed carries its mark; what it only forked has the environment that it was
    started with, as this process has.
    """
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return True
    except OSError:
        return True
    environment = _read(f"/proc/{pid}/environ")
    is_marked = f"{RUN_VARIABLE}={RUN_MARK}".encode() in environment.split(b"\0")
    return not is_marked and environment != _read("/proc/self/environ")


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _fds() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"fd {name}: {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            # The descriptor by which the folder was listed.
            continue
    return found


def _threads() -> set[str]:
    # An allocator of pyarrow's starts threads whenever it likes, which stay.
    tasks = {
        f"thread {task}"
        for task in os.listdir("/proc/self/task")
        if _read(f"/proc/self/task/{task}/comm") != b"jemalloc_bg_thd\n"
    }
    return tasks | {f"Python thread {t.name} ({t.ident})" for t in threading.enumerate()}


def _children() -> set[str]:
    return {f"child {child.pid}" for child in psutil.Process().children(recursive=True)}


def _swappers() -> set[str]:
    return {
        f"swapper {pid}"
        for pid in _pids()
        if b"pyswap.swapper" in _read(f"/proc/{pid}/cmdline") and not _is_foreign(pid)
    }


def _is_ours(path: str) -> bool:
    try:
        return os.lstat(path).st_uid == os.geteuid()
    except OSError:
        return False


def _is_named_by_another_run(path: str) -> bool:
    """Whether a name carries the number of a living process that is none of this run's."""
    number = re.search(r"[.-](\d+)[.-]", os.path.basename(path))
    if number is None or not os.path.exists(f"/proc/{number[1]}"):
        return False
    return _is_foreign(int(number[1]))


def _names() -> set[str]:
    """Names in /dev/shm, and those of swap files where swap files are made."""
    swap_folders = {"/tmp", "/var/tmp", tempfile.gettempdir(), os.environ.get("PYSWAP_DIR", "/tmp")}
    found = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
    for folder in swap_folders:
        if os.path.isdir(folder):
            names = (name for name in os.listdir(folder) if name.startswith("pyswap."))
            found |= {f"{folder}/{name}" for name in names}
    ours = {path for path in found if _is_ours(path) and not _is_named_by_another_run(path)}
    return {f"name {path}" for path in ours}


def _mappings() -> set[str]:
    """Segments that this process still maps, a line for each."""
    lines = _read("/proc/self/maps").decode(errors="replace").splitlines()
    segments = (line for line in lines if re.search(r"(/dev/shm/|memfd:)\S*pyswap\.", line))
    return {f"mapping {line.split()[0]} {line.split(None, 5)[-1]}" for line in segments}


def _sockets() -> set[str]:
    """Abstract sockets of pools, as `inode name`."""
    found = set()
    for line in _read("/proc/net/unix").decode(errors="replace").splitlines():
        fields = line.split(None, 7)
        if len(fields) == 8 and fields[7].startswith("@") and "pyswap" in fields[7]:
            found.add(f"abstract socket {fields[6]} {fields[7]}")
    return found


def _holders(inode: str) -> list[int]:
    """The processes that hold a socket, as far as we may look."""
    holders = []
    for pid in _pids():
        try:
            fds = os.listdir(f"/proc/{pid}/fd")
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in fds]
        except OSError:
            continue
        if f"socket:[{inode}]" in links:
            holders.append(pid)
    return holders


def _is_foreign_socket(entry: str) -> bool:
    """True for a socket that only other runs hold.

    One that nobody seems to hold is in flight, or another user's, into whose processes we cannot
    look: ours if its pool's creator is.
    """
    _, _, inode, name = entry.split(None, 3)
    holders = _holders(inode)
    creator = re.search(r"pyswap-(\d+)-", name)
    if not holders and creator is not None:
        holders = [int(creator[1])]
    return all(_is_foreign(pid) for pid in holders)


def _is_held_by_another_run(path: str) -> bool:
    """Whether a process of another run has a file open or mapped: its name need not tell whose."""
    for pid in filter(_is_foreign, _pids()):
        if f" {path}\n".encode() in _read(f"/proc/{pid}/maps"):
            return True
        with contextlib.suppress(OSError):
            fds = os.listdir(f"/proc/{pid}/fd")
            if path in [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in fds]:
                return True
    return False


def _is_foreign_entry(entry: str) -> bool:
    """Whether what a snapshot lists is another run's, as far as only a closer look can tell."""
    if entry.startswith("abstract socket"):
        return _is_foreign_socket(entry)
    return entry.startswith("name ") and _is_held_by_another_run(entry.removeprefix("name "))


def _describe(entry: str) -> str:
    """Add to a process's or thread's entry what it runs, which is no part of its identity."""
    kind, name = entry.split()[:2]
    if kind == "thread":
        return f"{entry}: {_read(f'/proc/self/task/{name}/comm').decode().strip()}"
    if kind not in ("child", "swapper"):
        return entry
    try:
        process = psutil.Process(int(name))
        return f"{entry}: {process.name()}, {process.status()}"
    except psutil.Error:
        return entry


def snapshot() -> set[str]:
    """List all that a test could leave behind, one readable line each."""
    kinds = (_fds, _threads, _children, _swappers, _names, _mappings, _sockets)
    return set().union(*(kind() for kind in kinds))


def _end_standard_helpers() -> None:
    """Stop the helper processes that multiprocessing starts for a whole process's life."""
    tracker: Any = multiprocessing.resource_tracker
    tracker._resource_tracker._stop()
    forkserver: Any = sys.modules.get("multiprocessing.forkserver")
    if forkserver is not None:
        forkserver._forkserver._stop()


def leftovers(before: set[str], settle_s: float) -> list[str]:
    """Wait until nothing is there that was not there before; list what stays.

    Parameters
    ----------
    before
        The `snapshot` before the test.
    settle_s
        How long what is ending may take, in seconds.
    """
    _end_standard_helpers()
    deadline = time.monotonic() + settle_s
    while True:
        left = [entry for entry in sorted(snapshot() - before) if not _is_foreign_entry(entry)]
        if not left or time.monotonic() >= deadline:
            return [_describe(entry) for entry in left]
        gc.collect()
        time.sleep(SETTLE_POLL_S)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # Another swapper takes over from one that panics, and nobody loses a byte: it is an error yet.
    if report.passed and (panics := re.findall(r"pyswap: panic: .*", report.capstderr)):
        report.outcome = "failed"
        report.longrepr = "\n".join(panics)
    if report.when == "call":
        item.stash[CALL_FAILED] = report.failed
        item.config.stash[CALL_FAILED] = report.failed
    return report


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare fds, threads, processes, names, mappings and sockets after every test."""
    if request.config.stash.get(CALL_FAILED, False):
        # What a failed test's frames held ends now, and no warning about it is this test's.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in ("last_type", "last_value", "last_traceback", "last_exc"):
                vars(sys).pop(name, None)
            gc.collect()
    before = snapshot()
    yield
    # pytest keeps the values of a test's fixtures until later; they may be arrays.
    request.node.funcargs.clear()
    if request.node.stash.get(CALL_FAILED, False):
        # The traceback holds the frames, and they the arrays: tell, but blame nobody.
        left = leftovers(before, settle_s=0)
        if left:
            request.node.add_report_section("teardown", "left by a failed test", "\n".join(left))
        return
    left = leftovers(before, settle_s=SETTLE_S)
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


# What tests work with.


@pytest.fixture
def pool() -> Iterator[Any]:
    """A pool of 2,048 frames of 4 KiB with 64 MiB of swap; its counters must add up in the end."""
    import pyswap

    with pyswap.Pool("8 MiB", "64 MiB", page_size=4096) as made:
        assert f"swapper {made.swapper_pid}" in _swappers(), "a swapper left behind would be missed"
        yield made
        # A test may have closed it: then there is nothing left to ask.
        with contextlib.suppress(pyswap.PoolClosedError):
            made.check()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of its own for a pool's swap."""
    made = tmp_path / "area"
    made.mkdir()
    return made


@pytest.fixture
def seed(record_property: Callable[[str, object], None]) -> int:
    """A fresh seed, or PYSWAP_SEED; a failing test's report shows it."""
    given = os.environ.get("PYSWAP_SEED")
    value = int(given, 0) if given else random.SystemRandom().getrandbits(32)
    record_property("seed", value)
    print(f"PYSWAP_SEED={value}")
    return value


# What pytest says.


def _engine_mode() -> str:
    if importlib.util.find_spec("pyswap") is None:
        return "pyswap is not installed"
    try:
        import pyswap

        return str(pyswap.engine_mode())
    except Exception as error:  # noqa: BLE001 - the header must not keep the tests from telling why.
        return f"unknown ({type(error).__name__}: {error})"


def pytest_report_header() -> list[str]:
    lacks = [f"{name} ({missing(name)})" for name in CAPABILITIES if missing(name)]
    return [
        f"pyswap engine: {_engine_mode()}",
        f"pyswap build: {'debug' if is_debug_engine() else 'release'}, kernel {os.uname().release}",
        f"pyswap machine: lacks {'; '.join(lacks) or 'nothing'}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if is_debug_engine():
        return
    for item in items:
        if item.get_closest_marker("failpoint"):
            item.add_marker(pytest.mark.skip(reason="failpoints need PYSWAP_ENGINE=debug"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    terminalreporter.write_line(f"pyswap skips: {len(skipped)}" + (f" ({told})" if told else ""))
