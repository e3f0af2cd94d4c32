"""The swap map: a record a slot, and an allocator that gives runs of neighbouring slots.

    word bits 0-1  FREE, RESERVED (being written), USED (named by a frame or a page table entry)
    bits 2-23      generation of the swapper that reserved it
    bits 24-63     page id

slots_reserve() gives the longest run up to what is asked, down to one slot: random eviction fragments the
area until only single slots are free.  slots.lock is a leaf; its holder makes one bounded system call at most, to
give a chunk of records memory.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyswap.core.context cimport pool_t
from pyswap.core.kernel cimport file_allocate
from pyswap.core.layout cimport SLOT_CHUNK, SLOT_NONE, page_id, slot_id, slot_t
from pyswap.core.lock cimport addi64, load64, mutex_lock, mutex_unlock, panic, store64

cdef enum slot_kind:
    SLOT_FREE = 0
    SLOT_RESERVED = 1
    SLOT_USED = 2


cdef inline uint64_t slot_make(slot_kind kind, uint32_t generation, page_id page) noexcept nogil:
    return (page << 24) | ((<uint64_t>generation & 0x3FFFFF) << 2) | <uint64_t>kind


cdef inline slot_kind slot_is(uint64_t word) noexcept nogil:
    return <slot_kind>(word & 3)


cdef inline bint chunk_prepare(pool_t *pool, uint64_t chunk) noexcept nogil:
    """Memory for a chunk's records, before the first store to them; False when there is none."""
    cdef uint64_t offset
    if pool.chunk_ready[chunk]:
        return True
    offset = pool.header.offset_slots + chunk * SLOT_CHUNK * sizeof(slot_t)
    if file_allocate(pool.control_fd, offset, SLOT_CHUNK * sizeof(slot_t)) != 0:
        return False
    pool.chunk_ready[chunk] = 1
    return True


cdef inline uint64_t chunk_size(pool_t *pool, uint64_t chunk) noexcept nogil:
    cdef uint64_t left = pool.header.slot_count - chunk * SLOT_CHUNK
    return left if left < SLOT_CHUNK else SLOT_CHUNK


cdef inline uint32_t run_at(pool_t *pool, uint64_t first, uint32_t wanted) noexcept nogil:
    """Free slots from `first` on, up to `wanted`, across chunks that have memory."""
    cdef uint32_t n = 0
    while n < wanted and first + n < pool.header.slot_count:
        if (first + n) % SLOT_CHUNK == 0 and not chunk_prepare(pool, (first + n) // SLOT_CHUNK):
            break
        if slot_is(load64(&pool.slots[first + n].word)) != SLOT_FREE:
            break
        n += 1
    return n


cdef inline uint32_t slots_reserve(pool_t *pool, uint32_t wanted, slot_id *first) noexcept nogil:
    """Reserve a run; returns its length (0: the area is full) and its first slot.

    Looks for a whole run from the cursor on, over a bounded number of slots, and takes the longest it met.
    """
    cdef uint64_t chunks = (pool.header.slot_count + SLOT_CHUNK - 1) // SLOT_CHUNK
    cdef uint64_t chunk, at, end, looked = 0, best_at = 0, seen = 0
    cdef uint32_t n, i, best = 0
    if chunks == 0:
        return 0
    mutex_lock(&pool.slots_lock)
    at = pool.slot_cursor
    while best < wanted and looked <= chunks and (best == 0 or seen < 64 * SLOT_CHUNK):
        if at >= pool.header.slot_count:
            at = 0
        chunk = at // SLOT_CHUNK
        end = chunk * SLOT_CHUNK + chunk_size(pool, chunk)
        if pool.chunk_used[chunk] == chunk_size(pool, chunk) or not chunk_prepare(pool, chunk):
            looked += 1
            at = end
            continue
        while at < end and best < wanted:
            n = run_at(pool, at, wanted)
            if n > best:
                best = n
                best_at = at
            at += n + 1
            seen += n + 1
        looked += 1
        if at < end:
            break
    for i in range(best):
        store64(&pool.slots[best_at + i].word, slot_make(SLOT_RESERVED, pool.header.swapper_generation, 0))
        pool.chunk_used[(best_at + i) // SLOT_CHUNK] += 1
    if best:
        pool.slot_cursor = best_at + best
        addi64(&pool.header.slots_used, best)
        first[0] = <slot_id>best_at
    mutex_unlock(&pool.slots_lock)
    return best


cdef inline void slot_use(pool_t *pool, slot_id slot, page_id page) noexcept nogil:
    """A reserved slot whose bytes are on disk becomes the page's."""
    cdef uint64_t word = load64(&pool.slots[slot].word)
    if slot_is(word) != SLOT_RESERVED:
        panic("slot_use: not reserved", slot, word, page)
    store64(&pool.slots[slot].word, slot_make(SLOT_USED, pool.header.swapper_generation, page))


cdef inline void slot_free(pool_t *pool, slot_id slot) noexcept nogil:
    """R6: by who holds the frame's lock, or took the slot out of the page table entry."""
    if slot == SLOT_NONE:
        return
    mutex_lock(&pool.slots_lock)
    if slot_is(load64(&pool.slots[slot].word)) == SLOT_FREE:
        panic("slot_free: free already", slot, load64(&pool.slots[slot].word), 0)
    store64(&pool.slots[slot].word, 0)
    pool.chunk_used[slot // SLOT_CHUNK] -= 1
    mutex_unlock(&pool.slots_lock)
    addi64(&pool.header.slots_used, -1)
