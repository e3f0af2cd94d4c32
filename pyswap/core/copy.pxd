"""The life of a copy on write: a page of several regions becomes this region's own, before it is written.

    1 copy_start    page id, frame and bytes; the map names the copy, COPYING; the attendant has its order
    2 attendant     maps the run in its process, registers it, answers
    3 copy_settle   COPYING ends, the copy is mapped writable and its writer woken, the old reference is given up

Who may interleave, and what stops it:
 - a fault at an index that is COPYING: the address maps the old page yet, or is out of sight: it is left alone, and
   the wake-up of step 3 lets it happen again.  A read meanwhile sees the old page, which nobody may write (R10)
 - an eviction of the copy between 2 and 3, when the mapping cannot be protected: it is pinned (R11)
 - a fork in between: it copies pinned pages early (R11)
 - an eviction of the old page: it is protected in this region since it was first shared
 - the end of the region: region_end() gives up what no answer will come for
 - a stopped worker: its copies wait for it, and nothing else does
"""
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from pyswap.core.context cimport count, pool_t
from pyswap.core.engine cimport engine_remap, engine_wake, page_unlock
from pyswap.core.evict cimport pages_sweep
from pyswap.core.family cimport (
    commit_give,
    commit_take,
    family_look_again,
    page_drop,
    page_is_shared,
    page_take,
)
from pyswap.core.frame cimport (
    frame_claim,
    frame_pin,
    frame_set_dirty,
    frame_set_present,
    frame_sleep,
    frame_trylock,
    frame_unpin,
)
from pyswap.core.layout cimport (
    C_COW_COPIES,
    C_COW_REMAPS,
    C_POISONED,
    FRAME_NONE,
    MAX_COPIES,
    NO_EXTENT,
    copy_t,
    frame_id,
    frame_t,
    object_id,
    page_id,
    region_id,
    region_t,
    worker_id,
)
from pyswap.core.lock cimport (
    FP_COPY_ANSWERED,
    FP_COPY_MADE,
    FP_COPY_ORDERED,
    FP_MAP_PUT,
    add32,
    addi64,
    cas64,
    failpoint_visit,
    futex_wait,
    futex_wake,
    load32,
    load64,
    store32,
    store64,
)
from pyswap.core.mapping cimport add_mapper, frame_used, map_run
from pyswap.core.page cimport STARVED, fill_install, fill_undo, frame_give_back, memory_ask
from pyswap.core.pagetable cimport PTE_EMPTY, pte_frame, pte_is_frame, pte_read
from pyswap.core.region cimport (
    COPYING,
    PAGE_MASK,
    break_at,
    gate_enter,
    gate_leave,
    life_drop,
    life_generation,
    life_hold,
    region_page,
)
from pyswap.core.store cimport store_punch, store_write

cdef extern from *:
    int EAGAIN
    int ENOSPC
    int ESRCH

# A copy's word: the state in bits 0-1, once ordered the worker in bits 2-9, a generation in bits 32-63.
cdef enum:
    COPY_FREE = 0
    COPY_MAKING = 1
    COPY_ORDERED = 2
    COPY_ENDING = 3
    COPY_STATES = 3

# A run of copies under way: old and new frames, all locked; the first old one is the caller's.
cdef struct run_t:
    uint32_t count
    frame_id old[64]
    frame_id new[64]
    page_id page


cdef inline copy_t *copy_claim(pool_t *pool) noexcept nogil:
    """A free record, or NULL where every one waits for an attendant."""
    cdef uint32_t i, at = add32(&pool.copies_next, 1)
    cdef copy_t *c
    cdef uint64_t word
    for i in range(<uint32_t>MAX_COPIES):
        c = &pool.copies[(at + i) % MAX_COPIES]
        word = load64(&c.word)
        if word & COPY_STATES == COPY_FREE and cas64(&c.word, word, word | COPY_MAKING):
            return c
    return NULL


cdef inline uint64_t copy_name(pool_t *pool, copy_t *c) noexcept nogil:
    """What an answer calls it: the record, and its generation."""
    return (load64(&c.word) >> 32 << 32) | <uint64_t>(c - &pool.copies[0])


cdef inline void copy_release(pool_t *pool, copy_t *c) noexcept nogil:
    store32(&c.count, 0)
    store64(&c.word, ((load64(&c.word) >> 32) + 1) << 32)
    add32(&pool.copied_sequence, 1)
    futex_wake(&pool.copied_sequence, 0x7FFFFFFF)


cdef inline void copy_recover(copy_t *c, uint32_t pending) noexcept nogil:
    """After a swapper's death: the last pages of a run wait for an answer under a new name; none: a free record."""
    cdef uint64_t word = ((load64(&c.word) >> 32) + 1) << 32
    if pending == 0:
        store32(&c.count, 0)
    store32(&c.done, c.count - pending)
    store64(&c.word, word | COPY_ORDERED | <uint64_t>c.worker << 2 if pending else word)


