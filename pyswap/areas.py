"""Swap areas: what a pool's pages may be written to, added and taken away while it runs."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import config
from .errors import SwapFullError
from .sizes import format_size
from .vault import Vault

if TYPE_CHECKING:
    from ._native import native

__all__ = ["Area", "Areas", "SwapArea"]

_log = logging.getLogger("pyswap")

MAX_AREAS = 16
OFF, ON, DRAINING = range(3)


@dataclass(frozen=True)
class SwapArea:
    """A swap area as it was when it was asked for.

    Attributes
    ----------
    path : str
        The folder that its file was made in, or the file; neither has a name there any more.
    size, used : int
        Bytes it holds, and those that pages have.
    priority : int
        Areas of the highest priority are filled first; those of an equal one take turns.
    errors : int
        Transfers that failed, those that gave back other bytes than were written among them.
    bad : int
        Bytes that are set aside, since they could not be written; they count as no part of
        `used`, and come back with another area.
    """

    path: str
    size: int
    used: int
    priority: int
    errors: int
    bad: int
    number: int = field(repr=False)


@dataclass
class Area:
    """An area in use: its place in the tables, and its file.

    `maker` names the request that it was made by, which may come again after a takeover.
    Also how many of its errors were told of, and from when on others may be.
    """

    place: int
    path: str
    fd: int
    maker: list[int]
    told: int = 0
    tell_at: float = 0.0


class Areas:
    """The swap areas of a pool; used by the swapper's main thread only.

    Parameters
    ----------
    tables : native.Swapper
        The tables that the reclaim threads read.
    vault : Vault
        Where the areas' descriptors are kept.
    page_bytes : int
        Bytes of a page.
    frame_count, reserve_pages : int
        Frames of the pool, and those that no committed page may count on.
    overcommit : bool
        Whether arrays may have more pages than frames and areas can hold.
    """

    def __init__(
        self,
        tables: native.Swapper,
        vault: Vault,
        page_bytes: int,
        frame_count: int,
        reserve_pages: int,
        overcommit: bool,
    ) -> None:
        self._tables = tables
        self._vault = vault
        self._page_bytes = page_bytes
        self._frame_count = frame_count
        self._reserve_pages = reserve_pages
        self._overcommit = overcommit
        self._areas: dict[int, Area] = {}
        self._next = 1
        self._limit()

    def add(self, path: str, fd: int, size: int, priority: int, maker: list[int]) -> int:
        """Use a file of `size` bytes; the descriptor is this object's from here on. Its number."""
        places = {area.place for area in self._areas.values()}
        place = next((i for i in range(MAX_AREAS) if i not in places), None)
        if place is None:
            raise ValueError(f"a pool has at most {MAX_AREAS} swap areas")
        number, self._next = self._next, self._next + 1
        self._vault.put("area", number, 0, {"place": place, "path": path, "maker": maker}, (fd,))
        slots = size // self._page_bytes
        self._tables.area_begin(place, fd, slots, priority, number, os.fsencode(path))
        self._areas[number] = Area(place, path, fd, maker)
        self._limit()
        return number

    def made_by(self, maker: list[int]) -> int | None:
        """Find the area that a request has made already."""
        return next((n for n, area in self._areas.items() if area.maker == maker), None)

    def adopt(
        self,
        left: native.Takeover,
        number: int,
        place: int,
        path: str,
        maker: list[int],
        fd: int,
    ) -> bool:
        """Go on with an area of another swapper's; False where it was off already."""
        self._next = max(self._next, number + 1)
        if not left.area_adopt(place, fd, number):
            self._vault.forget("area", number, 0)
            return False
        self._areas[number] = Area(place, path, fd, maker)
        # It may have been on its way out; what all of them hold is counted anew.
        self._tables.area_state(place, ON)
        self._limit()
        return True

    def resize(self, frame_count: int, reserve_pages: int) -> None:
        """Reckon with another number of frames; SwapFullError where arrays need more."""
        before = self._frame_count, self._reserve_pages
        self._frame_count, self._reserve_pages = frame_count, reserve_pages
        self._limit()
        missing = self._missing_pages()
        if missing > 0 and frame_count < before[0]:
            self._frame_count, self._reserve_pages = before
            self._limit()
            raise SwapFullError(
                f"in so little memory {format_size(missing * self._page_bytes)} of arrays would "
                "have no room: add a swap area first"
            )

    def records(self) -> list[SwapArea]:
        """Tell of every area that is on."""
        records = []
        for number, area in self._areas.items():
            _, slots, used, priority, errors, bad, _ = self._tables.area(area.place)
            size, used, bad = (n * self._page_bytes for n in (slots, used, bad))
            records.append(SwapArea(area.path, size, used, priority, errors, bad, number))
        return records

    def tell(self) -> None:
        """Log the areas that have failed since they were looked at, each once in a while."""
        now = time.monotonic()
        for area in self._areas.values():
            *_, errors, bad, error = self._tables.area(area.place)
            if errors == area.told or now < area.tell_at:
                continue
            _log.warning(
                "pyswap: swap area %s: %d transfers failed, %d in all; the last: %s; %s is set "
                "aside",
                area.path,
                errors - area.told,
                errors,
                os.strerror(error),
                format_size(bad * self._page_bytes),
            )
            area.told, area.tell_at = errors, now + config.TELL_S
            self._limit()

    def find(self, number: int) -> Area:
        """Find an area.

        Raises
        ------
        ValueError
            If it is off.
        """
        area = self._areas.get(number)
        if area is None:
            raise ValueError("this swap area is off already")
        return area

    def has(self, number: int) -> bool:
        """Whether an area is there: on, or on its way out."""
        return number in self._areas

    def shut(self, number: int) -> int:
        """Let no page into an area any more; returns how many are in it.

        Raises
        ------
        SwapFullError
            If frames and the other areas could not hold the pages; then nothing has changed.
        """
        area = self.find(number)
        used = self._tables.area(area.place)[2]
        self._tables.area_state(area.place, DRAINING)
        self._limit()
        missing = self._missing_pages()
        if missing > 0:
            self.open(number)
            raise SwapFullError(
                f"without the swap area {area.path} {format_size(missing * self._page_bytes)} of "
                "arrays would have no room: add another area first"
            )
        return used

    def open(self, number: int) -> None:
        """Let pages into an area again."""
        self._tables.area_state(self.find(number).place, ON)
        self._limit()

    def remove(self, number: int) -> bool:
        """Let an area go that was shut, once no page has a slot of it; True when it is gone."""
        area = self.find(number)
        if self._tables.area(area.place)[2]:
            return False
        self._tables.area_state(area.place, OFF)
        del self._areas[number]
        os.close(area.fd)
        self._vault.forget("area", number, 0)
        return True

    def _limit(self) -> None:
        """Have arrays commit no more than frames and areas hold, less what exchanging takes."""
        bad = sum(self._tables.area(area.place)[5] for area in self._areas.values())
        slots = self._tables.slot_count() - bad
        room = slots + self._frame_count - self._reserve_pages if slots else self._frame_count
        self._tables.commit_limit(room)

    def _missing_pages(self) -> int:
        """Pages for which there is no room."""
        if not self._overcommit:
            return -self._tables.uncommitted()
        used = sum(self._tables.area(area.place)[2] for area in self._areas.values())
        return used + self._reserve_pages - self._tables.slot_count() - self._frame_count
