"""Where Python objects meet the machinery: the only Cython module, over the headers in core/.

`Swapper` is the swapper process's side: it maps the segments, runs the loops, and keeps the tables.  `Control`,
`Region` and `Attendant` are a worker's side: it reads the control segment, maps regions, and obeys orders.
"""
import os
import sys

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset, strncpy
from posix.stdlib cimport posix_memalign

from pyswap.core cimport layout
from pyswap.core.ahead cimport ahead_serve
from pyswap.core.attendant cimport (
    MAX_LOCAL_RANGES,
    attendant_main,
    attendant_t,
    pthread_join,
    range_add,
    range_find,
    range_map,
    range_remove,
    range_reserve,
    range_t,
    ranges_t,
    thread_start,
)
from pyswap.core.context cimport (
    STREAMS,
    attached_t,
    detector_t,
    family_t,
    pool_t,
    request_t,
    starved_t,
)
from pyswap.core.copy cimport copies_end, copy_answered
from pyswap.core.evict cimport pages_cool, pages_evict, pages_sweep
from pyswap.core.family cimport NO_EXTENT, commit_give, commit_take, family_of
from pyswap.core.fault cimport fault_resolve, fault_t, page_pin, page_unpin, starved_take
from pyswap.core.fork cimport (
    family_extend,
    family_sweep,
    family_trim,
    regions_share,
    region_unshare,
    share_t,
)
from pyswap.core.frame cimport (
    frame_forget_mapper,
    frame_set_online,
    frame_state,
    reclaim_kick,
    word_resident,
    word_state,
)
from pyswap.core.kernel cimport (
    file_allocate,
    file_punch,
    poll_add,
    poll_rearm,
    poll_remove,
    poll_wait,
    uffd_open,
    uffd_protect,
    uffd_read,
    uffd_wake,
)
from pyswap.core.layout cimport (
    FAILPOINTS,
    MAX_BATCH_PAGES,
    MAX_OBJECTS,
    MAX_REGIONS,
    MAX_WORKERS,
    NAME_BYTES,
    REGION_NONE,
    SLOT_CHUNK,
    frame_t,
    header_t,
    object_t,
    region_t,
    slot_t,
    worker_t,
)
from pyswap.core.lock cimport (
    PYSWAP_DEBUG_BUILD,
    add32,
    futex_wait,
    futex_wake,
    load32,
    load64,
    loadi64,
    now_ns,
    panic,
    store32,
    store64,
)
from pyswap.core.order cimport answer_take
from pyswap.core.page cimport wanted_t
from pyswap.core.pagetable cimport pte_frame, pte_is_frame
from pyswap.core.readahead cimport request_put, request_take
from pyswap.core.reclaim cimport reclaim_loop, write_ahead_loop
from pyswap.core.region cimport (
    clones_t,
    life_begin,
    life_drop,
    life_end,
    life_generation,
    life_hold,
    region_copy,
    region_insert,
    region_lookup,
    region_overlaps,
    region_run,
    region_withdraw,
    regions_of,
)

cdef extern from *:
    """
    #include <pthread.h>
    #include <sys/mman.h>
    #define PYSWAP_MAGIC 0x31706177737970ULL
    static inline void *map_file(int fd, uint64_t bytes, int writable) {
        void *p = mmap(NULL, bytes, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_NORESERVE, fd, 0);
        if (p == MAP_FAILED) return NULL;
        madvise(p, bytes, MADV_DONTDUMP);
        madvise(p, bytes, MADV_NOHUGEPAGE);
        return p;
    }
    static inline void unmap(void *p, uint64_t bytes) { munmap(p, bytes); }
    static inline void not_inherited(void *p, uint64_t bytes) { madvise(p, bytes, MADV_DONTFORK); }
    """
    uint64_t PYSWAP_MAGIC
    void *map_file(int fd, uint64_t bytes, bint writable) noexcept nogil
    void unmap(void *p, uint64_t bytes) noexcept nogil
    void not_inherited(void *p, uint64_t bytes) noexcept nogil
    int pthread_atfork(void (*before)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil)
    int errno
    int EAGAIN
    int ESRCH
    int EINTR

cdef enum:
    # Above what vm.mmap_min_addr keeps free, below where the kernel maps anything by itself.
    PROBE_ADDRESS = 1 << 20
    # In what a descriptor is polled with: it is a channel, not a userfaultfd.
    CHANNEL = 1 << 16

debug_build = bool(PYSWAP_DEBUG_BUILD)

COUNTER_NAMES = (
    "minor_faults", "major_faults", "write_faults", "zero_fills", "fill_waits", "frame_waits", "slot_reads",
    "slot_writes", "read_calls", "write_calls", "clean_drops", "zero_drops", "write_ahead_pages", "readahead_pages",
    "readahead_hits", "evictions", "redirtied_pages", "slot_steals", "read_errors", "write_errors", "poisoned_pages",
    "cow_copies", "cow_remaps",
)
STATE_NAMES = ("free", "filling", "present", "writeback", "evicting", "offline")
FAILPOINT_NAMES = (
    "fill_locked", "fill_read", "map_before", "clean_protected", "clean_written", "clean_write", "evict_punched",
    "evict_entry", "fallocate", "copy_made", "copy_ordered", "copy_answered", "fork_copied",
)
FAILPOINT_ACTIONS = ("off", "park", "errno", "kill", "stop")


