"""What is mapped with the page of a fault, and which protection is lifted: what its stream will come to next.

The frames of neighbours are taken by trylock, since that page's is held; what is not to be had is left out.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.backing cimport has_file
from pyswap.core.context cimport pool_t
from pyswap.core.engine cimport engine_unprotect, page_unlock
from pyswap.core.frame cimport DIRTY, LOCKED, frame_has, frame_set_dirty
from pyswap.core.layout cimport MAX_AROUND_PAGES, frame_id, page_id, region_id, region_t
from pyswap.core.lock cimport FP_MAP_ONWARD, failpoint_visit, load64
from pyswap.core.mapping cimport frame_used, gather_zero, map_resident, map_run, neighbour_lock
from pyswap.core.page cimport wanted_t
from pyswap.core.pagetable cimport PTE_EMPTY, pte_frame, pte_is_frame, pte_read
from pyswap.core.readahead cimport around_limit, row_end, way_t, zeros_ahead
from pyswap.core.region cimport PAGE_MASK, life_drop, life_generation, life_hold, region_page

cdef enum:
    MAPPED_ROWS = 64            # ahead of a stream that leaves pages out
    MADE_ROWS = 16              # of those, in which pages of zeros are made, or may be written at once
    NEAR_PAGES = 32             # of a stream are mapped before its thread goes on: waking it takes as long as the rest


cdef inline bint is_untouched(pool_t *pool, wanted_t *want, region_id r, int64_t index) noexcept nogil:
    """Whether the page at an index is one of zeros that nobody has touched."""
    return pte_read(pool, region_page(pool, r, index) & PAGE_MASK) == PTE_EMPTY and not has_file(pool, want.object)


cdef inline void map_zeros(
    pool_t *pool, wanted_t *want, region_id r, uint32_t generation, int64_t index, uint32_t limit, bint write
) noexcept nogil:
    """Map untouched neighbours of what is wanted, from an index on, filled with zeros."""
    cdef frame_id zeroed[256]
    cdef uint32_t n, i
    cdef wanted_t near = want[0]
    if not is_untouched(pool, want, r, index):
        return
    near.page = region_page(pool, r, index) & PAGE_MASK
    near.index = <uint64_t>index
    n = gather_zero(pool, &near, r, min(limit, <uint32_t>MAX_AROUND_PAGES), write, zeroed)
    if n:
        map_run(pool, r, generation, index, zeroed, n, write)
    for i in range(n):
        page_unlock(pool, &pool.frames[zeroed[i]])


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
    """The index of the next row's first page; -1 outside the array."""
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
            index = map_resident(pool, r, generation, index, end, write and n < MADE_ROWS)
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


cdef inline uint32_t unprotect_run(
    pool_t *pool, region_id r, region_t *region, int64_t index, int64_t stride, uint32_t limit
) noexcept nogil:
    """Lift the protection of neighbours from an index on, until one has none; returns of how many."""
    cdef frame_id run[256]
    cdef uint32_t n = 0, i
    cdef int64_t next = index
    while n < min(limit, <uint32_t>MAX_AROUND_PAGES) and 0 <= next < <int64_t>region.pages:
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
