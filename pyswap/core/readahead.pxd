"""Readahead: follow access streams, and queue what is worth reading before it is asked for.

detector_feed() is told of every fault of a region and finds the stream that it continues.  A stream is followed
after two steps of one stride, or three where it leaves out pages near by; what is then kept ahead of it is twice its
way so far, up to the window.  One that goes from page to page is followed by pages; one that leaves pages out by its
addresses, since the rows of a matrix need not be whole pages, and with as much of each row as is touched, a block's
part of it.  Of a column's elements few are on pages that the column before was not on, far apart: so of the faults
that belong to no stream the latest are looked at, too, whether their distance stays the same.

Requests wait in a bounded ring for the readahead threads; a full ring drops them.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport FAR, NOBODY, REQUESTS, STREAMS, detector_t, pool_t, request_t, stream_t
from pyswap.core.layout cimport ADVICE_RANDOM, ADVICE_SEQUENTIAL, region_id, region_t
from pyswap.core.lock cimport add32, futex_wake, load32, load64, mutex_lock, mutex_trylock, mutex_unlock
from pyswap.core.pagetable cimport PTE_EMPTY, pte_is_frame, pte_read
from pyswap.core.region cimport PAGE_MASK, life_drop, life_hold, region_page

cdef enum:
    MAX_STRIDE_PAGES = 64       # longer steps are taken for a stream only where they follow each other at once
    FIRST_WITH_GAPS = 16        # steps read ahead where each is a read of its own: fewer would not keep the device busy
    MOST_WITH_GAPS = 128        # and more would not keep it any busier
    CONFIRM = 2                 # steps of one stride before anything is read ahead
    LONG_STREAM = 8             # steps after which a far one is taken to come again from another place
    STRIDED_SHARES = 16         # requests that a chunk of pages with gaps is asked for in
    LATELY = 1024               # faults in a region: a stream that had none of them is over
    AHEAD_SHARE = 8             # of the frames: what may be read ahead of all streams of a region
    LOOKED_AT = 8               # of the pages that a stream seems to have come by
    SPARSE_AROUND = 32          # pages mapped around a fault that belongs to no stream, to begin with
    SPARSE_SHARE = 8            # of a region: when so much of it may have been mapped so, its faults are dense
    ROW_FAULTS = 32             # in a region, from a step of a stream to the next pages of its row, and of some before
    ROWS_BACK = 16              # so many rows are touched side by side
    ROW_PAGES = LONG_STREAM     # of a row that is longer the rest is a stream of its own
    LINE_BYTES = 64             # who goes along a row meets a page at its beginning


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


cdef inline int64_t absolute(int64_t x) noexcept nogil:
    return x if x >= 0 else -x


cdef inline int64_t page_start(pool_t *pool, int64_t position) noexcept nogil:
    return position & ~(<int64_t>pool.page_bytes - 1)


cdef inline int adjacency(pool_t *pool, int64_t stride) noexcept nogil:
    """1 or -1 for a stream of neighbouring pages; 0 for one that leaves pages out."""
    return 1 if stride == <int64_t>pool.page_bytes else -1 if stride == -<int64_t>pool.page_bytes else 0


cdef inline int64_t steps_left_out(pool_t *pool, stream_t *s) noexcept nogil:
    """The most steps from one fault of a stream to the next: what is mapped around one and read ahead is left out."""
    return s.window + pool.header.around_pages if s.confirmed >= CONFIRM else 1


cdef inline bint in_memory(pool_t *pool, region_id r, int64_t index) noexcept nogil:
    return pte_is_frame(pte_read(pool, region_page(pool, r, index) & PAGE_MASK))


cdef inline bint met_nothing(
    pool_t *pool, region_id r, int64_t position, int64_t stride, int64_t steps
) noexcept nogil:
    """Whether who came to a fault by steps of a stride had no other on the way: they met no page that is out."""
    cdef int64_t i
    for i in range(1, min(steps, <int64_t>LOOKED_AT)):
        if not in_memory(pool, r, (position - i * stride) >> pool.page_shift):
            return False
    return True


cdef inline bint came_by(pool_t *pool, region_id r, stream_t *s, int64_t position, int64_t steps) noexcept nogil:
    """Whether a stream may have gone to a fault without another."""
    return steps <= steps_left_out(pool, s) and met_nothing(pool, r, position, s.stride, steps)


cdef inline uint32_t sparse_around(pool_t *pool) noexcept nogil:
    return min(pool.header.around_pages, <uint32_t>SPARSE_AROUND)


cdef inline uint32_t around_limit(pool_t *pool, region_id r, int64_t stride) noexcept nogil:
    """How many resident neighbours are mapped with a page.

    Mapping as many as one call may takes longer than the fault itself.  A stream wants them; of faults here and there
    few do, until there were so many that they have cost half of what mapping the whole region does.
    """
    cdef uint64_t mapped = load64(&pool.detectors[r].time) * SPARSE_AROUND
    if stride != 0 or mapped >= pool.regions[r].pages // SPARSE_SHARE:
        return pool.header.around_pages
    return sparse_around(pool)


cdef inline bint is_behind_resident(pool_t *pool, region_id r, int64_t position, int64_t delta) noexcept nogil:
    """Whether a fault is at the first page that was not mapped around another: a scan came by what is in memory."""
    cdef int64_t steps = delta >> pool.page_shift
    if steps != <int64_t>pool.header.around_pages + 1 and steps != <int64_t>sparse_around(pool) + 1:
        return False
    return in_memory(pool, r, (position >> pool.page_shift) - 1)


cdef inline void stream_begin(
    stream_t *s, int64_t position, int64_t stride, uint32_t confirmed, int64_t width
) noexcept nogil:
    """Begin a stream anew: what it was is over, and what it asked for no longer its own."""
    s.last = position
    s.stride = stride
    s.confirmed = confirmed
    s.width = width
    s.ahead = position
    s.window = 0
    s.generation += 1


cdef inline int64_t row_bytes(pool_t *pool, region_id r) noexcept nogil:
    """How far apart an array's rows are, where that is known and more than two pages; else 0."""
    return <int64_t>pool.objects[pool.regions[r].object].row_bytes


