"""The life of a fault: from a page index to a mapped page.

    fault_resolve   1 find the region   2 feed readahead   3 page_acquire   4 map it, and neighbours   5 unlock
    page_acquire    the page's frame, locked and resident: by locking it, filling it, or leaving word
    fill_*          claim, install, make bytes, read: shared with readahead

Who may interleave, and what stops it:
 - two fills of one page: the compare-and-swap of the entry; the loser frees its frame and starts again
 - an eviction between reading the entry and locking: the entry is read again under the lock
 - the end of the region: life_hold around the ioctl (R2); the end of the object: R7
 - a page being filled or evicted by somebody else: the fault leaves word and the thread goes on; it happens
   again after the wake-up
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pyswap.core.context cimport count, pool_t, request_t
from pyswap.core.engine cimport engine_map, engine_poison, engine_unprotect, engine_wake, engine_wake_waiters
from pyswap.core.frame cimport (
    AHEAD,
    COLD,
    DIRTY,
    REFERENCED,
    frame_claim,
    frame_claim_wait,
    frame_end_lock,
    frame_has,
    frame_mark,
    frame_pin,
    frame_set_dirty,
    frame_set_free,
    frame_set_offline,
    frame_set_present,
    frame_sleep,
    frame_state,
    frame_trylock,
    frame_unmark,
    frame_unpin,
    frame_wait_for,
    waiters_t,
)
from pyswap.core.kernel cimport (
    UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
    file_allocate,
    file_punch,
    file_transfer,
    iovec,
    uffd_wake,
)
from pyswap.core.layout cimport (
    ADVICE_RANDOM,
    C_FILL_WAITS,
    C_MAJOR_FAULTS,
    C_MINOR_FAULTS,
    C_READ_CALLS,
    C_READ_ERRORS,
    C_READAHEAD_HITS,
    C_READAHEAD_PAGES,
    C_SLOT_READS,
    C_WRITE_FAULTS,
    C_ZERO_FILLS,
    FRAME_NONE,
    MAX_AROUND_PAGES,
    PRESENT,
    SLOT_NONE,
    frame_id,
    frame_t,
    object_id,
    page_id,
    region_id,
    region_t,
    slot_id,
    worker_id,
)
from pyswap.core.lock cimport (
    FP_FALLOCATE,
    FP_FILL_LOCKED,
    FP_FILL_READ,
    FP_MAP_BEFORE,
    failpoint_visit,
    load32,
    load64,
    now_ns,
    or64,
    panic,
)
from pyswap.core.pagetable cimport (
    pte_change,
    pte_frame,
    pte_is_frame,
    pte_is_slot,
    pte_make_frame,
    pte_make_slot,
    pte_read,
    pte_slot,
)
from pyswap.core.readahead cimport detector_feed, stream_fell_short
from pyswap.core.region cimport life_generation, life_is, region_find

cdef extern from *:
    int EIO
    int ENOSPC
    int ENOENT
    int EAGAIN
    int ENOMEM

cdef enum:
    READ_TRIES = 3
    MAX_ROUNDS = 100000         # restarts of one fault: each means that somebody else made progress

cdef enum acquired:
    ACQUIRED = 0
    NOTED = 1                   # somebody else has the page; the worker will be woken

cdef struct wanted_t:
    object_id object
    uint32_t object_generation
    page_id page
    worker_id worker            # noted where the page is locked
    bint sleeps                 # sleep for the lock instead (not in a fault thread)
    uint8_t *buffer             # of a page, aligned for O_DIRECT: this thread's own
    bint filled                 # out: it was not resident
    bint read                   # out: and came from a slot
    uint64_t deadline_ns


cdef inline void page_unlock(pool_t *pool, frame_t *frame) noexcept nogil:
    cdef waiters_t waiters
    frame_end_lock(pool, frame, False, &waiters)
    engine_wake_waiters(pool, &waiters)


# Fills.

cdef inline void punch(pool_t *pool, page_id page, uint32_t pages) noexcept nogil:
    cdef int rc = file_punch(pool.store_fd, page << pool.page_shift, <uint64_t>pages << pool.page_shift)
    if rc != 0:
        panic("punch: the store keeps its bytes", page, pages, <uint64_t>-rc)


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


cdef inline bint fill_install(
    pool_t *pool, frame_id f, page_id page, object_id o, uint32_t generation, uint64_t pte
) noexcept nogil:
    """Make a claimed frame the page's, in FILLING; False: the frame is free again."""
    cdef frame_t *frame = &pool.frames[f]
    cdef waiters_t waiters
    frame.page = page
    frame.object = o
    frame.slot = pte_slot(pte)
    if not pte_change(pool, page, pte, pte_make_frame(f)):
        frame_set_free(pool, f, &waiters)
        engine_wake_waiters(pool, &waiters)
        return False
    if not life_is(&pool.objects[o].word, generation):
        # R7: the sweep of a dying object looks at the page table only after the death is visible.
        fill_undo(pool, f, False)
        return False
    return True


