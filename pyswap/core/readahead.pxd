"""Readahead: what streams are worth reading before it is asked for is queued.

detector_feed() is told of every fault of a region and finds the stream that it continues.  A stream is followed
after two steps of one stride, or three where it leaves out pages near by; what is then kept ahead of it is twice its
way so far, up to the window.

Requests wait in a bounded ring for the readahead threads; a full ring drops them.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport NOBODY, REQUESTS, STREAMS, detector_t, pool_t, request_t, stream_t
from pyswap.core.layout cimport ADVICE_RANDOM, ADVICE_SEQUENTIAL, region_id, region_t
from pyswap.core.lock cimport add32, futex_wake, load32, load64, mutex_lock, mutex_trylock, mutex_unlock
from pyswap.core.pagetable cimport PTE_EMPTY, pte_read
from pyswap.core.region cimport PAGE_MASK, life_drop, life_hold, region_page
from pyswap.core.stream cimport CONFIRM, SPARSE_AROUND, adjacency, in_memory, page_start, sparse_around, stream_find

cdef enum:
    FIRST_WITH_GAPS = 16        # steps read ahead where each is a read of its own: fewer would not keep the device busy
    MOST_WITH_GAPS = 128        # and more would not keep it any busier
    STRIDED_SHARES = 16         # requests that a chunk of pages with gaps is asked for in
    LATELY = 1024               # faults in a region: a stream that had none of them is over
    AHEAD_SHARE = 8             # of the frames: what may be read ahead of all streams of a region
    SPARSE_SHARE = 8            # of a region: when so much of it may have been mapped so, its faults are dense


cdef struct way_t:              # where a fault belongs: the stream that it continues
    int64_t direction           # 1 or -1 where that goes from page to page; else 0
    uint32_t window             # how many steps ahead of the fault are worth reading
    int64_t gap                 # its stride, in bytes, where it leaves pages out; else 0
    int64_t row                 # only then: where the fault's row begins, in bytes,
    int64_t width               # and how far behind that it is touched


cdef inline void request_begin(
    pool_t *pool, request_t *request, region_id r, uint32_t generation, int64_t stride
) noexcept nogil:
    """A request for a region's pages that belongs to no stream; what is asked for of them is for the caller to say."""
    request.object = pool.regions[r].object
    request.generation = pool.regions[r].object_generation
    request.stride = stride
    request.width = 0
    request.zeros = False
    request.region = r
    request.region_generation = generation
    request.stream = NOBODY
    request.stream_generation = 0


cdef inline bint request_put(pool_t *pool, request_t *request) noexcept nogil:
    cdef bint room
    mutex_lock(&pool.requests_lock)
    room = pool.requests_tail - pool.requests_head < REQUESTS
    if room:
        request.epoch = load32(&pool.epochs[request.object])
        pool.requests[pool.requests_tail % REQUESTS] = request[0]
        pool.requests_tail += 1
    mutex_unlock(&pool.requests_lock)
    if room:
        add32(&pool.requests_sequence, 1)
        futex_wake(&pool.requests_sequence, 1)
    return room


cdef inline bint request_take(pool_t *pool, request_t *request) noexcept nogil:
    cdef bint any
    mutex_lock(&pool.requests_lock)
    any = pool.requests_tail != pool.requests_head
    if any:
        request[0] = pool.requests[pool.requests_head % REQUESTS]
        pool.requests_head += 1
    mutex_unlock(&pool.requests_lock)
    return any


cdef inline uint32_t around_limit(pool_t *pool, region_id r, int64_t stride) noexcept nogil:
    """How many resident neighbours are mapped with a page.

    Mapping as many as one call may takes longer than the fault itself.  A stream wants them; of faults here and there
    few do, until there were so many that they have cost half of what mapping the whole region does.
    """
    cdef uint64_t mapped = load64(&pool.detectors[r].time) * SPARSE_AROUND
    if stride != 0 or mapped >= pool.regions[r].pages // SPARSE_SHARE:
        return pool.header.around_pages
    return sparse_around(pool)


cdef inline int64_t row_end(pool_t *pool, int64_t row, int64_t width, int64_t pages) noexcept nogil:
    """The index behind the last page of a row; the array has so many."""
    return min(((row + width) >> pool.page_shift) + 1, pages)


cdef inline uint32_t row_pages(pool_t *pool, stream_t *s) noexcept nogil:
    """The most pages that a row of a stream lies on."""
    return <uint32_t>(s.width >> pool.page_shift) + 2


