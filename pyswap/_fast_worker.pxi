"""A worker's side, a part of `_fast.pyx`.

`Control` reads the control segment, `Region` is one process's mapping of an object, `Attendant` obeys orders.
"""
import sys

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.string cimport strdup, strlen

from pyswap.core.attendant cimport (
    MAX_LOCAL_RANGES,
    addresses_map,
    addresses_take,
    attendant_main,
    attendant_t,
    kill_self,
    pthread_join,
    range_add,
    range_find,
    range_hold,
    range_map,
    range_overlaps,
    range_remove,
    range_reserve,
    range_t,
    ranges_t,
    say,
    strlen,
    thread_start,
)
from pyswap.core.election cimport close_fd, fd_close, fd_note, heir_forget, pyswap_heir
from pyswap.core.frame cimport LOCKED, word_resident, word_state
from pyswap.core.kernel cimport uffd_open
from pyswap.core.pagetable cimport pte_frame, pte_is_frame, pte_is_slot, pte_slot

cdef extern from *:
    """
    #include <fcntl.h>
    #include <pthread.h>
    #include <stdio.h>
    #include <unistd.h>
    /* So that tests of the debug build arm failpoints, and workers visit them. */
    static inline void header_writable(void *header, uint64_t bytes, int fd) {
    #ifdef PYSWAP_DEBUG
        char path[32];
        int again;
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        if ((again = open(path, O_RDWR | O_CLOEXEC)) < 0) return;
        if (mmap(header, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, again, 0) != MAP_FAILED)
            madvise(header, bytes, MADV_DONTDUMP);
        close(again);
    #else
        (void)header, (void)bytes, (void)fd;
    #endif
    }
    static inline void unmap(void *p, uint64_t bytes) { munmap(p, bytes); }
    """
    void header_writable(void *header, uint64_t bytes, int fd) noexcept nogil
    void unmap(void *p, uint64_t bytes) noexcept nogil
    int pthread_atfork(void (*before)() noexcept nogil, void (*parent)() noexcept nogil, void (*child)() noexcept nogil)

cdef ranges_t ranges


cdef void after_fork_in_child() noexcept nogil:
    """Nothing else may be mapped where arrays were: they come back at the same addresses, or not at all."""
    cdef uint32_t i
    cdef const char *text = b"pyswap: a forked process has no memory for its mappings, and ends\n"
    ranges.lock = 0
    ranges.sequence = 0
    heir_forget()
    for i in range(ranges.count):
        if not range_hold(ranges.entries[i].address, ranges.entries[i].bytes):
            say(text, strlen(text))
            kill_self()


cdef void make_ranges() except *:
    if ranges.entries == NULL:
        ranges.entries = <range_t *>calloc(MAX_LOCAL_RANGES, sizeof(range_t))
        if ranges.entries == NULL or pthread_atfork(NULL, NULL, after_fork_in_child) != 0:
            raise MemoryError("pyswap: no memory for the table of mapped ranges")


def owns(uint64_t address):
    """Whether an address is in a live region of this process, of any pool."""
    return range_find(&ranges, address) != NULL


cdef int overlaps(uint64_t address, uint64_t size) noexcept nogil:
    return range_overlaps(&ranges, address, size)


def overlaps_function():
    """The address of a C function (address, bytes): whether they overlap live regions; it may be called anywhere."""
    return <uint64_t>&overlaps


def find(uint64_t address):
    """The live region over an address: (start, bytes, token of its pool), or None."""
    cdef range_t *entry = range_find(&ranges, address)
    if entry == NULL:
        return None
    return entry.address, entry.bytes, entry.token


def open_uffd():
    """A userfaultfd of this process: (descriptor, whether it is user mode only)."""
    cdef int user_only = 0
    cdef int fd = uffd_open(&user_only)
    raise_errno(fd, "userfaultfd")
    return fd, bool(user_only)


def reserve(uint64_t size):
    """Reserve addresses; returns the first."""
    cdef void *p = range_reserve(0, size)
    if p == NULL:
        raise_errno(-errno, f"{size} bytes of addresses")
    return <uint64_t>p


