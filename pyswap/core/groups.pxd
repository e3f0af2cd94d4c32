"""Groups of 64 neighbouring frames, and which of them are worth a look: the frame table is large.

A row has a bit for each group.  It is a superset: a bit is set after what it tells of, and cleared by who then looks
at the whole group, and sets it again where there is still something.
"""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.context cimport pool_t
from pyswap.core.layout cimport frame_id, frame_t, worker_id
from pyswap.core.lock cimport and64, load64, or64

cdef enum:
    GROUP_FRAMES = 64


cdef inline uint64_t group_words(uint64_t frames) noexcept nogil:
    """Words of a row for so many frames."""
    return (frames + 64 * GROUP_FRAMES - 1) // (64 * GROUP_FRAMES)


cdef inline uint64_t *touched_row(pool_t *pool, worker_id worker) noexcept nogil:
    """The groups with frames that may have the worker as a mapper."""
    return &pool.touched[worker * group_words(pool.header.frame_room)]


cdef inline bint group_has(uint64_t *row, uint64_t group) noexcept nogil:
    return (load64(&row[group >> 6]) >> (group & 63)) & 1


cdef inline void group_note(pool_t *pool, uint64_t *row, frame_t *frame) noexcept nogil:
    cdef uint64_t group = <uint64_t>(frame - pool.frames) // GROUP_FRAMES
    if not group_has(row, group):
        or64(&row[group >> 6], <uint64_t>1 << (group & 63))


cdef inline bint group_take(uint64_t *row, uint64_t group) noexcept nogil:
    """Clear a group's bit; False if it was not set."""
    if not group_has(row, group):
        return False
    and64(&row[group >> 6], ~(<uint64_t>1 << (group & 63)))
    return True


cdef inline frame_id group_end(pool_t *pool, uint64_t group) noexcept nogil:
    """The first frame after a group's."""
    cdef uint64_t end = (group + 1) * GROUP_FRAMES
    return <frame_id>(end if end < pool.header.frame_count else pool.header.frame_count)


cdef inline uint64_t groups_count(pool_t *pool, uint64_t *row) noexcept nogil:
    """How many groups have their bit set."""
    cdef uint64_t i, word, n = 0
    for i in range(group_words(pool.header.frame_count)):
        word = load64(&row[i])
        while word:
            word &= word - 1
            n += 1
    return n