cdef int raise_errno(int rc, str what) except -1:
    """The one place where an errno becomes an exception."""
    if rc >= 0:
        return rc
    raise OSError(-rc, f"{what}: {os.strerror(-rc)}")


cdef uint64_t round_up(uint64_t n, uint64_t unit):
    return (n + unit - 1) // unit * unit


# The control segment.

def control_bytes(uint64_t frame_count, uint64_t slot_count, uint64_t page_count):
    """Offsets of the tables in a control segment, and its size, in bytes."""
    cdef uint64_t at = round_up(sizeof(header_t), 4096)
    offsets = {}
    for name, size in (
        ("frames", frame_count * sizeof(frame_t)),
        ("workers", MAX_WORKERS * sizeof(worker_t)),
        ("regions", MAX_REGIONS * sizeof(region_t)),
        ("objects", MAX_OBJECTS * sizeof(object_t)),
        ("slots", round_up(slot_count, SLOT_CHUNK) * sizeof(slot_t)),
        ("pages", page_count * sizeof(uint64_t)),
        ("references", page_count * sizeof(uint32_t)),
    ):
        offsets[name] = at
        at += round_up(size, 4096)
    offsets["size"] = at
    return offsets


cdef class Swapper:
    """The swapper process's tables and loops.  One thread calls the methods that begin and end things."""
    cdef pool_t *pool
    cdef uint64_t control_size
    cdef uint64_t store_size

    def __cinit__(self, int control_fd, int store_fd, int swap_fd, int poll_fd, dict sizes):
        cdef pool_t *pool = <pool_t *>calloc(1, sizeof(pool_t))
        if pool == NULL:
            raise MemoryError("pyswap: no memory for the swapper's own tables")
        self.pool = pool
        pool.control_fd = control_fd
        pool.store_fd = store_fd
        pool.swap_fd = swap_fd
        pool.poll_fd = poll_fd
        offsets = control_bytes(sizes["frame_count"], sizes["slot_count"], sizes["page_count"])
        self.control_size = offsets["size"]
        pool.page_bytes = sizes["page_bytes"]
        pool.page_shift = (<int>sizes["page_bytes"]).bit_length() - 1
        self.store_size = <uint64_t>sizes["page_count"] << pool.page_shift
        raise_errno(file_allocate(control_fd, 0, offsets["workers"] + MAX_WORKERS * sizeof(worker_t)),
                    "pyswap: no shared memory for the frame table")
        self.map_segments(offsets)
        self.format(sizes, offsets)
        self.make_private(sizes)

    cdef map_segments(self, offsets):
        cdef pool_t *pool = self.pool
        cdef uint8_t *base = <uint8_t *>map_file(pool.control_fd, self.control_size, True)
        if base == NULL:
            raise_errno(-errno, "pyswap: the control segment cannot be mapped")
        pool.store = <uint8_t *>map_file(pool.store_fd, self.store_size, True)
        if pool.store == NULL:
            raise_errno(-errno, "pyswap: the page store cannot be mapped")
        not_inherited(pool.store, self.store_size)
        pool.header = <header_t *>base
        pool.frames = <frame_t *>(base + <uint64_t>offsets["frames"])
        pool.workers = <worker_t *>(base + <uint64_t>offsets["workers"])
        pool.regions = <region_t *>(base + <uint64_t>offsets["regions"])
        pool.objects = <object_t *>(base + <uint64_t>offsets["objects"])
        pool.slots = <slot_t *>(base + <uint64_t>offsets["slots"])
        pool.pages = <uint64_t *>(base + <uint64_t>offsets["pages"])
        pool.references = <uint32_t *>(base + <uint64_t>offsets["references"])

    cdef format(self, sizes, offsets):
        cdef header_t *h = self.pool.header
        h.version = layout.LAYOUT_VERSION
        h.page_bytes = sizes["page_bytes"]
        h.frame_count = sizes["frame_count"]
        h.slot_count = sizes["slot_count"]
        h.page_count = sizes["page_count"]
        h.offset_frames = offsets["frames"]
        h.offset_workers = offsets["workers"]
        h.offset_regions = offsets["regions"]
        h.offset_objects = offsets["objects"]
        h.offset_slots = offsets["slots"]
        h.offset_pages = offsets["pages"]
        h.offset_references = offsets["references"]
        h.size_bytes = offsets["size"]
        h.minimum_frames = sizes["minimum_frames"]
        h.low_frames = sizes["low_frames"]
        h.high_frames = sizes["high_frames"]
        h.batch_pages = sizes["batch_pages"]
        h.window_pages = sizes["window_pages"]
        h.chunk_pages = sizes["chunk_pages"]
        h.around_pages = sizes["around_pages"]
        h.frame_wait_ms = sizes["frame_wait_ms"]
        h.commit_limit_pages = sizes["commit_limit_pages"]
        h.overcommit = sizes["overcommit"]
        h.swapper_pid = os.getpid()
        h.swapper_generation = 1
        h.state_count[layout.FREE] = sizes["frame_count"]
        store64(&h.magic, PYSWAP_MAGIC)

    cdef make_private(self, sizes):
        cdef pool_t *pool = self.pool
        cdef uint64_t frames = sizes["frame_count"], chunks = round_up(sizes["slot_count"], SLOT_CHUNK) // SLOT_CHUNK
        cdef uint64_t f
        pool.free_list = <uint32_t *>calloc(frames, sizeof(uint32_t))
        pool.cold = <uint32_t *>calloc(frames, sizeof(uint32_t))
        pool.chunk_used = <uint16_t *>calloc(chunks + 1, sizeof(uint16_t))
        pool.chunk_ready = <uint8_t *>calloc(chunks + 1, 1)
        pool.detectors = <detector_t **>calloc(MAX_REGIONS, sizeof(void *))
        pool.mapped = <uint32_t **>calloc(MAX_OBJECTS, sizeof(void *))
        pool.families = <family_t **>calloc(MAX_OBJECTS, sizeof(void *))
        pool.maps = <uint64_t **>calloc(MAX_REGIONS, sizeof(void *))
        pool.mappings_limit = sizes["mappings_limit"]
        if not (pool.free_list and pool.cold and pool.chunk_used and pool.chunk_ready and pool.detectors
                and pool.mapped and pool.families and pool.maps):
            raise MemoryError("pyswap: no memory for the swapper's own tables")
        # The lowest number is handed out first, so that the hand meets frames in the order they were filled.
        for f in range(frames):
            pool.free_list[f] = <uint32_t>(frames - 1 - f)
        pool.free_count = <uint32_t>frames

    # Loops, each in a thread of its own, until stop().

    def fault_loop(self):
        """Resolve faults of every worker, one at a time."""
        cdef pool_t *pool = self.pool
        with nogil:
            fault_loop(pool)

    def starved_loop(self):
        """Resolve the faults that found no free frame, waiting for one."""
        cdef pool_t *pool = self.pool
        with nogil:
            starved_loop(pool)

    def readahead_loop(self):
        """Carry out readahead requests."""
        cdef pool_t *pool = self.pool
        with nogil:
            ahead_loop(pool)

    def reclaim_loop(self):
        """Keep frames free."""
        cdef pool_t *pool = self.pool
        with nogil:
            reclaim_loop(pool)

    def write_ahead_loop(self):
        """Clean pages before reclaim meets them."""
        cdef pool_t *pool = self.pool
        with nogil:
            write_ahead_loop(pool)

    def stop(self):
        """Let every loop end; the caller wakes those that wait in epoll."""
        cdef pool_t *pool = self.pool
        store32(&pool.stop, 1)
        reclaim_kick(pool)
        add32(&pool.requests_sequence, 1)
        futex_wake(&pool.requests_sequence, 0x7FFFFFFF)
        add32(&pool.header.free_sequence, 1)
        futex_wake(&pool.header.free_sequence, 0x7FFFFFFF)

    def set_ended(self):
        """Tell the attendants that the end of their channel is in good order."""
        store32(&self.pool.header.ended, 1)

    def set_closed(self):
        """No new arrays from here on."""
        store32(&self.pool.header.closed, 1)

    def commit(self, uint64_t pages):
        """Note that arrays may come to need so many pages more; False where frames and swap have no room."""
        return commit_take(self.pool, pages)

    def uncommit(self, uint64_t pages):
        """Note that arrays need so many pages less."""
        commit_give(self.pool, pages)

    def uncommitted(self):
        """Pages that new arrays may have."""
        return self.pool.header.commit_limit_pages - load64(&self.pool.header.committed_pages)

    # Workers.

    def worker_begin(self, uint32_t w, uint32_t pid, int uffd, int channel):
        """Attach a process; its descriptors are the swapper's from here on, unless this raises."""
        cdef pool_t *pool = self.pool
        cdef attached_t *a = &pool.attached[w]
        cdef uint64_t generation
        cdef int rc = uffd_wake(uffd, PROBE_ADDRESS, 4096)
        raise_errno(rc, "what a worker sent is no userfaultfd")
        a.uffd = uffd
        a.channel = channel
        pool.workers[w].pid = pid
        generation = life_begin(&pool.workers[w].word)
        a.breaks = 0
        rc = poll_add(pool.poll_fd, uffd, (generation << 32) | w)
        if rc == 0:
            rc = poll_add(pool.poll_fd, channel, (generation << 32) | CHANNEL | w)
            if rc < 0:
                poll_remove(pool.poll_fd, uffd)
        if rc < 0:
            life_end(&pool.workers[w].word)
            raise_errno(rc, "pyswap: a worker's faults cannot be polled")

    def worker_end(self, uint32_t w):
        """Detach a process whose regions have all ended."""
        cdef pool_t *pool = self.pool
        cdef attached_t *a = &pool.attached[w]
        cdef uint32_t f
        life_end(&pool.workers[w].word)
        if a.count:
            raise AssertionError(f"worker {w} still has {a.count} regions")
        for f in range(<uint32_t>pool.header.frame_count):
            frame_forget_mapper(&pool.frames[f], w)
        poll_remove(pool.poll_fd, a.uffd)
        poll_remove(pool.poll_fd, a.channel)
        os.close(a.uffd)
        os.close(a.channel)
        free(a.regions)
        a.regions = NULL
        a.capacity = 0
        pool.workers[w].pid = 0

    def worker_gone(self, uint32_t w):
        """Whether the process's memory is gone: nothing can be mapped there any more."""
        cdef attached_t *a = &self.pool.attached[w]
        # Lifting the protection of an unregistered page changes nothing; it only tells whether memory is left.
        return uffd_protect(a.uffd, PROBE_ADDRESS, 4096, False) == -ESRCH

    # Objects.

    def object_begin(self, uint32_t o, uint64_t base, uint64_t pages, uint64_t size, bytes name, bint is_private):
        """Give an array its page ids; returns the object's generation."""
        cdef pool_t *pool = self.pool
        cdef object_t *object = &pool.objects[o]
        cdef header_t *h = pool.header
        cdef uint32_t i
        self.memory(h.offset_objects + o * sizeof(object_t), sizeof(object_t))
        self.memory(h.offset_pages + base * 8, pages * 8)
        if pool.mapped[o] == NULL:
            pool.mapped[o] = <uint32_t *>calloc(MAX_WORKERS, sizeof(uint32_t))
            if pool.mapped[o] == NULL:
                raise MemoryError("pyswap: no memory for the swapper's own tables")
        for i in range(<uint32_t>MAX_WORKERS):
            store32(&pool.mapped[o][i], REGION_NONE)
        object.base = base
        object.pages = pages
        object.size_bytes = size
        object.is_private = is_private
        if pool.families[o] != NULL:
            pool.families[o].count = 0
        memset(object.name, 0, NAME_BYTES)
        strncpy(object.name, name, NAME_BYTES - 1)
        return life_begin(&object.word)

    def object_end(self, uint32_t o):
        """The array is over: no page of it is filled from here on."""
        life_end(&self.pool.objects[o].word)

    def object_sweep(self, uint32_t o, bint last):
        """Free an ended object's pages; returns how many were busy and need another sweep.

        The last sweep gives the memory of its page table entries back: nobody may look at them any more.
        """
        cdef pool_t *pool = self.pool
        cdef object_t *object = &pool.objects[o]
        cdef uint64_t at = 0, held = 0, n
        with nogil:
            if family_of(pool, o) != NULL:
                held = family_sweep(pool, o)
            while at < object.pages:
                n = object.pages - at
                if n > MAX_BATCH_PAGES:
                    n = MAX_BATCH_PAGES
                held += pages_sweep(pool, o, object.base + at, <uint32_t>n)
                at += n
        if held == 0 and last:
            self.extent_end(object.base, object.pages)
        return held

    def extent_end(self, uint64_t base, uint64_t pages):
        """Give the memory of page table entries and references back: nobody may look at them any more."""
        cdef pool_t *pool = self.pool
        file_punch(pool.control_fd, pool.header.offset_pages + base * 8, (pages * 8 + 4095) & ~<uint64_t>4095)
        file_punch(pool.control_fd, pool.header.offset_references + base * 4,
                   (pages * 4 + 2047) & ~<uint64_t>2047)

    # Families: private objects that were forked, or cloned.

    def family_extend(self, uint32_t o, uint64_t base):
        """Give a private object page ids for copies; the first time they are its own."""
        cdef pool_t *pool = self.pool
        if pool.families[o] == NULL:
            pool.families[o] = <family_t *>calloc(1, sizeof(family_t))
            if pool.families[o] == NULL:
                raise MemoryError("pyswap: no memory for the swapper's own tables")
        raise_errno(family_extend(pool, o, base), "pyswap: no shared memory for the tables")

    def family_sweep(self, uint32_t o):
        """Free what pages without references have; returns how many were busy."""
        cdef pool_t *pool = self.pool
        cdef uint64_t held
        with nogil:
            held = family_sweep(pool, o)
        return held

    def family_unswept(self, uint32_t o):
        """Whether a page that lost its last reference was busy at the time."""
        return family_of(self.pool, o) != NULL and bool(load32(&self.pool.families[o].unswept))

    def family_trim(self, uint32_t o):
        """Take back an extent in which no page is left; its first page id, or None."""
        cdef uint64_t base = family_trim(self.pool, o)
        if base == NO_EXTENT:
            return None
        self.extent_end(base, self.pool.objects[o].pages)
        return base

    def regions_share(self, list pairs):
        """Share the pages of regions with others that are not begun yet: (source, clone) numbers; all or none."""
        cdef pool_t *pool = self.pool
        cdef uint32_t n = <uint32_t>len(pairs), i
        cdef int rc
        cdef share_t *shares = <share_t *>calloc(n + 1, sizeof(share_t))
        if shares == NULL:
            raise MemoryError("pyswap: no memory for the swapper's own tables")
        try:
            for i in range(n):
                shares[i].source, shares[i].clone = pairs[i]
                self.memory(pool.header.offset_regions + shares[i].clone * sizeof(region_t), sizeof(region_t))
            with nogil:
                rc = regions_share(pool, shares, n)
        finally:
            free(shares)
        if rc == -12:
            raise MemoryError("no frame became free in time for a copy of a pinned page")
        raise_errno(rc, "the pages of a private array cannot be shared")

    def region_unshare(self, uint32_t o, uint32_t r):
        """Give a region's references up: it has ended, or was never begun."""
        cdef pool_t *pool = self.pool
        cdef bint last
        with nogil:
            last = region_unshare(pool, o, r)
            if last:
                family_sweep(pool, o)

    def region_runs(self, uint32_t r, uint32_t generation, uint64_t first, uint64_t count, uint32_t limit):
        """Runs of consecutive page ids: (index, pages, page id), at most `limit` of them."""
        cdef pool_t *pool = self.pool
        cdef uint64_t at = first, page = 0
        cdef uint32_t n
        rows = []
        while at < first + count and len(rows) < limit:
            n = region_run(pool, r, generation, <int64_t>at, first + count - at, &page)
            if n == 0:
                break
            rows.append((at, n, page))
            at += n
        return rows

    def clones(self, uint32_t o, uint32_t w):
        """How many regions of an object a worker has."""
        cdef clones_t clones
        regions_of(self.pool, o, w, &clones)
        return clones.count

    # Regions.

    def region_begin(self, uint32_t r, uint32_t w, uint32_t o, uint64_t address):
        """Note where a worker maps an object, before it can touch it; returns the region's generation."""
        cdef uint32_t generation
        cdef pool_t *pool = self.pool
        cdef region_t *region = &pool.regions[r]
        cdef attached_t *a = &pool.attached[w]
        cdef uint32_t *grown
        cdef uint64_t size = pool.objects[o].pages << pool.page_shift
        # A wake-up changes nothing, but the kernel looks at the range.  At one that it refuses, no page could
        # ever be write-protected, and so none evicted.
        if uffd_wake(a.uffd, address, size) != 0:
            raise ValueError(f"no array of {size} bytes can be at {address:#x}")
        if region_overlaps(pool, w, address, size):
            raise ValueError(f"another array is mapped at {address:#x}")
        self.memory(pool.header.offset_regions + r * sizeof(region_t), sizeof(region_t))
        if pool.detectors[r] == NULL:
            pool.detectors[r] = <detector_t *>calloc(1, sizeof(detector_t))
        if a.count == a.capacity:
            grown = <uint32_t *>realloc(a.regions, (2 * a.capacity + 16) * sizeof(uint32_t))
            if grown != NULL:
                a.regions = grown
                a.capacity = 2 * a.capacity + 16
        if pool.detectors[r] == NULL or a.count == a.capacity:
            raise MemoryError("pyswap: no memory for the swapper's own tables")
        memset(pool.detectors[r], 0, sizeof(detector_t))
        region.address = address
        region.pages = pool.objects[o].pages
        region.base = pool.objects[o].base
        region.object = o
        region.object_generation = life_generation(&pool.objects[o].word)
        region.worker = w
        region.advice = layout.ADVICE_NORMAL
        region.is_private = pool.objects[o].is_private
        region.gate = 0
        if pool.maps[r] == NULL:
            region.breaks = 0
        generation = life_begin(&region.word)
        region_insert(pool, w, r)
        return generation

    def region_end(self, uint32_t r):
        """The worker has unmapped it, or is gone; returns when no thread uses it any more."""
        cdef pool_t *pool = self.pool
        cdef region_t *region = &pool.regions[r]
        region_withdraw(pool, region.worker, r)
        with nogil:
            life_end(&region.word)
            copies_end(pool, r)

    def region_advise(self, uint32_t r, uint32_t advice):
        """Set how the region's faults feed readahead: 0 normal, 1 sequential, 2 random."""
        store32(&self.pool.regions[r].advice, advice)

    # What users ask for; these may take long, and release the GIL.

    def pin(self, uint32_t r, uint32_t generation, uint64_t first, uint64_t count, bint write):
        """Make pages resident, mapped and pinned; all or none.  Raises MemoryError or OSError."""
        cdef pool_t *pool = self.pool
        cdef fault_t pin
        cdef uint64_t i = 0
        cdef int rc = 0
        memset(&pin, 0, sizeof(pin))
        if not region_copy(pool, r, generation, &pin.region):
            raise_errno(-ESRCH, "the array is gone")
        with nogil:
            pin.worker = pin.region.worker
            pin.r = r
            pin.generation = generation
            pin.write = write
            want_for_pin(pool, &pin.want, pin.region.object, pin.region.object_generation, pin.region.worker)
            while i < count:
                pin.index = <int64_t>(first + i)
                pin.want.index = first + i
                pin.want.deadline_ns = now_ns() + <uint64_t>pool.header.frame_wait_ms * 1_000_000
                rc = page_pin(pool, &pin)
                if rc != 0:
                    break
                i += 1
            free(pin.want.buffer)
        if rc != 0:
            self.unpin(r, generation, pin.region.object, pin.region.object_generation, first, i, write)
            if rc == -12:
                raise MemoryError("the pinned range does not fit: no frame became free in time")
            if rc == -28:
                raise MemoryError("memory and swap have no room for copies of the pinned pages")
            raise_errno(rc, "a page of the range could not be read")

    def unpin(
        self, uint32_t r, uint32_t generation, uint32_t o, uint32_t object_generation, uint64_t first, uint64_t count,
        bint write
    ):
        """Undo a pin; a range whose object is gone, or whose private region is, has nothing left to undo."""
        cdef pool_t *pool = self.pool
        cdef wanted_t want
        cdef uint64_t i
        with nogil:
            want_for_pin(pool, &want, o, object_generation, 0)
            for i in range(first, first + count):
                want.page = pool.objects[o].base + i
                want.index = i
                if pool.objects[o].is_private and not region_lookup(pool, r, generation, <int64_t>i, &want.page):
                    break
                want.deadline_ns = now_ns() + <uint64_t>pool.header.frame_wait_ms * 1_000_000
                page_unpin(pool, &want, write)
            free(want.buffer)

    def prefetch(self, uint32_t r, uint32_t generation, uint64_t first, uint64_t count):
        """Queue reading pages that are in swap; returns how many pages' requests found room."""
        cdef pool_t *pool = self.pool
        cdef request_t request
        cdef uint64_t done = 0
        request.object = pool.regions[r].object
        request.generation = pool.regions[r].object_generation
        request.stride = 1
        request.region = r
        request.region_generation = generation
        request.stream = STREAMS
        request.stream_generation = 0
        while done < count:
            request.first = <int64_t>(first + done)
            request.count = <uint32_t>min(count - done, <uint64_t>pool.header.chunk_pages)
            if not request_put(pool, &request):
                break
            done += request.count
        return done

    def cool(self, uint32_t r, uint32_t generation, uint64_t first, uint64_t count):
        """Have pages evicted first."""
        cdef pool_t *pool = self.pool
        cdef uint64_t at = first, page = 0
        cdef uint32_t n = 1
        with nogil:
            while at < first + count and n:
                n = region_run(pool, r, generation, <int64_t>at, first + count - at, &page)
                pages_cool(pool, page, n)
                at += n

    def evict(self, uint32_t r, uint32_t generation, uint64_t first, uint64_t count):
        """Evict pages now; returns how many of them are still resident: pinned, or busy."""
        cdef pool_t *pool = self.pool
        cdef uint64_t at = first, left = 0, most, page = 0
        cdef uint32_t n = 1
        with nogil:
            while at < first + count and n:
                most = min(first + count - at, <uint64_t>MAX_BATCH_PAGES)
                n = region_run(pool, r, generation, <int64_t>at, most, &page)
                left += pages_evict(pool, page, n)
                at += n
        return left

    def frames_online(self, uint32_t limit):
        """Give up to `limit` frames without memory another try; returns how many."""
        cdef pool_t *pool = self.pool
        cdef uint32_t f, n = 0
        if loadi64(&pool.header.state_count[layout.OFFLINE]) == 0:
            return 0
        for f in range(<uint32_t>pool.header.frame_count):
            if n == limit:
                break
            n += frame_set_online(pool, f)
        return n

    def check(self):
        """Raise AssertionError where the conservation law or the counts are broken; the pool must be idle."""
        cdef pool_t *pool = self.pool
        cdef uint32_t f
        counts = [0] * 6
        for f in range(<uint32_t>pool.header.frame_count):
            counts[frame_state(&pool.frames[f])] += 1
        kept = [pool.header.state_count[i] for i in range(6)]
        if counts != kept or sum(counts) != pool.header.frame_count:
            raise AssertionError(f"frames by state: {counts} found, {kept} counted, {pool.header.frame_count} in all")
        if counts[layout.FREE] != pool.free_count:
            raise AssertionError(f"{counts[layout.FREE]} frames are free, the free list has {pool.free_count}")
        blocks = os.fstat(pool.store_fd).st_blocks * 512
        held = (sum(counts) - counts[layout.FREE] - counts[layout.OFFLINE]) * pool.page_bytes
        if blocks != held:
            raise AssertionError(f"the store holds {blocks} bytes, its frames {held}")

    def failpoint(self, int which, int action, uint32_t value, uint32_t skip, uint32_t limit):
        """Arm a failpoint of the debug build (layout.pxd, failpoint_t)."""
        cdef header_t *h = self.pool.header
        if not debug_build or not 0 <= which < FAILPOINTS:
            raise ValueError("failpoints are in the debug build only")
        h.failpoints[which].value = value
        h.failpoints[which].skip = skip
        h.failpoints[which].limit = limit
        store32(&h.failpoints[which].action, action)

    def failpoint_release(self, int which):
        """Let every thread parked at a failpoint go on."""
        add32(&self.pool.header.failpoints[which].ticket, 1)
        futex_wake(&self.pool.header.failpoints[which].ticket, 0x7FFFFFFF)

    cdef memory(self, uint64_t offset, uint64_t size):
        """Memory for records of the control segment before the first store: a full tmpfs would be SIGBUS."""
        raise_errno(file_allocate(self.pool.control_fd, offset, size), "pyswap: no shared memory for the tables")


