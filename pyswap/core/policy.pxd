"""Policy: which resident pages are worth their frames.

What a process does with a page that it has mapped is unseen: there is neither an accessed bit to read nor a mapping to
take away that would not take the page along.  What is seen is that a page comes back.  Its page table entry
remembers the time of its eviction, in evictions; the refault's distance, the evictions since, is how many frames
more would have kept it.  Less than there are frames: it is HOT, and the hand passes it by.  A scan comes back
after more, or never, and so cannot drive out what is in use.  And one that is written again after it was written out,
which is seen, as it was protected for that, would have come back if it had left: it is HOT, too.

HOT frames stand in a queue, in about the order in which they became so, and are at most three quarters of all: beyond
that one of the elder half is ordinary again, with one more turn of the hand to prove itself.  Which one is left to
chance, since in a loop over a little more than fits the eldest is the one that will be wanted next.
"""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.context cimport count, pool_t
from pyswap.core.frame cimport (
    CLEANED,
    HOT,
    REFERENCED,
    frame_flags,
    frame_mark,
    frame_state,
    frame_unmark,
    word_generation,
)
from pyswap.core.layout cimport C_ACTIVATIONS, C_EVICTIONS, C_REFAULTS, WRITEBACK, frame_id
from pyswap.core.lock cimport load64, mutex_lock, mutex_unlock
from pyswap.core.pagetable cimport PTE_TIMES, pte_time


cdef inline uint64_t eviction_time(pool_t *pool) noexcept nogil:
    """Evictions so far, as page table entries count them; never 0, which means unknown."""
    return load64(&pool.header.counters[C_EVICTIONS]) % (PTE_TIMES - 1) + 1


cdef inline uint64_t chance(pool_t *pool) noexcept nogil:
    """A number that looks random: splitmix64 of a counter (Steele, Lea and Flood, OOPSLA 2014); under hot_lock."""
    cdef uint64_t z
    pool.hot_chance += <uint64_t>0x9E3779B97F4A7C15
    z = pool.hot_chance
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


cdef inline uint64_t hot_limit(pool_t *pool) noexcept nogil:
    cdef uint64_t frames = load64(&pool.header.memory_pages)
    return frames - frames // 4


cdef inline void hot_put(pool_t *pool, frame_id f) noexcept nogil:
    """Append a frame to the queue; the eldest make room."""
    cdef uint64_t limit = hot_limit(pool), entry, room = pool.header.frame_room, at, length
    mutex_lock(&pool.hot_lock)
    while pool.hot_tail - pool.hot_head >= limit:
        length = pool.hot_tail - pool.hot_head
        at = (pool.hot_head + chance(pool) % (length // 2 + 1)) % room
        entry = pool.hot[at]
        pool.hot[at] = pool.hot[pool.hot_head % room]
        pool.hot_head += 1
        # Ordinary again, and with a turn before it, if it still holds the page that made it HOT.
        frame_flags(&pool.frames[<uint32_t>entry], <uint32_t>(entry >> 32), HOT, REFERENCED)
    entry = (<uint64_t>word_generation(load64(&pool.frames[f].word)) << 32) | f
    pool.hot[pool.hot_tail % room] = entry
    pool.hot_tail += 1
    mutex_unlock(&pool.hot_lock)


cdef inline void hot_make(pool_t *pool, frame_id f) noexcept nogil:
    if frame_mark(&pool.frames[f], HOT):
        count(pool, C_ACTIVATIONS, 1)
        hot_put(pool, f)


cdef inline void refault_note(pool_t *pool, frame_id f, uint64_t pte) noexcept nogil:
    """A frame was claimed for a page whose entry was `pte`: is the page worth keeping?  Under its lock."""
    cdef uint64_t then = pte_time(pte), distance
    if then == 0:
        return
    distance = (eviction_time(pool) + (PTE_TIMES - 1) - then) % (PTE_TIMES - 1)
    count(pool, C_REFAULTS, 1)
    if distance < load64(&pool.header.memory_pages):
        hot_make(pool, f)


cdef inline void rewrite_note(pool_t *pool, frame_id f) noexcept nogil:
    """A mapped page is written: one that was written out, as if it would leave, is in use.  Under its lock."""
    if frame_unmark(&pool.frames[f], CLEANED) or frame_state(&pool.frames[f]) == WRITEBACK:
        hot_make(pool, f)
