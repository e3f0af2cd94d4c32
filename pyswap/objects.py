"""The swapper's records of objects and regions: who maps what, and when an array is over."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

from ._native import native
from .errors import GoneError, PoolClosedError, SwapFullError
from .extents import Extents
from .sizes import format_size
from .vault import Vault

__all__ = [
    "MAX_OBJECTS",
    "MAX_REGIONS",
    "Backing",
    "Numbers",
    "Objects",
    "PagedObject",
    "RegionRecord",
]

MAX_OBJECTS = 65536
MAX_REGIONS = 262144
EXTENT_ALIGN_PAGES = 512
MAX_FAMILY_REGIONS = 512
MAX_CLONES = 128
PROMISE_CHILD, PROMISE_MAKING = 1, 2


@dataclass(frozen=True)
class Backing:
    """The file that an object's untouched pages come from.

    They begin at `offset`; `stamp` is what the file must still be. With `read_only`
    nobody writes to the array, so that no page of it ever needs a slot.
    """

    fd: int
    read_only: bool
    offset: int
    stamp: int


@dataclass
class PagedObject:
    """The memory behind one array: a run of page ids, and how many regions refer to it.

    `extents` has the runs of page ids of a private object that was forked, its own first.
    `transits` has when each pickle that nobody has loaded yet was made, `kept` whether its name
    keeps it; each is one of its references. `label` and `layout` are what its maker says of it.
    """

    number: int
    generation: int
    base: int
    pages: int
    private: bool = False
    sparse: bool = False
    references: int = 0
    released: bool = False
    extents: list[int] = field(default_factory=list)
    read_only: bool = False
    has_file: bool = False
    transits: list[float] = field(default_factory=list)
    kept: bool = False
    label: str = ""
    layout: str = ""


@dataclass
class RegionRecord:
    """One process's mapping of an object, from when it is promised.

    `generation` is 0 until it is begun: a forked child has not mapped it yet. `map` is where its
    map begins in the table of maps, if it has one.
    """

    number: int
    worker: int
    address: int
    object: PagedObject
    generation: int = 0
    advice: int = 0
    map: int | None = None


@dataclass
class Numbers:
    """The lowest numbers that nobody has."""

    limit: int
    next: int = 0
    returned: list[int] = field(default_factory=list)

    def take(self, what: str) -> int:
        """Give out a number; MemoryError where all are taken."""
        if self.returned:
            return self.returned.pop()
        if self.next == self.limit:
            raise MemoryError(f"a pool has at most {self.limit} {what}")
        self.next += 1
        return self.next - 1

    def resume(self, used: Iterable[int], high: int) -> None:
        """Go on where some numbers below `high` are used."""
        self.next = high
        self.returned = sorted(set(range(high)) - set(used), reverse=True)


class Objects:
    """Every object and region of a pool; used by the swapper's main thread only.

    Parameters
    ----------
    tables : native.Swapper
        The tables that the fault threads read.
    vault : Vault
        Where the descriptors of files are kept.
    page_bytes : int
        Bytes of a page.
    page_count : int
        Page ids there are.
    """

    def __init__(
        self, tables: native.Swapper, vault: Vault, page_bytes: int, page_count: int
    ) -> None:
        self.closed = False
        self.live: dict[int, PagedObject] = {}
        self._tables = tables
        self._vault = vault
        self._page_bytes = page_bytes
        self._families: dict[int, PagedObject] = {}
        self._untrimmed: set[int] = set()
        self._shared: set[int] = set()
        self._spare_maps: dict[int, int] = {}
        self._extents = Extents(page_count, EXTENT_ALIGN_PAGES)
        self._maps = Extents(page_count, EXTENT_ALIGN_PAGES)
        self._object_numbers = Numbers(MAX_OBJECTS)
        self._region_numbers = Numbers(MAX_REGIONS)
        self._ending: list[PagedObject] = []
        self._released: list[PagedObject] = []
        self._in_transit_pages = 0

    def create(
        self,
        size: int,
        name: str,
        *,
        private: bool = False,
        sparse: bool = False,
        backing: Backing | None = None,
        row_bytes: int = 0,
    ) -> PagedObject:
        """Make an object of `size` bytes; a private one is copied on write after fork.

        A sparse one, which is private, is committed range by range. `backing`'s descriptor stays
        the caller's. Its rows are `row_bytes` apart; 0: nobody knows.

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
        read_only = backing is not None and backing.read_only
        committed = native.commits(pages, sparse=sparse, read_only=read_only, shared=False)
        if not self._tables.commit(committed):
            left = max(0, self._tables.uncommitted()) * self._page_bytes
            raise SwapFullError(
                f"an array of {format_size(size)} does not fit: frames and swap can take "
                f"{format_size(left)} more; give the pool more swap, or overcommit=True"
            )
        with ExitStack() as undo:
            undo.callback(self._tables.uncommit, committed)
            base = self._take_ids(pages)
            undo.callback(self._extents.give_back, base, pages)
            number = self._object_numbers.take("arrays")
            undo.callback(self._object_numbers.returned.append, number)
            generation = self._tables.object_begin(
                number, base, pages, size, name.encode()[:71], private, sparse, row_bytes
            )
            if backing is not None:
                self._tables.object_file(
                    number, os.dup(backing.fd), backing.read_only, backing.offset, backing.stamp
                )
            undo.pop_all()
        made = PagedObject(number, generation, base, pages, private, sparse, read_only=read_only)
        self.live[number] = made
        if backing is not None:
            self._keep_file(made, backing)
        return made

    def _keep_file(self, made: PagedObject, backing: Backing) -> None:
        """Have the vault keep the file of a new object, which is over where that fails."""
        made.has_file = True
        try:
            self._vault.put("file", made.number, made.generation, {}, (backing.fd,))
        except BaseException:
            made.references = 1
            self._unrefer(made)
            raise

    def _unrefer(self, o: PagedObject) -> None:
        """Drop a reference; the last one ends the object."""
        o.references -= 1
        self._untrimmed.add(o.number)
        if o.references == 0:
            self._end(o)
            self._ending.append(o)
            self.sweep()

    def release(self, o: PagedObject) -> None:
        """End an object for every process that still maps it."""
        if o.released:
            return
        self._end(o)
        # Its page ids stay taken until the last region is gone.
        self._released.append(o)
        self.keep(o, kept=False)
        while o.transits:
            self.receive(o)
        self.sweep()

    def map(self, worker: int, o: PagedObject, address: int) -> RegionRecord:
        """Note a region; an object that nobody refers to then ends where that fails."""
        region = self._promise(worker, o, address, 0, PROMISE_MAKING)
        if o.sparse:
            self._make_holes(region)
        self.begin(region)
        return region

    def _make_holes(self, region: RegionRecord) -> None:
        """Give a sparse object's first region its map and family; on failure nothing is left."""
        o = region.object
        try:
            self._begin_family(o)
            region.map = self._maps.take(o.pages)
            self._tables.region_holes(region.number, region.map)
        except BaseException:
            self.drop(region)
            raise

    def begin_range(self, region: RegionRecord, first: int, count: int) -> int:
        """Commit a range of a sparse object, of pages of zeros; 0 or -errno (core/sparse.pxd)."""
        done = self._tables.range_begin(region.number, first, count)
        if done == -errno.EAGAIN:
            self._tables.family_sweep(region.object.number)
            done = self._tables.range_begin(region.number, first, count)
        return done

    def end_range(self, region: RegionRecord, first: int, count: int) -> int:
        """Free a range of a sparse object; 1, 0 or -errno (core/sparse.pxd)."""
        return self._tables.range_end(region.number, first, count)

    def move_range(self, region: RegionRecord, first: int, count: int, to: int) -> int:
        """Have pages and holes change places; 0 or -errno (core/sparse.pxd)."""
        return self._tables.range_move(region.number, first, count, to)

    def look_at(self, region: RegionRecord, first: int, count: int) -> int:
        """Tell what is mapped from a page on: a page id, shifted, and how many follow it."""
        runs = self._tables.region_runs(region.number, region.generation, first, count, 1)
        if not runs:
            return -errno.ESRCH
        ((_, pages, page),) = runs
        return page << 16 | pages

    def _promise(
        self, worker: int, o: PagedObject, address: int, advice: int, kind: int
    ) -> RegionRecord:
        """Number a region that is not mapped yet, and add its reference."""
        o.references += 1
        try:
            number = self._region_numbers.take("mappings")
            try:
                self._tables.region_promise(number, worker, o.number, address, kind)
            except BaseException:
                self._region_numbers.returned.append(number)
                raise
        except BaseException:
            self._unrefer(o)
            raise
        return RegionRecord(number, worker, address, o, advice=advice)

    def begin(self, region: RegionRecord) -> None:
        """Let a promised region resolve faults; where that fails, nothing is left of it."""
        try:
            region.generation = self._tables.region_begin(region.number)
        except BaseException:
            self.drop(region)
            raise
        self.advise(region, region.advice)

    def advise(self, region: RegionRecord, advice: int) -> None:
        """Set how a region's faults feed readahead; forked children begin with it."""
        region.advice = advice
        self._tables.region_advise(region.number, advice)

    def unmap(self, regions: Iterable[RegionRecord]) -> None:
        """End regions that their process has unmapped, or that went with it."""
        for region in regions:
            self._tables.region_end(region.number)
            self.drop(region)

    def drop(self, region: RegionRecord) -> None:
        """Give back what a region has that has ended, or that nobody has signed for."""
        o = region.object
        if o.private:
            self._tables.region_unshare(o.number, region.number)
        if region.map is not None:
            self._keep_map(o, region.map)
        self._tables.region_unpromise(region.number)
        self._region_numbers.returned.append(region.number)
        self._unrefer(o)

    def _keep_map(self, o: PagedObject, place: int) -> None:
        """Keep a map for the next fork, or give it back."""
        if o.number in self._families and o.number not in self._spare_maps:
            self._spare_maps[o.number] = place
        else:
            self._end_map(o, place)

    def _end_map(self, o: PagedObject, place: int) -> None:
        self._tables.map_end(place, o.pages)
        self._maps.give_back(place, o.pages)

    def owners(self) -> list[tuple[int, int, int, int]]:
        """Tell whose page ids are whose: (first page id, pages, object, generation), in order."""
        rows = []
        for o in self.live.values():
            bases = o.extents or [o.base]
            rows += [(base, o.pages, o.number, o.generation) for base in bases]
        return sorted(rows)

    # What lives without a region.

    def find(self, number: int, generation: int) -> PagedObject:
        """Find a living object.

        Raises
        ------
        GoneError
            If there is none any more.
        """
        o = self.live.get(number)
        if o is None or o.generation != generation or o.released:
            raise GoneError("the array is gone: it was freed, or released, before it was asked for")
        return o

    def send(self, o: PagedObject, by: tuple[int, int] = (0, 0)) -> None:
        """Keep an object for whoever will load the pickle that is made of it.

        `by` says which request asks for it, by worker and number, so that it counts once.
        """
        o.references += 1
        if not o.transits:
            self._in_transit_pages += o.pages
        o.transits.append(time.monotonic())
        self._hold(o, by)

    def receive(self, o: PagedObject, by: tuple[int, int] = (0, 0)) -> None:
        """Take over a pickle's reference, where one is left, by a region that refers to it."""
        if o.transits:
            o.transits.pop(0)
            if not o.transits:
                self._in_transit_pages -= o.pages
            self._hold(o, by)
            self._unrefer(o)

    def drop_transits(self, older_than_s: float) -> int:
        """Drop the references of pickles made so long ago; tells how many."""
        before, count = time.monotonic() - older_than_s, 0
        for o in list(self.live.values()):
            late = [made for made in o.transits if made <= before]
            for _ in late:
                self.receive(o)
            count += len(late)
        return count

    def _hold(self, o: PagedObject, by: tuple[int, int] = (0, 0)) -> None:
        """Write down what keeps an object beside its regions, for a swapper that comes after."""
        self._tables.object_hold(o.number, len(o.transits), o.kept, *by)
        self._tables.set_in_transit(self._in_transit_pages)

    def keep(self, o: PagedObject, *, kept: bool) -> None:
        """Have an object live as long as its name, or no longer."""
        if kept and not o.kept:
            o.kept = True
            o.references += 1
            self._hold(o)
        elif not kept and o.kept:
            o.kept = False
            self._hold(o)
            self._unrefer(o)

    def name(self, o: PagedObject, label: str, layout: str) -> None:
        """Have an object found by a label; `layout` says what it is found as."""
        self._tables.object_label(o.number, label.encode(), layout.encode())
        o.label, o.layout = label, layout

    def close(self) -> None:
        """End creation and attaching, and so what only an attaching process could have loaded."""
        self.closed = True
        for o in list(self.live.values()):
            self.keep(o, kept=False)
        self.drop_transits(0.0)

    # Private objects.

    def promise(self, worker: int, regions: Iterable[RegionRecord]) -> dict[int, RegionRecord]:
        """Add references for all that a child will inherit; its regions to be, by address.

        Pages of private objects are shared from here on.

        Raises
        ------
        MemoryError
            If a table is full, or a pinned page could not be copied; then nothing has changed.
        """
        sources = list(regions)
        promised: dict[int, RegionRecord] = {}
        try:
            for r in sources:
                promised[r.address] = self._promise(
                    worker, r.object, r.address, r.advice, PROMISE_CHILD
                )
            private = [r for r in sources if r.object.private and not r.object.released]
            self._share([(r, promised[r.address]) for r in private])
        except BaseException:
            for region in promised.values():
                self.drop(region)
            raise
        return promised

    def snapshot(self, worker: int, region: RegionRecord, address: int) -> RegionRecord:
        """Map a private object's pages once more in the same process, copied on write."""
        if self._tables.clones(region.object.number, worker) >= MAX_CLONES:
            raise MemoryError(f"a process has at most {MAX_CLONES} snapshots of an array at once")
        clone = self._promise(worker, region.object, address, region.advice, PROMISE_MAKING)
        try:
            self._share([(region, clone)])
        except BaseException:
            self.drop(clone)
            raise
        self.begin(clone)
        return clone

    def _share(self, pairs: list[tuple[RegionRecord, RegionRecord]]) -> None:
        """Have regions share the pages of others; all or none."""
        for source, _ in pairs:
            self._extend(source.object)
        for source, clone in pairs:
            for region in (source, clone):
                if region.map is None:
                    spare = self._spare_maps.pop(region.object.number, None)
                    region.map = self._maps.take(region.object.pages) if spare is None else spare
        if pairs:
            self._shared |= {source.object.number for source, _ in pairs}
            self._tables.regions_share([(r.number, c.number, r.map, c.map) for r, c in pairs])

    def _extend(self, o: PagedObject) -> None:
        """See to it that an object has page ids for all copies that its regions may need."""
        if o.references > MAX_FAMILY_REGIONS:
            raise MemoryError(
                f"{MAX_FAMILY_REGIONS} processes and snapshots are the most that may share an array"
            )
        if not o.extents:
            self._begin_family(o)
        while len(o.extents) < 2 * o.references:
            base = self._take_ids(o.pages)
            try:
                self._tables.family_extend(o.number, base)
            except BaseException:
                self._extents.give_back(base, o.pages)
                raise
            o.extents.append(base)

    def _take_ids(self, pages: int) -> int:
        """Take a run of page ids, if need be one that was kept for the next fork."""
        try:
            return self._extents.take(pages)
        except MemoryError:
            self._shared.clear()
            self.rest()
            return self._extents.take(pages)

    def _begin_family(self, o: PagedObject) -> None:
        self._tables.family_extend(o.number, o.base)
        o.extents.append(o.base)
        self._families[o.number] = o

    def rest(self) -> None:
        """Give back what is kept for the next fork of what was not forked since last time."""
        for o in [o for o in self._families.values() if o.number not in self._shared]:
            self._trim(o, 0)
            self._end_spare_map(o)
        self._shared.clear()

    def _end_spare_map(self, o: PagedObject) -> None:
        place = self._spare_maps.pop(o.number, None)
        if place is not None:
            self._end_map(o, place)

    def _trim(self, o: PagedObject, children: int) -> None:
        """Give back runs of page ids beyond those for a family with so many children more."""
        while len(o.extents) > 2 * (max(1, o.references) + children):
            base = self._tables.family_trim(o.number)
            if base is None:
                return
            o.extents.remove(base)
            self._extents.give_back(base, o.pages)

    # A takeover.

    def resume(self, left: native.Takeover) -> tuple[list[RegionRecord], list[RegionRecord]]:
        """Go on with what another swapper has left: its regions, and those promised to children.

        An object that nobody refers to any more ends.
        """
        objects_high, regions_high = left.highs()
        for row in left.objects_left():
            number, generation, base, pages, private, sparse, alive, extents, *rest = row
            o = PagedObject(number, generation, base, pages, private, sparse, extents=extents)
            o.released = not alive
            o.read_only, o.has_file, transits, o.kept, label, layout = rest
            o.label, o.layout = label.decode(), layout.decode()
            self.live[number] = o
            o.transits = [time.monotonic()] * transits
            o.references = transits + o.kept
            self._in_transit_pages += pages if transits else 0
            for first in extents or [base]:
                self._extents.reserve(first, pages)
            if extents:
                self._families[number] = o
        regions = [self._resume_region(left, *row) for row in left.regions_left()]
        self._object_numbers.resume(self.live, objects_high)
        self._region_numbers.resume((r.number for r in regions), regions_high)
        for o in self.live.values():
            if o.references == 0:
                self._end(o)
                self._ending.append(o)
            elif o.released:
                self._released.append(o)
        # What was kept for the next fork, or had just ended.
        for place, pages in self._maps.free:
            self._tables.map_end(place, pages)
        begun = [r for r in regions if r.generation]
        return begun, [r for r in regions if not r.generation]

    def _resume_region(
        self,
        left: native.Takeover,
        number: int,
        generation: int,
        worker: int,
        address: int,
        o: int,
        advice: int,
        place: int | None,
    ) -> RegionRecord:
        region = RegionRecord(number, worker, address, self.live[o], generation, advice, place)
        region.object.references += 1
        if place is not None:
            self._maps.reserve(place, region.object.pages)
        if generation:
            left.region_adopt(number)
        return region

    def sweep(self) -> bool:
        """Free the pages of ended objects; False while some of them are busy."""
        # What is filled or written out at a release is swept until it is gone, though it is mapped.
        self._released = [
            o
            for o in self._released
            if o.references and self._tables.object_sweep(o.number, last=False)
        ]
        # Not every family each time: only those that lost something since they were looked at.
        held = 0
        for number in self._families.keys() & self._tables.families_unswept():
            held += self._tables.family_sweep(number)
            self._untrimmed.add(number)
        while self._untrimmed:
            number = self._untrimmed.pop()
            if number in self._families:
                self._trim(self._families[number], 1)
        busy = []
        for o in self._ending:
            if self._tables.object_sweep(o.number, last=True):
                busy.append(o)
            else:
                del self.live[o.number]
                self._families.pop(o.number, None)
                self._end_spare_map(o)
                for base in o.extents[1:]:
                    self._tables.extent_end(base, o.pages)
                    self._extents.give_back(base, o.pages)
                self._extents.give_back(o.base, o.pages)
                self._object_numbers.returned.append(o.number)
                if o.has_file:
                    self._vault.forget("file", o.number, o.generation)
        self._ending = busy
        return not (busy or held or self._released)

    def _end(self, o: PagedObject) -> None:
        if not o.released:
            o.released = True
            self._tables.object_end(o.number)
            kind = {"sparse": o.sparse, "read_only": o.read_only, "shared": bool(o.extents)}
            self._tables.uncommit(native.commits(o.pages, **kind))
