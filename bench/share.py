"""`Share`: one process's part of a workload, and the clock that it reports its progress to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .plan import Plan

__all__ = ["Array", "Share", "Timed", "Work", "WrongResultError", "check"]

Array = np.ndarray[Any, np.dtype[Any]]

MAX_POINTS = 200
"""Points of a throughput curve that one process hands back."""


class WrongResultError(AssertionError):
    """A workload read something else than what was written."""


def check(is_right: object, what: str) -> None:
    """Raise WrongResultError where a result is not what it must be."""
    if not is_right:
        raise WrongResultError(what)


@dataclass
class Share:
    """One of the processes of a run.

    Attributes
    ----------
    plan : Plan
        What the whole run is about.
    rank, count : int
        Which process this is, of how many.
    units : int
        What it has done: bytes, operations or columns.
    points : list of (float, int)
        Monotonic times in seconds, and the units done then.
    """

    plan: Plan
    rank: int
    count: int
    units: int = 0
    points: list[tuple[float, int]] = field(default_factory=list)

    @property
    def operations(self) -> int:
        """This process's part of the plan's random accesses."""
        return self.plan.operations // self.count

    def begin(self) -> None:
        """Start the clock."""
        self.units = 0
        self.points = [(time.monotonic(), 0)]

    def add(self, units: int) -> None:
        """Note that so many units more are done."""
        self.units += units
        self.points.append((time.monotonic(), self.units))

    def thinned(self) -> list[tuple[float, int]]:
        """Return the points, few enough to hand back, the first and last among them."""
        step = -(-len(self.points) // MAX_POINTS)
        return [*self.points[:-1:step], self.points[-1]]


Timed = Callable[[], None]
Work = Callable[[Array, Share], Timed]
"""Takes an array and a share, makes what it needs besides, and returns the part that is timed."""
