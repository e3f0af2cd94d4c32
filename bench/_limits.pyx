"""What the machine could do at best, measured without Python in the way.

Compiled by `bench.native` when the bench starts; no part of the package.
"""
from libc.stdint cimport int64_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from pyswap.core cimport kernel

cdef extern from *:
    """
    #include <fcntl.h>
    #include <poll.h>
    #include <unistd.h>
    static inline int wait_readable(int fd) {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        return poll(&p, 1, -1);
    }
    static inline int64_t transfer_at(int fd, int writing, void *buffer, uint64_t bytes,
                                      int64_t offset) {
        return writing ? pwrite(fd, buffer, bytes, offset) : pread(fd, buffer, bytes, offset);
    }
    static inline void touch(uint64_t address) { (void)*(volatile char *)address; }
    """
    int wait_readable(int fd) noexcept nogil
    int64_t transfer_at(int fd, bint writing, void *buffer, uint64_t size_bytes,
                        int64_t offset) noexcept nogil
    void touch(uint64_t address) noexcept nogil


cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec * 1000000000 + t.tv_nsec


def transfer(int fd, bint writing, const int64_t[::1] offsets, uint64_t buffer,
             uint64_t size_bytes):
    """Read or write `size_bytes` at each offset, one after the other; OSError on a short one."""
    cdef Py_ssize_t i
    cdef int64_t done = 0
    with nogil:
        for i in range(offsets.shape[0]):
            done = transfer_at(fd, writing, <void *>buffer, size_bytes, offsets[i])
            if done != <int64_t>size_bytes:
                break
    if offsets.shape[0] and done != <int64_t>size_bytes:
        raise OSError(f"{done} of {size_bytes} bytes transferred")


def touch_all(const uint64_t[::1] addresses):
    """Read a byte at each address, one after the other; return nanoseconds for all."""
    cdef Py_ssize_t i
    cdef int64_t begin
    with nogil:
        begin = now_ns()
        for i in range(addresses.shape[0]):
            touch(addresses[i])
        begin = now_ns() - begin
    return begin


def open_registered(uint64_t address, uint64_t length):
    """Register a mapping with a userfaultfd of its own, and return that."""
    cdef int user_only = 0
    cdef int fd = kernel.uffd_open(&user_only)
    if fd < 0:
        raise OSError(-fd, "userfaultfd")
    cdef int failed = kernel.uffd_register(fd, address, length)
    if failed < 0:
        raise OSError(-failed, "UFFDIO_REGISTER")
    return fd


def serve(int fd, int64_t count, uint64_t page_bytes):
    """Map what `count` faults ask for, a page of resident bytes each."""
    cdef uint64_t address = 0, flags = 0
    cdef int existed = 0, failed = 0
    with nogil:
        while count > 0 and failed >= 0:
            failed = wait_readable(fd)
            if failed >= 0:
                failed = kernel.uffd_read(fd, &address, &flags)
            if failed > 0:
                address &= ~(page_bytes - 1)
                failed = kernel.uffd_continue(fd, address, page_bytes, 0, &existed)
                count -= 1
    if failed < 0:
        raise OSError(-failed, "userfaultfd")
