"""What holds the machinery still: failpoints, and workers that do one thing when they are told to.

A test arms a failpoint, has an `Actor` run into it, looks at what is true meanwhile, and releases
it. Waits are loops on a condition, with a bound; nothing here waits for time to pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

WAIT_S = float(os.environ.get("PYSWAP_WAIT_S", "60"))
"""How long anything here may take before the test has failed, in seconds."""
POLL_S = 0.0005


def until(predicate: Callable[[], object], what: str, seconds: float = WAIT_S) -> None:
    """Return once the predicate holds.

    Raises
    ------
    TimeoutError
        If it does not within `seconds`; `what` says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(POLL_S)


def where_threads_are(pid: int) -> str:
    """Tell what each thread of a process waits for: a line each, with its name, place and call."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            read = [(task / name).read_text().strip() for name in ("comm", "wchan", "syscall")]
            lines.append(f"process {pid}, thread {task.name}: {', '.join(read)}")
    return "\n".join(lines)


def page_id(pool: Any, a: Any) -> int:
    """Return the page id under a view's first byte."""
    from pyswap._native import native

    address = a.__array_interface__["data"][0]
    found = native.find(address)
    assert found is not None, "this memory is no pool's"
    start = found[0]
    base = pool._attachment.regions[start][2]
    return int(base + address - start) // int(pool.page_size)


# What is given to these in an assertion should be a page id: an assertion that fails shows its
# arguments, and to show an array is to touch it, which hangs, and the GIL with it, where its page
# is held at a failpoint.


def _frame(pool: Any, page: Any) -> tuple[int, str, int, int, bool] | None:
    number = page if isinstance(page, int) else page_id(pool, page)
    found: tuple[int, str, int, int, bool] | None = pool._control().frame(number)
    return found


def state_of(pool: Any, page: Any) -> str | None:
    """Tell the state of a page's frame; None where it has none. For a view: its first page."""
    frame = _frame(pool, page)
    return frame[1] if frame else None


def waiting_for(pool: Any, page: Any) -> int:
    """Count the workers whose faults wait for a page. For a view: its first page."""
    frame = _frame(pool, page)
    return frame[2] if frame else 0


def mappers_of(pool: Any, page: Any) -> int:
    """Count the workers that a page's frame has as mappers. For a view: its first page."""
    frame = _frame(pool, page)
    return frame[3] if frame else 0


def references_of(pool: Any, page: Any) -> int:
    """Count the regions that refer to a page of an array that was forked, as above."""
    number = page if isinstance(page, int) else page_id(pool, page)
    return int(pool._control().references(number))


def wait_for_waiters(pool: Any, page: int, count: int = 1) -> None:
    """Return once the faults of so many workers wait for a page."""
    until(lambda: waiting_for(pool, page) == count, f"{count} workers wait for page {page}")


def wait_unlocked(pool: Any, page: Any) -> None:
    """Return once a page's frame is unlocked: a fault's is when its neighbours are mapped."""

    def is_unlocked() -> bool:
        frame = _frame(pool, page)
        return frame is None or not frame[4]

    until(is_unlocked, f"page {page if isinstance(page, int) else page_id(pool, page)} is unlocked")


def touch(a: Any) -> int:
    """Read a view's first byte without the GIL, so that other threads run while it faults."""
    byte = ctypes.c_ubyte()
    ctypes.memmove(ctypes.byref(byte), a.__array_interface__["data"][0], 1)
    return byte.value


