"""A part of `_fast.pyx`: what a swapper finds that comes after another."""

from pyswap.core.region cimport ALIVE
from pyswap.core.takeover cimport copies_remind, tables_repair, waiters_wake


cdef class Takeover:
    """What the swapper before this one has left in the tables; the main thread's.

    Parameters
    ----------
    swapper : Swapper
        The tables, which nobody uses yet.
    """
    cdef Swapper swapper
    cdef pool_t *pool

    def __cinit__(self, Swapper swapper):
        self.swapper = swapper
        self.pool = swapper.pool

    def repair(self):
        """Undo or finish what was half done; before any loop begins."""
        cdef pool_t *pool = self.pool
        with nogil:
            tables_repair(pool)

    def places(self):
        """(place, serial, pid) of every worker's place."""
        cdef worker_t *workers = self.pool.workers
        return [(workers[i].place, workers[i].serial, workers[i].pid) for i in range(MAX_WORKERS)]

    def served(self, uint32_t w):
        """A worker's latest request that changed what keeps an object; 0: none."""
        return load64(&self.pool.workers[w].served)

    def worker_adopt(self, uint32_t w, int uffd, int channel):
        """Serve a worker that is attached already; the descriptors are the swapper's from here on."""
        cdef pool_t *pool = self.pool
        cdef uint64_t generation = life_generation(&pool.workers[w].word)
        pool.attached[w].uffd = uffd
        pool.attached[w].channel = channel
        raise_errno(poll_add(pool.poll_fd, uffd, (generation << 32) | w), "a worker's faults cannot be polled")
        raise_errno(poll_add(pool.poll_fd, channel, (generation << 32) | CHANNEL | w),
                    "a worker's answers cannot be polled")

    def objects_left(self):
        """A row for each object: see objects.Objects.resume."""
        cdef pool_t *pool = self.pool
        cdef object_t *object
        rows = []
        for o in range(pool.header.object_high):
            object = &pool.objects[o]
            if pool.mapped[o] == NULL:
                self.swapper.object_room(o)
            if object.pages == 0:
                continue
            extents = []
            label = (b"", b"")
            if object.labelled:
                label = (<bytes>self.swapper.label_of(o).label, <bytes>self.swapper.label_of(o).layout)
            if family_of(pool, o) != NULL:
                extents = [pool.families[o].extents[e] for e in range(pool.families[o].count)]
            rows.append((
                o, life_generation(&object.word), object.base, object.pages, bool(object.is_private),
                bool(object.is_sparse), bool(load64(&object.word) & ALIVE),
                [base for base in extents if base != NO_EXTENT], object.file == FILE_READ, object.file != FILE_NONE,
                object.transits, bool(object.is_kept), *label,
            ))
        return rows

    def file_adopt(self, uint32_t o, int fd):
        """Use the descriptor of the file behind an object; -1: it is not to be had."""
        self.pool.files[o] = fd

    def regions_left(self):
        """(number, generation or 0, worker, address, object, advice, map or None) of every region."""
        cdef pool_t *pool = self.pool
        cdef region_t *region
        rows = []
        for r in range(pool.header.region_high):
            region = &pool.regions[r]
            alive = bool(load64(&region.word) & ALIVE)
            if not alive and not region.promise:
                continue
            rows.append((
                r, life_generation(&region.word) if alive else 0, region.worker, region.address, region.object,
                region.advice, None if region.map == NO_EXTENT else region.map,
            ))
        return rows

    def region_adopt(self, uint32_t r):
        """Resolve the faults of a region that was begun before."""
        self.swapper.region_room(r)
        region_insert(self.pool, self.pool.regions[r].worker, r)

    def highs(self):
        """The numbers of objects and regions from which on none was ever used."""
        return self.pool.header.object_high, self.pool.header.region_high

    def frames_left(self):
        """(frames in use, frames of the budget)."""
        cdef header_t *h = self.pool.header
        return h.frame_count - loadi64(&h.state_count[layout.RETIRED]), h.memory_pages

    def closed(self):
        """Whether the creator has closed the pool."""
        return bool(load32(&self.pool.header.closed))

    def waiters_wake(self):
        """Let every fault that waits happen again."""
        waiters_wake(self.pool)

    def copies_remind(self):
        """Give attendants their orders once more; how many had no room for one."""
        return copies_remind(self.pool)

    def area_adopt(self, uint32_t k, int fd, uint64_t number):
        """Use the descriptor of an area that is on; False where the place is another's, or free."""
        cdef area_t *area = &self.pool.header.areas[k]
        if area.state == layout.AREA_OFF or area.number != number:
            return False
        self.pool.area_fds[k] = fd
        return True

    def pins_left(self):
        """(row, worker, number, region, first, count, write) of every granted range, and the rows ever used."""
        cdef pin_t *pin
        rows = []
        for i in range(self.pool.header.pin_high):
            pin = &self.pool.pins[i]
            if pin.state == layout.PIN_GRANTED:
                rows.append((i, pin.worker, pin.number, pin.region, pin.first, pin.count, bool(pin.write)))
        return rows, self.pool.header.pin_high
