"""The life of a fork, or of a snapshot: regions of private objects get maps of their own over the same pages.

    1 shut the gates   2 copy the maps, a reference for each page   3 write-protect   4 open the gates

Who may interleave, and what stops it:
 - a write that was found to need no copy before 2, and is mapped after 3: the gates (R10)
 - the parent's writes between this and fork(): they copy first, since the pages have two references now
 - pages that are pinned, or about to be mapped by the attendant, cannot be write-protected: the map's copy gets a
   copy of them (R11)
 - a child that never comes: region_unshare() gives the references back

The system calls are bounded for a region: what may be mapped writable is protected in at most PROTECT_RANGES ranges,
whose gaps grow until they are so few, and one more for each pinned page in between.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort

from pyswap.core.context cimport pool_t
from pyswap.core.copy cimport page_forget
from pyswap.core.engine cimport engine_protect
from pyswap.core.evict cimport pages_sweep
from pyswap.core.family cimport family_look_again, pages_drop, pages_share
from pyswap.core.frame cimport WRITABLE, frame_flags, frame_has, word_generation
from pyswap.core.groups cimport GROUP_FRAMES, group_end, group_note, group_take, group_words, groups_count
from pyswap.core.kernel cimport file_allocate
from pyswap.core.layout cimport (
    MAX_BATCH_PAGES,
    NO_EXTENT,
    family_t,
    frame_id,
    frame_t,
    object_id,
    object_t,
    page_id,
    region_id,
    region_t,
)
from pyswap.core.lock cimport (
    FP_FORK_COPIED,
    FP_MAP_SET,
    FP_REFERENCES_BEGUN,
    failpoint_visit,
    load32,
    load64,
    loadi64,
    mutex_lock,
    mutex_unlock,
    store32,
    store64,
)
from pyswap.core.mapping cimport is_mapper
from pyswap.core.page cimport page_is_pinned
from pyswap.core.pagetable cimport PTE_EMPTY, pte_frame, pte_is_frame, pte_read
from pyswap.core.region cimport (
    HOLE,
    PAGE_MASK,
    break_at,
    gate_open,
    gate_shut,
    is_hole,
    life_generation,
    region_page,
)
from pyswap.core.run cimport page_copy_early

cdef extern from *:
    int ENOMEM

cdef enum:
    PROTECT_RANGES = 64
    RUN_PAGES = 4096            # counted in one hold of the family's lock, which sharers' copies wait for
    FEW_PAGES = 8               # so many times fewer than the frames that would be looked at instead

cdef struct share_t:            # a region, and the one that shares its pages from here on
    region_id source
    region_id clone
    uint64_t source_map         # places in the table of maps; the source's own if it has one already
    uint64_t clone_map


cdef inline int family_extend(pool_t *pool, object_id o, page_id base) noexcept nogil:
    """Give a private object page ids for copies; the first extent is its own, each page of it with one reference.

    Of a sparse object they have none: range_begin() gives them.
    """
    cdef object_t *object = &pool.objects[o]
    cdef family_t *family = &pool.families[o]
    cdef uint64_t i
    cdef uint32_t e = 0
    cdef bint given = base == object.base and not object.is_sparse
    cdef int rc = file_allocate(pool.control_fd, pool.header.offset_references + base * 4, object.pages * 4)
    if rc == 0 and base != object.base:
        rc = file_allocate(pool.control_fd, pool.header.offset_pages + base * 8, object.pages * 8)
    if rc != 0:
        return rc
    if given:
        for i in range(object.pages):
            store32(&pool.references[base + i], 1)
    if base == object.base:
        failpoint_visit(pool.header, FP_REFERENCES_BEGUN)
    mutex_lock(&family.lock)
    while e < family.count and family.extents[e] != NO_EXTENT:
        e += 1
    family.extents[e] = base
    family.live[e] = <int64_t>object.pages if given else 0
    if e == family.count:
        store32(&family.count, e + 1)
    mutex_unlock(&family.lock)
    return 0


cdef inline uint64_t family_sweep(pool_t *pool, object_id o) noexcept nogil:
    """Free what pages without references have; returns how many somebody else still holds."""
    cdef family_t *family = &pool.families[o]
    cdef uint64_t pages = pool.objects[o].pages, held = 0, at, i
    cdef page_id base
    cdef uint32_t e, n
    for e in range(load32(&family.count)):
        base = load64(&family.extents[e])
        at = 0
        while base != NO_EXTENT and at < pages:
            n = <uint32_t>(pages - at if pages - at < MAX_BATCH_PAGES else MAX_BATCH_PAGES)
            for i in range(n):
                if pte_read(pool, base + at + i) != PTE_EMPTY and not load32(&pool.references[base + at + i]):
                    held += pages_sweep(pool, o, base + at, n)
                    break
            at += n
    if held:
        family_look_again(pool, o)
    return held


cdef inline page_id family_trim(pool_t *pool, object_id o) noexcept nogil:
    """Take back an extent that has no page left, but not the first; NO_EXTENT when there is none."""
    cdef family_t *family = &pool.families[o]
    cdef page_id base = NO_EXTENT
    cdef uint64_t i
    cdef uint32_t e
    mutex_lock(&family.lock)
    for e in range(family.count):
        if family.extents[e] == NO_EXTENT or family.extents[e] == pool.objects[o].base or family.live[e]:
            continue
        base = family.extents[e]
        for i in range(pool.objects[o].pages):
            if pte_read(pool, base + i) != PTE_EMPTY:
                base = NO_EXTENT
                break
        if base != NO_EXTENT:
            family.extents[e] = NO_EXTENT
            break
    mutex_unlock(&family.lock)
    return base


cdef inline int map_allocate(pool_t *pool, uint64_t place, uint64_t pages) noexcept nogil:
    return file_allocate(pool.control_fd, pool.header.offset_maps + place * 8, pages * 8)


cdef inline void map_set(pool_t *pool, region_id r, uint64_t place) noexcept nogil:
    """Give a region a map, whose entries are written, or take it away: NO_EXTENT."""
    store64(&pool.regions[r].map, place)
    pool.maps[r] = &pool.map_entries[place] if place != NO_EXTENT else NULL
    failpoint_visit(pool.header, FP_MAP_SET)


cdef inline int map_begin(pool_t *pool, region_id r, uint64_t place) noexcept nogil:
    """See to it that a region has a map: what it follows without one, at first, or holes."""
    cdef region_t *region = &pool.regions[r]
    cdef uint64_t i, holes = HOLE if pool.objects[region.object].is_sparse else 0
    cdef int rc
    if pool.maps[r] != NULL:
        return 0
    rc = map_allocate(pool, place, region.pages)
    if rc == 0:
        for i in range(region.pages):
            store64(&pool.map_entries[place + i], (region.base + i) | holes)
        store32(&region.is_plain, not holes)
        map_set(pool, r, place)
    return rc


cdef inline uint64_t plain_run(pool_t *pool, region_id r, uint64_t index, uint64_t entry) noexcept nogil:
    """How many entries go on from an index's, page id by page id, with nothing else said of them; 1 to RUN_PAGES.

    The region's gate is shut, or it has ended: only an entry that says more changes meanwhile, when a copy is settled.
    So the caller's look at the first one counts.  A plain map need not be read.
    """
    cdef uint64_t *map = pool.maps[r]
    cdef uint64_t n = 1, end = min(pool.regions[r].pages, index + <uint64_t>RUN_PAGES)
    if entry & ~PAGE_MASK:
        return 1
    if load32(&pool.regions[r].is_plain):
        return end - index
    while index + n < end and map[index + n] == entry + n:
        n += 1
    return n


cdef inline int map_share(pool_t *pool, share_t *share) noexcept nogil:
    """The clone's map: the pages of the source, each with a reference more.  On failure nothing is left of it."""
    cdef region_t *region = &pool.regions[share.source]
    cdef uint64_t pages = region.pages, i = 0, page, n, k
    cdef uint64_t *map = &pool.map_entries[share.clone_map]
    cdef uint32_t breaks = 0
    cdef bint pinned = loadi64(&pool.header.pinned_count) != 0
    cdef int rc = map_begin(pool, share.source, share.source_map)
    if rc == 0:
        rc = map_allocate(pool, share.clone_map, pages)
    if rc != 0:
        return rc
    while i < pages:
        page = region_page(pool, share.source, <int64_t>i)
        n = 1 if pinned else plain_run(pool, share.source, i, page)
        if n > 1:
            for k in range(n):
                map[i + k] = page + k
            pages_share(pool, region.object, page, n)
            breaks += break_at(map, <int64_t>i, <int64_t>pages)
            i += n
            continue
        map[i] = page
        if is_hole(page):
            i += 1
            continue
        page &= PAGE_MASK
        map[i] = page
        if pinned and page_is_pinned(pool, page):
            rc = page_copy_early(pool, share.source, <int64_t>i, page, &map[i])
            if rc != 0 and (
                region_page(pool, share.source, <int64_t>i) & PAGE_MASK != page or not page_is_pinned(pool, page)
            ):
                # What it had to be copied for is over: look again.
                rc = 0
                continue
            if rc != 0:
                break
        elif pinned and region_page(pool, share.source, <int64_t>i) & PAGE_MASK != page:
            # A copy that could not be mapped: the map had the page before it again when the pin ended.
            continue
        else:
            pages_share(pool, region.object, page, 1)
        breaks += break_at(map, <int64_t>i, <int64_t>pages)
        i += 1
    if rc != 0:
        while i > 0:
            i -= 1
            if not is_hole(map[i]):
                page_forget(pool, region.object, map[i])
        return rc
    pool.regions[share.clone].breaks = breaks
    store32(&pool.regions[share.clone].is_plain, not breaks and not pool.objects[region.object].is_sparse)
    map_set(pool, share.clone, share.clone_map)
    return 0


