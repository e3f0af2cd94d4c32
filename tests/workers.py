"""Forked processes that do what a test asks, one thing at a time, and waits with a bound.

A `Worker` inherits one object by fork and runs functions on it: ``w.ask(f, *args)`` is
``f(inherited, *args)`` in the worker. The functions are of a module, since they travel by name.
"""

from __future__ import annotations

import contextlib
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
from pathlib import Path
from typing import Any

__all__ = ["Worker", "is_running", "process_state", "until", "workers"]

PATIENCE_S = 60.0
"""How long an answer or a condition may take before the test fails: an hour's load in a minute."""

_connections: weakref.WeakSet[Any] = weakref.WeakSet()


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
        self._pidfd = os.pidfd_open(self.pid)
        self._status: int | None = None
        self.connection = here
        _connections.add(here)

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


def _serve(connection: Connection[Any, Any], inherited: Any) -> None:
    # pytest's handler would tell the parent's stack for a signal that the test wants.
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Ends of pipes to elder siblings, whose end of file would not come while they are here.
    for other in list(_connections):
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
