"""A page's frame, locked and resident: by locking it, by filling it, or by leaving word.

    fill_*          install a claimed frame, read and check its slot, put the bytes into the store
    page_acquire    what faults, pins and unpins come through

Who may interleave, and what stops it:
 - two fills of one page: the compare-and-swap of the entry; the loser frees its frame and starts again
 - an eviction between reading the entry and locking: the entry is read again under the lock
 - the end of the object, or of the page's last reference: R7
 - somebody else who fills or evicts the page: the caller leaves word, or sleeps for the lock
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyswap.core.backing cimport backing_read, has_file
from pyswap.core.context cimport count, pool_t
from pyswap.core.engine cimport engine_wake_waiters, page_unlock
from pyswap.core.family cimport page_lives, page_place
from pyswap.core.frame cimport (
    frame_claim,
    frame_claim_wait,
    frame_set_free,
    frame_set_offline,
    frame_set_present,
    frame_sleep,
    frame_trylock,
    frame_wait_for,
    reclaim_kick,
    waiters_t,
)
from pyswap.core.kernel cimport file_transfer, iovec
from pyswap.core.layout cimport (
    C_CHECKSUM_ERRORS,
    C_FILL_WAITS,
    C_READ_CALLS,
    C_READ_ERRORS,
    C_SLOT_READS,
    FRAME_NONE,
    SLOT_NONE,
    frame_id,
    frame_t,
    object_id,
    page_id,
    slot_id,
    worker_id,
)
from pyswap.core.lock cimport (
    FP_ENTRY_READ,
    FP_FILL_LOCKED,
    FP_FILL_READ,
    add64,
    failpoint_visit,
    futex_wait,
    load32,
    load64,
    now_ns,
    store32,
)
from pyswap.core.pagetable cimport (
    pte_change,
    pte_frame,
    pte_is_frame,
    pte_make_frame,
    pte_make_slot,
    pte_read,
    pte_slot,
)
from pyswap.core.policy cimport refault_note
from pyswap.core.region cimport life_is
from pyswap.core.store cimport store_allocate, store_punch, store_write
from pyswap.core.swapmap cimport slot_area, slot_holds, slot_offset

cdef extern from *:
    int EBADMSG
    int EIO
    int ENOENT
    int EAGAIN
    int ENOMEM

cdef enum:
    READ_TRIES = 3
    MAX_ROUNDS = 100000         # restarts of one fault: each means that somebody else made progress


cdef enum acquired:
    ACQUIRED = 0
    NOTED = 1                   # somebody else has the page; the worker will be woken
    STARVED = 2                 # no frame is free, and the caller does not wait for one
    STALE = 3                   # the page id is nobody's any more: the region's map has another


cdef struct wanted_t:
    object_id object
    uint32_t object_generation
    page_id page
    uint64_t index
    worker_id worker            # noted where the page is locked
    bint sleeps                 # sleep for the lock instead (not in a fault thread)
    bint patient                # wait for a free frame
    frame_id spare              # claimed already, by who waited for one to copy the page; or FRAME_NONE
    uint8_t *buffer             # of a page or, in a fault, a cluster; aligned for O_DIRECT: this thread's own
    bint filled                 # out: it was not resident
    bint read                   # out: and came from a slot, or the object's file
    int error                   # out: the errno for which its slot could not be read, with -EIO; else 0
    uint32_t area               # out: the swap area of that slot
    uint64_t deadline_ns


cdef inline bint page_is_pinned(pool_t *pool, page_id page) noexcept nogil:
    """For a page whose region's gate is shut: a pin may end meanwhile, and none begins."""
    cdef uint64_t pte = pte_read(pool, page)
    return pte_is_frame(pte) and pool.frames[pte_frame(pte)].pins != 0 and pool.frames[pte_frame(pte)].page == page


