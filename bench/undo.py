"""What the bench changes on the machine, and that it is changed back, interrupted or not."""

from __future__ import annotations

import atexit
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

__all__ = ["catch_signals", "set_aside", "undone"]

_log = logging.getLogger("pyswap.bench")
_steps: list[Callable[[], None]] = []
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def undone(step: Callable[[], None]) -> Iterator[None]:
    """Run `step` at the end of the block, or of the process where the block never ends."""
    _steps.append(step)
    try:
        yield
    finally:
        _take_back(step)


@contextlib.contextmanager
def set_aside(path: Path, value: str) -> Iterator[None]:
    """Write a kernel setting inside the block, and what it was after it."""
    before = path.read_text().strip()
    if before == value:
        yield
        return

    def restore() -> None:
        path.write_text(before)

    with undone(restore):
        path.write_text(value)
        yield


def _take_back(step: Callable[[], None]) -> None:
    """Run one step, once, with nobody to interrupt it."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        if step in _steps:
            _steps.remove(step)
            step()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _take_all_back() -> None:
    while _steps:
        try:
            _take_back(_steps[-1])
        except OSError as error:
            _log.error("could not be undone: %s", error)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def catch_signals() -> None:
    """End by an exception where a signal would end this process, so that all is undone."""
    atexit.register(_take_all_back)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
