"""The life of an eviction: from frames that are needed to frames that are free.

    1 choose    lock victims: the cold ones, then what the hand finds not referenced since it last passed
    2 drop      the clean ones: EVICTING, punch, page table entry, FREE (R5)
    3 clean     the dirty ones: write-protect, reserve neighbouring slots, WRITEBACK, unlock, one write,
                publish
    4 drop      those that nobody wrote to meanwhile

Write-ahead is step 3 alone, for dirty pages that the hand will meet soon.

Who may interleave, and what stops it:
 - a write between the copy-out and the punch: pages are protected in every mapping before they are written,
   and REDIRTIED, set under the lock before a page becomes writable again, discards the slot
 - a refill between punch and entry: the entry names the frame, which is locked, until the punch is done
 - a fault that meets a locked victim leaves word, and is woken when the lock or the frame is given up
Locks are trylocks while others are held; what could not be locked again after the write is waited for last,
one at a time (R4).
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport qsort

from pyswap.core.context cimport count, pool_t
from pyswap.core.engine cimport engine_protect, engine_wake_waiters
from pyswap.core.fault cimport page_unlock, punch
from pyswap.core.frame cimport (
    COLD,
    DIRTY,
    LOCKED,
    REDIRTIED,
    REFERENCED,
    frame_has,
    frame_mark,
    frame_set_clean,
    frame_set_dirty,
    frame_set_evicting,
    frame_set_free,
    frame_set_present,
    frame_set_writeback,
    frame_sleep,
    frame_state,
    frame_trylock,
    frame_unmark,
    frame_unpin_all,
    frames_announce,
    reclaim_kick,
    waiters_t,
    word_state,
)
from pyswap.core.kernel cimport file_transfer, iovec, is_zero
from pyswap.core.layout cimport (
    C_CLEAN_DROPS,
    C_EVICTIONS,
    C_REDIRTIED,
    C_SLOT_STEALS,
    C_SLOT_WRITES,
    C_WRITE_AHEAD,
    C_WRITE_CALLS,
    C_WRITE_ERRORS,
    C_ZERO_DROPS,
    FRAME_NONE,
    MAX_BATCH_PAGES,
    PRESENT,
    REGION_NONE,
    SLOT_NONE,
    WORKER_WORDS,
    WRITEBACK,
    frame_id,
    frame_t,
    object_id,
    page_id,
    region_id,
    slot_id,
    worker_id,
)
from pyswap.core.lock cimport (
    FP_CLEAN_PROTECTED,
    FP_CLEAN_WRITE,
    FP_CLEAN_WRITTEN,
    FP_EVICT_ENTRY,
    FP_EVICT_PUNCHED,
    add32,
    failpoint_visit,
    futex_wait,
    load32,
    load64,
    low_half,
    mutex_lock,
    mutex_unlock,
    panic,
    store32,
)
from pyswap.core.pagetable cimport (
    PTE_EMPTY,
    pte_change,
    pte_frame,
    pte_is_frame,
    pte_is_slot,
    pte_make_frame,
    pte_make_slot,
    pte_read,
    pte_slot,
)
from pyswap.core.region cimport region_of
from pyswap.core.swapmap cimport slot_free, slot_use, slots_reserve

cdef enum:
    STEAL_BATCH = 256           # slots taken back from resident pages when the area is full
    EVICT_TRIES = 300           # rounds of pages_evict() over what somebody else has locked

cdef struct victim_t:
    page_id page                # first: victims are sorted by it
    frame_id frame
    slot_id slot                # reserved for the write
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


# 1. Choose.

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


cdef inline bint cold_put(pool_t *pool, frame_id f) noexcept nogil:
    cdef bint room
    mutex_lock(&pool.cold_lock)
    room = pool.cold_tail - pool.cold_head < pool.header.frame_count
    if room:
        pool.cold[pool.cold_tail % pool.header.frame_count] = f
        pool.cold_tail += 1
    mutex_unlock(&pool.cold_lock)
    return room


cdef inline frame_id cold_take(pool_t *pool) noexcept nogil:
    cdef frame_id f = <frame_id>FRAME_NONE
    mutex_lock(&pool.cold_lock)
    if pool.cold_tail != pool.cold_head:
        f = pool.cold[pool.cold_head % pool.header.frame_count]
        pool.cold_head += 1
    mutex_unlock(&pool.cold_lock)
    return f


cdef inline uint32_t victims_choose(pool_t *pool, victim_t *victims, uint32_t wanted) noexcept nogil:
    """Up to `wanted` locked victims, sorted by page so that neighbours go out together."""
    cdef uint32_t n = 0, visits = 0, limit = <uint32_t>(2 * pool.header.frame_count + wanted)
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
        f = add32(&pool.hand, 1) % <uint32_t>pool.header.frame_count
        frame = &pool.frames[f]
        if frame_has(frame, LOCKED) or frame_state(frame) != PRESENT:
            continue
        if frame_unmark(frame, REFERENCED) or frame.pins:
            continue
        if victim_lock(pool, f, &victims[n]):
            n += 1
    qsort(victims, n, sizeof(victim_t), compare_victims)
    return n


# 2 and 4. Drop.

cdef inline void victims_punch(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """One call for each run of neighbouring pages."""
    cdef uint32_t i = 0, run
    while i < n:
        run = 1
        while i + run < n and victims[i + run].page == victims[i].page + run:
            run += 1
        punch(pool, victims[i].page, run)
        i += run


cdef inline void victims_drop(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Evict locked, clean, unpinned pages; victims are sorted by page."""
    cdef uint32_t i
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
        if not pte_change(pool, frame.page, pte_make_frame(victims[i].frame), pte_make_slot(frame.slot)):
            panic("victims_drop: the entry named another frame", victims[i].frame, frame.page, 0)
        if frame.slot == SLOT_NONE:
            count(pool, C_ZERO_DROPS, 1)
    failpoint_visit(pool.header, FP_EVICT_ENTRY)
    count(pool, C_EVICTIONS, n)
    for i in range(n):
        frame_set_free(pool, victims[i].frame, &waiters)
        engine_wake_waiters(pool, &waiters)
    frames_announce(pool)


