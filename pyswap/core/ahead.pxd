"""Readahead requests carried out, as far as frames are free (R4): runs of neighbouring slots, or of a file's pages.

A stream's fault that comes before its request is carried out reads such a run itself.

A page that arrives is resident, unmapped, and marked AHEAD until somebody asks for it.  Pages that nobody has touched
get zeros, if that is what the request is for.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pyswap.core.backing cimport backing_read, has_file
from pyswap.core.context cimport count, pool_t, request_t
from pyswap.core.engine cimport page_unlock
from pyswap.core.frame cimport AHEAD, REFERENCED, frame_claim, frame_mark, frame_set_present
from pyswap.core.layout cimport (
    C_READAHEAD_PAGES,
    C_SLOT_READS,
    FRAME_NONE,
    NO_EXTENT,
    SLOT_NONE,
    frame_id,
    frame_t,
    object_id,
    page_id,
    region_id,
    slot_id,
)
from pyswap.core.lock cimport FP_FILL_LOCKED, failpoint_visit, load32
from pyswap.core.mapping cimport gather_zero
from pyswap.core.page cimport fill_install, fill_undo, slot_check, slots_read, wanted_t
from pyswap.core.pagetable cimport PTE_EMPTY, pte_is_frame, pte_is_slot, pte_read, pte_slot
from pyswap.core.readahead cimport request_begin, row_end, stream_fell_short, way_t
from pyswap.core.region cimport PAGE_MASK, life_drop, life_hold, life_is, region_lookup, region_page
from pyswap.core.store cimport store_punch, store_write
from pyswap.core.stream cimport absolute

cdef enum:
    READ_OVER_BYTES = 1 << 15   # between pages of one read: a read of its own costs as much as some more
    CLUSTER_BYTES = 1 << 17     # read by a fault of a stream itself, where its readahead has not begun

cdef struct rest_t:             # what is left of a request
    int64_t position            # where its next row begins, in bytes
    int64_t taken               # pages of that row that it has come by
    int64_t steps               # rows, that one among them
    int64_t pages               # of the object


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


cdef inline int64_t most_apart(pool_t *pool) noexcept nogil:
    """How many pages one that is read may be from the one before it in the same read."""
    return 1 + (READ_OVER_BYTES >> pool.page_shift)


cdef inline bint is_next(uint64_t pte, slot_id first, int64_t step) noexcept nogil:
    """Whether a page is in the slot that goes on a run; or in a file, where neighbours are neighbours."""
    if first == SLOT_NONE:
        return pte == PTE_EMPTY
    return pte_is_slot(pte) and <int64_t>pte_slot(pte) == <int64_t>first + step


cdef inline int64_t next_page(pool_t *pool, request_t *request, rest_t *rest) noexcept nogil:
    """The index of the page that a request is at: a row's pages come in the direction that its rows do."""
    if request.stride > 0:
        return (rest.position >> pool.page_shift) + rest.taken
    return row_end(pool, rest.position, request.width, rest.pages) - 1 - rest.taken


cdef inline void page_taken(pool_t *pool, request_t *request, rest_t *rest) noexcept nogil:
    rest.taken += 1
    if (rest.position >> pool.page_shift) + rest.taken >= row_end(pool, rest.position, request.width, rest.pages):
        rest.taken = 0
        rest.position += request.stride
        rest.steps -= 1


cdef inline uint32_t ahead_claim(
    pool_t *pool, request_t *request, rest_t *rest, frame_id *frames, bint *short_of
) noexcept nogil:
    """Claim and install frames for pages that one read brings; moves *rest past them.

    Their slots are as far from each other as they are.  Some bytes between them are read over: a read of its own for
    what comes after takes longer.
    """
    cdef uint32_t n = 0
    cdef uint64_t pte, page
    cdef page_id first_page = 0
    cdef frame_id f
    cdef slot_id first_slot = SLOT_NONE
    cdef int64_t index, first = 0, last = 0, way
    short_of[0] = False
    while rest.steps:
        index = next_page(pool, request, rest)
        page = request_page(pool, request, index)
        pte = pte_read(pool, page)
        if is_out(pool, request.object, pte):
            way = index - first
            if n and (not is_next(pte, first_slot, way) or <int64_t>page != <int64_t>first_page + way):
                break
            if n and (absolute(way) >= pool.header.chunk_pages or absolute(index - last) > most_apart(pool)):
                break
            f = frame_claim(pool, pool.header.minimum_frames)
            if f == FRAME_NONE:
                short_of[0] = True
                break
            if fill_install(pool, f, page, <uint64_t>index, request.object, request.generation, pte):
                if n == 0:
                    first = index
                    first_page = page
                    first_slot = pte_slot(pte)
                last = index
                frames[n] = f
                n += 1
        page_taken(pool, request, rest)
    return n


cdef inline void ahead_undo(pool_t *pool, frame_id f, bint offline) noexcept nogil:
    """Nobody asked for this page yet; who does will meet the error, or not, alone."""
    store_punch(pool, pool.frames[f].page, 1)
    fill_undo(pool, f, offline)


cdef inline uint32_t ahead_store(
    pool_t *pool, frame_id *frames, uint32_t n, page_id first, uint8_t *buffer, bint *failed
) noexcept nogil:
    """Write the first of these frames to the store, and those that are its neighbours; returns how many."""
    cdef page_id page = pool.frames[frames[0]].page, end = page
    cdef uint32_t i
    for i in range(1, n):
        if pool.frames[frames[i]].page == page - 1:
            page -= 1
        elif pool.frames[frames[i]].page == end + 1:
            end += 1
        else:
            break
    else:
        i = n
    failed[0] = store_write(pool, page, i, buffer + ((page - first) << pool.page_shift)) != 0
    return i


