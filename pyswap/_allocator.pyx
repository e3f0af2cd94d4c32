"""NumPy's memory handler (NEP 49): what is large comes from arenas, in a pool's memory, and what is not from before.

An arena is a sparse region (core/sparse.pxd), in which blocks of whole pages lie: so every block begins at a page, and
whether an address is ours is seen at once.  The swapper gives a block its pages and takes them back, over a line of
its own: a socket on which five words go and one comes back.  No Python code runs for that, which could collect
garbage, and so come here again, or raise.

Where which lock is held:
 - `guard` stands over the arenas and the lines, also while an order is under way.  Who holds it never wants the GIL;
   who wants it gives the GIL up first.
 - fork: Python's hook holds `guard` from before the swapper copies the maps until after fork(), so that arenas and
   maps agree in the child.  What the forking thread frees meanwhile is freed after it.

A block that has no room to grow gets other addresses, and keeps its pages (block_move): they stay in memory or in swap
as they are.  The caller has the block for itself, as realloc() asks for, so nobody touches the addresses meanwhile.
"""
from cpython.exc cimport PyErr_Fetch, PyErr_Restore, PyErr_SetInterrupt, PyErr_WriteUnraisable
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetName, PyCapsule_GetPointer, PyCapsule_SetPointer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove, memset, strcmp

from pyswap.core.lock cimport load32, load64, mutex_lock, mutex_t, mutex_unlock, panic, store32, store64

cdef extern from *:
    """
    #define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
    #define NPY_TARGET_VERSION NPY_1_22_API_VERSION
    #include <numpy/arrayobject.h>
    #include <errno.h>
    #include <malloc.h>
    #include <pthread.h>
    #include <sys/socket.h>
    #include <time.h>
    #if PY_VERSION_HEX < 0x030d0000
    #define Py_IsFinalizing _Py_IsFinalizing
    #endif

    /* One order over a line, and its answer: 0 or more, or -errno; -EPIPE where the line has ended, -EIO where it
       ended after the order was sent, which may be obeyed or not. */
    static inline int64_t line_order(int line, uint64_t what, uint64_t address, uint64_t first, uint64_t count,
                                     uint64_t to) {
        uint64_t words[5] = { what, address, first, count, to };
        int64_t answer = 0;
        ssize_t n;
        if (line < 0) return -EPIPE;
        do n = send(line, words, sizeof words, MSG_NOSIGNAL); while (n < 0 && errno == EINTR);
        if (n != (ssize_t)sizeof words) return -EPIPE;
        do n = recv(line, &answer, sizeof answer, 0); while (n < 0 && errno == EINTR);
        return n == (ssize_t)sizeof answer ? answer : -EIO;
    }
    static inline void pause_ns(long ns) { struct timespec t = { 0, ns }; nanosleep(&t, NULL); }
    """
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *ctx, size_t size) noexcept nogil
        void *(*calloc)(void *ctx, size_t count, size_t size) noexcept nogil
        void *(*realloc)(void *ctx, void *p, size_t size) noexcept nogil
        void (*free)(void *ctx, void *p, size_t size) noexcept nogil
    ctypedef struct PyDataMem_Handler:
        char name[127]
        uint8_t version
        PyDataMemAllocator allocator
    int _import_array() except -1
    PyObject *PyDataMem_DefaultHandler
    ctypedef struct PyThreadState
    PyThreadState *PyEval_SaveThread() noexcept nogil
    void PyEval_RestoreThread(PyThreadState *state) noexcept nogil
    int PyGILState_Check() noexcept nogil
    PyThreadState *PyGILState_GetThisThreadState() noexcept nogil
    int Py_IsFinalizing() noexcept nogil
    size_t malloc_usable_size(void *p) noexcept nogil
    ctypedef unsigned long pthread_t
    pthread_t pthread_self() noexcept nogil
    int64_t line_order(
        int line, uint64_t what, uint64_t address, uint64_t first, uint64_t count, uint64_t to
    ) noexcept nogil
    void pause_ns(long ns) noexcept nogil
    int EAGAIN
    int EEXIST
    int EIO
    int ENOSPC
    int EPIPE

_import_array()

