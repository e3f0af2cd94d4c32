"""Mapping pages whose frames are locked: the one asked for, resident neighbours, and for others who use it.

The order is R3's: the mapper is noted and DIRTY is set before the page becomes reachable or writable.  The frames
of neighbours are taken by trylock, since the first is held.  Whoever maps private pages holds their region, and for
writing has entered its gate (R10).
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport count, pool_t
from pyswap.core.engine cimport engine_map, engine_unprotect, engine_wake, page_unlock
from pyswap.core.family cimport page_is_shared
from pyswap.core.frame cimport (
    AHEAD,
    COLD,
    DIRTY,
    HOT,
    REFERENCED,
    frame_claim,
    frame_has,
    frame_mark,
    frame_set_dirty,
    frame_set_present,
    frame_state,
    frame_trylock,
    frame_unmark,
)
from pyswap.core.groups cimport GROUP_FRAMES, group_end, group_note, group_take, group_words, touched_row
from pyswap.core.layout cimport (
    C_READAHEAD_HITS,
    FRAME_NONE,
    MAX_WORKERS,
    PRESENT,
    REGION_NONE,
    WORKER_WORDS,
    frame_id,
    frame_t,
    object_id,
    page_id,
    region_id,
    region_t,
    worker_id,
)
from pyswap.core.lock cimport (
    FP_MAP_FOR_OTHERS,
    and64,
    cas32,
    failpoint_visit,
    load32,
    load64,
    or64,
    store32,
)
from pyswap.core.page cimport fill_install, fill_undo, wanted_t
from pyswap.core.pagetable cimport pte_frame, pte_is_frame, pte_read
from pyswap.core.region cimport PAGE_MASK, life_drop, life_generation, life_hold, region_page
from pyswap.core.store cimport store_allocate, store_punch

cdef enum:
    MAPPED_OTHERS = 8           # processes that a page is mapped for at one's fault


cdef inline void frame_used(pool_t *pool, frame_t *frame) noexcept nogil:
    frame_mark(frame, REFERENCED)
    frame_unmark(frame, COLD)
    if frame_unmark(frame, AHEAD):
        count(pool, C_READAHEAD_HITS, 1)


cdef inline bint maps_writable(pool_t *pool, frame_t *frame, bint write) noexcept nogil:
    """A dirty page may be mapped writable at once; one whose bytes are being written, or a private one, may not."""
    if write or pool.objects[frame.object].is_private:
        return write
    return frame_has(frame, DIRTY) and frame_state(frame) == PRESENT


cdef inline bint is_mapper(frame_t *frame, worker_id worker) noexcept nogil:
    return (load64(&frame.mappers[worker >> 6]) >> (worker & 63)) & 1


cdef inline void add_mapper(pool_t *pool, frame_t *frame, worker_id worker) noexcept nogil:
    or64(&frame.mappers[worker >> 6], <uint64_t>1 << (worker & 63))
    group_note(pool, touched_row(pool, worker), frame)


cdef inline void forget_mapper(frame_t *frame, worker_id worker) noexcept nogil:
    """Nothing of the frame is mapped for the worker any more."""
    # Most frames were never its: they are only read.
    if is_mapper(frame, worker):
        and64(&frame.mappers[worker >> 6], ~(<uint64_t>1 << (worker & 63)))


cdef inline void mapper_end(pool_t *pool, worker_id worker) noexcept nogil:
    """The worker's memory is gone: its number will be another's."""
    cdef uint64_t *row = touched_row(pool, worker)
    cdef uint64_t group
    cdef frame_id f
    for group in range(group_words(pool.header.frame_room) * 64):
        if group_take(row, group):
            for f in range(<frame_id>(group * GROUP_FRAMES), group_end(pool, group)):
                forget_mapper(&pool.frames[f], worker)


cdef inline int map_run(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, frame_id *frames, uint32_t n, bint write
) noexcept nogil:
    """Map locked frames of consecutive pages in one region."""
    cdef uint32_t i
    cdef int existed = 0, rc
    cdef frame_t *frame
    cdef bint writable = write
    for i in range(n):
        frame = &pool.frames[frames[i]]
        if write:
            frame_set_dirty(pool, frame)
        else:
            writable = maps_writable(pool, frame, False)
        add_mapper(pool, frame, pool.regions[r].worker)
        frame_used(pool, frame)
    rc = engine_map(pool, r, generation, index, n, writable, &existed)
    if rc == 0 and existed:
        # Somebody mapped it before, perhaps protected.
        if write:
            return engine_unprotect(pool, r, generation, index, n)
        for i in range(n):
            engine_wake(pool, r, generation, index + i)
    return rc


cdef inline uint32_t gather_zero(
    pool_t *pool, wanted_t *want, region_id r, uint32_t limit, bint write, frame_id *frames
) noexcept nogil:
    """Frames for untouched pages from want.page on, filled with zeros and locked: none that must be waited for."""
    cdef uint32_t n = 0, i
    cdef uint64_t pte
    cdef frame_id f
    while n < limit:
        pte = pte_read(pool, want.page + n)
        if pte != 0 or region_page(pool, r, <int64_t>want.index + n) != want.page + n:
            break
        if write and page_is_shared(pool, want.object, want.page + n):
            break
        f = frame_claim(pool, pool.header.minimum_frames)
        if f == FRAME_NONE:
            break
        if not fill_install(pool, f, want.page + n, want.index + n, want.object, want.object_generation, pte):
            break
        # A copy may have been made of it since; from here on the lock forbids that.
        if region_page(pool, r, <int64_t>want.index + n) != want.page + n:
            fill_undo(pool, f, False)
            break
        frames[n] = f
        n += 1
    if n and store_allocate(pool, want.page, n) != 0:
        for i in range(n):
            store_punch(pool, want.page + i, 1)
            fill_undo(pool, frames[i], True)
        return 0
    for i in range(n):
        frame_set_present(pool, &pool.frames[frames[i]])
    return n


cdef inline bint neighbour_lock(
    pool_t *pool, region_id r, int64_t index, page_id page, bint mapped, bint write, frame_id *got
) noexcept nogil:
    """Lock a resident page that the worker has mapped, or has not; a trylock, since another frame is held."""
    cdef uint64_t pte = pte_read(pool, page)
    cdef region_t *region = &pool.regions[r]
    if not pte_is_frame(pte) or (write and page_is_shared(pool, region.object, page)):
        return False
    got[0] = pte_frame(pte)
    if is_mapper(&pool.frames[got[0]], region.worker) != mapped or not frame_trylock(&pool.frames[got[0]]):
        return False
    if pte_read(pool, page) != pte or region_page(pool, r, index) != page:
        page_unlock(pool, &pool.frames[got[0]])
        return False
    return True


cdef inline bint is_mapped_there(pool_t *pool, region_id r, page_id page) noexcept nogil:
    """A look without a lock: whether the worker has mapped a page already."""
    cdef uint64_t pte = pte_read(pool, page)
    return pte_is_frame(pte) and is_mapper(&pool.frames[pte_frame(pte)], pool.regions[r].worker)


cdef inline int64_t map_resident(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, int64_t end, bint write
) noexcept nogil:
    """Map resident neighbours from index on, in runs of one protection, until one is not to be had.

    Those between them that are mapped already are passed over.  Returns the index that it came to.
    """
    cdef frame_id run[256]
    cdef uint32_t n, i
    cdef frame_id f = 0
    cdef bint writable, run_writable
    cdef int64_t first = index, begin
    cdef page_id page = region_page(pool, r, first) & PAGE_MASK
    while index < end:
        begin = index
        n = 0
        run_writable = False
        while n < 256 and index < end and neighbour_lock(
            pool, r, index, page + (index - first), False, write, &f
        ):
            writable = maps_writable(pool, &pool.frames[f], write)
            if n and writable != run_writable:
                page_unlock(pool, &pool.frames[f])
                break
            run_writable = writable
            run[n] = f
            n += 1
            index += 1
        if n:
            map_run(pool, r, generation, begin, run, n, write)
        for i in range(n):
            page_unlock(pool, &pool.frames[run[i]])
        while index < end and is_mapped_there(pool, r, page + (index - first)):
            index += 1
        if index == begin:
            break
    return index


cdef inline bint is_mapped_elsewhere(frame_t *frame, worker_id worker) noexcept nogil:
    """Whether another worker may have a locked page mapped."""
    cdef uint64_t own
    cdef uint32_t k
    for k in range(<uint32_t>WORKER_WORDS):
        own = <uint64_t>1 << (worker & 63) if k == worker >> 6 else 0
        if load64(&frame.mappers[k]) & ~own:
            return True
    return False


cdef inline bint map_for(pool_t *pool, frame_id f, object_id o, worker_id w, region_id r) noexcept nogil:
    """Map a locked page in a region of a worker other than the fault's; False where the region is another by now."""
    cdef uint64_t index = pool.frames[f].index
    cdef uint32_t generation = life_generation(&pool.regions[r].word)
    cdef bint same = False
    # Its process may keep its memory locked, as while it forks: no second thread is to wait for that.
    if not cas32(&pool.attached[w].visited, 0, 1):
        return False
    failpoint_visit(pool.header, FP_MAP_FOR_OTHERS)
    # Held before the mapper is noted: its worker's number cannot become another's.
    if life_hold(&pool.regions[r].word, generation):
        same = pool.regions[r].object == o and index < pool.regions[r].pages
        if same:
            map_run(pool, r, generation, <int64_t>index, &f, 1, False)
        life_drop(&pool.regions[r].word)
    store32(&pool.attached[w].visited, 0)
    return same


cdef inline void map_for_others(pool_t *pool, frame_id f, worker_id worker) noexcept nogil:
    """A worker has mapped a locked page that is HOT, or another's too: the rest would fault for it as well.

    That costs a wake-up more than mapping it for them does.  Who has not faulted in the array may never do so.
    """
    cdef frame_t *frame = &pool.frames[f]
    cdef object_id o = frame.object
    cdef worker_id w
    cdef region_id r
    cdef uint32_t n = 0
    if pool.objects[o].is_private or not (frame_has(frame, HOT) or is_mapped_elsewhere(frame, worker)):
        return
    for w in range(<worker_id>MAX_WORKERS):
        r = load32(&pool.mapped[o][w])
        if r != REGION_NONE and not is_mapper(frame, w) and load64(&pool.detectors[r].time):
            n += map_for(pool, f, o, w, r)
        if n == MAPPED_OTHERS:
            break
