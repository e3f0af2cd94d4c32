"""Workers, objects and regions: who maps what, where, and whether it still lives.

Each record's word holds its life:

    bits 0-30   users: threads of the swapper that are issuing ioctls for it
    bit  31     ALIVE
    bits 32-63  generation, one more at every begin

life_hold() lets a thread use the record's address or descriptor: life_end() waits until the last such user is
gone.  Users hold across ioctls only, never across I/O or a wait, so that wait is short.

A region of a private object that was shared has a map: a page id for each index, with COPYING while its worker's
attendant is about to map it there.  Where a sparse object has no page for the region the entry is a HOLE: COPYING
too, so that whoever leaves copies alone leaves it alone.  Its gate says who may decide what a write does to a page:

    bits 0-30   threads that are deciding
    bit  31     SHUT: a fork is copying the map
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport attached_t, pool_t
from pyswap.core.layout cimport (
    MAX_CLONES,
    REGION_NONE,
    object_id,
    page_id,
    region_id,
    region_t,
    worker_id,
)
from pyswap.core.lock cimport (
    add32,
    cas32,
    cas64,
    cpu_relax,
    futex_wait,
    futex_wake,
    load32,
    load64,
    mutex_lock,
    mutex_unlock,
    store32,
    store64,
)

cdef extern from *:
    """
    #define LIFE_ALIVE ((uint64_t)1 << 31)
    #define LIFE_USERS (LIFE_ALIVE - 1)
    #define GATE_SHUT ((uint32_t)1 << 31)
    #define MAP_COPYING ((uint64_t)1 << 63)
    #define MAP_HOLE ((uint64_t)3 << 62)
    #define MAP_PAGE (((uint64_t)1 << 62) - 1)
    """
    const uint64_t ALIVE "LIFE_ALIVE"
    const uint64_t USERS_MASK "LIFE_USERS"
    const uint32_t GATE_SHUT
    const uint64_t COPYING "MAP_COPYING"
    const uint64_t HOLE "MAP_HOLE"
    const uint64_t PAGE_MASK "MAP_PAGE"


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


cdef inline void life_recover(uint64_t *word, bint lives) noexcept nogil:
    """After a swapper's death: its users are gone with it, and what was not wholly begun has not begun."""
    cdef uint64_t value = load64(word) & ~USERS_MASK
    store64(word, value if lives else value & ~ALIVE)


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
    cdef region_t *region = &pool.regions[r]
    cdef uint32_t place, i
    mutex_lock(&a.lock)
    place = region_place(pool, a, region.address)
    i = a.count
    while i > place:
        a.regions[i] = a.regions[i - 1]
        i -= 1
    a.regions[place] = r
    a.count += 1
    a.breaks += region.breaks
    region.next = load32(&pool.mapped[region.object][worker])
    store32(&pool.mapped[region.object][worker], r)
    mutex_unlock(&a.lock)


cdef inline void region_withdraw(pool_t *pool, worker_id worker, region_id r) noexcept nogil:
    cdef attached_t *a = &pool.attached[worker]
    cdef region_t *region = &pool.regions[r]
    cdef uint32_t i, kept = 0
    cdef region_id *link = &pool.mapped[region.object][worker]
    mutex_lock(&a.lock)
    for i in range(a.count):
        if a.regions[i] != r:
            a.regions[kept] = a.regions[i]
            kept += 1
    a.count = kept
    a.breaks -= region.breaks
    while link[0] != REGION_NONE and link[0] != r:
        link = &pool.regions[link[0]].next
    if link[0] == r:
        store32(link, region.next)
    mutex_unlock(&a.lock)


cdef struct clones_t:           # a worker's regions of one object, not held
    uint32_t count
    region_id regions[128]
    uint32_t generations[128]


cdef inline void regions_of(pool_t *pool, object_id o, worker_id worker, clones_t *clones) noexcept nogil:
    """The worker's live regions of an object: one, or as many as there are clones of it."""
    cdef attached_t *a = &pool.attached[worker]
    cdef region_id r
    clones.count = 0
    if load32(&pool.mapped[o][worker]) == REGION_NONE:
        return
    mutex_lock(&a.lock)
    r = load32(&pool.mapped[o][worker])
    while r != REGION_NONE and clones.count < MAX_CLONES:
        clones.regions[clones.count] = r
        clones.generations[clones.count] = life_generation(&pool.regions[r].word)
        clones.count += 1
        r = pool.regions[r].next
    mutex_unlock(&a.lock)


# The map of a private region.

cdef inline uint64_t region_page(pool_t *pool, region_id r, int64_t index) noexcept nogil:
    """The page id at an index, with COPYING or HOLE; the region is held, or known not to be private."""
    cdef uint64_t *map = pool.maps[r]
    if map == NULL:
        return pool.regions[r].base + <uint64_t>index
    return load64(&map[index])


cdef inline bint region_lookup(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, uint64_t *page
) noexcept nogil:
    """As region_page(), of a region that is not held; False when it has ended."""
    if not life_hold(&pool.regions[r].word, generation):
        return False
    page[0] = region_page(pool, r, index)
    life_drop(&pool.regions[r].word)
    return True


cdef inline uint32_t region_run(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, uint64_t most, page_id *page
) noexcept nogil:
    """The page ids from an index on, as long as they are consecutive; 0 when the region has ended."""
    cdef uint32_t n = 1
    if not life_hold(&pool.regions[r].word, generation):
        return 0
    page[0] = region_page(pool, r, index) & PAGE_MASK
    if load32(&pool.regions[r].is_plain):
        n = <uint32_t>most
    while n < most and (region_page(pool, r, index + n) & PAGE_MASK) == page[0] + n:
        n += 1
    life_drop(&pool.regions[r].word)
    return n


cdef inline bint is_hole(uint64_t entry) noexcept nogil:
    return (entry & HOLE) == HOLE


cdef inline int break_at(uint64_t *map, int64_t index, int64_t pages) noexcept nogil:
    """Whether another mapping begins at an index; a hole has the mapping of the page id that it names."""
    if not 0 < index < pages:
        return False
    return (map[index] & PAGE_MASK) != (map[index - 1] & PAGE_MASK) + 1


# The gate.

cdef inline bint gate_enter(region_t *region) noexcept nogil:
    """Begin to decide about a write; False while a fork copies the map."""
    cdef uint32_t word
    while True:
        word = load32(&region.gate)
        if word & GATE_SHUT:
            return False
        if cas32(&region.gate, word, word + 1):
            return True


cdef inline void gate_leave(region_t *region) noexcept nogil:
    if add32(&region.gate, <uint32_t>-1) == (GATE_SHUT | 1):
        futex_wake(&region.gate, 0x7FFFFFFF)


cdef inline void gate_wait(region_t *region) noexcept nogil:
    """Wait while the gate is shut, holding nothing (R4); the caller looks again."""
    cdef uint32_t word = load32(&region.gate)
    if word & GATE_SHUT:
        futex_wait(&region.gate, word, 1_000_000)


cdef inline void gate_shut(region_t *region) noexcept nogil:
    """Keep writes from being decided; returns when nobody is deciding.  One thread forks at a time."""
    cdef uint32_t word
    while True:
        word = load32(&region.gate)
        if cas32(&region.gate, word, word | GATE_SHUT):
            break
    while True:
        word = load32(&region.gate)
        if word == GATE_SHUT:
            return
        futex_wait(&region.gate, word, 1_000_000)


cdef inline void gate_open(region_t *region) noexcept nogil:
    store32(&region.gate, 0)
    futex_wake(&region.gate, 0x7FFFFFFF)