cdef enum:
    MAX_ARENAS = 1024
    MAX_DEFERRED = 4096         # blocks that a forking thread frees in the middle
    END_PAGES = 4096            # a large block ends in pieces, so that the swapper serves others in between
    AGAIN_TRIES = 20000         # waits for pages that are being written out
    AGAIN_NS = 200_000
    LINE_BEGIN = 1
    LINE_END = 2
    LINE_MOVE = 3
    LINE_LOOK = 4
    LOOK_BITS = 16              # of an answer to LINE_LOOK: pages that follow each other; above: the first one's id
    MOVE_ROUNDS = 16            # of AGAIN_TRIES, before addresses are given up
    REOPEN_TRIES = 3            # swappers that may die of one order
    FORK_TRIES = 25000          # of AGAIN_NS, that a fork waits for a move whose swapper has died

cdef struct span_t:             # a run of pages of an arena
    uint64_t first
    uint64_t count

cdef struct owed_t:             # a range that was freed while the line was down: the swapper is to be told
    uint64_t first
    uint64_t count
    bint told                   # it may have been told: whether this process alone had the pages is not known

cdef struct arena_t:            # all guarded by `guard`; the address changes only while there are no blocks
    uint64_t address            # 0: no arena
    uint64_t bytes
    uint64_t token              # whose, among the pools of this process
    uint32_t shift              # of a page
    uint32_t own                # made by this process, which may take blocks: a forked child only frees
    uint32_t spent              # it was told of as empty and of no more use
    int line
    void *attendant             # what the two below take first
    int (*addresses_take)(void *attendant, uint64_t address, uint64_t size) noexcept nogil
    int (*addresses_map)(void *attendant, uint64_t address, uint64_t size, uint64_t offset) noexcept nogil
    uint32_t *blocks            # by page: the pages of the block that begins there
    uint64_t live               # pages in blocks
    span_t *spans               # free, sorted
    uint32_t span_count
    uint32_t span_room
    owed_t *owed
    uint32_t owed_count
    uint32_t owed_room

# What became of a try to take a block.
cdef enum outcome:
    TAKEN
    FULL                        # frames and swap have no room
    NO_ROOM                     # no arena has
    BROKEN                      # the line has ended
    ELSEWHERE                   # the pool makes no more arrays

cdef mutex_t guard
cdef arena_t arenas[MAX_ARENAS]
cdef uint32_t arena_count       # the places that were ever used
cdef uint64_t active            # the token of the pool that blocks come from now; 0: none
cdef uint64_t least             # bytes from which on they do
cdef pthread_t forking          # the thread between the hooks of a fork
cdef bint is_forking
cdef uint32_t moving            # moves that wait for a line, with `guard` given up
cdef void *deferred[MAX_DEFERRED]
cdef uint32_t deferred_count
cdef PyDataMem_Handler *before  # NumPy's own
cdef PyDataMem_Handler ours
cdef object house = None        # pyswap.allocator's callables: grow(size), reopen(token), settle(token), spent(place)


# Spans.

cdef uint32_t span_place(arena_t *a, uint64_t first) noexcept nogil:
    """The number of spans that begin before a page."""
    cdef uint32_t low = 0, high = a.span_count, middle
    while low < high:
        middle = (low + high) // 2
        if a.spans[middle].first < first:
            low = middle + 1
        else:
            high = middle
    return low


cdef void span_remove(arena_t *a, uint32_t k) noexcept nogil:
    memmove(&a.spans[k], &a.spans[k + 1], (a.span_count - k - 1) * sizeof(span_t))
    a.span_count -= 1


cdef void span_give_back(arena_t *a, uint64_t first, uint64_t count) noexcept nogil:
    """Join a range with its free neighbours; without memory for the record its addresses are lost, no more."""
    cdef uint32_t k = span_place(a, first)
    cdef span_t *grown
    if k < a.span_count and a.spans[k].first == first + count:
        count += a.spans[k].count
        span_remove(a, k)
    if k and a.spans[k - 1].first + a.spans[k - 1].count == first:
        a.spans[k - 1].count += count
        return
    if a.span_count == a.span_room:
        grown = <span_t *>realloc(a.spans, (2 * a.span_room + 16) * sizeof(span_t))
        if grown == NULL:
            return
        a.spans = grown
        a.span_room = 2 * a.span_room + 16
    memmove(&a.spans[k + 1], &a.spans[k], (a.span_count - k) * sizeof(span_t))
    a.spans[k].first = first
    a.spans[k].count = count
    a.span_count += 1


