"""`Peer`: one way to have an array larger than memory, or larger than nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bench.plan import Plan

__all__ = ["Array", "Counters", "Kind", "Make", "Peer", "swap_counters"]

Array = npt.NDArray[Any]
Kind = Literal["alone", "shared", "private"]
"""Who uses an array: one process; it and those forked from it; each its own copy from then on."""
Make = Callable[[Any, Any, Kind], Array]
"""Makes an array of a shape, dtype and kind."""
Counters = dict[str, int]


def swap_counters() -> Counters:
    """Return the kernel's counters of pages swapped, of the whole machine."""
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return {name: int(value) for name, value in lines if name in ("pswpin", "pswpout")}


class Peer:
    """One side of a comparison; the methods say what its runs differ in.

    Attributes
    ----------
    name, title : str
        For the command line; for tables.
    limits_memory : bool
        Whether the run needs a control group: the budget, plus what the script itself takes.
    attempts : int
        How often a run is tried that the kernel kills at the limit.
    environment : dict
        What the run's environment has besides.
    """

    name = ""
    title = ""
    limits_memory = False
    attempts = 1
    environment: dict[str, str] = {}  # noqa: RUF012 (never written to)

    def missing(self) -> str | None:
        """Say why this peer cannot run here; None where it can."""
        return None

    @contextlib.contextmanager
    def arranged(self, plan: Plan) -> Iterator[dict[str, object]]:
        """Prepare the machine for one run, and yield the settings that were made."""
        yield {}

    @contextlib.contextmanager
    def opened(self, plan: Plan) -> Iterator[Make]:
        """Yield, in the run's process, what makes its array."""
        yield lambda shape, dtype, kind: np.empty(shape, dtype)

    def counters(self) -> Counters:
        """Return, in the run's process, what tells that pages moved."""
        return {}

    def moved(self, grown: Counters) -> bool:
        """Say whether counters that grew so much show that pages left memory and came back."""
        return True

    def swapper_pid(self) -> int | None:
        """Return the process whose CPU time counts as the run's, if there is one."""
        return None
