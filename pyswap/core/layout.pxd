"""The records in the control segment and the law they live under.  Read first.

The lock tree, outermost first (a step upwards, or sideways to a second frame, is a trylock):

    worker.lock                 one worker's list of regions; memory only, never across a system call
      frame (LOCKED)            one page: its bytes, descriptor, mappings; the only lock held
                                across I/O, a blocking system call or a wait
        region.gate             shared: what a write may do to a private page is being decided; taken under
                                a frame by a try; exclusive: a fork copies the map, holding nothing else
        free.lock  slots.lock  hot.lock  readahead.lock  stream.lock  family.lock  copies.lock     leaves

Rules, cited by number in the code:

 R1  A frame's state changes only through frame_set_<state>(), which asserts the predecessor.
 R2  An ioctl on an address is issued only under the lock of the frame that this address maps, while the
     region is held (region_hold), so that neither the page nor the mapping can become another.
 R3  DIRTY is set before a page becomes writable anywhere, and the mapper is noted before it is mapped.
     DIRTY clear implies: no writable mapping in any process, and the slot, or else the object's file, holds the
     bytes, or they are zero.
 R4  Nobody waits for a frame, or for a frame's lock, while holding another lock.  Readahead waits for none.
 R5  A page leaves memory in this order: clean, EVICTING, punch, page table entry, FREE.  Punching after the
     entry had changed would punch the next fill away.
 R6  A slot is freed only under the lock of its page's frame, or by who wins the compare-and-swap that
     takes it out of the page table entry.
 R7  A fill belongs to an object: after its frame is in the page table it asks once more whether the object
     lives, and undoes itself if not; the sweep of a dying object starts after the death is visible.
 R8  Nothing in core/ touches a Python object or the GIL.
 R9  Bytes of the store are made only by fallocate or write, never by a touch, under the lock of the page's frame in
     FILLING.
 R10 A page of a private object with more than one reference is mapped writable nowhere.  A reference is added only
     with the gate of the region that is copied shut; a region's map entry changes only under the lock of the
     frame that it named, with the gate entered, which an entry that is COPYING needs not: a fork looks at it again
     when it has found no pin.  Or with the gate shut, of addresses that are out of use: they come
     into use when nobody who had the frame locked is left (a move).
 R11 A pinned page is never shared: fork copies it early.  What a worker's attendant is about to map is pinned until
     it says so, since the mapping is out of the userfaultfd's sight meanwhile.

The frame's states, and what is true in each:

    FREE ──claim──▶ FILLING ──▶ PRESENT ◀──▶ WRITEBACK
     ▲                │  │         │
     │◀────undo───────┘  ▼         ▼
     ├────────────── OFFLINE    EVICTING ──▶ FREE
     └────────────── RETIRED

    FREE       in no page table entry; the free list may or may not know it
    FILLING    locked by the filler; page, object and previous slot are in the descriptor
    PRESENT    the entry of `page` names this frame; the store holds its bytes
    WRITEBACK  as PRESENT; the bytes are being written to a reserved slot; not evictable; a write
               sets REDIRTIED, which discards that slot
    EVICTING   locked by the evictor; clean, unpinned; about to be punched
    OFFLINE    the store could get no memory for it; a frame less until memory is found again
    RETIRED    a frame less since the budget was lowered, until it is raised again

Conservation, checked whenever a test ends:
    free + filling + present + writeback + evicting + offline + retired == frame_count
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

ctypedef uint32_t frame_id
ctypedef uint32_t slot_id
ctypedef uint64_t page_id
ctypedef uint32_t object_id
ctypedef uint32_t region_id
ctypedef uint32_t worker_id

cdef enum:
    LAYOUT_VERSION = 6
    MAX_WORKERS = 256           # processes attached at once; a frame's mapper set has a bit for each
    WORKER_WORDS = 4            # 64-bit words of such a set
    MAX_OBJECTS = 65536
    MAX_REGIONS = 262144
    MAX_BATCH_PAGES = 1024      # one write, one readahead request, one sweep
    MAX_AROUND_PAGES = 256      # one fault-around
    MAX_COPY_PAGES = 64         # one run of copies
    MAX_FAMILY_REGIONS = 512    # regions that share the pages of one private object
    MAX_EXTENTS = 1024          # two for each of those
    MAX_CLONES = 128            # of those, in one process
    MAX_COPIES = 1024           # runs of copies that attendants are about to map
    MAX_PINS = 65536            # pinned ranges
    NAME_BYTES = 72
    PATH_BYTES = 128
    EXTENT_ALIGN_PAGES = 512    # page table entries of two objects never share a kernel page
    SLOT_CHUNK = 256            # slots whose records fill one kernel page of the swap map
    MAX_AREAS = 16              # swap areas at once
    AREA_SHIFT = 28             # a slot's number has its area above so many bits
    COUNTERS = 32
    STATES = 8
    FAILPOINTS = 64
    RESOURCES = 16              # that the kernel limits for a process
    CPU_WORDS = 16              # 64-bit words of a set of processors
    ENVIRON_BYTES = 1 << 21

cdef enum:
    SLOT_NONE = 0xFFFFFFFF
    FRAME_NONE = 0xFFFFFFFF
    REGION_NONE = 0xFFFFFFFF

cdef extern from *:
    """
    #define NO_EXTENT UINT64_MAX
    """
    const page_id NO_EXTENT     # no run of page ids, or of map entries

# Indices of header_t.counters.
cdef enum:
    C_MINOR_FAULTS
    C_MAJOR_FAULTS
    C_WRITE_FAULTS
    C_ZERO_FILLS
    C_FILL_WAITS
    C_FRAME_WAITS
    C_SLOT_READS
    C_SLOT_WRITES
    C_READ_CALLS
    C_WRITE_CALLS
    C_CLEAN_DROPS
    C_ZERO_DROPS
    C_WRITE_AHEAD
    C_READAHEAD_PAGES
    C_READAHEAD_HITS
    C_EVICTIONS
    C_REDIRTIED
    C_SLOT_STEALS
    C_READ_ERRORS
    C_WRITE_ERRORS
    C_POISONED
    C_COW_COPIES
    C_COW_REMAPS
    C_REFAULTS
    C_ACTIVATIONS
    C_FILE_READS
    C_CHECKSUM_ERRORS
    # The most there was at once:
    C_PEAK_RESIDENT
    C_PEAK_SLOTS
    C_PEAK_COMMITTED

# The frame's states.
cdef enum:
    FREE = 0
    FILLING = 1
    PRESENT = 2
    WRITEBACK = 3
    EVICTING = 4
    OFFLINE = 5
    RETIRED = 6

# A swap area's state.
cdef enum:
    AREA_OFF = 0
    AREA_ON = 1
    AREA_DRAINING = 2           # on its way out: no slot of it is reserved any more

# What becomes of a region that was numbered and is not mapped yet, when the swapper dies.
cdef enum:
    PROMISE_NONE = 0            # it was begun, or has ended
    PROMISE_CHILD = 1           # a forked child will map it: it stays
    PROMISE_MAKING = 2          # it was being made: it goes, and who asked for it asks again

# A worker's place.
cdef enum:
    PLACE_FREE = 0
    PLACE_PROMISED = 1          # kept for a child that is being forked
    PLACE_TAKEN = 2             # of an attached process

# A pinned range.
cdef enum:
    PIN_FREE = 0
    PIN_MAKING = 1              # not granted yet
    PIN_GRANTED = 2

# The file that an object's untouched pages come from.
cdef enum:
    FILE_NONE = 0
    FILE_READ = 1               # nobody writes to the array: no page of it needs a slot, and none is committed
    FILE_COPY = 2               # what is written goes to swap

# A region's advice.
cdef enum:
    ADVICE_NORMAL = 0
    ADVICE_SEQUENTIAL = 1
    ADVICE_RANDOM = 2

# What to do at a failpoint, in the debug build.
cdef enum:
    FAIL_OFF = 0
    FAIL_PARK = 1
    FAIL_ERRNO = 2
    FAIL_KILL = 3
    FAIL_STOP = 4


cdef struct failpoint_t:
    uint32_t action             # FAIL_*; written last when arming
    uint32_t value              # the errno of FAIL_ERRNO
    uint32_t skip               # visits to let pass first
    uint32_t parked             # threads parked here now
    uint32_t ticket             # bumped to let every parked thread go
    uint32_t limit              # visits to act on; then the point disarms itself
    uint32_t hits
    uint32_t pad

cdef struct frame_t:
    uint64_t word               # see frame.pxd; changed by compare-and-swap only
    # Guarded by LOCKED in word:
    page_id page
    object_id object
    slot_id slot                # where the same bytes are in swap; SLOT_NONE: nowhere
    uint32_t pins
    uint32_t writable_pins
    # Changed by atomic or; cleared under LOCKED:
    uint64_t mappers[4]         # workers that may map the page: a superset
    uint64_t waiters[4]         # workers whose faults wait for LOCKED to end
    # Guarded by LOCKED:
    uint64_t index              # the page's place in its object, the same in every region
    uint64_t pad[3]

cdef struct slot_t:
    uint64_t word               # see swapmap.pxd
    uint64_t checksum           # of a USED slot's bytes, over the word: a page's bytes, and nobody else's

cdef struct area_t:
    uint32_t state              # AREA_*
    int32_t priority            # the highest is filled first, equal ones take turns
    uint64_t slots
    int64_t used
    uint64_t cursor             # where the search for free slots begins; from the area's first
    uint64_t errors             # failed transfers
    uint64_t number             # as the swapper calls it, one more for each
    uint64_t pad[2]
    char path[128]              # for messages: its beginning
    uint32_t failures           # single slots that could not be written, since one could
    uint32_t error              # the errno of the latest failed transfer
    uint64_t rest_ns            # its latest rest; 0: the latest write went well
    uint64_t rest_until_ns      # no slot of it is reserved before
    int64_t bad                 # slots put aside

cdef struct object_t:
    uint64_t word               # see region.pxd: generation, life
    page_id base
    uint64_t pages
    uint64_t size_bytes
    uint32_t is_private         # copied on write after fork: its pages have references and its regions maps
    uint16_t is_sparse          # private; its pages are given and taken back range by range
    uint16_t file               # FILE_*
    char name[72]
    uint64_t row_bytes          # how far apart its rows are, for readahead; 0: unknown, or not worth knowing
    uint64_t file_offset        # of the array's first byte
    uint64_t file_stamp         # what the file was when it was opened; see kernel.pxd
    uint32_t transits           # pickles that keep it, until they are loaded
    uint32_t is_kept            # as long as it has its name
    uint32_t labelled           # it has a label_t
    uint32_t pad

cdef struct label_t:            # what an object is found by, and what it is found as
    char label[4096]
    char layout[4096]

cdef struct region_t:
    uint64_t word               # see region.pxd: generation, dying, users
    uint64_t address
    uint64_t pages
    page_id base
    object_id object
    worker_id worker
    uint32_t advice
    uint32_t object_generation
    uint32_t gate               # see region.pxd
    region_id next              # the worker's next region of the same object
    uint32_t is_private
    uint32_t breaks             # neighbours whose page ids are not: each begins another mapping
    uint64_t map                # where its map begins in the table of maps; NO_EXTENT: base + index
    uint32_t promise            # PROMISE_*
    uint32_t is_plain           # its map goes on page id by page id, and no entry of it was ever changed

cdef struct worker_t:
    uint64_t word               # as a region's
    uint32_t pid
    uint32_t place              # PLACE_*
    uint64_t serial             # of the place's user: descriptors in the vault are its if they carry this
    uint64_t served             # its latest request that changed what keeps an object; see hold.pxd
    uint64_t pad2[4]

cdef struct family_t:           # the page ids that the regions of one private object share
    uint32_t lock               # guards the rest
    uint32_t count              # extents, holes among them; 0 until the object is first shared
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
    uint32_t done               # so many of them were mapped before a takeover
    uint32_t pad
    page_id old[64]             # what the map named before

cdef struct pin_t:              # a pinned range of pages
    uint32_t state              # PIN_*; written last
    uint32_t write
    worker_id worker
    region_id region
    uint64_t number             # of the pin, as its worker calls it; a pin may have several ranges
    uint64_t first
    uint64_t count

cdef struct hold_t:             # a change of what keeps an object, see hold.pxd
    uint32_t noted              # written last; 0 once it is done
    object_id object
    uint32_t transits
    uint32_t is_kept
    uint64_t request            # what asked for it; 0: nobody did
    worker_id worker
    uint32_t pad

cdef struct birth_t:            # how the first swapper was started: those that come after it are, too
    uint64_t limits[32]         # by resource, the soft one and the hard one
    uint64_t processors[16]     # that it may run on
    int32_t nice
    uint32_t mask               # what umask() says
    uint64_t environ_bytes
    char environ[2097152]       # each string ends with a zero byte; it has memory as far as it is used

cdef struct header_t:
    uint64_t magic
    uint32_t version
    uint32_t page_bytes
    uint64_t frame_count        # in the table, the retired ones among them
    uint64_t frame_room         # that the table has room for
    uint64_t memory_pages       # the budget
    uint64_t slot_count         # of the areas that are on
    uint64_t page_count         # page ids there are; the store is this many pages long
    uint64_t offset_frames      # bytes from the start of the segment, as all offsets here
    uint64_t offset_workers
    uint64_t offset_regions
    uint64_t offset_objects
    uint64_t offset_slots
    uint64_t offset_pages
    uint64_t offset_references
    uint64_t offset_families
    uint64_t offset_maps
    uint64_t offset_copies
    uint64_t offset_pins
    uint64_t offset_labels
    uint64_t offset_birth
    uint64_t size_bytes
    # Watermarks of free frames: readahead stops at `minimum`, reclaim starts at `low`, ends at `high`.
    uint32_t minimum_frames
    uint32_t low_frames
    uint32_t high_frames
    uint32_t batch_pages        # a reclaim batch
    uint32_t window_pages       # the most that readahead keeps ahead of one stream
    uint32_t chunk_pages        # one readahead request
    uint32_t around_pages       # a fault-around
    uint32_t frame_wait_ms      # a fault that found no frame for so long fails
    uint32_t swapper_pid
    uint32_t swapper_generation  # futex: one more with every takeover
    uint64_t swapper_namespace  # that swapper_pid is of; see election.pxd
    uint64_t mark               # random: a pool's elections are its own
    uint64_t heartbeat          # grows as long as the swapper is well
    uint64_t progress           # grows while it repairs what another has left
    uint32_t region_high        # no region, or object, from these numbers on was ever used
    uint32_t object_high
    uint32_t pin_high
    uint32_t pad3
    uint32_t ended              # the swapper is ending in good order
    uint32_t closed             # no new arrays
    uint32_t overcommit         # arrays may have more pages than frames and swap can hold
    uint32_t pad
    uint64_t committed_pages
    uint64_t commit_limit_pages
    uint64_t in_transit_pages   # of objects that a pickle on its way keeps alive
    # Changed by atomic addition:
    int64_t state_count[8]
    int64_t resident_count      # PRESENT and WRITEBACK at once: of two numbers, read in turn, a frame may be in both
    int64_t dirty_count
    int64_t slots_used
    int64_t pinned_count
    uint32_t free_sequence      # futex: bumped when frames become free
    uint32_t reclaim_sequence   # futex: bumped when frames run low
    hold_t hold
    area_t areas[16]
    uint32_t area_turn          # whose turn it is among equals
    uint32_t pad2
    uint64_t counters[32]
    failpoint_t failpoints[64]
