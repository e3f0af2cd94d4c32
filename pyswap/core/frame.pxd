"""The frame table: who may be resident, and the lock of each page.

A frame's word, changed only by compare-and-swap of the whole:

    bits 0-2   state
    bit  3     LOCKED
    bit  4     WAITED      some worker's fault waits for the lock (its bit is in `waiters`)
    bit  5     SLEPT_ON    some thread of the swapper sleeps on the low half
    bit  6     DIRTY       bytes newer than the slot's (R3)
    bit  7     REDIRTIED   made writable during WRITEBACK
    bit  8     REFERENCED  touched since the first hand passed
    bit  9     AHEAD       read ahead and not yet asked for
    bit  10    COLD        to be evicted first
    bit  11    PASSED      the second hand has met it AHEAD, and left it one more turn to be asked for
    bit  12    HOT         its page came back soon after an eviction: the hand passes it by, see policy.pxd
    bit  14    CLEANED     written out as if it would leave, and still here
    bit  15    WAS_HOT     made ordinary again, to make room
    bits 32-63 generation, one more at every claim

To use: frame_claim() or frame_trylock(), then the setters, then frame_unlock() or frame_set_free().
Do not keep a frame number across an unlock: look it up in the page table again.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport count_resident, pool_t
from pyswap.core.groups cimport group_note
from pyswap.core.layout cimport (
    EVICTING,
    FILLING,
    FRAME_NONE,
    FREE,
    OFFLINE,
    PRESENT,
    RETIRED,
    SLOT_NONE,
    WORKER_WORDS,
    WRITEBACK,
    frame_id,
    frame_t,
    object_id,
    page_id,
    worker_id,
)
from pyswap.core.lock cimport (
    FP_FRAME_BACK,
    FP_FRAME_CLAIM,
    FP_FRAME_CLAIMED,
    FP_FRAME_CLEAN,
    FP_FRAME_DIRTY,
    FP_FRAME_EVICTING,
    FP_FRAME_FREE,
    FP_FRAME_OFFLINE,
    FP_FRAME_PINNED,
    FP_FRAME_PRESENT,
    FP_FRAME_RETIRED,
    FP_FRAME_UNPINNED,
    FP_FRAME_WRITEBACK,
    add32,
    addi64,
    and64,
    cas64,
    failpoint_visit,
    futex_wait,
    futex_wake,
    load32,
    load64,
    low_half,
    mutex_lock,
    mutex_unlock,
    now_ns,
    or64,
    panic,
    swap64,
)

cdef enum:
    STATE_MASK = 7
    LOCKED = 1 << 3
    WAITED = 1 << 4
    SLEPT_ON = 1 << 5
    DIRTY = 1 << 6
    REDIRTIED = 1 << 7
    REFERENCED = 1 << 8
    AHEAD = 1 << 9
    COLD = 1 << 10
    PASSED = 1 << 11
    HOT = 1 << 12
    WRITABLE = 1 << 13          # a private page may be mapped writable: not protected since it was last made DIRTY
    CLEANED = 1 << 14
    WAS_HOT = 1 << 15

cdef struct waiters_t:          # whom to wake once a lock has ended
    uint64_t bits[4]
    bint any
    page_id page
    uint64_t index
    object_id object


cdef inline int word_state(uint64_t word) noexcept nogil:
    return <int>(word & STATE_MASK)


cdef inline uint64_t word_with_state(uint64_t word, int state) noexcept nogil:
    return (word & ~<uint64_t>STATE_MASK) | <uint64_t>state


cdef inline uint32_t word_generation(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 32)


cdef inline bint state_resident(int state) noexcept nogil:
    return state == PRESENT or state == WRITEBACK


cdef inline bint word_resident(uint64_t word) noexcept nogil:
    return state_resident(word_state(word))


cdef inline bint frame_has(frame_t *frame, uint64_t flag) noexcept nogil:
    return (load64(&frame.word) & flag) != 0


cdef inline int frame_state(frame_t *frame) noexcept nogil:
    return word_state(load64(&frame.word))


cdef inline bint frame_mark(frame_t *frame, uint64_t flags) noexcept nogil:
    """Set flags; True when none of them was set before."""
    return (or64(&frame.word, flags) & flags) == 0


cdef inline bint frame_unmark(frame_t *frame, uint64_t flags) noexcept nogil:
    """Clear flags; True when any of them was set."""
    cdef uint64_t word
    while True:
        word = load64(&frame.word)
        if not word & flags:
            return False
        if cas64(&frame.word, word, word & ~flags):
            return True


cdef inline void frame_flags(frame_t *frame, uint32_t generation, uint64_t off, uint64_t on) noexcept nogil:
    """Clear a flag that is set, and set others, if the frame still holds the page of that generation."""
    cdef uint64_t word
    while True:
        word = load64(&frame.word)
        if word_generation(word) != generation or not word & off:
            return
        if cas64(&frame.word, word, (word & ~off) | on):
            return


# The dirty bit is counted, so it has setters of its own.

cdef inline void frame_set_dirty(pool_t *pool, frame_t *frame) noexcept nogil:
    """Before any mapping becomes writable (R3); under the lock."""
    cdef uint64_t word = load64(&frame.word)
    if not word & LOCKED:
        panic("frame_set_dirty: not locked", word, frame.page, 0)
    if word_state(word) == WRITEBACK:
        frame_mark(frame, REDIRTIED)
    if not word & WRITABLE:
        frame_mark(frame, WRITABLE)
        group_note(pool, pool.written, frame)
    if frame_mark(frame, DIRTY):
        failpoint_visit(pool.header, FP_FRAME_DIRTY)
        addi64(&pool.header.dirty_count, 1)


cdef inline void frame_set_clean(pool_t *pool, frame_t *frame) noexcept nogil:
    """After the slot is published; under the lock, no mapping writable."""
    if not frame_has(frame, LOCKED):
        panic("frame_set_clean: not locked", load64(&frame.word), frame.page, 0)
    if frame_unmark(frame, DIRTY):
        failpoint_visit(pool.header, FP_FRAME_CLEAN)
        addi64(&pool.header.dirty_count, -1)


# The states (R1).

cdef inline void frame_move(pool_t *pool, frame_t *frame, int before, int after) noexcept nogil:
    cdef uint64_t word
    while True:
        word = load64(&frame.word)
        if word_state(word) != before or not word & LOCKED:
            panic("frame_move: not in the state before", word, frame.page, <uint64_t>after)
        if cas64(&frame.word, word, word_with_state(word, after)):
            break
    addi64(&pool.header.state_count[before], -1)
    addi64(&pool.header.state_count[after], 1)
    count_resident(pool, state_resident(after) - state_resident(before))


cdef inline void frame_set_present(pool_t *pool, frame_t *frame) noexcept nogil:
    if frame_state(frame) == WRITEBACK:
        frame_move(pool, frame, WRITEBACK, PRESENT)
    else:
        frame_move(pool, frame, FILLING, PRESENT)
    failpoint_visit(pool.header, FP_FRAME_PRESENT)


cdef inline void frame_set_writeback(pool_t *pool, frame_t *frame) noexcept nogil:
    frame_unmark(frame, REDIRTIED)
    frame_move(pool, frame, PRESENT, WRITEBACK)
    failpoint_visit(pool.header, FP_FRAME_WRITEBACK)


cdef inline void frame_set_evicting(pool_t *pool, frame_t *frame) noexcept nogil:
    if frame_has(frame, DIRTY) or frame.pins:
        panic("frame_set_evicting: dirty or pinned", load64(&frame.word), frame.page, frame.pins)
    frame_move(pool, frame, PRESENT, EVICTING)
    failpoint_visit(pool.header, FP_FRAME_EVICTING)


# Pins, under the lock.

cdef inline void frame_pin(pool_t *pool, frame_t *frame, bint writable) noexcept nogil:
    if frame.pins == 0:
        addi64(&pool.header.pinned_count, 1)
    frame.pins += 1
    frame.writable_pins += writable
    failpoint_visit(pool.header, FP_FRAME_PINNED)


cdef inline void frame_unpin(pool_t *pool, frame_t *frame, bint writable) noexcept nogil:
    if frame.pins == 0 or frame.writable_pins < <uint32_t>writable:
        panic("frame_unpin: not pinned", load64(&frame.word), frame.page, frame.pins)
    frame.pins -= 1
    frame.writable_pins -= writable
    if frame.pins == 0:
        addi64(&pool.header.pinned_count, -1)
    failpoint_visit(pool.header, FP_FRAME_UNPINNED)


cdef inline void frame_unpin_all(pool_t *pool, frame_t *frame) noexcept nogil:
    """The page is going away with its object."""
    if frame.pins:
        addi64(&pool.header.pinned_count, -1)
    frame.pins = 0
    frame.writable_pins = 0
    failpoint_visit(pool.header, FP_FRAME_UNPINNED)


# The lock.

cdef inline bint frame_trylock(frame_t *frame) noexcept nogil:
    """Lock a resident frame; False when it is locked or no longer resident."""
    cdef uint64_t word
    while True:
        word = load64(&frame.word)
        if word & LOCKED or not word_resident(word):
            return False
        if cas64(&frame.word, word, word | LOCKED):
            return True


cdef inline void frame_sleep(frame_t *frame, uint64_t word, uint64_t timeout_ns) noexcept nogil:
    """Sleep until a locked word changes; the caller holds no lock (R4) and looks again."""
    if not word & LOCKED:
        return
    if word & SLEPT_ON or cas64(&frame.word, word, word | SLEPT_ON):
        futex_wait(low_half(&frame.word), <uint32_t>(word | SLEPT_ON), timeout_ns)


cdef inline void frame_pause(frame_t *frame, uint64_t word, uint64_t timeout_ns) noexcept nogil:
    """Sleep while nothing about the frame changes, at most so long: nobody wakes this sleeper."""
    futex_wait(low_half(&frame.word), <uint32_t>word, timeout_ns)


cdef inline bint frame_wait_for(frame_t *frame, uint64_t seen, worker_id worker) noexcept nogil:
    """Leave word that this worker's fault waits for the lock; False when the lock has ended meanwhile.

    `seen` is the word read before the page table entry was: the same generation means the same page, so the
    wake-up at the lock's end will be for the page that the fault is about.
    """
    cdef uint64_t word
    or64(&frame.waiters[worker >> 6], <uint64_t>1 << (worker & 63))
    while True:
        word = load64(&frame.word)
        if not word & LOCKED or (word >> 32) != (seen >> 32):
            return False
        if word & WAITED or cas64(&frame.word, word, word | WAITED):
            return True


cdef inline void frame_end_lock(pool_t *pool, frame_t *frame, bint release, waiters_t *waiters) noexcept nogil:
    """Give up the lock, or lock and frame at once.  Whoever noted itself before the swap is in *waiters."""
    cdef uint64_t word, after
    cdef int i
    waiters.any = False
    waiters.page = frame.page
    waiters.index = frame.index
    waiters.object = frame.object
    for i in range(WORKER_WORDS):
        waiters.bits[i] = 0
    while True:
        word = load64(&frame.word)
        if not word & LOCKED:
            panic("frame_end_lock: not locked", word, frame.page, 0)
        if word & WAITED:
            # The flag is cleared before the bits are taken: a bit set after the taking sets it again.
            if cas64(&frame.word, word, word & ~<uint64_t>WAITED):
                waiters.any = True
                for i in range(WORKER_WORDS):
                    waiters.bits[i] |= swap64(&frame.waiters[i], 0)
            continue
        after = word & ~<uint64_t>(LOCKED | SLEPT_ON)
        if release:
            after = (word >> 32) << 32
        if cas64(&frame.word, word, after):
            break
    if word & SLEPT_ON:
        futex_wake(low_half(&frame.word), 0x7FFFFFFF)


cdef inline void frame_recover(frame_t *frame, int state, bint dirty) noexcept nogil:
    """After a swapper's death, before any thread begins: unlocked, unpinned, in a state that others build on."""
    cdef uint64_t word = load64(&frame.word), kept = word & (<uint64_t>0xFFFFFFFF << 32)
    cdef int i
    if state == PRESENT:
        kept |= word & REFERENCED
        if dirty:
            kept |= DIRTY | WRITABLE
    swap64(&frame.word, kept | <uint64_t>state)
    frame.pins = 0
    frame.writable_pins = 0
    for i in range(WORKER_WORDS):
        frame.waiters[i] = 0


