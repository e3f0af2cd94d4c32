"""The swap map: a record a slot, and an allocator that gives runs of neighbouring slots.

    word bits 0-1  FREE, RESERVED (being written), USED (named by a frame or a page table entry), BAD (put aside,
                   since it could not be written)
    bits 2-23      generation of the swapper that reserved it
    bits 24-63     page id

slots_reserve() gives the longest run up to what is asked, down to one slot: random eviction fragments an
area until only single slots are free.  A run never leaves its area.  slots.lock is a leaf; its holder makes one
bounded system call at most, to give a chunk of records memory.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pyswap.core.area cimport area_rests
from pyswap.core.checksum cimport checksum_of
from pyswap.core.context cimport count_most, pool_t
from pyswap.core.kernel cimport file_allocate
from pyswap.core.layout cimport (
    AREA_OFF,
    AREA_ON,
    AREA_SHIFT,
    C_PEAK_SLOTS,
    MAX_AREAS,
    SLOT_CHUNK,
    SLOT_NONE,
    area_t,
    page_id,
    slot_id,
    slot_t,
)
from pyswap.core.lock cimport (
    FP_AREA_STATE,
    FP_SLOT_FREED,
    FP_SLOT_USED,
    FP_SLOTS_RESERVE,
    FP_SLOTS_RESERVED,
    addi64,
    failpoint_visit,
    load64,
    loadi64,
    mutex_lock,
    mutex_unlock,
    now_ns,
    panic,
    store64,
)

cdef enum slot_kind:
    SLOT_FREE = 0
    SLOT_RESERVED = 1
    SLOT_USED = 2
    SLOT_BAD = 3

# How soon memory for records is asked for again.
cdef enum:
    CHUNK_RETRY_NS = 100_000_000


cdef inline uint64_t slot_make(slot_kind kind, uint32_t generation, page_id page) noexcept nogil:
    return (page << 24) | ((<uint64_t>generation & 0x3FFFFF) << 2) | <uint64_t>kind


cdef inline slot_kind slot_is(uint64_t word) noexcept nogil:
    return <slot_kind>(word & 3)


cdef inline page_id slot_page(uint64_t word) noexcept nogil:
    return word >> 24


cdef inline bint chunk_prepare(pool_t *pool, uint64_t chunk) noexcept nogil:
    """Memory for a chunk's records, before the first store to them; False when there is none."""
    cdef uint64_t offset
    if pool.chunk_ready[chunk]:
        return True
    if pool.chunk_refused_ns and now_ns() < pool.chunk_refused_ns + CHUNK_RETRY_NS:
        return False
    offset = pool.header.offset_slots + chunk * SLOT_CHUNK * sizeof(slot_t)
    if file_allocate(pool.control_fd, offset, SLOT_CHUNK * sizeof(slot_t)) != 0:
        pool.chunk_refused_ns = now_ns()
        return False
    pool.chunk_ready[chunk] = 1
    return True


cdef inline uint32_t slot_area(slot_id slot) noexcept nogil:
    return slot >> AREA_SHIFT


cdef inline uint64_t slot_offset(pool_t *pool, slot_id slot) noexcept nogil:
    """Where a slot begins in its area's file, in bytes."""
    return <uint64_t>(slot & ((<uint32_t>1 << AREA_SHIFT) - 1)) << pool.page_shift


