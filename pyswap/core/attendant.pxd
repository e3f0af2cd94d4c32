"""What a worker process keeps for itself: the ranges it mapped, and the attendant thread that obeys orders.

The ranges are in one fixed table, sorted by address, because two readers can neither take the GIL nor call
malloc: the attendant, and the handler that runs in a child right after fork().

The attendant is a plain thread with every signal blocked.  It uses no malloc and no Python: it may run while
another thread holds the GIL and waits for a page.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.election cimport (
    SEEN_END,
    SEEN_NOTHING,
    fd_close,
    fd_kept,
    pyswap_fd,
    pyswap_heir,
    seen,
    swapper_renew,
    wait_either,
    watch_follow,
    watch_look,
    watch_t,
)
from pyswap.core.kernel cimport uffd_register, uffd_wake
from pyswap.core.layout cimport header_t
from pyswap.core.lock cimport (
    FP_ATTENDANT_DONE,
    FP_ATTENDANT_MAPPED,
    FP_ATTENDANT_ORDER,
    FP_MOVE_BEGUN,
    FP_MOVE_MAPPED,
    add32,
    failpoint_visit,
    load32,
    mutex_lock,
    mutex_t,
    mutex_unlock,
    store32,
)
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
        void *p = map_memory((void *)address, bytes, PROT_NONE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address ? MAP_FIXED : 0), -1, 0);
        return p == MAP_FAILED ? NULL : p;
    }
    /* Maps a file over a reserved range, registered unless uffd is -1: not inherited by fork, not dumped.
       Nothing may be touched before it is registered, not by mlockall(MCL_FUTURE) either: hence PROT_NONE; and
       what is not registered may be touched at any time, and must not answer with SIGSEGV. */
    static inline int range_map(uint64_t address, uint64_t bytes, int fd, uint64_t offset, int uffd, int writable) {
        int rc, access = PROT_READ | (writable ? PROT_WRITE : 0);
        if (map_memory((void *)address, bytes, uffd >= 0 ? PROT_NONE : access, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                       fd, offset) == MAP_FAILED) return -errno;
        if (madvise((void *)address, bytes, MADV_DONTFORK) < 0) return -errno;
        madvise((void *)address, bytes, MADV_DONTDUMP);
        madvise((void *)address, bytes, MADV_NOHUGEPAGE);
        if (uffd < 0) return 0;
        if ((rc = uffd_register(uffd, address, bytes)) != 0) return rc;
        return mprotect((void *)address, bytes, access) < 0 ? -errno : 0;
    }
    /* Maps other bytes of a file over registered addresses that other threads use meanwhile.  Until it is
       registered again the kernel maps the bytes by itself, so they must be there, and stay. */
    static inline int range_remap(uint64_t address, uint64_t bytes, int fd, uint64_t offset) {
        int rc;
        if (map_memory((void *)address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                       fd, offset) == MAP_FAILED) return -errno;
        rc = madvise((void *)address, bytes, MADV_DONTFORK) < 0 ? -errno : 0;
        madvise((void *)address, bytes, MADV_DONTDUMP);
        madvise((void *)address, bytes, MADV_NOHUGEPAGE);
        return rc;
    }
    static inline void kill_self(void) { kill(getpid(), SIGKILL); }
    static inline void say(const char *text, size_t n) { if (write(2, text, n) < 0) { /* nobody listens */ } }
    """
    ctypedef unsigned long pthread_t
    int thread_start(pthread_t *t, void *(*entry)(void *) noexcept nogil, void *arg) noexcept nogil
    int pthread_join(pthread_t t, void **value) noexcept nogil
    void *range_reserve(uint64_t address, uint64_t bytes) noexcept nogil
    int range_map(
        uint64_t address, uint64_t bytes, int fd, uint64_t offset, int uffd, bint writable
    ) noexcept nogil
    int range_remap(uint64_t address, uint64_t bytes, int fd, uint64_t offset) noexcept nogil
    void kill_self() noexcept nogil
    void say(const char *text, size_t n) noexcept nogil
    enum:
        MAX_LOCAL_RANGES
    size_t strlen(const char *s) noexcept nogil
    int EAGAIN
    int ESRCH
    int SHUT_RDWR
    int snprintf(char *out, size_t size, const char *format, ...) noexcept nogil
    int shutdown(int fd, int how) noexcept nogil

cdef enum:
    LOOK_TRIES = 1000           # looks at a table that changes
    MAP_TRIES = 5               # of a mapping for which the kernel has no memory

cdef struct range_t:
    uint64_t address
    uint64_t bytes
    uint64_t token              # which pool of this process