cdef inline uint32_t victims_drop_clean(pool_t *pool, victim_t *victims, uint32_t *n) noexcept nogil:
    """Evict the victims that need no write; leaves the dirty ones, in order."""
    cdef victim_t clean[256]
    cdef uint32_t i, dropped = 0
    for i in range(n[0]):
        if not frame_has(&pool.frames[victims[i].frame], DIRTY):
            clean[dropped] = victims[i]
            dropped += 1
            victims[i].kept = True
    n[0] = victims_compact(victims, n[0])
    victims_drop(pool, clean, dropped)
    return dropped


# 3. Clean.

cdef inline void mappers_union(pool_t *pool, victim_t *victims, uint32_t n, uint64_t *bits) noexcept nogil:
    cdef uint32_t i
    cdef int k
    for k in range(WORKER_WORDS):
        bits[k] = 0
        for i in range(n):
            bits[k] |= load64(&pool.frames[victims[i].frame].mappers[k])


cdef inline bint run_protect(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Write-protect a run of neighbouring pages of one object wherever it may be mapped."""
    cdef uint64_t bits[4]
    cdef object_id o = pool.frames[victims[0].frame].object
    cdef worker_id worker
    cdef region_id r
    cdef uint32_t generation = 0
    cdef int k
    mappers_union(pool, victims, n, bits)
    for k in range(WORKER_WORDS):
        worker = k * 64
        while bits[k]:
            if bits[k] & 1:
                r = region_of(pool, o, worker, &generation)
                if r != REGION_NONE and engine_protect(
                    pool, r, generation, <int64_t>(victims[0].page - pool.regions[r].base), n
                ):
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
        ):
            run += 1
        if not run_protect(pool, &victims[i], run):
            for k in range(run):
                victims[i + k].kept = True
                page_unlock(pool, &pool.frames[victims[i + k].frame])
        i += run
    return victims_compact(victims, n)


cdef inline void victims_find_zero(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """A page of zeros needs no slot.  Only after protection is what is seen here what will be punched."""
    cdef uint32_t i
    cdef frame_t *frame
    for i in range(n):
        frame = &pool.frames[victims[i].frame]
        if is_zero(pool.store + (frame.page << pool.page_shift), pool.page_bytes):
            slot_free(pool, frame.slot)
            frame.slot = SLOT_NONE
            frame_set_clean(pool, frame)


cdef inline uint32_t slots_steal(pool_t *pool) noexcept nogil:
    """Take slots back from resident pages when the area is full: they become dirty instead."""
    cdef uint32_t taken = 0, f
    cdef frame_t *frame
    for f in range(<uint32_t>pool.header.frame_count):
        frame = &pool.frames[f]
        if frame.slot == SLOT_NONE or not frame_trylock(frame):
            continue
        if frame_state(frame) == PRESENT and frame.slot != SLOT_NONE:
            frame_set_dirty(pool, frame)
            slot_free(pool, frame.slot)
            frame.slot = SLOT_NONE
            taken += 1
        page_unlock(pool, frame)
        if taken == STEAL_BATCH:
            break
    count(pool, C_SLOT_STEALS, taken)
    return taken


cdef inline uint32_t victims_give_slots(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Reserve slots in the longest runs there are; victims beyond what the area holds are given up."""
    cdef uint32_t i, got, at = 0
    cdef slot_id first = 0
    # A victim's own old slot is no use to it any more: its bytes are newer.
    while at < n:
        got = slots_reserve(pool, n - at, &first)
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
    cdef iovec v[256]
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
        rc = file_transfer(True, pool.swap_fd, v, <int>k, <uint64_t>victims[0].slot << pool.page_shift)
    if rc == 0:
        count(pool, C_SLOT_WRITES, n)
        count(pool, C_WRITE_CALLS, 1)
    else:
        count(pool, C_WRITE_ERRORS, 1)
    return rc


cdef inline void victims_write(pool_t *pool, victim_t *victims, uint32_t n) noexcept nogil:
    """Write runs of neighbouring slots; pages whose write failed lose their slot again and stay dirty."""
    cdef uint32_t i = 0, run, k
    while i < n:
        run = 1
        while i + run < n and victims[i + run].slot == victims[i].slot + run:
            run += 1
        if run_write(pool, &victims[i], run) != 0:
            for k in range(run):
                slot_free(pool, victims[i + k].slot)
                victims[i + k].slot = SLOT_NONE
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
    slot_use(pool, victim.slot, frame.page)
    frame.slot = victim.slot
    frame_set_clean(pool, frame)
    frame_set_present(pool, frame)
    slot_free(pool, old)
    return True


cdef inline bint victim_keep(pool_t *pool, victim_t *victim, bint evict) noexcept nogil:
    """Whether a page that was just cleaned stays in memory."""
    cdef frame_t *frame = &pool.frames[victim.frame]
    return not evict or frame.pins != 0 or frame_has(frame, REFERENCED)


cdef inline uint32_t victims_finish(pool_t *pool, victim_t *victims, uint32_t n, bint evict) noexcept nogil:
    """Lock again, publish, and drop what is to go; returns how many were cleaned."""
    cdef victim_t drop[256]
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
    # A fault held these at the time; nothing is held here now, so they may be waited for.
    n = victims_compact(victims, n)
    for i in range(n):
        frame = &pool.frames[victims[i].frame]
        while not frame_trylock(frame):
            frame_sleep(frame, load64(&frame.word), 100_000_000)
        cleaned += victim_publish(pool, &victims[i])
        page_unlock(pool, frame)
    return cleaned


cdef inline uint32_t victims_clean(pool_t *pool, victim_t *victims, uint32_t n, bint evict) noexcept nogil:
    """Write locked dirty victims out; returns how many are clean.  Nothing is locked afterwards."""
    cdef uint32_t i, zero = n
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
    failpoint_visit(pool.header, FP_CLEAN_WRITTEN)
    return zero + victims_finish(pool, victims, n, evict)


# The loops.

cdef inline uint32_t reclaim_batch(pool_t *pool) noexcept nogil:
    """Free one batch of frames; returns how many victims were clean or could be cleaned."""
    cdef victim_t victims[256]
    cdef uint32_t n = victims_choose(pool, victims, pool.header.batch_pages), clean
    clean = victims_drop_clean(pool, victims, &n)
    count(pool, C_CLEAN_DROPS, clean)
    if n:
        clean += victims_clean(pool, victims, n, True)
    return clean


cdef inline uint32_t write_ahead_batch(pool_t *pool) noexcept nogil:
    """Clean dirty pages that the hand will meet next and find not referenced; returns how many were cleaned."""
    cdef victim_t victims[256]
    cdef uint32_t n = 0, step, hand = load32(&pool.hand), frames = <uint32_t>pool.header.frame_count
    cdef uint32_t f, wanted = pool.header.batch_pages
    cdef frame_t *frame
    for step in range(frames // 2):
        f = (hand + pool.header.batch_pages + step) % frames
        frame = &pool.frames[f]
        if frame_has(frame, REFERENCED | LOCKED) or not frame_has(frame, DIRTY) or frame.pins:
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
        if free < pool.header.low_frames and not load32(&pool.pressed):
            # The write-ahead thread starts with us.
            store32(&pool.pressed, 1)
            reclaim_kick(pool)
        elif free >= pool.header.high_frames:
            store32(&pool.pressed, 0)
        if not load32(&pool.pressed):
            futex_wait(&pool.header.reclaim_sequence, sequence, 500_000_000)
        elif reclaim_batch(pool) == 0:
            # Everything is locked, pinned or just touched: look again when something may have changed.
            futex_wait(&pool.header.reclaim_sequence, sequence, 2_000_000)


cdef inline void write_ahead_loop(pool_t *pool) noexcept nogil:
    """A thread of its own, at work only while reclaim is: where everything fits, nothing is ever written."""
    cdef uint32_t sequence
    while not load32(&pool.stop):
        sequence = load32(&pool.header.reclaim_sequence)
        if not load32(&pool.pressed):
            futex_wait(&pool.header.reclaim_sequence, sequence, 500_000_000)
        elif write_ahead_batch(pool) == 0:
            futex_wait(&pool.header.reclaim_sequence, sequence, 10_000_000)


# Asked for by the user.

cdef inline uint32_t evict_some(
    pool_t *pool, page_id first, uint32_t n, uint32_t *busy
) noexcept nogil:
    """One try at a range: how many of its pages are still resident, and how many were not to be had."""
    cdef victim_t victims[256]
    cdef uint32_t i, found = 0, resident = 0
    cdef uint64_t pte
    cdef frame_id f
    busy[0] = 0
    for i in range(n):
        pte = pte_read(pool, first + i)
        if not pte_is_frame(pte):
            continue
        f = pte_frame(pte)
        if not victim_lock(pool, f, &victims[found]):
            busy[0] += pool.frames[f].pins == 0
        elif victims[found].page == first + i:
            frame_unmark(&pool.frames[f], REFERENCED)
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
    cdef uint64_t pte, word
    cdef frame_t *frame
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
            futex_wait(low_half(&frame.word), <uint32_t>word, 1_000_000)
            return


cdef inline uint32_t pages_evict(pool_t *pool, page_id first, uint32_t n) noexcept nogil:
    """Evict a range now; returns how many pages of it are still resident: pinned, or in use.

    A fault that has been served may still hold the locks of the neighbours that it mapped.
    """
    cdef uint32_t busy = 0, resident = 0
    cdef int i
    if n > MAX_BATCH_PAGES:
        panic("pages_evict: more than a batch", n, first, 0)
    for i in range(EVICT_TRIES):
        resident = evict_some(pool, first, n, &busy)
        if busy == 0:
            break
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


cdef inline uint32_t pages_sweep(pool_t *pool, page_id first, uint32_t n) noexcept nogil:
    """Free a dying object's pages, in memory and in swap; returns how many somebody else still holds (R7)."""
    cdef victim_t victims[256]
    cdef uint32_t i, found = 0, held = 0
    cdef uint64_t pte
    cdef frame_t *frame
    if n > MAX_BATCH_PAGES:
        panic("pages_sweep: more than a batch", n, first, 0)
    for i in range(n):
        pte = pte_read(pool, first + i)
        if pte == PTE_EMPTY:
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
        if pte_read(pool, first + i) != pte or frame_state(frame) != PRESENT:
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
    victims_drop(pool, victims, found)
    return held
