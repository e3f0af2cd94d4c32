"""The life of a takeover: what a swapper that was killed left half done is undone, or finished.

    0 what keeps an object beside its regions is as the request said that was under way
    1 lives       nobody uses a record any more       2 frames    by state, as below
    3 slots       those that nothing names are free   4 references  counted anew from the maps
    5 pins        taken again                         6 copies    those under way are ordered again
    7 counts, the free list

It runs alone: the process that it comes after has ended with all its threads, and no new one has begun.  It asks
nobody for anything.  Each step can be done again from the start, if this process dies in it too.  A page is touched
only where its entry names the frame; else the frame alone is freed.

    FILLING     punched, the entry names the slot again, or nothing
    PRESENT     unlocked: its bytes are whole
    WRITEBACK   present and dirty: whether the write came to its end is not known
    EVICTING    the write is complete: punched once more, the entry names the slot

What was about to be mapped by an attendant may be mapped or not.  It gets the order once more, under a new name, and
its copies stay pinned until that is answered.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from pyswap.core.context cimport pool_t
from pyswap.core.copy cimport copy_recover
from pyswap.core.engine cimport engine_remap
from pyswap.core.family cimport family_of, is_own_page, object_commits, page_put, places_begin
from pyswap.core.frame cimport DIRTY, frame_has, frame_pin, frame_push_free, frame_recover, frame_state
from pyswap.core.groups cimport group_words, touched_row
from pyswap.core.hold cimport hold_finish
from pyswap.core.kernel cimport file_allocate, file_has_data, uffd_wake
from pyswap.core.layout cimport (
    AREA_ON,
    AREA_SHIFT,
    EVICTING,
    FAILPOINTS,
    FILE_READ,
    FILLING,
    FREE,
    MAX_AREAS,
    MAX_COPIES,
    MAX_WORKERS,
    NO_EXTENT,
    PIN_FREE,
    PIN_GRANTED,
    PLACE_FREE,
    PLACE_TAKEN,
    PRESENT,
    PROMISE_CHILD,
    SLOT_CHUNK,
    SLOT_NONE,
    STATES,
    WRITEBACK,
    copy_t,
    family_t,
    frame_id,
    frame_t,
    object_id,
    object_t,
    page_id,
    pin_t,
    region_id,
    region_t,
    slot_t,
)
from pyswap.core.lock cimport (
    FP_TAKEOVER,
    add32,
    add64,
    failpoint_visit,
    load32,
    load64,
    panic,
    store32,
    store64,
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
from pyswap.core.region cimport (
    ALIVE,
    COPYING,
    break_at,
    gate_open,
    is_hole,
    life_generation,
    life_recover,
    region_page,
)
from pyswap.core.store cimport store_punch
from pyswap.core.swapmap cimport SLOT_USED, slot_is, slot_page, slot_recount, slot_recover


cdef inline bint region_counts(pool_t *pool, region_id r) noexcept nogil:
    """Whether a region is mapped, or promised to a child that may come."""
    cdef region_t *region = &pool.regions[r]
    cdef uint32_t place = pool.workers[region.worker].place
    if load64(&region.word) & ALIVE:
        return place == PLACE_TAKEN
    return load32(&region.promise) == PROMISE_CHILD and place != PLACE_FREE


cdef inline void family_recover(pool_t *pool, object_id o) noexcept nogil:
    """Find the family of an object that was shared; its record may lack the memory that nobody has written to."""
    cdef uint64_t at = pool.header.offset_families + o * sizeof(family_t)
    # A record's first page may have been written for the one before it.
    if not file_has_data(pool.control_fd, at) or load32(&pool.families[o].count) == 0:
        return
    if (
        file_allocate(pool.control_fd, at, sizeof(family_t)) != 0
        or file_allocate(pool.control_fd, pool.header.offset_copies, MAX_COPIES * sizeof(copy_t)) != 0
    ):
        panic("family_recover: no shared memory", o, 0, 0)
    store32(&pool.families[o].lock, 0)
    pool.families_ready[o] = 1
    pool.copies_ready = 1


cdef inline void lives_repair(pool_t *pool) noexcept nogil:
    """No thread uses a record; the regions' maps are where the records say."""
    cdef uint32_t i
    cdef region_t *region
    for i in range(<uint32_t>FAILPOINTS):
        store32(&pool.header.failpoints[i].parked, 0)
    for i in range(<uint32_t>MAX_WORKERS):
        life_recover(&pool.workers[i].word, pool.workers[i].place == PLACE_TAKEN)
        if pool.workers[i].place == PLACE_TAKEN:
            memset(touched_row(pool, i), 0xFF, group_words(pool.header.frame_room) * 8)
    for i in range(pool.header.object_high):
        life_recover(&pool.objects[i].word, pool.objects[i].pages != 0)
        if pool.objects[i].pages and pool.objects[i].is_private:
            family_recover(pool, i)
    for i in range(pool.header.region_high):
        region = &pool.regions[i]
        pool.maps[i] = NULL
        if region_counts(pool, i):
            life_recover(&region.word, True)
            gate_open(region)
            if load64(&region.word) & ALIVE:
                store32(&region.promise, 0)
            if region.map != NO_EXTENT:
                pool.maps[i] = &pool.map_entries[region.map]
        else:
            life_recover(&region.word, False)
            store32(&region.promise, 0)