cdef struct ranges_t:
    mutex_t lock                # guards the rest; the attendants hold it while they remap
    uint32_t sequence           # odd while the table changes, for who looks without the lock
    uint32_t count
    range_t *entries            # sorted by address

cdef struct attendant_t:
    ranges_t *ranges
    header_t *header
    pyswap_fd channel
    pyswap_fd sock              # over which this process makes its requests
    int uffd
    watch_t watch
    pyswap_heir heir
    int store_fd
    int empty_fd                # a file of no bytes: what is mapped from it answers with SIGBUS
    uint64_t token
    uint32_t detached           # this process leaves in good order
    uint32_t orphaned           # the swapper died, or serves this process no more
    pthread_t thread


cdef inline bint range_hold(uint64_t address, uint64_t bytes) noexcept nogil:
    """Reserve addresses in place of what is mapped there; False: the kernel has no memory for that."""
    cdef int _
    for _ in range(MAP_TRIES):
        if range_reserve(address, bytes) != NULL:
            return True
    return False


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


cdef inline bint range_overlaps(ranges_t *ranges, uint64_t address, uint64_t bytes) noexcept nogil:
    """Whether bytes lie in a range; takes no lock, since a signal handler may ask.  True where it cannot be told."""
    cdef uint32_t sequence, place
    cdef bint hit
    cdef int _
    for _ in range(LOOK_TRIES):
        sequence = load32(&ranges.sequence)
        if sequence & 1:
            continue
        place = range_place(ranges, address + bytes - 1)
        hit = place != 0 and address < ranges.entries[place - 1].address + ranges.entries[place - 1].bytes
        if load32(&ranges.sequence) == sequence:
            return hit
    return True


cdef inline bint range_add(ranges_t *ranges, uint64_t address, uint64_t bytes, uint64_t token) noexcept nogil:
    cdef uint32_t place, i
    if ranges.count == MAX_LOCAL_RANGES:
        return False
    mutex_lock(&ranges.lock)
    add32(&ranges.sequence, 1)
    place = range_place(ranges, address)
    i = ranges.count
    while i > place:
        ranges.entries[i] = ranges.entries[i - 1]
        i -= 1
    ranges.entries[place].address = address
    ranges.entries[place].bytes = bytes
    ranges.entries[place].token = token
    ranges.count += 1
    add32(&ranges.sequence, 1)
    mutex_unlock(&ranges.lock)
    return True


cdef inline void range_remove(ranges_t *ranges, uint64_t address) noexcept nogil:
    cdef uint32_t place, i
    mutex_lock(&ranges.lock)
    add32(&ranges.sequence, 1)
    place = range_place(ranges, address)
    if place and ranges.entries[place - 1].address == address:
        for i in range(place, ranges.count):
            ranges.entries[i - 1] = ranges.entries[i]
        ranges.count -= 1
    add32(&ranges.sequence, 1)
    mutex_unlock(&ranges.lock)


cdef inline void range_poison(attendant_t *a, uint64_t address, uint64_t bytes) noexcept nogil:
    """Touches of the range end in SIGBUS from here on; under ranges.lock, so that it is still ours."""
    cdef int _
    for _ in range(MAP_TRIES):
        if range_map(address, bytes, a.empty_fd, 0, -1, True) == 0:
            uffd_wake(a.uffd, address, bytes)
            return
    # What is there may be a mapping that nobody watches, or none, for anybody's memory to come to.
    kill_self()


cdef inline void attendant_poison(attendant_t *a, uint64_t address, uint64_t bytes) noexcept nogil:
    """Obey an order; the array may have ended since it was given."""
    cdef range_t *entry
    mutex_lock(&a.ranges.lock)
    entry = range_find(a.ranges, address)
    if entry != NULL and entry.token == a.token:
        range_poison(a, address, bytes)
    mutex_unlock(&a.ranges.lock)


# What the process's own threads do with a pool's addresses that nobody uses.

cdef inline int addresses_take(attendant_t *a, uint64_t address, uint64_t bytes) noexcept nogil:
    """Let nothing be mapped at addresses: what the swapper tells the kernel about them from here on meets nothing."""
    cdef int rc
    mutex_lock(&a.ranges.lock)
    rc = 0 if not load32(&a.orphaned) and range_hold(address, bytes) else -EAGAIN
    mutex_unlock(&a.ranges.lock)
    failpoint_visit(a.header, FP_MOVE_BEGUN)
    return rc


cdef inline int addresses_map(attendant_t *a, uint64_t address, uint64_t bytes, uint64_t offset) noexcept nogil:
    """Map the store at addresses that were taken, registered before anything can be touched there."""
    cdef int rc = -ESRCH, _
    mutex_lock(&a.ranges.lock)
    for _ in range(MAP_TRIES):
        if rc == 0 or load32(&a.orphaned):
            break
        rc = range_map(address, bytes, a.store_fd, offset, a.uffd, True)
    if rc != 0:
        range_poison(a, address, bytes)
    mutex_unlock(&a.ranges.lock)
    failpoint_visit(a.header, FP_MOVE_MAPPED)
    return rc