cdef inline int fill_allocate(pool_t *pool, page_id page, uint32_t pages) noexcept nogil:
    """Memory for pages whose frames are locked in FILLING (R9)."""
    cdef int rc = failpoint_visit(pool.header, FP_FALLOCATE)
    if rc != 0:
        return rc
    return file_allocate(pool.store_fd, page << pool.page_shift, <uint64_t>pages << pool.page_shift)


cdef inline int fill_read(pool_t *pool, slot_id slot, uint32_t pages, uint8_t *buffer) noexcept nogil:
    """Read neighbouring slots into a buffer of the thread's own."""
    cdef iovec v
    cdef int rc = 0, _
    for _ in range(READ_TRIES):
        rc = failpoint_visit(pool.header, FP_FILL_READ)
        if rc == 0:
            v.iov_base = buffer
            v.iov_len = <uint64_t>pages << pool.page_shift
            count(pool, C_READ_CALLS, 1)
            rc = file_transfer(False, pool.swap_fd, &v, 1, <uint64_t>slot << pool.page_shift)
        if rc == 0:
            count(pool, C_SLOT_READS, pages)
            return 0
        count(pool, C_READ_ERRORS, 1)
    return rc


cdef inline int fill_store(pool_t *pool, page_id page, uint32_t pages, uint8_t *buffer) noexcept nogil:
    """Put bytes into the store: memory for them and their copy in one call, and no page is zeroed first."""
    cdef iovec v
    cdef int rc = failpoint_visit(pool.header, FP_FALLOCATE)
    if rc != 0:
        return rc
    v.iov_base = buffer
    v.iov_len = <uint64_t>pages << pool.page_shift
    return file_transfer(True, pool.store_fd, &v, 1, page << pool.page_shift)


cdef inline int fill_page(pool_t *pool, frame_id f, uint8_t *buffer) noexcept nogil:
    """Bytes for one installed frame.  -EAGAIN: there was no memory for it; on any failure all is undone."""
    cdef frame_t *frame = &pool.frames[f]
    cdef int rc
    failpoint_visit(pool.header, FP_FILL_LOCKED)
    if frame.slot == SLOT_NONE:
        rc = fill_allocate(pool, frame.page, 1)
    else:
        rc = fill_read(pool, frame.slot, 1, buffer)
        if rc != 0:
            fill_undo(pool, f, False)
            return -EIO
        rc = fill_store(pool, frame.page, 1, buffer)
    if rc != 0:
        # What little there was goes before the entry does (R5).
        punch(pool, frame.page, 1)
        fill_undo(pool, f, True)
        return -EAGAIN
    frame_set_present(pool, frame)
    return 0


# Acquiring.

cdef inline int page_acquire(pool_t *pool, wanted_t *want, frame_id *got) noexcept nogil:
    """The page's frame, locked and resident (ACQUIRED); NOTED; or -errno, with nothing held.

    -ENOENT: the object is gone.  -ENOMEM: no frame became free in time.  Else: the slot could not be read.
    """
    cdef uint64_t pte, seen
    cdef frame_id f
    cdef frame_t *frame
    cdef int rc, _
    want.filled = False
    want.read = False
    for _ in range(MAX_ROUNDS):
        if not life_is(&pool.objects[want.object].word, want.object_generation):
            return -ENOENT
        pte = pte_read(pool, want.page)
        if pte_is_frame(pte):
            f = pte_frame(pte)
            frame = &pool.frames[f]
            seen = load64(&frame.word)
            if pte_read(pool, want.page) != pte:
                continue
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
        f = frame_claim_wait(pool, want.deadline_ns)
        if f == FRAME_NONE:
            return -ENOMEM
        if not fill_install(pool, f, want.page, want.object, want.object_generation, pte):
            continue
        rc = fill_page(pool, f, want.buffer)
        if rc == -EAGAIN:
            continue
        if rc != 0:
            return rc
        want.filled = True
        want.read = pool.frames[f].slot != SLOT_NONE
        got[0] = f
        return ACQUIRED
    return -ENOMEM


# Mapping.

cdef inline void frame_used(pool_t *pool, frame_t *frame) noexcept nogil:
    frame_mark(frame, REFERENCED)
    frame_unmark(frame, COLD)
    if frame_unmark(frame, AHEAD):
        count(pool, C_READAHEAD_HITS, 1)