def unreserve(uint64_t address, uint64_t size):
    """Give reserved addresses back."""
    unmap(<void *>address, size)


def reserve_again(uint64_t address, uint64_t size):
    """Replace what is mapped by reserved addresses, in one step.

    Where the kernel has no memory for that, what is mapped stays until the addresses are given back: nobody refers
    to it any more.
    """
    range_hold(address, size)


def punch(int fd, uint64_t offset, uint64_t size):
    """Give the memory of a range of a shared memory object back."""
    raise_errno(file_punch(fd, offset, size), "punching a hole in shared memory")


def map_range(uint64_t address, uint64_t size, int fd, uint64_t offset, int uffd, bint writable=True):
    """Map a file over reserved addresses and register them, so that the swapper resolves every fault."""
    raise_errno(range_map(address, size, fd, offset, uffd, writable), "mapping an array")


def stamp_of(int fd):
    """What a file is now, in one number that changes when its bytes do."""
    cdef uint64_t stamp = 0
    raise_errno(file_stamp(fd, &stamp), "the file")
    return stamp


cdef class Region:
    """One process's mapping of an object: a buffer, ended when nothing refers to it any more.

    Parameters
    ----------
    owner
        What is told at the end: ``owner.region_ended(address, mapped_bytes)``.
    address, mapped_bytes
        Where it is mapped; whole pages.
    size
        Bytes of the array; the buffer's length.
    token
        Which pool of this process.
    writable
        Whether the buffer is, as the mapping.
    """
    cdef readonly object owner
    cdef readonly uint64_t address
    cdef readonly uint64_t mapped_bytes
    cdef readonly uint64_t size
    cdef readonly bint ended
    cdef object __weakref__
    cdef bint writable

    def __init__(
        self, owner, uint64_t address, uint64_t mapped_bytes, uint64_t size, uint64_t token, bint writable=True
    ):
        self.ended = True
        make_ranges()
        if not range_add(&ranges, address, mapped_bytes, token):
            raise MemoryError(f"more than {MAX_LOCAL_RANGES} arrays in one process")
        self.owner = owner
        self.address = address
        self.mapped_bytes = mapped_bytes
        self.size = size
        self.writable = writable
        self.ended = False

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.address, <Py_ssize_t>self.size, not self.writable, flags)

    def __len__(self):
        return self.size

    def __del__(self):
        # At interpreter exit memory stays mapped: daemon threads may still use it, and the process ends anyway.
        try:
            if self.ended or sys.is_finalizing():
                return
        except AttributeError:
            # So late that even sys is empty.
            return
        self.ended = True
        range_remove(&ranges, self.address)
        reserve_again(self.address, self.mapped_bytes)
        self.owner.region_ended(self.address, self.mapped_bytes)


cdef int take_addresses(void *attendant, uint64_t address, uint64_t size) noexcept nogil:
    return addresses_take(<attendant_t *>attendant, address, size)


cdef int map_addresses(void *attendant, uint64_t address, uint64_t size, uint64_t offset) noexcept nogil:
    return addresses_map(<attendant_t *>attendant, address, size, offset)


