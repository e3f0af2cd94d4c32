"""memopro: a pager that compresses in memory what its budget cannot hold, and writes no disk."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.plan import Plan

from .base import Counters, Make, Peer

__all__ = ["MemoPro"]


class MemoPro(Peer):
    """NumPy's arrays under `memopro.rt.transparent`, in a control group as the others are.

    What does not compress it keeps over its budget: in the group, the kernel kills it for that.
    """

    name = "memopro"
    title = "memopro"
    limits_memory = True

    def __init__(self) -> None:
        self._pager: Any = None

    def missing(self) -> str | None:
        """Say that it is not installed, or not for this Python."""
        if importlib.util.find_spec("memopro") is not None:
            return None
        has_it = sys.version_info >= (3, 11)
        return "memopro is not installed" if has_it else "memopro needs Python 3.11"

    @contextlib.contextmanager
    def arranged(self, plan: Plan) -> Iterator[dict[str, object]]:
        """Tell the settings."""
        yield {
            "memory": plan.budget_bytes,
            "interface": "memopro.rt.transparent",
            "rest": "default",
        }

    @contextlib.contextmanager
    def opened(self, plan: Plan) -> Iterator[Make]:
        """Yield NumPy's own constructor, whose memory is paged inside the block."""
        from memopro.rt import transparent

        with transparent(plan.budget_bytes) as pager:
            self._pager = pager
            yield lambda shape, dtype, kind: np.empty(shape, dtype)

    def counters(self) -> Counters:
        """Return the pager's numbers."""
        told = self._pager.stats()
        return {name: value for name, value in told.items() if isinstance(value, int)}

    def moved(self, grown: Counters) -> bool:
        """Say whether chunks were compressed and came back."""
        return grown["evictions"] > 0 and grown["restores"] > 0