cdef inline void fill_undo(pool_t *pool, frame_id f, bint offline) noexcept nogil:
    """Put the page back where it was.  The entry may be wiped meanwhile, when its object was swept."""
    cdef frame_t *frame = &pool.frames[f]
    cdef waiters_t waiters
    pte_change(pool, frame.page, pte_make_frame(f), pte_make_slot(frame.slot))
    if offline:
        frame_set_offline(pool, f, &waiters)
    else:
        frame_set_free(pool, f, &waiters)
    engine_wake_waiters(pool, &waiters)


cdef inline void memory_ask(pool_t *pool) noexcept nogil:
    """Have reclaim evict pages though frames are free: those have no memory, and the pages have."""
    store32(&pool.memory_short, 1)
    reclaim_kick(pool)


cdef inline void frame_give_back(pool_t *pool, frame_id f) noexcept nogil:
    """Free a claimed frame that was not installed."""
    cdef waiters_t waiters
    frame_set_free(pool, f, &waiters)
    engine_wake_waiters(pool, &waiters)


cdef inline void spare_give_back(pool_t *pool, wanted_t *want) noexcept nogil:
    """Nobody waits while holding a frame that others wait for."""
    if want.spare != FRAME_NONE:
        frame_give_back(pool, want.spare)
        want.spare = <frame_id>FRAME_NONE


cdef inline frame_id fill_claim(pool_t *pool, wanted_t *want) noexcept nogil:
    """A frame for a fill: the one held for a copy, where the page has left meanwhile."""
    cdef frame_id f = want.spare
    if f != FRAME_NONE:
        want.spare = <frame_id>FRAME_NONE
        return f
    return frame_claim_wait(pool, want.deadline_ns) if want.patient else frame_claim(pool, 0)


cdef inline bint fill_install(
    pool_t *pool, frame_id f, page_id page, uint64_t index, object_id o, uint32_t generation, uint64_t pte
) noexcept nogil:
    """Make a claimed frame the page's, in FILLING; False: the frame is free again."""
    cdef frame_t *frame = &pool.frames[f]
    frame.page = page
    frame.index = index
    frame.object = o
    frame.slot = pte_slot(pte)
    if not pte_change(pool, page, pte, pte_make_frame(f)):
        frame_give_back(pool, f)
        return False
    if not life_is(&pool.objects[o].word, generation) or not page_lives(pool, o, page):
        # R7: who sweeps a dying object or page looks at the page table only after the death is visible.
        fill_undo(pool, f, False)
        return False
    # It may have moved since the caller looked; who moves it looks at the page table after (sparse.pxd).
    frame.index = page_place(pool, o, page, index)
    refault_note(pool, f, pte)
    return True


cdef inline void read_failed(pool_t *pool, slot_id slot, int rc) noexcept nogil:
    count(pool, C_READ_ERRORS, 1)
    add64(&pool.header.areas[slot_area(slot)].errors, 1)
    store32(&pool.header.areas[slot_area(slot)].error, <uint32_t>-rc)


cdef inline int slots_read(pool_t *pool, slot_id slot, uint32_t pages, uint8_t *buffer) noexcept nogil:
    """One try to read neighbouring slots into a buffer of the thread's own; who asks counts those it wanted."""
    cdef iovec v
    cdef int rc = failpoint_visit(pool.header, FP_FILL_READ)
    if rc == 0:
        v.iov_base = buffer
        v.iov_len = <uint64_t>pages << pool.page_shift
        count(pool, C_READ_CALLS, 1)
        rc = file_transfer(False, pool.area_fds[slot_area(slot)], &v, 1, slot_offset(pool, slot))
    if rc != 0:
        read_failed(pool, slot, rc)
    return rc


cdef inline int slot_check(pool_t *pool, slot_id slot, page_id page, const uint8_t *bytes) noexcept nogil:
    """0, or -EBADMSG: what was read is not what was written for this page."""
    if slot_holds(pool, slot, page, bytes):
        return 0
    count(pool, C_CHECKSUM_ERRORS, 1)
    read_failed(pool, slot, -EBADMSG)
    return -EBADMSG


