"""A family: a private object's regions and the page ids they share, each with a reference count.

An index has one page id in every extent of the family, so that neighbours copied by one process are neighbours
again.  A page id is given to a copy when it has no reference and its page table entry is empty.  It takes two
extents a region to be sure of one: a region holds one page id of an index, and a second while its
attendant maps a copy.

Counts change under the family's lock, and are read without: what makes a count of one true for long enough is said
where it is read.  Until an object is first shared it has no family: each page has one reference, which nobody counts.

In a sparse object pages of its own, the first, extent move to other indexes (sparse.pxd).  `places` says where a page
is, as the difference to where it was at first, so that zeros mean that it never moved.  It is set by who gives a page
its first reference, or moves it, before a map has the page there.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc

from pyswap.core.context cimport count_most, pool_t
from pyswap.core.layout cimport C_PEAK_COMMITTED, NO_EXTENT, family_t, object_id, page_id
from pyswap.core.lock cimport (
    FP_PAGE_DROPPED,
    FP_PAGE_SHARED,
    FP_PAGE_TAKE,
    FP_PAGE_TAKEN,
    add64,
    cas64,
    failpoint_visit,
    load32,
    load64,
    mutex_lock,
    mutex_unlock,
    or64,
    panic,
    store32,
    store32_release,
)
from pyswap.core.pagetable cimport PTE_EMPTY, pte_read
from pyswap.core.region cimport ALIVE


cdef inline family_t *family_of(pool_t *pool, object_id o) noexcept nogil:
    """The family of an object that was shared; NULL before."""
    if not pool.families_ready[o] or load32(&pool.families[o].count) == 0:
        return NULL
    return &pool.families[o]


cdef inline bint page_is_shared(pool_t *pool, object_id o, page_id page) noexcept nogil:
    return family_of(pool, o) != NULL and load32(&pool.references[page]) > 1


cdef inline bint page_lives(pool_t *pool, object_id o, page_id page) noexcept nogil:
    """Whether a page may hold anything: its object lives, and some region refers to it (R7)."""
    if not load64(&pool.objects[o].word) & ALIVE:
        return False
    return family_of(pool, o) == NULL or load32(&pool.references[page]) != 0


cdef inline uint64_t object_commits(
    uint64_t pages, bint is_sparse, bint is_read_only, bint is_shared
) noexcept nogil:
    """What an object commits when it is made, and gives back when it ends.

    Ranges of a sparse one, and pages of one that has a family, do so by themselves; a page that nobody may write to
    needs no room.
    """
    return 0 if is_sparse or is_read_only or is_shared else pages


cdef inline bint commit_take(pool_t *pool, uint64_t pages) noexcept nogil:
    """Room for pages in frames and slots together; False where there is none."""
    cdef uint64_t committed
    while True:
        committed = load64(&pool.header.committed_pages)
        if not pool.header.overcommit and committed + pages > load64(&pool.header.commit_limit_pages):
            return False
        if cas64(&pool.header.committed_pages, committed, committed + pages):
            count_most(pool, C_PEAK_COMMITTED, committed + pages)
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


cdef inline bint places_begin(pool_t *pool, object_id o) noexcept nogil:
    """Let pages of an object move; False without memory.  One thread does that."""
    if pool.places[o] == NULL:
        pool.places[o] = <uint32_t *>calloc(pool.objects[o].pages, sizeof(uint32_t))
    return pool.places[o] != NULL


cdef inline bint is_own_page(pool_t *pool, object_id o, page_id page) noexcept nogil:
    """Whether a page id is of the object's own extent."""
    return page - pool.objects[o].base < pool.objects[o].pages


cdef inline uint64_t page_place(pool_t *pool, object_id o, page_id page, uint64_t index) noexcept nogil:
    """Where a page lies in its object: `index`, unless it may have moved since that was looked up."""
    cdef uint64_t home = page - pool.objects[o].base
    if pool.places[o] == NULL or not is_own_page(pool, o, page):
        return index
    return load32(&pool.places[o][home]) ^ home


