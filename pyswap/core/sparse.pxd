"""Ranges of a sparse object: given pages when memory is allocated in it, taken back when it is freed, or moved.

A sparse object is private and has a map and a family from its beginning, holes and no references at first.  Its
pages are committed by the range, and go from memory and swap as soon as a range ends; at the next beginning they
are EMPTY, and so zero.

    range_begin     holes become pages: those that they name, which are mapped there
    range_end       pages become holes: the last reference's page is swept, others go on being somebody else's
    range_move      pages and holes change places: page ids, and with them frames and slots, under other indexes

Who may interleave, and what stops it:
 - a write that is being decided about: the gate is shut meanwhile (R10)
 - a fault that was told of before the range ended: it finds a hole, or R7 undoes what it filled
 - a copy that an attendant is about to map: -EAGAIN, or -EXDEV, with nothing changed
 - a page that is being read or written out: it stays unswept until the family is swept, and does not begin before

A move takes three steps, since an address maps a page id: the process takes the old and the new addresses out of use,
so that an ioctl on them meets nothing (R2); the map changes; the process maps them anew as the map says.  Only what
is this region's alone moves, so no other map names it, and only pages of the object's own extent, so that there is a
page id at every index for copies yet: each index lends one of its page ids at most, and lacks the one where all of its
sharers have pages of their own, and none needs another.  Who may interleave with the second step:
 - who has locked the page before, and acts on the map as it was: the range is used again when each has had its turn
   (-EAGAIN before), and nothing is mapped at the addresses until then
 - a fill that was begun for the old index: it asks where the page is once its frame is in the page table, and the
   move, which says that first, looks at the page table after
 - a death: the page is in the map twice before it is there once, and the order is given again
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport mappings_short, pool_t
from pyswap.core.copy cimport map_put
from pyswap.core.engine cimport page_unlock
from pyswap.core.evict cimport pages_sweep
from pyswap.core.family cimport (
    commit_take,
    family_look_again,
    is_own_page,
    page_drop,
    page_put,
    places_begin,
)
from pyswap.core.frame cimport frame_trylock
from pyswap.core.layout cimport (
    MAX_BATCH_PAGES,
    family_t,
    frame_t,
    object_id,
    page_id,
    region_id,
    region_t,
)
from pyswap.core.lock cimport (
    FP_MOVE_PLACED,
    FP_REFERENCES_BEGUN,
    failpoint_visit,
    load32,
    mutex_lock,
    mutex_unlock,
    store32,
    store64,
)
from pyswap.core.mapping cimport forget_mapper
from pyswap.core.page cimport page_is_pinned
from pyswap.core.pagetable cimport PTE_EMPTY, pte_frame, pte_is_frame, pte_read
from pyswap.core.region cimport COPYING, HOLE, PAGE_MASK, gate_open, gate_shut, is_hole, region_page

cdef extern from *:
    int EAGAIN
    int EEXIST
    int EINVAL
    int ENOMEM
    int ENOSPC
    int EXDEV


cdef inline int range_free(pool_t *pool, region_id r, int64_t first, uint64_t n) noexcept nogil:
    """Whether a range may begin: 0, or -errno as range_begin(); under the family's lock."""
    cdef uint64_t entry, i
    cdef int rc = 0
    for i in range(n):
        entry = region_page(pool, r, first + <int64_t>i)
        # A sharer's copy may have taken the page id of a hole.
        if not is_hole(entry) or load32(&pool.references[entry & PAGE_MASK]):
            return -EEXIST
        if pte_read(pool, entry & PAGE_MASK) != PTE_EMPTY:
            rc = -EAGAIN
    return rc


cdef inline int range_begin(pool_t *pool, region_id r, int64_t first, uint64_t n) noexcept nogil:
    """Give a range of holes pages of zeros, all or none.

    -ENOSPC: frames and swap hold no more.  -EAGAIN: what ended there is not swept yet.  -EEXIST: not holes, or a
    sharer has the page ids.
    """
    cdef object_id o = pool.regions[r].object
    cdef family_t *family = &pool.families[o]
    cdef page_id page
    cdef uint64_t i
    cdef int rc
    mutex_lock(&family.lock)
    rc = range_free(pool, r, first, n)
    if rc == 0 and not commit_take(pool, n):
        rc = -ENOSPC
    if rc == 0:
        for i in range(n):
            page = region_page(pool, r, first + <int64_t>i) & PAGE_MASK
            page_put(pool, o, page, <uint64_t>first + i)
            store32(&pool.references[page], 1)
            store64(&pool.maps[r][first + <int64_t>i], page)
        # The object's own extent is the first.
        family.live[0] += <int64_t>n
    mutex_unlock(&family.lock)
    failpoint_visit(pool.header, FP_REFERENCES_BEGUN)
    return rc


cdef inline bint range_copying(pool_t *pool, region_id r, int64_t first, uint64_t n) noexcept nogil:
    """Whether an attendant is about to map a page of a range; with the gate shut no other will."""
    cdef uint64_t entry, i
    for i in range(n):
        entry = region_page(pool, r, first + <int64_t>i)
        if entry & COPYING and not is_hole(entry):
            return True
    return False


