"""Mapping pages whose frames are locked: the one asked for, and what is worth mapping with it.

The order is R3's: the mapper is noted and DIRTY is set before the page becomes reachable or writable.  The frames
of neighbours are taken by trylock, since the first is held.  Whoever maps private pages holds their region, and for
writing has entered its gate (R10).
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.backing cimport has_file
from pyswap.core.context cimport count, pool_t
from pyswap.core.engine cimport engine_map, engine_unprotect, engine_wake, page_unlock
from pyswap.core.family cimport page_is_shared
from pyswap.core.frame cimport (
    AHEAD,
    COLD,
    DIRTY,
    HOT,
    LOCKED,
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
    FP_MAP_ONWARD,
    and64,
    cas32,
    failpoint_visit,
    load32,
    load64,
    or64,
    store32,
)
from pyswap.core.page cimport fill_install, fill_undo, wanted_t
from pyswap.core.pagetable cimport PTE_EMPTY, pte_frame, pte_is_frame, pte_read
from pyswap.core.readahead cimport around_limit, row_end, way_t, zeros_ahead
from pyswap.core.region cimport PAGE_MASK, life_drop, life_generation, life_hold, region_page
from pyswap.core.store cimport store_allocate, store_punch

cdef enum:
    MAPPED_ROWS = 64            # ahead of a stream that leaves pages out
    MADE_ROWS = 16              # of those, in which pages are made for a stream that writes, or may be written at once
    MAPPED_OTHERS = 8           # processes that a page is mapped for at one's fault
    NEAR_PAGES = 32             # of a stream are mapped before its thread goes on: waking it takes as long as the rest


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


cdef inline bint is_untouched(pool_t *pool, wanted_t *want, region_id r, int64_t index) noexcept nogil:
    """Whether the page at an index is one of zeros that nobody has touched."""
    return pte_read(pool, region_page(pool, r, index) & PAGE_MASK) == PTE_EMPTY and not has_file(pool, want.object)


cdef inline uint32_t map_zeros(
    pool_t *pool, wanted_t *want, region_id r, uint32_t generation, int64_t index, uint32_t limit, bint write
) noexcept nogil:
    """Map untouched neighbours of what is wanted, from an index on, filled with zeros; returns how many."""
    cdef frame_id zeroed[256]
    cdef uint32_t n, i
    cdef wanted_t near = want[0]
    if not is_untouched(pool, want, r, index):
        return 0
    near.page = region_page(pool, r, index) & PAGE_MASK
    near.index = <uint64_t>index
    n = gather_zero(pool, &near, r, limit, write, zeroed)
    if n:
        map_run(pool, r, generation, index, zeroed, n, write)
    for i in range(n):
        page_unlock(pool, &pool.frames[zeroed[i]])
    return n


cdef inline uint32_t untouched_before(pool_t *pool, region_id r, int64_t index, uint32_t limit) noexcept nogil:
    """How many pages right before an index nobody has touched yet."""
    cdef uint32_t n = 0
    while n < limit and <int64_t>n < index and pte_read(pool, region_page(pool, r, index - 1 - n) & PAGE_MASK) == 0:
        n += 1
    return n


cdef inline uint32_t resident_before(pool_t *pool, region_id r, int64_t index, uint32_t limit) noexcept nogil:
    """How many pages right before an index are in memory, and not locked, under page ids that follow each other."""
    cdef uint32_t n = 0
    cdef page_id last = region_page(pool, r, index - 1) & PAGE_MASK if index else 0
    cdef uint64_t pte
    while n < limit and <int64_t>n < index and region_page(pool, r, index - 1 - n) & PAGE_MASK == last - n:
        pte = pte_read(pool, last - n)
        if not pte_is_frame(pte) or frame_has(&pool.frames[pte_frame(pte)], LOCKED):
            break
        n += 1
    return n


cdef inline int64_t next_row(pool_t *pool, region_t *region, way_t *way, int64_t *row) noexcept nogil:
    """The index of the next row's first page; -1 behind the array's end."""
    cdef int64_t index
    row[0] += way.gap
    index = row[0] >> pool.page_shift
    return index if 0 <= index < <int64_t>region.pages else -1


cdef inline void map_rows(
    pool_t *pool, wanted_t *want, region_id r, region_t *region, int64_t index, way_t *way, bint write
) noexcept nogil:
    """Map what readahead has brought for a stream that leaves pages out: a call for each row, but no fault.

    The first row is the fault's own, from behind its page.  A stream of first touches finds pages of zeros in the
    next few rows, too.
    """
    cdef uint32_t generation = life_generation(&region.word), n
    cdef bint makes = want.filled and not want.read
    cdef int64_t row = way.row, end
    index += 1
    for n in range(<uint32_t>MAPPED_ROWS):
        end = row_end(pool, row, way.width, <int64_t>region.pages)
        if index < end:
            index = map_resident(pool, r, generation, index, end, write)
        if index < end and makes and n < MADE_ROWS:
            map_zeros(pool, want, r, generation, index, <uint32_t>(end - index), write)
        index = next_row(pool, region, way, &row)
        if index < 0:
            return


cdef inline bint has_company(pool_t *pool) noexcept nogil:
    """Whether faults are served beside this one: processors may be short, and who goes on overtakes who maps."""
    cdef uint32_t i, n = 0
    for i in range(pool.fault_threads):
        n += load64(&pool.fault_begun[i]) != 0
    return n > 1


cdef inline int64_t map_around(
    pool_t *pool, wanted_t *want, region_id r, region_t *region, int64_t index, int64_t stride, bint write
) noexcept nogil:
    """Map more than was asked for: what is resident, and zeroed neighbours for a stream of first touches.

    Returns the index from which map_onward() goes on when the fault's thread is awake, or 0.
    """
    cdef uint32_t generation = life_generation(&region.word)
    cdef uint32_t limit = around_limit(pool, r, stride), n = 0
    cdef int64_t first = index + 1
    if stride < 0:
        # Copies go down from the end, too, where that suits their addresses.
        n = untouched_before(pool, r, index, limit)
        limit = n if n else resident_before(pool, r, index, limit)
        first = index - limit
    if first + limit > <int64_t>region.pages:
        limit = <uint32_t>(<int64_t>region.pages - first)
    if limit == 0:
        return 0
    if stride == 1 and not has_file(pool, want.object):
        # As many as the next fault is to map: its own page, and its neighbours.
        zeros_ahead(pool, r, generation, first + limit, limit + 1)
    # Only a stream that writes is taken to write its neighbours too.
    write = write and (stride == 1 or n != 0)
    if (stride == 1 or n) and is_untouched(pool, want, r, first):
        map_zeros(pool, want, r, generation, first, limit, write)
        return 0
    if stride != 1 or limit <= NEAR_PAGES or has_company(pool):
        map_resident(pool, r, generation, first, first + limit, write)
        return 0
    if map_resident(pool, r, generation, first, first + NEAR_PAGES, write) < first + NEAR_PAGES:
        return 0
    return first + NEAR_PAGES


cdef inline void map_onward(
    pool_t *pool, region_id r, region_t *region, int64_t index, int64_t begin, bint write
) noexcept nogil:
    """Map the rest of what is resident behind a stream's fault at an index, while its thread is on the way there.

    It may come before: then it waits for a frame's lock, as at any page that is about to be mapped, and faults again.
    Or it may have ended the region, and another may be there: so this holds it.
    """
    cdef int64_t end = min(index + 1 + <int64_t>pool.header.around_pages, <int64_t>region.pages)
    cdef uint32_t generation = life_generation(&region.word)
    failpoint_visit(pool.header, FP_MAP_ONWARD)
    if not life_hold(&pool.regions[r].word, generation):
        return
    map_resident(pool, r, generation, begin, end, write)
    life_drop(&pool.regions[r].word)


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


cdef inline uint32_t unprotect_run(
    pool_t *pool, region_id r, region_t *region, int64_t index, int64_t stride, uint32_t limit
) noexcept nogil:
    """Lift the protection of neighbours from an index on, until one has none; returns of how many."""
    cdef frame_id run[256]
    cdef uint32_t n = 0, i
    cdef int64_t next = index
    while n < limit and 0 <= next < <int64_t>region.pages:
        if not neighbour_lock(pool, r, next, region_page(pool, r, next) & PAGE_MASK, True, True, &run[n]):
            break
        if frame_has(&pool.frames[run[n]], DIRTY) and not region.is_private:
            page_unlock(pool, &pool.frames[run[n]])
            break
        frame_set_dirty(pool, &pool.frames[run[n]])
        frame_used(pool, &pool.frames[run[n]])
        n += 1
        next += stride
    if n:
        engine_unprotect(pool, r, life_generation(&region.word), index if stride == 1 else next + 1, n)
    for i in range(n):
        page_unlock(pool, &pool.frames[run[i]])
    return n


cdef inline void unprotect_around(
    pool_t *pool, region_id r, region_t *region, int64_t index, way_t *way
) noexcept nogil:
    """A stream writes pages that it read before: lift the protection of a few more at once."""
    cdef uint32_t n, _
    cdef int64_t row = way.row, end
    if way.direction:
        unprotect_run(pool, r, region, index + way.direction, way.direction, pool.header.around_pages)
    if way.gap == 0:
        return
    index += 1
    for _ in range(<uint32_t>MADE_ROWS):
        end = row_end(pool, row, way.width, <int64_t>region.pages)
        while index < end:
            n = unprotect_run(pool, r, region, index, 1, <uint32_t>(end - index))
            index += max(n, <uint32_t>1)
        index = next_row(pool, region, way, &row)
        if index < 0:
            return
