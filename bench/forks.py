"""A hundred forked children, one after another, of a process with a lot of private memory."""

from __future__ import annotations

import os
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from .plan import ROW_BYTES, Plan
from .share import Array, check

if TYPE_CHECKING:
    from .peers import Peer

__all__ = ["measure"]

CHILDREN = 100
ARRAYS = 4


def _child(part: Array, first: int, *, writing: bool) -> int:
    """Read or write a run of rows in a forked process, and return its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        if writing:
            part += 1
        found, n = int(part.sum()), len(part)
        # A row's words are its number, one more where it was written to.
        expected = part.shape[1] * (n * first + n * (n - 1) // 2 + n * writing)
        status = int(found != expected)
    finally:
        os._exit(status)


def measure(peer: Peer, plan: Plan, *, writing: bool) -> dict[str, Any]:
    """Fork children that each read, or write, 1 % of the memory in one run.

    Parameters
    ----------
    peer : Peer
        Whose private arrays it is.
    plan : Plan
        Its array's size is how much there is, in four arrays, all of it resident.
    writing : bool
        Whether the run is written to.

    Returns
    -------
    dict
        "rate": children a second.
    """
    warnings.simplefilter("ignore", DeprecationWarning)  # Forking beside threads is the point.
    rows = plan.array_bytes // ARRAYS // ROW_BYTES
    run = max(1, ARRAYS * rows // 100)
    with peer.opened(plan) as make:
        arrays = [make((rows, ROW_BYTES // 8), np.int64, "private") for _ in range(ARRAYS)]
        for a in arrays:
            a[:] = np.arange(rows)[:, None]
        random = np.random.default_rng(plan.seed)
        picks = random.integers(0, ARRAYS, CHILDREN)
        firsts = random.integers(0, rows - run + 1, CHILDREN)
        before = peer.counters()
        begin = time.monotonic()
        for pick, first in zip(picks.tolist(), firsts.tolist(), strict=True):
            status = _child(arrays[pick][first : first + run], first, writing=writing)
            check(status == 0, f"a child that began at row {first} ended with {status}")
        elapsed_s = time.monotonic() - begin
        grown = {name: value - before[name] for name, value in peer.counters().items()}
        if grown:
            check(grown["major_faults"] == 0, "the arrays were not resident")
            check(grown["minor_faults"] >= CHILDREN, "children did not fault")
        for a in arrays:
            check(int(a[-1, 0]) == rows - 1, "a child's write is seen by its parent")
        del a, arrays
    return {"rate": CHILDREN / elapsed_s, "elapsed_s": elapsed_s, "counters": grown}
