"""The life of a fault: from an address to a mapped page.

    1 find the region and the page   2 feed readahead   3 page_acquire   4 map it, and neighbours, or have it copied
    5 unlock

Who may interleave, and what stops it:
 - the end of the region: it is held around every ioctl (R2)
 - a page that somebody else fills or evicts: the fault has left word, the thread goes on, and it happens again
   after the wake-up
 - a copy that changes the region's map between 1 and 3: the map is read again under the frame's lock
 - a fork between the decision that a write needs no copy and the mapping: the region's gate (R10)
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pyswap.core.ahead cimport cluster_read
from pyswap.core.area cimport area_failing
from pyswap.core.backing cimport has_file
from pyswap.core.context cimport count, mappings_short, pool_t, starved_t
from pyswap.core.copy cimport copy_start
from pyswap.core.engine cimport engine_poison, engine_unprotect, engine_wake, page_unlock
from pyswap.core.family cimport page_is_shared
from pyswap.core.frame cimport frame_claim_wait, frame_pin, frame_set_dirty, frame_unpin
from pyswap.core.kernel cimport UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, uffd_wake
from pyswap.core.layout cimport (
    ADVICE_RANDOM,
    C_MAJOR_FAULTS,
    C_MINOR_FAULTS,
    C_WRITE_FAULTS,
    C_ZERO_FILLS,
    FRAME_NONE,
    MAX_COPY_PAGES,
    REGION_NONE,
    area_t,
    frame_id,
    region_id,
    region_t,
    worker_id,
)
from pyswap.core.lock cimport FP_MAP_BEFORE, failpoint_visit, load32, now_ns
from pyswap.core.mapping cimport frame_used, map_for_others, map_run
from pyswap.core.neighbours cimport map_around, map_onward, map_rows, unprotect_around
from pyswap.core.order cimport unread_text, unwritten_text
from pyswap.core.page cimport ACQUIRED, STALE, STARVED, page_acquire, spare_give_back, wanted_t
from pyswap.core.pagetable cimport PTE_EMPTY, pte_read
from pyswap.core.policy cimport rewrite_note
from pyswap.core.readahead cimport detector_feed, way_t
from pyswap.core.region cimport (
    COPYING,
    PAGE_MASK,
    gate_enter,
    gate_leave,
    gate_wait,
    is_hole,
    life_drop,
    life_generation,
    life_hold,
    region_copy,
    region_find,
    region_lookup,
    region_page,
)
from pyswap.core.starved cimport frames_await, starved_put

cdef extern from *:
    int EIO
    int ENOENT
    int ENOMEM
    int ENOSPC
    int EAGAIN
    int ESRCH
    int ESTALE

cdef enum:
    STREAM_WAIT_NS = 5_000_000  # a stream of first touches waits so long for more than one frame

cdef struct fault_t:            # a fault, or a pin of one page, on its way
    worker_id worker
    uint64_t address
    uint64_t flags
    region_id r
    uint32_t generation
    region_t region             # as it was when the fault was read
    int64_t index
    way_t way                   # of the stream that it continues
    bint write
    bint protected              # it is mapped, and the write met its protection
    bint gathered               # pages beside it were brought in, to be copied with it
    wanted_t want


cdef inline const char *fault_reason(int rc) noexcept nogil:
    if rc == -ENOENT:
        return b"the array was released"
    if rc == -ENOMEM:
        return b"no frame became free in time"
    if rc == -ENOSPC:
        return b"memory and swap have no room for its copy"
    if rc == -ESTALE:
        return b"the file that it comes from has changed"
    return b"it could not be read"


cdef inline void fault_poison(pool_t *pool, fault_t *fault, int rc) noexcept nogil:
    """Say why a fault cannot be served, and have it end in SIGBUS."""
    cdef char why[240]
    cdef area_t *area = area_failing(pool)
    if rc == -ENOMEM and area != NULL:
        unwritten_text(why, sizeof(why), area.path)
        engine_poison(pool, fault.r, fault.generation, fault.index, why, <int>load32(&area.error))
        return
    if fault.want.error == 0:
        engine_poison(pool, fault.r, fault.generation, fault.index, fault_reason(rc), -rc if rc == -EIO else 0)
        return
    unread_text(why, sizeof(why), pool.header.areas[fault.want.area].path, fault.want.error)
    engine_poison(pool, fault.r, fault.generation, fault.index, why, fault.want.error)


cdef inline void fault_map(
    pool_t *pool, fault_t *fault, frame_id f, bint mapped
) noexcept nogil:
    """Map a locked page, or lift its protection where it is mapped, and its neighbours with it."""
    cdef region_t *region = &fault.region
    cdef region_id r = fault.r
    cdef uint32_t generation = fault.generation
    cdef int64_t index = fault.index, rest = 0
    cdef int rc
    failpoint_visit(pool.header, FP_MAP_BEFORE)
    if mapped:
        frame_set_dirty(pool, &pool.frames[f])
        frame_used(pool, &pool.frames[f])
        rewrite_note(pool, f)
        if life_hold(&pool.regions[r].word, generation):
            unprotect_around(pool, r, region, index, &fault.way)
            life_drop(&pool.regions[r].word)
        rc = engine_unprotect(pool, r, generation, index, 1)
    else:
        # Neighbours first: woken before, the thread would fault at each of them while this one looks for frames.
        # The region is held, or its number may be another array's, whose pages would be made in this one's name.
        if life_hold(&pool.regions[r].word, generation):
            if region.advice != ADVICE_RANDOM:
                rest = map_around(pool, &fault.want, r, region, index, fault.way.direction, fault.write)
            if fault.way.gap:
                map_rows(pool, &fault.want, r, region, index, &fault.way, fault.write)
            life_drop(&pool.regions[r].word)
        rc = map_run(pool, r, generation, index, &f, 1, fault.write)
        if rc == 0 and rest:
            map_onward(pool, r, region, index, rest, fault.write)
        # A stream's pages are mapped by the dozen, for each process when it comes there.
        if rc == 0 and fault.way.direction == 0 and fault.way.gap == 0:
            map_for_others(pool, f, fault.worker)
    if rc == -ENOENT or rc == -ESRCH or rc == -EAGAIN:
        # The mapping or its process is going away: what is left of it may fault again.
        engine_wake(pool, r, generation, index)
    elif rc != 0:
        engine_poison(pool, r, generation, index, b"it could not be mapped", -rc)


# What became of one try.
cdef enum outcome:
    DONE = 0
    AGAIN = 1                   # the page, or what may be done with it, has changed
    COPIED = 2                  # the attendant will map a copy of it, and the wake-up follows
    NO_FRAME = 3                # for the copy
    BUSY = 4                    # the attendant takes no orders, or no page id is free: let it happen again


cdef inline uint32_t run_limit(pool_t *pool) noexcept nogil:
    """The most pages that are copied at once."""
    return pool.header.around_pages if pool.header.around_pages < MAX_COPY_PAGES else MAX_COPY_PAGES


cdef inline uint32_t copy_limit(pool_t *pool, fault_t *fault) noexcept nogil:
    """How many pages are copied at once: one, a stream's next ones, or more where mappings run short.

    A stream gets as many copies as it has made before, so that no more than half are in vain.
    """
    cdef uint32_t n = 1, limit = run_limit(pool)
    if mappings_short(pool, fault.worker):
        return limit
    if fault.way.direction != 1:
        return 1
    while n < limit and <int64_t>n <= fault.index and not page_is_shared(
        pool, fault.want.object, region_page(pool, fault.r, fault.index - n) & PAGE_MASK
    ):
        n += 1
    return n


cdef inline outcome private_map(pool_t *pool, fault_t *fault, frame_id f, bint pin, int *rc) noexcept nogil:
    """What a locked page of a private object needs: mapped as it is, pinned, or copied first (R10)."""
    cdef region_t *region = &pool.regions[fault.r]
    cdef bint own = fault.write or pin
    cdef outcome result = DONE
    rc[0] = 0
    if not life_hold(&region.word, fault.generation):
        return AGAIN
    if own and not gate_enter(region):
        life_drop(&region.word)
        return AGAIN
    if region_page(pool, fault.r, fault.index) != fault.want.page:
        result = AGAIN
    elif own and page_is_shared(pool, region.object, fault.want.page):
        rc[0] = copy_start(pool, fault.r, fault.index, copy_limit(pool, fault), f, &fault.want.spare)
        result = COPIED
        if rc[0] == STARVED:
            result = NO_FRAME
        elif rc[0] == -EAGAIN:
            result = BUSY
    elif pin:
        frame_pin(pool, &pool.frames[f], fault.write)
        rc[0] = map_run(pool, fault.r, fault.generation, fault.index, &f, 1, fault.write)
        if rc[0] != 0:
            frame_unpin(pool, &pool.frames[f], fault.write)
    else:
        fault_map(pool, fault, f, fault.protected and not fault.want.filled)
    if own:
        gate_leave(region)
    life_drop(&region.word)
    return result


cdef inline void wake_unknown(pool_t *pool, worker_id worker, uint64_t address) noexcept nogil:
    """A fault at an address of no region: it was one when the fault began."""
    if life_hold(&pool.workers[worker].word, life_generation(&pool.workers[worker].word)):
        uffd_wake(pool.attached[worker].uffd, address & ~(pool.page_bytes - 1), pool.page_bytes)
        life_drop(&pool.workers[worker].word)


cdef inline bint fault_find(pool_t *pool, fault_t *fault) noexcept nogil:
    """Which page of which object; False when there is nothing to do for this fault any more."""
    # A region that ends from here on makes the engine's verbs do nothing.
    if not region_find(pool, fault.worker, fault.address, &fault.r, &fault.generation) or not region_copy(
        pool, fault.r, fault.generation, &fault.region
    ):
        wake_unknown(pool, fault.worker, fault.address)
        return False
    fault.index = <int64_t>((fault.address - fault.region.address) >> pool.page_shift)
    if not region_lookup(pool, fault.r, fault.generation, fault.index, &fault.want.page):
        wake_unknown(pool, fault.worker, fault.address)
        return False
    if is_hole(fault.want.page):
        # Its memory was freed: a fault that is told of so late has been served.
        wake_unknown(pool, fault.worker, fault.address)
        return False
    # The address has the old page yet, or is out of sight: the wake-up comes with the copy.
    if fault.want.page & COPYING:
        return False
    fault.want.object = fault.region.object
    fault.want.object_generation = fault.region.object_generation
    fault.want.index = <uint64_t>fault.index
    fault.want.worker = fault.worker
    return True


cdef inline bint fault_starved(pool_t *pool, fault_t *fault) noexcept nogil:
    """No frame is free: leave the fault to the threads that wait for one; False where there is no room."""
    cdef starved_t starved
    starved.worker = fault.worker
    starved.address = fault.address
    starved.flags = fault.flags
    return not fault.want.patient and starved_put(pool, &starved)


cdef inline bint makes_pages(pool_t *pool, fault_t *fault) noexcept nogil:
    """Whether a fault is the first touch of a page, or has it copied: in a stream, the next ones with it."""
    if fault.region.is_private and fault.write and page_is_shared(pool, fault.want.object, fault.want.page):
        return True
    return pte_read(pool, fault.want.page) == PTE_EMPTY and not has_file(pool, fault.want.object)


cdef inline bint fault_defer(pool_t *pool, fault_t *fault) noexcept nogil:
    """Whether a fault is left to a patient thread: a stream of pages that are made takes frames by the dozen.

    Where few are left it would fault for every page; so it is served when there are some, or after a moment.
    """
    cdef uint32_t enough = pool.header.minimum_frames + pool.header.around_pages
    # More are not to be had before reclaim has begun.
    if enough > pool.header.low_frames:
        enough = pool.header.low_frames
    # One that was given a frame for its copy waits for no more.
    if fault.way.direction == 0 or load32(&pool.free_count) > enough or fault.want.spare != FRAME_NONE:
        return False
    if not makes_pages(pool, fault):
        return False
    if not fault.want.patient:
        return fault_starved(pool, fault)
    frames_await(pool, enough, STREAM_WAIT_NS)
    return False


cdef inline void fault_gather(pool_t *pool, fault_t *fault) noexcept nogil:
    """Mappings run short: bring in what is to be copied with the page, so that the run is long."""
    cdef wanted_t near = fault.want
    cdef uint32_t i
    cdef frame_id f = 0
    cdef uint64_t page = 0
    fault.gathered = True
    for i in range(1, run_limit(pool)):
        if fault.index + i >= <int64_t>fault.region.pages:
            return
        if not region_lookup(pool, fault.r, fault.generation, fault.index + i, &page):
            return
        near.page = page & PAGE_MASK
        near.index = <uint64_t>fault.index + i
        near.patient = False
        near.spare = <frame_id>FRAME_NONE
        if page & COPYING or not page_is_shared(pool, near.object, near.page):
            return
        if page_acquire(pool, &near, &f) != ACQUIRED:
            return
        page_unlock(pool, &pool.frames[f])


cdef inline outcome fault_try(pool_t *pool, fault_t *fault, int *rc) noexcept nogil:
    """One try at a fault whose page is known."""
    cdef frame_id f = 0
    cdef outcome result = DONE
    cdef bint read = False
    if fault.write and not fault.gathered and mappings_short(pool, fault.worker):
        fault_gather(pool, fault)
    if fault_defer(pool, fault):
        return DONE
    if fault.way.direction:
        read = cluster_read(
            pool, fault.r, fault.generation, fault.index, fault.want.page, &fault.way, fault.want.buffer
        )
    rc[0] = page_acquire(pool, &fault.want, &f)
    if rc[0] == STARVED and not fault_starved(pool, fault):
        fault.want.patient = True
        rc[0] = page_acquire(pool, &fault.want, &f)
    if rc[0] == STALE:
        return AGAIN
    if rc[0] != ACQUIRED:
        rc[0] = 0 if rc[0] > 0 else rc[0]
        return DONE
    if read:
        fault.want.filled = True
        fault.want.read = True
    # Counted before the thread goes on, so that it finds its own faults in the numbers.
    count(
        pool,
        C_WRITE_FAULTS if fault.protected else C_MAJOR_FAULTS if fault.want.read else C_MINOR_FAULTS,
        1,
    )
    if fault.want.filled and not fault.want.read:
        count(pool, C_ZERO_FILLS, 1)
    # The mapping, under the frame's lock; then whoever waited for the page faults again.
    if fault.region.is_private:
        result = private_map(pool, fault, f, False, rc)
    else:
        fault_map(pool, fault, f, fault.protected and not fault.want.filled)
    page_unlock(pool, &pool.frames[f])
    return result


cdef inline void fault_resolve(
    pool_t *pool, worker_id worker, uint64_t address, uint64_t flags, uint8_t *buffer, bint patient
) noexcept nogil:
    cdef fault_t fault
    cdef region_id fed = <region_id>REGION_NONE
    cdef uint32_t fed_generation = 0
    cdef outcome result = AGAIN
    cdef int rc = 0
    fault.worker = worker
    fault.address = address
    fault.flags = flags
    fault.write = (flags & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP)) != 0
    fault.protected = (flags & UFFD_PAGEFAULT_FLAG_WP) != 0
    fault.gathered = False
    fault.want.spare = <frame_id>FRAME_NONE
    fault.want.sleeps = False
    fault.want.buffer = buffer
    fault.want.patient = patient
    fault.want.error = 0
    fault.want.deadline_ns = now_ns() + <uint64_t>pool.header.frame_wait_ms * 1_000_000
    while result == AGAIN and fault_find(pool, &fault):
        # Readahead first, so that it goes on while this page is read; again where another region is there by now.
        if fault.r != fed or fault.generation != fed_generation:
            fed = fault.r
            fed_generation = fault.generation
            detector_feed(
                pool, fault.r, fault.generation, <int64_t>(fault.address - fault.region.address), &fault.way
            )
        result = fault_try(pool, &fault, &rc)
        if result == AGAIN:
            spare_give_back(pool, &fault.want)
            gate_wait(&pool.regions[fault.r])
        elif result == NO_FRAME and not fault_starved(pool, &fault):
            fault.want.spare = frame_claim_wait(pool, fault.want.deadline_ns)
            result = AGAIN
        if result == AGAIN:
            if now_ns() > fault.want.deadline_ns:
                rc = -ENOMEM
                break
    if result == BUSY and not load32(&pool.attached[worker].deaf):
        engine_wake(pool, fault.r, fault.generation, fault.index)
    elif rc < 0:
        fault_poison(pool, &fault, rc)
    spare_give_back(pool, &fault.want)
