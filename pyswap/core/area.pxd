"""How a swap area fares: one whose writes fail rests, longer each time, and others are written to meanwhile.

A write that failed is tried again by halves, so that one bad place costs its own slot alone, which is put aside
(swapmap.pxd).  After SUSPICIOUS of them in a row it is not the slots that are bad but the area: it rests, and the next
write shows whether it is well again.  Meanwhile nobody gives up a slot that is good.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport count, pool_t
from pyswap.core.layout cimport AREA_ON, C_WRITE_ERRORS, MAX_AREAS, area_t
from pyswap.core.lock cimport add32, add64, load32, load64, now_ns, store32, store64

cdef extern from *:
    int EDQUOT
    int ENOSPC

cdef enum:
    SUSPICIOUS = 4              # failed writes of single slots, none having worked in between
    REST_FIRST_NS = 5_000_000
    REST_LONGEST_NS = 500_000_000


cdef inline bint area_rests(area_t *area) noexcept nogil:
    return load64(&area.rest_until_ns) != 0 and now_ns() < load64(&area.rest_until_ns)


cdef inline uint64_t areas_rest_ns(pool_t *pool) noexcept nogil:
    """How long until one of the areas that rest, and have room, is to be tried again; 0: none rests."""
    cdef uint64_t now = now_ns(), until, least = 0
    cdef area_t *area
    cdef uint32_t k
    for k in range(<uint32_t>MAX_AREAS):
        area = &pool.header.areas[k]
        until = load64(&area.rest_until_ns)
        if area.state == AREA_ON and until > now and area.used + area.bad < <int64_t>area.slots:
            if least == 0 or until - now < least:
                least = until - now
    return least


cdef inline void area_rest(area_t *area) noexcept nogil:
    cdef uint64_t rest = 2 * load64(&area.rest_ns)
    if rest == 0:
        rest = REST_FIRST_NS
    if rest > REST_LONGEST_NS:
        rest = REST_LONGEST_NS
    store64(&area.rest_ns, rest)
    store64(&area.rest_until_ns, now_ns() + rest)


cdef inline bint area_wrote(pool_t *pool, uint32_t k, int rc, bint alone) noexcept nogil:
    """Note how a write went, and whether it was of one slot; True where that slot is to be put aside."""
    cdef area_t *area = &pool.header.areas[k]
    if rc == 0:
        if load32(&area.failures) or load64(&area.rest_ns):
            store32(&area.failures, 0)
            store64(&area.rest_ns, 0)
            store64(&area.rest_until_ns, 0)
        return False
    count(pool, C_WRITE_ERRORS, 1)
    add64(&area.errors, 1)
    store32(&area.error, <uint32_t>-rc)
    if not alone:
        return False
    if load32(&area.failures) >= SUSPICIOUS or add32(&area.failures, 1) + 1 >= SUSPICIOUS:
        area_rest(area)
        return False
    # A full file system says nothing about the slot.
    return rc != -ENOSPC and rc != -EDQUOT


cdef inline area_t *area_failing(pool_t *pool) noexcept nogil:
    """An area that could not be written when it was last tried; NULL where all is well."""
    cdef uint32_t k
    for k in range(<uint32_t>MAX_AREAS):
        if pool.header.areas[k].state == AREA_ON and load64(&pool.header.areas[k].rest_ns):
            return &pool.header.areas[k]
    return NULL