cdef inline bint maps_writable(frame_t *frame, bint write) noexcept nogil:
    """A dirty page may be mapped writable at once; one whose bytes are being written may not."""
    return write or (frame_has(frame, DIRTY) and frame_state(frame) == PRESENT)


cdef inline bint is_mapper(frame_t *frame, worker_id worker) noexcept nogil:
    return (load64(&frame.mappers[worker >> 6]) >> (worker & 63)) & 1


cdef inline void add_mapper(frame_t *frame, worker_id worker) noexcept nogil:
    or64(&frame.mappers[worker >> 6], <uint64_t>1 << (worker & 63))


cdef inline int map_run(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, frame_id *frames, uint32_t n, bint write
) noexcept nogil:
    """Map locked frames of consecutive pages in one region."""
    cdef uint32_t i
    cdef int existed = 0, rc
    cdef frame_t *frame
    cdef bint writable = write
    for i in range(n):
        frame = &pool.frames[frames[i]]
        if write:
            frame_set_dirty(pool, frame)
        else:
            writable = maps_writable(frame, False)
        add_mapper(frame, pool.regions[r].worker)
        frame_used(pool, frame)
    rc = engine_map(pool, r, generation, index, n, writable, &existed)
    if rc == 0 and existed:
        # Somebody mapped it before, perhaps protected.
        if write:
            return engine_unprotect(pool, r, generation, index, n)
        for i in range(n):
            engine_wake(pool, r, generation, index + i)
    return rc


cdef inline uint32_t gather_zero(
    pool_t *pool, wanted_t *want, uint32_t limit, frame_id *frames
) noexcept nogil:
    """Frames for untouched pages from want.page on, filled with zeros and locked: none that must be waited for."""
    cdef uint32_t n = 0, i
    cdef uint64_t pte
    cdef frame_id f
    while n < limit:
        pte = pte_read(pool, want.page + n)
        if pte != 0:
            break
        f = frame_claim(pool, pool.header.low_frames)
        if f == FRAME_NONE:
            break
        if not fill_install(pool, f, want.page + n, want.object, want.object_generation, pte):
            break
        frames[n] = f
        n += 1
    if n and fill_allocate(pool, want.page, n) != 0:
        for i in range(n):
            punch(pool, want.page + i, 1)
            fill_undo(pool, frames[i], True)
        return 0
    for i in range(n):
        frame_set_present(pool, &pool.frames[frames[i]])
    return n


cdef inline bint neighbour_lock(pool_t *pool, page_id page, worker_id worker, frame_id *got) noexcept nogil:
    """Lock a resident page that the worker has not mapped yet; a trylock, since another frame is held."""
    cdef uint64_t pte = pte_read(pool, page)
    if not pte_is_frame(pte):
        return False
    got[0] = pte_frame(pte)
    if is_mapper(&pool.frames[got[0]], worker) or not frame_trylock(&pool.frames[got[0]]):
        return False
    if pte_read(pool, page) != pte:
        page_unlock(pool, &pool.frames[got[0]])
        return False
    return True


cdef inline void map_resident(
    pool_t *pool, wanted_t *want, region_id r, uint32_t generation, int64_t index, int64_t end, bint write
) noexcept nogil:
    """Map resident neighbours from index on, in runs of one protection, until one is not to be had."""
    cdef frame_id run[64]
    cdef uint32_t n = 0, i
    cdef frame_id f = 0
    cdef bint writable, run_writable = False
    cdef int64_t first = index
    while index < end and neighbour_lock(pool, want.page + n, want.worker, &f):
        writable = maps_writable(&pool.frames[f], write)
        if n and writable != run_writable:
            page_unlock(pool, &pool.frames[f])
            break
        run_writable = writable
        run[n] = f
        n += 1
        index += 1
    if n:
        map_run(pool, r, generation, first, run, n, write)
    for i in range(n):
        page_unlock(pool, &pool.frames[run[i]])


cdef inline void map_around(
    pool_t *pool, wanted_t *want, region_id r, uint32_t generation, int64_t index, int64_t stride, bint write
) noexcept nogil:
    """Map more than was asked for: what is resident, and zeroed neighbours for a stream of first touches."""
    cdef region_t *region = &pool.regions[r]
    cdef frame_id zeroed[64]
    cdef uint32_t limit = pool.header.around_pages, n, i
    cdef int64_t first = index + 1
    cdef wanted_t near = want[0]
    if stride < 0:
        first = index - limit
        if first < 0:
            limit = <uint32_t>index
            first = 0
    if first + limit > <int64_t>region.pages:
        limit = <uint32_t>(<int64_t>region.pages - first)
    if limit == 0:
        return
    near.page = region.base + first
    # Only a stream that writes is taken to write its neighbours too.
    write = write and stride == 1
    if stride == 1 and pte_read(pool, near.page) == 0:
        n = gather_zero(pool, &near, limit, zeroed)
        if n:
            map_run(pool, r, generation, first, zeroed, n, write)
        for i in range(n):
            page_unlock(pool, &pool.frames[zeroed[i]])
        return
    map_resident(pool, &near, r, generation, first, first + limit, write)