# Frames.

cdef inline bint slot_is_of(pool_t *pool, uint32_t slot, uint64_t page) noexcept nogil:
    cdef uint64_t word = load64(&pool.slots[slot].word)
    return slot_is(word) == SLOT_USED and slot_page(word) == page


cdef inline void frame_repair(pool_t *pool, frame_id f) noexcept nogil:
    cdef frame_t *frame = &pool.frames[f]
    cdef int state = frame_state(frame)
    cdef uint64_t own = pte_make_frame(f)
    cdef bint dirty = frame_has(frame, DIRTY) or state == WRITEBACK
    if state == FILLING or state == EVICTING:
        if frame.page < pool.header.page_count and pte_read(pool, frame.page) == own:
            store_punch(pool, frame.page, 1)
            pte_change(pool, frame.page, own, pte_make_slot(frame.slot))
        frame_recover(frame, FREE, False)
    elif state == PRESENT or state == WRITEBACK:
        if pte_read(pool, frame.page) != own:
            panic("frame_repair: present, but not in the page table", f, frame.page, load64(&frame.word))
        if frame.slot != SLOT_NONE and not slot_is_of(pool, frame.slot, frame.page):
            # It was being given up.
            frame.slot = SLOT_NONE
            dirty = True
        frame_recover(frame, PRESENT, dirty)
    else:
        frame_recover(frame, state, False)


cdef inline void frames_repair(pool_t *pool) noexcept nogil:
    cdef uint64_t f
    for f in range(pool.header.frame_count):
        frame_repair(pool, <frame_id>f)
        add64(&pool.header.progress, 1)
        failpoint_visit(pool.header, FP_TAKEOVER)


# Slots.

cdef inline bint slot_is_named(pool_t *pool, uint32_t slot, uint64_t page) noexcept nogil:
    """Whether its page says so too, in the page table or in its frame."""
    cdef uint64_t pte
    if page >= pool.header.page_count:
        return False
    pte = pte_read(pool, page)
    if pte_is_slot(pte):
        return pte_slot(pte) == slot
    return pte_is_frame(pte) and pool.frames[pte_frame(pte)].slot == slot