# The allocator.

cdef inline void frame_push_free(pool_t *pool, frame_id f) noexcept nogil:
    mutex_lock(&pool.free_lock)
    pool.free_list[pool.free_count] = f
    pool.free_count += 1
    mutex_unlock(&pool.free_lock)


cdef inline void frames_announce(pool_t *pool) noexcept nogil:
    """Frames became free: whoever waits for one looks again."""
    add32(&pool.header.free_sequence, 1)
    futex_wake(&pool.header.free_sequence, 0x7FFFFFFF)


cdef inline void reclaim_kick(pool_t *pool) noexcept nogil:
    add32(&pool.header.reclaim_sequence, 1)
    futex_wake(&pool.header.reclaim_sequence, 0x7FFFFFFF)


cdef inline frame_id frame_claim(pool_t *pool, uint32_t keep) noexcept nogil:
    """A locked frame in FILLING, or FRAME_NONE when no more than `keep` are free."""
    cdef frame_id f = FRAME_NONE
    cdef uint64_t word
    cdef uint32_t left
    cdef int i
    cdef frame_t *frame
    if failpoint_visit(pool.header, FP_FRAME_CLAIM) != 0:
        return f
    mutex_lock(&pool.free_lock)
    left = pool.free_count
    if left > keep:
        left -= 1
        pool.free_count = left
        f = pool.free_list[left]
    mutex_unlock(&pool.free_lock)
    if left == pool.header.low_frames or f == FRAME_NONE:
        reclaim_kick(pool)
    if f == FRAME_NONE:
        return f
    frame = &pool.frames[f]
    while True:
        word = load64(&frame.word)
        if word_state(word) != FREE or word & LOCKED:
            panic("frame_claim: the free list names a frame in use", f, word, frame.page)
        # A flag may come in between: who cools pages marks what an entry named a moment ago.
        if cas64(&frame.word, word, (((word >> 32) + 1) << 32) | FILLING | LOCKED):
            break
    failpoint_visit(pool.header, FP_FRAME_CLAIMED)
    addi64(&pool.header.state_count[FREE], -1)
    addi64(&pool.header.state_count[FILLING], 1)
    for i in range(WORKER_WORDS):
        frame.mappers[i] = 0
    frame.slot = SLOT_NONE
    frame.pins = 0
    frame.writable_pins = 0
    return f


