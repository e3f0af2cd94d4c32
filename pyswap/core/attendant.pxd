"""What a worker process keeps for itself: the ranges it mapped, and the attendant thread that obeys orders.

The ranges are in one fixed table, sorted by address, because two readers can neither take the GIL nor call
malloc: the attendant, and the handler that runs in a child right after fork().

The attendant is a plain thread with every signal blocked.  It uses no malloc and no Python: it may run while
another thread holds the GIL and waits for a page.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.kernel cimport uffd_wake
from pyswap.core.layout cimport header_t
from pyswap.core.lock cimport load32, mutex_lock, mutex_t, mutex_unlock, store32
from pyswap.core.order cimport ORDER_REMAP, answer_send, order_take, pyswap_order

cdef extern from *:
    """
    #include <pthread.h>
    #define MAX_LOCAL_RANGES 65536

    static inline int thread_start(pthread_t *t, void *(*entry)(void *), void *arg) {
        sigset_t all, before;
        pthread_attr_t attr;
        int rc;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pthread_attr_init(&attr);
        pthread_attr_setstacksize(&attr, 128 * 1024);
        rc = pthread_create(t, &attr, entry, arg);
        pthread_attr_destroy(&attr);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return -rc;
    }
    /* Reserves addresses that nothing may touch; at `address` if that is not 0. */
    static inline void *range_reserve(uint64_t address, uint64_t bytes) {
        void *p = mmap((void *)address, bytes, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address ? MAP_FIXED : 0), -1, 0);
        return p == MAP_FAILED ? NULL : p;
    }
    /* Maps a file over a reserved range, registered unless uffd is -1: not inherited by fork, not dumped.
       Nothing may be touched before it is registered, not by mlockall(MCL_FUTURE) either: hence PROT_NONE. */
    static inline int range_map(uint64_t address, uint64_t bytes, int fd, uint64_t offset, int uffd) {
        int rc;
        if (mmap((void *)address, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                 fd, (off_t)offset) == MAP_FAILED) return -errno;
        if (madvise((void *)address, bytes, MADV_DONTFORK) < 0) return -errno;
        madvise((void *)address, bytes, MADV_DONTDUMP);
        madvise((void *)address, bytes, MADV_NOHUGEPAGE);
        if (uffd >= 0 && (rc = uffd_register(uffd, address, bytes)) != 0) return rc;
        return mprotect((void *)address, bytes, PROT_READ | PROT_WRITE) < 0 ? -errno : 0;
    }
    /* Maps other bytes of a file over registered addresses that other threads use meanwhile.  Until it is
       registered again the kernel maps the bytes by itself, so they must be there, and stay. */
    static inline int range_remap(uint64_t address, uint64_t bytes, int fd, uint64_t offset, int uffd) {
        int rc;
        if (mmap((void *)address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                 fd, (off_t)offset) == MAP_FAILED) return -errno;
        rc = madvise((void *)address, bytes, MADV_DONTFORK) < 0 ? -errno : 0;
        madvise((void *)address, bytes, MADV_DONTDUMP);
        madvise((void *)address, bytes, MADV_NOHUGEPAGE);
        return rc ? rc : uffd_register(uffd, address, bytes);
    }
    static inline void say(const char *text, size_t n) { if (write(2, text, n) < 0) { /* nobody listens */ } }
    """
    ctypedef unsigned long pthread_t
    int thread_start(pthread_t *t, void *(*entry)(void *) noexcept nogil, void *arg) noexcept nogil
    int pthread_join(pthread_t t, void **value) noexcept nogil
    void *range_reserve(uint64_t address, uint64_t bytes) noexcept nogil
    int range_map(uint64_t address, uint64_t bytes, int fd, uint64_t offset, int uffd) noexcept nogil
    int range_remap(uint64_t address, uint64_t bytes, int fd, uint64_t offset, int uffd) noexcept nogil
    void say(const char *text, size_t n) noexcept nogil
    enum:
        MAX_LOCAL_RANGES
    size_t strlen(const char *s) noexcept nogil
    int ESRCH

cdef struct range_t:
    uint64_t address
    uint64_t bytes
    uint64_t token              # which pool of this process

cdef struct ranges_t:
    mutex_t lock                # guards the rest; the attendants hold it while they remap
    uint32_t count
    range_t *entries            # sorted by address

cdef struct attendant_t:
    ranges_t *ranges
    header_t *header
    int channel
    int uffd
    int store_fd
    int empty_fd                # a file of no bytes: what is mapped from it answers with SIGBUS
    uint64_t token
    uint32_t detached           # this process leaves in good order
    uint32_t orphaned           # the swapper died
    pthread_t thread


cdef inline uint32_t range_place(ranges_t *ranges, uint64_t address) noexcept nogil:
    """The number of ranges that start at or below the address."""
    cdef uint32_t low = 0, high = ranges.count, middle
    while low < high:
        middle = (low + high) // 2
        if ranges.entries[middle].address <= address:
            low = middle + 1
        else:
            high = middle
    return low


cdef inline range_t *range_find(ranges_t *ranges, uint64_t address) noexcept nogil:
    cdef uint32_t place = range_place(ranges, address)
    cdef range_t *entry
    if place == 0:
        return NULL
    entry = &ranges.entries[place - 1]
    if address < entry.address + entry.bytes:
        return entry
    return NULL


cdef inline bint range_add(ranges_t *ranges, uint64_t address, uint64_t bytes, uint64_t token) noexcept nogil:
    cdef uint32_t place, i
    if ranges.count == MAX_LOCAL_RANGES:
        return False
    mutex_lock(&ranges.lock)
    place = range_place(ranges, address)
    i = ranges.count
    while i > place:
        ranges.entries[i] = ranges.entries[i - 1]
        i -= 1
    ranges.entries[place].address = address
    ranges.entries[place].bytes = bytes
    ranges.entries[place].token = token
    ranges.count += 1
    mutex_unlock(&ranges.lock)
    return True


cdef inline void range_remove(ranges_t *ranges, uint64_t address) noexcept nogil:
    cdef uint32_t place, i
    mutex_lock(&ranges.lock)
    place = range_place(ranges, address)
    if place and ranges.entries[place - 1].address == address:
        for i in range(place, ranges.count):
            ranges.entries[i - 1] = ranges.entries[i]
        ranges.count -= 1
    mutex_unlock(&ranges.lock)


cdef inline void range_poison(attendant_t *a, uint64_t address, uint64_t bytes) noexcept nogil:
    """Touches of the range end in SIGBUS from here on; under ranges.lock, so that it is still ours."""
    range_map(address, bytes, a.empty_fd, 0, -1)
    uffd_wake(a.uffd, address, bytes)


cdef inline void attendant_poison(attendant_t *a, uint64_t address, uint64_t bytes) noexcept nogil:
    """Obey an order; the array may have ended since it was given."""
    cdef range_t *entry
    mutex_lock(&a.ranges.lock)
    entry = range_find(a.ranges, address)
    if entry != NULL and entry.token == a.token:
        range_poison(a, address, bytes)
    mutex_unlock(&a.ranges.lock)


cdef inline int attendant_remap(attendant_t *a, uint64_t address, uint64_t bytes, uint64_t offset) noexcept nogil:
    """Obey an order; what cannot be registered again is not left to the kernel."""
    cdef range_t *entry
    cdef int rc = -ESRCH
    mutex_lock(&a.ranges.lock)
    entry = range_find(a.ranges, address)
    if entry != NULL and entry.token == a.token and not load32(&a.orphaned):
        rc = range_remap(address, bytes, a.store_fd, offset, a.uffd)
        if rc != 0:
            range_poison(a, address, bytes)
    mutex_unlock(&a.ranges.lock)
    return rc


cdef inline void attendant_orphaned(attendant_t *a) noexcept nogil:
    """The swapper is gone without a word: what it held cannot be had any more, and nobody may hang on it."""
    cdef uint32_t i
    cdef const char *text = b"pyswap: the pool's swapper died; its arrays answer with SIGBUS from here on\n"
    cdef bint said = False
    # Whoever adds a range looks at this after; whoever added one before is met by the walk.
    store32(&a.orphaned, 1)
    mutex_lock(&a.ranges.lock)
    for i in range(a.ranges.count):
        if a.ranges.entries[i].token != a.token:
            continue
        if not said:
            say(text, strlen(text))
            said = True
        range_poison(a, a.ranges.entries[i].address, a.ranges.entries[i].bytes)
    mutex_unlock(&a.ranges.lock)


cdef inline void *attendant_main(void *argument) noexcept nogil:
    cdef attendant_t *a = <attendant_t *>argument
    cdef pyswap_order order
    while order_take(a.channel, &order):
        if order.kind == ORDER_REMAP:
            answer_send(a.channel, order.copy, attendant_remap(a, order.address, order.bytes, order.offset))
        else:
            say(order.text, order.length)
            attendant_poison(a, order.address, order.bytes)
    if not load32(&a.detached) and not load32(&a.header.ended):
        attendant_orphaned(a)
    return NULL