cdef inline void chunk_repair(pool_t *pool, uint32_t k, uint64_t first) noexcept nogil:
    cdef uint64_t i, word
    pool.chunk_ready[first // SLOT_CHUNK] = 1
    for i in range(first, first + SLOT_CHUNK):
        word = load64(&pool.slots[i].word)
        if slot_is(word) == SLOT_USED and slot_is_named(pool, <uint32_t>i, slot_page(word)):
            slot_recount(pool, k, <uint32_t>i)
        elif word:
            slot_recover(pool, <uint32_t>i)


cdef inline void slots_repair(pool_t *pool) noexcept nogil:
    cdef uint64_t at
    cdef uint32_t k
    pool.header.slots_used = 0
    for k in range(<uint32_t>MAX_AREAS):
        pool.header.areas[k].used = 0
        # What was put aside is free again, and meets its error once more.
        pool.header.areas[k].bad = 0
        if pool.header.areas[k].state:
            pool.header.areas[k].state = AREA_ON
        at = 0
        while pool.header.areas[k].state and at < pool.header.areas[k].slots:
            if file_has_data(
                pool.control_fd,
                pool.header.offset_slots + ((<uint64_t>k << AREA_SHIFT) + at) * sizeof(slot_t),
            ):
                chunk_repair(pool, k, (<uint64_t>k << AREA_SHIFT) + at)
            add64(&pool.header.progress, 1)
            at += SLOT_CHUNK


# References, pins and copies.

cdef inline uint32_t copy_pending(pool_t *pool, copy_t *c) noexcept nogil:
    """The pages of a run of copies that wait for the attendant yet: the last so many."""
    cdef uint32_t n = 0
    if c.count == 0 or not region_counts(pool, c.region) or life_generation(
        &pool.regions[c.region].word
    ) != c.generation or pool.maps[c.region] == NULL:
        return 0
    while n < c.count and region_page(pool, c.region, c.index + c.count - 1 - n) == (
        (c.page + c.count - 1 - n) | COPYING
    ):
        n += 1
    return n


cdef inline void copies_repair(pool_t *pool) noexcept nogil:
    """Keep what waits for an attendant, under new names: the old pages keep the references that they had."""
    cdef copy_t *c
    cdef uint32_t i, k
    if not pool.copies_ready:
        return
    for i in range(<uint32_t>MAX_COPIES):
        c = &pool.copies[i]
        copy_recover(c, copy_pending(pool, c))
        pool.reminders[i] = c.count != 0
        for k in range(c.done, c.count):
            add32(&pool.references[c.old[k]], 1)
            frame_pin(pool, &pool.frames[pte_frame(pte_read(pool, c.page + k))], True)


cdef inline void references_clear(pool_t *pool, object_id o) noexcept nogil:
    cdef family_t *family = family_of(pool, o)
    cdef uint64_t i
    cdef uint32_t e
    if family == NULL:
        return
    store32(&family.lock, 0)
    for e in range(family.count):
        family.live[e] = 0
        if family.extents[e] != NO_EXTENT:
            for i in range(pool.objects[o].pages):
                store32(&pool.references[family.extents[e] + i], 0)
            add64(&pool.header.progress, 1)


cdef inline void place_repair(pool_t *pool, object_id o, page_id page, uint64_t index) noexcept nogil:
    """Note where a page is that is not where it was at first."""
    if not pool.objects[o].is_sparse or not is_own_page(pool, o, page) or page - pool.objects[o].base == index:
        return
    if not places_begin(pool, o):
        panic("place_repair: no memory", o, 0, 0)
    page_put(pool, o, page, index)


cdef inline void region_refer(pool_t *pool, region_id r) noexcept nogil:
    cdef region_t *region = &pool.regions[r]
    cdef uint32_t breaks = 0
    cdef uint64_t i, page
    if family_of(pool, region.object) == NULL:
        return
    for i in range(region.pages):
        page = region_page(pool, r, <int64_t>i)
        if not is_hole(page):
            add32(&pool.references[page & ~COPYING], 1)
            place_repair(pool, region.object, page & ~COPYING, i)
        if pool.maps[r] != NULL:
            breaks += break_at(pool.maps[r], <int64_t>i, <int64_t>region.pages)
    region.breaks = breaks
    store32(&region.is_plain, 0)


cdef inline uint64_t references_count(pool_t *pool, object_id o) noexcept nogil:
    """The pages that an object has committed."""
    cdef family_t *family = family_of(pool, o)
    cdef object_t *object = &pool.objects[o]
    cdef uint64_t i, committed = 0
    cdef uint32_t e
    if family == NULL:
        if not load64(&object.word) & ALIVE:
            return 0
        return object_commits(object.pages, object.is_sparse, object.file == FILE_READ, False)
    for e in range(family.count):
        if family.extents[e] == NO_EXTENT:
            continue
        for i in range(object.pages):
            family.live[e] += load32(&pool.references[family.extents[e] + i]) != 0
        committed += family.live[e]
        add64(&pool.header.progress, 1)
    return committed


cdef inline bint pin_counts(pool_t *pool, pin_t *pin) noexcept nogil:
    """Whether a pin is of a region that its worker has yet."""
    cdef region_t *region = &pool.regions[pin.region]
    return (
        region_counts(pool, pin.region)
        and load64(&region.word) & ALIVE != 0
        and region.worker == pin.worker
        and pin.first + pin.count <= region.pages
    )


cdef inline void pins_repair(pool_t *pool) noexcept nogil:
    """Pin again what was granted; the pages are resident, as pinned ones are."""
    cdef pin_t *pin
    cdef uint32_t i
    cdef uint64_t k, pte, page
    for i in range(pool.header.pin_high):
        pin = &pool.pins[i]
        if pin.state != PIN_GRANTED or not pin_counts(pool, pin):
            store32(&pin.state, PIN_FREE)
            continue
        for k in range(pin.first, pin.first + pin.count):
            page = region_page(pool, pin.region, <int64_t>k)
            if is_hole(page):
                continue
            pte = pte_read(pool, page & ~COPYING)
            if pte_is_frame(pte):
                frame_pin(pool, &pool.frames[pte_frame(pte)], pin.write)


cdef inline void references_repair(pool_t *pool) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t committed = 0
    for i in range(pool.header.object_high):
        if pool.objects[i].pages:
            references_clear(pool, i)
    for i in range(pool.header.region_high):
        if region_counts(pool, i):
            region_refer(pool, i)
            add64(&pool.header.progress, 1)
    copies_repair(pool)
    for i in range(pool.header.object_high):
        if pool.objects[i].pages:
            committed += references_count(pool, i)
    store64(&pool.header.committed_pages, committed)


# Counts.

cdef inline void counts_repair(pool_t *pool) noexcept nogil:
    """By state and dirty; and the free list, whose first is the lowest number."""
    cdef uint64_t f = pool.header.frame_count
    cdef int64_t counts[8]
    cdef int i
    for i in range(STATES):
        counts[i] = 0
    pool.free_count = 0
    pool.header.dirty_count = 0
    while f > 0:
        f -= 1
        counts[frame_state(&pool.frames[f])] += 1
        pool.header.dirty_count += frame_has(&pool.frames[f], DIRTY)
        if frame_state(&pool.frames[f]) == FREE:
            frame_push_free(pool, <frame_id>f)
    for i in range(STATES):
        pool.header.state_count[i] = counts[i]
    pool.header.resident_count = counts[PRESENT] + counts[WRITEBACK]


cdef inline void tables_repair(pool_t *pool) noexcept nogil:
    """All that can be known from the control segment alone; before any thread begins."""
    hold_finish(pool)
    lives_repair(pool)
    frames_repair(pool)
    slots_repair(pool)
    pool.header.pinned_count = 0
    references_repair(pool)
    pins_repair(pool)
    counts_repair(pool)
    failpoint_visit(pool.header, FP_TAKEOVER)


# What is told to the workers, once their descriptors are here.

cdef inline uint32_t copies_remind(pool_t *pool) noexcept nogil:
    """Order copies again; how many attendants have no room for the order now."""
    cdef uint32_t i, left = 0
    cdef copy_t *c
    for i in range(<uint32_t>MAX_COPIES):
        c = &pool.copies[i]
        if pool.reminders[i]:
            pool.reminders[i] = not engine_remap(
                pool, &pool.regions[c.region], c.index + c.done, c.count - c.done, c.page + c.done,
                (load64(&c.word) >> 32 << 32) | i
            )
            left += pool.reminders[i]
    return left


cdef inline void waiters_wake(pool_t *pool) noexcept nogil:
    """Let every fault happen again: one that the dead swapper had read is not delivered twice."""
    cdef uint32_t i
    cdef region_t *region
    for i in range(pool.header.region_high):
        region = &pool.regions[i]
        if load64(&region.word) & ALIVE:
            uffd_wake(pool.attached[region.worker].uffd, region.address, region.pages << pool.page_shift)
