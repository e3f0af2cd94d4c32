"""Readahead requests carried out, as far as frames are free (R4): runs of neighbouring slots, or of a file's pages.

A page that arrives is resident, unmapped, and marked AHEAD until somebody asks for it.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pyswap.core.backing cimport backing_read, has_file
from pyswap.core.context cimport count, pool_t, request_t
from pyswap.core.engine cimport page_unlock
from pyswap.core.frame cimport AHEAD, REFERENCED, frame_claim, frame_mark, frame_set_present
from pyswap.core.layout cimport (
    C_READAHEAD_PAGES,
    FRAME_NONE,
    SLOT_NONE,
    frame_id,
    frame_t,
    object_id,
    page_id,
    slot_id,
)
from pyswap.core.lock cimport FP_FILL_LOCKED, failpoint_visit, load32
from pyswap.core.page cimport fill_install, fill_undo, slot_check, slots_read
from pyswap.core.pagetable cimport PTE_EMPTY, pte_is_slot, pte_read, pte_slot
from pyswap.core.readahead cimport stream_fell_short
from pyswap.core.region cimport PAGE_MASK, life_is, region_lookup
from pyswap.core.store cimport store_punch, store_write

cdef inline page_id request_page(pool_t *pool, request_t *request, int64_t index) noexcept nogil:
    """The page id at an index; what is asked for too late, or being copied, is as if it were there: not read."""
    cdef uint64_t page = 0
    if not pool.objects[request.object].is_private:
        return pool.objects[request.object].base + <uint64_t>index
    if not region_lookup(pool, request.region, request.region_generation, index, &page):
        return pool.objects[request.object].base + <uint64_t>index
    return page & PAGE_MASK


cdef inline bint is_out(pool_t *pool, object_id o, uint64_t pte) noexcept nogil:
    """Whether a page's bytes are in a slot, or in the file of its object: pages of zeros are not worth asking for."""
    return pte_is_slot(pte) or (pte == PTE_EMPTY and has_file(pool, o))


cdef inline bint is_next(uint64_t pte, slot_id first, int64_t step) noexcept nogil:
    """Whether a page is in the slot that goes on a run; or in a file, where neighbours are neighbours."""
    if first == SLOT_NONE:
        return pte == PTE_EMPTY
    return pte_is_slot(pte) and <int64_t>pte_slot(pte) == <int64_t>first + step


cdef inline uint32_t ahead_claim(
    pool_t *pool, request_t *request, int64_t *index, uint32_t *left, frame_id *frames, bint *short_of
) noexcept nogil:
    """Claim and install frames for a run of pages in neighbouring slots; moves *index and *left past it."""
    cdef uint32_t n = 0
    cdef uint64_t pte, page
    cdef page_id first_page = 0
    cdef frame_id f
    cdef slot_id first_slot = SLOT_NONE
    cdef bint adjacent = request.stride == 1 or request.stride == -1
    short_of[0] = False
    while left[0] and n < pool.header.chunk_pages:
        page = request_page(pool, request, index[0])
        pte = pte_read(pool, page)
        if not is_out(pool, request.object, pte):
            if n:
                break
            index[0] += request.stride
            left[0] -= 1
            continue
        if n and (not adjacent or not is_next(pte, first_slot, <int64_t>n * request.stride)):
            break
        if n and <int64_t>page != <int64_t>first_page + <int64_t>n * request.stride:
            break
        f = frame_claim(pool, pool.header.minimum_frames)
        if f == FRAME_NONE:
            short_of[0] = True
            break
        if fill_install(pool, f, page, <uint64_t>index[0], request.object, request.generation, pte):
            if n == 0:
                first_page = page
                first_slot = pte_slot(pte)
            frames[n] = f
            n += 1
        elif n:
            break
        index[0] += request.stride
        left[0] -= 1
    return n


cdef inline void ahead_undo(pool_t *pool, frame_id f, bint offline) noexcept nogil:
    """Nobody asked for this page yet; who does will meet the error, or not, alone."""
    store_punch(pool, pool.frames[f].page, 1)
    fill_undo(pool, f, offline)


cdef inline void ahead_fill(
    pool_t *pool, frame_id *frames, uint32_t n, bint backwards, uint8_t *buffer
) noexcept nogil:
    """One read for the run, then every page that is as it was written present and unlocked."""
    cdef frame_t *low = &pool.frames[frames[n - 1] if backwards else frames[0]]
    cdef page_id first = low.page
    cdef frame_t *frame
    cdef uint32_t i
    cdef bint offline = False
    cdef int rc
    if low.slot == SLOT_NONE:
        rc = backing_read(pool, low.object, low.index, n, buffer)
    else:
        rc = slots_read(pool, low.slot, n, buffer)
    if rc == 0:
        rc = store_write(pool, first, n, buffer)
        offline = rc != 0
    for i in range(n):
        frame = &pool.frames[frames[i]]
        if rc != 0 or frame.slot != SLOT_NONE and slot_check(
            pool, frame.slot, frame.page, buffer + ((frame.page - first) << pool.page_shift)
        ) != 0:
            ahead_undo(pool, frames[i], offline)
            continue
        # Counted before anybody can find it there, who would look in the numbers for it.
        count(pool, C_READAHEAD_PAGES, 1)
        frame_set_present(pool, frame)
        frame_mark(frame, AHEAD | REFERENCED)
        page_unlock(pool, frame)


cdef inline void ahead_serve(pool_t *pool, request_t *request, uint8_t *buffer) noexcept nogil:
    """Carry out one readahead request, as far as frames are free (R4)."""
    cdef frame_id frames[256]
    cdef uint32_t n, left = request.count
    cdef int64_t index = request.first, pages, room
    cdef bint short_of = False
    if not life_is(&pool.objects[request.object].word, request.generation):
        return
    pages = <int64_t>pool.objects[request.object].pages
    if index < 0 or index >= pages:
        return
    room = (pages - 1 - index) // request.stride if request.stride > 0 else index // -request.stride
    if left > room + 1:
        left = <uint32_t>(room + 1)
    while left and not short_of and load32(&pool.epochs[request.object]) == request.epoch:
        n = ahead_claim(pool, request, &index, &left, frames, &short_of)
        if n:
            failpoint_visit(pool.header, FP_FILL_LOCKED)
            ahead_fill(pool, frames, n, request.stride < 0, buffer)
    if short_of:
        stream_fell_short(pool, request, index)
