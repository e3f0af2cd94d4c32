include "_fast.pyx"

# What the debug build has more: failpoints, armed in the control segment itself, as the swapper may be held at one.

from pyswap.core.frame cimport DIRTY, frame_has
from pyswap.core.kernel cimport call_fails, calls_join
from pyswap.core.layout cimport FAIL_OFF, FAILPOINTS, SLOT_NONE, failpoint_t

# In the order of the enumeration in core/lock.pxd.
FAILPOINT_NAMES = (
    "fill_locked", "fill_read", "map_before", "map_onward", "map_for_others",
    "clean_protected", "clean_written", "clean_write",
    "evict_punched", "evict_entry", "fallocate", "copy_made", "copy_ordered", "copy_answered", "drain_page",
    "frame_retired", "takeover", "fork_copied", "entry_read", "hold_noted", "area_state",
    "frame_claim", "frame_claimed", "frame_present", "frame_writeback", "frame_evicting", "frame_free",
    "frame_offline", "frame_back", "frame_dirty", "frame_clean", "frame_pinned", "frame_unpinned",
    "pte_frame", "pte_left",
    "slots_reserve", "slots_reserved", "slot_used", "slot_freed",
    "page_take", "page_taken", "page_shared", "page_dropped", "references_begun", "map_set", "map_put",
    "attendant_order", "attendant_mapped", "attendant_done",
    "file_read",
    "move_begun", "move_placed", "move_mapped",
)
FAILPOINT_ACTIONS = ("off", "park", "errno", "kill", "stop")


cdef failpoint_t *failpoint_of(Control control, int which) except NULL:
    if not 0 <= which < FAILPOINTS:
        raise ValueError(f"no failpoint {which}")
    return &control.header.failpoints[which]


def failpoint_arm(Control control, int which, int action, uint32_t value, uint32_t skip, uint32_t limit):
    """Have a failpoint act (layout.pxd, failpoint_t)."""
    cdef failpoint_t *point = failpoint_of(control, which)
    store32(&point.action, FAIL_OFF)
    point.value = value
    point.skip = skip
    point.limit = limit
    store32(&point.action, action)


def failpoint_release(Control control, int which):
    """Disarm a failpoint, and let every thread parked there go on."""
    cdef failpoint_t *point = failpoint_of(control, which)
    store32(&point.action, FAIL_OFF)
    add32(&point.ticket, 1)
    futex_wake(&point.ticket, 0x7FFFFFFF)


def failpoint_state(Control control, int which):
    """(threads parked now, visits acted on) of a failpoint."""
    cdef failpoint_t *point = failpoint_of(control, which)
    return load32(&point.parked), load32(&point.hits)


def page_record(Control control, uint64_t page):
    """What the tables say of a resident page: (dirty, its slot or None)."""
    cdef uint64_t *pages = <uint64_t *>(control.base + control.header.offset_pages)
    cdef uint64_t pte = load64(&pages[page])
    cdef frame_t *frame
    if not pte_is_frame(pte):
        raise ValueError(f"page {page} is in no frame")
    frame = &(<frame_t *>(control.base + control.header.offset_frames))[pte_frame(pte)]
    slot = None if frame.slot == SLOT_NONE else frame.slot
    return bool(frame_has(frame, DIRTY)), slot


# System calls that a test has fail, counted in a file that all processes of a run have in common.
CALL_NAMES = (
    "pread", "pwrite", "fallocate", "punch", "mmap", "register", "continue", "protect", "userfaultfd", "copy",
)
CALL_RECORD = "=IIIII12x"   # the first and the last call to fail, their errno, how many were made, and failed


def failing_calls_join(path):
    """Count this process's calls in a file, and have those fail that it names."""
    cdef int fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        raise_errno(calls_join(fd), "the file of failing calls")
    finally:
        os.close(fd)


def call_to_fail(name):
    """Count a call that Python makes; the errno with which it is to fail, or 0."""
    return errno if call_fails(CALL_NAMES.index(name)) else 0


# The swapper is told so.
if "PYSWAP_FAILING_CALLS" in os.environ:
    failing_calls_join(os.environ["PYSWAP_FAILING_CALLS"])