cdef bint span_take(arena_t *a, uint64_t count, bint roomy, uint64_t *first) noexcept nogil:
    """The first span that is long enough, or the longest, for what is likely to grow."""
    cdef uint32_t k, best = a.span_count
    for k in range(a.span_count):
        if a.spans[k].count >= count and (best == a.span_count or a.spans[k].count > a.spans[best].count):
            best = k
            if not roomy:
                break
    if best == a.span_count:
        return False
    first[0] = a.spans[best].first
    a.spans[best].first += count
    a.spans[best].count -= count
    if a.spans[best].count == 0:
        span_remove(a, best)
    return True


# Blocks; `guard` is held.

cdef uint64_t pages_of(arena_t *a, size_t size) noexcept nogil:
    return (size + (<uint64_t>1 << a.shift) - 1) >> a.shift


cdef int64_t range_order(arena_t *a, uint64_t what, uint64_t first, uint64_t count, uint64_t to = 0) noexcept nogil:
    """An order, repeated while pages of the range are under way somewhere."""
    cdef int64_t rc = -EAGAIN
    cdef int _
    for _ in range(AGAIN_TRIES):
        rc = line_order(a.line, what, a.address, first, count, to)
        if rc != -EAGAIN:
            break
        pause_ns(AGAIN_NS)
    return rc


cdef inline bint is_down(int64_t rc) noexcept nogil:
    return rc == -EPIPE or rc == -EIO


cdef void range_owe(arena_t *a, uint64_t first, uint64_t count, bint told) noexcept nogil:
    """Keep a range for the next line; without memory for the record its pages stay, no more."""
    cdef owed_t *grown
    if a.owed_count == a.owed_room:
        grown = <owed_t *>realloc(a.owed, (2 * a.owed_room + 16) * sizeof(owed_t))
        if grown == NULL:
            return
        a.owed = grown
        a.owed_room = 2 * a.owed_room + 16
    a.owed[a.owed_count].first = first
    a.owed[a.owed_count].count = count
    a.owed[a.owed_count].told = told
    a.owed_count += 1


cdef outcome block_begin(arena_t *a, uint64_t first, uint64_t count) noexcept nogil:
    """Have pages for a range that was taken from the spans; it goes back to them where that fails."""
    cdef int64_t rc = range_order(a, LINE_BEGIN, first, count)
    if rc == -EIO:
        # It may have pages now.  If so they are this process's alone, and where they are mapped is as it was.
        range_owe(a, first, count, False)
        return BROKEN
    if rc == 0:
        return TAKEN
    if rc == -EEXIST:
        # A forked sharer has copies under these page ids: nobody is given them again.
        return NO_ROOM
    span_give_back(a, first, count)
    if rc == -ENOSPC or rc == -EAGAIN:
        return FULL
    return BROKEN if rc == -EPIPE else ELSEWHERE


cdef outcome block_take(size_t size, bint roomy, void **block) noexcept nogil:
    """A block of an arena of the active pool."""
    cdef uint32_t k
    cdef uint64_t first = 0, count
    cdef arena_t *a
    cdef outcome result
    for k in range(arena_count):
        a = &arenas[k]
        if not a.address or not a.own or a.token != active:
            continue
        count = pages_of(a, size)
        while span_take(a, count, roomy, &first):
            result = block_begin(a, first, count)
            if result == TAKEN:
                a.blocks[first] = <uint32_t>count
                a.live += count
                block[0] = <void *>(a.address + (first << a.shift))
            if result != NO_ROOM:
                return result
    return NO_ROOM


cdef bint range_finish(arena_t *a, uint64_t first, uint64_t count, bint told) noexcept nogil:
    """End a range, in pieces; what this process alone had may begin again.  False: the line is down."""
    cdef uint64_t n
    cdef int64_t rc
    while count:
        n = count if count < END_PAGES else END_PAGES
        rc = range_order(a, LINE_END, first, n)
        if is_down(rc):
            range_owe(a, first, n, told or rc == -EIO)
            if count > n:
                range_owe(a, first + n, count - n, told)
            return False
        if rc == 1 and not told:
            span_give_back(a, first, n)
        first += n
        count -= n
    return True


cdef void range_give_back(arena_t *a, uint64_t first, uint64_t count) noexcept nogil:
    a.live -= count
    range_finish(a, first, count, False)


