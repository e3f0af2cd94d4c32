"""Buffers that the swapper's threads read into, cut from huge pages where the kernel gives any.

A disk is told of each physical piece of a buffer: 256 for a MiB in pages of 4 KiB, one in a huge page.  On a virtual
disk the pieces took longer than the bytes.  Whoever has a buffer has it until the process ends.
"""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset
from posix.stdlib cimport posix_memalign

from pyswap.core.context cimport pool_t
from pyswap.core.kernel cimport memory_wants_huge
from pyswap.core.lock cimport mutex_lock, mutex_unlock, panic

cdef enum:
    HUGE_BYTES = 1 << 21        # without huge pages of this size the memory is as any


cdef inline uint8_t *buffer_take(pool_t *pool, uint64_t size) noexcept nogil:
    """A thread's own buffer of so many pages' bytes; a swapper without memory for it cannot go on."""
    cdef void *fresh = NULL
    cdef uint8_t *buffer
    cdef uint64_t bytes = (size + HUGE_BYTES - 1) // HUGE_BYTES * HUGE_BYTES
    mutex_lock(&pool.buffers_lock)
    if size > pool.buffers_bytes:
        if posix_memalign(&fresh, HUGE_BYTES, bytes) != 0:
            panic("buffer_take: no memory", size, 0, 0)
        memory_wants_huge(fresh, bytes)
        # Touched now, so that no thread finds later that there is no memory for what it holds.
        pool.buffers = <uint8_t *>memset(fresh, 0, bytes)
        pool.buffers_bytes = bytes
    buffer = pool.buffers
    pool.buffers += size
    pool.buffers_bytes -= size
    mutex_unlock(&pool.buffers_lock)
    return buffer
