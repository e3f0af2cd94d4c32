"""The seam to a worker's mappings: map, write-protect, un-protect, wake, poison.

All that the paths want done in another process goes through these five verbs, each addressed to a worker's
region.  Here they are userfaultfd ioctls; an engine without userfaultfd would send them to the attendant.

Every verb holds the region (R2).  A region that has ended is unmapped already: there is nothing left to do.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport attached_t, count, pool_t
from pyswap.core.family cimport family_of, page_lives, page_place
from pyswap.core.frame cimport frame_end_lock, waiters_t
from pyswap.core.kernel cimport uffd_continue, uffd_protect, uffd_wake
from pyswap.core.layout cimport (
    C_POISONED,
    NO_EXTENT,
    WORKER_WORDS,
    family_t,
    frame_t,
    object_id,
    object_t,
    page_id,
    region_id,
    region_t,
    worker_id,
)
from pyswap.core.lock cimport load32, load64, mutex_lock, mutex_unlock, store32
from pyswap.core.order cimport ORDER_POISON, ORDER_REMAP, order_send, poison_text
from pyswap.core.region cimport clones_t, life_drop, life_hold, regions_of

cdef extern from *:
    int EAGAIN
    int ENOENT
    int ESRCH


cdef inline uint64_t page_address(pool_t *pool, region_t *region, int64_t index) noexcept nogil:
    return region.address + (<uint64_t>index << pool.page_shift)


cdef inline int engine_map(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, uint32_t pages, bint writable, int *existed
) noexcept nogil:
    """Map resident pages whose frames the caller has locked, and wake who waits for them."""
    cdef region_t *region = &pool.regions[r]
    cdef int rc
    existed[0] = 0
    if not life_hold(&region.word, generation):
        return -ESRCH
    rc = uffd_continue(
        pool.attached[region.worker].uffd,
        page_address(pool, region, index),
        <uint64_t>pages << pool.page_shift,
        not writable,
        existed,
    )
    life_drop(&region.word)
    return rc


cdef inline int engine_unprotect(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, uint32_t pages
) noexcept nogil:
    """Make mapped pages writable, and wake who waits for them; their frames are locked and dirty (R3)."""
    cdef region_t *region = &pool.regions[r]
    cdef int rc
    if not life_hold(&region.word, generation):
        return -ESRCH
    rc = uffd_protect(
        pool.attached[region.worker].uffd,
        page_address(pool, region, index),
        <uint64_t>pages << pool.page_shift,
        False,
    )
    life_drop(&region.word)
    return rc


cdef inline int engine_protect(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, uint32_t pages
) noexcept nogil:
    """Write-protect pages in one region.  0 promises that no write reaches them any more.

    A run that is not protected whole is done page by page: the ioctl stops at the first range that is not
    registered and leaves what is behind it writable.  Of one page, "not registered" and "no such process"
    mean that there is no mapping.
    """
    cdef region_t *region = &pool.regions[r]
    cdef int rc = 0, uffd
    cdef uint32_t i
    if not life_hold(&region.word, generation):
        return 0
    uffd = pool.attached[region.worker].uffd
    rc = uffd_protect(uffd, page_address(pool, region, index), <uint64_t>pages << pool.page_shift, True)
    if rc != 0:
        for i in range(pages):
            rc = uffd_protect(uffd, page_address(pool, region, index + i), pool.page_bytes, True)
            if rc == -ENOENT or rc == -ESRCH:
                rc = 0
            if rc != 0:
                break
    life_drop(&region.word)
    return rc


cdef inline void engine_wake(pool_t *pool, region_id r, uint32_t generation, int64_t index) noexcept nogil:
    """Let the faults at one page of a region happen again."""
    cdef region_t *region = &pool.regions[r]
    if not life_hold(&region.word, generation):
        return
    uffd_wake(pool.attached[region.worker].uffd, page_address(pool, region, index), pool.page_bytes)
    life_drop(&region.word)


cdef inline bint wake_index(pool_t *pool, object_id o, worker_id worker, uint64_t index) noexcept nogil:
    """Let the faults at an index happen again in every region of an object; False where there is none."""
    cdef clones_t clones
    cdef uint32_t i
    regions_of(pool, o, worker, &clones)
    for i in range(clones.count):
        if index < pool.regions[clones.regions[i]].pages:
            engine_wake(pool, clones.regions[i], clones.generations[i], <int64_t>index)
    return clones.count != 0


cdef inline void wake_page(pool_t *pool, worker_id worker, page_id page) noexcept nogil:
    """Let the faults at a page id happen again, of whatever object: looked for one by one."""
    cdef attached_t *a = &pool.attached[worker]
    cdef object_t *object
    cdef family_t *family
    cdef object_id o = 0
    cdef page_id first = NO_EXTENT
    cdef uint32_t i, e
    mutex_lock(&a.lock)
    for i in range(a.count):
        o = pool.regions[a.regions[i]].object
        object = &pool.objects[o]
        if object.base <= page < object.base + object.pages:
            first = object.base
            break
        family = family_of(pool, o)
        if family == NULL:
            continue
        for e in range(load32(&family.count)):
            if load64(&family.extents[e]) <= page < load64(&family.extents[e]) + object.pages:
                first = load64(&family.extents[e])
        if first != NO_EXTENT:
            break
    mutex_unlock(&a.lock)
    if first != NO_EXTENT:
        wake_index(pool, o, worker, page_place(pool, o, page, page - first))


cdef inline void engine_wake_waiters(pool_t *pool, waiters_t *waiters) noexcept nogil:
    """Wake whoever noted itself at a frame, after its lock has ended."""
    cdef int i
    cdef worker_id worker
    cdef uint64_t bits
    if not waiters.any:
        return
    for i in range(WORKER_WORDS):
        bits = waiters.bits[i]
        worker = i * 64
        while bits:
            if bits & 1:
                wake_index(pool, waiters.object, worker, waiters.index)
                if not page_lives(pool, waiters.object, waiters.page):
                    # A fill that was too late for its object, and is undone, held the page of another.
                    wake_page(pool, worker, waiters.page)
            bits >>= 1
            worker += 1


cdef inline void page_unlock(pool_t *pool, frame_t *frame) noexcept nogil:
    """Give up a page's lock, and wake who left word."""
    cdef waiters_t waiters
    frame_end_lock(pool, frame, False, &waiters)
    engine_wake_waiters(pool, &waiters)