cdef inline bint block_begins(pool_t *pool, region_id r, stream_t *s, int64_t position) noexcept nogil:
    """Whether a fault is a few rows from a stream's first, and at about the same column; notes it if so."""
    cdef int64_t way = row_bytes(pool, r), rows, column, first
    if way == 0:
        return False
    rows = position // way - s.last // way
    column = position % way
    first = s.last % way
    if rows == 0 or absolute(rows) > ROWS_BACK or absolute(column - first) >= <int64_t>pool.page_bytes:
        return False
    if not met_nothing(pool, r, position, way if rows > 0 else -way, absolute(rows)):
        return False
    s.stride = way if rows > 0 else -way
    s.width = absolute(column - first)
    s.last = position - column + min(column, first)
    s.ahead = s.last
    return True


cdef inline bint block_takes(
    pool_t *pool, region_id r, stream_t *s, int64_t position, uint64_t time, int64_t *start
) noexcept nogil:
    """Whether a fault is in the next rows of a block that a stream goes through; its row begins at *start.

    The block is as wide as the columns are apart that were met so far.
    """
    cdef int64_t way = row_bytes(pool, r), page = <int64_t>pool.page_bytes, rows, column, first, left, right, most
    if way == 0 or absolute(s.stride) != way or time - s.used > ROW_FAULTS:
        return False
    rows = position // way - s.last // way
    if s.stride < 0:
        rows = -rows
    most = steps_left_out(pool, s) if s.confirmed >= CONFIRM else ROWS_BACK
    if rows < -ROWS_BACK or rows > most:
        return False
    column = position % way
    first = s.last % way
    left = min(first, column)
    right = max(first + s.width, column)
    if first - left >= page or right - first - s.width > page or right - left >= ROW_PAGES * page:
        return False
    if rows > 0 and not met_nothing(pool, r, position, s.stride, rows):
        return False
    if (right - left) >> pool.page_shift > s.width >> pool.page_shift:
        s.ahead = s.last
    s.ahead -= first - left
    s.last -= first - left
    s.width = right - left
    if rows > 0:
        s.last += rows * s.stride
        s.confirmed += <uint32_t>rows if s.confirmed else 1
    start[0] = position - column + left
    return True


