"""Victims: frames locked to be evicted, and the eviction of clean ones (R5).

A fault that meets a locked victim leaves word, and is woken when the frame is given up.  A refill between punch and
entry cannot be: the entry names the frame, which is locked, until the punch is done.
"""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.backing cimport has_file
from pyswap.core.context cimport count, pool_t
from pyswap.core.engine cimport engine_wake_waiters, page_unlock
from pyswap.core.frame cimport (
    COLD,
    DIRTY,
    HOT,
    WAS_HOT,
    frame_has,
    frame_set_evicting,
    frame_set_free,
    frame_state,
    frame_trylock,
    frames_announce,
    waiters_t,
)
from pyswap.core.layout cimport (
    C_CLEAN_DROPS,
    C_EVICTIONS,
    C_ZERO_DROPS,
    FRAME_NONE,
    PRESENT,
    SLOT_NONE,
    frame_id,
    frame_t,
    page_id,
    slot_id,
)
from pyswap.core.lock cimport (
    FP_EVICT_ENTRY,
    FP_EVICT_PUNCHED,
    failpoint_visit,
    load64,
    mutex_lock,
    mutex_unlock,
    panic,
)
from pyswap.core.pagetable cimport pte_change, pte_make_evicted, pte_make_frame, pte_read
from pyswap.core.policy cimport eviction_time, evictions_note
from pyswap.core.store cimport store_punch

cdef struct victim_t:
    page_id page                # first: victims are sorted by it
    frame_id frame
    slot_id slot                # reserved for the write
    uint64_t checksum           # of what is written
    bint kept                   # no longer a victim: unlocked, or left for another time


cdef inline int compare_victims(const void *a, const void *b) noexcept nogil:
    cdef page_id p = (<victim_t *>a).page, q = (<victim_t *>b).page
    return -1 if p < q else 1 if p > q else 0


cdef inline uint32_t victims_compact(victim_t *victims, uint32_t n) noexcept nogil:
    cdef uint32_t i, kept = 0
    for i in range(n):
        if not victims[i].kept:
            victims[kept] = victims[i]
            kept += 1
    return kept


cdef inline bint cold_put(pool_t *pool, frame_id f) noexcept nogil:
    cdef bint room
    mutex_lock(&pool.cold_lock)
    room = pool.cold_tail - pool.cold_head < pool.header.frame_room
    if room:
        pool.cold[pool.cold_tail % pool.header.frame_room] = f
        pool.cold_tail += 1
    mutex_unlock(&pool.cold_lock)
    return room


cdef inline frame_id cold_take(pool_t *pool) noexcept nogil:
    cdef frame_id f = <frame_id>FRAME_NONE
    mutex_lock(&pool.cold_lock)
    if pool.cold_tail != pool.cold_head:
        f = pool.cold[pool.cold_head % pool.header.frame_room]
        pool.cold_head += 1
    mutex_unlock(&pool.cold_lock)
    return f


cdef inline bint victim_lock(pool_t *pool, frame_id f, victim_t *victim) noexcept nogil:
    """Lock a frame that may be evicted: present, unpinned."""
    cdef frame_t *frame = &pool.frames[f]
    if not frame_trylock(frame):
        return False
    if frame_state(frame) != PRESENT or frame.pins:
        page_unlock(pool, frame)
        return False
    if pte_read(pool, frame.page) != pte_make_frame(f):
        panic("victim_lock: present, but not in the page table", f, frame.page, load64(&frame.word))
    victim.page = frame.page
    victim.frame = f
    victim.slot = SLOT_NONE
    victim.kept = False
    return True


cdef inline void victims_punch(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """One call for each run of neighbouring pages."""
    cdef uint32_t i = 0, run
    while i < n:
        run = 1
        while i + run < n and victims[i + run].page == victims[i].page + run:
            run += 1
        store_punch(pool, victims[i].page, run)
        i += run


cdef inline void victims_free(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Take locked, clean, unpinned pages out of memory, in the order that R5 asks for."""
    cdef uint32_t i
    cdef uint64_t now = eviction_time(pool), time
    cdef uint32_t were_hot = 0, others = 0
    cdef bint was_hot
    cdef frame_t *frame
    cdef waiters_t waiters
    if n == 0:
        return
    for i in range(n):
        frame_set_evicting(pool, &pool.frames[victims[i].frame])
    victims_punch(pool, victims, n)
    failpoint_visit(pool.header, FP_EVICT_PUNCHED)
    for i in range(n):
        frame = &pool.frames[victims[i].frame]
        # An eviction that was asked for says nothing about the page's worth.
        time = 0 if frame_has(frame, COLD) else now
        was_hot = frame_has(frame, WAS_HOT) and not frame_has(frame, HOT)
        # What is over, or has left no time behind, cannot be seen to come back.
        if time and frame.slot != SLOT_NONE:
            were_hot += was_hot
            others += not was_hot
        if not pte_change(
            pool, frame.page, pte_make_frame(victims[i].frame), pte_make_evicted(frame.slot, time, was_hot)
        ):
            panic("victims_drop: the entry named another frame", victims[i].frame, frame.page, 0)
    failpoint_visit(pool.header, FP_EVICT_ENTRY)
    for i in range(n):
        frame_set_free(pool, victims[i].frame, &waiters)
        engine_wake_waiters(pool, &waiters)
    evictions_note(pool, were_hot, others)
    frames_announce(pool)


cdef inline bint is_kept_elsewhere(pool_t *pool, frame_t *frame) noexcept nogil:
    """Whether a clean page's bytes are in a slot or a file, so that it was not zeros that were dropped."""
    return frame.slot != SLOT_NONE or has_file(pool, frame.object)


cdef inline void victims_drop(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Evict locked, clean, unpinned pages; victims are sorted by page."""
    cdef uint32_t i, zero = 0
    for i in range(n):
        zero += not is_kept_elsewhere(pool, &pool.frames[victims[i].frame])
    count(pool, C_ZERO_DROPS, zero)
    count(pool, C_EVICTIONS, n)
    victims_free(pool, victims, n)


cdef inline uint32_t victims_drop_clean(pool_t *pool, victim_t *victims, uint32_t *n) noexcept nogil:
    """Evict the victims that need no write; leaves the dirty ones, in order."""
    cdef victim_t clean[1024]
    cdef uint32_t i, dropped = 0, elsewhere = 0
    for i in range(n[0]):
        if not frame_has(&pool.frames[victims[i].frame], DIRTY):
            elsewhere += is_kept_elsewhere(pool, &pool.frames[victims[i].frame])
            clean[dropped] = victims[i]
            dropped += 1
            victims[i].kept = True
    count(pool, C_CLEAN_DROPS, elsewhere)
    n[0] = victims_compact(victims, n[0])
    victims_drop(pool, clean, dropped)
    return dropped
