"""How long arrays, pools and swappers live, through forks, exits, threads and signals."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workers import Worker, is_running, until, workers

import pyswap
from pyswap._native import native

pytestmark = pytest.mark.core

WORDS = 512
"""64-bit words of the pages of the `pool` fixture."""
PAGES = 64


@contextmanager
def script(text: str, *, session: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Run a program that uses pyswap; its input and output are pipes."""
    package = str(Path(pyswap.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": package, "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + text],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=env,
        start_new_session=session,
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


PROLOGUE = """
import os, signal, sys, threading
import numpy as np
import pyswap
pool = pyswap.Pool("1 MiB", "8 MiB", page_size=4096)
"""


def outcome(text: str) -> tuple[int, str, str]:
    """Run a program to its end: exit code, output, errors."""
    with script(text) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def fill(a: Any) -> None:
    a[:] = np.arange(a.size).reshape(a.shape)


def is_filled(a: Any) -> bool:
    return bool((np.asarray(a).ravel() == np.arange(a.size)).all())


def press(pool: pyswap.Pool) -> None:
    """Make every other page leave memory."""
    frames = pool.memory // pool.page_size
    more = pool.full((2 * frames, WORDS), -1, np.int64)
    assert (more[:, 0] == -1).all()


# Objects.


def test_does_an_array_live_as_long_as_any_view_of_it(pool: pyswap.Pool) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill(a)
    corner = a[-1:, -3:].T
    del a
    gc.collect()
    press(pool)
    assert corner.ravel().tolist() == [PAGES * WORDS - 3, PAGES * WORDS - 2, PAGES * WORDS - 1]
    assert pool.stats().committed_bytes == PAGES * pool.page_size
    del corner
    assert pool.stats().committed_bytes == 0


def test_does_an_array_in_a_reference_cycle_go_with_it(pool: pyswap.Pool) -> None:
    cycle: list[Any] = [pool.full((PAGES, WORDS), 1, np.int64)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.stats().committed_bytes == 0


def test_is_a_childs_own_array_freed_with_the_child(pool: pyswap.Pool) -> None:
    for ending in ("end", "kill"):
        with workers(pool, 1) as (child,):
            address = child.ask(make_own)
            # It belongs to the pool's budget, and is nobody else's to see.
            assert pool.stats().committed_bytes == PAGES * pool.page_size
            assert not native.owns(address)
            with workers(pool, 1) as (sibling,):
                assert not sibling.ask(owns, address)
            getattr(child, ending)()
            until(lambda: pool.stats().committed_bytes == 0, "it is freed")
            until(lambda: pool.stats().resident_pages == 0, "its frames are free")


_kept: Any = None


def make_own(pool: pyswap.Pool) -> int:
    global _kept
    _kept = pool.zeros((PAGES, WORDS), np.int64)
    fill(_kept)
    press(pool)
    assert is_filled(_kept)
    return int(_kept.__array_interface__["data"][0])


def owns(_: Any, address: int) -> bool:
    return bool(native.owns(address))


# Release.


def read_first(a: Any) -> int:
    return int(a[0])


def test_does_release_end_an_array_for_all_processes(
    pool: pyswap.Pool, capfd: pytest.CaptureFixture[str]
) -> None:
    a = pool.full(PAGES * WORDS, 5, np.int64, name="the released one")
    b = pool.full(PAGES * WORDS, 6, np.int64)
    with workers(a, 3) as crew, workers(b, 1) as (bystander,):
        # In all ways: mapped writable, mapped, not mapped, and in swap.
        crew[0].ask(write_first, 5)
        assert crew[1].ask(read_first) == 5
        pool.advise(a[PAGES * WORDS // 2 :], "pageout")
        assert pool.stats().committed_bytes == 2 * PAGES * pool.page_size
        pool.release(a)
        now = pool.stats()
        assert now.committed_bytes == PAGES * pool.page_size
        assert now.swap_used_bytes == 0
        until(lambda: pool.stats().resident_pages == PAGES, "its frames are free")
        capfd.readouterr()
        for worker in crew:
            worker.send(read_first)
            assert worker.wait() == -signal.SIGBUS
            told = capfd.readouterr().err.splitlines()
            assert len(told) == 1
            assert "the released one" in told[0]
            assert "released" in told[0]
        assert bystander.ask(read_first) == 6
    assert (b == 6).all()


def write_first(a: Any, value: int) -> None:
    a[0] = value


def test_does_release_twice_change_nothing(pool: pyswap.Pool) -> None:
    a = pool.full(PAGES * WORDS, 5, np.int64)
    b = pool.full(PAGES * WORDS, 6, np.int64)
    pool.release(a)
    pool.release(a)
    assert pool.stats().committed_bytes == b.nbytes
    del a
    assert pool.stats().committed_bytes == b.nbytes
    assert (b == 6).all()


def test_are_old_bytes_never_seen_in_a_new_array(pool: pyswap.Pool) -> None:
    a = pool.full(PAGES * WORDS, 5, np.int64)
    with workers(a, 1) as (stopped,):
        stopped.ask(write_first, 9)
        stopped.stop()
        pool.release(a)
        del a
        # As many new arrays as would meet the old page ids if those were free already.
        news = [pool.zeros(PAGES * WORDS, np.int64) for _ in range(20)]
        for new in news:
            assert not new.any(), "old bytes in a new array"
            new[:] = 1
        stopped.send(write_first, 9)
        stopped.signal(signal.SIGCONT)
        assert stopped.wait() == -signal.SIGBUS
        for new in news:
            assert (new == 1).all(), "a write to the old array reached a new one"


def test_is_a_new_array_zero_where_an_old_one_was(pool: pyswap.Pool) -> None:
    for n in range(1, 20):
        a = pool.zeros((n * 7, WORDS), np.int64)
        assert not a.any()
        a[:] = n
        if n % 3 == 0:
            pool.advise(a, "pageout")
        del a
    assert pool.stats().swap_used_bytes == 0


# Pools.


def test_do_arrays_stay_right_after_close() -> None:
    with pyswap.Pool("1 MiB", "8 MiB", page_size=4096) as pool:
        a = pool.zeros((4 * PAGES, WORDS), np.int64)
        b = pool.zeros((4 * PAGES, WORDS), np.int64)
        swapper = pool.swapper_pid
        with workers(a, 1) as (child,):
            pool.close()
            pool.close()
            with pytest.raises(pyswap.PoolClosedError):
                pool.zeros(3)
            # More than the budget, so that every page goes out and comes back.
            for array in (a, b):
                fill(array)
            assert child.ask(is_filled)
            assert is_filled(a)
            del a
            assert is_running(swapper)
            assert is_filled(b)
            assert child.ask(is_filled)
            del b, array
            assert is_running(swapper), "the child's array lives"
            assert child.ask(is_filled)
            assert child.end() == 0
        until(lambda: not is_running(swapper), "the swapper ends with the last array")
        with pytest.raises(pyswap.PoolClosedError):
            pool.stats()


def test_does_an_array_outlive_the_pool_object(tmp_path: Path) -> None:
    pool = pyswap.Pool("1 MiB", "8 MiB", page_size=4096)
    swapper = pool.swapper_pid
    with pool:
        a = pool.zeros((8 * PAGES, WORDS), np.int64)
        fill(a)
    del pool
    gc.collect()
    assert is_filled(a)
    # What needs a pin finds the pool by the array.
    a[: 2 * PAGES].tofile(tmp_path / "a")
    assert is_filled(np.fromfile(tmp_path / "a", np.int64))
    file = io.BytesIO()
    np.save(file, a[:3])
    file.seek(0)
    assert is_filled(np.load(file))
    with workers(a, 1) as (child,):
        assert child.ask(is_filled)
        assert child.end() == 0
    assert is_running(swapper)
    del a
    until(lambda: not is_running(swapper), "the swapper ends with the last array")


def test_does_a_pool_end_that_is_dropped_without_close() -> None:
    pool = pyswap.Pool("1 MiB", "8 MiB", page_size=4096)
    swapper = pool.swapper_pid
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill(a)
    del pool
    gc.collect()
    assert is_filled(a)
    del a
    gc.collect()
    until(lambda: not is_running(swapper), "the swapper ends")


def close_and_read(held: tuple[pyswap.Pool, Any]) -> bool:
    """Close the pool in this process; its array stays right, and new ones are refused."""
    pool, a = held
    pool.close()
    with pytest.raises(pyswap.PoolClosedError):
        pool.zeros(3)
    return is_filled(a)


def leave_with(held: tuple[pyswap.Pool, Any]) -> bool:
    pool, a = held
    with pool:
        pass
    return is_filled(a)


def make_one(held: tuple[pyswap.Pool, Any]) -> bool:
    return not held[0].zeros(3 * WORDS).any()


@pytest.mark.parametrize("close", [close_and_read, leave_with])
def test_does_close_in_a_child_end_the_childs_use_only(pool: pyswap.Pool, close: Any) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill(a)
    with workers((pool, a), 2) as (closing, other):
        assert closing.ask(close)
        press(pool)
        assert is_filled(pool.array(np.arange(3 * WORDS)))
        assert other.ask(make_one)
        assert closing.ask(inherited_is_filled)
        assert closing.end() == 0
        assert other.ask(make_one)
    assert is_filled(a)


def inherited_is_filled(held: tuple[pyswap.Pool, Any]) -> bool:
    return is_filled(held[1])


def leave_for_good(pool: pyswap.Pool) -> bool:
    """Close the pool in a process that has no array: nothing of it stays."""
    held = len(os.listdir("/proc/self/fd"))
    pool.close()
    with pytest.raises(pyswap.PoolClosedError):
        pool.stats()
    return len(os.listdir("/proc/self/fd")) < held


def test_does_a_child_without_arrays_leave_at_close(pool: pyswap.Pool) -> None:
    with workers(pool, 1) as (child,):
        until(lambda: pool.stats().workers == 2, "the child is attached")
        assert child.ask(leave_for_good)
        until(lambda: pool.stats().workers == 1, "the child has left")
        assert not pool.zeros(WORDS).any()


def test_do_two_pools_live_side_by_side(seed: int) -> None:
    rng = np.random.default_rng(seed)
    with (
        pyswap.Pool("1 MiB", "8 MiB", page_size=4096) as small,
        pyswap.Pool("4 MiB", "8 MiB", page_size=16384) as large,
    ):
        assert small.swapper_pid != large.swapper_pid
        a = small.zeros((8 * PAGES, WORDS), np.int64)
        b = large.zeros((30 * PAGES, WORDS), np.int64)
        fill(a)
        fill(b)
        with workers((a, b), 3) as crew:
            for worker in crew:
                worker.send(both_filled, int(rng.integers(1 << 62)))
            assert all(worker.answer() for worker in crew)
            for right, wrong, array in ((small, large, a), (large, small, b)):
                right.advise(array, "pageout")
                with pytest.raises(ValueError, match="another pool"):
                    wrong.advise(array, "pageout")
            swapper = small.swapper_pid
            del a, array
            small.close()
            assert is_filled(b)
            assert all(worker.ask(both_filled, seed) for worker in crew)
            assert is_running(swapper)
        until(lambda: not is_running(swapper), "the first pool ends")
        assert is_filled(b)
        for pool in (small, large):
            with contextlib.suppress(pyswap.PoolClosedError):
                assert os.fstat(pool.fileno()).st_blocks * 512 <= pool.memory


def both_filled(arrays: tuple[Any, Any], seed: int) -> bool:
    """Look at both arrays, a few rows of one and a few of the other by turns."""
    rng = np.random.default_rng(seed)
    for _ in range(200):
        array = arrays[int(rng.integers(2))]
        row = int(rng.integers(len(array)))
        if array[row].tolist() != list(range(row * WORDS, (row + 1) * WORDS)):
            return False
    return True


# The swapper, and the creator.


def test_is_the_swapper_nobodys_child(pool: pyswap.Pool) -> None:
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert os.getsid(pool.swapper_pid) != os.getsid(0)
    assert os.getpgid(pool.swapper_pid) != os.getpgid(0)


def test_does_ctrl_c_not_reach_the_swapper() -> None:
    text = """
a = pool.zeros((1024, 512), np.int64)
a[:, 0] = np.arange(1024)
child = os.fork()
try:
    if child == 0:
        signal.pause()
    print(pool.swapper_pid, child)
    signal.pause()
except KeyboardInterrupt:
    # Each page comes back from swap, which takes a swapper.
    assert (a[:, 0] == np.arange(1024)).all()
    if child == 0:
        os._exit(17)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    os.kill(pool.swapper_pid, signal.SIGINT)
    pool.advise(a, "pageout")
    assert (a[:, 0] == np.arange(1024)).all()
    print(pool.stats().slot_reads > 1000)
"""
    with script(text, session=True) as process:
        assert process.stdout is not None
        swapper, child = map(int, process.stdout.readline().split())
        until(lambda: waits_in_pause(child), "the child waits")
        until(lambda: waits_in_pause(process.pid), "the creator waits")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "True\n", "")
    until(lambda: not is_running(swapper), "the swapper ends with its creator")


def waits_in_pause(pid: int) -> bool:
    """Whether a process's main thread is inside pause(2)."""
    with contextlib.suppress(OSError):
        call = Path(f"/proc/{pid}/syscall").read_text().split()[0]
        return call.isdigit() and int(call) == PAUSE[os.uname().machine]
    return False


PAUSE = {"x86_64": 34, "aarch64": 73}
"""The number of pause(2), or of ppoll(2) where there is no such call."""


@pytest.mark.parametrize("ending", ["", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_do_children_go_on_when_the_creator_ends_first(ending: str) -> None:
    text = f"""
a = pool.zeros((1024, 512), np.int64)
a[:, 0] = np.arange(1024)
creator = os.getpid()
if os.fork() == 0:
    print(pool.swapper_pid)
    sys.stdin.readline()
    assert os.getppid() != creator
    for n in range(3):
        assert (a[:, 0] == np.arange(1024) + n).all()
        a[:, 0] += 1
        if os.fork():
            os._exit(0)
    try:
        while True:
            pool.zeros(3)
    except pyswap.PoolClosedError:
        print("closed", (a[:, 0] == np.arange(1024) + 3).all())
    sys.stdout.flush()
    os._exit(0)
{ending}
"""
    with script(text) as process:
        assert process.stdout is not None
        swapper = int(process.stdout.readline())
        process.wait(60)
        assert is_running(swapper)
        out, err = process.communicate("go\n", timeout=60)
    assert (out, err) == ("closed True\n", "")
    until(lambda: not is_running(swapper), "the swapper ends with the last process")


def test_may_arrays_be_used_in_daemon_threads_and_exit_handlers_at_the_end() -> None:
    text = """
import atexit
a = pool.zeros((1024, 512), np.int64)
running = threading.Barrier(5)
def use(k):
    running.wait()
    while True:
        a[:, k] += 1
for k in range(1, 5):
    threading.Thread(target=use, args=(k,), daemon=True).start()
running.wait()
a[:, 0] = 7
@atexit.register
def last():
    assert (a[:, 0] == 7).all()
    print("right")
class Late:
    def __del__(self):
        assert self.a[1023, 0] == 7
late = Late()
late.a = a
"""
    for _ in range(5):
        assert outcome(text) == (0, "right\n", "")


def test_does_a_pool_that_nobody_closes_end_with_its_process() -> None:
    code, out, err = outcome("a = pool.ones(100_000)\nprint(pool.swapper_pid)")
    assert (code, err) == (0, "")
    until(lambda: not is_running(int(out)), "the swapper ends")


# Processes that are no workers.


def test_does_a_program_started_meanwhile_hold_nothing_of_the_pool() -> None:
    starts: list[dict[str, Any]] = [
        {},
        {"close_fds": False},
        {"preexec_fn": lambda: None},
        {"start_new_session": True},
    ]
    cat = ["cat", "/proc/self/maps", "-"]
    running = []
    pipe = subprocess.PIPE
    try:
        with pyswap.Pool("1 MiB", "8 MiB", page_size=4096) as pool:
            a = pool.zeros((8 * PAGES, WORDS), np.int64)
            fill(a)
            swapper = pool.swapper_pid
            running.extend(
                subprocess.Popen(cat, stdin=pipe, stdout=pipe, text=True, **how) for how in starts
            )
            assert is_filled(a)
            until(lambda: pool.stats().workers == 1, "no program counts as a worker")
            held = [
                os.readlink(link)
                for process in running
                for link in Path(f"/proc/{process.pid}/fd").iterdir()
            ]
            ours = ("/dev/shm/pyswap", "/memfd:pyswap", "userfaultfd")
            assert not [path for path in held if any(name in path for name in ours)]
            del a
            assert pool.stats().committed_bytes == 0
        until(lambda: not is_running(swapper), "the swapper ends while the programs run")
    finally:
        for process in running:
            out, _ = process.communicate(timeout=60)
            assert "pyswap" not in out


def test_does_a_child_that_becomes_another_program_leave_the_pool(pool: pyswap.Pool) -> None:
    held = [pool.full((PAGES, WORDS), 1, np.int64)]
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            held[0][:] += 1
            os.dup2(reading, 0)
            os.execvp("cat", ["cat"])
        finally:
            os._exit(1)
    os.close(reading)
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == "cat\n", "it is another program")
    assert (held[0] == 2).all()
    held.clear()
    until(lambda: pool.stats().committed_bytes == 0, "its part of the array is given up")
    until(lambda: pool.stats().workers == 1, "it is no worker any more")
    os.close(writing)
    assert os.waitpid(pid, 0)[1] == 0


# Forks.


def fork_and_add(a: Any, column: int) -> None:
    """Add 1 to a column in a child; wait for it."""
    pid = os.fork()
    if pid == 0:
        try:
            a[:, column] += 1
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_may_several_threads_fork_while_others_use_arrays(pool: pyswap.Pool) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    failures: list[BaseException] = []
    ended = threading.Event()

    def run(work: Any) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised in the test's thread.
            failures.append(error)

    def fork(column: int) -> None:
        for _ in range(10):
            fork_and_add(a, column)

    def use() -> None:
        while not ended.is_set():
            b = pool.full((PAGES, WORDS), 1, np.int64)
            a[:, 10] += 1
            assert (b == 1).all()
            pool.advise(a, "pageout")

    forking = [threading.Thread(target=run, args=(lambda k=k: fork(k),)) for k in range(4)]
    using = threading.Thread(target=run, args=(use,))
    using.start()
    for thread in forking:
        thread.start()
    for thread in forking:
        thread.join()
    ended.set()
    using.join()
    assert not failures
    assert (a[:, :4] == 10).all()
    assert (a[:, 10] == a[0, 10]).all()
    until(lambda: pool.stats().workers == 1, "every child is gone")
    until(lambda: pool.stats().committed_bytes == a.nbytes, "nothing else is kept")


def test_may_a_thread_fork_and_the_child_go_on_as_any_worker(pool: pyswap.Pool) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill(a)
    made: list[Worker] = []
    thread = threading.Thread(target=lambda: made.append(Worker((pool, a))))
    thread.start()
    thread.join()
    (worker,) = made
    try:
        assert worker.ask(inherited_is_filled)
        assert worker.ask(make_one)
        press(pool)
        assert worker.ask(inherited_is_filled)
        assert worker.end() == 0
    finally:
        worker.finish()


def test_do_nested_forks_share_and_outlive_their_parents(pool: pyswap.Pool) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for depth in range(5):
                a[:, depth] += depth + 1
                # Each parent ends at once; its child goes on.
                if os.fork():
                    os._exit(0)
            assert a[:, :5].sum() == PAGES * 15
            a[:, 5] = 6
            os.write(writing, b"done")
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"done"
    assert (a[:, :6] == np.arange(1, 7)).all()
    until(lambda: pool.stats().workers == 1, "every descendant is gone")


def test_does_a_failed_fork_leave_no_place(require: Any) -> None:
    require("user")
    text = """
import resource
a = pool.ones((64, 512))
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
del a
while pool.stats().committed_bytes:
    pass
b = pool.ones((64, 512))
print(b.all(), pool.stats().workers)
"""
    assert outcome(text) == (0, "no fork\n" * 3 + "True 1\n", "")


# Pins.


def test_does_a_pin_belong_to_its_process(pool: pyswap.Pool) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill(a)
    with pool.pin(a):
        with workers(a, 1) as (child,):
            assert child.ask(is_filled)
            assert child.end() == 0
        until(lambda: pool.stats().workers == 1, "the child is gone")
        # The child did not inherit it, so its end has not ended it either.
        press(pool)
        assert pool.residency(a).all()
        assert pool.stats().pinned_pages == PAGES
        with workers(a, 1) as (child,):
            assert child.ask(is_filled)
            faults = pool.stats().major_faults
            assert is_filled(a)
            assert pool.stats().major_faults == faults
    assert pool.stats().pinned_pages == 0
    press(pool)
    assert not pool.residency(a).all()


def test_does_a_pin_of_two_processes_hold_until_both_let_go(pool: pyswap.Pool) -> None:
    a = pool.zeros((PAGES, WORDS), np.int64)
    fill(a)
    with workers((pool, a), 1) as (child,):
        child.ask(begin_pin)
        with pool.pin(a[: PAGES // 2]):
            assert pool.stats().pinned_pages == PAGES
        assert pool.stats().pinned_pages == PAGES
        child.ask(end_pin)
        assert pool.stats().pinned_pages == 0


_pins: list[Any] = []


def begin_pin(held: tuple[pyswap.Pool, Any]) -> None:
    pool, a = held
    pin = pool.pin(a)
    pin.__enter__()
    _pins.append(pin)


def end_pin(_: Any) -> None:
    _pins.pop().__exit__(None, None, None)


# Interpreters.


def test_do_sub_interpreters_get_an_import_error() -> None:
    text = """
try:
    import _interpreters as interpreters
    run = interpreters.exec
except ImportError:
    import _xxsubinterpreters as interpreters
    run = interpreters.run_string
made = interpreters.create()
told = '''
try:
    import pyswap
    pyswap.Pool
except ImportError as error:
    print("ImportError", len(str(error).splitlines()))
'''
failed = run(made, told)
assert failed is None, failed
sys.stdout.flush()
"""
    code, out, err = outcome(text)
    assert (code, out.strip()) == (0, "ImportError 1"), err