cdef inline void unprotect_around(
    pool_t *pool, wanted_t *want, region_id r, uint32_t generation, int64_t index, int64_t stride
) noexcept nogil:
    """A stream writes pages that it read before: lift the protection of a few more at once."""
    cdef region_t *region = &pool.regions[r]
    cdef frame_id run[64]
    cdef uint32_t n = 0, i, limit = pool.header.around_pages
    cdef uint64_t pte
    cdef frame_t *frame
    if stride != 1:
        return
    while n < limit and index + 1 + n < <int64_t>region.pages:
        pte = pte_read(pool, want.page + 1 + n)
        if not pte_is_frame(pte):
            break
        frame = &pool.frames[pte_frame(pte)]
        if frame_has(frame, DIRTY) or not is_mapper(frame, want.worker) or not frame_trylock(frame):
            break
        run[n] = pte_frame(pte)
        n += 1
        if pte_read(pool, want.page + n) != pte:
            n -= 1
            page_unlock(pool, frame)
            break
        frame_set_dirty(pool, frame)
        frame_used(pool, frame)
    if n:
        engine_unprotect(pool, r, generation, index + 1, n)
    for i in range(n):
        page_unlock(pool, &pool.frames[run[i]])


cdef inline int page_pin(
    pool_t *pool, wanted_t *want, region_id r, uint32_t generation, int64_t index, bint write
) noexcept nogil:
    """Make a page resident, mapped and pinned; want.sleeps is set.  -errno with nothing pinned."""
    cdef frame_id f = 0
    cdef frame_t *frame
    cdef int rc = page_acquire(pool, want, &f)
    if rc != 0:
        return rc
    frame = &pool.frames[f]
    frame_pin(pool, frame, write)
    rc = map_run(pool, r, generation, index, &f, 1, write)
    if rc != 0:
        frame_unpin(pool, frame, write)
    page_unlock(pool, frame)
    return rc


cdef inline int page_unpin(pool_t *pool, wanted_t *want, bint write) noexcept nogil:
    """A pinned page is resident, so this waits for its lock at most."""
    cdef frame_id f = 0
    cdef int rc = page_acquire(pool, want, &f)
    if rc != 0:
        return rc
    frame_unpin(pool, &pool.frames[f], write)
    page_unlock(pool, &pool.frames[f])
    return 0


cdef inline const char *fault_reason(int rc) noexcept nogil:
    if rc == -ENOENT:
        return b"the array was released"
    if rc == -ENOMEM:
        return b"no frame became free in time"
    return b"its slot could not be read"


cdef inline void fault_resolve(
    pool_t *pool, worker_id worker, uint64_t address, uint64_t flags, uint8_t *buffer
) noexcept nogil:
    cdef region_id r = 0
    cdef uint32_t generation = 0
    cdef region_t *region
    cdef wanted_t want
    cdef frame_id f = 0
    cdef int64_t index, stride
    cdef bint write = (flags & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP)) != 0
    cdef bint mapped = (flags & UFFD_PAGEFAULT_FLAG_WP) != 0
    cdef int rc
    # 1. Which page of which object.  A region that ends from here on makes the verbs below do nothing.
    if not region_find(pool, worker, address, &r, &generation):
        uffd_wake(pool.attached[worker].uffd, address & ~(pool.page_bytes - 1), pool.page_bytes)
        return
    region = &pool.regions[r]
    index = <int64_t>((address - region.address) >> pool.page_shift)
    want.object = region.object
    want.object_generation = region.object_generation
    want.page = region.base + <uint64_t>index
    want.worker = worker
    want.sleeps = False
    want.buffer = buffer
    want.deadline_ns = now_ns() + <uint64_t>pool.header.frame_wait_ms * 1_000_000
    # 2. Readahead first, so that it goes on while this page is read.
    stride = detector_feed(pool, r, index)
    # 3. The frame.
    rc = page_acquire(pool, &want, &f)
    if rc == NOTED:
        return
    if rc < 0:
        engine_poison(pool, r, generation, index, fault_reason(rc), -rc if rc == -EIO else 0)
        return
    # 4. The mapping, under the frame's lock.
    failpoint_visit(pool.header, FP_MAP_BEFORE)
    if mapped and not want.filled:
        frame_set_dirty(pool, &pool.frames[f])
        frame_used(pool, &pool.frames[f])
        rc = engine_unprotect(pool, r, generation, index, 1)
        unprotect_around(pool, &want, r, generation, index, stride)
    else:
        rc = map_run(pool, r, generation, index, &f, 1, write)
        if region.advice != ADVICE_RANDOM:
            map_around(pool, &want, r, generation, index, stride, write)
    if rc != 0:
        # The mapping or its process is going away: what is left of it may fault again.
        engine_wake(pool, r, generation, index)
    # 5. Done; whoever waited for the page faults again.
    page_unlock(pool, &pool.frames[f])
    count(pool, C_WRITE_FAULTS if mapped else C_MAJOR_FAULTS if want.read else C_MINOR_FAULTS, 1)
    if want.filled and not want.read:
        count(pool, C_ZERO_FILLS, 1)