cdef inline bint region_unshare(pool_t *pool, object_id o, region_id r) noexcept nogil:
    """Give up a region's map and references: it has ended, or never begun.  True: there is something to sweep."""
    cdef uint64_t *map = pool.maps[r]
    cdef uint64_t i = 0, n, pages = pool.objects[o].pages
    cdef bint last = False
    if map == NULL:
        return False
    while i < pages:
        n = plain_run(pool, r, i, map[i])
        if not is_hole(map[i]):
            last |= pages_drop(pool, o, map[i] & PAGE_MASK, n)
        i += n
    map_set(pool, r, NO_EXTENT)
    return last


# Write protection.  A key is an index, shifted, and whether the page is pinned.

cdef inline int compare_keys(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<uint64_t *>a)[0], y = (<uint64_t *>b)[0]
    return -1 if x < y else 1 if x > y else 0


cdef inline bint writable_key(pool_t *pool, region_id r, frame_t *frame, uint64_t *key) noexcept nogil:
    """Whether a frame may be mapped writable by the region; its key."""
    cdef region_t *region = &pool.regions[r]
    if frame.object != region.object or not frame_has(frame, WRITABLE) or not is_mapper(frame, region.worker):
        return False
    if frame.index >= region.pages or region_page(pool, r, <int64_t>frame.index) & PAGE_MASK != frame.page:
        return False
    key[0] = (frame.index << 1) | (frame.pins != 0)
    return True


