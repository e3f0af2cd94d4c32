"""The swapper's records of objects and regions: who maps what, and when an array is over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import PoolClosedError, SwapFullError
from .extents import Extents
from .sizes import format_size

if TYPE_CHECKING:
    from ._native import native

__all__ = ["MAX_OBJECTS", "MAX_REGIONS", "Objects", "PagedObject", "RegionRecord"]

MAX_OBJECTS = 65536
MAX_REGIONS = 262144
EXTENT_ALIGN_PAGES = 512


@dataclass
class PagedObject:
    """The memory behind one array: a run of page ids, and how many regions refer to it."""

    number: int
    generation: int
    base: int
    pages: int
    references: int = 0
    released: bool = False


@dataclass
class RegionRecord:
    """One process's mapping of an object."""

    number: int
    generation: int
    address: int
    object: PagedObject
    advice: int = 0


@dataclass
class _Numbers:
    """The lowest numbers that nobody has."""

    limit: int
    next: int = 0
    returned: list[int] = field(default_factory=list)

    def take(self, what: str) -> int:
        if self.returned:
            return self.returned.pop()
        if self.next == self.limit:
            raise MemoryError(f"a pool has at most {self.limit} {what}")
        self.next += 1
        return self.next - 1


class Objects:
    """Every object and region of a pool; used by the swapper's main thread only.

    Parameters
    ----------
    tables : native.Swapper
        The tables that the fault threads read.
    page_bytes : int
        Bytes of a page.
    page_count : int
        Page ids there are.
    commit_limit_pages : int or None
        Most pages that objects may have together; None for a pool that overcommits.
    """

    def __init__(
        self,
        tables: native.Swapper,
        page_bytes: int,
        page_count: int,
        commit_limit_pages: int | None,
    ) -> None:
        self.closed = False
        self.live: dict[int, PagedObject] = {}
        self._tables = tables
        self._page_bytes = page_bytes
        self._limit = commit_limit_pages
        self._committed = 0
        self._extents = Extents(page_count, EXTENT_ALIGN_PAGES)
        self._object_numbers = _Numbers(MAX_OBJECTS)
        self._region_numbers = _Numbers(MAX_REGIONS)
        self._ending: list[PagedObject] = []
        self._released: list[PagedObject] = []

    def create(self, size: int, name: str) -> PagedObject:
        """Make an object of `size` bytes.

        Raises
        ------
        PoolClosedError
            After `close()`.
        SwapFullError
            If the arrays' pages would be more than frames and slots can hold.
        MemoryError
            If a table is full.
        """
        if self.closed:
            raise PoolClosedError("the pool is closed: it makes no more arrays")
        pages = max(1, -(-size // self._page_bytes))
        if self._limit is not None and self._committed + pages > self._limit:
            left = (self._limit - self._committed) * self._page_bytes
            raise SwapFullError(
                f"an array of {format_size(size)} does not fit: frames and swap can take "
                f"{format_size(left)} more; give the pool more swap, or overcommit=True"
            )
        base = self._extents.take(pages)
        number = -1
        try:
            number = self._object_numbers.take("arrays")
            generation = self._tables.object_begin(number, base, pages, size, name.encode()[:71])
        except BaseException:
            self._extents.give_back(base, pages)
            if number >= 0:
                self._object_numbers.returned.append(number)
            raise
        made = PagedObject(number, generation, base, pages)
        self.live[number] = made
        self._commit(pages)
        return made

    def refer(self, o: PagedObject) -> None:
        """Add a reference: a region, or a fork's promise of one."""
        o.references += 1

    def unrefer(self, o: PagedObject) -> None:
        """Drop a reference; the last one ends the object."""
        o.references -= 1
        if o.references == 0:
            self._end(o)
            self._ending.append(o)
            self.sweep()

    def release(self, o: PagedObject) -> None:
        """End an object for every process that still maps it."""
        self._end(o)
        # Its page ids stay taken until the last region is gone.
        self._released.append(o)
        self.sweep()

    def map(self, worker: int, o: PagedObject, address: int, advice: int = 0) -> RegionRecord:
        """Note a region, over a reference that the caller has added."""
        number = self._region_numbers.take("mappings")
        try:
            generation = self._tables.region_begin(number, worker, o.number, address)
        except BaseException:
            self._region_numbers.returned.append(number)
            raise
        region = RegionRecord(number, generation, address, o)
        self.advise(region, advice)
        return region

    def advise(self, region: RegionRecord, advice: int) -> None:
        """Set how a region's faults feed readahead; forked children begin with it."""
        region.advice = advice
        self._tables.region_advise(region.number, advice)

    def unmap(self, regions: Iterable[RegionRecord]) -> None:
        """End regions that their process has unmapped, or that went with it."""
        for region in regions:
            self._tables.region_end(region.number)
            self._region_numbers.returned.append(region.number)
            self.unrefer(region.object)

    def sweep(self) -> bool:
        """Free the pages of ended objects; False while some of them are busy."""
        # What is filled or written out at a release is swept until it is gone, though it is mapped.
        self._released = [
            o
            for o in self._released
            if o.references and self._tables.object_sweep(o.number, last=False)
        ]
        busy = []
        for o in self._ending:
            if self._tables.object_sweep(o.number, last=True):
                busy.append(o)
            else:
                del self.live[o.number]
                self._extents.give_back(o.base, o.pages)
                self._object_numbers.returned.append(o.number)
        self._ending = busy
        return not busy and not self._released

    def _end(self, o: PagedObject) -> None:
        if not o.released:
            o.released = True
            self._tables.object_end(o.number)
            self._commit(-o.pages)

    def _commit(self, pages: int) -> None:
        self._committed += pages
        self._tables.set_committed(self._committed)
