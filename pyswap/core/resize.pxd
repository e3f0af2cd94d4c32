"""The life of a resize: frames retire, or come back, or are new at the table's end.

Who may interleave, and what stops it: a frame is retired by who has claimed it, and a free one belongs to who claims
it.  The table grows before anybody is told of the frames beyond its old end.
"""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.context cimport pool_t
from pyswap.core.engine cimport engine_wake_waiters
from pyswap.core.frame cimport (
    frame_claim_wait,
    frame_push_free,
    frame_set_back,
    frame_set_retired,
    frames_announce,
    reclaim_kick,
    waiters_t,
)
from pyswap.core.kernel cimport file_allocate
from pyswap.core.layout cimport FRAME_NONE, FREE, RETIRED, frame_id, frame_t
from pyswap.core.lock cimport addi64, loadi64, store64


cdef inline bint frame_retire(pool_t *pool, uint64_t deadline_ns) noexcept nogil:
    """Take a frame out of use, once reclaim has freed one; False at the deadline."""
    cdef frame_id f = frame_claim_wait(pool, deadline_ns)
    cdef waiters_t waiters
    if f == FRAME_NONE:
        return False
    frame_set_retired(pool, f, &waiters)
    engine_wake_waiters(pool, &waiters)
    return True


cdef inline int frames_add(pool_t *pool, uint64_t wanted) noexcept nogil:
    """So many frames more, retired ones first; the caller has seen that the table has room.  -errno: none."""
    cdef uint64_t before = pool.header.frame_count, f, left = wanted, new
    cdef uint64_t retired = <uint64_t>loadi64(&pool.header.state_count[RETIRED])
    cdef int rc
    new = wanted - retired if wanted > retired else 0
    if new:
        rc = file_allocate(
            pool.control_fd, pool.header.offset_frames + before * sizeof(frame_t), new * sizeof(frame_t)
        )
        if rc != 0:
            return rc
    for f in range(before):
        if left == 0:
            break
        left -= frame_set_back(pool, <frame_id>f, RETIRED)
    # A record of zeros is a free frame.
    store64(&pool.header.frame_count, before + new)
    addi64(&pool.header.state_count[FREE], new)
    for f in range(before, before + new):
        frame_push_free(pool, <frame_id>f)
    frames_announce(pool)
    reclaim_kick(pool)
    return 0
