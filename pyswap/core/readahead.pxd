"""Readahead: follow access streams, and queue what is worth reading before it is asked for.

detector_feed() is told of every fault of a region and answers whether it continues a stream.  A stream is
followed after two steps of one stride; what is then kept ahead of it doubles with every step up to the
window.  Requests wait in a bounded ring for the readahead threads; a full ring drops them.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport REQUESTS, STREAMS, detector_t, pool_t, request_t, stream_t
from pyswap.core.layout cimport ADVICE_RANDOM, ADVICE_SEQUENTIAL, region_id, region_t
from pyswap.core.lock cimport add32, futex_wake, load32, load64, mutex_lock, mutex_trylock, mutex_unlock

cdef enum:
    MAX_STRIDE_PAGES = 64       # longer steps are not taken for a stream
    CONFIRM = 2                 # steps of one stride before anything is read ahead
    STRIDED_SHARES = 16         # requests that a chunk of pages with gaps is asked for in


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


cdef inline int64_t absolute(int64_t x) noexcept nogil:
    return x if x >= 0 else -x


cdef inline bint stream_takes(pool_t *pool, stream_t *s, int64_t index) noexcept nogil:
    """Whether a fault continues a stream; notes it if so.

    Steps may be left out, because what is resident is mapped around a fault and read ahead of it.
    """
    cdef int64_t delta = index - s.last
    cdef int64_t slack
    if delta == 0:
        return True
    if s.stride == 0:
        if absolute(delta) > MAX_STRIDE_PAGES:
            return False
        s.stride = delta
        s.confirmed = 1
    else:
        if (delta > 0) != (s.stride > 0) or delta % s.stride != 0:
            return False
        slack = s.window + pool.header.around_pages if s.confirmed >= CONFIRM else 1
        if delta // s.stride > slack:
            return False
        s.confirmed += 1
    s.last = index
    return True


cdef inline stream_t *stream_replace(detector_t *d, int64_t index) noexcept nogil:
    cdef stream_t *oldest = &d.streams[0]
    cdef int i
    for i in range(1, STREAMS):
        if d.streams[i].used < oldest.used:
            oldest = &d.streams[i]
    oldest.last = index
    oldest.stride = 0
    oldest.ahead = index
    oldest.confirmed = 0
    oldest.window = 0
    oldest.generation += 1
    return oldest


cdef inline void stream_ask(
    pool_t *pool, region_id r, detector_t *d, stream_t *s, int64_t index
) noexcept nogil:
    """Queue what the window has room for: requests of a chunk, from where the last one ended."""
    cdef region_t *region = &pool.regions[r]
    cdef request_t request
    cdef int64_t step = s.stride, sign = 1 if s.stride > 0 else -1
    cdef int64_t limit, steps, most = pool.header.chunk_pages
    if step != 1 and step != -1:
        # Each page is a read of its own: more threads share them, and the reader overtakes none of them.
        most = max(most // STRIDED_SHARES, 1)
    s.window = s.window * 2 if s.window else 4
    if s.window > pool.header.window_pages or region.advice == ADVICE_SEQUENTIAL:
        s.window = pool.header.window_pages
    if (s.ahead - index) * sign <= 0:
        s.ahead = index + step
    limit = index + step * (<int64_t>s.window + 1)
    request.object = region.object
    request.generation = region.object_generation
    request.stride = step
    request.region = r
    request.region_generation = <uint32_t>(load64(&region.word) >> 32)
    request.stream = <uint32_t>(s - &d.streams[0])
    request.stream_generation = s.generation
    while (limit - s.ahead) * sign > 0:
        steps = (limit - s.ahead) // step
        # Small leftovers wait until they make half a chunk: large reads, fewer of them.
        if steps * 2 < most and steps * 4 < s.window:
            return
        if steps > most:
            steps = most
        request.first = s.ahead
        request.count = <uint32_t>steps
        if s.ahead < 0 or s.ahead >= <int64_t>region.pages or not request_put(pool, &request):
            return
        s.ahead += step * steps


cdef inline int64_t detector_feed(pool_t *pool, region_id r, int64_t index) noexcept nogil:
    """The stride of the stream that the fault continues, when it is worth following; 0 otherwise."""
    cdef detector_t *d = pool.detectors[r]
    cdef stream_t *s
    cdef int64_t stride = 0
    cdef int i
    if pool.regions[r].advice == ADVICE_RANDOM or not mutex_trylock(&d.lock):
        return 0
    d.time += 1
    for i in range(STREAMS):
        s = &d.streams[i]
        if s.used and stream_takes(pool, s, index):
            break
    else:
        s = stream_replace(d, index)
    s.used = d.time
    if s.confirmed >= CONFIRM or (pool.regions[r].advice == ADVICE_SEQUENTIAL and s.confirmed):
        stride = s.stride
        stream_ask(pool, r, d, s, index)
    mutex_unlock(&d.lock)
    return stride


cdef inline void stream_fell_short(pool_t *pool, request_t *request, int64_t index) noexcept nogil:
    """Readahead found no frame for `index`: the stream asks again from there."""
    cdef detector_t *d
    cdef stream_t *s
    if request.stream >= STREAMS:
        return
    d = pool.detectors[request.region]
    mutex_lock(&d.lock)
    s = &d.streams[request.stream]
    if s.generation == request.stream_generation and s.stride == request.stride:
        if (s.ahead - index) * (1 if s.stride > 0 else -1) > 0:
            s.ahead = index
    mutex_unlock(&d.lock)
