"""The swapper's records of pins: which pages stay in memory, and for whom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import protocol
from .errors import Error
from .objects import Numbers, RegionRecord
from .protocol import Message

if TYPE_CHECKING:
    from ._native import native

__all__ = ["MAX_PINS", "Pin", "Pinner", "Pins"]

MAX_PINS = 65536


@dataclass
class Pin:
    """Pages of one region: ranges (first, count) of page indices, each with a row in the table."""

    region: RegionRecord
    ranges: list[tuple[int, int]]
    write: bool
    pages: int
    rows: list[int]


@dataclass
class Pinner:
    """The pins of one process, by its own numbers for them.

    Those of `making` are not granted yet; of these it takes back the `cancelled` ones.
    """

    worker: int
    granted: dict[int, Pin] = field(default_factory=dict)
    making: set[int] = field(default_factory=set)
    cancelled: set[int] = field(default_factory=set)


class Pins:
    """Every pin of a pool; used by the swapper's main thread only, but for `hold`.

    Parameters
    ----------
    tables : native.Swapper
        The tables that the fault threads read.
    """

    def __init__(self, tables: native.Swapper) -> None:
        self.pages = 0
        self._tables = tables
        self._rows = Numbers(MAX_PINS)

    def take(
        self,
        pinner: Pinner,
        number: int,
        region: RegionRecord,
        ranges: list[tuple[int, int]],
        write: bool,
        limit: int,
        frame_count: int,
    ) -> Pin:
        """Take room for a pin; `grant` follows once its pages are held, or could not be.

        Raises
        ------
        ValueError
            If the process has a pin of that number.
        MemoryError
            If more than `limit` of the frames would have pinned pages, or a table is full.
        """
        if number in pinner.granted or number in pinner.making:
            raise ValueError(f"pin {number} is there already")
        pin = Pin(region, ranges, write, sum(n for _, n in ranges), [])
        if self.pages + pin.pages > limit:
            raise MemoryError(
                f"{pin.pages} pages do not fit beside {self.pages} that are pinned: of "
                f"{frame_count} frames {limit} may be"
            )
        try:
            for first, count in ranges:
                pin.rows.append(self._rows.take("pinned ranges"))
                which = pin.rows[-1], pinner.worker, number, region.number
                self._tables.pin_note(*which, first, count, write)
        except BaseException:
            self._forget(pin)
            raise
        self.pages += pin.pages
        pinner.making.add(number)
        return pin

    def hold(self, pin: Pin) -> Message:
        """Pin all ranges or none, in a service thread."""
        region = pin.region
        done: list[tuple[int, int]] = []
        try:
            for first, count in pin.ranges:
                self._tables.pin(region.number, region.generation, first, count, pin.write)
                done.append((first, count))
        except BaseException:
            self._let_go(region, done, pin.write)
            raise
        return {}

    def grant(
        self, pinner: Pinner, number: int, pin: Pin, result: Message, *, gone: bool
    ) -> Message:
        """Note what `hold` came to; what happened to its worker meanwhile may end it at once."""
        pinner.making.remove(number)
        cancelled = number in pinner.cancelled
        pinner.cancelled.discard(number)
        if "error" in result:
            self.pages -= pin.pages
            self._forget(pin)
            return result
        for row in pin.rows:
            self._tables.pin_grant(row)
        pinner.granted[number] = pin
        if cancelled or gone:
            self.end(pinner, number)
        return protocol.failure(Error("the array is gone")) if gone else result

    def cancel(self, pinner: Pinner, number: int) -> None:
        """End a pin; one that is not granted yet goes as soon as it is."""
        if number in pinner.making:
            pinner.cancelled.add(number)
        self.end(pinner, number)

    def end(self, pinner: Pinner, number: int) -> None:
        """Let the pages of a granted pin go, if there is one."""
        pin = pinner.granted.pop(number, None)
        if pin is None:
            return
        self.pages -= pin.pages
        # The record first: a takeover in between finds the pages unpinned.
        self._forget(pin)
        self._let_go(pin.region, pin.ranges, pin.write)

    def end_all(self, pinner: Pinner) -> None:
        """Let go what a process that has ended had pinned."""
        for number in list(pinner.granted):
            self.end(pinner, number)

    def resume(
        self,
        left: native.Takeover,
        pinners: dict[int, Pinner],
        regions: Iterable[RegionRecord],
    ) -> None:
        """Go on with the granted pins that another swapper has left; pinners by worker."""
        by_number = {region.number: region for region in regions}
        rows, high = left.pins_left()
        self._rows.resume((row[0] for row in rows), high)
        for row, w, number, r, first, count, write in rows:
            granted = pinners[w].granted
            pin = granted.setdefault(number, Pin(by_number[r], [], write, 0, []))
            pin.ranges.append((first, count))
            pin.rows.append(row)
            pin.pages += count
            self.pages += count

    def _forget(self, pin: Pin) -> None:
        """Give a pin's records back: its pages are not pinned by it, or not any more."""
        for row in pin.rows:
            self._tables.pin_forget(row)
        self._rows.returned.extend(pin.rows)
        pin.rows = []

    def _let_go(self, region: RegionRecord, ranges: list[tuple[int, int]], write: bool) -> None:
        o = region.object
        for first, count in ranges:
            self._tables.unpin(
                region.number, region.generation, o.number, o.generation, first, count, write
            )
