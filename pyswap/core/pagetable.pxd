"""The page table: one 64-bit word a page id, and the only place that says whether a page is resident.

    bits 0-1    kind: EMPTY (all zeros, in neither frame nor slot), FRAME, SLOT
    bits 2-33   the frame, or the slot
    bit  34     of a SLOT entry: the page was HOT, and ordinary again when it was evicted
    bits 35-63  of a SLOT entry: the eviction's time, see policy.pxd; 0: unknown

An entry changes by compare-and-swap: into FRAME by the filler who owns that frame; out of FRAME by who holds
its lock.  That a slot entry was something else in between (A-B-A) is harmless: the slot named at the moment
of the swap is read after it.
"""
from libc.stdint cimport uint32_t, uint64_t

from pyswap.core.context cimport pool_t
from pyswap.core.layout cimport SLOT_NONE, frame_id, page_id, slot_id
from pyswap.core.lock cimport FP_PTE_FRAME, FP_PTE_LEFT, cas64, failpoint_visit, load64, panic

cdef enum:
    PTE_EMPTY = 0
    PTE_FRAME = 1
    PTE_SLOT = 2
    PTE_KINDS = 3
    PTE_TIME_SHIFT = 35
    PTE_TIMES = 1 << 29

cdef extern from *:
    """
    #define PTE_WAS_HOT (1ull << 34)
    """
    const uint64_t PTE_WAS_HOT


cdef inline uint64_t pte_make_frame(frame_id f) noexcept nogil:
    return (<uint64_t>f << 2) | PTE_FRAME


cdef inline uint64_t pte_make_slot(slot_id slot) noexcept nogil:
    """SLOT_NONE makes EMPTY: a page in no slot is zero."""
    if slot == SLOT_NONE:
        return PTE_EMPTY
    return (<uint64_t>slot << 2) | PTE_SLOT


cdef inline uint64_t pte_make_evicted(slot_id slot, uint64_t time, bint was_hot) noexcept nogil:
    """As pte_make_slot(), with the eviction's time and what it says of the page's worth."""
    if slot == SLOT_NONE:
        return PTE_EMPTY
    return (time << PTE_TIME_SHIFT) | (PTE_WAS_HOT if was_hot else 0) | pte_make_slot(slot)


cdef inline uint64_t pte_time(uint64_t pte) noexcept nogil:
    """When the page was evicted; 0 where nobody knows."""
    return pte >> PTE_TIME_SHIFT if pte_is_slot(pte) else 0


cdef inline bint pte_is_frame(uint64_t pte) noexcept nogil:
    return (pte & PTE_KINDS) == PTE_FRAME


cdef inline bint pte_is_slot(uint64_t pte) noexcept nogil:
    return (pte & PTE_KINDS) == PTE_SLOT


cdef inline frame_id pte_frame(uint64_t pte) noexcept nogil:
    if not pte_is_frame(pte):
        panic("pte_frame: no frame", pte, 0, 0)
    return <frame_id>(pte >> 2)


cdef inline slot_id pte_slot(uint64_t pte) noexcept nogil:
    """The slot, or SLOT_NONE of an empty entry."""
    if pte_is_frame(pte):
        panic("pte_slot: a frame", pte, 0, 0)
    if not pte_is_slot(pte):
        return SLOT_NONE
    return <slot_id>(pte >> 2)


cdef inline uint64_t pte_read(pool_t *pool, page_id page) noexcept nogil:
    return load64(&pool.pages[page])


cdef inline bint pte_change(pool_t *pool, page_id page, uint64_t before, uint64_t after) noexcept nogil:
    if not cas64(&pool.pages[page], before, after):
        return False
    failpoint_visit(pool.header, FP_PTE_FRAME if pte_is_frame(after) else FP_PTE_LEFT)
    return True