cdef void owed_finish(arena_t *a) noexcept nogil:
    """Tell of what was freed while the line was down."""
    cdef owed_t owed
    while a.owed_count:
        a.owed_count -= 1
        owed = a.owed[a.owed_count]
        if not range_finish(a, owed.first, owed.count, owed.told):
            return


cdef bint block_grow(
    arena_t *a, uint64_t first, uint64_t before_pages, uint64_t after_pages, outcome *result
) noexcept nogil:
    """Let a block have the pages behind it; False: they are not free."""
    cdef uint64_t end = first + before_pages, more = after_pages - before_pages
    cdef uint32_t k = span_place(a, end)
    if not a.own or a.token != active:
        return False
    if k == a.span_count or a.spans[k].first != end or a.spans[k].count < more:
        return False
    a.spans[k].first += more
    a.spans[k].count -= more
    if a.spans[k].count == 0:
        span_remove(a, k)
    result[0] = block_begin(a, end, more)
    if result[0] == TAKEN:
        a.blocks[first] = <uint32_t>after_pages
        a.live += more
    return result[0] != NO_ROOM


# A block that moves; `guard` is held.

cdef int64_t sure_order(arena_t *a, uint64_t what, uint64_t first, uint64_t count, uint64_t to) noexcept nogil:
    """An order in the middle of a move, given again to the next swapper where one dies: to obey it twice is to obey
    it once.  -EPIPE or -EIO: there is none."""
    global moving
    cdef int64_t rc = -EPIPE
    cdef int answer, _
    for _ in range(REOPEN_TRIES):
        rc = range_order(a, what, first, count, to)
        # A thread that Python does not know cannot ask it.
        if not is_down(rc) or PyGILState_GetThisThreadState() == NULL:
            break
        moving += 1
        mutex_unlock(&guard)
        answer = ask("reopen", a.token)
        mutex_lock(&guard)
        moving -= 1
        if answer != YES:
            break
    return rc


cdef bint range_map(arena_t *a, uint64_t first, uint64_t count) noexcept nogil:
    """Map what the swapper says that is in a range; False: it cannot be had, and the addresses stay out of use."""
    cdef uint64_t n, end = first + count
    cdef int64_t answer
    while first < end:
        answer = sure_order(a, LINE_LOOK, first, end - first, 0)
        if answer <= 0:
            return False
        n = <uint64_t>answer & ((1 << LOOK_BITS) - 1)
        if a.addresses_map(
            a.attendant, a.address + (first << a.shift), n << a.shift, <uint64_t>(answer >> LOOK_BITS) << a.shift
        ) != 0:
            return False
        first += n
    return True


cdef outcome range_move(arena_t *a, uint64_t first, uint64_t count, uint64_t to, bint *kept) noexcept nogil:
    """Have pages at other addresses.  TAKEN; NO_ROOM: nothing has changed; BROKEN: they are lost with the pool.

    `kept`: the old addresses may be used again.
    """
    cdef uint64_t size = count << a.shift
    cdef int64_t rc = -EAGAIN
    cdef int _
    kept[0] = True
    if a.addresses_take(a.attendant, a.address + (first << a.shift), size) != 0:
        # What the kernel had no memory for may have unmapped what was there.
        return NO_ROOM if range_map(a, first, count) else BROKEN
    if a.addresses_take(a.attendant, a.address + (to << a.shift), size) == 0:
        for _ in range(MOVE_ROUNDS):
            rc = sure_order(a, LINE_MOVE, first, count, to)
            if rc != -EAGAIN:
                break
        # Who acts on where the pages were still has nothing to act on, if nothing is mapped there any more.
        kept[0] = rc != -EAGAIN
    else:
        rc = -ENOSPC
    if is_down(rc) or not range_map(a, to, count) or (kept[0] and not range_map(a, first, count)):
        return BROKEN
    return TAKEN if rc == 0 or rc == -EAGAIN else NO_ROOM


cdef outcome block_move(
    arena_t *a, uint64_t first, uint64_t held, uint64_t needed, uint64_t *to
) noexcept nogil:
    """Other addresses for a block that grows, and its pages; anything but TAKEN: it is as it was."""
    cdef outcome result
    cdef bint kept = True
    if not a.own or a.token != active or not span_take(a, needed, True, to):
        return NO_ROOM
    result = block_begin(a, to[0] + held, needed - held)
    if result != TAKEN:
        span_give_back(a, to[0], held)
        return result
    a.live += needed - held
    result = range_move(a, first, held, to[0], &kept)
    if result == BROKEN:
        return FULL
    if result != TAKEN:
        range_give_back(a, to[0] + held, needed - held)
        span_give_back(a, to[0], held)
        return result
    a.blocks[to[0]] = <uint32_t>needed
    a.blocks[first] = 0
    if kept:
        span_give_back(a, first, held)
    return TAKEN


