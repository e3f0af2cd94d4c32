"""Words that threads share: atomics, futex waits, the leaf mutex, failpoints and panic.

Every wait here is bounded or has a waker that cannot die alone: the threads of one swapper live and end together.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.layout cimport (
    FAIL_ERRNO,
    FAIL_KILL,
    FAIL_OFF,
    FAIL_PARK,
    FAIL_STOP,
    failpoint_t,
    header_t,
)

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/futex.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    static inline uint64_t load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline uint32_t load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void store64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline void store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    /* Waits for nothing that was stored before: for who goes through many, under a lock. */
    static inline void store32_release(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline int cas64(uint64_t *p, uint64_t old, uint64_t new_)
    { return __atomic_compare_exchange_n(p, &old, new_, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }
    static inline int cas32(uint32_t *p, uint32_t old, uint32_t new_)
    { return __atomic_compare_exchange_n(p, &old, new_, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }
    static inline uint64_t swap64(uint64_t *p, uint64_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
    static inline uint32_t swap32(uint32_t *p, uint32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t or64(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t and64(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t add64(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
    static inline uint32_t add32(uint32_t *p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
    static inline int64_t addi64(int64_t *p, int64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
    static inline int64_t loadi64(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void cpu_relax(void) {
    #if defined(__x86_64__)
        __builtin_ia32_pause();
    #else
        __asm__ __volatile__("" ::: "memory");
    #endif
    }

    /* Sleeps while *p == value, at most timeout_ns.  tv_nsec of 10^9 would be EINVAL: a wait that spins. */
    static inline int futex_wait(uint32_t *p, uint32_t value, uint64_t timeout_ns) {
        struct timespec ts = { (time_t)(timeout_ns / 1000000000u), (long)(timeout_ns % 1000000000u) };
        if (syscall(SYS_futex, p, FUTEX_WAIT, value, &ts, NULL, 0) == 0) return 0;
        return -errno;
    }
    static inline void futex_wake(uint32_t *p, int n) { syscall(SYS_futex, p, FUTEX_WAKE, n, NULL, NULL, 0); }
    static inline uint32_t *low_half(uint64_t *p) {
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        return (uint32_t *)p;
    #else
        return (uint32_t *)p + 1;
    #endif
    }
    static inline uint64_t now_ns(void) {
        struct timespec ts;
        clock_gettime(CLOCK_MONOTONIC, &ts);
        return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
    }

    /* A broken invariant: say which record it was and stop before it spreads. */
    static inline void panic(const char *what, uint64_t a, uint64_t b, uint64_t c) {
        char line[256];
        int n = snprintf(line, sizeof line, "pyswap: panic: %s (%#llx %#llx %#llx)\\n", what,
                         (unsigned long long)a, (unsigned long long)b, (unsigned long long)c);
        if (n > 0 && write(2, line, (size_t)n) < 0) { /* nowhere left to say it */ }
        abort();
    }

    #ifdef PYSWAP_DEBUG
    #define PYSWAP_DEBUG_BUILD 1
    #else
    #define PYSWAP_DEBUG_BUILD 0
    #endif
    """
    uint64_t load64(const uint64_t *p) noexcept nogil
    uint32_t load32(const uint32_t *p) noexcept nogil
    void store64(uint64_t *p, uint64_t v) noexcept nogil
    void store32(uint32_t *p, uint32_t v) noexcept nogil
    void store32_release(uint32_t *p, uint32_t v) noexcept nogil
    bint cas64(uint64_t *p, uint64_t old, uint64_t new_) noexcept nogil
    bint cas32(uint32_t *p, uint32_t old, uint32_t new_) noexcept nogil
    uint64_t swap64(uint64_t *p, uint64_t v) noexcept nogil
    uint32_t swap32(uint32_t *p, uint32_t v) noexcept nogil
    uint64_t or64(uint64_t *p, uint64_t v) noexcept nogil
    uint64_t and64(uint64_t *p, uint64_t v) noexcept nogil
    uint64_t add64(uint64_t *p, uint64_t v) noexcept nogil
    uint32_t add32(uint32_t *p, uint32_t v) noexcept nogil
    int64_t addi64(int64_t *p, int64_t v) noexcept nogil
    int64_t loadi64(const int64_t *p) noexcept nogil
    void cpu_relax() noexcept nogil
    int futex_wait(uint32_t *p, uint32_t value, uint64_t timeout_ns) noexcept nogil
    void futex_wake(uint32_t *p, int n) noexcept nogil
    uint32_t *low_half(uint64_t *p) noexcept nogil
    uint64_t now_ns() noexcept nogil
    void panic(const char *what, uint64_t a, uint64_t b, uint64_t c) noexcept nogil
    const bint PYSWAP_DEBUG_BUILD
    int SIGKILL
    int SIGSTOP
    int raise_signal "raise"(int number) noexcept nogil

ctypedef uint32_t mutex_t       # 0 free, 1 held, 2 held and somebody sleeps


cdef inline void mutex_lock(mutex_t *m) noexcept nogil:
    cdef int _
    for _ in range(100):
        if cas32(m, 0, 1):
            return
        cpu_relax()
    while swap32(m, 2) != 0:
        futex_wait(m, 2, 100_000_000)


cdef inline bint mutex_trylock(mutex_t *m) noexcept nogil:
    return cas32(m, 0, 1)


cdef inline void mutex_unlock(mutex_t *m) noexcept nogil:
    if swap32(m, 0) == 2:
        futex_wake(m, 1)


