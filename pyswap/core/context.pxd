"""What one swapper process knows of its pool: where the tables are mapped, its descriptors, its leaf locks.

Everything here can be rebuilt from the control segment and the workers' descriptors; nothing else is private.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyswap.core.layout cimport (
    C_PEAK_RESIDENT,
    copy_t,
    family_t,
    frame_id,
    frame_t,
    header_t,
    object_id,
    object_t,
    page_id,
    pin_t,
    region_id,
    region_t,
    slot_t,
    worker_id,
    worker_t,
)
from pyswap.core.lock cimport add64, addi64, cas64, load64, mutex_t

cdef enum:
    STREAMS = 16                # access streams followed in one region
    FAR = STREAMS               # and one whose steps are too long for them
    NOBODY = STREAMS + 1        # no stream
    REQUESTS = 1024             # readahead requests that may wait
    STARVED_FAULTS = 1024       # faults that may wait for a frame without a thread

cdef struct stream_t:
    int64_t last                # where in the region the latest fault was that belonged to it, in bytes
    int64_t stride              # bytes; 0 while there is one fault only
    int64_t ahead               # up to where (exclusive, in stride's direction) was asked for, in bytes
    uint32_t confirmed          # steps of the stride that it has gone
    uint32_t window             # steps kept ahead
    int64_t width               # how far behind each step's position its row is touched, too, in bytes
    uint64_t used               # detector time, for replacement
    uint32_t generation         # a request that comes back short names the stream it was for

cdef struct detector_t:
    mutex_t lock
    uint64_t time
    stream_t streams[17]

cdef struct request_t:
    object_id object
    uint32_t generation         # of the object
    int64_t first               # bytes, as in a stream: the pages that these fall on
    int64_t stride
    int64_t width               # with each of them, those that so many bytes behind it fall on
    uint32_t count
    bint zeros                  # for pages that nobody has touched
    region_id region            # whose map to follow, and whose stream to tell when frames ran out
    uint32_t region_generation
    uint32_t stream
    uint32_t stream_generation
    uint32_t epoch              # of the object: a pageout since then has made the request void

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
    uint32_t deaf               # an order was for it, and its end of the channel is closed
    uint32_t visited            # a thread maps something for it that serves another's fault
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
    int store_uffd              # of the alias, for runs of pages; -errno: this process may have none
    int area_fds[16]
    int poll_fd
    uint32_t stop
    uint32_t fault_threads
    uint64_t fault_begun[16]    # when each of them took the fault that it is at; 0: at none
    uint32_t pressed            # reclaim is between its watermarks
    uint32_t memory_short       # a free frame had no memory: what is evicted next leaves some

    mutex_t buffers_lock        # guards the two below
    uint8_t *buffers            # what is left of the huge page that buffers are cut from
    uint64_t buffers_bytes

    mutex_t free_lock           # guards the two below
    uint32_t free_count
    frame_id *free_list         # a hint: the words in the frame table are the truth
    uint32_t chunk_limit        # pages of a readahead thread's buffer
    uint32_t steal_hand         # where the search for slots to take back begins
    uint32_t hand               # reclaim's place in the frame table; its other hand is half a turn ahead

    mutex_t cold_lock           # guards the three below
    uint32_t cold_head
    uint32_t cold_tail
    frame_id *cold              # frames to be evicted first: a ring of frame_room

    mutex_t hot_lock            # guards the rest of this group, see policy.pxd
    uint64_t hot_head
    uint64_t hot_tail
    uint64_t *hot               # frames that became HOT, with their generations: a ring of frame_room
    uint64_t hot_chance
    uint64_t hot_less           # frames: how far below their greatest number the limit of HOT ones is
    uint64_t left[2]            # pages evicted lately: that had not, and had been HOT
    uint64_t returned[2]        # of those, that came back soon

    mutex_t slots_lock          # guards the areas' cursors and counts, and the rest of this group
    uint16_t *chunk_used        # slots in use of each chunk
    uint8_t *chunk_ready        # its records have memory
    uint64_t chunk_refused_ns   # when there was none for a chunk
    uint64_t chunks_kept[16]    # of each area, those that have memory from its beginning on

    mutex_t requests_lock       # guards the three below
    uint32_t requests_head
    uint32_t requests_tail
    request_t requests[1024]
    uint32_t requests_sequence  # futex
    uint32_t *epochs            # by object id: one more with every pageout

    mutex_t starved_lock        # guards the three below
    uint32_t starved_head
    uint32_t starved_tail
    starved_t starved[1024]
    uint32_t starved_sequence   # futex

    copy_t *copies              # MAX_COPIES
    uint8_t copies_ready        # they have memory
    uint8_t reminders[1024]     # those that a takeover has to order again
    uint32_t copies_next        # where the search for a free one begins
    uint32_t copied_sequence    # futex: bumped when an attendant has answered
    uint32_t mappings_limit     # vm.max_map_count

    attached_t attached[256]
    detector_t **detectors      # by region id
    region_id **mapped          # by object id: its first region in each worker
    int *files                  # by object id: descriptors, where they have a file
    family_t *families          # by object id; without memory until the object is first shared
    uint8_t *families_ready     # whether it has that
    uint64_t *unswept           # a bit by object id: its family has something to sweep or to give back
    uint64_t *map_entries       # the table of maps
    uint64_t **maps             # by region id: its page ids by index, there; NULL: base + index
    pin_t *pins                 # MAX_PINS
    uint64_t *written           # a row of groups.pxd: a frame of the group may be WRITABLE
    uint64_t *touched           # a row for each worker: a frame of the group may have it as a mapper
    uint32_t **places           # by object id: see family.pxd; NULL: no page of it was ever moved


cdef inline void count(pool_t *pool, int which, uint64_t n) noexcept nogil:
    add64(&pool.header.counters[which], n)


cdef inline void count_most(pool_t *pool, int which, uint64_t now) noexcept nogil:
    """Keep the most that there was at once."""
    cdef uint64_t most = load64(&pool.header.counters[which])
    while now > most and not cas64(&pool.header.counters[which], most, now):
        most = load64(&pool.header.counters[which])


cdef inline void count_resident(pool_t *pool, int change) noexcept nogil:
    """A frame is counted until it may be claimed anew, so there are never more than frames."""
    cdef int64_t before
    if change:
        before = addi64(&pool.header.resident_count, change)
        count_most(pool, C_PEAK_RESIDENT, <uint64_t>(before + change))


cdef inline bint mappings_short(pool_t *pool, worker_id worker) noexcept nogil:
    """Whether a worker comes near the most mappings that the kernel lets a process have."""
    return pool.attached[worker].breaks > <int64_t>pool.mappings_limit * 3 // 4
