"""The life of a copy on write: a page of several regions becomes this region's own, before it is written.

    1 copy_start    page id, frame and bytes; the map names the copy, COPYING; the attendant has its order
    2 attendant     maps the run in its process, registers it, answers
    3 run_settle    COPYING ends, the copy is mapped writable and its writer woken, the old reference is given up

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
from pyswap.core.family cimport family_look_again, page_drop, page_is_shared
from pyswap.core.frame cimport frame_pin, frame_sleep, frame_trylock, frame_unpin
from pyswap.core.layout cimport (
    C_COW_REMAPS,
    C_POISONED,
    MAX_COPIES,
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
from pyswap.core.pagetable cimport pte_frame, pte_read
from pyswap.core.region cimport (
    COPYING,
    break_at,
    gate_enter,
    gate_leave,
    life_drop,
    life_generation,
    life_hold,
    region_page,
)
from pyswap.core.run cimport run_copy, run_t, run_unlock

cdef extern from *:
    int EAGAIN
    int ESRCH

# A copy's word: the state in bits 0-1, once ordered the worker in bits 2-9, a generation in bits 32-63.
cdef enum:
    COPY_FREE = 0
    COPY_MAKING = 1
    COPY_ORDERED = 2
    COPY_ENDING = 3
    COPY_STATES = 3

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


cdef inline frame_t *pinned_frame(pool_t *pool, page_id page) noexcept nogil:
    return &pool.frames[pte_frame(pte_read(pool, page))]


cdef inline frame_t *pinned_lock(pool_t *pool, page_id page) noexcept nogil:
    """Lock a pinned page: it is resident, and nobody does I/O on it, so this waits briefly.  Nothing is held."""
    cdef frame_t *frame = pinned_frame(pool, page)
    while not frame_trylock(frame):
        frame_sleep(frame, load64(&frame.word), 100_000_000)
    return frame


cdef inline uint32_t run_map(pool_t *pool, copy_t *c, uint32_t k, uint32_t n, frame_id *copies) noexcept nogil:
    """Map locked copies writable, as far as no fork has shared them since; returns how many."""
    cdef region_t *region = &pool.regions[c.region]
    cdef uint32_t mine = 0
    if not gate_enter(region):
        return 0
    while mine < n and not page_is_shared(pool, region.object, c.page + k + mine):
        mine += 1
    if mine and map_run(pool, c.region, c.generation, c.index + k, copies, mine, True) != 0:
        mine = 0
    gate_leave(region)
    return mine


cdef inline uint32_t run_settle(pool_t *pool, copy_t *c, uint32_t k, int rc) noexcept nogil:
    """Pages of an answered run, from its k-th on; returns how many.  Its region is held."""
    cdef object_id o = pool.regions[c.region].object
    cdef frame_id copies[64]
    cdef frame_t *frame = pinned_lock(pool, c.page + k)
    cdef uint32_t n = 0, mapped = 0, i
    while True:
        copies[n] = <frame_id>(frame - pool.frames)
        n += 1
        if k + n == c.count:
            break
        frame = pinned_frame(pool, c.page + k + n)
        if not frame_trylock(frame):
            break
    for i in range(n):
        # The pin ends last: a fork that met the page unpinned, and the copy in the map yet, would share it.
        map_put(pool, c.region, c.index + k + i, c.page + k + i if rc == 0 else c.old[k + i])
        frame_unpin(pool, &pool.frames[copies[i]], True)
    if rc == 0:
        mapped = run_map(pool, c, k, n, copies)
    for i in range(n):
        page_unlock(pool, &pool.frames[copies[i]])
    if rc != 0 and rc != -ESRCH and k == 0:
        # The attendant has said so, and poisoned the run.
        count(pool, C_POISONED, 1)
    for i in range(n):
        if i >= mapped:
            engine_wake(pool, c.region, c.generation, c.index + k + i)
        page_forget(pool, o, c.old[k + i] if rc == 0 else c.page + k + i)
    return n


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
        k = c.done
        while k < c.count:
            k += run_settle(pool, c, k, rc)
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
