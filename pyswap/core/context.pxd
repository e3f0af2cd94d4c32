"""What one swapper process knows of its pool: where the tables are mapped, its descriptors, its leaf locks.

Everything here can be rebuilt from the control segment and the workers' descriptors; nothing else is private.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyswap.core.layout cimport (
    frame_id,
    frame_t,
    header_t,
    object_id,
    object_t,
    page_id,
    region_id,
    region_t,
    slot_t,
    worker_id,
    worker_t,
)
from pyswap.core.lock cimport add64, mutex_t

cdef enum:
    STREAMS = 8                 # access streams followed in one region
    REQUESTS = 1024             # readahead requests that may wait
    STARVED_FAULTS = 1024       # faults that may wait for a frame without a thread

cdef struct stream_t:
    int64_t last                # page index of the latest fault that belonged to it
    int64_t stride              # pages; 0 while there is one fault only
    int64_t ahead               # index up to which (exclusive, in stride's direction) was asked for
    uint32_t confirmed          # faults that kept to the stride
    uint32_t window             # steps kept ahead
    uint64_t used               # detector time, for replacement
    uint32_t generation         # a request that comes back short names the stream it was for

cdef struct detector_t:
    mutex_t lock
    uint64_t time
    stream_t streams[8]

cdef struct request_t:
    object_id object
    uint32_t generation         # of the object
    int64_t first               # page index
    int64_t stride
    uint32_t count
    region_id region            # whose map to follow, and whose stream to tell when frames ran out
    uint32_t region_generation
    uint32_t stream             # STREAMS: nobody's
    uint32_t stream_generation

cdef struct family_t:           # the page ids that the regions of one private object share
    mutex_t lock                # guards the rest
    uint32_t count              # extents, holes among them; 0 until the object is first shared
    uint32_t unswept            # a page without references may still have a frame or a slot
    page_id extents[1024]       # first page ids, each of as many pages as the object; NO_EXTENT: a hole
    int64_t live[1024]          # page ids with references

cdef struct copy_t:             # a run of copies that an attendant is about to map
    uint64_t word               # see copy.pxd: generation, state
    region_id region
    uint32_t generation         # of the region
    int64_t index
    uint32_t count
    worker_id worker
    page_id page                # the first of the new ones, which are consecutive
    page_id old[64]             # what the map named before

cdef struct starved_t:          # a fault that found no free frame
    worker_id worker
    uint64_t address
    uint64_t flags

cdef struct attached_t:         # the swapper's own side of one worker
    mutex_t lock                # guards the three below
    uint32_t count
    uint32_t capacity
    region_id *regions          # sorted by address
    int uffd
    int channel                 # to its attendant
    int64_t breaks              # of all its regions

cdef struct pool_t:
    header_t *header
    frame_t *frames
    worker_t *workers
    region_t *regions
    object_t *objects
    slot_t *slots
    uint64_t *pages             # the page table
    uint32_t *references        # by page id; of private objects that were shared
    uint8_t *store              # this process's alias of the whole page store
    uint64_t page_bytes
    uint32_t page_shift
    int control_fd
    int store_fd
    int swap_fd
    int poll_fd
    uint32_t stop
    uint32_t pressed            # reclaim is between its watermarks

    mutex_t free_lock           # guards the two below
    uint32_t free_count
    frame_id *free_list         # a hint: the words in the frame table are the truth
    uint32_t hand               # reclaim's place in the frame table

    mutex_t cold_lock           # guards the three below
    uint32_t cold_head
    uint32_t cold_tail
    frame_id *cold              # frames to be evicted first: a ring of frame_count

    mutex_t slots_lock          # guards the rest of this group
    uint64_t slot_cursor
    uint16_t *chunk_used        # slots in use of each chunk
    uint8_t *chunk_ready        # its records have memory

    mutex_t requests_lock       # guards the three below
    uint32_t requests_head
    uint32_t requests_tail
    request_t requests[1024]
    uint32_t requests_sequence  # futex

    mutex_t starved_lock        # guards the three below
    uint32_t starved_head
    uint32_t starved_tail
    starved_t starved[1024]
    uint32_t starved_sequence   # futex

    copy_t copies[1024]
    uint32_t copies_next        # where the search for a free one begins
    uint32_t copied_sequence    # futex: bumped when an attendant has answered
    uint32_t mappings_limit     # vm.max_map_count

    attached_t attached[256]
    detector_t **detectors      # by region id
    region_id **mapped          # by object id: its first region in each worker
    family_t **families         # by object id; NULL until the object is first shared
    uint64_t **maps             # by region id: its page ids by index; NULL: base + index


cdef inline void count(pool_t *pool, int which, uint64_t n) noexcept nogil:
    add64(&pool.header.counters[which], n)
