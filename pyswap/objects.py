"""The swapper's records of objects and regions: who maps what, and when an array is over."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import PoolClosedError, SwapFullError
from .extents import Extents
from .sizes import format_size

if TYPE_CHECKING:
    from ._native import native

__all__ = ["MAX_OBJECTS", "MAX_REGIONS", "Objects", "PagedObject", "Promise", "RegionRecord"]

MAX_OBJECTS = 65536
MAX_REGIONS = 262144
EXTENT_ALIGN_PAGES = 512
MAX_FAMILY_REGIONS = 512
MAX_CLONES = 128


@dataclass
class PagedObject:
    """The memory behind one array: a run of page ids, and how many regions refer to it.

    `extents` has the runs of page ids of a private object that was forked, its own first.
    """

    number: int
    generation: int
    base: int
    pages: int
    private: bool = False
    references: int = 0
    released: bool = False
    extents: list[int] = field(default_factory=list)


@dataclass
class RegionRecord:
    """One process's mapping of an object."""

    number: int
    generation: int
    address: int
    object: PagedObject
    advice: int = 0


@dataclass
class Promise:
    """What a forked child will map: an object, and the number of its region if that is made."""

    object: PagedObject
    advice: int
    clone: int | None = None


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
    """

    def __init__(self, tables: native.Swapper, page_bytes: int, page_count: int) -> None:
        self.closed = False
        self.live: dict[int, PagedObject] = {}
        self._tables = tables
        self._page_bytes = page_bytes
        self._families: dict[int, PagedObject] = {}
        self._extents = Extents(page_count, EXTENT_ALIGN_PAGES)
        self._object_numbers = _Numbers(MAX_OBJECTS)
        self._region_numbers = _Numbers(MAX_REGIONS)
        self._ending: list[PagedObject] = []
        self._released: list[PagedObject] = []

    def create(self, size: int, name: str, *, private: bool = False) -> PagedObject:
        """Make an object of `size` bytes; a private one is copied on write after fork.

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
        if not self._tables.commit(pages):
            left = max(0, self._tables.uncommitted()) * self._page_bytes
            raise SwapFullError(
                f"an array of {format_size(size)} does not fit: frames and swap can take "
                f"{format_size(left)} more; give the pool more swap, or overcommit=True"
            )
        with ExitStack() as undo:
            undo.callback(self._tables.uncommit, pages)
            base = self._extents.take(pages)
            undo.callback(self._extents.give_back, base, pages)
            number = self._object_numbers.take("arrays")
            undo.callback(self._object_numbers.returned.append, number)
            generation = self._tables.object_begin(
                number, base, pages, size, name.encode()[:71], private
            )
            undo.pop_all()
        made = PagedObject(number, generation, base, pages, private)
        self.live[number] = made
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

    def map(
        self,
        worker: int,
        o: PagedObject,
        address: int,
        advice: int = 0,
        clone: int | None = None,
    ) -> RegionRecord:
        """Note a region, over a reference that the caller has added, or the clone made for it."""
        number = self._region_numbers.take("mappings") if clone is None else clone
        try:
            generation = self._tables.region_begin(number, worker, o.number, address)
        except BaseException:
            if clone is None:
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
            self._end_region(region.object, region.number)

    def _end_region(self, o: PagedObject, number: int) -> None:
        """Give back what an ended region has left, or one that was never begun."""
        if o.private:
            self._tables.region_unshare(o.number, number)
        self._region_numbers.returned.append(number)
        self.unrefer(o)

    # Private objects.

    def promise(self, regions: Iterable[RegionRecord]) -> dict[int, Promise]:
        """Add references for all that a child will inherit, and return its promises by address.

        Pages of private objects are shared from here on.

        Raises
        ------
        MemoryError
            If a table is full, or a pinned page could not be copied; then nothing has changed.
        """
        regions = list(regions)
        private = [r for r in regions if r.object.private and not r.object.released]
        clones = dict(zip((r.address for r in private), self._clone(private), strict=True))
        promised = {}
        for region in regions:
            clone = clones.get(region.address)
            if clone is None:
                self.refer(region.object)
            promised[region.address] = Promise(region.object, region.advice, clone)
        return promised

    def unpromise(self, promise: Promise) -> None:
        """Take back what no child has signed for."""
        if promise.clone is None:
            self.unrefer(promise.object)
        else:
            self._end_region(promise.object, promise.clone)

    def snapshot(self, worker: int, region: RegionRecord, address: int) -> RegionRecord:
        """Map a private object's pages once more in the same process, copied on write."""
        if self._tables.clones(region.object.number, worker) >= MAX_CLONES:
            raise MemoryError(f"a process has at most {MAX_CLONES} snapshots of an array at once")
        (clone,) = self._clone([region])
        try:
            return self.map(worker, region.object, address, region.advice, clone)
        except BaseException:
            self._end_region(region.object, clone)
            raise

    def _clone(self, regions: list[RegionRecord]) -> list[int]:
        """Return numbers of regions that share the pages of others; all or none."""
        numbers: list[int] = []
        objects = [region.object for region in regions]
        try:
            for o in objects:
                self.refer(o)
                numbers.append(self._region_numbers.take("mappings"))
            for o in objects:
                self._extend(o)
            if regions:
                pairs = [(r.number, n) for r, n in zip(regions, numbers, strict=True)]
                self._tables.regions_share(pairs)
        except BaseException:
            self._region_numbers.returned.extend(numbers)
            for o in objects[: len(numbers)]:
                self.unrefer(o)
            raise
        return numbers

    def _extend(self, o: PagedObject) -> None:
        """See to it that an object has page ids for all copies that its regions may need."""
        if o.references > MAX_FAMILY_REGIONS:
            raise MemoryError(
                f"{MAX_FAMILY_REGIONS} processes and snapshots are the most that may share an array"
            )
        if not o.extents:
            self._tables.family_extend(o.number, o.base)
            o.extents.append(o.base)
        while len(o.extents) < 2 * o.references:
            base = self._extents.take(o.pages)
            try:
                self._tables.family_extend(o.number, base)
            except BaseException:
                self._extents.give_back(base, o.pages)
                raise
            o.extents.append(base)
        self._families[o.number] = o

    def _trim(self, o: PagedObject) -> None:
        """Give back runs of page ids that a family has too many of, and what dead pages hold."""
        if self._tables.family_unswept(o.number):
            self._tables.family_sweep(o.number)
        while len(o.extents) > 2 * max(1, o.references):
            base = self._tables.family_trim(o.number)
            if base is None:
                return
            o.extents.remove(base)
            self._extents.give_back(base, o.pages)

    def sweep(self) -> bool:
        """Free the pages of ended objects; False while some of them are busy."""
        # What is filled or written out at a release is swept until it is gone, though it is mapped.
        self._released = [
            o
            for o in self._released
            if o.references and self._tables.object_sweep(o.number, last=False)
        ]
        for o in self._families.values():
            self._trim(o)
        busy = []
        for o in self._ending:
            if self._tables.object_sweep(o.number, last=True):
                busy.append(o)
            else:
                del self.live[o.number]
                self._families.pop(o.number, None)
                for base in o.extents[1:]:
                    self._tables.extent_end(base, o.pages)
                    self._extents.give_back(base, o.pages)
                self._extents.give_back(o.base, o.pages)
                self._object_numbers.returned.append(o.number)
        self._ending = busy
        return not busy and not self._released

    def _end(self, o: PagedObject) -> None:
        if not o.released:
            o.released = True
            self._tables.object_end(o.number)
            # Pages of a family were given up one by one, with their last references.
            if not o.extents:
                self._tables.uncommit(o.pages)
