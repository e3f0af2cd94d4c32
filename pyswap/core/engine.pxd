"""The seam to a worker's mappings: map, write-protect, un-protect, wake, poison.

All that the paths want done in another process goes through these five verbs, each addressed to a worker's
region.  Here they are userfaultfd ioctls; an engine without userfaultfd would send them to the attendant.

Every verb holds the region (R2).  A region that has ended is unmapped already: there is nothing left to do.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport count, pool_t
from pyswap.core.frame cimport frame_end_lock, waiters_t
from pyswap.core.kernel cimport uffd_continue, uffd_protect, uffd_wake
from pyswap.core.layout cimport (
    C_POISONED,
    REGION_NONE,
    WORKER_WORDS,
    frame_t,
    region_id,
    region_t,
    worker_id,
)
from pyswap.core.order cimport ORDER_POISON, order_send, poison_text
from pyswap.core.region cimport life_drop, life_hold, region_of, region_over

cdef extern from *:
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


cdef inline void engine_wake_waiters(pool_t *pool, waiters_t *waiters) noexcept nogil:
    """Wake whoever noted itself at a frame, after its lock has ended."""
    cdef int i
    cdef worker_id worker
    cdef uint64_t bits
    cdef region_id r
    cdef uint32_t generation = 0
    cdef region_t *region
    if not waiters.any:
        return
    for i in range(WORKER_WORDS):
        bits = waiters.bits[i]
        worker = i * 64
        while bits:
            if bits & 1:
                r = region_of(pool, waiters.object, worker, &generation)
                if r == REGION_NONE or not (
                    pool.regions[r].base <= waiters.page < pool.regions[r].base + pool.regions[r].pages
                ):
                    # A fill that was too late for its object, and is undone, held the page of another.
                    r = region_over(pool, worker, waiters.page, &generation)
                if r != REGION_NONE:
                    region = &pool.regions[r]
                    engine_wake(pool, r, generation, <int64_t>(waiters.page - region.base))
            bits >>= 1
            worker += 1


cdef inline void page_unlock(pool_t *pool, frame_t *frame) noexcept nogil:
    """Give up a page's lock, and wake who left word."""
    cdef waiters_t waiters
    frame_end_lock(pool, frame, False, &waiters)
    engine_wake_waiters(pool, &waiters)


cdef inline void engine_poison(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, const char *why, int error
) noexcept nogil:
    """A fault that cannot be served: the attendant says so on stderr, and the page answers with SIGBUS."""
    cdef region_t *region = &pool.regions[r]
    cdef char text[240]
    if not life_hold(&region.word, generation):
        return
    poison_text(text, sizeof(text), pool.objects[region.object].name, <uint64_t>index, why, error)
    if order_send(
        pool.attached[region.worker].channel, ORDER_POISON, page_address(pool, region, index), pool.page_bytes, text
    ):
        # Its channel is full of orders: let the fault come again rather than wait here.
        uffd_wake(pool.attached[region.worker].uffd, page_address(pool, region, index), pool.page_bytes)
    else:
        count(pool, C_POISONED, 1)
    life_drop(&region.word)