cdef uint8_t *make_buffer(uint64_t size) noexcept nogil:
    """A thread's own buffer, aligned for O_DIRECT; a swapper without memory for it cannot go on."""
    cdef void *buffer = NULL
    if posix_memalign(&buffer, 4096, size) != 0:
        panic("make_buffer: no memory", size, 0, 0)
    return <uint8_t *>memset(buffer, 0, size)


cdef void want_for_pin(pool_t *pool, wanted_t *want, uint32_t o, uint32_t generation, uint32_t worker) noexcept nogil:
    """What a pin or an unpin wants of a page: it sleeps for locks, and waits for frames."""
    want.object = o
    want.object_generation = generation
    want.worker = worker
    want.sleeps = True
    want.patient = True
    want.buffer = make_buffer(pool.page_bytes)


cdef void serve_answer(pool_t *pool, uint32_t w, uint64_t data) noexcept nogil:
    """An attendant's answer; a channel that has ended is not polled again."""
    cdef uint64_t copy = 0
    cdef int32_t rc = 0
    cdef int channel = pool.attached[w].channel, n = answer_take(channel, &copy, &rc)
    if n >= 0:
        poll_rearm(pool.poll_fd, channel, data)
    life_drop(&pool.workers[w].word)
    if n == 1:
        copy_answered(pool, w, copy, rc)


