"""Cleaning: dirty victims written to neighbouring slots, as write-ahead or on the way out.

    1 protect in every mapping   2 drop the zeros   3 reserve slots   4 WRITEBACK, unlock   5 write
    6 lock again and publish     7 drop what nobody touched meanwhile, if it is to go

A write between the copy-out and the punch cannot be lost: pages are protected wherever they are mapped before they are
written, and REDIRTIED, set under the lock before a page becomes writable again, discards the slot.  Locks are
trylocks while others are held; what could not be locked again after the write is waited for last, one at a
time (R4).
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.area cimport area_rests, area_wrote, areas_rest_ns
from pyswap.core.backing cimport has_file
from pyswap.core.context cimport count, pool_t
from pyswap.core.engine cimport engine_protect, page_unlock
from pyswap.core.frame cimport (
    CLEANED,
    DIRTY,
    REDIRTIED,
    REFERENCED,
    frame_has,
    frame_mark,
    frame_set_clean,
    frame_set_dirty,
    frame_set_present,
    frame_set_writeback,
    frame_sleep,
    frame_state,
    frame_trylock,
)
from pyswap.core.kernel cimport file_transfer, iovec, is_zero
from pyswap.core.layout cimport (
    C_REDIRTIED,
    C_SLOT_STEALS,
    C_SLOT_WRITES,
    C_WRITE_CALLS,
    PRESENT,
    SLOT_NONE,
    WORKER_WORDS,
    frame_t,
    object_id,
    region_id,
    slot_id,
    worker_id,
)
from pyswap.core.lock cimport (
    FP_CLEAN_PROTECTED,
    FP_CLEAN_WRITE,
    FP_CLEAN_WRITTEN,
    failpoint_visit,
    load32,
    load64,
    store32,
)
from pyswap.core.region cimport clones_t, life_drop, life_hold, region_page, regions_of
from pyswap.core.store cimport store_unmap
from pyswap.core.swapmap cimport (
    slot_area,
    slot_checksum,
    slot_free,
    slot_offset,
    slot_put_aside,
    slot_use,
    slots_are_free,
    slots_reserve,
)
from pyswap.core.victim cimport victim_t, victims_compact, victims_drop, victims_drop_clean

cdef enum:
    STEAL_BATCH = 256           # slots taken back from resident pages when the area is full


cdef inline void mappers_union(pool_t *pool, victim_t *victims, uint32_t n, uint64_t *bits) noexcept nogil:
    cdef uint32_t i
    cdef int k
    for k in range(WORKER_WORDS):
        bits[k] = 0
        for i in range(n):
            bits[k] |= load64(&pool.frames[victims[i].frame].mappers[k])


cdef inline bint region_protect(
    pool_t *pool, region_id r, uint32_t generation, victim_t *victims, uint32_t n
) noexcept nogil:
    """Write-protect those of a run that one region maps; False where one could not be.

    An entry of its map that names a victim cannot become another while the victim is locked.  One that is
    COPYING is mapped yet by its old page id, or not in sight: it is pinned, and no victim (R11).
    """
    cdef uint32_t i = 0, run
    cdef int64_t index = <int64_t>pool.frames[victims[0].frame].index
    cdef bint done = True
    if not life_hold(&pool.regions[r].word, generation):
        return True
    if index + n > <int64_t>pool.regions[r].pages:
        i = n
    while i < n and done:
        run = 0
        while i + run < n and region_page(pool, r, index + i + run) == victims[i + run].page:
            run += 1
        if run:
            done = engine_protect(pool, r, generation, index + i, run) == 0
        i += run + 1
    life_drop(&pool.regions[r].word)
    return done


cdef inline bint run_protect(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Write-protect a run of neighbouring pages of one object wherever it may be mapped."""
    cdef uint64_t bits[4]
    cdef object_id o = pool.frames[victims[0].frame].object
    cdef worker_id worker
    cdef clones_t clones
    cdef uint32_t i
    cdef int k
    mappers_union(pool, victims, n, bits)
    for k in range(WORKER_WORDS):
        worker = k * 64
        while bits[k]:
            if bits[k] & 1:
                regions_of(pool, o, worker, &clones)
                for i in range(clones.count):
                    if not region_protect(pool, clones.regions[i], clones.generations[i], victims, n):
                        return False
            bits[k] >>= 1
            worker += 1
    return True