cdef inline bint stream_takes(pool_t *pool, region_id r, stream_t *s, int64_t position) noexcept nogil:
    """Whether a fault continues a stream; notes it if so."""
    cdef int64_t page = <int64_t>pool.page_bytes
    cdef int64_t delta = page_start(pool, position) - page_start(pool, s.last)
    if delta == 0:
        return True
    if s.stride == 0:
        if is_behind_resident(pool, r, position, delta):
            s.stride = page
            s.confirmed = CONFIRM
        elif absolute(delta) != page and block_begins(pool, r, s, position):
            return True
        elif absolute(delta) > MAX_STRIDE_PAGES * page:
            return False
        else:
            s.stride = delta if absolute(delta) == page else position - s.last
            # By chance many faults lie within reach of one of the others, few right beside it.
            s.confirmed = 1 if absolute(delta) == page else 0
    else:
        if adjacency(pool, s.stride) == 0:
            delta = position - s.last
        if (delta > 0) != (s.stride > 0) or delta % s.stride != 0:
            return False
        if not came_by(pool, r, s, position, delta // s.stride):
            return False
        s.confirmed += <uint32_t>(delta // s.stride)
    s.last = position
    return True


cdef inline bint far_takes(pool_t *pool, region_id r, stream_t *s, int64_t position) noexcept nogil:
    """Whether a fault is as far from the latest one as that was from the one before; else the stream begins anew.

    After one that went on for long, as down a column, it begins with the same stride: the next column is likely.
    """
    cdef int64_t delta = position - s.last
    cdef int64_t steps = delta // s.stride if s.stride else 0
    if steps > 0 and delta == steps * s.stride and came_by(pool, r, s, position, steps):
        s.last = position
        s.confirmed += <uint32_t>steps
        return True
    if s.confirmed >= LONG_STREAM:
        stream_begin(s, position, s.stride, CONFIRM, s.width)
        return True
    stream_begin(s, position, delta, 1, 0)
    return False


cdef inline stream_t *stream_replace(detector_t *d, int64_t position) noexcept nogil:
    cdef stream_t *oldest = &d.streams[0]
    cdef int i
    for i in range(1, STREAMS):
        if d.streams[i].used < oldest.used:
            oldest = &d.streams[i]
    stream_begin(oldest, position, 0, 0, 0)
    return oldest


cdef inline int64_t row_end(pool_t *pool, int64_t row, int64_t width, int64_t pages) noexcept nogil:
    """The index behind the last page of a row; the array has so many."""
    return min(((row + width) >> pool.page_shift) + 1, pages)


cdef inline uint32_t row_pages(pool_t *pool, stream_t *s) noexcept nogil:
    """The most pages that a row of a stream lies on."""
    return <uint32_t>(s.width >> pool.page_shift) + 2


cdef inline bint row_takes(
    pool_t *pool, region_id r, stream_t *s, int64_t position, uint64_t time, int64_t *start
) noexcept nogil:
    """Whether a fault is at the next page of a row that a stream has come to: so are a block's, in a matrix.

    The row begins at *start.  The stream is as wide as its widest row, and what was asked for is asked for again.
    """
    cdef int64_t way = absolute(s.stride), rows, rest, index, begin
    if s.confirmed < CONFIRM or adjacency(pool, s.stride) or time - s.used > ROW_FAULTS:
        return False
    if position & (pool.page_bytes - 1) >= LINE_BYTES:
        return False
    rest = (position - s.last) % way
    if rest < 0:
        rest += way
    begin = position - rest
    index = position >> pool.page_shift
    # The page that the row begins on is no next one.
    if begin < 0 or begin >> pool.page_shift == index:
        return False
    rows = (begin - s.last) // s.stride
    if rest == 0 or rows < -ROWS_BACK or (rows > 0 and not came_by(pool, r, s, begin, rows)):
        return False
    if index - ((begin + s.width) >> pool.page_shift) > 1 or rest >> pool.page_shift > ROW_PAGES:
        return False
    if not in_memory(pool, r, index - 1) or not in_memory(pool, r, begin >> pool.page_shift):
        return False
    if rows > 0:
        s.last = begin
        s.confirmed += <uint32_t>rows
    if rest > s.width:
        s.width = rest
        s.ahead = s.last
    start[0] = begin
    return True


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


cdef inline stream_t *stream_find(
    pool_t *pool, region_id r, detector_t *d, int64_t position, int64_t *row
) noexcept nogil:
    """The stream that a fault continues, or that begins with it; its row begins at *row."""
    cdef stream_t *s
    cdef int i
    row[0] = position
    for i in range(STREAMS + 1):
        s = &d.streams[i]
        if block_takes(pool, r, s, position, d.time, row) or row_takes(pool, r, s, position, d.time, row):
            return s
    for i in range(STREAMS):
        s = &d.streams[i]
        if s.used and stream_takes(pool, r, s, position):
            return s
    s = &d.streams[FAR]
    return s if far_takes(pool, r, s, position) else stream_replace(d, position)


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