cdef void fault_loop(pool_t *pool) noexcept nogil:
    cdef uint8_t *buffer = make_buffer(pool.page_bytes)
    cdef uint64_t data = 0, address = 0, flags = 0
    cdef uint32_t w, generation
    cdef int uffd, n
    while not load32(&pool.stop):
        if poll_wait(pool.poll_fd, &data, 1000) != 1:
            continue
        w = <uint32_t>data & 0xFFFF
        generation = <uint32_t>(data >> 32)
        if not life_hold(&pool.workers[w].word, generation):
            continue
        if data & CHANNEL:
            serve_answer(pool, w, data)
            continue
        # One message a thread: the descriptor is polled again before this fault is resolved, so that the
        # next one never waits behind this one's I/O.
        uffd = pool.attached[w].uffd
        n = uffd_read(uffd, &address, &flags)
        poll_rearm(pool.poll_fd, uffd, data)
        life_drop(&pool.workers[w].word)
        if n == 1:
            fault_resolve(pool, w, address, flags, buffer, False)
    free(buffer)


cdef void starved_loop(pool_t *pool) noexcept nogil:
    cdef uint8_t *buffer = make_buffer(pool.page_bytes)
    cdef starved_t fault
    cdef uint32_t sequence
    while not load32(&pool.stop):
        sequence = load32(&pool.starved_sequence)
        if starved_take(pool, &fault):
            fault_resolve(pool, fault.worker, fault.address, fault.flags, buffer, True)
        else:
            futex_wait(&pool.starved_sequence, sequence, 500_000_000)
    free(buffer)


