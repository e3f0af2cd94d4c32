"""What does a fork with private arrays cost, and what is left of one that came to nothing?"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting import counting  # noqa: F401 - a fixture.
from failpoints import Actor, Failpoint
from workers import Worker, until

import pyswap
from pyswap import config
from pyswap.worker import Attachment

WORDS = 512
PAGE_BYTES = 4096
FORKS = 10_000
CLONE_FLAGS = signal.SIGCHLD
"""What clone() is told for a plain fork."""

COUNTED_PROGRAM = """
import mmap, os, struct, sys
import numpy as np
import pyswap

with open(os.environ["CALLS_FILE"], "r+b") as file:
    calls = mmap.mmap(file.fileno(), 4096)

def counted():
    return struct.unpack("q", calls[:8])[0]

pool = pyswap.Pool("320 MiB", "64 MiB", page_size=4096, overcommit=True)
arrays = [pool.zeros((1 << 30) // 8, np.int64, private=True) for _ in range(8)]
for a in arrays:
    part = a[: (int(sys.argv[1]) << 20) * int(sys.argv[2]) // 8 // len(arrays)]
    part[:: 512 * int(sys.argv[2])] = 1
assert pool.stats().resident_pages >= (int(sys.argv[1]) << 20) // 4096
before = counted()
pid = os.fork()
if pid == 0:
    os._exit(0)
after = counted()
assert os.waitpid(pid, 0)[1] == 0
copies = pool.stats().cow_copies
print(after - before, copies, flush=True)
"""

FORKS_PROGRAM = """
import os, sys, time
from pathlib import Path
import numpy as np
import pyswap

FORKS, AT_ONCE, PAGES, WORDS = int(sys.argv[1]), 4, 200, 512

def until(predicate, what):
    deadline = time.monotonic() + 60
    while not predicate():
        assert time.monotonic() < deadline, f"it never happened: {what}"
        time.sleep(0.001)

def swapper(part):
    return len(os.listdir(f"/proc/{pool.swapper_pid}/{part}"))

def own_bytes():
    resident, shared = map(int, Path(f"/proc/{pool.swapper_pid}/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

with pyswap.Pool("8 MiB", "64 MiB", page_size=4096) as pool:
    a = pool.zeros(PAGES * WORDS, np.int64, private=True)
    a[::WORDS] = np.arange(1, PAGES + 1)
    fds, threads = swapper("fd"), swapper("task")
    resident, alive, began = [], 0, time.monotonic()
    for i in range(FORKS):
        alive += 1
        if os.fork() == 0:
            if i % 10 == 0:
                a[i % PAGES * WORDS] = -1
            os._exit(0 if a[(i + 1) % PAGES * WORDS] == (i + 1) % PAGES + 1 else 1)
        is_looked_at = i in (FORKS // 10, FORKS - 1)
        while alive > (0 if is_looked_at else AT_ONCE):
            assert os.wait()[1] == 0
            alive -= 1
        if is_looked_at:
            until(lambda: pool.stats().workers == 1, "the children are gone")
            resident.append(own_bytes())
    seconds = time.monotonic() - began
    assert pool.stats().cow_copies >= FORKS // 10
    until(lambda: pool.stats().committed_bytes == a.nbytes, "their copies are freed")
    until(lambda: swapper("fd") == fds, "no descriptor is left")
    assert swapper("task") == threads
    assert resident[-1] <= resident[0] + (2 << 20), resident
    copies = pool.stats().cow_copies
    assert (a[::WORDS] == np.arange(1, PAGES + 1)).all()
    a[::WORDS] += 1
    # Nobody has a reference any more.
    assert pool.stats().cow_copies == copies
    pool.check()
print(f"{FORKS} forks in {seconds:.1f} s, {seconds / FORKS * 1e3:.2f} ms each")
"""


def calls_of_a_fork(environment: dict[str, str], resident_mib: int, apart: int = 1) -> int:
    """Count the calls for a fork with so much written, every page, or one page in so many."""
    result = subprocess.run(
        [sys.executable, "-c", COUNTED_PROGRAM, str(resident_mib), str(apart)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    counted, copies = map(int, result.stdout.split())
    assert copies == 0
    return counted


def test_makes_a_fork_no_system_call_for_a_page(
    counting: dict[str, str],  # noqa: F811 - the fixture.
) -> None:
    arrays, ranges = 8, 64
    few = calls_of_a_fork(counting, 16)
    many = calls_of_a_fork(counting, 256)
    scattered = calls_of_a_fork(counting, 256, apart=3)
    print(f"{few} calls with 16 MiB resident of 8 GiB, {many} with 256 MiB, {scattered} scattered")
    assert few > arrays
    # What is resident and was written lies in one run in each array here.
    assert many <= few + 50
    # Here in thousands of runs in each: protected in a few larger ones.  Some of the child's own
    # calls are counted, or come too late for it, so that these two may differ either way.
    assert scattered <= arrays * (ranges + 16) + 100


def made(pool: pyswap.Pool, pages: int) -> Any:
    """A private array whose pages' first words are their numbers, from 1 on."""
    a = pool.zeros(pages * WORDS, np.int64, private=True)
    a[::WORDS] = np.arange(1, pages + 1)
    return a


@pytest.mark.long
@pytest.mark.timeout(600)
def test_do_ten_thousand_forks_leave_nothing() -> None:
    # Out of a small process: the one that runs the tests has more memory for each fork to copy.
    told = subprocess.run(
        [sys.executable, "-c", FORKS_PROGRAM, str(FORKS)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    print(told.stdout)


def is_alone(pool: pyswap.Pool, a: Any) -> None:
    """Nobody else refers to the array's pages: a write to each copies none of them."""
    until(lambda: pool.stats().workers == 1, "the pool knows of this process only")
    copies = pool.stats().cow_copies
    committed = pool.stats().committed_bytes
    a[::WORDS] += 0
    assert pool.stats().cow_copies == copies
    assert pool.stats().committed_bytes == committed


@pytest.mark.core
def test_asks_a_child_only_where_arrays_are_that_are_in_pieces(
    pool: pyswap.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [pool.full((8, WORDS), i, np.int64, private=True) for i in range(4)]
    asked: list[int] = []
    page_runs = Attachment.page_runs

    def noted(self: Attachment, address: int, first: int, count: int) -> Any:
        asked.append(address)
        return page_runs(self, address, first, count)

    monkeypatch.setattr(Attachment, "page_runs", noted)
    clone = arrays[2].snapshot()
    arrays[2][3] = 7
    pieces = arrays[2].__array_interface__["data"][0]
    asked.clear()
    pid = os.fork()
    if pid == 0:
        right = [[i] * 8 for i in range(4)]
        right[2][3] = 7
        seen = [a[:, -1].tolist() for a in arrays]
        os._exit(0 if (seen, asked) == (right, [pieces]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (clone == 2).all()


@pytest.mark.core
def test_is_nothing_copied_for_a_child_that_became_another_program(pool: pyswap.Pool) -> None:
    a = made(pool, 48)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            a[0] = -1
            os.dup2(reading, 0)
            os.execvp("cat", ["cat"])
        finally:
            os._exit(1)
    os.close(reading)
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == "cat\n", "it is another program")
    is_alone(pool, a)
    os.close(writing)
    assert os.waitpid(pid, 0)[1] == 0
    assert (a[::WORDS] == np.arange(1, 49)).all()


@pytest.mark.core
def test_is_nothing_copied_for_programs_started_by_subprocess(pool: pyswap.Pool) -> None:
    a = made(pool, 48)
    for arguments in ({}, {"preexec_fn": os.getpid}, {"close_fds": False}):
        subprocess.run(["true"], check=True, **arguments)  # type: ignore[call-overload]
        is_alone(pool, a)


@pytest.mark.core
def test_is_nothing_copied_for_a_fork_that_failed(require: Any) -> None:
    require("user")
    text = """
import os, resource
import numpy as np
import pyswap
pool = pyswap.Pool("4 MiB", "16 MiB", page_size=4096)
a = pool.ones(48 * 512, np.int64, private=True)
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
for _ in range(3):
    try:
        if os.fork() == 0:
            os._exit(0)
        print("forked")
    except BlockingIOError:
        print("no fork")
# The swapper closes its own copies of the child's sockets after it has answered: the second
# request is served after the end of file that tells of the failure.
pool.check()
pool.check()
a += 1
print((a == 2).all(), pool.stats().cow_copies)
"""
    result = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout) == (0, "no fork\n" * 3 + "True 0\n"), result.stderr


@pytest.mark.failpoint
@pytest.mark.parametrize("busy", ["another thread", "the swapper"])
def test_does_a_fork_end_in_time_that_cannot_be_prepared(
    busy: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "FORK_TIMEOUT_S", 0.2)
    with pyswap.Pool("1 MiB", "16 MiB", page_size=PAGE_BYTES) as pool:
        a = made(pool, 48)
        held = Failpoint(pool, "fork_copied", "park")
        # Requests are made one at a time.
        with pool._attachment._lock if busy == "another thread" else held:
            pid = os.fork()
            if pid == 0:
                faulthandler.disable()
                os._exit(int(a[0]) + 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS
        assert "the child will have no arrays" in caplog.text
        assert "touching 1 of its arrays is SIGBUS" in capfd.readouterr().err
        # An answer that came too late is thrown away while the next is waited for, and with it what
        # was prepared: the swapper sees that before it serves one more.
        pool.check()
        pool.check()
        is_alone(pool, a)
        assert (a[::WORDS] == np.arange(1, 49)).all()


@pytest.mark.core
def test_does_the_log_of_a_refused_fork_keep_no_pool(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "FORK_TIMEOUT_S", 0.1)
    pool = pyswap.Pool("1 MiB", "1 MiB", page_size=PAGE_BYTES)
    attachment = pool._attachment
    with attachment._lock:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    pool.close()
    kept = weakref.ref(attachment)
    del pool, attachment
    assert "the child will have no arrays" in caplog.text
    assert kept() is None


@pytest.mark.core
def test_does_a_raw_clone_end_at_its_first_touch(pool: pyswap.Pool) -> None:
    a = made(pool, 48)
    address = a.__array_interface__["data"][0]
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = {"x86_64": 56, "aarch64": 220}
    pid = libc.syscall(numbers[os.uname().machine], CLONE_FLAGS, None, None, None, None)
    if pid == 0:
        faulthandler.disable()
        ctypes.string_at(address, 8)
        os._exit(0)
    assert pid > 0
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV
    is_alone(pool, a)
    assert (a[::WORDS] == np.arange(1, 49)).all()


@pytest.mark.core
def test_does_a_child_that_leaves_the_with_block_end_its_own_use_only() -> None:
    with pyswap.Pool("1 MiB", "16 MiB", page_size=PAGE_BYTES) as pool:
        a = made(pool, 48)
        pid = os.fork()
        if pid == 0:
            try:
                a[0] = -1
                pool.__exit__(None, None, None)
                # What it has stays right until it ends.
                os._exit(0 if a[0] == -1 and a[WORDS] == 2 else 1)
            finally:
                os._exit(2)
        assert os.waitpid(pid, 0)[1] == 0
        is_alone(pool, a)
        assert (a[::WORDS] == np.arange(1, 49)).all()
        pool.zeros(8)


@pytest.mark.core
def test_may_threads_fork_while_others_write_and_pages_are_evicted(seed: int) -> None:
    pages = 2048
    with pyswap.Pool("4 MiB", "64 MiB", page_size=PAGE_BYTES) as pool:
        a = pool.ones(pages * WORDS, np.int64, private=True)
        ended = threading.Event()
        failures: list[BaseException] = []

        def write() -> None:
            rng = np.random.default_rng(seed)
            rows = a.reshape(-1, WORDS)
            while not ended.is_set():
                at = int(rng.integers(0, pages - 8))
                rows[at : at + 8] += 1

        def fork() -> None:
            try:
                for _ in range(6):
                    child = Worker(a)
                    try:
                        first = child.ask(np.ndarray.sum)
                        assert child.ask(np.ndarray.sum) == first
                        child.ask(overwrite)
                        assert child.ask(np.ndarray.sum) == -a.size
                    finally:
                        child.finish()
            except BaseException as error:  # noqa: BLE001 - it is raised in the test's thread.
                failures.append(error)

        forking = [threading.Thread(target=fork) for _ in range(3)]
        writing = threading.Thread(target=write)
        writing.start()
        for thread in forking:
            thread.start()
        for thread in forking:
            thread.join()
        ended.set()
        writing.join()
        now = pool.stats()
        print(f"{now.evictions} evictions, {now.cow_copies} copies")
        assert not failures
        assert now.evictions > pages
        assert now.cow_copies > pages
        assert (a > 0).all()
        assert (a.reshape(-1, WORDS) == a.reshape(-1, WORDS)[:, :1]).all()


def overwrite(a: Any) -> None:
    a[:] = -1


@pytest.mark.core
def test_is_a_page_written_between_forks_protected_at_the_next() -> None:
    """A fork protects what was written since the last one; the rest is protected already."""
    pages = 64
    with pyswap.Pool("8 MiB", "8 MiB", page_size=PAGE_BYTES) as pool:
        a = pool.zeros((pages, WORDS), np.int64, private=True)
        a[:] = np.arange(pages)[:, None]
        for number in range(1, 6):
            # A child that ends at once: all pages are this process's own again, and protected.
            Actor(int).end()
            a[:: number + 1] += 1000
            before = a[:, 3].tolist()
            actor = Actor(lambda _: a[:, 3].tolist())
            try:
                a[:] += 1
                assert actor.ask() == before
                assert a[:, 3].tolist() == [n + 1 for n in before]
                if number == 3:
                    pool.advise(a, "pageout")
                assert actor.ask() == before
            finally:
                actor.end()
        pool.check()
