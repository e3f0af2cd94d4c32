"""Where Python objects meet the machinery: the only Cython module, over the headers in core/.

`Swapper` is the swapper process's side: it maps the segments, runs the loops, and keeps the tables.  What it reads off
the tables of another that died is in `_fast_takeover.pxi`; a worker's side is `_fast_worker.pxi`.
"""
import os

from pyswap.errors import SwapIOError

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset, strncpy
from posix.stdlib cimport posix_memalign

from pyswap.core cimport layout
from pyswap.core.ahead cimport ahead_serve, cluster_pages
from pyswap.core.buffer cimport buffer_take
from pyswap.core.checksum cimport checksum_of
from pyswap.core.context cimport (
    attached_t,
    detector_t,
    pool_t,
    request_t,
    starved_t,
)
from pyswap.core.copy cimport copies_end, copies_wait, copy_answered
from pyswap.core.drain cimport area_next_used, page_leave_area
from pyswap.core.evict cimport pages_cool, pages_evict, pages_sweep
from pyswap.core.family cimport commit_give, commit_take, family_of, object_commits
from pyswap.core.fault cimport fault_resolve, fault_t
from pyswap.core.fork cimport (
    family_extend,
    family_sweep,
    family_trim,
    map_begin,
    regions_share,
    region_unshare,
    share_t,
)
from pyswap.core.frame cimport (
    frame_set_back,
    frame_state,
    reclaim_kick,
)
from pyswap.core.groups cimport GROUP_FRAMES, group_has, group_words, touched_row
from pyswap.core.hold cimport hold_change
from pyswap.core.kernel cimport (
    file_allocate,
    file_punch,
    file_stamp,
    poll_add,
    poll_rearm,
    poll_remove,
    poll_wait,
    uffd_for_copies,
    uffd_protect,
    uffd_read,
    uffd_wake,
)
from pyswap.core.layout cimport (
    AREA_SHIFT,
    FILE_COPY,
    FILE_NONE,
    FILE_READ,
    FRAME_NONE,
    MAX_AREAS,
    MAX_BATCH_PAGES,
    MAX_COPIES,
    MAX_OBJECTS,
    MAX_PINS,
    MAX_REGIONS,
    MAX_WORKERS,
    NAME_BYTES,
    NO_EXTENT,
    PATH_BYTES,
    REGION_NONE,
    SLOT_CHUNK,
    area_t,
    birth_t,
    copy_t,
    family_t,
    frame_t,
    header_t,
    label_t,
    object_t,
    pin_t,
    region_t,
    slot_t,
    worker_t,
)
from pyswap.core.lock cimport (
    PYSWAP_DEBUG_BUILD,
    add32,
    add64,
    futex_wait,
    futex_wake,
    load32,
    load64,
    loadi64,
    now_ns,
    panic,
    store32,
    store64,
    swap64,
)
from pyswap.core.mapping cimport mapper_end
from pyswap.core.order cimport answer_take, unread_text
from pyswap.core.page cimport wanted_t
from pyswap.core.pin cimport page_pin, page_unpin
from pyswap.core.readahead cimport request_begin, request_put, request_take
from pyswap.core.reclaim cimport reclaim_loop, write_ahead_loop
from pyswap.core.resize cimport frame_retire, frames_add
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
from pyswap.core.starved cimport starved_take
from pyswap.core.swapmap cimport area_switch, slots_prepare
from pyswap.core.sparse cimport range_begin, range_end, range_move

cdef extern from *:
    """
    #include <sys/mman.h>
    #define PYSWAP_MAGIC 0x31706177737970ULL
    static inline void *map_file(int fd, uint64_t bytes, int writable) {
        void *p = map_memory(NULL, bytes, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_NORESERVE, fd, 0);
        if (p == MAP_FAILED) return NULL;
        madvise(p, bytes, MADV_DONTDUMP);
        madvise(p, bytes, MADV_NOHUGEPAGE);
        return p;
    }
    static inline void not_inherited(void *p, uint64_t bytes) { madvise(p, bytes, MADV_DONTFORK); }
    """
    uint64_t PYSWAP_MAGIC
    void *map_file(int fd, uint64_t bytes, bint writable) noexcept nogil
    void not_inherited(void *p, uint64_t bytes) noexcept nogil
    int errno
    int EAGAIN
    int ENOENT
    int ESTALE
    int ESRCH
    int EINTR

cdef enum:
    # Above what vm.mmap_min_addr keeps free, below where the kernel maps anything by itself.
    PROBE_ADDRESS = 1 << 20
    # A page is one page table entry of the kernel's at least, and a huge page at most.
    MAX_PAGE_BYTES = 1 << 21
    # In what a descriptor is polled with: it is a channel, not a userfaultfd.
    CHANNEL = 1 << 16

debug_build = bool(PYSWAP_DEBUG_BUILD)

COUNTER_NAMES = (
    "minor_faults", "major_faults", "write_faults", "zero_fills", "fill_waits", "frame_waits", "slot_reads",
    "slot_writes", "read_calls", "write_calls", "clean_drops", "zero_drops", "write_ahead_pages", "readahead_pages",
    "readahead_hits", "evictions", "redirtied_pages", "slot_steals", "read_errors", "write_errors", "poisoned_pages",
    "cow_copies", "cow_remaps", "refaults", "activations", "file_reads", "checksum_errors",
    "peak_resident_pages", "peak_slots", "peak_committed_pages",
)
STATE_NAMES = ("free", "filling", "present", "writeback", "evicting", "offline", "retired")