cdef class Attendant:
    """The thread that obeys the swapper's orders in this process."""
    cdef attendant_t *state
    cdef bint running
    cdef size_t words
    cdef Control control

    def __cinit__(
        self, Control control, int channel, int sock, int uffd, int store_fd, int empty_fd, uint64_t token, heir
    ):
        cdef list words
        make_ranges()
        self.state = <attendant_t *>calloc(1, sizeof(attendant_t))
        if self.state == NULL:
            raise MemoryError("pyswap: no memory for the attendant")
        self.state.channel.fd = self.state.sock.fd = self.state.watch.pidfd = self.state.watch.opened.fd = -1
        self.state.watch.mark = -1
        self.control = control
        self.state.ranges = &ranges
        self.state.header = control.header
        # Its own: at the interpreter's end Python closes its sockets, and arrays are used still.
        fd_note(&self.state.channel, os.dup(channel))
        fd_note(&self.state.sock, os.dup(sock))
        self.state.watch.pid_namespace = pid_namespace()
        words, reader, writer, control_fd, name = heir
        fd_note(&self.state.heir.reader, reader)
        fd_note(&self.state.heir.writer, writer)
        fd_note(&self.state.heir.control, control_fd)
        self.born()
        self.words = len(words)
        self.state.heir.argv = <char **>calloc(self.words + 1, sizeof(char *))
        self.state.heir.name_length = len(name)
        self.state.heir.name = strdup(name)
        if self.state.heir.argv == NULL or self.state.heir.name == NULL:
            raise MemoryError("pyswap: no memory for the attendant")
        for i, word in enumerate(words):
            self.state.heir.argv[i] = strdup(word)
        self.state.uffd = uffd
        self.state.store_fd = store_fd
        self.state.empty_fd = empty_fd
        self.state.token = token
        raise_errno(thread_start(&self.state.thread, attendant_main, self.state), "pyswap: the attendant thread")
        self.running = True
        # The thread reads the segment when its channel ends, which may be after this object's end.
        Py_INCREF(control)

    cdef born(self):
        """Have the next swapper started as the first one was, not as this process would start one."""
        cdef pyswap_heir *heir = &self.state.heir
        cdef birth_t *birth = <birth_t *>(self.control.base + self.control.header.offset_birth)
        cdef uint64_t at = 0, size = min(birth.environ_bytes, sizeof(birth.environ))
        cdef size_t n = 0
        heir.limits = birth.limits
        heir.processors = birth.processors
        heir.nice = birth.nice
        heir.mask = birth.mask
        heir.environment = <char **>calloc((<bytes>birth.environ[:size]).count(b"\0") + 1, sizeof(char *))
        if heir.environment == NULL:
            raise MemoryError("pyswap: no memory for the attendant")
        while at < size:
            heir.environment[n] = &birth.environ[at]
            at += strlen(heir.environment[n]) + 1
            n += 1

    def mapper(self):
        """Addresses: of the first argument of addresses_take() and addresses_map(), and of the two, for C code."""
        return <uint64_t>self.state, <uint64_t>&take_addresses, <uint64_t>&map_addresses

    def detach(self):
        """Announce that the end of the channel is in good order."""
        store32(&self.state.detached, 1)

    def orphaned(self):
        """Whether the swapper died, or serves this process no more."""
        return bool(load32(&self.state.orphaned))

    def join(self):
        """Wait for the thread; its channel has been shut down."""
        cdef attendant_t *state = self.state
        if self.running:
            self.running = False
            with nogil:
                pthread_join(state.thread, NULL)
            fd_close(&state.channel)
            fd_close(&state.sock)
            Py_DECREF(self.control)

    def forget(self):
        """In a forked child: the thread was the parent's."""
        if self.running:
            self.running = False
            fd_close(&self.state.watch.opened)
            close_fd(self.state.watch.mark)
            fd_close(&self.state.channel)
            fd_close(&self.state.sock)
            Py_DECREF(self.control)

    def __dealloc__(self):
        # A thread that still runs keeps its state: it may outlive the interpreter.
        if self.state != NULL and not self.running:
            if self.state.heir.argv != NULL:
                for i in range(self.words):
                    free(self.state.heir.argv[i])
            # Those of a thread that could not be started.
            fd_close(&self.state.channel)
            fd_close(&self.state.sock)
            free(self.state.heir.argv)
            free(self.state.heir.environment)
            free(self.state.heir.name)
            free(self.state)