cdef void ahead_loop(pool_t *pool) noexcept nogil:
    cdef uint8_t *buffer = make_buffer(pool.page_bytes * pool.header.chunk_pages)
    cdef request_t request
    cdef uint32_t sequence
    while not load32(&pool.stop):
        sequence = load32(&pool.requests_sequence)
        if request_take(pool, &request):
            ahead_serve(pool, &request, buffer)
        else:
            futex_wait(&pool.requests_sequence, sequence, 500_000_000)
    free(buffer)


# A worker's side.

cdef ranges_t ranges


cdef void after_fork_in_child() noexcept nogil:
    """Nothing else may be mapped where arrays were: they come back at the same addresses, or not at all."""
    cdef uint32_t i
    ranges.lock = 0
    for i in range(ranges.count):
        range_reserve(ranges.entries[i].address, ranges.entries[i].bytes)


cdef void make_ranges() except *:
    if ranges.entries == NULL:
        ranges.entries = <range_t *>calloc(MAX_LOCAL_RANGES, sizeof(range_t))
        if ranges.entries == NULL or pthread_atfork(NULL, NULL, after_fork_in_child) != 0:
            raise MemoryError("pyswap: no memory for the table of mapped ranges")


def owns(uint64_t address):
    """Whether an address is in a live region of this process, of any pool."""
    return range_find(&ranges, address) != NULL