cdef inline int attendant_remap(attendant_t *a, pyswap_order *order) noexcept nogil:
    """Obey an order; what cannot be registered again is not left to the kernel."""
    cdef range_t *entry
    cdef int rc = -ESRCH, _
    mutex_lock(&a.ranges.lock)
    entry = range_find(a.ranges, order.address)
    if entry != NULL and entry.token == a.token and not load32(&a.orphaned):
        failpoint_visit(a.header, FP_ATTENDANT_ORDER)
        for _ in range(MAP_TRIES):
            rc = range_remap(order.address, order.bytes, a.store_fd, order.offset)
            failpoint_visit(a.header, FP_ATTENDANT_MAPPED)
            if rc == 0:
                rc = uffd_register(a.uffd, order.address, order.bytes)
            if rc == 0:
                break
        if rc != 0:
            say(order.text, order.length)
            range_poison(a, order.address, order.bytes)
        failpoint_visit(a.header, FP_ATTENDANT_DONE)
    mutex_unlock(&a.ranges.lock)
    return rc


cdef inline void attendant_orphaned(attendant_t *a, seen last, int rc) noexcept nogil:
    """Nobody serves this process's arrays any more, and nobody may hang on them: say why, and end touches of them."""
    cdef uint32_t i
    cdef char why[120]
    cdef char text[240]
    cdef bint said = False
    if last == SEEN_END:
        snprintf(why, sizeof(why), b"the pool's swapper died and no other could be started")
    elif wait_either(a.watch.pidfd, -1, 0):
        snprintf(why, sizeof(why), b"the connection to the pool's swapper has ended, and so has the swapper")
    else:
        snprintf(why, sizeof(why), b"the connection to the pool's swapper has ended (%d), though the swapper lives", rc)
    snprintf(text, sizeof(text), b"pyswap: %s; its arrays answer with SIGBUS from here on\n", why)
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


cdef inline void attendant_answer(attendant_t *a, uint64_t copy, int rc) noexcept nogil:
    """Tell what became of a remap; nobody needs to know once the swapper has ended: the next one orders anew."""
    while answer_send(a.channel.fd, copy, rc) == -EAGAIN:
        if wait_either(a.watch.pidfd, -1, 1):
            return


cdef inline int attendant_obey(attendant_t *a) noexcept nogil:
    """Carry out the next order; 0 at the channel's end, -errno where it cannot be read."""
    cdef pyswap_order order
    cdef int rc = order_take(a.channel.fd, &order)
    if rc <= 0:
        return rc
    if order.kind == ORDER_REMAP:
        attendant_answer(a, order.copy, attendant_remap(a, &order))
    else:
        say(order.text, order.length)
        attendant_poison(a, order.address, order.bytes)
    return rc


cdef inline bint attendant_lost(attendant_t *a) noexcept nogil:
    """Whether a descriptor that was looked at is gone, or another file's: it is not used any more.

    The swapper serves this process on until a fault needs an order, and then has it end (`Server._expel`).
    """
    cdef bint lost = False
    if a.channel.fd >= 0 and not fd_kept(&a.channel):
        lost = True
    if a.watch.pidfd >= 0 and not fd_kept(&a.watch.opened):
        watch_follow(&a.watch, a.header)
        lost = True
    return lost


cdef inline bint is_parting(attendant_t *a) noexcept nogil:
    """Whether this process, or the pool, is ending in good order."""
    return load32(&a.detached) != 0 or load32(&a.header.ended) != 0


cdef inline void *attendant_main(void *argument) noexcept nogil:
    cdef attendant_t *a = <attendant_t *>argument
    cdef seen what
    cdef int rc = 0
    watch_follow(&a.watch, a.header)
    while True:
        what = watch_look(&a.watch, a.header, a.channel.fd)
        if what == SEEN_NOTHING or attendant_lost(a):
            continue
        if what == SEEN_END and (is_parting(a) or not swapper_renew(&a.watch, a.header, &a.heir)):
            break
        if what != SEEN_END:
            rc = attendant_obey(a)
            if rc <= 0 and rc != -EAGAIN:
                break
    if not is_parting(a):
        attendant_orphaned(a, what, rc)
    if not load32(&a.detached) and fd_kept(&a.sock):
        # Whoever waits for a reply is told: by itself the connection does not end, since the vault has its other end.
        shutdown(a.sock.fd, SHUT_RDWR)
    fd_close(&a.watch.opened)
    return NULL