cdef inline void run_sweep(pool_t *pool, object_id o, page_id first, uint32_t n) noexcept nogil:
    if n and pages_sweep(pool, o, first, n):
        family_look_again(pool, o)


cdef inline bint range_drop(pool_t *pool, region_id r, int64_t first, uint32_t n) noexcept nogil:
    """Make a batch holes, with the gate shut; whether all that was there was this region's alone, and mapped yet."""
    cdef object_id o = pool.regions[r].object
    cdef uint64_t entry
    cdef page_id run = 0
    cdef uint32_t i, length = 0
    cdef bint own = True, begun_here
    for i in range(n):
        entry = region_page(pool, r, first + i)
        if is_hole(entry):
            continue
        begun_here = is_own_page(pool, o, entry)
        map_put(pool, r, first + i, (entry if begun_here else pool.regions[r].base + <uint64_t>first + i) | HOLE)
        if not page_drop(pool, o, entry):
            own = False
            continue
        own = own and begun_here
        if entry != run + length:
            run_sweep(pool, o, run, length)
            run = entry
            length = 0
        length += 1
    run_sweep(pool, o, run, length)
    return own


cdef inline int range_end(pool_t *pool, region_id r, int64_t first, uint64_t n) noexcept nogil:
    """Make a range holes.  1: it may begin again.  0: not by this region, which maps other pages there.  -EAGAIN."""
    cdef region_t *region = &pool.regions[r]
    cdef uint64_t at = 0
    cdef uint32_t batch
    cdef bint own = True
    gate_shut(region)
    if range_copying(pool, r, first, n):
        gate_open(region)
        return -EAGAIN
    while at < n:
        batch = <uint32_t>(n - at if n - at < MAX_BATCH_PAGES else MAX_BATCH_PAGES)
        own = range_drop(pool, r, first + <int64_t>at, batch) and own
        at += batch
    gate_open(region)
    return own


# A move.

cdef inline int page_may_move(pool_t *pool, region_id r, uint64_t page, uint64_t hole) noexcept nogil:
    """Whether a page and a hole may change places, or have; with the gate shut."""
    if is_hole(page):
        return -EINVAL if is_hole(hole) else 0
    if page == hole:
        return 0
    if not is_hole(hole):
        return -EINVAL
    if page & COPYING or not is_own_page(pool, pool.regions[r].object, page):
        return -EXDEV
    if load32(&pool.references[page]) != 1 or page_is_pinned(pool, page):
        return -EXDEV
    return 0


cdef inline void page_move(pool_t *pool, region_id r, int64_t index, int64_t to) noexcept nogil:
    cdef object_id o = pool.regions[r].object
    cdef uint64_t page = region_page(pool, r, index), hole = region_page(pool, r, to)
    if is_hole(page):
        return
    page_put(pool, o, page, <uint64_t>to)
    if page == hole:
        # A takeover found it in both places, and counted both.  What page id was a hole's nobody knows any more.
        page_drop(pool, o, page)
    else:
        map_put(pool, r, to, page)
    map_put(pool, r, index, (hole & PAGE_MASK) | HOLE)


cdef inline bint page_settled(pool_t *pool, region_id r, page_id page, int64_t index) noexcept nogil:
    """Whether nobody acts on where a page was: its frame, if it has one, could be locked, and knows where it is.

    It is mapped nowhere now, and says so, so that it is mapped with its neighbours again.
    """
    cdef uint64_t pte = pte_read(pool, page)
    cdef frame_t *frame
    while pte_is_frame(pte):
        frame = &pool.frames[pte_frame(pte)]
        if frame_trylock(frame):
            if pte_read(pool, page) == pte:
                frame.index = <uint64_t>index
                forget_mapper(frame, pool.regions[r].worker)
                page_unlock(pool, frame)
                return True
            page_unlock(pool, frame)
        elif pte_read(pool, page) == pte:
            return False
        pte = pte_read(pool, page)
    return True


cdef inline int range_move(pool_t *pool, region_id r, int64_t first, uint64_t n, int64_t to) noexcept nogil:
    """Have the pages of a range and the holes of another change places, all or none; nothing is mapped at either.

    -EXDEV: some are another's too, or pinned, or being copied, or the process is short of mappings.  -EINVAL: not
    pages, or not holes.  -EAGAIN: it is done, but somebody has yet to finish with a page; the order is repeated.
    """
    cdef region_t *region = &pool.regions[r]
    cdef uint64_t i
    cdef int rc = 0 if places_begin(pool, region.object) else -ENOMEM
    if mappings_short(pool, region.worker):
        rc = -EXDEV
    gate_shut(region)
    for i in range(n):
        if rc != 0:
            break
        rc = page_may_move(
            pool, r, region_page(pool, r, first + <int64_t>i), region_page(pool, r, to + <int64_t>i)
        )
    if rc == 0:
        for i in range(n):
            page_move(pool, r, first + <int64_t>i, to + <int64_t>i)
    gate_open(region)
    if rc != 0:
        return rc
    failpoint_visit(pool.header, FP_MOVE_PLACED)
    for i in range(n):
        if not page_settled(pool, r, region_page(pool, r, to + <int64_t>i) & PAGE_MASK, to + <int64_t>i):
            rc = -EAGAIN
    return rc