def find(uint64_t address):
    """The live region over an address: (start, bytes, token of its pool), or None."""
    cdef range_t *entry = range_find(&ranges, address)
    if entry == NULL:
        return None
    return entry.address, entry.bytes, entry.token


def open_uffd():
    """A userfaultfd of this process: (descriptor, whether it is user mode only)."""
    cdef int user_only = 0
    cdef int fd = uffd_open(&user_only)
    raise_errno(fd, "userfaultfd")
    return fd, bool(user_only)


def reserve(uint64_t size):
    """Reserve addresses; returns the first."""
    cdef void *p = range_reserve(0, size)
    if p == NULL:
        raise_errno(-errno, f"{size} bytes of addresses")
    return <uint64_t>p


def unreserve(uint64_t address, uint64_t size):
    """Give reserved addresses back."""
    unmap(<void *>address, size)


def reserve_again(uint64_t address, uint64_t size):
    """Replace what is mapped by reserved addresses, in one step."""
    if range_reserve(address, size) == NULL:
        raise_errno(-errno, "reserving addresses")


def punch(int fd, uint64_t offset, uint64_t size):
    """Give the memory of a range of a shared memory object back."""
    raise_errno(file_punch(fd, offset, size), "punching a hole in shared memory")


def map_range(uint64_t address, uint64_t size, int fd, uint64_t offset, int uffd):
    """Map a file over reserved addresses and register them, so that the swapper resolves every fault."""
    raise_errno(range_map(address, size, fd, offset, uffd), "mapping an array")