cdef inline int copy_make(
    pool_t *pool, object_id o, uint32_t generation, int64_t index, page_id source, page_id wanted, frame_id g,
    page_id *made
) noexcept nogil:
    """Copy a locked page into a claimed frame, which is present, dirty and locked then; else it is given back.

    -ENOSPC: frames and swap hold no more pages.  -EAGAIN: no page id is free, or no memory for the frame.
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
    if store_write(pool, made[0], 1, pool.store + (source << pool.page_shift)) != 0:
        store_punch(pool, made[0], 1)
        fill_undo(pool, g, True)
        memory_ask(pool)
        page_drop(pool, o, made[0])
        return -EAGAIN
    frame_set_present(pool, &pool.frames[g])
    frame_set_dirty(pool, &pool.frames[g])
    count(pool, C_COW_COPIES, 1)
    return 0


cdef inline void map_put(pool_t *pool, region_id r, int64_t index, uint64_t entry) noexcept nogil:
    """Change one entry of a map, and count the mappings that it takes."""
    cdef uint64_t *map = pool.maps[r]
    cdef region_t *region = &pool.regions[r]
    cdef int64_t pages = <int64_t>region.pages
    cdef int before = break_at(map, index, pages) + break_at(map, index + 1, pages), after
    # Before the entry: who finds the map plain has it so.
    store32(&region.is_plain, 0)
    store64(&map[index], entry)
    failpoint_visit(pool.header, FP_MAP_PUT)
    after = break_at(map, index, pages) + break_at(map, index + 1, pages)
    add32(&region.breaks, <uint32_t>(after - before))
    addi64(&pool.attached[region.worker].breaks, after - before)


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
    if page & COPYING or not page_is_shared(pool, pool.regions[r].object, page):
        return False
    pte = pte_read(pool, page)
    if not pte_is_frame(pte):
        return False
    frame = &pool.frames[pte_frame(pte)]
    if not frame_trylock(frame):
        return False
    if pte_read(pool, page) != pte or region_page(pool, r, index) != page:
        page_unlock(pool, frame)
        return False
    got[0] = pte_frame(pte)
    return True


cdef inline int run_copy(
    pool_t *pool, region_id r, int64_t index, uint32_t limit, frame_id first, frame_id *spare, run_t *run
) noexcept nogil:
    """Copies of a locked page and of what follows it, to consecutive page ids, as far as none must be waited for."""
    cdef region_t *region = &pool.regions[r]
    cdef page_id made = 0, wanted = page_beside(pool, r, index)
    cdef frame_id g = spare[0]
    cdef int rc
    run.count = 0
    if g == FRAME_NONE:
        g = frame_claim(pool, 0)
    spare[0] = <frame_id>FRAME_NONE
    if g == FRAME_NONE:
        return STARVED
    run.old[0] = first
    while True:
        run.new[run.count] = g
        rc = copy_make(pool, region.object, region.object_generation, index + run.count,
                       pool.frames[run.old[run.count]].page, wanted, g, &made)
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
        g = frame_claim(pool, pool.header.low_frames)
        if g == FRAME_NONE:
            break
    if run.count == 0:
        return rc
    page_unlock(pool, &pool.frames[run.old[run.count]])
    return 0


cdef inline void run_unlock(pool_t *pool, run_t *run) noexcept nogil:
    cdef uint32_t k
    for k in range(run.count):
        page_unlock(pool, &pool.frames[run.new[k]])
        if k:
            page_unlock(pool, &pool.frames[run.old[k]])


cdef inline void page_forget(pool_t *pool, object_id o, page_id page) noexcept nogil:
    """Give up a reference; the last one's page goes, now or when whoever holds it is done."""
    if page_drop(pool, o, page) and pages_sweep(pool, o, page, 1):
        family_look_again(pool, o)


cdef inline int copy_start(
    pool_t *pool, region_id r, int64_t index, uint32_t limit, frame_id first, frame_id *spare
) noexcept nogil:
    """Have a locked page copied for a region, which is held and whose gate is entered.

    0: the attendant has its order; STARVED, -ENOSPC, or -EAGAIN: nothing has changed.  The page stays locked.
    """
    cdef region_t *region = &pool.regions[r]
    cdef copy_t *c = copy_claim(pool)
    cdef run_t run
    cdef uint32_t k
    cdef int rc
    if c == NULL:
        return -EAGAIN
    rc = run_copy(pool, r, index, limit, first, spare, &run)
    if rc != 0:
        copy_release(pool, c)
        return rc
    failpoint_visit(pool.header, FP_COPY_MADE)
    # Whole before the map says COPYING: a takeover tells by the two together what is under way.
    c.region = r
    c.generation = life_generation(&region.word)
    c.index = index
    c.worker = region.worker
    c.page = run.page
    for k in range(run.count):
        c.old[k] = region_page(pool, r, index + k)
    c.done = 0
    store32(&c.count, run.count)
    k = run.count
    # From the end on: what is under way is always the last pages of a run.
    while k:
        k -= 1
        add_mapper(pool, &pool.frames[run.new[k]], region.worker)
        frame_used(pool, &pool.frames[run.new[k]])
        frame_pin(pool, &pool.frames[run.new[k]], True)
        map_put(pool, r, index + k, (run.page + k) | COPYING)
    store64(&c.word, (load64(&c.word) & ~<uint64_t>COPY_STATES) | COPY_ORDERED | <uint64_t>region.worker << 2)
    if engine_remap(pool, region, index, run.count, run.page, copy_name(pool, c)):
        count(pool, C_COW_REMAPS, 1)
        failpoint_visit(pool.header, FP_COPY_ORDERED)
    else:
        rc = -EAGAIN
        for k in range(run.count):
            map_put(pool, r, index + k, c.old[k])
            frame_unpin(pool, &pool.frames[run.new[k]], True)
    run_unlock(pool, &run)
    if rc != 0:
        for k in range(run.count):
            page_forget(pool, region.object, run.page + k)
        copy_release(pool, c)
    return rc


