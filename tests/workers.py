"""Forked processes that do what a test asks, one thing at a time, and waits with a bound.

A `Worker` inherits one object by fork and runs functions on it: ``w.ask(f, *args)`` is
``f(inherited, *args)`` in the worker. The functions are of a module, since they travel by name.
``w.fork()`` is a worker that inherits from that worker, as things are there by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import resource
import select
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

__all__ = ["Worker", "adopt_orphans", "is_running", "process_state", "until", "workers"]

PATIENCE_S = float(os.environ.get("PYSWAP_WAIT_S", "60"))
"""How long an answer or a condition may take before the test fails: an hour's load in a minute."""

_PR_SET_CHILD_SUBREAPER = 36

_connections: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Each with its inode: by another thread it may be half closed, and its descriptor another's."""

_line: Connection[Any, Any] | None = None
"""In a worker: its end of the pipe to the test."""


class Worker:
    """A forked process that runs functions on what it inherits.

    Parameters
    ----------
    inherited
        The first argument of every function; this process keeps no reference to it.
    """

    def __init__(self, inherited: Any) -> None:
        here: Connection[Any, Any]
        there: Connection[Any, Any]
        here, there = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                here.close()
                _serve(there, inherited)
                status = 0
            finally:
                os._exit(status)
        there.close()
        self._watch(here)

    def _watch(self, connection: Connection[Any, Any]) -> None:
        self._pidfd = os.pidfd_open(self.pid)
        self._status: int | None = None
        self.connection = connection
        _connections[connection] = os.fstat(connection.fileno()).st_ino

    def fork(self) -> Worker:
        """Have the worker fork another, which inherits what the worker has now.

        It becomes this process's child, which therefore has to `adopt_orphans`.
        """
        here, there = multiprocessing.Pipe()
        with there:
            self.send(_fork)
            send_handle(self.connection, there.fileno(), self.pid)
        self.answer()
        made = Worker.__new__(Worker)
        made.pid = here.recv()
        made._watch(here)
        return made

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the worker run a function; its result comes by `answer`."""
        self.connection.send((function, args))

    def answer(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        assert self.connection.poll(PATIENCE_S), f"worker {self.pid} does not answer"
        result = self.connection.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """Have the worker run a function and return its result."""
        self.send(function, *args)
        return self.answer()

    def signal(self, number: int) -> None:
        """Send a signal."""
        signal.pidfd_send_signal(self._pidfd, number)

    def stop(self) -> None:
        """Stop the worker wherever it is, and wait until it has stopped."""
        self.signal(signal.SIGSTOP)
        until(lambda: process_state(self.pid) == "T", f"worker {self.pid} stops")

    def kill(self) -> None:
        """Kill the worker wherever it is, and wait for its end."""
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def end(self) -> int:
        """Let the worker end by itself; returns its exit code, negative for a signal."""
        self.connection.close()
        return self.wait()

    def wait(self) -> int:
        """Wait for the worker's end; returns its exit code, negative for a signal."""
        if self._status is None:
            ended = select.select([self._pidfd], [], [], PATIENCE_S)[0]
            assert ended, f"worker {self.pid} does not end"
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def finish(self) -> None:
        """Leave nothing of the worker behind, whatever state it is in."""
        self.connection.close()
        if self._status is None:
            self.signal(signal.SIGKILL)
            self.wait()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _fork(inherited: Any) -> None:
    """Fork a worker by way of a process that ends at once: so it is nobody's child here."""
    assert _line is not None
    theirs: Connection[Any, Any] = Connection(recv_handle(_line))
    between = os.fork()
    if between == 0:
        status = 1
        try:
            if os.fork() == 0:
                _line.close()
                theirs.send(os.getpid())
                _serve(theirs, inherited)
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    assert os.waitpid(between, 0)[1] == 0


def _serve(connection: Connection[Any, Any], inherited: Any) -> None:
    global _line
    _line = connection
    # pytest's handler would tell the parent's stack for a signal that the test wants.
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Ends of pipes to elder siblings, whose end of file would not come while they are here.
    for other, inode in list(_connections.items()):
        with contextlib.suppress(OSError):
            if os.fstat(other.fileno()).st_ino == inode:
                other.close()
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            result = function(inherited, *args)
        except Exception as error:  # noqa: BLE001 - it is raised in the test.
            result = error
        connection.send(result)


@contextmanager
def workers(inherited: Any, count: int) -> Iterator[list[Worker]]:
    """Fork `count` workers, and leave none of them behind."""
    made: list[Worker] = []
    try:
        for _ in range(count):
            made.append(Worker(inherited))  # noqa: PERF401 - those made before a failure count.
        del inherited
        yield made
    finally:
        for worker in made:
            worker.finish()


@contextmanager
def adopt_orphans() -> Iterator[None]:
    """Have orphans among this process's descendants become its children.

    A pool is to be made before: its swapper is an orphan, too.
    """
    prctl = ctypes.CDLL(None).prctl
    assert prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        assert prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def until(predicate: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
    """Wait until a condition holds; fail the test where it does not come to hold."""
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, f"it never happened: {what}"
        time.sleep(0.001)


def process_state(pid: int) -> str:
    """Return the letter of a process's state, as ps has it; "X" where there is none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return text[text.rindex(")") + 2]
    return "X"


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that only waits for its parent to notice has."""
    return process_state(pid) not in "XZ"
