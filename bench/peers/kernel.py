"""The kernel's own swap: memory that is over a control group's limit goes to a swap file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.area import swapped_on
from bench.plan import Plan
from bench.undo import set_aside

from .base import Counters, Make, Peer, swap_counters
from .plain import mapped

__all__ = ["KernelSwap"]

_PAGE_CLUSTER = Path("/proc/sys/vm/page-cluster")
_ZSWAP = Path("/sys/module/zswap/parameters/enabled")


class KernelSwap(Peer):
    """Anonymous memory, private for one process and MAP_SHARED for several.

    Parameters
    ----------
    page_cluster : int
        The kernel reads ``2 ** page_cluster`` pages at a time: 3 is its default, 5 its best.
    """

    limits_memory = True
    # Where every page was touched a moment ago, the kernel finds none to swap out and kills.
    attempts = 3

    def __init__(self, page_cluster: int) -> None:
        self.name = f"kernel-swap-{page_cluster}"
        self.title = f"kernel swap, page-cluster {page_cluster}"
        self._page_cluster = page_cluster

    def missing(self) -> str | None:
        """Say that only root may swap, where this is somebody else."""
        return None if os.geteuid() == 0 else "swapon needs root"

    @contextlib.contextmanager
    def arranged(self, plan: Plan) -> Iterator[dict[str, object]]:
        """Swap to the plan's area, with zswap off, for as long as the run takes."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(set_aside(_PAGE_CLUSTER, str(self._page_cluster)))
            if _ZSWAP.exists():
                stack.enter_context(set_aside(_ZSWAP, "N"))
            stack.enter_context(swapped_on(plan.area))
            yield {"page_cluster": self._page_cluster, "swap": plan.swap_bytes, "zswap": "N"}

    @contextlib.contextmanager
    def opened(self, plan: Plan) -> Iterator[Make]:
        """Yield what maps anonymous memory."""
        yield lambda shape, dtype, kind: mapped(shape, np.dtype(dtype), shared=kind == "shared")

    def counters(self) -> Counters:
        """Return the kernel's counters of pages swapped."""
        return swap_counters()

    def moved(self, grown: Counters) -> bool:
        """Say whether pages were swapped out and in."""
        return grown["pswpout"] > 0 and grown["pswpin"] > 0