# Failpoints: places where a test of the debug build can hold a thread, kill or stop the process, or make a call
# fail.  The release build compiles the body away.  Every change of a frame, a page table entry, a slot, a reference
# or a map has one, right after it and outside the leaves, so that whoever is parked there holds frames and gates only.
# Tests arm and release them in the control segment itself: the swapper's request thread may be the one that is parked.
cdef enum failpoint:
    FP_FILL_LOCKED          # a fill owns its frame and is in the page table; nothing read yet
    FP_FILL_READ            # the read of a slot: errno
    FP_MAP_BEFORE           # the frame is locked and about to be mapped
    FP_MAP_ONWARD           # a stream's thread goes on, the rest of its neighbours are about to be mapped
    FP_MAP_FOR_OTHERS       # a locked page is about to be mapped for a worker other than the fault's
    FP_CLEAN_PROTECTED      # a victim is write-protected, its bytes not yet written
    FP_CLEAN_WRITTEN        # the batch is written, nothing published
    FP_CLEAN_WRITE          # the write of a batch: errno
    FP_EVICT_PUNCHED        # bytes are gone, the entry still names the frame
    FP_EVICT_ENTRY          # the entry is changed, the frame not yet free
    FP_FALLOCATE            # memory for a frame: errno
    FP_COPY_MADE            # a run of pages is copied, the map not yet changed
    FP_COPY_ORDERED         # the attendant has its order, the frames are locked yet
    FP_COPY_ANSWERED        # the attendant has mapped the copies, nobody knows yet
    FP_DRAIN_PAGE           # a page is about to leave a swap area
    FP_FRAME_RETIRED        # a frame has left the budget
    FP_TAKEOVER             # a step of the repair is done
    FP_FORK_COPIED          # a fork has added its references, nothing is write-protected yet
    FP_ENTRY_READ           # an entry names a frame, which is not locked yet
    FP_HOLD_NOTED           # what is to keep an object is written down, and not done
    FP_AREA_STATE           # an area is switched on or off
    # Changes of a frame's word, and of its pins.
    FP_FRAME_CLAIM          # a frame is wanted: errno, there is none
    FP_FRAME_CLAIMED        # the word says FILLING, the descriptor is the last page's yet
    FP_FRAME_PRESENT
    FP_FRAME_WRITEBACK
    FP_FRAME_EVICTING
    FP_FRAME_FREE           # the word says FREE, the free list does not know it yet
    FP_FRAME_OFFLINE
    FP_FRAME_BACK           # as FP_FRAME_FREE, of a frame that was OFFLINE or RETIRED
    FP_FRAME_DIRTY
    FP_FRAME_CLEAN
    FP_FRAME_PINNED
    FP_FRAME_UNPINNED
    # Page table entries.
    FP_PTE_FRAME            # an entry names a frame
    FP_PTE_LEFT             # an entry names a slot, or nothing
    # Slots.
    FP_SLOTS_RESERVE        # slots are wanted: errno, there are none
    FP_SLOTS_RESERVED
    FP_SLOT_USED
    FP_SLOT_FREED
    # References, and the maps that hold them.
    FP_PAGE_TAKE            # a page id is wanted for a copy: errno, there is none
    FP_PAGE_TAKEN
    FP_PAGE_SHARED
    FP_PAGE_DROPPED
    FP_REFERENCES_BEGUN     # a private object's own pages have a reference each, or those of a sparse one none
    FP_MAP_SET              # a region has a map, or has none any more
    FP_MAP_PUT
    # A worker's attendant; who is parked here holds the process's list of ranges.
    FP_ATTENDANT_ORDER      # it has its order, nothing is mapped yet
    FP_ATTENDANT_MAPPED     # the copies are mapped, and not registered
    FP_ATTENDANT_DONE       # they are registered, the swapper does not know yet
    FP_FILE_READ            # the read of an array's own file: errno
    # A block that moves.
    FP_MOVE_BEGUN           # its process has nothing mapped at the old addresses and at the new ones
    FP_MOVE_PLACED          # the map has its pages at their new indexes, who holds one does not know yet
    FP_MOVE_MAPPED          # they are mapped at the new addresses


cdef inline int failpoint_visit(header_t *header, int which) noexcept nogil:
    """Return 0, or the negative errno the test asked for."""
    cdef failpoint_t *f = &header.failpoints[which]
    cdef uint32_t action, ticket
    if not PYSWAP_DEBUG_BUILD:
        return 0
    action = load32(&f.action)
    if action == FAIL_OFF:
        return 0
    # Skips are spent one visit at a time, then the limit.
    while True:
        ticket = load32(&f.skip)
        if ticket == 0:
            break
        if cas32(&f.skip, ticket, ticket - 1):
            return 0
    while True:
        ticket = load32(&f.limit)
        if ticket == 0:
            return 0
        if cas32(&f.limit, ticket, ticket - 1):
            break
    add32(&f.hits, 1)
    if action == FAIL_ERRNO:
        return -<int>f.value
    if action == FAIL_KILL:
        raise_signal(SIGKILL)
    if action == FAIL_STOP:
        raise_signal(SIGSTOP)
    if action == FAIL_PARK:
        ticket = load32(&f.ticket)
        add32(&f.parked, 1)
        while load32(&f.ticket) == ticket:
            futex_wait(&f.ticket, ticket, 100_000_000)
        add32(&f.parked, <uint32_t>-1)
    return 0
