"""The life of an eviction: from frames that are needed to frames that are free.

    1 choose: lock the cold ones, then what the hand finds neither hot nor referenced for half a turn
    2 drop the clean ones   3 clean the dirty ones   4 drop those

Write-ahead is step 3 alone, for dirty pages that the hand will meet soon.
"""
from libc.stdint cimport uint32_t
from libc.stdlib cimport qsort

from pyswap.core.clean cimport victims_clean
from pyswap.core.context cimport count, pool_t
from pyswap.core.engine cimport page_unlock
from pyswap.core.frame cimport (
    AHEAD,
    COLD,
    DIRTY,
    HOT,
    LOCKED,
    PASSED,
    REFERENCED,
    frame_has,
    frame_mark,
    frame_state,
    frame_unmark,
    reclaim_kick,
)
from pyswap.core.layout cimport C_WRITE_AHEAD, FRAME_NONE, PRESENT, frame_id, frame_t
from pyswap.core.lock cimport add32, futex_wait, load32, loadi64, store32
from pyswap.core.victim cimport (
    cold_take,
    compare_victims,
    victim_lock,
    victim_t,
    victims_drop_clean,
)

cdef inline uint32_t victims_choose(pool_t *pool, victim_t *victims, uint32_t wanted) noexcept nogil:
    """Up to `wanted` locked victims, sorted by page so that neighbours go out together."""
    cdef uint32_t n = 0, visits = 0, frames = <uint32_t>pool.header.frame_count, limit = 3 * frames + wanted
    cdef frame_id f
    cdef frame_t *frame
    while n < wanted:
        f = cold_take(pool)
        if f == <frame_id>FRAME_NONE:
            break
        if frame_has(&pool.frames[f], COLD) and victim_lock(pool, f, &victims[n]):
            n += 1
    while n < wanted and visits < limit:
        visits += 1
        f = add32(&pool.hand, 1) % frames
        frame = &pool.frames[f]
        # The other hand goes half a turn ahead: what is touched between the two stays, the rest can be cleaned.
        frame_unmark(&pool.frames[(f + frames // 2) % frames], REFERENCED)
        if frame_has(frame, LOCKED | REFERENCED) or frame_state(frame) != PRESENT or frame.pins:
            continue
        # Two turns found nothing else: all the others are pinned, or being filled.
        if frame_has(frame, HOT) and (n or visits < 2 * frames):
            continue
        # What was read ahead gets a turn more: where all was referenced, the second hand follows the first at once.
        if frame_has(frame, AHEAD) and frame_mark(frame, PASSED):
            continue
        if victim_lock(pool, f, &victims[n]):
            n += 1
    qsort(victims, n, sizeof(victim_t), compare_victims)
    return n


cdef inline uint32_t reclaim_batch(pool_t *pool) noexcept nogil:
    """Free one batch of frames; returns how many victims were clean or could be cleaned."""
    cdef victim_t victims[1024]
    cdef uint32_t n = victims_choose(pool, victims, pool.header.batch_pages), clean
    clean = victims_drop_clean(pool, victims, &n)
    if n:
        clean += victims_clean(pool, victims, n, True)
    return clean


cdef inline uint32_t write_ahead_batch(pool_t *pool) noexcept nogil:
    """Clean dirty pages that the hand will meet next and find not referenced; returns how many were cleaned."""
    cdef victim_t victims[1024]
    cdef uint32_t n = 0, step, hand = load32(&pool.hand), frames = <uint32_t>pool.header.frame_count
    cdef uint32_t f, wanted = pool.header.batch_pages
    cdef frame_t *frame
    if loadi64(&pool.header.dirty_count) == 0:
        return 0
    for step in range(frames // 2):
        f = (hand + pool.header.batch_pages + step) % frames
        frame = &pool.frames[f]
        if frame_has(frame, REFERENCED | HOT | LOCKED) or not frame_has(frame, DIRTY) or frame.pins:
            continue
        if not victim_lock(pool, f, &victims[n]):
            continue
        if not frame_has(frame, DIRTY):
            page_unlock(pool, frame)
            continue
        n += 1
        if n == wanted:
            break
    if n == 0:
        return 0
    qsort(victims, n, sizeof(victim_t), compare_victims)
    n = victims_clean(pool, victims, n, False)
    count(pool, C_WRITE_AHEAD, n)
    return n


cdef inline void reclaim_loop(pool_t *pool) noexcept nogil:
    """A thread of its own: from the low watermark up to the high one, then sleep until kicked."""
    cdef uint32_t sequence, free
    while not load32(&pool.stop):
        sequence = load32(&pool.header.reclaim_sequence)
        free = load32(&pool.free_count)
        if free <= pool.header.low_frames and not load32(&pool.pressed):
            # The write-ahead thread starts with us.
            store32(&pool.pressed, 1)
            reclaim_kick(pool)
        elif free >= pool.header.high_frames:
            store32(&pool.pressed, 0)
        if load32(&pool.memory_short):
            store32(&pool.memory_short, 0)
            reclaim_batch(pool)
        if not load32(&pool.pressed):
            futex_wait(&pool.header.reclaim_sequence, sequence, 500_000_000)
        elif reclaim_batch(pool) == 0:
            # Everything is locked, pinned or just touched: look again when something may have changed.
            futex_wait(&pool.header.reclaim_sequence, sequence, 2_000_000)


cdef inline void write_ahead_loop(pool_t *pool) noexcept nogil:
    """A thread of its own, at work from reclaim's start until nothing is left to clean before the hand.

    So the next reclaim finds clean pages; and where everything fits, nothing is ever written.
    """
    cdef uint32_t sequence
    cdef bint at_work = False
    while not load32(&pool.stop):
        sequence = load32(&pool.header.reclaim_sequence)
        at_work = at_work or load32(&pool.pressed)
        if not at_work:
            futex_wait(&pool.header.reclaim_sequence, sequence, 500_000_000)
        elif write_ahead_batch(pool) == 0:
            at_work = False
            futex_wait(&pool.header.reclaim_sequence, sequence, 10_000_000)