cdef inline frame_id frame_claim_wait(pool_t *pool, uint64_t deadline_ns) noexcept nogil:
    """As frame_claim(), waiting for reclaim; the caller holds nothing (R4).  FRAME_NONE at the deadline."""
    cdef frame_id f = frame_claim(pool, 0)
    cdef uint32_t sequence
    if f != FRAME_NONE:
        return f
    while True:
        sequence = load32(&pool.header.free_sequence)
        f = frame_claim(pool, 0)
        if f != FRAME_NONE or load32(&pool.stop) or now_ns() > deadline_ns:
            return f
        futex_wait(&pool.header.free_sequence, sequence, 20_000_000)


cdef inline void frame_set_free(pool_t *pool, frame_id f, waiters_t *waiters) noexcept nogil:
    """From FILLING (undone) or EVICTING (punched): lock and frame are given up in one swap."""
    cdef frame_t *frame = &pool.frames[f]
    cdef int state = frame_state(frame)
    if state != FILLING and state != EVICTING:
        panic("frame_set_free: still holds a page", f, load64(&frame.word), frame.page)
    if frame_has(frame, DIRTY):
        panic("frame_set_free: dirty", f, load64(&frame.word), frame.page)
    addi64(&pool.header.state_count[state], -1)
    addi64(&pool.header.state_count[FREE], 1)
    frame_end_lock(pool, frame, True, waiters)
    failpoint_visit(pool.header, FP_FRAME_FREE)
    frame_push_free(pool, f)