cdef class Region:
    """One process's mapping of an object: a writable buffer, ended when nothing refers to it any more.

    Parameters
    ----------
    owner
        What is told at the end: ``owner.region_ended(address, mapped_bytes)``.
    address, mapped_bytes
        Where it is mapped; whole pages.
    size
        Bytes of the array; the buffer's length.
    token
        Which pool of this process.
    """
    cdef readonly object owner
    cdef readonly uint64_t address
    cdef readonly uint64_t mapped_bytes
    cdef readonly uint64_t size
    cdef bint ended

    def __init__(self, owner, uint64_t address, uint64_t mapped_bytes, uint64_t size, uint64_t token):
        self.ended = True
        make_ranges()
        if not range_add(&ranges, address, mapped_bytes, token):
            raise MemoryError(f"more than {MAX_LOCAL_RANGES} arrays in one process")
        self.owner = owner
        self.address = address
        self.mapped_bytes = mapped_bytes
        self.size = size
        self.ended = False

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.address, <Py_ssize_t>self.size, 0, flags)

    def __len__(self):
        return self.size

    def __del__(self):
        # At interpreter exit memory stays mapped: daemon threads may still use it, and the process ends anyway.
        try:
            if self.ended or sys.is_finalizing():
                return
        except AttributeError:
            # So late that even sys is empty.
            return
        self.ended = True
        range_remove(&ranges, self.address)
        reserve_again(self.address, self.mapped_bytes)
        self.owner.region_ended(self.address, self.mapped_bytes)