cdef arena_t *arena_of(const void *p) noexcept nogil:
    """The arena that an address lies in; a block keeps it there, so who has one needs no lock."""
    cdef uint32_t k
    cdef uint64_t address
    if <uint64_t>p & 4095:
        return NULL
    for k in range(load32(&arena_count)):
        address = load64(&arenas[k].address)
        if address and address <= <uint64_t>p < address + arenas[k].bytes:
            return &arenas[k]
    return NULL


cdef uint64_t block_first(arena_t *a, const void *p) noexcept nogil:
    cdef uint64_t first = (<uint64_t>p - a.address) >> a.shift
    if a.blocks[first] == 0:
        panic("pyswap: what is freed is no block", <uint64_t>p, first, 0)
    return first


cdef bint is_spent(arena_t *a) noexcept nogil:
    """Tell once that an arena has no blocks, and gets none."""
    if a.live or a.spent or (a.own and a.token == active):
        return False
    a.spent = True
    return True


# The GIL.

cdef bint forks_here() noexcept nogil:
    return is_forking and forking == pthread_self()


cdef PyThreadState *enter() noexcept nogil:
    """Take `guard`, with the GIL given up; NULL where it was not held."""
    cdef PyThreadState *state = PyEval_SaveThread() if PyGILState_Check() else NULL
    mutex_lock(&guard)
    return state


cdef void leave(PyThreadState *state) noexcept nogil:
    mutex_unlock(&guard)
    if state != NULL:
        PyEval_RestoreThread(state)


# What pyswap.allocator answers with.
cdef enum:
    NO = 0
    YES = 1
    NEVER = 2                   # an array of that size fits nowhere

cdef int ask_house(str what, uint64_t argument) noexcept:
    """Call into pyswap.allocator, from anywhere: no exception goes out, and none that is set is lost."""
    cdef PyObject *kind
    cdef PyObject *value
    cdef PyObject *trace
    cdef int answer = NO
    PyErr_Fetch(&kind, &value, &trace)
    try:
        answer = getattr(house, what)(argument)
    except KeyboardInterrupt:
        PyErr_SetInterrupt()
    except BaseException as error:
        PyErr_WriteUnraisable(error)
    PyErr_Restore(kind, value, trace)
    return answer


cdef int ask(str what, uint64_t argument) noexcept nogil:
    with gil:
        return ask_house(what, argument)


# What NumPy calls.

cdef outcome take(size_t size, bint roomy, void **block) noexcept nogil:
    """A block, from a new arena where there is no room, over a new line where it has ended."""
    cdef PyThreadState *state
    cdef outcome result = ELSEWHERE
    cdef uint64_t token
    cdef int answer, _
    for _ in range(3):
        state = enter()
        token = active
        result = block_take(size, roomy, block) if token else ELSEWHERE
        leave(state)
        if state == NULL or (result != NO_ROOM and result != BROKEN):
            break
        answer = ask("grow", size) if result == NO_ROOM else ask("reopen", token)
        if answer != YES:
            return FULL if answer == NEVER else ELSEWHERE
    return result


cdef bint wants(size_t size) noexcept nogil:
    """Whether a block is to come from an arena."""
    return load64(&active) and size >= load64(&least) and not Py_IsFinalizing() and not forks_here()


cdef void *paged_malloc(void *ctx, size_t size) noexcept nogil:
    cdef void *block = NULL
    cdef outcome result
    if wants(size):
        result = take(size, False, &block)
        if result == TAKEN or result == FULL:
            return block
    return before.allocator.malloc(before.allocator.ctx, size)


cdef void *paged_calloc(void *ctx, size_t count, size_t size) noexcept nogil:
    cdef void *block = NULL
    cdef outcome result
    if size and count <= <size_t>-1 // size and wants(count * size):
        # The pages of a new block are zero.
        result = take(count * size, False, &block)
        if result == TAKEN or result == FULL:
            return block
    return before.allocator.calloc(before.allocator.ctx, count, size)