cdef inline void ahead_fill(
    pool_t *pool, frame_id *frames, uint32_t n, page_id asked, uint8_t *buffer
) noexcept nogil:
    """One read for them all, then every page that is as it was written present and unlocked.

    `asked` is one that a fault waits for, and so is not read ahead; or NO_EXTENT.
    """
    cdef frame_t *low = &pool.frames[frames[0]]
    cdef frame_t *high = &pool.frames[frames[n - 1]]
    cdef frame_t *frame
    cdef page_id first
    cdef uint32_t i, stored = 0
    cdef bint offline = False
    cdef int rc
    failpoint_visit(pool.header, FP_FILL_LOCKED)
    if low.page > high.page:
        low, high = high, low
    first = low.page
    if low.slot == SLOT_NONE:
        rc = backing_read(pool, low.object, low.index, <uint32_t>(high.page - first) + 1, buffer)
    else:
        rc = slots_read(pool, low.slot, <uint32_t>(high.page - first) + 1, buffer)
        if rc == 0:
            count(pool, C_SLOT_READS, n)
    for i in range(n):
        frame = &pool.frames[frames[i]]
        if rc == 0 and i == stored:
            stored += ahead_store(pool, frames + i, n - i, first, buffer, &offline)
        if rc != 0 or offline or frame.slot != SLOT_NONE and slot_check(
            pool, frame.slot, frame.page, buffer + ((frame.page - first) << pool.page_shift)
        ) != 0:
            ahead_undo(pool, frames[i], offline)
            continue
        # Counted before anybody can find it there, who would look in the numbers for it.
        if frame.page != asked:
            count(pool, C_READAHEAD_PAGES, 1)
        frame_set_present(pool, frame)
        frame_mark(frame, REFERENCED if frame.page == asked else AHEAD | REFERENCED)
        page_unlock(pool, frame)


cdef inline void ahead_zero(pool_t *pool, request_t *request) noexcept nogil:
    """Give memory to pages that nobody has touched, as a fault would."""
    cdef frame_id frames[257]   # a fault's page, and its neighbours
    cdef uint32_t n, i
    cdef wanted_t want
    if not life_hold(&pool.regions[request.region].word, request.region_generation):
        return
    want.object = request.object
    want.object_generation = request.generation
    want.index = <uint64_t>(request.first >> pool.page_shift)
    want.page = region_page(pool, request.region, <int64_t>want.index) & PAGE_MASK
    n = gather_zero(pool, &want, request.region, request.count, True, frames)
    for i in range(n):
        frame_mark(&pool.frames[frames[i]], REFERENCED)
        page_unlock(pool, &pool.frames[frames[i]])
    life_drop(&pool.regions[request.region].word)


cdef inline bint rest_begin(pool_t *pool, request_t *request, rest_t *rest) noexcept nogil:
    """What is to be read of a request; False: nothing."""
    cdef int64_t end, room
    rest.position = request.first
    rest.taken = 0
    rest.pages = <int64_t>pool.objects[request.object].pages
    end = rest.pages << pool.page_shift
    if rest.position < 0 or rest.position >= end:
        return False
    room = (end - 1 - rest.position) // request.stride if request.stride > 0 else rest.position // -request.stride
    rest.steps = min(<int64_t>request.count, room + 1)
    return True


cdef inline void ahead_serve(pool_t *pool, request_t *request, uint8_t *buffer) noexcept nogil:
    """Carry out one readahead request, as far as frames are free (R4)."""
    cdef frame_id frames[256]
    cdef uint32_t n
    cdef rest_t rest
    cdef bint short_of = False
    if not life_is(&pool.objects[request.object].word, request.generation):
        return
    if request.zeros:
        if load32(&pool.epochs[request.object]) == request.epoch:
            ahead_zero(pool, request)
        return
    if not rest_begin(pool, request, &rest):
        return
    while rest.steps and not short_of and load32(&pool.epochs[request.object]) == request.epoch:
        n = ahead_claim(pool, request, &rest, frames, &short_of)
        if n:
            ahead_fill(pool, frames, n, NO_EXTENT, buffer)
    if short_of:
        stream_fell_short(pool, request, rest.position)


cdef inline uint32_t cluster_pages(pool_t *pool) noexcept nogil:
    return max(<uint32_t>(CLUSTER_BYTES >> pool.page_shift), <uint32_t>1)


cdef inline bint cluster_read(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, page_id page, way_t *way, uint8_t *buffer
) noexcept nogil:
    """A stream's fault has overtaken its readahead: bring its page, and what follows, in one read.

    False: it has not come so; it is there, or on its way, no frame is to spare, or it could not be read.
    """
    cdef request_t request
    cdef rest_t rest
    cdef frame_id frames[32]
    cdef bint short_of = False
    cdef uint32_t n
    if not is_out(pool, pool.regions[r].object, pte_read(pool, page)):
        return False
    request_begin(pool, &request, r, generation, way.direction * <int64_t>pool.page_bytes)
    request.first = index << pool.page_shift
    request.count = min(way.window, cluster_pages(pool))
    if not rest_begin(pool, &request, &rest):
        return False
    n = ahead_claim(pool, &request, &rest, frames, &short_of)
    if n == 0:
        return False
    ahead_fill(pool, frames, n, page, buffer)
    return pte_is_frame(pte_read(pool, page))
