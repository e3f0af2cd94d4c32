"""Faults that found no free frame, or too few: they wait without the thread that took them.

A ring of them for the patient threads, so that the others go on with faults that can be served.
"""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.context cimport STARVED_FAULTS, count, pool_t, starved_t
from pyswap.core.layout cimport C_FRAME_WAITS
from pyswap.core.lock cimport add32, futex_wait, futex_wake, load32, mutex_lock, mutex_unlock, now_ns


cdef inline bint starved_put(pool_t *pool, starved_t *fault) noexcept nogil:
    """Hand a fault that needs a frame to the patient threads, so that this one can go on; False: no room."""
    cdef bint room
    mutex_lock(&pool.starved_lock)
    room = pool.starved_tail - pool.starved_head < STARVED_FAULTS
    if room:
        pool.starved[pool.starved_tail % STARVED_FAULTS] = fault[0]
        pool.starved_tail += 1
    mutex_unlock(&pool.starved_lock)
    if room:
        count(pool, C_FRAME_WAITS, 1)
        add32(&pool.starved_sequence, 1)
        futex_wake(&pool.starved_sequence, 1)
    return room


cdef inline bint starved_take(pool_t *pool, starved_t *fault) noexcept nogil:
    cdef bint any
    mutex_lock(&pool.starved_lock)
    any = pool.starved_tail != pool.starved_head
    if any:
        fault[0] = pool.starved[pool.starved_head % STARVED_FAULTS]
        pool.starved_head += 1
    mutex_unlock(&pool.starved_lock)
    return any


cdef inline void frames_await(pool_t *pool, uint32_t enough, uint64_t most_ns) noexcept nogil:
    """Wait until more than so many frames are free, or for so long; the caller holds nothing (R4)."""
    cdef uint64_t end = now_ns() + most_ns, now = 0
    cdef uint32_t sequence = load32(&pool.header.free_sequence)
    while load32(&pool.free_count) <= enough and not load32(&pool.stop):
        now = now_ns()
        if now >= end:
            return
        futex_wait(&pool.header.free_sequence, sequence, end - now)
        sequence = load32(&pool.header.free_sequence)