cdef void give_back(arena_t *a, void *p) noexcept nogil:
    cdef PyThreadState *state = enter()
    cdef uint64_t first = block_first(a, p), count = a.blocks[first], token = a.token
    cdef bint spent, owes
    a.blocks[first] = 0
    range_give_back(a, first, count)
    spent = state != NULL and is_spent(a)
    owes = state != NULL and a.owed_count != 0
    leave(state)
    if owes and not spent:
        ask("settle", token)
    if spent:
        ask("spent", <uint64_t>(a - &arenas[0]))


cdef void paged_free(void *ctx, void *p, size_t size) noexcept nogil:
    global deferred_count
    cdef arena_t *a = arena_of(p)
    if a == NULL:
        before.allocator.free(before.allocator.ctx, p, size)
    elif Py_IsFinalizing():
        # The process ends, and its memory with it.
        return
    elif forks_here():
        if deferred_count < MAX_DEFERRED:
            deferred[deferred_count] = p
            deferred_count += 1
    else:
        give_back(a, p)


cdef void *move(void *p, size_t known, size_t size, arena_t *a) noexcept nogil:
    """Another place for a block that has no room to grow; it gets room there."""
    cdef void *block = NULL
    cdef PyThreadState *state
    cdef outcome result = take(size, True, &block) if wants(size) else ELSEWHERE
    if result == FULL:
        return NULL
    if result != TAKEN:
        block = before.allocator.malloc(before.allocator.ctx, size)
        if block == NULL:
            return NULL
    state = PyEval_SaveThread() if PyGILState_Check() else NULL
    memcpy(block, p, known if known < size else size)
    if state != NULL:
        PyEval_RestoreThread(state)
    paged_free(NULL, p, known)
    return block


cdef void *paged_realloc(void *ctx, void *p, size_t size) noexcept nogil:
    cdef arena_t *a = arena_of(p)
    cdef PyThreadState *state
    cdef uint64_t first, held, needed, token
    cdef outcome result = TAKEN
    cdef bint done = True, owes
    if a == NULL:
        if p == NULL or not wants(size):
            return before.allocator.realloc(before.allocator.ctx, p, size)
        return move(p, malloc_usable_size(p), size, NULL)
    if forks_here():
        # It holds `guard`: the block is freed later.
        return move(p, <size_t>a.blocks[block_first(a, p)] << a.shift, size, a)
    state = enter()
    first = block_first(a, p)
    held = a.blocks[first]
    needed = pages_of(a, size if size else 1)
    if needed < held:
        a.blocks[first] = <uint32_t>needed
        range_give_back(a, first + needed, held - needed)
    elif needed > held:
        done = block_grow(a, first, held, needed, &result)
        if not done:
            result = block_move(a, first, held, needed, &first)
            done = result != NO_ROOM
        done = done and result != BROKEN and result != ELSEWHERE
    token = a.token
    owes = state != NULL and a.owed_count != 0
    leave(state)
    if owes:
        ask("settle", token)
    if done:
        return <void *>(a.address + (first << a.shift)) if result == TAKEN else NULL
    return move(p, held << a.shift, size, a)


# What pyswap.allocator calls.

def hook(callables):
    """Put the handler in NumPy's place for the default one, for good: it hands through what it does not take.

    Raises
    ------
    ImportError
        If NumPy's default handler is not the one that is known here.
    """
    global before, house
    cdef object capsule = <object>PyDataMem_DefaultHandler
    house = callables
    if before != NULL:
        return
    if PyCapsule_GetName(capsule) == NULL or strcmp(PyCapsule_GetName(capsule), b"mem_handler") != 0:
        raise ImportError("NumPy's default memory handler is not where it was")
    before = <PyDataMem_Handler *>PyCapsule_GetPointer(capsule, b"mem_handler")
    if before.version != 1 or strcmp(before.name, b"default_allocator") != 0:
        before = NULL
        raise ImportError("NumPy's default memory handler is another's, or of another version")
    memset(&ours, 0, sizeof(ours))
    memcpy(ours.name, b"pyswap", 7)
    ours.version = 1
    ours.allocator.malloc = paged_malloc
    ours.allocator.calloc = paged_calloc
    ours.allocator.realloc = paged_realloc
    ours.allocator.free = paged_free
    PyCapsule_SetPointer(capsule, &ours)