class Failpoint:
    """A failpoint of the debug build, armed inside a ``with`` block.

    Parameters
    ----------
    pool
        Whose swapper is to be held or failed.
    name
        One of `native.FAILPOINT_NAMES`.
    action
        ``park``, ``errno``, ``kill`` or ``stop``.
    error
        The errno of ``errno``.
    skip
        Visits to let pass first.
    limit
        Visits to act on; then the point disarms itself.
    """

    def __init__(
        self, pool: Any, name: str, action: str, *, error: int = 0, skip: int = 0, limit: int = 1
    ) -> None:
        from pyswap._native import native

        self._pool = pool
        self._name = name
        self._arguments = (native.FAILPOINT_ACTIONS.index(action), error, skip, limit)
        self._native = native
        self._number = native.FAILPOINT_NAMES.index(name)
        self._hits_before = 0

    def __enter__(self) -> Failpoint:
        self.arm()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def parked(self) -> int:
        """Threads parked here now."""
        return int(self._native.failpoint_state(self._pool._control(), self._number)[0])

    @property
    def hits(self) -> int:
        """Visits acted on since it was armed."""
        acted_on = self._native.failpoint_state(self._pool._control(), self._number)[1]
        return int(acted_on) - self._hits_before

    def arm(self) -> None:
        """Act on the next visits, as many as the limit says."""
        self._hits_before += self.hits
        self._native.failpoint_arm(self._pool._control(), self._number, *self._arguments)

    def wait_parked(self, count: int = 1) -> None:
        """Return once so many threads are parked here."""
        until(lambda: self.parked == count, f"{count} threads parked at {self._name}")

    def release(self) -> None:
        """Disarm it, and let every parked thread go on."""
        self._native.failpoint_release(self._pool._control(), self._number)
        until(lambda: self.parked == 0, f"nobody parked at {self._name}")


@contextlib.contextmanager
def points_met(pool: Any) -> Iterator[list[str]]:
    """Fill a list with the failpoints met inside the block: all are armed to do nothing."""
    from pyswap._native import native

    control, numbers = pool._control(), range(len(native.FAILPOINT_NAMES))
    errno = native.FAILPOINT_ACTIONS.index("errno")
    earlier = [native.failpoint_state(control, n)[1] for n in numbers]
    for n in numbers:
        native.failpoint_arm(control, n, errno, 0, 0, 1 << 30)
    met: list[str] = []
    yield met
    for n in numbers:
        native.failpoint_release(control, n)
    hits = [native.failpoint_state(control, n)[1] for n in numbers]
    met += [native.FAILPOINT_NAMES[n] for n in numbers if hits[n] > earlier[n]]


class Actor:
    """A forked worker that answers questions, one at a time.

    Parameters
    ----------
    answer
        Run in the child for each question; what it uses is inherited, what it returns is pickled.
    before
        Run in the child first.
    """

    def __init__(
        self, answer: Callable[[Any], Any], before: Callable[[], object] | None = None
    ) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._ours.close()
            self._serve(theirs, answer, before)
        theirs.close()

    @staticmethod
    def _serve(
        pipe: Any, answer: Callable[[Any], Any], before: Callable[[], object] | None
    ) -> None:
        try:
            if before is not None:
                before()
            while True:
                question = pipe.recv()
                if question is Actor:
                    os._exit(0)
                try:
                    pipe.send(answer(question))
                except Exception as error:  # noqa: BLE001 - the test is told.
                    pipe.send(error)
        except EOFError:
            os._exit(0)
        except BaseException:  # noqa: BLE001 - it must not return into pytest.
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)

    def tell(self, question: object = None) -> None:
        """Ask, and do not wait."""
        self._ours.send(question)

    def has_answered(self) -> bool:
        """Whether the answer to the latest question is there."""
        return self._ours.poll(0)

    def answer(self) -> Any:
        """Wait for the answer; an exception in the child is raised here."""
        if not self._ours.poll(WAIT_S):
            raise TimeoutError(f"no answer from worker {self.pid} within {WAIT_S} s")
        value = self._ours.recv()
        if isinstance(value, Exception):
            raise value
        return value

    def ask(self, question: object = None) -> Any:
        """Ask, and wait for the answer."""
        self.tell(question)
        return self.answer()

    def has_ended(self) -> bool:
        """Whether the process is over; `status` is then as `os.waitpid` gives it."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is not None

    def end(self) -> None:
        """End the process, by force where it hangs."""
        with contextlib.suppress(OSError):
            self._ours.send(Actor)
        try:
            until(self.has_ended, f"the end of worker {self.pid}", 10.0)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            until(self.has_ended, f"the end of worker {self.pid} after SIGKILL")
        finally:
            self._ours.close()


@contextlib.contextmanager
def actors(
    count: int, answer: Callable[[Any], Any], before: Callable[[], object] | None = None
) -> Iterator[list[Actor]]:
    """Fork `count` actors, and end them after the block."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(Actor(answer, before))
            stack.callback(made[-1].end)
        yield made