cdef int raise_errno(int rc, str what) except -1:
    """The one place where an errno becomes an exception."""
    if rc >= 0:
        return rc
    raise OSError(-rc, f"{what}: {os.strerror(-rc)}")


cdef uint64_t round_up(uint64_t n, uint64_t unit):
    return (n + unit - 1) // unit * unit


def pid_namespace():
    """The number of this process's namespace of process ids; 0 where it is not to be had."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def commits(uint64_t pages, *, bint sparse, bint read_only, bint shared):
    """The pages that an object commits when it is made, and gives back when it ends; see core/family.pxd."""
    return object_commits(pages, sparse, read_only, shared)


def checksum(const uint8_t[::1] content, uint64_t page_bytes):
    """The checksums of pages, combined: for the bench, and for tests of the header that computes them."""
    cdef uint64_t at = 0, size = content.shape[0], combined = 0
    with nogil:
        while page_bytes and at + page_bytes <= size:
            combined ^= checksum_of(&content[at], page_bytes, 0)
            at += page_bytes
    return combined


# The control segment.

def control_bytes(uint64_t frame_room, uint64_t page_count):
    """Offsets of the tables in a control segment, and its size, in bytes."""
    cdef uint64_t at = round_up(sizeof(header_t), 4096)
    offsets = {}
    for name, size in (
        ("workers", MAX_WORKERS * sizeof(worker_t)),
        ("frames", frame_room * sizeof(frame_t)),
        ("regions", MAX_REGIONS * sizeof(region_t)),
        ("objects", MAX_OBJECTS * sizeof(object_t)),
        ("slots", (<uint64_t>MAX_AREAS << AREA_SHIFT) * sizeof(slot_t)),
        ("pages", page_count * sizeof(uint64_t)),
        ("references", page_count * sizeof(uint32_t)),
        ("families", MAX_OBJECTS * sizeof(family_t)),
        ("maps", page_count * sizeof(uint64_t)),
        ("copies", MAX_COPIES * sizeof(copy_t)),
        ("pins", MAX_PINS * sizeof(pin_t)),
        ("labels", MAX_OBJECTS * sizeof(label_t)),
        ("birth", sizeof(birth_t)),
    ):
        offsets[name] = at
        at += round_up(size, 4096)
    offsets["size"] = at
    return offsets


cdef offsets_of(const header_t *h):
    """Where a header says that the tables begin, as control_bytes() computes it."""
    return {
        "frames": h.offset_frames,
        "workers": h.offset_workers,
        "regions": h.offset_regions,
        "objects": h.offset_objects,
        "slots": h.offset_slots,
        "pages": h.offset_pages,
        "references": h.offset_references,
        "families": h.offset_families,
        "maps": h.offset_maps,
        "copies": h.offset_copies,
        "pins": h.offset_pins,
        "labels": h.offset_labels,
        "birth": h.offset_birth,
        "size": h.size_bytes,
    }


cdef str why_no_control(const header_t *h, uint64_t length):
    """What is wrong with the header of a control segment that somebody sent; None if nothing is."""
    cdef uint64_t frames = h.frame_room, pages = h.page_count
    if load64(&h.magic) != PYSWAP_MAGIC:
        return "it begins with something else"
    if h.version != layout.LAYOUT_VERSION:
        return f"its version is {h.version}, this is {layout.LAYOUT_VERSION}"
    if h.page_bytes < 4096 or h.page_bytes > MAX_PAGE_BYTES or h.page_bytes & (h.page_bytes - 1):
        return f"its pages have {h.page_bytes} bytes"
    # Bounds first, so that no size below overflows.
    if frames == 0 or frames > (<uint64_t>1 << 32) or pages == 0 or pages > (<uint64_t>1 << 46) // h.page_bytes:
        return f"its tables have {frames} frames and {pages} pages"
    if h.frame_count > frames:
        return f"{h.frame_count} frames are more than the {frames} that it has room for"
    if offsets_of(h) != control_bytes(frames, pages) or h.size_bytes != length:
        return f"its tables do not lie as they should in its {length} bytes"
    return None


cdef class Swapper:
    """The swapper process's tables and loops.  One thread calls the methods that begin and end things."""
    cdef pool_t *pool
    cdef uint64_t control_size
    cdef uint64_t store_size

    def __cinit__(self, int control_fd, int store_fd, int poll_fd, dict sizes, bint successor=False):
        cdef pool_t *pool = <pool_t *>calloc(1, sizeof(pool_t))
        if pool == NULL:
            raise MemoryError("pyswap: no memory for the swapper's own tables")
        self.pool = pool
        pool.control_fd = control_fd
        pool.store_fd = store_fd
        pool.poll_fd = poll_fd
        offsets = control_bytes(sizes["frame_room"], sizes["page_count"])
        self.control_size = offsets["size"]
        pool.page_bytes = sizes["page_bytes"]
        pool.page_shift = (<int>sizes["page_bytes"]).bit_length() - 1
        self.store_size = <uint64_t>sizes["page_count"] << pool.page_shift
        if not successor:
            raise_errno(file_allocate(control_fd, 0, offsets["frames"] + sizes["frame_count"] * sizeof(frame_t)),
                        "pyswap: no shared memory for the frame table")
        self.map_segments(offsets)
        if not successor:
            self.format(sizes, offsets)
        elif load64(&pool.header.magic) != PYSWAP_MAGIC or pool.header.version != layout.LAYOUT_VERSION:
            raise ValueError("not a pyswap control segment of this version")
        self.make_private(sizes)
        # From here on the workers look at this process.
        store64(&pool.header.swapper_namespace, pid_namespace())
        store32(&pool.header.swapper_pid, os.getpid())
        store32(&pool.header.swapper_generation, pool.header.swapper_generation + 1)
        futex_wake(&pool.header.swapper_generation, 0x7FFFFFFF)

    cdef map_segments(self, offsets):
        cdef pool_t *pool = self.pool
        cdef uint8_t *base = <uint8_t *>map_file(pool.control_fd, self.control_size, True)
        if base == NULL:
            raise_errno(-errno, "pyswap: the control segment cannot be mapped")
        pool.store = <uint8_t *>map_file(pool.store_fd, self.store_size, False)
        if pool.store == NULL:
            raise_errno(-errno, "pyswap: the page store cannot be mapped")
        not_inherited(pool.store, self.store_size)
        pool.store_uffd = uffd_for_copies(pool.store, self.store_size)
        pool.header = <header_t *>base
        pool.frames = <frame_t *>(base + <uint64_t>offsets["frames"])
        pool.workers = <worker_t *>(base + <uint64_t>offsets["workers"])
        pool.regions = <region_t *>(base + <uint64_t>offsets["regions"])
        pool.objects = <object_t *>(base + <uint64_t>offsets["objects"])
        pool.slots = <slot_t *>(base + <uint64_t>offsets["slots"])
        pool.pages = <uint64_t *>(base + <uint64_t>offsets["pages"])
        pool.references = <uint32_t *>(base + <uint64_t>offsets["references"])
        pool.families = <family_t *>(base + <uint64_t>offsets["families"])
        pool.map_entries = <uint64_t *>(base + <uint64_t>offsets["maps"])
        pool.copies = <copy_t *>(base + <uint64_t>offsets["copies"])
        pool.pins = <pin_t *>(base + <uint64_t>offsets["pins"])

    cdef format(self, sizes, offsets):
        cdef header_t *h = self.pool.header
        h.version = layout.LAYOUT_VERSION
        h.page_bytes = sizes["page_bytes"]
        h.frame_count = sizes["frame_count"]
        h.frame_room = sizes["frame_room"]
        h.page_count = sizes["page_count"]
        h.offset_frames = offsets["frames"]
        h.offset_workers = offsets["workers"]
        h.offset_regions = offsets["regions"]
        h.offset_objects = offsets["objects"]
        h.offset_slots = offsets["slots"]
        h.offset_pages = offsets["pages"]
        h.offset_references = offsets["references"]
        h.offset_families = offsets["families"]
        h.offset_maps = offsets["maps"]
        h.offset_copies = offsets["copies"]
        h.offset_pins = offsets["pins"]
        h.offset_labels = offsets["labels"]
        h.offset_birth = offsets["birth"]
        h.size_bytes = offsets["size"]
        self.set_bounds(sizes["frame_count"], sizes)
        h.frame_wait_ms = sizes["frame_wait_ms"]
        h.overcommit = sizes["overcommit"]
        h.mark = sizes["mark"]
        h.state_count[layout.FREE] = sizes["frame_count"]
        store64(&h.magic, PYSWAP_MAGIC)

    def set_birth(self, list limits, list processors, int nice, uint32_t mask, list environment):
        """Note how this process was started, for those that come after it; strings beyond the room are left out."""
        cdef uint64_t offset = self.pool.header.offset_birth, at = 0
        cdef birth_t *birth = <birth_t *>(<uint8_t *>self.pool.header + offset)
        cdef uint64_t size = sum([len(text) + 1 for text in environment])
        self.memory(offset, min(sizeof(birth_t), sizeof(birth_t) - sizeof(birth.environ) + size))
        for i, limit in enumerate(limits):
            birth.limits[i] = limit
        for i, word in enumerate(processors):
            birth.processors[i] = word
        birth.nice = nice
        birth.mask = mask
        for text in environment:
            if at + len(text) < sizeof(birth.environ):
                memcpy(&birth.environ[at], <const char *><bytes>text, len(text) + 1)
                at += len(text) + 1
        birth.environ_bytes = at

    def set_bounds(self, uint64_t memory_pages, dict bounds):
        """Set the budget, and what follows from it; see config.Bounds."""
        cdef header_t *h = self.pool.header
        store64(&h.memory_pages, memory_pages)
        h.minimum_frames = bounds["minimum_frames"]
        h.low_frames = bounds["low_frames"]
        h.high_frames = bounds["high_frames"]
        h.batch_pages = bounds["batch_pages"]
        h.window_pages = bounds["window_pages"]
        h.chunk_pages = bounds["chunk_pages"]
        h.around_pages = bounds["around_pages"]

    def frame_retire(self, double seconds):
        """Take a frame out of use; False where none became free in time."""
        cdef pool_t *pool = self.pool
        cdef uint64_t deadline = now_ns() + <uint64_t>(seconds * 1e9)
        cdef bint done
        with nogil:
            done = frame_retire(pool, deadline)
        return done

    def frames_add(self, uint64_t wanted):
        """Have so many frames more; MemoryError beyond what the table has room for."""
        cdef pool_t *pool = self.pool
        cdef uint64_t retired = <uint64_t>loadi64(&pool.header.state_count[layout.RETIRED])
        if pool.header.frame_count + wanted > pool.header.frame_room + retired:
            raise MemoryError(f"{pool.header.frame_room} frames are the most that this pool can have")
        raise_errno(frames_add(pool, wanted), "pyswap: no shared memory for the frame table")

    cdef make_private(self, sizes):
        cdef pool_t *pool = self.pool
        cdef uint64_t frames = pool.header.frame_count, chunks = (<uint64_t>MAX_AREAS << AREA_SHIFT) // SLOT_CHUNK
        cdef uint64_t f
        pool.free_list = <uint32_t *>calloc(sizes["frame_room"], sizeof(uint32_t))
        pool.cold = <uint32_t *>calloc(sizes["frame_room"], sizeof(uint32_t))
        pool.hot = <uint64_t *>calloc(sizes["frame_room"], sizeof(uint64_t))
        pool.chunk_limit = sizes["chunk_limit"]
        pool.chunk_used = <uint16_t *>calloc(chunks + 1, sizeof(uint16_t))
        pool.chunk_ready = <uint8_t *>calloc(chunks + 1, 1)
        pool.detectors = <detector_t **>calloc(MAX_REGIONS, sizeof(void *))
        pool.mapped = <uint32_t **>calloc(MAX_OBJECTS, sizeof(void *))
        pool.files = <int *>calloc(MAX_OBJECTS, sizeof(int))
        pool.places = <uint32_t **>calloc(MAX_OBJECTS, sizeof(void *))
        pool.families_ready = <uint8_t *>calloc(MAX_OBJECTS, 1)
        pool.epochs = <uint32_t *>calloc(MAX_OBJECTS, sizeof(uint32_t))
        pool.maps = <uint64_t **>calloc(MAX_REGIONS, sizeof(void *))
        pool.unswept = <uint64_t *>calloc(MAX_OBJECTS // 64, 8)
        pool.written = <uint64_t *>calloc(group_words(sizes["frame_room"]), 8)
        pool.touched = <uint64_t *>calloc(MAX_WORKERS * group_words(sizes["frame_room"]), 8)
        pool.mappings_limit = sizes["mappings_limit"]
        memset(pool.files, 0xFF, MAX_OBJECTS * sizeof(int))
        if not (pool.free_list and pool.cold and pool.hot and pool.chunk_used and pool.chunk_ready and pool.detectors
                and pool.epochs and pool.mapped and pool.files and pool.places and pool.families_ready
                and pool.maps and pool.unswept and pool.written and pool.touched):
            raise MemoryError("pyswap: no memory for the swapper's own tables")
        # What a swapper before this one left undone.
        memset(pool.unswept, 0xFF, MAX_OBJECTS // 8)
        memset(pool.written, 0xFF, group_words(sizes["frame_room"]) * 8)
        # The lowest number is handed out first, so that the hand meets frames in the order they were filled.
        for f in range(frames):
            pool.free_list[f] = <uint32_t>(frames - 1 - f)
        pool.free_count = <uint32_t>frames
        # So that the first to be filled is the first that both hands have passed.
        pool.hand = <uint32_t>frames // 2

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

    def beat_loop(self, uint32_t period_ms, uint32_t stuck_ms):
        """Tell the workers that this process is well, until a thread has been at one fault for too long."""
        cdef pool_t *pool = self.pool
        with nogil:
            beat_loop(pool, period_ms, <uint64_t>stuck_ms * 1_000_000)

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

    def set_in_transit(self, uint64_t pages):
        """Show how many pages of objects pickles on their way keep alive."""
        store64(&self.pool.header.in_transit_pages, pages)

    def commit(self, uint64_t pages):
        """Note that arrays may come to need so many pages more; False where frames and swap have no room."""
        if not commit_take(self.pool, pages):
            return False
        slots_prepare(self.pool, load64(&self.pool.header.committed_pages))
        return True

    def uncommit(self, uint64_t pages):
        """Note that arrays need so many pages less."""
        commit_give(self.pool, pages)

    def uncommitted(self):
        """Pages that new arrays may have."""
        return <int64_t>(self.pool.header.commit_limit_pages - load64(&self.pool.header.committed_pages))

    # Swap areas.

    def area_begin(self, uint32_t k, int fd, uint64_t slots, int32_t priority, uint64_t number, bytes path):
        """Have an area of so many slots used; its descriptor is the caller's, and stays open while it is on."""
        cdef area_t *area = &self.pool.header.areas[k]
        if slots > (<uint64_t>1 << AREA_SHIFT):
            raise ValueError(f"a swap area has at most {<uint64_t>1 << AREA_SHIFT} pages")
        self.pool.area_fds[k] = fd
        memset(area, 0, sizeof(area_t))
        area.slots = slots
        area.priority = priority
        area.number = number
        strncpy(area.path, path, PATH_BYTES - 1)
        self.area_state(k, layout.AREA_ON)

    def area_state(self, uint32_t k, uint32_t state):
        """Switch an area: 0 off, which takes that nobody has a slot of it, 1 on, 2 draining."""
        area_switch(self.pool, k, state)

    def area(self, uint32_t k):
        """(state, slots, used, priority, errors, bad, last error) of an area."""
        cdef area_t *area = &self.pool.header.areas[k]
        return area.state, area.slots, area.used, area.priority, load64(&area.errors), area.bad, load32(&area.error)

    def slot_count(self):
        """Slots of the areas that are on."""
        return self.pool.header.slot_count

    def commit_limit(self, uint64_t pages):
        """Set how many pages arrays may need together."""
        store64(&self.pool.header.commit_limit_pages, pages)

    def area_pages(self, uint32_t k, uint64_t at, uint32_t limit):
        """Page ids that have slots of an area, from a slot on, and the slot to go on at; None at the end."""
        cdef pool_t *pool = self.pool
        cdef uint64_t page = 0
        pages = []
        while len(pages) < limit:
            if not area_next_used(pool, k, &at, &page):
                return pages, None
            pages.append(page)
        return pages, at

    def page_leave_area(self, uint32_t o, uint32_t generation, uint64_t page, uint64_t index, uint32_t k):
        """Have a page of an object give up its slot in an area.  Raises OSError, or MemoryError without a frame."""
        cdef pool_t *pool = self.pool
        cdef wanted_t want
        cdef int rc
        with nogil:
            want_for_pin(pool, &want, o, generation, 0)
            want.page = page
            want.index = index
            want.deadline_ns = now_ns() + <uint64_t>pool.header.frame_wait_ms * 1_000_000
            rc = page_leave_area(pool, &want, k)
            free(want.buffer)
        if rc == -12:
            raise MemoryError("no frame became free in time to take a page out of the swap area")
        if rc < 0 and want.error:
            raise_unread(pool, &want)
        if rc != -ENOENT:
            raise_errno(rc, "a page could not leave the swap area")

    # Workers.

    def worker_place(self, uint32_t w, uint32_t place, uint64_t serial):
        """Keep a worker's place: layout.PLACE_*, and whose descriptors in the vault are its."""
        self.pool.workers[w].serial = serial
        store32(&self.pool.workers[w].place, place)

    def worker_begin(self, uint32_t w, uint32_t pid, int uffd, int channel):
        """Attach a process; its descriptors are the swapper's from here on, unless this raises."""
        cdef pool_t *pool = self.pool
        cdef attached_t *a = &pool.attached[w]
        cdef uint64_t generation
        cdef int rc = uffd_wake(uffd, PROBE_ADDRESS, 4096)
        raise_errno(rc, "what a worker sent is no userfaultfd")
        a.uffd = uffd
        a.channel = channel
        a.deaf = 0
        pool.workers[w].served = 0
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
        life_end(&pool.workers[w].word)
        if a.count:
            raise AssertionError(f"worker {w} still has {a.count} regions")
        mapper_end(pool, w)
        poll_remove(pool.poll_fd, a.uffd)
        poll_remove(pool.poll_fd, a.channel)
        os.close(a.uffd)
        os.close(a.channel)
        free(a.regions)
        a.regions = NULL
        a.capacity = 0
        pool.workers[w].pid = 0
        store32(&pool.workers[w].place, layout.PLACE_FREE)

    def worker_deaf(self, uint32_t w):
        """Whether a fault of the process waits for an order that its attendant cannot hear."""
        return bool(load32(&self.pool.attached[w].deaf))

    def worker_gone(self, uint32_t w):
        """Whether the process's memory is gone: nothing can be mapped there any more."""
        cdef attached_t *a = &self.pool.attached[w]
        # Lifting the protection of an unregistered page changes nothing; it only tells whether memory is left.
        return uffd_protect(a.uffd, PROBE_ADDRESS, 4096, False) == -ESRCH

    # Objects.

    def object_begin(
        self, uint32_t o, uint64_t base, uint64_t pages, uint64_t size, bytes name, bint is_private, bint is_sparse,
        uint64_t row_bytes,
    ):
        """Give an array its page ids; returns the object's generation."""
        cdef pool_t *pool = self.pool
        cdef object_t *object = &pool.objects[o]
        cdef header_t *h = pool.header
        self.memory(h.offset_objects + o * sizeof(object_t), sizeof(object_t))
        self.memory(h.offset_pages + base * 8, pages * 8)
        self.object_room(o)
        object.base = base
        object.size_bytes = size
        object.row_bytes = row_bytes
        object.labelled = 0
        object.is_private = is_private
        object.is_sparse = is_sparse
        object.file = FILE_NONE
        object.transits = 0
        object.is_kept = False
        if pool.families_ready[o]:
            store32(&pool.families[o].count, 0)
        memset(object.name, 0, NAME_BYTES)
        strncpy(object.name, name, NAME_BYTES - 1)
        # A record with pages is in use.
        object.pages = pages
        if h.object_high <= o:
            h.object_high = o + 1
        return life_begin(&object.word)

    def object_hold(self, uint32_t o, uint32_t transits, bint is_kept, uint32_t w=0, uint64_t request=0):
        """Note what keeps an array beside its regions, pickles and a name, and whose request changed it."""
        hold_change(self.pool, o, transits, is_kept, w, request)

    cdef label_t *label_of(self, uint32_t o) except NULL:
        return &(<label_t *>(<uint8_t *>self.pool.header + self.pool.header.offset_labels))[o]

    def object_label(self, uint32_t o, bytes label, bytes found_as):
        """Note what an object is found by, and as; ValueError where that is too long."""
        cdef label_t *record = self.label_of(o)
        if len(label) >= <Py_ssize_t>sizeof(record.label) or len(found_as) >= <Py_ssize_t>sizeof(record.layout):
            raise ValueError("the array's name, or the description of its dtype, is too long to be found by")
        self.memory(self.pool.header.offset_labels + o * sizeof(label_t), sizeof(label_t))
        self.pool.objects[o].labelled = 0
        memset(record, 0, sizeof(label_t))
        strncpy(record.label, label, sizeof(record.label) - 1)
        strncpy(record.layout, found_as, sizeof(record.layout) - 1)
        store32(&self.pool.objects[o].labelled, 1)

    def object_file(self, uint32_t o, int fd, bint read_only, uint64_t offset, uint64_t stamp):
        """Have an array's untouched pages come from a file, whose descriptor is the object's from here on."""
        cdef object_t *object = &self.pool.objects[o]
        self.pool.files[o] = fd
        object.file_offset = offset
        object.file_stamp = stamp
        object.file = FILE_READ if read_only else FILE_COPY

    cdef object_room(self, uint32_t o):
        """This process's own record of who maps an object: nobody."""
        cdef pool_t *pool = self.pool
        cdef uint32_t i
        if pool.mapped[o] == NULL:
            pool.mapped[o] = <uint32_t *>calloc(MAX_WORKERS, sizeof(uint32_t))
            if pool.mapped[o] == NULL:
                raise MemoryError("pyswap: no memory for the swapper's own tables")
        for i in range(<uint32_t>MAX_WORKERS):
            store32(&pool.mapped[o][i], REGION_NONE)

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
            if family_of(pool, o) != NULL:
                store32(&pool.families[o].count, 0)
            self.extent_end(object.base, object.pages)
            object.pages = 0
            # No page of it is being filled any more.
            free(pool.places[o])
            pool.places[o] = NULL
            if object.file != FILE_NONE:
                object.file = FILE_NONE
                if pool.files[o] >= 0:
                    os.close(pool.files[o])
        return held

    def map_end(self, uint64_t place, uint64_t pages):
        """Give the memory of a map back: its region is gone."""
        file_punch(self.pool.control_fd, self.pool.header.offset_maps + place * 8, (pages * 8 + 4095) & ~<uint64_t>4095)

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
        if not pool.families_ready[o]:
            self.memory(pool.header.offset_families + o * sizeof(family_t), sizeof(family_t))
            self.memory(pool.header.offset_copies, MAX_COPIES * sizeof(copy_t))
            pool.copies_ready = 1
            pool.families_ready[o] = 1
        raise_errno(family_extend(pool, o, base), "pyswap: no shared memory for the tables")

    def family_sweep(self, uint32_t o):
        """Free what pages without references have; returns how many were busy."""
        cdef pool_t *pool = self.pool
        cdef uint64_t held
        with nogil:
            held = family_sweep(pool, o)
        return held

    def families_unswept(self):
        """The objects of which a page was busy when it lost its last reference, or an extent lost its last page.

        Each is told once.
        """
        cdef uint64_t bits
        cdef uint32_t i
        found = []
        for i in range(<uint32_t>MAX_OBJECTS // 64):
            if load64(&self.pool.unswept[i]):
                bits = swap64(&self.pool.unswept[i], 0)
                found += [64 * i + k for k in range(64) if bits >> k & 1]
        return found

    def family_trim(self, uint32_t o):
        """Take back an extent in which no page is left; its first page id, or None."""
        cdef uint64_t base = family_trim(self.pool, o)
        if base == NO_EXTENT:
            return None
        self.extent_end(base, self.pool.objects[o].pages)
        return base

    def regions_share(self, list shares):
        """Share the pages of regions with others that are not begun yet; all or none.

        Each row: the numbers of source and clone, and where their maps are in the table of maps.
        """
        cdef pool_t *pool = self.pool
        cdef uint32_t n = <uint32_t>len(shares), i
        cdef int rc
        cdef share_t *rows = <share_t *>calloc(n + 1, sizeof(share_t))
        if rows == NULL:
            raise MemoryError("pyswap: no memory for the swapper's own tables")
        try:
            for i in range(n):
                rows[i].source, rows[i].clone, rows[i].source_map, rows[i].clone_map = shares[i]
            with nogil:
                rc = regions_share(pool, rows, n)
        finally:
            free(rows)
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

    # Sparse objects.

    def region_holes(self, uint32_t r, uint64_t place):
        """Give a promised region of a sparse object its map, of holes, in the table of maps."""
        raise_errno(map_begin(self.pool, r, place), "pyswap: no shared memory for the tables")

    def range_begin(self, uint32_t r, uint64_t first, uint64_t count):
        """Give holes pages: 0, or -errno; see core/sparse.pxd."""
        cdef pool_t *pool = self.pool
        cdef int rc
        with nogil:
            rc = range_begin(pool, r, <int64_t>first, count)
        return rc

    def range_end(self, uint32_t r, uint64_t first, uint64_t count):
        """Make pages holes: 1, 0 or -errno; see core/sparse.pxd."""
        cdef pool_t *pool = self.pool
        cdef int rc
        with nogil:
            rc = range_end(pool, r, <int64_t>first, count)
        return rc

    def range_move(self, uint32_t r, uint64_t first, uint64_t count, uint64_t to):
        """Move pages to where holes are: 0, or -errno; see core/sparse.pxd."""
        cdef pool_t *pool = self.pool
        cdef int rc
        with nogil:
            rc = range_move(pool, r, <int64_t>first, count, <int64_t>to)
        return rc

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

    def region_promise(self, uint32_t r, uint32_t w, uint32_t o, uint64_t address, uint32_t kind):
        """Note where a worker will map an object: layout.PROMISE_* tells what a takeover makes of it."""
        cdef pool_t *pool = self.pool
        cdef region_t *region = &pool.regions[r]
        self.memory(pool.header.offset_regions + r * sizeof(region_t), sizeof(region_t))
        region.address = address
        region.pages = pool.objects[o].pages
        region.base = pool.objects[o].base
        region.object = o
        region.object_generation = life_generation(&pool.objects[o].word)
        region.worker = w
        region.advice = layout.ADVICE_NORMAL
        region.is_private = pool.objects[o].is_private
        region.gate = 0
        region.breaks = 0
        region.is_plain = 0
        region.map = NO_EXTENT
        pool.maps[r] = NULL
        store32(&region.promise, kind)
        if pool.header.region_high <= r:
            store32(&pool.header.region_high, r + 1)

    def region_unpromise(self, uint32_t r):
        """A region's number will be another's."""
        store32(&self.pool.regions[r].promise, layout.PROMISE_NONE)

    def region_begin(self, uint32_t r):
        """Resolve the faults of a promised region, which nobody can touch before; returns its generation."""
        cdef uint32_t generation
        cdef pool_t *pool = self.pool
        cdef region_t *region = &pool.regions[r]
        cdef attached_t *a = &pool.attached[region.worker]
        cdef uint64_t size = region.pages << pool.page_shift
        # A wake-up changes nothing, but the kernel looks at the range.  At one that it refuses, no page could
        # ever be write-protected, and so none evicted.
        if uffd_wake(a.uffd, region.address, size) != 0:
            raise ValueError(f"no array of {size} bytes can be at {region.address:#x}")
        if region_overlaps(pool, region.worker, region.address, size):
            raise ValueError(f"another array is mapped at {region.address:#x}")
        self.region_room(r)
        generation = life_begin(&region.word)
        store32(&region.promise, layout.PROMISE_NONE)
        region_insert(pool, region.worker, r)
        return generation

    cdef region_room(self, uint32_t r):
        """This process's own records for a region, and room for it among its worker's."""
        cdef pool_t *pool = self.pool
        cdef attached_t *a = &pool.attached[pool.regions[r].worker]
        cdef uint32_t *grown
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

    def region_end(self, uint32_t r):
        """The worker has unmapped it, or is gone; returns when no thread uses it any more."""
        cdef pool_t *pool = self.pool
        cdef region_t *region = &pool.regions[r]
        region_withdraw(pool, region.worker, r)
        with nogil:
            life_end(&region.word)
            if pool.maps[r] != NULL:
                copies_end(pool, r)

    def region_advise(self, uint32_t r, uint32_t advice):
        """Set how the region's faults feed readahead: 0 normal, 1 sequential, 2 random."""
        store32(&self.pool.regions[r].advice, advice)

    # Records of pins, for the swapper that may come after this one.

    def pin_note(self, uint32_t i, uint32_t w, uint64_t number, uint32_t r, uint64_t first, uint64_t count, bint write):
        """Note a range that is about to be pinned."""
        cdef pool_t *pool = self.pool
        cdef pin_t *pin = &pool.pins[i]
        if i >= pool.header.pin_high:
            self.memory(pool.header.offset_pins + i * sizeof(pin_t), sizeof(pin_t))
        pin.worker = w
        pin.number = number
        pin.region = r
        pin.first = first
        pin.count = count
        pin.write = write
        store32(&pin.state, layout.PIN_MAKING)
        if i >= pool.header.pin_high:
            store32(&pool.header.pin_high, i + 1)

    def pin_grant(self, uint32_t i):
        """Note that a range is pinned."""
        store32(&self.pool.pins[i].state, layout.PIN_GRANTED)

    def pin_forget(self, uint32_t i):
        """Note that a range is not pinned any more."""
        store32(&self.pool.pins[i].state, layout.PIN_FREE)

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
            if rc == -ESTALE:
                raise_errno(rc, "the file that the array comes from has changed")
            if pin.want.error:
                raise_unread(pool, &pin.want)
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
        request_begin(pool, &request, r, generation, <int64_t>pool.page_bytes)
        while done < count:
            request.first = <int64_t>((first + done) << pool.page_shift)
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
        # What was asked for before comes no more.
        add32(&pool.epochs[pool.regions[r].object], 1)
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
            n += frame_set_back(pool, f, layout.OFFLINE)
        return n

    def check(self):
        """Raise AssertionError where the conservation law or the counts are broken; the pool must be idle."""
        cdef pool_t *pool = self.pool
        cdef uint32_t f
        counts = [0] * 7
        for f in range(<uint32_t>pool.header.frame_count):
            counts[frame_state(&pool.frames[f])] += 1
        kept = [pool.header.state_count[i] for i in range(7)]
        if counts != kept or sum(counts) != pool.header.frame_count:
            raise AssertionError(f"frames by state: {counts} found, {kept} counted, {pool.header.frame_count} in all")
        resident = counts[layout.PRESENT] + counts[layout.WRITEBACK]
        if resident != pool.header.resident_count:
            raise AssertionError(f"{resident} frames hold pages, {pool.header.resident_count} counted")
        self.check_mappers()
        if counts[layout.FREE] != pool.free_count:
            raise AssertionError(f"{counts[layout.FREE]} frames are free, the free list has {pool.free_count}")
        blocks = os.fstat(pool.store_fd).st_blocks * 512
        unused = counts[layout.FREE] + counts[layout.OFFLINE] + counts[layout.RETIRED]
        held = (sum(counts) - unused) * pool.page_bytes
        if blocks != held:
            raise AssertionError(f"the store holds {blocks} bytes, its frames {held}")

    cdef check_mappers(self):
        """Raise AssertionError where a frame has a mapper that would not be forgotten at its end."""
        cdef pool_t *pool = self.pool
        cdef uint64_t bits
        cdef uint32_t f, i, k
        for f in range(<uint32_t>pool.header.frame_count):
            for i in range(4):
                bits = load64(&pool.frames[f].mappers[i])
                for k in range(64 if bits else 0):
                    if bits >> k & 1 and not group_has(touched_row(pool, 64 * i + k), f // GROUP_FRAMES):
                        raise AssertionError(f"frame {f} has worker {64 * i + k} as a mapper, unknown to its group")

    cdef memory(self, uint64_t offset, uint64_t size):
        """Memory for records of the control segment before the first store: a full tmpfs would be SIGBUS."""
        raise_errno(file_allocate(self.pool.control_fd, offset, size), "pyswap: no shared memory for the tables")


cdef int raise_unread(pool_t *pool, wanted_t *want) except -1:
    """A page's slot could not be read, or held other bytes than the page's."""
    cdef char why[240]
    unread_text(why, sizeof(why), pool.header.areas[want.area].path, want.error)
    name = pool.objects[want.object].name.decode(errors="replace")
    what = (<bytes>why).decode(errors="replace")
    raise SwapIOError(want.error, f"{name}, page {want.index}: {what}: {os.strerror(want.error)}")


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
    want.spare = <uint32_t>FRAME_NONE
    want.buffer = make_buffer(pool.page_bytes)


cdef void serve_answer(pool_t *pool, uint32_t w, uint64_t data) noexcept nogil:
    """An attendant's answer; a channel that has ended is not polled again."""
    cdef uint64_t copy = 0
    cdef int32_t rc = 0
    cdef int channel = pool.attached[w].channel, n = answer_take(channel, &copy, &rc)
    if n >= 0:
        poll_rearm(pool.poll_fd, channel, data)
    elif copies_wait(pool, w):
        store32(&pool.attached[w].deaf, 1)
    life_drop(&pool.workers[w].word)
    if n == 1:
        copy_answered(pool, w, copy, rc)


cdef void beat_loop(pool_t *pool, uint32_t period_ms, uint64_t stuck_ns) noexcept nogil:
    """A heartbeat, for as long as no fault thread is at one fault for too long."""
    cdef uint64_t begun
    cdef uint32_t i
    cdef bint well
    while not load32(&pool.stop):
        well = True
        for i in range(load32(&pool.fault_threads)):
            begun = load64(&pool.fault_begun[i])
            well = well and (begun == 0 or now_ns() - begun < stuck_ns)
        if well:
            add64(&pool.header.heartbeat, 1)
        futex_wait(&pool.stop, 0, <uint64_t>period_ms * 1_000_000)


cdef void fault_loop(pool_t *pool) noexcept nogil:
    cdef uint8_t *buffer = buffer_take(pool, pool.page_bytes * cluster_pages(pool))
    cdef uint64_t data = 0, address = 0, flags = 0
    cdef uint32_t w, generation, me = add32(&pool.fault_threads, 1)
    cdef int uffd, n
    while not load32(&pool.stop):
        if poll_wait(pool.poll_fd, &data, 1000) != 1:
            continue
        w = <uint32_t>data & 0xFFFF
        generation = <uint32_t>(data >> 32)
        if not life_hold(&pool.workers[w].word, generation):
            continue
        store64(&pool.fault_begun[me], now_ns())
        if data & CHANNEL:
            serve_answer(pool, w, data)
            store64(&pool.fault_begun[me], 0)
            continue
        # One message a thread: the descriptor is polled again before this fault is resolved, so that the
        # next one never waits behind this one's I/O.
        uffd = pool.attached[w].uffd
        n = uffd_read(uffd, &address, &flags)
        poll_rearm(pool.poll_fd, uffd, data)
        life_drop(&pool.workers[w].word)
        if n == 1:
            fault_resolve(pool, w, address, flags, buffer, False)
        store64(&pool.fault_begun[me], 0)


cdef void starved_loop(pool_t *pool) noexcept nogil:
    cdef uint8_t *buffer = buffer_take(pool, pool.page_bytes * cluster_pages(pool))
    cdef starved_t fault
    cdef uint32_t sequence
    while not load32(&pool.stop):
        sequence = load32(&pool.starved_sequence)
        if starved_take(pool, &fault):
            fault_resolve(pool, fault.worker, fault.address, fault.flags, buffer, True)
        else:
            futex_wait(&pool.starved_sequence, sequence, 500_000_000)


cdef void ahead_loop(pool_t *pool) noexcept nogil:
    cdef uint8_t *buffer = buffer_take(pool, pool.page_bytes * pool.chunk_limit)
    cdef request_t request
    cdef uint32_t sequence
    while not load32(&pool.stop):
        sequence = load32(&pool.requests_sequence)
        if request_take(pool, &request):
            ahead_serve(pool, &request, buffer)
        else:
            futex_wait(&pool.requests_sequence, sequence, 500_000_000)


include "_fast_takeover.pxi"
include "_fast_worker.pxi"