def activate(uint64_t token, uint64_t threshold):
    """Have blocks of so many bytes or more come from a pool's arenas; 0: of none."""
    store64(&least, threshold)
    store64(&active, token)


def arena_add(uint64_t address, uint64_t size, uint32_t shift, uint64_t token, int line, tuple mapper):
    """Have a sparse region used; returns its place.  `mapper`: see Attendant.mapper()."""
    global arena_count
    cdef uint32_t k
    cdef arena_t *a
    cdef PyThreadState *state
    cdef uint64_t pages = size >> shift, attendant, taker, maker
    cdef uint32_t *blocks = <uint32_t *>calloc(pages, sizeof(uint32_t))
    if blocks == NULL:
        raise MemoryError("pyswap: no memory for the table of blocks")
    attendant, taker, maker = mapper
    state = enter()
    k = 0
    while k < arena_count and arenas[k].address:
        k += 1
    if k == MAX_ARENAS:
        leave(state)
        free(blocks)
        raise MemoryError(f"more than {MAX_ARENAS} arenas in one process")
    a = &arenas[k]
    memset(a, 0, sizeof(arena_t))
    a.bytes = size
    a.token = token
    a.shift = shift
    a.own = True
    a.line = line
    a.attendant = <void *>attendant
    a.addresses_take = <int (*)(void *, uint64_t, uint64_t) noexcept nogil>taker
    a.addresses_map = <int (*)(void *, uint64_t, uint64_t, uint64_t) noexcept nogil>maker
    a.blocks = blocks
    span_give_back(a, 0, pages)
    store64(&a.address, address)
    if k == arena_count:
        store32(&arena_count, k + 1)
    leave(state)
    return k


def arena_remove(uint32_t k):
    """Forget an arena that was told of as spent; False where it is in use again."""
    cdef PyThreadState *state = enter()
    cdef arena_t *a = &arenas[k]
    cdef bint idle = a.address != 0 and a.live == 0
    if idle:
        store64(&a.address, 0)
        free(a.blocks)
        free(a.spans)
        free(a.owed)
    leave(state)
    return bool(idle)


def arenas_spent():
    """Places of arenas that are empty and of no more use now."""
    cdef PyThreadState *state = enter()
    cdef uint32_t k
    cdef uint64_t found[MAX_ARENAS]
    cdef uint32_t n = 0
    for k in range(arena_count):
        if arenas[k].address and is_spent(&arenas[k]):
            found[n] = k
            n += 1
    leave(state)
    return [found[k] for k in range(n)]


def arenas_line(uint64_t token, int line):
    """Have a pool's arenas use another line, and tell what is owed over it; returns whether there are any."""
    cdef PyThreadState *state = enter()
    cdef uint32_t k
    cdef bint any_found = False
    for k in range(arena_count):
        if arenas[k].address and arenas[k].token == token:
            arenas[k].line = line
            owed_finish(&arenas[k])
            any_found = True
    leave(state)
    return bool(any_found)


def arenas_told():
    """(address, bytes, bytes in blocks, whether blocks may be taken there) of each arena."""
    return [
        (arenas[k].address, arenas[k].bytes, arenas[k].live << arenas[k].shift, bool(arenas[k].own))
        for k in range(arena_count) if arenas[k].address
    ]


def fork_begin():
    """Before fork, and before the swapper prepares it."""
    global forking, is_forking
    cdef PyThreadState *state = PyEval_SaveThread()
    cdef int _
    mutex_lock(&guard)
    for _ in range(FORK_TRIES):
        if moving == 0:
            break
        mutex_unlock(&guard)
        pause_ns(AGAIN_NS)
        mutex_lock(&guard)
    PyEval_RestoreThread(state)
    forking = pthread_self()
    is_forking = True


def fork_end(bint in_child):
    """After fork; a child takes no blocks from what it inherited, and the lines are its parent's."""
    global is_forking, moving
    cdef uint32_t k
    if in_child:
        moving = 0
        for k in range(arena_count):
            arenas[k].own = False
            arenas[k].line = -1
    is_forking = False
    mutex_unlock(&guard)


def free_deferred():
    """Free what the forking thread could not; the lines must be there."""
    global deferred_count
    cdef void *p
    while deferred_count:
        deferred_count -= 1
        p = deferred[deferred_count]
        if arena_of(p) != NULL:
            give_back(arena_of(p), p)