cdef inline int engine_order(
    pool_t *pool, region_t *region, uint32_t kind, int64_t index, uint64_t bytes, uint64_t offset, uint64_t copy,
    const char *text
) noexcept nogil:
    """Give the attendant an order.  -EAGAIN: it has not kept up.  Else it has closed its end: who needs it waits on."""
    cdef attached_t *a = &pool.attached[region.worker]
    cdef int rc = order_send(a.channel, kind, page_address(pool, region, index), bytes, offset, copy, text)
    if rc != 0 and rc != -EAGAIN:
        store32(&a.deaf, 1)
    return rc


cdef inline void engine_poison(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, const char *why, int error
) noexcept nogil:
    """A fault that cannot be served: the attendant says so on stderr, and the page answers with SIGBUS."""
    cdef region_t *region = &pool.regions[r]
    cdef char text[480]
    cdef int rc
    if not life_hold(&region.word, generation):
        return
    poison_text(text, sizeof(text), pool.objects[region.object].name, <uint64_t>index, why, error)
    # Counted before the process goes on, so that it finds its own error in the numbers.
    count(pool, C_POISONED, 1)
    rc = engine_order(pool, region, ORDER_POISON, index, pool.page_bytes, 0, 0, text)
    if rc != 0:
        count(pool, C_POISONED, <uint64_t>-1)
    if rc == -EAGAIN:
        # Its channel is full of orders: let the fault come again rather than wait here.
        uffd_wake(pool.attached[region.worker].uffd, page_address(pool, region, index), pool.page_bytes)
    life_drop(&region.word)


cdef inline bint engine_remap(
    pool_t *pool, region_t *region, int64_t index, uint32_t pages, page_id page, uint64_t copy
) noexcept nogil:
    """Have the attendant map other page ids; the region is held.  False: it takes no orders now."""
    cdef uint64_t bytes = <uint64_t>pages << pool.page_shift
    cdef char text[480]
    # To be said before a touch can end in SIGBUS, and so by who finds that it cannot be mapped.
    poison_text(text, sizeof(text), pool.objects[region.object].name, <uint64_t>index,
                b"its copy could not be mapped; vm.max_map_count may be too low", 0)
    return engine_order(pool, region, ORDER_REMAP, index, bytes, page << pool.page_shift, copy, text) == 0