cdef inline frame_t *pinned_lock(pool_t *pool, page_id page) noexcept nogil:
    """Lock a pinned page: it is resident, and nobody does I/O on it, so this waits briefly.  Nothing is held."""
    cdef frame_t *frame = &pool.frames[pte_frame(pte_read(pool, page))]
    while not frame_trylock(frame):
        frame_sleep(frame, load64(&frame.word), 100_000_000)
    return frame


cdef inline void copy_settle(pool_t *pool, copy_t *c, uint32_t k, int rc) noexcept nogil:
    """One page of an answered run; its region is held."""
    cdef region_t *region = &pool.regions[c.region]
    cdef page_id page = c.page + k, dropped = c.old[k]
    cdef int64_t index = c.index + k
    cdef frame_t *frame = pinned_lock(pool, page)
    cdef frame_id f = <frame_id>(frame - pool.frames)
    cdef bint mapped = False
    frame_unpin(pool, frame, True)
    if rc != 0:
        map_put(pool, c.region, index, dropped)
        dropped = page
    else:
        map_put(pool, c.region, index, page)
        if gate_enter(region):
            if not page_is_shared(pool, region.object, page):
                mapped = map_run(pool, c.region, c.generation, index, &f, 1, True) == 0
            gate_leave(region)
    page_unlock(pool, frame)
    if rc != 0 and rc != -ESRCH and k == 0:
        # The attendant has said so, and poisoned the run.
        count(pool, C_POISONED, 1)
    if not mapped:
        engine_wake(pool, c.region, c.generation, index)
    page_forget(pool, region.object, dropped)


cdef inline void copy_abandon(pool_t *pool, copy_t *c) noexcept nogil:
    """A run whose region has ended: the references of the copies go with its map, those of the old pages here."""
    cdef object_id o = pool.regions[c.region].object
    cdef uint32_t k
    cdef frame_t *frame
    for k in range(c.done, c.count):
        frame = pinned_lock(pool, c.page + k)
        frame_unpin(pool, frame, True)
        page_unlock(pool, frame)
        page_forget(pool, o, c.old[k])


cdef inline void copy_answered(pool_t *pool, worker_id worker, uint64_t copy, int32_t rc) noexcept nogil:
    """The attendant has mapped a run, or could not; of another worker's runs nobody may tell."""
    cdef copy_t *c = &pool.copies[copy % MAX_COPIES]
    cdef uint64_t word = copy >> 32 << 32 | <uint64_t>worker << 2
    cdef uint32_t k
    if not pool.copies_ready or not cas64(&c.word, word | COPY_ORDERED, word | COPY_ENDING):
        return
    failpoint_visit(pool.header, FP_COPY_ANSWERED)
    if life_hold(&pool.regions[c.region].word, c.generation):
        for k in range(c.done, c.count):
            copy_settle(pool, c, k, rc)
        life_drop(&pool.regions[c.region].word)
    else:
        copy_abandon(pool, c)
    copy_release(pool, c)


cdef inline bint copies_wait(pool_t *pool, worker_id worker) noexcept nogil:
    """Whether a copy waits for a worker's attendant."""
    cdef uint64_t word
    cdef uint32_t i
    if pool.copies_ready:
        for i in range(<uint32_t>MAX_COPIES):
            word = load64(&pool.copies[i].word)
            if word & COPY_STATES == COPY_ORDERED and pool.copies[i].worker == worker:
                return True
    return False


cdef inline void copies_end(pool_t *pool, region_id r) noexcept nogil:
    """Give up the copies of a region that has ended; returns when none is under way any more."""
    cdef uint32_t i, sequence
    cdef copy_t *c
    cdef uint64_t word
    for i in range(<uint32_t>MAX_COPIES):
        c = &pool.copies[i]
        while True:
            sequence = load32(&pool.copied_sequence)
            word = load64(&c.word)
            if word & COPY_STATES == COPY_FREE or word & COPY_STATES == COPY_MAKING or c.region != r:
                break
            if word & COPY_STATES == COPY_ORDERED and cas64(&c.word, word, word | COPY_ENDING):
                copy_abandon(pool, c)
                copy_release(pool, c)
                break
            futex_wait(&pool.copied_sequence, sequence, 1_000_000)
