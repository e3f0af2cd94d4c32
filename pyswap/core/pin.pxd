"""Pins: faults that stay, made by who asks for them and waits.

A private page is the region's own first (R11); the copy that it needs comes from the attendant, as for any fault.
"""
from libc.stdint cimport uint32_t

from pyswap.core.context cimport pool_t
from pyswap.core.engine cimport page_unlock
from pyswap.core.fault cimport AGAIN, DONE, NO_FRAME, fault_t, outcome, private_map
from pyswap.core.frame cimport frame_claim_wait, frame_pin, frame_unpin
from pyswap.core.layout cimport frame_id, frame_t
from pyswap.core.lock cimport futex_wait, load32, now_ns
from pyswap.core.mapping cimport map_run
from pyswap.core.page cimport ACQUIRED, STALE, page_acquire, spare_give_back, wanted_t
from pyswap.core.region cimport COPYING, region_lookup

cdef extern from *:
    int EAGAIN
    int ENOMEM
    int ESRCH


cdef inline int shared_pin(pool_t *pool, fault_t *fault, frame_id f) noexcept nogil:
    cdef frame_t *frame = &pool.frames[f]
    cdef int rc
    frame_pin(pool, frame, fault.write)
    rc = map_run(pool, fault.r, fault.generation, fault.index, &f, 1, fault.write)
    if rc != 0:
        frame_unpin(pool, frame, fault.write)
    return rc


cdef inline int pin_until_done(pool_t *pool, fault_t *fault) noexcept nogil:
    """Try until the page is pinned, or the deadline; a copy that it needs first comes from the attendant."""
    cdef frame_id f = 0
    cdef outcome result = AGAIN
    cdef uint32_t sequence
    cdef int rc = 0
    while result != DONE:
        sequence = load32(&pool.copied_sequence)
        if not region_lookup(pool, fault.r, fault.generation, fault.index, &fault.want.page):
            return -ESRCH
        rc = STALE if fault.want.page & COPYING else page_acquire(pool, &fault.want, &f)
        if rc < 0:
            return rc
        if rc == ACQUIRED:
            if fault.region.is_private:
                result = private_map(pool, fault, f, True, &rc)
            else:
                rc = shared_pin(pool, fault, f)
                result = DONE
            page_unlock(pool, &pool.frames[f])
        if rc < 0 and rc != -EAGAIN:
            return rc
        if result != DONE:
            spare_give_back(pool, &fault.want)
        if result == NO_FRAME:
            fault.want.spare = frame_claim_wait(pool, fault.want.deadline_ns)
        elif result != DONE:
            futex_wait(&pool.copied_sequence, sequence, 1_000_000)
        if result != DONE and now_ns() > fault.want.deadline_ns:
            return -ENOMEM
    return rc


cdef inline int page_pin(pool_t *pool, fault_t *fault) noexcept nogil:
    """Make a page resident, mapped and pinned; a private one is this region's own first (R11).

    fault has the region, index, write and want, which sleeps.  -errno with nothing pinned.
    """
    cdef int rc
    fault.way.direction = 0
    fault.way.gap = 0
    rc = pin_until_done(pool, fault)
    spare_give_back(pool, &fault.want)
    return rc


cdef inline int page_unpin(pool_t *pool, wanted_t *want, bint write) noexcept nogil:
    """A pinned page is resident, so this waits for its lock at most."""
    cdef frame_id f = 0
    cdef int rc = page_acquire(pool, want, &f)
    if rc != 0:
        return rc
    frame_unpin(pool, &pool.frames[f], write)
    page_unlock(pool, &pool.frames[f])
    return 0
