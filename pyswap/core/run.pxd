"""A run of copies: the bytes of consecutive pages that regions share, under page ids of their own.

    1 run_install   page ids and frames, as many as are to be had without waiting
    2 copies_fill   the bytes, written to the store in one call

The old page that is asked for is locked by the caller; those behind it are taken by trylock, since others are held.
A page that is pinned is copied alone, for a fork.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport count, pool_t
from pyswap.core.engine cimport page_unlock
from pyswap.core.family cimport commit_give, commit_take, page_drop, page_is_shared, page_take
from pyswap.core.frame cimport (
    frame_claim,
    frame_claim_wait,
    frame_set_dirty,
    frame_set_present,
    frame_sleep,
    frame_trylock,
)
from pyswap.core.kernel cimport iovec
from pyswap.core.layout cimport (
    C_COW_COPIES,
    FRAME_NONE,
    NO_EXTENT,
    frame_id,
    frame_t,
    object_id,
    page_id,
    region_id,
    region_t,
)
from pyswap.core.lock cimport load64, now_ns
from pyswap.core.page cimport STARVED, fill_install, fill_undo, frame_give_back, memory_ask
from pyswap.core.pagetable cimport PTE_EMPTY, pte_frame, pte_is_frame, pte_read
from pyswap.core.region cimport COPYING, PAGE_MASK, region_page
from pyswap.core.store cimport store_punch, store_unmap, store_write_from

cdef extern from *:
    int EAGAIN
    int ENOMEM
    int ENOSPC

cdef enum:
    EARLY_COPY_WAIT_NS = 1_000_000_000

# A run of copies under way: old and new frames, all locked; the first old one is the caller's.
cdef struct run_t:
    uint32_t count
    frame_id old[64]
    frame_id new[64]
    page_id page


cdef inline int copy_install(
    pool_t *pool, object_id o, uint32_t generation, int64_t index, page_id wanted, frame_id g, page_id *made
) noexcept nogil:
    """Make a claimed frame that of a copy, under a page id of its own; else the frame is given back.

    -ENOSPC: frames and swap hold no more pages.  -EAGAIN: no page id is free.
    """
    if not commit_take(pool, 1):
        frame_give_back(pool, g)
        return -ENOSPC
    if not page_take(pool, o, index, wanted, made):
        commit_give(pool, 1)
        frame_give_back(pool, g)
        return -EAGAIN
    if not fill_install(pool, g, made[0], <uint64_t>index, o, generation, PTE_EMPTY):
        page_drop(pool, o, made[0])
        return -EAGAIN
    return 0


cdef inline void copy_undo(pool_t *pool, object_id o, frame_id g, bint offline) noexcept nogil:
    cdef page_id page = pool.frames[g].page
    store_punch(pool, page, 1)
    fill_undo(pool, g, offline)
    page_drop(pool, o, page)


cdef inline int bytes_copy(pool_t *pool, uint32_t n, frame_id *old, page_id first) noexcept nogil:
    """Write the bytes of locked pages to the store, where consecutive pages begin with the first."""
    cdef iovec pieces[64]
    cdef uint32_t k
    for k in range(n):
        pieces[k].iov_base = pool.store + (pool.frames[old[k]].page << pool.page_shift)
        pieces[k].iov_len = pool.page_bytes
    return store_write_from(pool, first, pieces, <int>n)


cdef inline uint32_t copies_fill(
    pool_t *pool, object_id o, uint32_t n, frame_id *old, frame_id *new
) noexcept nogil:
    """The bytes of locked pages for their installed copies, of consecutive page ids, in one call.

    Returns how many copies are there, present, dirty and locked: all, or where memory is short the first, or none.
    """
    cdef page_id first = pool.frames[new[0]].page
    cdef uint32_t k, fewer
    while n and bytes_copy(pool, n, old, first) != 0:
        memory_ask(pool)
        fewer = 1 if n > 1 else 0
        for k in range(fewer, n):
            # One has no memory, as far as is known.
            copy_undo(pool, o, new[k], k == fewer)
        n = fewer
    if n > 1 and pool.frames[old[n - 1]].page == pool.frames[old[0]].page + (n - 1):
        store_unmap(pool, pool.frames[old[0]].page, n)
    for k in range(n):
        frame_set_present(pool, &pool.frames[new[k]])
        frame_set_dirty(pool, &pool.frames[new[k]])
    count(pool, C_COW_COPIES, n)
    return n


cdef inline int page_copy_early(
    pool_t *pool, region_id r, int64_t index, page_id page, uint64_t *copy
) noexcept nogil:
    """A pinned page's copy for the clone, made while its owner may go on writing.

    -EAGAIN: the copy that it was did not come about, and the map has the page before it again.
    """
    cdef region_t *region = &pool.regions[r]
    cdef uint64_t deadline = now_ns() + EARLY_COPY_WAIT_NS
    cdef frame_id g = frame_claim_wait(pool, deadline), source = 0
    cdef frame_t *frame
    cdef page_id made = 0
    cdef uint64_t pte, word
    cdef int rc
    if g == FRAME_NONE:
        return -ENOMEM
    while True:
        pte = pte_read(pool, page)
        # The page id may be another region's by then.
        if not pte_is_frame(pte) or region_page(pool, r, index) & PAGE_MASK != page:
            frame_give_back(pool, g)
            return -EAGAIN
        source = pte_frame(pte)
        frame = &pool.frames[source]
        word = load64(&frame.word)
        if not frame_trylock(frame):
            frame_sleep(frame, word, 100_000_000)
        elif pte_read(pool, page) == pte and region_page(pool, r, index) & PAGE_MASK == page:
            break
        else:
            page_unlock(pool, frame)
    rc = copy_install(pool, region.object, region.object_generation, index, NO_EXTENT, g, &made)
    if rc == 0 and copies_fill(pool, region.object, 1, &source, &g) == 0:
        rc = -EAGAIN
    page_unlock(pool, frame)
    if rc == 0:
        page_unlock(pool, &pool.frames[g])
        copy[0] = made
    return rc


cdef inline page_id page_beside(pool_t *pool, region_id r, int64_t index) noexcept nogil:
    """The page id that would make a copy one mapping with the page before it."""
    if index == 0:
        return NO_EXTENT
    return (region_page(pool, r, index - 1) & PAGE_MASK) + 1


cdef inline bint neighbour_shared(
    pool_t *pool, region_id r, int64_t index, frame_id *got
) noexcept nogil:
    """Lock a resident page that is to be copied with the one before it; a trylock, since others are held."""
    cdef uint64_t page = region_page(pool, r, index), pte
    cdef frame_t *frame
    if page & COPYING:
        return False
    pte = pte_read(pool, page)
    if not pte_is_frame(pte):
        return False
    frame = &pool.frames[pte_frame(pte)]
    if not frame_trylock(frame):
        return False
    # Asked under the lock: one that is not shared any more may have been mapped writable, or pinned.
    if pte_read(pool, page) != pte or region_page(pool, r, index) != page or not page_is_shared(
        pool, pool.regions[r].object, page
    ):
        page_unlock(pool, frame)
        return False
    got[0] = pte_frame(pte)
    return True


cdef inline int run_install(
    pool_t *pool, region_id r, int64_t index, uint32_t limit, frame_id *spare, run_t *run
) noexcept nogil:
    """Frames for copies of a locked page and of what follows it, as far as none must be waited for."""
    cdef region_t *region = &pool.regions[r]
    cdef page_id made = 0, wanted = page_beside(pool, r, index)
    cdef frame_id g = spare[0]
    cdef int rc
    if g == FRAME_NONE:
        g = frame_claim(pool, 0)
    spare[0] = <frame_id>FRAME_NONE
    if g == FRAME_NONE:
        return STARVED
    while True:
        run.new[run.count] = g
        rc = copy_install(pool, region.object, region.object_generation, index + run.count, wanted, g, &made)
        if rc == -EAGAIN and run.count == 0 and wanted != NO_EXTENT:
            wanted = NO_EXTENT
            g = frame_claim(pool, 0)
            if g == FRAME_NONE:
                return STARVED
            continue
        if rc != 0:
            break
        if run.count == 0:
            run.page = made
        run.count += 1
        if run.count == limit or index + run.count >= <int64_t>region.pages:
            return 0
        if not neighbour_shared(pool, r, index + run.count, &run.old[run.count]):
            return 0
        wanted = run.page + run.count
        g = frame_claim(pool, pool.header.minimum_frames)
        if g == FRAME_NONE:
            break
    if run.count == 0:
        return rc
    page_unlock(pool, &pool.frames[run.old[run.count]])
    return 0


cdef inline int run_copy(
    pool_t *pool, region_id r, int64_t index, uint32_t limit, frame_id first, frame_id *spare, run_t *run
) noexcept nogil:
    """Copies of a locked page and of what follows it, to consecutive page ids; -errno or STARVED: of none."""
    cdef uint32_t k, wanted
    cdef int rc
    run.count = 0
    run.old[0] = first
    rc = run_install(pool, r, index, limit, spare, run)
    if rc != 0:
        return rc
    wanted = run.count
    run.count = copies_fill(pool, pool.regions[r].object, wanted, run.old, run.new)
    for k in range(max(run.count, <uint32_t>1), wanted):
        page_unlock(pool, &pool.frames[run.old[k]])
    return 0 if run.count else -EAGAIN


cdef inline void run_unlock(pool_t *pool, run_t *run) noexcept nogil:
    cdef uint32_t k
    for k in range(run.count):
        page_unlock(pool, &pool.frames[run.new[k]])
        if k:
            page_unlock(pool, &pool.frames[run.old[k]])
