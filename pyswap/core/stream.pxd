"""Streams: which faults belong together, as those of who goes through an array do.

A stream goes from page to page, or by a stride: then by addresses, since the rows of a matrix need not be whole pages,
and with as much of each row as is touched, a block's part of it.  How far apart rows are is known from the array's
shape: a fault a few rows from another, at about its column, begins a block.  Where it is not, it is learned: a step
of one length follows another.  Of a column's elements few are on pages that the column before was not on, far apart:
so of the faults that belong to no stream the latest are looked at, too, whether their distance stays the same.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from pyswap.core.context cimport FAR, STREAMS, detector_t, pool_t, stream_t
from pyswap.core.layout cimport region_id
from pyswap.core.pagetable cimport pte_is_frame, pte_read
from pyswap.core.region cimport PAGE_MASK, region_page

cdef enum:
    MAX_STRIDE_PAGES = 64       # longer steps are taken for a stream only where they follow each other at once
    CONFIRM = 2                 # steps of one stride before anything is read ahead
    LONG_STREAM = 8             # steps after which a far one is taken to come again from another place
    LOOKED_AT = 8               # of the pages that a stream seems to have come by
    SPARSE_AROUND = 32          # pages mapped around a fault that belongs to no stream, to begin with
    ROW_FAULTS = 32             # in a region, from a step of a stream to the next pages of its row, and of some before
    ROWS_BACK = 16              # so many rows are touched side by side
    ROW_PAGES = LONG_STREAM     # of a row that is longer the rest is a stream of its own
    LINE_BYTES = 64             # who goes along a row meets a page at its beginning


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
    """How far apart an array's rows are, where that is known, and two pages or more; else 0."""
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
        # Where rows are known, it will be seen what of them is touched this time.
        stream_begin(s, position, s.stride, CONFIRM, 0 if row_bytes(pool, r) else s.width)
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