cdef inline uint32_t victims_protect(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Stop all writes to the victims; one that could not be protected everywhere is given up."""
    cdef uint32_t i = 0, run, k
    while i < n:
        run = 1
        while (
            i + run < n
            and victims[i + run].page == victims[i].page + run
            and pool.frames[victims[i + run].frame].object == pool.frames[victims[i].frame].object
            and pool.frames[victims[i + run].frame].index == pool.frames[victims[i].frame].index + run
        ):
            run += 1
        if not run_protect(pool, &victims[i], run):
            for k in range(run):
                victims[i + k].kept = True
                page_unlock(pool, &pool.frames[victims[i + k].frame])
        i += run
    return victims_compact(victims, n)


cdef inline bint frame_is_zero(pool_t *pool, frame_t *frame) noexcept nogil:
    """Whether a page may be forgotten: without a slot it would be zeros, which it is."""
    return not has_file(pool, frame.object) and is_zero(
        pool.store + (frame.page << pool.page_shift), pool.page_bytes
    )


cdef inline void victims_find_zero(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """A page of zeros needs no slot.  Only after protection is what is seen here what will be punched."""
    cdef uint32_t i
    cdef frame_t *frame
    for i in range(n):
        frame = &pool.frames[victims[i].frame]
        if frame_is_zero(pool, frame):
            slot_free(pool, frame.slot)
            frame.slot = SLOT_NONE
            frame_set_clean(pool, frame)


cdef inline uint32_t slots_steal(pool_t *pool) noexcept nogil:
    """Take slots back from resident pages when the area is full: they become dirty instead."""
    cdef uint32_t frames = <uint32_t>pool.header.frame_count, left = frames, taken = 0, f = load32(&pool.steal_hand)
    cdef frame_t *frame
    # From where the last call ended: what is before that has given its slots up already.
    while left and taken < STEAL_BATCH:
        left -= 1
        f = (f + 1) % frames
        frame = &pool.frames[f]
        if frame.slot == SLOT_NONE or not frame_trylock(frame):
            continue
        if frame_state(frame) == PRESENT and frame.slot != SLOT_NONE:
            frame_set_dirty(pool, frame)
            slot_free(pool, frame.slot)
            frame.slot = SLOT_NONE
            taken += 1
        page_unlock(pool, frame)
    store32(&pool.steal_hand, f)
    count(pool, C_SLOT_STEALS, taken)
    return taken


cdef inline uint32_t victims_give_slots(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Reserve slots in the longest runs there are; victims beyond what the area holds are given up."""
    cdef uint32_t i, got, at = 0
    cdef slot_id first = 0
    # A victim's own old slot is no use to it any more: its bytes are newer.
    while at < n:
        got = slots_reserve(pool, n - at, &first)
        if got == 0 and areas_rest_ns(pool):
            break
        if got == 0:
            for i in range(at, n):
                slot_free(pool, pool.frames[victims[i].frame].slot)
                pool.frames[victims[i].frame].slot = SLOT_NONE
            got = slots_reserve(pool, n - at, &first)
        if got == 0 and slots_steal(pool):
            got = slots_reserve(pool, n - at, &first)
        if got == 0:
            break
        for i in range(got):
            victims[at + i].slot = first + i
        at += got
    for i in range(at, n):
        victims[i].kept = True
        page_unlock(pool, &pool.frames[victims[i].frame])
    return victims_compact(victims, n)


cdef inline int run_write(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """One call for victims in neighbouring slots; neighbouring pages share a vector element."""
    cdef iovec v[1024]
    cdef uint32_t i, k = 0
    cdef int rc
    for i in range(n):
        if i and victims[i].page == victims[i - 1].page + 1:
            v[k - 1].iov_len += pool.page_bytes
            continue
        v[k].iov_base = pool.store + (victims[i].page << pool.page_shift)
        v[k].iov_len = pool.page_bytes
        k += 1
    rc = failpoint_visit(pool.header, FP_CLEAN_WRITE)
    if rc == 0:
        rc = file_transfer(
            True, pool.area_fds[slot_area(victims[0].slot)], v, <int>k, slot_offset(pool, victims[0].slot)
        )
    if rc == 0:
        count(pool, C_SLOT_WRITES, n)
        count(pool, C_WRITE_CALLS, 1)
    return rc


cdef inline void victims_lose(pool_t *pool, victim_t *victims, uint32_t n, bint aside) noexcept nogil:
    """Pages that could not be written stay dirty, and try another slot the next time."""
    cdef uint32_t k
    for k in range(n):
        if aside:
            slot_put_aside(pool, victims[k].slot)
        else:
            slot_free(pool, victims[k].slot)
        victims[k].slot = SLOT_NONE


cdef inline void victims_write(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Write runs of neighbouring slots; of a run that fails, its halves, down to the slot that is bad."""
    cdef uint32_t i = 0, run, k, most = n
    cdef bint aside
    cdef int rc
    # Before the write, so that what goes wrong on the way is found.  A page written meanwhile is discarded.
    for k in range(n):
        victims[k].checksum = slot_checksum(
            pool, victims[k].page, pool.store + (victims[k].page << pool.page_shift)
        )
    while i < n:
        k = slot_area(victims[i].slot)
        run = 1
        while run < most and i + run < n and victims[i + run].slot == victims[i].slot + run:
            run += 1
        if area_rests(&pool.header.areas[k]):
            victims_lose(pool, &victims[i], run, False)
            i += run
            continue
        rc = run_write(pool, &victims[i], run)
        aside = area_wrote(pool, k, rc, run == 1)
        if rc != 0 and run > 1:
            most = run // 2
            continue
        most = 2 * run
        if rc != 0:
            victims_lose(pool, &victims[i], 1, aside)
        i += run


cdef inline bint victim_publish(pool_t *pool, victim_t *victim) noexcept nogil:
    """Under the lock again: the slot becomes the page's, unless the page was written since.  True: clean."""
    cdef frame_t *frame = &pool.frames[victim.frame]
    cdef slot_id old
    if victim.slot == SLOT_NONE:
        frame_set_present(pool, frame)
        return False
    if frame_has(frame, REDIRTIED):
        count(pool, C_REDIRTIED, 1)
        slot_free(pool, victim.slot)
        frame_set_present(pool, frame)
        return False
    old = frame.slot
    slot_use(pool, victim.slot, frame.page, victim.checksum)
    frame.slot = victim.slot
    frame_set_clean(pool, frame)
    frame_mark(frame, CLEANED)
    frame_set_present(pool, frame)
    slot_free(pool, old)
    return True


cdef inline bint victim_keep(pool_t *pool, victim_t *victim, bint evict) noexcept nogil:
    """Whether a page that was just cleaned stays in memory."""
    cdef frame_t *frame = &pool.frames[victim.frame]
    return not evict or frame.pins != 0 or frame_has(frame, REFERENCED)


cdef inline uint32_t victims_finish(pool_t *pool, victim_t *victims, uint32_t n, bint evict) noexcept nogil:
    """Lock again, publish, and drop what is to go; returns how many were cleaned."""
    cdef victim_t drop[1024]
    cdef uint32_t i, k = 0, cleaned = 0
    cdef frame_t *frame
    for i in range(n):
        frame = &pool.frames[victims[i].frame]
        if not frame_trylock(frame):
            continue
        victims[i].kept = True
        if victim_publish(pool, &victims[i]):
            cleaned += 1
            if not victim_keep(pool, &victims[i], evict):
                drop[k] = victims[i]
                k += 1
                continue
        page_unlock(pool, frame)
    victims_drop(pool, drop, k)
    # Somebody held these at the time; nothing is held here now, so they may be waited for.
    n = victims_compact(victims, n)
    for i in range(n):
        frame = &pool.frames[victims[i].frame]
        while not frame_trylock(frame):
            frame_sleep(frame, load64(&frame.word), 100_000_000)
        if victim_publish(pool, &victims[i]):
            cleaned += 1
            if not victim_keep(pool, &victims[i], evict):
                victims_drop(pool, &victims[i], 1)
                continue
        page_unlock(pool, frame)
    return cleaned


cdef inline bint slots_left(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Whether any slot can be had for a batch; makes some by giving up those that hold older bytes."""
    cdef uint32_t i
    if slots_are_free(pool):
        return True
    # There are slots, but none that can be written now: what is in others is not given up for that.
    if areas_rest_ns(pool):
        return False
    for i in range(n):
        slot_free(pool, pool.frames[victims[i].frame].slot)
        pool.frames[victims[i].frame].slot = SLOT_NONE
    if slots_are_free(pool):
        return True
    return slots_steal(pool) != 0


cdef inline uint32_t victims_keep_unless_zero(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Without a slot only zeros can leave: protecting the others would cost their writers a fault for nothing."""
    cdef uint32_t i
    cdef frame_t *frame
    for i in range(n):
        frame = &pool.frames[victims[i].frame]
        if not frame_is_zero(pool, frame):
            victims[i].kept = True
            page_unlock(pool, frame)
    return victims_compact(victims, n)


cdef inline uint32_t victims_clean(pool_t *pool, victim_t *victims, uint32_t n, bint evict) noexcept nogil:
    """Write locked dirty victims out; returns how many are clean.  Nothing is locked afterwards."""
    cdef uint32_t i, zero
    if not slots_left(pool, victims, n):
        n = victims_keep_unless_zero(pool, victims, n)
    n = victims_protect(pool, victims, n)
    victims_find_zero(pool, victims, n)
    if evict:
        zero = victims_drop_clean(pool, victims, &n)
    else:
        zero = 0
        for i in range(n):
            if not frame_has(&pool.frames[victims[i].frame], DIRTY):
                zero += 1
                victims[i].kept = True
                page_unlock(pool, &pool.frames[victims[i].frame])
        n = victims_compact(victims, n)
    if n == 0:
        return zero
    n = victims_give_slots(pool, victims, n)
    failpoint_visit(pool.header, FP_CLEAN_PROTECTED)
    for i in range(n):
        frame_set_writeback(pool, &pool.frames[victims[i].frame])
        page_unlock(pool, &pool.frames[victims[i].frame])
    victims_write(pool, victims, n)
    if n:
        store_unmap(pool, victims[0].page, victims[n - 1].page + 1 - victims[0].page)
    failpoint_visit(pool.header, FP_CLEAN_WRITTEN)
    return zero + victims_finish(pool, victims, n, evict)
