"""Taking swap areas off: every page leaves, in batches between which the worker is told of it."""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import config
from .areas import Areas
from .protocol import Message

if TYPE_CHECKING:
    from ._native import native

__all__ = ["Swapoff", "Swapoffs"]


@dataclass
class Swapoff:
    """One area on its way out: its place, who asked for it, and from which slot on to look."""

    place: int
    worker: int
    at: int = 0


class Swapoffs:
    """What is being taken off; used by the swapper's main thread only, but for `move`.

    Who asks for it and dies, or is interrupted, leaves the area on.

    Parameters
    ----------
    tables : native.Swapper
        The tables that the reclaim threads read.
    areas : Areas
        The areas of the pool.
    """

    def __init__(self, tables: native.Swapper, areas: Areas) -> None:
        self._tables = tables
        self._areas = areas
        self._going: dict[int, Swapoff] = {}

    def begin(self, number: int, worker: int) -> int:
        """Let no page into an area any more; returns how many have to leave it.

        Raises
        ------
        ValueError
            If it is off already, or being taken off.
        SwapFullError
            If frames and the other areas could not hold the pages; then nothing has changed.
        """
        area = self._areas.find(number)
        if number in self._going:
            raise ValueError(f"the swap area {area.path} is being taken off already")
        used = self._areas.shut(number)
        self._going[number] = Swapoff(area.place, worker)
        return used

    def find(self, number: int, worker: int) -> Swapoff:
        """What a worker is taking off.

        Raises
        ------
        ValueError
            If the area is off, or this worker is not taking it off.
        """
        area = self._areas.find(number)
        going = self._going.get(number)
        if going is None or going.worker != worker:
            raise ValueError(f"the swap area {area.path} is not being taken off here")
        return going

    def is_over(self, number: int) -> bool:
        """Whether the area is off."""
        return not self._areas.has(number)

    def resume(self, number: int, worker: int) -> None:
        """Have a worker's swapoff go on that was under way when another swapper died."""
        going = self._going.get(number)
        if going is None or going.worker != worker:
            self.begin(number, worker)

    def move(self, going: Swapoff, owners: list[tuple[int, int, int, int]]) -> Message:
        """Have a batch of pages leave, in a service thread; tells how many are there still.

        `owners` are those of `Objects.owners`.
        """
        pages, at = self._tables.area_pages(going.place, going.at, config.DRAIN_PAGES)
        for page in pages:
            i = bisect_right(owners, (page, 1 << 64)) - 1
            base, count, o, generation = owners[i] if i >= 0 else (0, 0, 0, 0)
            # One of an object that was made since is met in the next round.
            if base <= page < base + count:
                self._tables.page_leave_area(o, generation, page, page - base, going.place)
        left = self._tables.area(going.place)[2]
        if left and at is None:
            # What is being written, or belongs to a dying array, takes its time.
            time.sleep(config.RETRY_S)
        going.at = at or 0
        return {"left": left}

    def end(self, number: int) -> None:
        """Let an area go, if no page has a slot of it any more."""
        if number in self._going and self._areas.remove(number):
            del self._going[number]

    def cancel(self, worker: int) -> None:
        """Use again what a worker was taking off: it was interrupted, or has ended."""
        for number in [n for n, going in self._going.items() if going.worker == worker]:
            del self._going[number]
            self._areas.open(number)