# Readahead, in threads of its own.

cdef inline uint32_t ahead_claim(
    pool_t *pool, request_t *request, page_id base, int64_t *index, uint32_t *left, frame_id *frames, bint *short_of
) noexcept nogil:
    """Claim and install frames for a run of pages in neighbouring slots; moves *index and *left past it."""
    cdef uint32_t n = 0
    cdef uint64_t pte
    cdef frame_id f
    cdef slot_id first_slot = SLOT_NONE
    cdef bint adjacent = request.stride == 1 or request.stride == -1
    short_of[0] = False
    while left[0] and n < pool.header.chunk_pages:
        pte = pte_read(pool, base + <uint64_t>index[0])
        if not pte_is_slot(pte):
            if n:
                break
            index[0] += request.stride
            left[0] -= 1
            continue
        if n and (not adjacent or <int64_t>pte_slot(pte) != <int64_t>first_slot + <int64_t>n * request.stride):
            break
        f = frame_claim(pool, pool.header.minimum_frames)
        if f == FRAME_NONE:
            short_of[0] = True
            break
        if fill_install(pool, f, base + <uint64_t>index[0], request.object, request.generation, pte):
            if n == 0:
                first_slot = pte_slot(pte)
            frames[n] = f
            n += 1
        elif n:
            break
        index[0] += request.stride
        left[0] -= 1
    return n


cdef inline void ahead_fill(
    pool_t *pool, frame_id *frames, uint32_t n, bint backwards, uint8_t *buffer
) noexcept nogil:
    """One read for the run, then every page present and unlocked."""
    cdef frame_id low = frames[n - 1] if backwards else frames[0]
    cdef page_id page = pool.frames[low].page
    cdef uint32_t i
    cdef bint offline = False
    cdef int rc = fill_read(pool, pool.frames[low].slot, n, buffer)
    if rc == 0:
        rc = fill_store(pool, page, n, buffer)
        offline = rc != 0
    if rc != 0:
        # Nobody asked for these pages yet; who does will meet the error, or not, alone.
        for i in range(n):
            punch(pool, pool.frames[frames[i]].page, 1)
            fill_undo(pool, frames[i], offline)
        return
    count(pool, C_READAHEAD_PAGES, n)
    for i in range(n):
        frame_set_present(pool, &pool.frames[frames[i]])
        frame_mark(&pool.frames[frames[i]], AHEAD | REFERENCED)
        page_unlock(pool, &pool.frames[frames[i]])


cdef inline void ahead_serve(pool_t *pool, request_t *request, uint8_t *buffer) noexcept nogil:
    """Carry out one readahead request, as far as frames are free (R4)."""
    cdef frame_id frames[256]
    cdef uint32_t n, left = request.count
    cdef int64_t index = request.first, pages, room
    cdef page_id base
    cdef bint short_of = False
    if not life_is(&pool.objects[request.object].word, request.generation):
        return
    base = pool.objects[request.object].base
    pages = <int64_t>pool.objects[request.object].pages
    if index < 0 or index >= pages:
        return
    room = (pages - 1 - index) // request.stride if request.stride > 0 else index // -request.stride
    if left > room + 1:
        left = <uint32_t>(room + 1)
    while left and not short_of:
        n = ahead_claim(pool, request, base, &index, &left, frames, &short_of)
        if n:
            failpoint_visit(pool.header, FP_FILL_LOCKED)
            ahead_fill(pool, frames, n, request.stride < 0, buffer)
    if short_of:
        stream_fell_short(pool, request, index)