cdef inline int fill_read(pool_t *pool, frame_t *frame, uint8_t *buffer) noexcept nogil:
    """Read a frame's slot, and look whether the bytes are the page's; -errno after so many tries."""
    cdef int rc = 0, _
    for _ in range(READ_TRIES):
        rc = slots_read(pool, frame.slot, 1, buffer)
        if rc == 0:
            count(pool, C_SLOT_READS, 1)
            rc = slot_check(pool, frame.slot, frame.page, buffer)
        if rc == 0:
            return 0
    return rc


cdef inline int fill_page(pool_t *pool, frame_id f, wanted_t *want) noexcept nogil:
    """Bytes for one installed frame.  -EAGAIN: there was no memory for it; on any failure all is undone."""
    cdef frame_t *frame = &pool.frames[f]
    cdef int rc
    failpoint_visit(pool.header, FP_FILL_LOCKED)
    if frame.slot == SLOT_NONE and has_file(pool, frame.object):
        rc = backing_read(pool, frame.object, frame.index, 1, want.buffer)
        if rc != 0:
            fill_undo(pool, f, False)
            return rc
        rc = store_write(pool, frame.page, 1, want.buffer)
    elif frame.slot == SLOT_NONE:
        rc = store_allocate(pool, frame.page, 1)
    else:
        rc = fill_read(pool, frame, want.buffer)
        if rc != 0:
            want.error = -rc
            want.area = slot_area(frame.slot)
            fill_undo(pool, f, False)
            return -EIO
        rc = store_write(pool, frame.page, 1, want.buffer)
    if rc != 0:
        # What little there was goes before the entry does (R5).
        store_punch(pool, frame.page, 1)
        fill_undo(pool, f, True)
        memory_ask(pool)
        return -EAGAIN
    frame_set_present(pool, frame)
    return 0


cdef inline int page_acquire(pool_t *pool, wanted_t *want, frame_id *got) noexcept nogil:
    """The page's frame, locked and resident (ACQUIRED); NOTED, STARVED or STALE; or -errno, with nothing held.

    -ENOENT: the object is gone.  -ENOMEM: no frame became free in time.  -EIO: the slot could not be read, for the
    reason in want.error.
    """
    cdef uint64_t pte, seen
    cdef frame_id f
    cdef frame_t *frame
    cdef int rc, _
    cdef uint32_t sequence
    want.filled = False
    want.read = False
    want.error = 0
    for _ in range(MAX_ROUNDS):
        if not life_is(&pool.objects[want.object].word, want.object_generation):
            return -ENOENT
        if not page_lives(pool, want.object, want.page):
            return STALE
        pte = pte_read(pool, want.page)
        if pte_is_frame(pte):
            f = pte_frame(pte)
            frame = &pool.frames[f]
            seen = load64(&frame.word)
            if pte_read(pool, want.page) != pte:
                continue
            failpoint_visit(pool.header, FP_ENTRY_READ)
            if frame_trylock(frame):
                if pte_read(pool, want.page) == pte:
                    got[0] = f
                    return ACQUIRED
                page_unlock(pool, frame)
            elif want.sleeps:
                frame_sleep(frame, seen, 100_000_000)
                if now_ns() > want.deadline_ns:
                    return -ENOMEM
            elif frame_wait_for(frame, seen, want.worker):
                count(pool, C_FILL_WAITS, 1)
                return NOTED
            continue
        sequence = load32(&pool.header.free_sequence)
        f = fill_claim(pool, want)
        if f == FRAME_NONE:
            return -ENOMEM if want.patient else STARVED
        if not fill_install(pool, f, want.page, want.index, want.object, want.object_generation, pte):
            continue
        rc = fill_page(pool, f, want)
        if rc == -EAGAIN:
            # The machine has no memory for the frame: it is offline.  The next may find none either, until a page goes.
            if now_ns() > want.deadline_ns:
                return -ENOMEM
            futex_wait(&pool.header.free_sequence, sequence, 5_000_000)
            continue
        if rc != 0:
            return rc
        want.filled = True
        want.read = pool.frames[f].slot != SLOT_NONE or has_file(pool, want.object)
        got[0] = f
        return ACQUIRED
    return -ENOMEM
