"""Workers, objects and regions: who maps what, where, and whether it still lives.

Each record's word holds its life:

    bits 0-30   users: threads of the swapper that are issuing ioctls for it
    bit  31     ALIVE
    bits 32-63  generation, one more at every begin

life_hold() lets a thread use the record's address or descriptor: life_end() waits until the last such user is
gone.  Users hold across ioctls only, never across I/O or a wait, so that wait is short.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport attached_t, pool_t
from pyswap.core.layout cimport REGION_NONE, object_id, page_id, region_id, region_t, worker_id
from pyswap.core.lock cimport cas64, cpu_relax, load32, load64, mutex_lock, mutex_unlock, store64

cdef extern from *:
    """
    #define LIFE_ALIVE ((uint64_t)1 << 31)
    #define LIFE_USERS (LIFE_ALIVE - 1)
    """
    const uint64_t ALIVE "LIFE_ALIVE"
    const uint64_t USERS_MASK "LIFE_USERS"


cdef inline uint32_t life_generation(const uint64_t *word) noexcept nogil:
    return <uint32_t>(load64(word) >> 32)


cdef inline bint life_is(const uint64_t *word, uint32_t generation) noexcept nogil:
    cdef uint64_t value = load64(word)
    return (value & ALIVE) != 0 and <uint32_t>(value >> 32) == generation


cdef inline uint32_t life_begin(uint64_t *word) noexcept nogil:
    cdef uint64_t generation = (load64(word) >> 32) + 1
    store64(word, (generation << 32) | ALIVE)
    return <uint32_t>generation


cdef inline bint life_hold(uint64_t *word, uint32_t generation) noexcept nogil:
    cdef uint64_t value
    while True:
        value = load64(word)
        if not value & ALIVE or <uint32_t>(value >> 32) != generation:
            return False
        if cas64(word, value, value + 1):
            return True


cdef inline void life_drop(uint64_t *word) noexcept nogil:
    cdef uint64_t value
    while True:
        value = load64(word)
        if cas64(word, value, value - 1):
            return


cdef inline void life_end(uint64_t *word) noexcept nogil:
    """No new users from here on; returns when the last has dropped."""
    cdef uint64_t value
    while True:
        value = load64(word)
        if cas64(word, value, value & ~ALIVE):
            break
    while load64(word) & USERS_MASK:
        cpu_relax()


# One worker's regions, sorted by address.

cdef inline uint32_t region_place(pool_t *pool, attached_t *a, uint64_t address) noexcept nogil:
    """The number of regions that start at or below the address; under a.lock."""
    cdef uint32_t low = 0, high = a.count, middle
    while low < high:
        middle = (low + high) // 2
        if pool.regions[a.regions[middle]].address <= address:
            low = middle + 1
        else:
            high = middle
    return low


cdef inline bint region_find(
    pool_t *pool, worker_id worker, uint64_t address, region_id *found, uint32_t *generation
) noexcept nogil:
    """The worker's live region over an address."""
    cdef attached_t *a = &pool.attached[worker]
    cdef uint32_t place
    cdef region_t *region
    cdef bint hit = False
    mutex_lock(&a.lock)
    place = region_place(pool, a, address)
    if place:
        region = &pool.regions[a.regions[place - 1]]
        if address < region.address + (region.pages << pool.page_shift):
            found[0] = a.regions[place - 1]
            generation[0] = life_generation(&region.word)
            hit = True
    mutex_unlock(&a.lock)
    return hit


cdef inline bint region_copy(pool_t *pool, region_id r, uint32_t generation, region_t *copy) noexcept nogil:
    """A copy of a region's record, which may be another's once nobody holds it; False when it has ended."""
    if not life_hold(&pool.regions[r].word, generation):
        return False
    copy[0] = pool.regions[r]
    life_drop(&pool.regions[r].word)
    return True


cdef inline region_id region_over(
    pool_t *pool, worker_id worker, page_id page, uint32_t *generation
) noexcept nogil:
    """The worker's region that a page id is in, of whatever object: looked for one by one."""
    cdef attached_t *a = &pool.attached[worker]
    cdef region_t *region
    cdef region_id r = REGION_NONE
    cdef uint32_t i
    mutex_lock(&a.lock)
    for i in range(a.count):
        region = &pool.regions[a.regions[i]]
        if region.base <= page < region.base + region.pages:
            r = a.regions[i]
            generation[0] = life_generation(&region.word)
            break
    mutex_unlock(&a.lock)
    return r


cdef inline bint region_overlaps(pool_t *pool, worker_id worker, uint64_t address, uint64_t size) noexcept nogil:
    """Whether the worker has a region somewhere in a range of addresses."""
    cdef attached_t *a = &pool.attached[worker]
    cdef uint32_t place
    cdef region_t *below
    cdef bint hit = False
    mutex_lock(&a.lock)
    place = region_place(pool, a, address + size - 1)
    if place:
        below = &pool.regions[a.regions[place - 1]]
        hit = address < below.address + (below.pages << pool.page_shift)
    mutex_unlock(&a.lock)
    return hit


cdef inline void region_insert(pool_t *pool, worker_id worker, region_id r) noexcept nogil:
    """The caller has made room: a.count < a.capacity."""
    cdef attached_t *a = &pool.attached[worker]
    cdef uint32_t place, i
    mutex_lock(&a.lock)
    place = region_place(pool, a, pool.regions[r].address)
    i = a.count
    while i > place:
        a.regions[i] = a.regions[i - 1]
        i -= 1
    a.regions[place] = r
    a.count += 1
    mutex_unlock(&a.lock)


cdef inline void region_withdraw(pool_t *pool, worker_id worker, region_id r) noexcept nogil:
    cdef attached_t *a = &pool.attached[worker]
    cdef uint32_t i, kept = 0
    mutex_lock(&a.lock)
    for i in range(a.count):
        if a.regions[i] != r:
            a.regions[kept] = a.regions[i]
            kept += 1
    a.count = kept
    mutex_unlock(&a.lock)


cdef inline region_id region_of(pool_t *pool, object_id o, worker_id worker, uint32_t *generation) noexcept nogil:
    """The worker's region of an object, not yet held; REGION_NONE where it has none."""
    cdef region_id r = load32(&pool.mapped[o][worker])
    if r != REGION_NONE:
        generation[0] = life_generation(&pool.regions[r].word)
        if pool.regions[r].object != o or pool.regions[r].worker != worker:
            return REGION_NONE
    return r