cdef class Attendant:
    """The thread that obeys the swapper's orders in this process."""
    cdef attendant_t *state
    cdef bint running
    cdef Control control

    def __cinit__(self, Control control, int channel, int uffd, int store_fd, int empty_fd, uint64_t token):
        make_ranges()
        self.state = <attendant_t *>calloc(1, sizeof(attendant_t))
        if self.state == NULL:
            raise MemoryError("pyswap: no memory for the attendant")
        self.control = control
        self.state.ranges = &ranges
        self.state.header = control.header
        self.state.channel = channel
        self.state.uffd = uffd
        self.state.store_fd = store_fd
        self.state.empty_fd = empty_fd
        self.state.token = token
        raise_errno(thread_start(&self.state.thread, attendant_main, self.state), "pyswap: the attendant thread")
        self.running = True
        # The thread reads the segment when its channel ends, which may be after this object's end.
        Py_INCREF(control)

    def detach(self):
        """Announce that the end of the channel is in good order."""
        store32(&self.state.detached, 1)

    def orphaned(self):
        """Whether the swapper died."""
        return bool(load32(&self.state.orphaned))

    def join(self):
        """Wait for the thread; its channel has been shut down."""
        cdef attendant_t *state = self.state
        if self.running:
            self.running = False
            with nogil:
                pthread_join(state.thread, NULL)
            Py_DECREF(self.control)

    def forget(self):
        """In a forked child: the thread was the parent's."""
        if self.running:
            self.running = False
            Py_DECREF(self.control)

    def __dealloc__(self):
        # A thread that still runs keeps its state: it may outlive the interpreter.
        if self.state != NULL and not self.running:
            free(self.state)


cdef class Control:
    """A worker's read-only view of the control segment.

    Raises
    ------
    ValueError
        Where the segment is not one of this version, or too small for what its header says.
    """
    cdef uint8_t *base
    cdef header_t *header
    cdef uint64_t size
    cdef int fd

    def __cinit__(self, int fd):
        cdef uint64_t length = os.fstat(fd).st_size
        self.fd = fd
        if length < sizeof(header_t):
            raise ValueError("not a pyswap control segment: it is too short")
        self.base = <uint8_t *>map_file(fd, length, False)
        if self.base == NULL:
            raise_errno(-errno, "pyswap: the control segment cannot be mapped")
        self.size = length
        self.header = <header_t *>self.base
        if (load64(&self.header.magic) != PYSWAP_MAGIC or self.header.version != layout.LAYOUT_VERSION
                or self.header.size_bytes > length):
            raise ValueError("not a pyswap control segment of this version")

    def __dealloc__(self):
        if self.base != NULL:
            unmap(self.base, self.size)

    def numbers(self):
        """Every number of the header, by name."""
        cdef header_t *h = self.header
        out = {name: h.counters[i] for i, name in enumerate(COUNTER_NAMES)}
        out.update({name + "_frames": loadi64(&h.state_count[i]) for i, name in enumerate(STATE_NAMES)})
        out["page_size"] = h.page_bytes
        out["frame_count"] = h.frame_count
        out["slot_count"] = h.slot_count
        out["slots_used"] = loadi64(&h.slots_used)
        out["dirty_pages"] = loadi64(&h.dirty_count)
        out["pinned_pages"] = loadi64(&h.pinned_count)
        out["committed_pages"] = load64(&h.committed_pages)
        out["swapper_pid"] = h.swapper_pid
        return out

    def ended(self):
        """Whether the swapper ended in good order."""
        return bool(load32(&self.header.ended))

    def closed(self):
        """Whether the creator has closed the pool."""
        return bool(load32(&self.header.closed))

    def workers(self):
        """Process ids of the workers attached now."""
        cdef worker_t *table = <worker_t *>(self.base + self.header.offset_workers)
        return [table[i].pid for i in range(MAX_WORKERS) if load64(&table[i].word) & (<uint64_t>1 << 31)]

    def residency(self, uint64_t first, uint64_t count, uint8_t[::1] out):
        """Write 1 for each page id from `first` on that is resident, else 0."""
        cdef uint64_t i, pte
        cdef uint64_t *pages = <uint64_t *>(self.base + self.header.offset_pages)
        cdef frame_t *frames = <frame_t *>(self.base + self.header.offset_frames)
        if first + count > self.header.page_count or <uint64_t>out.shape[0] < count:
            raise ValueError("page ids beyond the table")
        with nogil:
            for i in range(count):
                pte = load64(&pages[first + i])
                out[i] = pte_is_frame(pte) and word_resident(load64(&frames[pte_frame(pte)].word))

    def frame(self, uint64_t page):
        """The frame of a page id for tests: (number, state, waiting workers), or None."""
        cdef uint64_t *pages = <uint64_t *>(self.base + self.header.offset_pages)
        cdef frame_t *frames = <frame_t *>(self.base + self.header.offset_frames)
        cdef uint64_t pte = load64(&pages[page])
        cdef uint32_t f
        if not pte_is_frame(pte):
            return None
        f = pte_frame(pte)
        waiting = sum(int(load64(&frames[f].waiters[i])).bit_count() for i in range(4))
        return f, STATE_NAMES[word_state(load64(&frames[f].word))], waiting

    def failpoint(self, int which):
        """(threads parked now, visits acted on) of a failpoint."""
        if not 0 <= which < FAILPOINTS:
            raise ValueError(f"no failpoint {which}")
        return load32(&self.header.failpoints[which].parked), load32(&self.header.failpoints[which].hits)
