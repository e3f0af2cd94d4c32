"""A family: a private object's regions and the page ids they share, each with a reference count.

An index has one page id in every extent of the family, so that neighbours copied by one process are neighbours
again.  A page id is given to a copy when it has no reference and its page table entry is empty.  It takes two
extents a region to be sure of one: a region holds one page id of an index, and a second while its
attendant maps a copy.

Until an object is first shared it has no family: each page has one reference, which nobody counts.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport family_t, pool_t
from pyswap.core.layout cimport object_id, page_id
from pyswap.core.lock cimport (
    add32,
    add64,
    cas64,
    load32,
    load64,
    mutex_lock,
    mutex_unlock,
    panic,
    store32,
)
from pyswap.core.pagetable cimport PTE_EMPTY, pte_read
from pyswap.core.region cimport ALIVE

cdef extern from *:
    """
    #define NO_EXTENT UINT64_MAX
    """
    const page_id NO_EXTENT


cdef inline family_t *family_of(pool_t *pool, object_id o) noexcept nogil:
    """The family of an object that was shared; NULL before."""
    cdef family_t *family = pool.families[o]
    if family == NULL or load32(&family.count) == 0:
        return NULL
    return family


cdef inline bint page_is_shared(pool_t *pool, object_id o, page_id page) noexcept nogil:
    return family_of(pool, o) != NULL and load32(&pool.references[page]) > 1


cdef inline bint page_lives(pool_t *pool, object_id o, page_id page) noexcept nogil:
    """Whether a page may hold anything: its object lives, and some region refers to it (R7)."""
    if not load64(&pool.objects[o].word) & ALIVE:
        return False
    return family_of(pool, o) == NULL or load32(&pool.references[page]) != 0


cdef inline bint commit_take(pool_t *pool, uint64_t pages) noexcept nogil:
    """Room for pages in frames and slots together; False where there is none."""
    cdef uint64_t committed
    while True:
        committed = load64(&pool.header.committed_pages)
        if not pool.header.overcommit and committed + pages > load64(&pool.header.commit_limit_pages):
            return False
        if cas64(&pool.header.committed_pages, committed, committed + pages):
            return True


cdef inline void commit_give(pool_t *pool, uint64_t pages) noexcept nogil:
    add64(&pool.header.committed_pages, -pages)


cdef inline uint32_t extent_of(family_t *family, page_id page, uint64_t pages) noexcept nogil:
    """The number of the extent that a page id is in; under the lock."""
    cdef uint32_t e
    for e in range(family.count):
        if family.extents[e] != NO_EXTENT and family.extents[e] <= page < family.extents[e] + pages:
            return e
    panic("extent_of: a page of no extent", page, family.count, pages)
    return 0


cdef inline bint page_take(
    pool_t *pool, object_id o, int64_t index, page_id wanted, page_id *page
) noexcept nogil:
    """A page id for a copy at an index, with one reference: `wanted`, or any where that is NO_EXTENT."""
    cdef family_t *family = pool.families[o]
    cdef page_id p
    cdef uint32_t e
    cdef bint found = False
    mutex_lock(&family.lock)
    for e in range(family.count):
        p = family.extents[e] + <uint64_t>index
        if family.extents[e] == NO_EXTENT or (wanted != NO_EXTENT and p != wanted):
            continue
        if load32(&pool.references[p]) == 0 and pte_read(pool, p) == PTE_EMPTY:
            store32(&pool.references[p], 1)
            family.live[e] += 1
            page[0] = p
            found = True
            break
    mutex_unlock(&family.lock)
    return found


cdef inline bint page_drop(pool_t *pool, object_id o, page_id page) noexcept nogil:
    """Give up a reference; True when it was the last, and what the page holds is to be swept."""
    cdef family_t *family = pool.families[o]
    cdef uint32_t before = add32(&pool.references[page], <uint32_t>-1)
    if before == 0:
        panic("page_drop: no reference", page, o, 0)
    if before > 1:
        return False
    mutex_lock(&family.lock)
    family.live[extent_of(family, page, pool.objects[o].pages)] -= 1
    mutex_unlock(&family.lock)
    commit_give(pool, 1)
    return True
