"""What keeps an object beside its regions: pickles on their way, and its name.

A request that changes it comes again where the swapper died before it answered, and must not count twice.  So the
change is written down first, with the request that asks for it: who dies in it leaves the next swapper to do it
again, which sets numbers and adds nothing; and the worker's record says which request it was.
"""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.context cimport pool_t
from pyswap.core.layout cimport hold_t, object_id, worker_id
from pyswap.core.lock cimport FP_HOLD_NOTED, failpoint_visit, load32, store32, store64


cdef inline void hold_finish(pool_t *pool) noexcept nogil:
    """Do what is written down, if anything is."""
    cdef hold_t *hold = &pool.header.hold
    if not load32(&hold.noted):
        return
    store32(&pool.objects[hold.object].transits, hold.transits)
    store32(&pool.objects[hold.object].is_kept, hold.is_kept)
    if hold.request:
        store64(&pool.workers[hold.worker].served, hold.request)
    store32(&hold.noted, 0)


cdef inline void hold_change(
    pool_t *pool, object_id o, uint32_t transits, bint is_kept, worker_id w, uint64_t request
) noexcept nogil:
    """By the main thread: so many pickles keep an object, and its name does or not; `request` 0: nobody asked."""
    cdef hold_t *hold = &pool.header.hold
    hold.object = o
    hold.transits = transits
    hold.is_kept = is_kept
    hold.worker = w
    hold.request = request
    store32(&hold.noted, 1)
    failpoint_visit(pool.header, FP_HOLD_NOTED)
    hold_finish(pool)