cdef inline uint32_t writable_keys(pool_t *pool, region_id r, uint64_t *keys) noexcept nogil:
    """The places of pages that the region may have mapped writable, in order.

    Through the frames that were written, or through the pages where these are far fewer: a fork of many small arrays
    looks at each once.  Only a look at the frames leaves the next fork fewer of them.
    """
    cdef uint64_t i, pte, group, pages = pool.regions[r].pages
    cdef uint32_t n = 0
    cdef frame_id f
    cdef bint any
    if FEW_PAGES * pages < GROUP_FRAMES * groups_count(pool, pool.written):
        for i in range(pages):
            pte = pte_read(pool, region_page(pool, r, <int64_t>i) & PAGE_MASK)
            if pte_is_frame(pte):
                n += writable_key(pool, r, &pool.frames[pte_frame(pte)], &keys[n])
        return n
    for group in range(group_words(pool.header.frame_count) * 64):
        if not group_take(pool.written, group):
            continue
        any = False
        for f in range(<frame_id>(group * GROUP_FRAMES), group_end(pool, group)):
            any = any or frame_has(&pool.frames[f], WRITABLE)
            n += writable_key(pool, r, &pool.frames[f], &keys[n])
        if any:
            group_note(pool, pool.written, &pool.frames[group * GROUP_FRAMES])
    qsort(keys, n, sizeof(uint64_t), compare_keys)
    return n