cdef inline void page_put(pool_t *pool, object_id o, page_id page, uint64_t index) noexcept nogil:
    """A page is at an index from here on."""
    cdef uint64_t home = page - pool.objects[o].base
    if pool.places[o] != NULL and is_own_page(pool, o, page):
        store32(&pool.places[o][home], <uint32_t>(index ^ home))


cdef inline bint page_take(
    pool_t *pool, object_id o, int64_t index, page_id wanted, page_id *page
) noexcept nogil:
    """A page id for a copy at an index, with one reference: `wanted`, or any where that is NO_EXTENT."""
    cdef family_t *family = &pool.families[o]
    cdef page_id p
    cdef uint32_t e
    cdef bint found = False
    if failpoint_visit(pool.header, FP_PAGE_TAKE) != 0:
        return False
    mutex_lock(&family.lock)
    for e in range(family.count):
        p = family.extents[e] + <uint64_t>index
        if family.extents[e] == NO_EXTENT or (wanted != NO_EXTENT and p != wanted):
            continue
        if load32(&pool.references[p]) == 0 and pte_read(pool, p) == PTE_EMPTY:
            page_put(pool, o, p, <uint64_t>index)
            store32(&pool.references[p], 1)
            family.live[e] += 1
            page[0] = p
            found = True
            break
    mutex_unlock(&family.lock)
    if found:
        failpoint_visit(pool.header, FP_PAGE_TAKEN)
    return found


cdef inline void pages_share(pool_t *pool, object_id o, page_id first, uint64_t count) noexcept nogil:
    """A reference more for each of consecutive pages; the gate of the region that has one is shut (R10)."""
    cdef family_t *family = &pool.families[o]
    cdef uint32_t *counts = &pool.references[first]
    cdef uint64_t i
    mutex_lock(&family.lock)
    for i in range(count):
        store32_release(&counts[i], load32(&counts[i]) + 1)
    mutex_unlock(&family.lock)
    failpoint_visit(pool.header, FP_PAGE_SHARED)


cdef inline void family_look_again(pool_t *pool, object_id o) noexcept nogil:
    """There is something to sweep, or an extent to give back, that was not to be had just now."""
    or64(&pool.unswept[o >> 6], <uint64_t>1 << (o & 63))


cdef inline void page_gone(pool_t *pool, object_id o, page_id page) noexcept nogil:
    """The last reference was given up; under the lock."""
    cdef family_t *family = &pool.families[o]
    cdef uint32_t e = extent_of(family, page, pool.objects[o].pages)
    family.live[e] -= 1
    # The object's own extent stays.
    if family.live[e] == 0 and family.extents[e] != pool.objects[o].base:
        family_look_again(pool, o)
    commit_give(pool, 1)


cdef inline bint pages_drop(pool_t *pool, object_id o, page_id first, uint64_t count) noexcept nogil:
    """Give up a reference to each of consecutive pages; True when one was its page's last: there is something to sweep.
    """
    cdef family_t *family = &pool.families[o]
    cdef uint32_t *counts = &pool.references[first]
    cdef uint32_t before
    cdef uint64_t i
    cdef bint last = False
    mutex_lock(&family.lock)
    for i in range(count):
        before = load32(&counts[i])
        if before == 0:
            panic("pages_drop: no reference", first + i, o, 0)
        store32_release(&counts[i], before - 1)
        if before == 1:
            page_gone(pool, o, first + i)
            last = True
    mutex_unlock(&family.lock)
    failpoint_visit(pool.header, FP_PAGE_DROPPED)
    return last


cdef inline bint page_drop(pool_t *pool, object_id o, page_id page) noexcept nogil:
    """Give up a reference; True when it was the last, and what the page holds is to be swept."""
    return pages_drop(pool, o, page, 1)
