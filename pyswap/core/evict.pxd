"""Ranges of pages evicted on request, marked to be evicted first, or swept with their object."""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.area cimport areas_rest_ns
from pyswap.core.clean cimport victims_clean
from pyswap.core.context cimport pool_t
from pyswap.core.engine cimport page_unlock
from pyswap.core.family cimport page_lives
from pyswap.core.frame cimport (
    COLD,
    LOCKED,
    REFERENCED,
    frame_mark,
    frame_pause,
    frame_set_clean,
    frame_sleep,
    frame_state,
    frame_trylock,
    frame_unmark,
    frame_unpin_all,
    word_state,
)
from pyswap.core.layout cimport (
    MAX_BATCH_PAGES,
    PRESENT,
    SLOT_NONE,
    WRITEBACK,
    frame_id,
    frame_t,
    object_id,
    page_id,
)
from pyswap.core.lock cimport futex_wait, load64, panic
from pyswap.core.pagetable cimport (
    PTE_EMPTY,
    pte_change,
    pte_frame,
    pte_is_frame,
    pte_is_slot,
    pte_read,
    pte_slot,
)
from pyswap.core.swapmap cimport slot_free, slots_are_free
from pyswap.core.victim cimport cold_put, victim_lock, victim_t, victims_drop_clean, victims_free

cdef enum:
    EVICT_TRIES = 300           # rounds of pages_evict() over what somebody else has locked
    KEPT_TRIES = 4              # of them, those that met no lock, over what was touched meanwhile


cdef inline uint32_t evict_some(
    pool_t *pool, page_id first, uint32_t n, uint32_t *busy, uint32_t *pinned
) noexcept nogil:
    """One try at a range: how many of its pages are still resident, how many were not to be had, or are pinned."""
    cdef victim_t victims[1024]
    cdef uint32_t i, found = 0, resident = 0
    cdef uint64_t pte
    cdef frame_id f
    busy[0] = 0
    pinned[0] = 0
    for i in range(n):
        pte = pte_read(pool, first + i)
        if not pte_is_frame(pte):
            continue
        f = pte_frame(pte)
        if not victim_lock(pool, f, &victims[found]):
            if pool.frames[f].pins:
                pinned[0] += 1
            else:
                busy[0] += 1
        elif victims[found].page == first + i:
            frame_unmark(&pool.frames[f], REFERENCED)
            frame_mark(&pool.frames[f], COLD)
            found += 1
        else:
            page_unlock(pool, &pool.frames[f])
    i = found
    victims_drop_clean(pool, victims, &i)
    if i:
        victims_clean(pool, victims, i, True)
    for i in range(n):
        resident += pte_is_frame(pte_read(pool, first + i))
    return resident


cdef inline void evict_wait(pool_t *pool, page_id first, uint32_t n) noexcept nogil:
    """Wait for one page of a range that is locked or being written out; nothing is held (R4)."""
    cdef uint32_t i
    cdef uint64_t pte, word, rest = 0 if slots_are_free(pool) else areas_rest_ns(pool)
    cdef uint32_t nobody = 0
    cdef frame_t *frame
    if rest:
        # Nothing but time makes an area well.
        futex_wait(&nobody, 0, rest)
    for i in range(n):
        pte = pte_read(pool, first + i)
        if not pte_is_frame(pte):
            continue
        frame = &pool.frames[pte_frame(pte)]
        word = load64(&frame.word)
        if word & LOCKED:
            frame_sleep(frame, word, 100_000_000)
            return
        if word_state(word) == WRITEBACK:
            frame_pause(frame, word, 1_000_000)
            return


cdef inline uint32_t pages_evict(pool_t *pool, page_id first, uint32_t n) noexcept nogil:
    """Evict a range now; returns how many pages of it are still resident: pinned, or in use.

    A fault that was served before may still hold the locks of the neighbours that it maps, or map them while their
    bytes go out: they look touched then.  So what stays gets a few more rounds before it counts as in use.
    """
    cdef uint32_t busy = 0, pinned = 0, resident = 0, tries = 0, kept = 0
    if n > MAX_BATCH_PAGES:
        panic("pages_evict: more than a batch", n, first, 0)
    while tries < EVICT_TRIES and kept < KEPT_TRIES:
        resident = evict_some(pool, first, n, &busy, &pinned)
        if resident <= pinned:
            break
        tries += 1
        kept += busy == 0
        evict_wait(pool, first, n)
    return resident


cdef inline void pages_cool(pool_t *pool, page_id first, uint64_t n) noexcept nogil:
    """To be evicted first; no byte changes."""
    cdef uint64_t i, pte
    cdef frame_id f
    for i in range(n):
        pte = pte_read(pool, first + i)
        if not pte_is_frame(pte):
            continue
        f = pte_frame(pte)
        frame_unmark(&pool.frames[f], REFERENCED)
        if frame_mark(&pool.frames[f], COLD):
            cold_put(pool, f)


cdef inline uint32_t pages_sweep(pool_t *pool, object_id o, page_id first, uint32_t n) noexcept nogil:
    """Free what dead pages have in memory and in swap; returns how many somebody else still holds (R7)."""
    cdef victim_t victims[1024]
    cdef uint32_t i, found = 0, held = 0
    cdef uint64_t pte
    cdef frame_t *frame
    if n > MAX_BATCH_PAGES:
        panic("pages_sweep: more than a batch", n, first, 0)
    for i in range(n):
        pte = pte_read(pool, first + i)
        # What was given to a copy meanwhile has a reference; nothing is, as long as its entry is not empty.
        if pte == PTE_EMPTY or page_lives(pool, o, first + i):
            continue
        if pte_is_slot(pte):
            if pte_change(pool, first + i, pte, PTE_EMPTY):
                slot_free(pool, pte_slot(pte))
            else:
                held += 1
            continue
        frame = &pool.frames[pte_frame(pte)]
        if not frame_trylock(frame):
            held += 1
            continue
        if pte_read(pool, first + i) != pte or page_lives(pool, o, first + i) or frame_state(frame) != PRESENT:
            held += 1
            page_unlock(pool, frame)
            continue
        slot_free(pool, frame.slot)
        frame.slot = SLOT_NONE
        frame_unpin_all(pool, frame)
        frame_set_clean(pool, frame)
        victims[found].page = first + i
        victims[found].frame = pte_frame(pte)
        found += 1
    victims_free(pool, victims, found)
    return held
