"""The 1st, 2nd, ... n-th system call of a kind fails once, until a run meets no failure: what if?

Each run is the same: a pool is made, arrays of both kinds are filled with three times the budget, a
forked worker uses and copies them, a snapshot is taken, all goes to swap, is read back, is deleted,
and the pool ends. A failure may end one step in a clear error, and then the step is done again and
succeeds; or one process in SIGBUS after one line on stderr. Nothing else may come of it: no wrong
byte, no hang, no frame too many, nothing that is left.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import mmap
import os
import random
import re
import resource
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from failpoints import WAIT_S, until, where_threads_are

import pyswap
from pyswap._native import native

pytestmark = [pytest.mark.failpoint, pytest.mark.long]

WORDS = 512
FRAMES = 128
PAGES = 3 * FRAMES
OWN = 24
"""Pages of the private array."""
AT_ONCE = 2
"""Runs side by side."""
EACH, EACH_IN_A_ROW = 50, 20
"""So many calls fail one after the other, once or in a row; of those after, one in STRIDE."""
STRIDE = 60

TRIES = 100
"""Of an ioctl for which the kernel has no memory, or no time."""
CALLS = [
    ("pread", errno.EIO, 1),
    ("pread", errno.EIO, 4),
    ("pwrite", errno.EIO, 1),
    ("pwrite", errno.ENOSPC, 1),
    ("fallocate", errno.ENOSPC, 1),
    ("punch", errno.EIO, 1),
    ("mmap", errno.ENOMEM, 1),
    ("mmap", errno.ENOMEM, 5),
    ("userfaultfd", errno.EINVAL, 1),
    ("register", errno.ENOMEM, 1),
    ("register", errno.ENOMEM, 5),
    ("continue", errno.ENOMEM, 1),
    ("continue", errno.ENOMEM, TRIES),
    ("continue", errno.EAGAIN, TRIES),
    ("continue", errno.ENOENT, 1),
    ("copy", errno.ENOMEM, 1),
    ("copy", errno.EAGAIN, TRIES),
    ("protect", errno.ENOMEM, 1),
    ("protect", errno.EAGAIN, TRIES),
]
"""What fails, why, and how often in a row: once, or until nobody tries again."""
WORKER_ENDED = "the worker was ended by a signal"
CLEAR = (pyswap.Error, OSError, MemoryError)
RIGHT, ERROR_TOLD, WRONG = 0, 3, 4
"""How a run ends that is not killed."""


class Calls:
    """A file in which all processes of a run count their calls, and read which are to fail."""

    def __init__(self, path: Path, name: str, nth: int, error: int, times: int) -> None:
        self.path, self.name = path, name
        size = struct.calcsize(native.CALL_RECORD)
        self._at = native.CALL_NAMES.index(name) * size
        content = bytearray(mmap.PAGESIZE)
        struct.pack_into(native.CALL_RECORD, content, self._at, nth, nth + times - 1, error, 0, 0)
        path.write_bytes(content)

    def counts(self) -> tuple[int, int]:
        """How many calls of the kind were made, and how many of them failed."""
        _, _, _, passed, failed = struct.unpack_from(
            native.CALL_RECORD, self.path.read_bytes(), self._at
        )
        return passed, failed

    def join(self) -> None:
        """Have this process, and the swapper that it will start, count here."""
        os.environ["PYSWAP_FAILING_CALLS"] = str(self.path)
        native.failing_calls_join(str(self.path))
        # What Python calls itself.
        vars(os)["posix_fallocate"] = may_fail("fallocate", os.posix_fallocate)
        vars(os)["pwrite"] = may_fail("pwrite", os.pwrite)
        vars(mmap)["mmap"] = may_fail("mmap", mmap.mmap)


def may_fail(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any) -> Any:
        error = native.call_to_fail(name)
        if error:
            raise OSError(error, os.strerror(error))
        return call(*args)

    return made


# The run: each step may be done again.


def values(pages: int) -> np.ndarray[Any, Any]:
    return np.arange(pages * WORDS).reshape(pages, WORDS)


def same(a: Any, expected: np.ndarray[Any, Any], what: str) -> None:
    found = np.array(a)
    wrong = np.flatnonzero((found != expected).any(axis=1))
    assert not len(wrong), f"{what}: pages {wrong[:20]} are wrong"


class Run:
    """One run's steps, in order, and what they share."""

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.times = folder, times
        self.errors = 0
        self.shared_as = values(PAGES)
        self.own_as = values(OWN)

    def all(self) -> None:
        held = what_is_held()
        steps = (
            self.make,
            self.make_shared,
            self.make_own,
            self.fill,
            self.fork,
            self.copy,
            self.snapshot,
            self.page_out,
            self.read,
            self.delete,
            self.close,
        )
        for step in steps:
            self.attempt(step)
        until(lambda: what_is_held() <= held, f"nothing is left: {what_is_held() - held}")

    def attempt(self, step: Callable[[], None]) -> None:
        """Do a step, and again where it ended in a clear error, as often as calls fail."""
        for _ in range(self.times):
            try:
                step()
            except CLEAR as error:
                self.errors += 1
                print(f"{step.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
                bare = isinstance(error, OSError) and error.strerror == os.strerror(error.errno)
                assert not bare, "an error that says what failed"
            else:
                return
        step()

    def make(self) -> None:
        self.pool = pyswap.Pool(
            FRAMES * 4096, 8 * FRAMES * 4096, page_size=4096, swap_path=self.folder
        )

    def make_shared(self) -> None:
        self.shared = self.pool.zeros((PAGES, WORDS), np.int64)

    def make_own(self) -> None:
        self.own = self.pool.zeros((OWN, WORDS), np.int64, private=True)

    def fill(self) -> None:
        self.own[:] = self.own_as
        self.shared[:] = self.shared_as
        self.check_budget()

    def fork(self) -> None:
        """A worker reads all, writes to both arrays, and sees its own copies."""
        pid = os.fork()
        if pid == 0:
            status = WRONG
            try:
                self.use()
                status = RIGHT
            except BaseException:  # noqa: BLE001 - the status tells.
                traceback.print_exc()
            finally:
                os._exit(status)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.shared_as[:, 3] = -3
        if ended in (-signal.SIGBUS, -signal.SIGKILL):
            raise pyswap.Error(WORKER_ENDED)
        assert ended == RIGHT, f"the worker ended with {ended}"
        self.check_budget()

    def use(self) -> None:
        expected = self.own_as.copy()
        same(self.own, expected, "the worker's private array")
        self.shared[:, 3] = -3
        self.own[::2, 1] = expected[::2, 1] = -1
        self.own[:10, 2] = expected[:10, 2] = -2
        same(
            np.delete(self.shared, 3, axis=1),
            np.delete(self.shared_as, 3, axis=1),
            "the worker's shared array",
        )
        same(self.own, expected, "the worker's copies")

    def copy(self) -> None:
        self.own_as[5:15, 4] = -4
        self.own[5:15, 4] = -4

    def snapshot(self) -> None:
        before = self.own_as.copy()
        clone = self.own.snapshot()
        self.own[3:20, 5] = self.own_as[3:20, 5] = -5
        same(clone, before, "the snapshot")
        same(self.own, self.own_as, "what it was taken of")
        del clone

    def page_out(self) -> None:
        self.pool.advise(self.shared, "pageout")
        self.pool.advise(self.own, "pageout")

    def read(self) -> None:
        same(self.shared, self.shared_as, "the shared array")
        same(self.own, self.own_as, "the private array")
        self.check_budget()

    def delete(self) -> None:
        vars(self).pop("shared", None)
        vars(self).pop("own", None)
        until(lambda: self.pool.stats().workers == 1, "the worker is forgotten")
        until(lambda: self.pool.stats().committed_bytes == 0, "everything is freed")
        until(lambda: self.pool.stats().resident_pages == 0, "all frames are free")
        now = self.pool.stats()
        assert (now.swap_used_bytes, now.pinned_pages, now.in_transit_bytes) == (0, 0, 0)
        self.pool.check()

    def close(self) -> None:
        self.pool.close()
        del self.pool

    def check_budget(self) -> None:
        assert os.fstat(self.pool.fileno()).st_blocks * 512 <= self.pool.memory


def what_is_held() -> Counter[str]:
    """Descriptors, threads and segments of this process."""
    held = Counter(f"thread of {os.getpid()}" for _ in os.listdir("/proc/self/task"))
    for name in os.listdir("/proc/self/fd"):
        try:
            held[re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{name}"))] += 1
        except FileNotFoundError:
            # The descriptor by which the folder was listed.
            continue
    lines = Path("/proc/self/maps").read_text().splitlines()
    held.update(
        line.split(None, 5)[-1] for line in lines if "pyswap." in line and "memfd" not in line
    )
    return held


# Runs, from outside.


class Started:
    """A run in a process of its own."""

    def __init__(self, folder: Path, name: str, nth: int, error: int, times: int) -> None:
        self.nth = nth
        self.calls = Calls(folder / f"{name}.{nth}", name, nth, error, times)
        self._told = folder / f"{name}.{nth}.told"
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._go(folder, times)

    def _go(self, folder: Path, times: int) -> None:
        status = WRONG
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(self._told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            faulthandler.register(signal.SIGUSR1)
            self.calls.join()
            run = Run(folder, times)
            run.all()
            status = ERROR_TOLD if run.errors else RIGHT
        except BaseException:  # noqa: BLE001 - the status tells.
            traceback.print_exc()
        finally:
            os._exit(status)

    def end(self) -> tuple[int, int]:
        """Wait for the end of the run, and of its swapper; its status, and the calls it made."""
        try:
            # Later than the run's own waits end, which tell what did not come.
            what = f"the end of the run whose call {self.nth} fails"
            until(self.has_ended, what, 3 * WAIT_S)
            until(lambda: not self.others(), "the end of its swapper")
        except TimeoutError:
            self.tell_where_it_hangs()
            raise
        assert self._status is not None
        return self._status, self.calls.counts()[0]

    def tell_where_it_hangs(self) -> None:
        """Print what its processes do: its own Python stack among what it has told."""
        made, failed = self.calls.counts()
        print(f"{made} calls, {failed} of which failed")
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.pid).children(recursive=True)
            pids = {self.pid, *self.others(), *(child.pid for child in children)}
            print(*map(where_threads_are, pids), sep="\n")
        if not self.has_ended():
            os.kill(self.pid, signal.SIGUSR1)
            with contextlib.suppress(TimeoutError):
                until(lambda: "most recent call first" in self.told(), "its stack", 5)
        print(self.told())

    def has_ended(self) -> bool:
        if self._status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def kill(self) -> None:
        """Leave nothing of it behind."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            until(self.has_ended, "its end")
        for pid in self.others():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def others(self) -> list[int]:
        """The swappers that the run has started."""
        mark = f"PYSWAP_FAILING_CALLS={self.calls.path}".encode()
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                        found.append(int(name))
                except OSError:
                    continue
        return found

    def told(self) -> str:
        return self._told.read_text() if self._told.exists() else ""


def judged(run: Started, status: int) -> str:
    """What came of a run: a right one, or one error that was told; anything else fails."""
    told = run.told()
    lines = [line for line in told.splitlines() if re.match("pyswap: .*(SIGBUS|and ends)$", line)]
    failed = run.calls.counts()[1]
    what = f"call {run.nth} of {run.calls.path.name}: status {status}\n{told}"
    assert status in (RIGHT, ERROR_TOLD, -signal.SIGBUS), what
    # The store keeps what it cannot give back: that is no state to go on from.
    assert ("panic" in told) <= (run.calls.name == "punch"), what
    if not failed:
        assert status == RIGHT, what
        return "none"
    if status == RIGHT:
        return "right"
    assert len(lines) == told.count(WORKER_ENDED) + (status == -signal.SIGBUS), what
    return "SIGBUS" if lines else "error"


def numbers(seed: int, each: int) -> Iterator[int]:
    yield from range(1, each + 1)
    rng = random.Random(seed)
    n = each
    while True:
        n += rng.randrange(1, 2 * STRIDE)
        yield n


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "error", "times"),
    CALLS,
    ids=[f"{name}-{errno.errorcode[error]}-{times}" for name, error, times in CALLS],
)
def test_what_if_the_nth_call_fails(
    name: str, error: int, times: int, tmp_path: Path, seed: int
) -> None:
    outcomes: Counter[str] = Counter()
    nth, made, began = numbers(seed, EACH if times == 1 else EACH_IN_A_ROW), 0, time.monotonic()
    started: list[Started] = []
    try:
        while not outcomes["none"]:
            while len(started) < AT_ONCE:
                started.append(Started(tmp_path, name, next(nth), error, times))
            status, calls = started[0].end()
            made = max(made, calls)
            outcomes[judged(started.pop(0), status)] += 1
    finally:
        for run in started:
            run.kill()
    failed = outcomes["right"] + outcomes["error"] + outcomes["SIGBUS"]
    print(
        f"{name}, {errno.errorcode[error]}, {times} in a row: of {made} calls {failed} failed, in "
        f"runs of their own: {outcomes['right']} right, {outcomes['error']} errors, "
        f"{outcomes['SIGBUS']} SIGBUS; {time.monotonic() - began:.1f} s"
    )
    assert failed