cdef inline uint32_t window_share(pool_t *pool, detector_t *d) noexcept nogil:
    """How far ahead one stream may be: what all of them have brought must be there yet when it is asked for."""
    cdef uint32_t n = 0
    cdef int i
    for i in range(STREAMS + 1):
        n += d.streams[i].confirmed >= CONFIRM and d.time - d.streams[i].used < LATELY
    return min(pool.header.window_pages, max(<uint32_t>pool.header.frame_count // AHEAD_SHARE // max(n, 1), 4))


cdef inline void stream_ask(
    pool_t *pool, region_id r, uint32_t generation, detector_t *d, stream_t *s, int64_t position
) noexcept nogil:
    """Queue what the window has room for: requests of a chunk, from where the last one ended."""
    cdef region_t *region = &pool.regions[r]
    cdef request_t request
    cdef int64_t step = s.stride, sign = 1 if s.stride > 0 else -1
    cdef int64_t limit, steps, most = pool.header.chunk_pages, end = <int64_t>(region.pages << pool.page_shift)
    cdef uint32_t share = window_share(pool, d)
    s.window = share
    if region.advice != ADVICE_SEQUENTIAL:
        # No more than twice what it has gone already: most rows, and parts of arrays, end somewhere.
        s.window = min(2 * s.confirmed, share)
    if adjacency(pool, step):
        position = page_start(pool, position)
    else:
        s.window = max(min(s.window, <uint32_t>MOST_WITH_GAPS), <uint32_t>FIRST_WITH_GAPS)
        if s.width:
            s.window = max(min(s.window, share // row_pages(pool, s)), <uint32_t>1)
        # Each page is a read of its own: the threads share them, and the reader overtakes none of them.
        most = max(min(most // STRIDED_SHARES, <int64_t>s.window // 4), 1)
    if (s.ahead - position) * sign <= 0:
        s.ahead = position + step
    limit = position + step * (<int64_t>s.window + 1)
    request_begin(pool, &request, r, generation, step)
    request.width = s.width
    request.stream = <uint32_t>(s - &d.streams[0])
    request.stream_generation = s.generation
    while (limit - s.ahead) * sign > 0 and 0 <= s.ahead < end:
        # Who scans what others have brought wakes no thread for it.
        if adjacency(pool, step) and in_memory(pool, r, s.ahead >> pool.page_shift):
            s.ahead += step
            continue
        steps = (limit - s.ahead) // step
        # Small leftovers wait until they make half a chunk: large reads, fewer of them.
        if steps * 2 < most and steps * 4 < s.window:
            return
        if steps > most:
            steps = most
        request.first = s.ahead
        request.count = <uint32_t>steps
        if not request_put(pool, &request):
            return
        s.ahead += step * steps


cdef inline void way_find(
    pool_t *pool, region_id r, uint32_t generation, detector_t *d, int64_t position, way_t *way
) noexcept nogil:
    """Which stream a fault continues, if one that is worth following: what is next is asked for."""
    cdef stream_t *s = stream_find(pool, r, d, position, &way.row)
    s.used = d.time
    if s.confirmed >= CONFIRM or (pool.regions[r].advice == ADVICE_SEQUENTIAL and s.confirmed):
        way.direction = adjacency(pool, s.stride)
        if way.direction == 0:
            way.gap = s.stride
            way.width = s.width
        stream_ask(pool, r, generation, d, s, s.last)
        way.window = s.window


cdef inline void detector_feed(
    pool_t *pool, region_id r, uint32_t generation, int64_t position, way_t *way
) noexcept nogil:
    """Tell readahead of a fault, and find out whether it continues a stream that is worth following."""
    cdef detector_t *d = pool.detectors[r]
    way.direction = 0
    way.window = 0
    way.gap = 0
    if not mutex_trylock(&d.lock):
        return
    if life_hold(&pool.regions[r].word, generation):
        d.time += 1
        if pool.regions[r].advice != ADVICE_RANDOM:
            way_find(pool, r, generation, d, position, way)
        life_drop(&pool.regions[r].word)
    mutex_unlock(&d.lock)


cdef inline void zeros_ahead(
    pool_t *pool, region_id r, uint32_t generation, int64_t index, uint32_t pages
) noexcept nogil:
    """Have zeros made ready where a stream of first touches comes next: that takes as long as writing them does.

    Not for an array of a file, whose untouched pages are no zeros.
    """
    cdef region_t *region = &pool.regions[r]
    cdef request_t request
    if index >= <int64_t>region.pages or pte_read(pool, region_page(pool, r, index) & PAGE_MASK) != PTE_EMPTY:
        return
    request_begin(pool, &request, r, generation, <int64_t>pool.page_bytes)
    request.first = index << pool.page_shift
    request.count = <uint32_t>min(<int64_t>pages, <int64_t>region.pages - index)
    request.zeros = True
    request_put(pool, &request)


cdef inline void stream_fell_short(pool_t *pool, request_t *request, int64_t position) noexcept nogil:
    """Readahead found no frame for what is there: the stream asks again from there."""
    cdef detector_t *d
    cdef stream_t *s
    if request.stream == NOBODY:
        return
    d = pool.detectors[request.region]
    mutex_lock(&d.lock)
    s = &d.streams[request.stream]
    if s.generation == request.stream_generation and s.stride == request.stride:
        if (s.ahead - position) * (1 if s.stride > 0 else -1) > 0:
            s.ahead = position
    mutex_unlock(&d.lock)