cdef inline void frame_set_offline(pool_t *pool, frame_id f, waiters_t *waiters) noexcept nogil:
    """From FILLING, undone, when the store could get no memory for it."""
    cdef frame_t *frame = &pool.frames[f]
    frame_move(pool, frame, FILLING, OFFLINE)
    failpoint_visit(pool.header, FP_FRAME_OFFLINE)
    frame_end_lock(pool, frame, False, waiters)


cdef inline void frame_set_retired(pool_t *pool, frame_id f, waiters_t *waiters) noexcept nogil:
    """From FILLING, claimed and not installed: the budget has a frame less."""
    cdef frame_t *frame = &pool.frames[f]
    frame_move(pool, frame, FILLING, RETIRED)
    failpoint_visit(pool.header, FP_FRAME_RETIRED)
    frame_end_lock(pool, frame, False, waiters)


cdef inline bint frame_set_back(pool_t *pool, frame_id f, int state) noexcept nogil:
    """OFFLINE or RETIRED back to FREE; False if it was not in that state."""
    cdef frame_t *frame = &pool.frames[f]
    cdef uint64_t word = load64(&frame.word)
    if word_state(word) != state or word & LOCKED:
        return False
    if not cas64(&frame.word, word, (word >> 32) << 32):
        return False
    failpoint_visit(pool.header, FP_FRAME_BACK)
    addi64(&pool.header.state_count[state], -1)
    addi64(&pool.header.state_count[FREE], 1)
    frame_push_free(pool, f)
    return True
