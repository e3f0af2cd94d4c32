"""The life of a swapoff: an area's pages leave it, one by one, and go where the others have room.

A page in a slot is filled; one that is resident and keeps a slot gives it up.  Both are dirty then, and reclaim
writes them to another area when it must.  The page ids stay, and with them all sharing.

Who may interleave, and what stops it:
 - a new slot in the area: none is reserved while it drains
 - one that was reserved before, and is being written: it becomes a page's, and is met in the next round
 - the end of the page's object: then the slot is freed by the sweep
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport pool_t
from pyswap.core.engine cimport page_unlock
from pyswap.core.frame cimport frame_set_dirty
from pyswap.core.layout cimport (
    AREA_SHIFT,
    SLOT_CHUNK,
    SLOT_NONE,
    area_t,
    frame_id,
    frame_t,
    page_id,
)
from pyswap.core.lock cimport FP_DRAIN_PAGE, failpoint_visit, load64
from pyswap.core.page cimport ACQUIRED, page_acquire, wanted_t
from pyswap.core.swapmap cimport SLOT_USED, slot_area, slot_free, slot_is, slot_page


cdef inline bint area_next_used(pool_t *pool, uint32_t k, uint64_t *at, page_id *page) noexcept nogil:
    """The next slot of an area that a page has, from at on, which moves past it; False at the area's end."""
    cdef uint64_t base = <uint64_t>k << AREA_SHIFT, word
    while at[0] < pool.header.areas[k].slots:
        if at[0] % SLOT_CHUNK == 0 and pool.chunk_used[(base + at[0]) // SLOT_CHUNK] == 0:
            at[0] += SLOT_CHUNK
            continue
        word = load64(&pool.slots[base + at[0]].word)
        at[0] += 1
        if slot_is(word) == SLOT_USED:
            page[0] = slot_page(word)
            return True
    return False


cdef inline int page_leave_area(pool_t *pool, wanted_t *want, uint32_t k) noexcept nogil:
    """Have a page give up its slot in an area; want sleeps.  -errno where it could not be read, or found no frame."""
    cdef frame_id f = 0
    cdef frame_t *frame
    cdef int rc
    failpoint_visit(pool.header, FP_DRAIN_PAGE)
    rc = page_acquire(pool, want, &f)
    if rc != ACQUIRED:
        # The page has ended, and its slot with it.
        return rc if rc < 0 else 0
    frame = &pool.frames[f]
    if frame.slot != SLOT_NONE and slot_area(frame.slot) == k:
        frame_set_dirty(pool, frame)
        slot_free(pool, frame.slot)
        frame.slot = SLOT_NONE
    page_unlock(pool, frame)
    return 0
