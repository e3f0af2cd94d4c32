"""The peer that this is about: arrays of a `pyswap.Pool`, with nothing set but its sizes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bench.plan import Plan

from .base import Counters, Make, Peer

if TYPE_CHECKING:
    import pyswap

__all__ = ["Paged"]


class Paged(Peer):
    """`Pool(memory, swap)`, its swap file in the bench's folder.

    Parameters
    ----------
    page_kib : int or None
        A page size other than the default; such a peer is shown, and counts nowhere.
    """

    def __init__(self, page_kib: int | None = None) -> None:
        self.name = f"pyswap-{page_kib}k" if page_kib else "pyswap"
        self.title = f"pyswap, {page_kib} KiB pages" if page_kib else "pyswap"
        self._page_bytes = page_kib << 10 if page_kib else None
        self._pool: pyswap.Pool | None = None

    @contextlib.contextmanager
    def arranged(self, plan: Plan) -> Iterator[dict[str, object]]:
        """Tell the settings; there is nothing to prepare."""
        yield {
            "memory": plan.budget_bytes,
            "swap": plan.swap_bytes,
            "page_size": self._page_bytes or "default",
        }

    @contextlib.contextmanager
    def opened(self, plan: Plan) -> Iterator[Make]:
        """Yield what makes arrays in a pool; PYSWAP_DIR is set by who started this process."""
        import pyswap

        sizes = plan.budget_bytes, plan.swap_bytes
        with pyswap.Pool(*sizes, page_size=self._page_bytes) as pool:
            self._pool = pool
            yield lambda shape, dtype, kind: pool.empty(shape, dtype, private=kind == "private")

    @property
    def pool(self) -> pyswap.Pool:
        """The pool that is open."""
        assert self._pool is not None
        return self._pool

    def counters(self) -> Counters:
        """Return the pool's numbers."""
        return dataclasses.asdict(self.pool.stats())

    def moved(self, grown: Counters) -> bool:
        """Say whether pages were evicted and read back."""
        return grown["evictions"] > 0 and grown["slot_reads"] > 0

    def swapper_pid(self) -> int | None:
        """Return the pool's swapper."""
        return self.pool.swapper_pid
