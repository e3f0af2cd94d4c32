"""One minor fault: a forked process's first touch of a page that is resident."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .limits import SPOT_BYTES
from .native import load
from .peers.paged import Paged
from .plan import Plan
from .share import check

if TYPE_CHECKING:
    from .peers import Peer

__all__ = ["measure"]


def _in_child(count: Callable[[], int]) -> int:
    """Return what `count` returns in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(count()))
    child.start()
    sender.close()
    try:
        return int(receiver.recv())
    finally:
        child.join()


def measure(peer: Peer, plan: Plan) -> float:
    """Fork processes that each touch pages of a resident array, far apart and in random order.

    Parameters
    ----------
    peer : Paged
        Arrays of a pool, for which alone this is a question.
    plan : Plan
        The array takes half its budget; as many processes as it has repeats, one at a time.

    Returns
    -------
    float
        Nanoseconds per fault. Now and then three touches in a row are equally far from each other,
        and spare the next one its fault.
    """
    assert isinstance(peer, Paged)
    native = load(plan.native)
    spots = plan.budget_bytes // 2 // SPOT_BYTES
    with peer.opened(plan) as make:
        a = make((spots * SPOT_BYTES,), np.uint8, "shared")
        a[:] = 1
        start = a.ctypes.data
        random = np.random.default_rng(plan.seed)
        taken = []
        before = peer.counters()
        for _ in range(plan.repeats):
            order = random.permutation(spots).astype(np.uint64)
            addresses = np.uint64(start) + order * np.uint64(SPOT_BYTES)
            taken.append(_in_child(functools.partial(native.touch_all, addresses)))
        grown = peer.counters()["minor_faults"] - before["minor_faults"]
        touches = spots * plan.repeats
        check(grown >= 0.98 * touches, f"{grown} minor faults for {touches} touches")
        del a
    return sum(taken) / min(grown, touches)
