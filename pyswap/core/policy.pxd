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

How many may be HOT moves with what that saves.  What has been HOT, and was made ordinary to make room, says so in its
page table entry when it goes.  Where few of those come back, they were wanted no more, and the share of memory that
they have is lost to the others: the limit goes down, as long as a frame more for these would save more reads.
"""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.context cimport count, pool_t
from pyswap.core.frame cimport (
    CLEANED,
    HOT,
    REFERENCED,
    WAS_HOT,
    frame_flags,
    frame_mark,
    frame_state,
    frame_unmark,
    word_generation,
)
from pyswap.core.layout cimport C_ACTIVATIONS, C_EVICTIONS, C_REFAULTS, WRITEBACK, frame_id
from pyswap.core.lock cimport load64, mutex_lock, mutex_unlock
from pyswap.core.pagetable cimport PTE_TIMES, PTE_WAS_HOT, pte_time

cdef enum:
    LIMIT_STEPS = 8             # the limit of HOT frames moves by a frame for so many evictions
    HOT_WEIGHT = 3              # what was HOT, and would be again, stays for longer than what is ordinary
    NEAREST = 8                 # a page that would have been saved by an eighth of memory counts as eight


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


cdef inline uint64_t hot_most(pool_t *pool) noexcept nogil:
    cdef uint64_t frames = load64(&pool.header.memory_pages)
    return frames - frames // 4


cdef inline uint64_t hot_range(pool_t *pool) noexcept nogil:
    """How far the limit may be below that: an eighth of memory is left."""
    return hot_most(pool) - load64(&pool.header.memory_pages) // 8


cdef inline uint64_t hot_limit(pool_t *pool) noexcept nogil:
    """How many frames may be HOT; under hot_lock."""
    return hot_most(pool) - min(pool.hot_less, hot_range(pool))


cdef inline void hot_shed(pool_t *pool, uint64_t most) noexcept nogil:
    """Make frames of the queue's elder half ordinary until it has no more than so many; under hot_lock."""
    cdef uint64_t entry, room = pool.header.frame_room, at, length
    while pool.hot_tail - pool.hot_head > most:
        length = pool.hot_tail - pool.hot_head
        at = (pool.hot_head + chance(pool) % (length // 2 + 1)) % room
        entry = pool.hot[at]
        pool.hot[at] = pool.hot[pool.hot_head % room]
        pool.hot_head += 1
        # With a turn before it, if it still holds the page that made it HOT.
        frame_flags(&pool.frames[<uint32_t>entry], <uint32_t>(entry >> 32), HOT, REFERENCED | WAS_HOT)


cdef inline void hot_make(pool_t *pool, frame_id f) noexcept nogil:
    """Append a frame to the queue; elder ones make room."""
    cdef uint64_t limit
    if not frame_mark(&pool.frames[f], HOT):
        return
    count(pool, C_ACTIVATIONS, 1)
    mutex_lock(&pool.hot_lock)
    limit = hot_limit(pool)
    hot_shed(pool, limit - 1 if limit else 0)
    pool.hot[pool.hot_tail % pool.header.frame_room] = (
        <uint64_t>word_generation(load64(&pool.frames[f].word)) << 32
    ) | f
    pool.hot_tail += 1
    mutex_unlock(&pool.hot_lock)


cdef inline void evictions_note(pool_t *pool, uint32_t were_hot, uint32_t others) noexcept nogil:
    """So many pages have left: move the limit to where a frame more would save more reads."""
    cdef uint64_t step = (were_hot + others) // LIMIT_STEPS + 1, worth
    cdef int i
    if were_hot + others == 0:
        return
    mutex_lock(&pool.hot_lock)
    # The budget may be lower than it was.
    pool.hot_less = min(pool.hot_less, hot_range(pool))
    pool.left[0] += others
    pool.left[1] += were_hot
    if pool.left[0] + pool.left[1] > 2 * load64(&pool.header.memory_pages):
        for i in range(2):
            pool.left[i] //= 2
            pool.returned[i] //= 2
    worth = HOT_WEIGHT * (pool.returned[1] + 1)
    if worth < 2 * (pool.left[1] + 2) and worth * (pool.left[0] + 2) < (pool.returned[0] + 1) * (pool.left[1] + 2):
        pool.hot_less = min(pool.hot_less + step, hot_range(pool))
        hot_shed(pool, hot_limit(pool))
    else:
        pool.hot_less -= min(pool.hot_less, step)
    mutex_unlock(&pool.hot_lock)


cdef inline void refault_note(pool_t *pool, frame_id f, uint64_t pte) noexcept nogil:
    """A frame was claimed for a page whose entry was `pte`: is the page worth keeping?  Under its lock."""
    cdef uint64_t then = pte_time(pte), distance
    if then == 0:
        return
    distance = (eviction_time(pool) + (PTE_TIMES - 1) - then) % (PTE_TIMES - 1)
    count(pool, C_REFAULTS, 1)
    if distance < load64(&pool.header.memory_pages):
        mutex_lock(&pool.hot_lock)
        if pte & PTE_WAS_HOT:
            pool.returned[1] += 1
        else:
            pool.returned[0] += min(pool.header.memory_pages // (distance + 1), <uint64_t>NEAREST)
        mutex_unlock(&pool.hot_lock)
        hot_make(pool, f)


cdef inline void rewrite_note(pool_t *pool, frame_id f) noexcept nogil:
    """A mapped page is written: one that was written out, as if it would leave, is in use.  Under its lock."""
    if frame_unmark(&pool.frames[f], CLEANED) or frame_state(&pool.frames[f]) == WRITEBACK:
        hot_make(pool, f)
