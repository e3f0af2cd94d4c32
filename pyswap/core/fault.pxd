"""The life of a fault: from an address to a mapped page; and pins, which are faults that stay.

    1 find the region   2 feed readahead   3 page_acquire   4 map it, and neighbours   5 unlock

Who may interleave, and what stops it:
 - the end of the region: it is held around every ioctl (R2)
 - a page that somebody else fills or evicts: the fault has left word, the thread goes on, and it happens again
   after the wake-up
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pyswap.core.context cimport STARVED_FAULTS, count, pool_t, starved_t
from pyswap.core.engine cimport engine_poison, engine_unprotect, engine_wake, page_unlock
from pyswap.core.frame cimport frame_pin, frame_set_dirty, frame_unpin
from pyswap.core.kernel cimport UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, uffd_wake
from pyswap.core.layout cimport (
    ADVICE_RANDOM,
    C_FRAME_WAITS,
    C_MAJOR_FAULTS,
    C_MINOR_FAULTS,
    C_WRITE_FAULTS,
    C_ZERO_FILLS,
    frame_id,
    frame_t,
    region_id,
    region_t,
    worker_id,
)
from pyswap.core.lock cimport (
    FP_MAP_BEFORE,
    add32,
    failpoint_visit,
    futex_wake,
    mutex_lock,
    mutex_unlock,
    now_ns,
)
from pyswap.core.mapping cimport frame_used, map_around, map_run, unprotect_around
from pyswap.core.page cimport NOTED, STARVED, page_acquire, wanted_t
from pyswap.core.readahead cimport detector_feed
from pyswap.core.region cimport life_drop, life_generation, life_hold, region_copy, region_find

cdef extern from *:
    int EIO
    int ENOENT
    int ENOMEM
    int EAGAIN
    int ESRCH

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


cdef inline bint starved_put(pool_t *pool, starved_t *fault) noexcept nogil:
    """Hand a fault that needs a frame to the patient threads, so that this one can go on; False: no room."""
    cdef bint room
    mutex_lock(&pool.starved_lock)
    room = pool.starved_tail - pool.starved_head < STARVED_FAULTS
    if room:
        pool.starved[pool.starved_tail % STARVED_FAULTS] = fault[0]
        pool.starved_tail += 1
    mutex_unlock(&pool.starved_lock)
    if room:
        count(pool, C_FRAME_WAITS, 1)
        add32(&pool.starved_sequence, 1)
        futex_wake(&pool.starved_sequence, 1)
    return room


cdef inline bint starved_take(pool_t *pool, starved_t *fault) noexcept nogil:
    cdef bint any
    mutex_lock(&pool.starved_lock)
    any = pool.starved_tail != pool.starved_head
    if any:
        fault[0] = pool.starved[pool.starved_head % STARVED_FAULTS]
        pool.starved_head += 1
    mutex_unlock(&pool.starved_lock)
    return any


cdef inline void wake_unknown(pool_t *pool, worker_id worker, uint64_t address) noexcept nogil:
    """A fault at an address of no region: it was one when the fault began."""
    if life_hold(&pool.workers[worker].word, life_generation(&pool.workers[worker].word)):
        uffd_wake(pool.attached[worker].uffd, address & ~(pool.page_bytes - 1), pool.page_bytes)
        life_drop(&pool.workers[worker].word)


cdef inline void fault_map(
    pool_t *pool,
    wanted_t *want,
    region_id r,
    region_t *region,
    int64_t index,
    int64_t stride,
    frame_id f,
    bint write,
    bint mapped,
) noexcept nogil:
    """Map a locked page, or lift its protection where it is mapped, and its neighbours with it."""
    cdef uint32_t generation = life_generation(&region.word)
    cdef int rc
    failpoint_visit(pool.header, FP_MAP_BEFORE)
    if mapped:
        frame_set_dirty(pool, &pool.frames[f])
        frame_used(pool, &pool.frames[f])
        rc = engine_unprotect(pool, r, generation, index, 1)
        unprotect_around(pool, want, r, region, index, stride)
    else:
        rc = map_run(pool, r, generation, index, &f, 1, write)
        if region.advice != ADVICE_RANDOM:
            map_around(pool, want, r, region, index, stride, write)
    if rc == -ENOENT or rc == -ESRCH or rc == -EAGAIN:
        # The mapping or its process is going away: what is left of it may fault again.
        engine_wake(pool, r, generation, index)
    elif rc != 0:
        engine_poison(pool, r, generation, index, b"it could not be mapped", -rc)


cdef inline void fault_resolve(
    pool_t *pool, worker_id worker, uint64_t address, uint64_t flags, uint8_t *buffer, bint patient
) noexcept nogil:
    cdef region_id r = 0
    cdef uint32_t generation = 0
    cdef region_t region
    cdef wanted_t want
    cdef starved_t starved
    cdef frame_id f = 0
    cdef int64_t index, stride
    cdef bint write = (flags & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP)) != 0
    cdef bint mapped = (flags & UFFD_PAGEFAULT_FLAG_WP) != 0
    cdef int rc
    # 1. Which page of which object.  A region that ends from here on makes the verbs below do nothing.
    if not region_find(pool, worker, address, &r, &generation) or not region_copy(
        pool, r, generation, &region
    ):
        wake_unknown(pool, worker, address)
        return
    index = <int64_t>((address - region.address) >> pool.page_shift)
    want.object = region.object
    want.object_generation = region.object_generation
    want.page = region.base + <uint64_t>index
    want.worker = worker
    want.sleeps = False
    want.buffer = buffer
    want.patient = patient
    want.deadline_ns = now_ns() + <uint64_t>pool.header.frame_wait_ms * 1_000_000
    # 2. Readahead first, so that it goes on while this page is read.
    stride = detector_feed(pool, r, index)
    # 3. The frame.
    rc = page_acquire(pool, &want, &f)
    if rc == STARVED:
        starved.worker = worker
        starved.address = address
        starved.flags = flags
        if starved_put(pool, &starved):
            return
        want.patient = True
        rc = page_acquire(pool, &want, &f)
    if rc == NOTED:
        return
    if rc < 0:
        engine_poison(pool, r, generation, index, fault_reason(rc), -rc if rc == -EIO else 0)
        return
    # Counted before the thread goes on, so that it finds its own faults in the numbers.
    count(pool, C_WRITE_FAULTS if mapped else C_MAJOR_FAULTS if want.read else C_MINOR_FAULTS, 1)
    if want.filled and not want.read:
        count(pool, C_ZERO_FILLS, 1)
    # 4. The mapping, under the frame's lock.
    fault_map(pool, &want, r, &region, index, stride, f, write, mapped and not want.filled)
    # 5. Done; whoever waited for the page faults again.
    page_unlock(pool, &pool.frames[f])