cdef class Control:
    """A worker's read-only view of the control segment.

    Raises
    ------
    ValueError
        Where the segment is not one of this version, or too small for what its header says.
    """
    cdef uint8_t *base
    cdef header_t *header
    cdef uint64_t size
    cdef int fd

    def __cinit__(self, int fd):
        cdef uint64_t length = os.fstat(fd).st_size
        self.fd = fd
        if length < sizeof(header_t):
            raise ValueError(f"not a pyswap control segment: it is too short, {length} bytes")
        self.base = <uint8_t *>map_file(fd, length, False)
        if self.base == NULL:
            raise_errno(-errno, "pyswap: the control segment cannot be mapped")
        self.size = length
        self.header = <header_t *>self.base
        why = why_no_control(self.header, length)
        if why is not None:
            raise ValueError(f"not a pyswap control segment of this version: {why}")
        header_writable(self.base, round_up(sizeof(header_t), 4096), fd)

    def store_bytes(self):
        """The length of the page store that goes with the segment."""
        return <uint64_t>self.header.page_count * self.header.page_bytes

    def __dealloc__(self):
        if self.base != NULL:
            unmap(self.base, self.size)

    def numbers(self):
        """Every number of the header, by name."""
        cdef header_t *h = self.header
        out = {name: h.counters[i] for i, name in enumerate(COUNTER_NAMES)}
        out.update({name + "_frames": loadi64(&h.state_count[i]) for i, name in enumerate(STATE_NAMES)})
        out["page_size"] = h.page_bytes
        out["memory_pages"] = load64(&h.memory_pages)
        out["slot_count"] = h.slot_count
        out["slots_used"] = loadi64(&h.slots_used)
        out["resident_pages"] = loadi64(&h.resident_count)
        out["dirty_pages"] = loadi64(&h.dirty_count)
        out["pinned_pages"] = loadi64(&h.pinned_count)
        out["committed_pages"] = load64(&h.committed_pages)
        out["in_transit_pages"] = load64(&h.in_transit_pages)
        out["swapper_pid"] = h.swapper_pid
        return out

    def ended(self):
        """Whether the swapper ended in good order."""
        return bool(load32(&self.header.ended))

    def closed(self):
        """Whether the creator has closed the pool."""
        return bool(load32(&self.header.closed))

    def mark(self):
        """The random number that its elections go by."""
        return self.header.mark

    def workers(self):
        """Process ids of the workers attached now."""
        cdef worker_t *table = <worker_t *>(self.base + self.header.offset_workers)
        return [table[i].pid for i in range(MAX_WORKERS) if load64(&table[i].word) & (<uint64_t>1 << 31)]

    def residency(self, uint64_t first, uint64_t count, uint8_t[::1] out):
        """Write 1 for each page id from `first` on that is resident, else 0."""
        cdef uint64_t i, pte
        cdef uint64_t *pages = <uint64_t *>(self.base + self.header.offset_pages)
        cdef frame_t *frames = <frame_t *>(self.base + self.header.offset_frames)
        if (count > self.header.page_count or first > self.header.page_count - count
                or <uint64_t>out.shape[0] < count):
            raise ValueError("page ids beyond the table")
        with nogil:
            for i in range(count):
                pte = load64(&pages[first + i])
                out[i] = (pte_is_frame(pte) and pte_frame(pte) < self.header.frame_room
                          and word_resident(load64(&frames[pte_frame(pte)].word)))

    def frame(self, uint64_t page):
        """The frame of a page id for tests: (number, state, waiting workers, mappers, is locked), or None."""
        cdef uint64_t *pages = <uint64_t *>(self.base + self.header.offset_pages)
        cdef frame_t *frames = <frame_t *>(self.base + self.header.offset_frames)
        cdef uint64_t pte = load64(&pages[page]), word
        cdef uint32_t f
        if not pte_is_frame(pte):
            return None
        f = pte_frame(pte)
        waiting = sum(int(load64(&frames[f].waiters[i])).bit_count() for i in range(4))
        mappers = sum(int(load64(&frames[f].mappers[i])).bit_count() for i in range(4))
        word = load64(&frames[f].word)
        return f, STATE_NAMES[word_state(word)], waiting, mappers, word & LOCKED != 0

    def references(self, uint64_t page):
        """How many regions refer to a page id of an array that was forked, for tests."""
        return load32(&(<uint32_t *>(self.base + self.header.offset_references))[page])

    def slot(self, uint64_t page):
        """The slot of a page id that is in swap only, for tests: (number, checksum), or None."""
        cdef uint64_t *pages = <uint64_t *>(self.base + self.header.offset_pages)
        cdef slot_t *slots = <slot_t *>(self.base + self.header.offset_slots)
        cdef uint64_t pte = load64(&pages[page])
        if not pte_is_slot(pte):
            return None
        return pte_slot(pte), slots[pte_slot(pte)].checksum