cdef inline int keys_protect(
    pool_t *pool, region_id r, uint64_t *keys, uint32_t n, uint64_t gap, bint issue, uint32_t *ranges
) noexcept nogil:
    """Write-protect ranges that leave gaps out that are longer than `gap`; or only count them."""
    cdef uint32_t generation = life_generation(&pool.regions[r].word), i = 0
    cdef uint64_t first, last
    cdef int rc
    ranges[0] = 0
    while i < n:
        if keys[i] & 1:
            i += 1
            continue
        first = last = keys[i] >> 1
        i += 1
        while i < n and not keys[i] & 1 and (keys[i] >> 1) - last <= gap:
            last = keys[i] >> 1
            i += 1
        ranges[0] += 1
        if issue:
            rc = engine_protect(pool, r, generation, <int64_t>first, <uint32_t>(last - first + 1))
            if rc != 0:
                return rc
    return 0


cdef inline void keys_protected(pool_t *pool, region_id r, uint64_t *keys, uint32_t n) noexcept nogil:
    """The next fork has nothing to protect but what is written again; who would write now is kept out by the gate."""
    cdef uint64_t pte, page, word
    cdef uint32_t i
    cdef frame_t *frame
    for i in range(n):
        page = region_page(pool, r, <int64_t>(keys[i] >> 1)) & PAGE_MASK
        pte = pte_read(pool, page)
        if keys[i] & 1 or not pte_is_frame(pte):
            continue
        frame = &pool.frames[pte_frame(pte)]
        word = load64(&frame.word)
        # Read after the word: a frame that has changed hands since has another generation.
        if pte_read(pool, page) == pte:
            frame_flags(frame, word_generation(word), WRITABLE, 0)


cdef inline int region_protect_all(pool_t *pool, region_id r, uint64_t *keys) noexcept nogil:
    """Let no write reach the region's pages any more but the pinned ones."""
    cdef uint32_t n = writable_keys(pool, r, keys), ranges = 0, before
    cdef uint64_t gap = 1
    cdef int rc
    keys_protect(pool, r, keys, n, gap, False, &ranges)
    while ranges > PROTECT_RANGES:
        before = ranges
        gap *= 4
        keys_protect(pool, r, keys, n, gap, False, &ranges)
        if ranges == before and gap > pool.regions[r].pages:
            break
    rc = keys_protect(pool, r, keys, n, gap, True, &ranges)
    if rc == 0:
        keys_protected(pool, r, keys, n)
    return rc


cdef inline int regions_share(pool_t *pool, share_t *shares, uint32_t n) noexcept nogil:
    """Share the pages of regions with clones, which are not mapped yet; all or none."""
    cdef uint64_t *keys = <uint64_t *>malloc(pool.header.frame_count * 8)
    cdef uint32_t i, done = 0
    cdef int rc = 0
    if keys == NULL:
        return -ENOMEM
    for i in range(n):
        gate_shut(&pool.regions[shares[i].source])
    while done < n and rc == 0:
        rc = map_share(pool, &shares[done])
        done += rc == 0
    failpoint_visit(pool.header, FP_FORK_COPIED)
    i = 0
    while i < n and rc == 0:
        rc = region_protect_all(pool, shares[i].source, keys)
        i += 1
    while rc != 0 and done > 0:
        done -= 1
        if region_unshare(pool, pool.regions[shares[done].source].object, shares[done].clone):
            family_look_again(pool, pool.regions[shares[done].source].object)
    for i in range(n):
        gate_open(&pool.regions[shares[i].source])
    free(keys)
    return rc