cdef inline uint32_t run_at(pool_t *pool, uint64_t first, uint64_t end, uint32_t wanted) noexcept nogil:
    """Free slots from `first` on, up to `wanted`, across chunks that have memory."""
    cdef uint32_t n = 0
    while n < wanted and first + n < end:
        if (first + n) % SLOT_CHUNK == 0 and not chunk_prepare(pool, (first + n) // SLOT_CHUNK):
            break
        if slot_is(load64(&pool.slots[first + n].word)) != SLOT_FREE:
            break
        n += 1
    return n


cdef inline uint32_t area_search(pool_t *pool, uint32_t k, uint32_t wanted, uint64_t *found) noexcept nogil:
    """The longest run of an area, looked for over a bounded number of slots from its cursor on; under slots.lock."""
    cdef area_t *area = &pool.header.areas[k]
    cdef uint64_t base = <uint64_t>k << AREA_SHIFT, end = base + area.slots
    cdef uint64_t chunks = (area.slots + SLOT_CHUNK - 1) // SLOT_CHUNK
    cdef uint64_t chunk, at = base + area.cursor, chunk_end, looked = 0, seen = 0
    cdef uint32_t n, best = 0
    while best < wanted and looked <= chunks and (best == 0 or seen < 64 * SLOT_CHUNK):
        if at >= end:
            at = base
        chunk = at // SLOT_CHUNK
        chunk_end = (chunk + 1) * SLOT_CHUNK
        if chunk_end > end:
            chunk_end = end
        looked += 1
        if pool.chunk_used[chunk] == chunk_end - chunk * SLOT_CHUNK or not chunk_prepare(pool, chunk):
            at = chunk_end
            continue
        while at < chunk_end and best < wanted:
            n = run_at(pool, at, end, wanted)
            if n > best:
                best = n
                found[0] = at
            at += n + 1
            seen += n + 1
        if at < chunk_end:
            break
    return best


cdef inline uint32_t area_next(pool_t *pool, uint32_t tried) noexcept nogil:
    """The area to be filled next, of those that were not tried; MAX_AREAS: none."""
    cdef uint32_t i, k, best = MAX_AREAS
    cdef area_t *area
    for i in range(<uint32_t>MAX_AREAS):
        k = (pool.header.area_turn + i) % <uint32_t>MAX_AREAS
        area = &pool.header.areas[k]
        if tried >> k & 1 or area.state != AREA_ON or area.used + area.bad >= <int64_t>area.slots or area_rests(area):
            continue
        if best == <uint32_t>MAX_AREAS or area.priority > pool.header.areas[best].priority:
            best = k
    return best


cdef inline uint32_t slots_reserve(pool_t *pool, uint32_t wanted, slot_id *first) noexcept nogil:
    """Reserve a run; returns its length (0: every area is full) and its first slot."""
    cdef uint32_t k, n = 0, i, tried = 0
    cdef uint64_t at = 0
    if failpoint_visit(pool.header, FP_SLOTS_RESERVE) != 0:
        return 0
    mutex_lock(&pool.slots_lock)
    while n == 0:
        k = area_next(pool, tried)
        if k == <uint32_t>MAX_AREAS:
            break
        tried |= <uint32_t>1 << k
        n = area_search(pool, k, wanted, &at)
    if n:
        pool.header.area_turn = k + 1
        pool.header.areas[k].cursor = at + n - (<uint64_t>k << AREA_SHIFT)
        pool.header.areas[k].used += n
        addi64(&pool.header.slots_used, n)
        count_most(pool, C_PEAK_SLOTS, <uint64_t>loadi64(&pool.header.slots_used))
        first[0] = <slot_id>at
    for i in range(n):
        store64(&pool.slots[at + i].word, slot_make(SLOT_RESERVED, pool.header.swapper_generation, 0))
        pool.chunk_used[(at + i) // SLOT_CHUNK] += 1
    mutex_unlock(&pool.slots_lock)
    failpoint_visit(pool.header, FP_SLOTS_RESERVED)
    return n


cdef inline bint slots_are_free(pool_t *pool) noexcept nogil:
    """Whether any area that is on, and does not rest, has a slot left."""
    return area_next(pool, 0) != <uint32_t>MAX_AREAS


cdef inline uint64_t slot_checksum(pool_t *pool, page_id page, const uint8_t *bytes) noexcept nogil:
    """What a slot that this swapper gives to a page will have to give back: bound to both, not to the bytes alone."""
    return checksum_of(bytes, pool.page_bytes, slot_make(SLOT_USED, pool.header.swapper_generation, page))


cdef inline bint slot_holds(pool_t *pool, slot_id slot, page_id page, const uint8_t *bytes) noexcept nogil:
    """Whether bytes that were read from a page's slot are those that were written there."""
    cdef uint64_t word = load64(&pool.slots[slot].word)
    if slot_is(word) != SLOT_USED or word >> 24 != page:
        return False
    return checksum_of(bytes, pool.page_bytes, word) == pool.slots[slot].checksum


cdef inline void slot_use(pool_t *pool, slot_id slot, page_id page, uint64_t checksum) noexcept nogil:
    """A reserved slot whose bytes are on disk becomes the page's."""
    cdef uint64_t word = load64(&pool.slots[slot].word)
    if slot_is(word) != SLOT_RESERVED:
        panic("slot_use: not reserved", slot, word, page)
    pool.slots[slot].checksum = checksum
    store64(&pool.slots[slot].word, slot_make(SLOT_USED, pool.header.swapper_generation, page))
    failpoint_visit(pool.header, FP_SLOT_USED)


cdef inline void slot_put_aside(pool_t *pool, slot_id slot) noexcept nogil:
    """A reserved slot that could not be written is nobody's, until its area goes."""
    mutex_lock(&pool.slots_lock)
    if slot_is(load64(&pool.slots[slot].word)) != SLOT_RESERVED:
        panic("slot_put_aside: not reserved", slot, load64(&pool.slots[slot].word), 0)
    store64(&pool.slots[slot].word, slot_make(SLOT_BAD, pool.header.swapper_generation, 0))
    pool.header.areas[slot_area(slot)].used -= 1
    pool.header.areas[slot_area(slot)].bad += 1
    mutex_unlock(&pool.slots_lock)
    addi64(&pool.header.slots_used, -1)
    failpoint_visit(pool.header, FP_SLOT_FREED)


cdef inline void area_forgive(pool_t *pool, uint32_t k) noexcept nogil:
    """Free what was put aside, of an area that nobody uses any more."""
    cdef uint64_t base = <uint64_t>k << AREA_SHIFT, at = 0
    mutex_lock(&pool.slots_lock)
    while pool.header.areas[k].bad and at < pool.header.areas[k].slots:
        if at % SLOT_CHUNK == 0 and pool.chunk_used[(base + at) // SLOT_CHUNK] == 0:
            at += SLOT_CHUNK
            continue
        if slot_is(load64(&pool.slots[base + at].word)) == SLOT_BAD:
            store64(&pool.slots[base + at].word, 0)
            pool.chunk_used[(base + at) // SLOT_CHUNK] -= 1
            pool.header.areas[k].bad -= 1
        at += 1
    mutex_unlock(&pool.slots_lock)
    failpoint_visit(pool.header, FP_SLOT_FREED)


cdef inline void area_switch(pool_t *pool, uint32_t k, uint32_t state) noexcept nogil:
    """Set an area's state; AREA_OFF takes that nobody has a slot of it."""
    cdef uint64_t slots = 0
    cdef uint32_t i
    # Before its record says OFF: a takeover does not look at the slots of an area that is off.
    if state == AREA_OFF:
        area_forgive(pool, k)
        pool.chunks_kept[k] = 0
    mutex_lock(&pool.slots_lock)
    pool.header.areas[k].state = state
    for i in range(<uint32_t>MAX_AREAS):
        if pool.header.areas[i].state == AREA_ON:
            slots += pool.header.areas[i].slots
    pool.header.slot_count = slots
    mutex_unlock(&pool.slots_lock)
    failpoint_visit(pool.header, FP_AREA_STATE)


cdef inline void slots_prepare(pool_t *pool, uint64_t wanted) noexcept nogil:
    """Memory for the records of so many slots: what is committed can be written though there be none left later."""
    cdef area_t *area
    cdef uint64_t chunks, offset, i
    cdef uint32_t k
    mutex_lock(&pool.slots_lock)
    for k in range(<uint32_t>MAX_AREAS):
        area = &pool.header.areas[k]
        if area.state != AREA_ON or wanted == 0:
            continue
        chunks = ((area.slots if area.slots < wanted else wanted) + SLOT_CHUNK - 1) // SLOT_CHUNK
        wanted -= area.slots if area.slots < wanted else wanted
        offset = pool.header.offset_slots + (<uint64_t>k << AREA_SHIFT) * sizeof(slot_t)
        if chunks <= pool.chunks_kept[k] or file_allocate(
            pool.control_fd,
            offset + pool.chunks_kept[k] * SLOT_CHUNK * sizeof(slot_t),
            (chunks - pool.chunks_kept[k]) * SLOT_CHUNK * sizeof(slot_t),
        ) != 0:
            continue
        for i in range(pool.chunks_kept[k], chunks):
            pool.chunk_ready[((<uint64_t>k << AREA_SHIFT) // SLOT_CHUNK) + i] = 1
        pool.chunks_kept[k] = chunks
    mutex_unlock(&pool.slots_lock)


cdef inline void slot_free(pool_t *pool, slot_id slot) noexcept nogil:
    """R6: by who holds the frame's lock, or took the slot out of the page table entry."""
    if slot == SLOT_NONE:
        return
    mutex_lock(&pool.slots_lock)
    if slot_is(load64(&pool.slots[slot].word)) == SLOT_FREE:
        panic("slot_free: free already", slot, load64(&pool.slots[slot].word), 0)
    store64(&pool.slots[slot].word, 0)
    pool.chunk_used[slot // SLOT_CHUNK] -= 1
    pool.header.areas[slot_area(slot)].used -= 1
    mutex_unlock(&pool.slots_lock)
    failpoint_visit(pool.header, FP_SLOT_FREED)
    addi64(&pool.header.slots_used, -1)


# After a swapper's death, before any thread begins.

cdef inline void slot_recount(pool_t *pool, uint32_t k, slot_id slot) noexcept nogil:
    """A slot is its page's: it counts."""
    pool.chunk_used[slot // SLOT_CHUNK] += 1
    pool.header.areas[k].used += 1
    pool.header.slots_used += 1


cdef inline void slot_recover(pool_t *pool, slot_id slot) noexcept nogil:
    """A slot was reserved, or is named by nobody any more."""
    store64(&pool.slots[slot].word, 0)
